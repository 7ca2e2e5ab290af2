package chaos

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// startTries is how long the server tries to reach PostgreSQL. A try may take two seconds.
	startTries = 30 * time.Second

	// startMargin is added for that, and for a busy machine.
	startMargin = 6 * time.Second

	// endLimit bounds the end after a signal, which comes at once. The rest is for a busy machine.
	endLimit = 2 * time.Second
)

// absences are the ways in which PostgreSQL may not be there, and how it comes back.
var absences = []struct {
	name  string
	leave func(*postgres)
	back  func(*postgres)
}{
	{"refused", func(pg *postgres) { pg.kill() }, func(pg *postgres) { pg.restart() }},
	{"silent", func(pg *postgres) { pg.freeze() }, func(pg *postgres) { pg.thaw() }},
}

// TestStartBeforePostgreSQL starts the server while PostgreSQL is not there. The server waits for
// it, and then serves.
func TestStartBeforePostgreSQL(t *testing.T) {
	for _, absence := range absences {
		pg := startPostgres(t)
		absence.leave(pg)
		s := launchServer(t, vars{"DATABASE_URL": pg.url, "REDIS_URL": startRedis(t).url})
		s.awaitTries(2)
		absence.back(pg)
		back := time.Now()
		eventually(t, startMargin, "the server is ready", s.isReady)
		t.Logf("%s: ready %v after PostgreSQL", absence.name, time.Since(back))
		signedUp(t, s)
	}
}

// TestStartBeforeRedis starts the server while Redis is not there. The server starts all the same,
// says that it is not ready, and serves once Redis is there.
func TestStartBeforeRedis(t *testing.T) {
	redis := startRedis(t)
	redis.kill()
	s := launchServer(t, vars{"DATABASE_URL": startPostgres(t).url, "REDIS_URL": redis.url})
	eventually(t, startLimit, "the server is healthy", func() bool {
		return s.status("/healthz") == http.StatusOK
	})
	if status := s.status("/readyz"); status != http.StatusServiceUnavailable {
		t.Errorf("/readyz without Redis: %d", status)
	}
	redis.restart()
	eventually(t, goodAgainLimit, "the server is ready", s.isReady)
	signedUp(t, s)
}

// TestSignalDuringStart ends the server while it waits for PostgreSQL. That is an ordinary end.
func TestSignalDuringStart(t *testing.T) {
	for _, absence := range absences {
		pg := startPostgres(t)
		absence.leave(pg)
		s := launchServer(t, vars{"DATABASE_URL": pg.url, "REDIS_URL": "redis://127.0.0.1:1"})
		s.awaitTries(1)
		sent := time.Now()
		if err := s.terminate(); err != nil {
			t.Errorf("%s: the server ended with %v", absence.name, err)
		}
		if took := time.Since(sent); took > endLimit {
			t.Errorf("%s: the server ended only after %v", absence.name, took)
		}
	}
}

// awaitTries waits until the server has logged so many tries to reach PostgreSQL.
func (s *server) awaitTries(n int) {
	s.t.Helper()
	eventually(s.t, startTries, "a line for each try", func() bool {
		return strings.Count(s.output(), "waiting for PostgreSQL") >= n
	})
}

// TestStartGivesUp lets the server wait in vain.
func TestStartGivesUp(t *testing.T) {
	skipIfShort(t)
	for _, absence := range absences {
		t.Run(absence.name, func(t *testing.T) {
			t.Parallel()
			pg := startPostgres(t)
			absence.leave(pg)
			began := time.Now()
			output := failToStart(t, pg.url, startTries+startMargin)
			if took := time.Since(began); took < startTries {
				t.Errorf("the server gave up after %v", took)
			}
			if tries := strings.Count(output, "waiting for PostgreSQL"); tries < 10 {
				t.Errorf("the server has logged %d tries", tries)
			}
		})
	}
}

// TestStartIsRefused starts the server with a wrong password, and with a database that is not
// there. Waiting would not help, so the server says at once what is wrong.
func TestStartIsRefused(t *testing.T) {
	pg := startPostgres(t)
	output := failToStart(t, strings.Replace(pg.url, "/postgres?", "/nowhere?", 1), startMargin)
	pg.requirePassword()
	output += failToStart(t, pg.url, startMargin)
	if strings.Contains(output, "waiting for PostgreSQL") {
		t.Errorf("the server has waited for PostgreSQL:\n%s", output)
	}
}

// failToStart starts a server whose URL of PostgreSQL also gets a password. The server must end
// with exit status 1 in time, name the setting, and not show the password. failToStart returns what
// the server has said.
func failToStart(t *testing.T, url string, within time.Duration) string {
	t.Helper()
	s := launchServer(t, vars{
		"DATABASE_URL": strings.Replace(url, "postgres@", "postgres:sesame@", 1),
		"REDIS_URL":    "redis://127.0.0.1:1",
	})
	eventually(t, within, "the server ends", s.hasEnded)
	if status := s.cmd.ProcessState.ExitCode(); status != 1 {
		t.Errorf("the exit status is %d", status)
	}
	output := s.output()
	if last := lastLines(output, 1); !strings.HasPrefix(last, "DATABASE_URL: ") {
		t.Errorf("the last line is %q", last)
	}
	if strings.Contains(output, "sesame") {
		t.Error("the output shows the password")
	}
	return output
}

// requirePassword makes a PostgreSQL ask for passwords, which nobody has, and waits until it does.
func (pg *postgres) requirePassword() {
	pg.t.Helper()
	file := pg.query("current_setting('hba_file')")
	pg.exec("COPY (SELECT 'host all all all scram-sha-256') TO '" + file + "'")
	pg.signal(syscall.SIGHUP)
	eventually(pg.t, startMargin, "PostgreSQL wants a password", func() bool {
		return !connects(pg.url)
	})
}
