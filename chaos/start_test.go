package chaos

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// triesEvery is the time from one try to reach PostgreSQL to the next.
	triesEvery = time.Second

	// givesUpAfter is how long the server tries. The last try may begin just before.
	givesUpAfter = 30 * time.Second

	// startMargin is added to both for a busy machine.
	startMargin = 5 * time.Second
)

// TestStartBeforePostgreSQL starts the server while PostgreSQL is not there, or is there and says
// nothing. The server waits for it, and then serves.
func TestStartBeforePostgreSQL(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		pg := startPostgres(t)
		pg.kill()
		testStartBefore(t, pg, pg.restart)
	})
	t.Run("silent", func(t *testing.T) {
		pg := startPostgres(t)
		pg.freeze()
		testStartBefore(t, pg, pg.thaw)
	})
}

func testStartBefore(t *testing.T, pg *postgres, mend func()) {
	s := launchServer(t, vars{
		"DATABASE_URL": pg.url,
		"REDIS_URL":    startRedis(t).url,
	})
	s.awaitTries(3)
	mend()
	mended := time.Now()
	eventually(t, triesEvery+startMargin, "the server is ready", s.isReady)
	t.Logf("ready %v after PostgreSQL", time.Since(mended).Round(time.Millisecond))
	signedUp(t, s)
}

// awaitTries waits until the server has logged so many tries to reach PostgreSQL.
func (s *server) awaitTries(n int) {
	s.t.Helper()
	eventually(s.t, givesUpAfter, "a line for each try", func() bool {
		return strings.Count(s.output(), "waiting for PostgreSQL") >= n
	})
}

// TestSignalDuringStart ends the server while it waits for PostgreSQL. That is an ordinary end.
func TestSignalDuringStart(t *testing.T) {
	pg := startPostgres(t)
	redis := startRedis(t)
	for name, breakIt := range map[string]func(){
		"silent":  func() { pg.freeze() },
		"refused": func() { pg.kill() },
	} {
		breakIt()
		s := launchServer(t, vars{"DATABASE_URL": pg.url, "REDIS_URL": redis.url})
		s.awaitTries(1)
		sent := time.Now()
		if err := s.terminate(); err != nil {
			t.Errorf("%s: the server ended with %v", name, err)
		}
		if took := time.Since(sent); took > time.Second {
			t.Errorf("%s: the server ended only after %v", name, took)
		}
	}
}

// TestStartGivesUp lets the server wait in vain. It says which setting is to blame, and shows no
// password.
func TestStartGivesUp(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	for _, name := range []string{"refused", "silent"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pg := startPostgres(t)
			if name == "refused" {
				pg.kill()
			} else {
				pg.freeze()
			}
			began := time.Now()
			output := failsToStart(t, pg, "postgres:sesame@", givesUpAfter+startMargin)
			if took := time.Since(began); took < givesUpAfter {
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
	pg.exec("CREATE ROLE stranger LOGIN PASSWORD 'something else'")
	pg.requirePassword("stranger")
	for name, account := range map[string]string{
		"wrong password": "stranger:sesame@",
		"no such role":   "nobody:sesame@",
	} {
		t.Run(name, func(t *testing.T) {
			failsToStart(t, pg, account, startMargin)
		})
	}
	t.Run("no such database", func(t *testing.T) {
		other := *pg
		other.url = strings.Replace(pg.url, "/postgres?", "/nowhere?", 1)
		failsToStart(t, &other, "postgres:sesame@", startMargin)
	})
}

// failsToStart starts a server with an account, user and password, of a PostgreSQL. The server must
// end with exit status 1 in time, and name the setting. It returns what the server has said.
func failsToStart(t *testing.T, pg *postgres, account string, within time.Duration) string {
	t.Helper()
	s := launchServer(t, vars{
		"DATABASE_URL": strings.Replace(pg.url, "postgres@", account, 1),
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

// requirePassword makes a PostgreSQL ask a role for its password, and waits until it does.
func (pg *postgres) requirePassword(role string) {
	pg.t.Helper()
	line := "host all " + role + " 127.0.0.1/32 scram-sha-256"
	pg.exec("COPY (SELECT '" + line + "') TO '" + pg.query("current_setting('hba_file')") + "'")
	pg.signal(syscall.SIGHUP)
	stranger := strings.Replace(pg.url, "postgres@", role+"@", 1)
	eventually(pg.t, startMargin, "PostgreSQL wants a password", func() bool {
		conn, err := pgx.Connect(context.Background(), stranger)
		if err == nil {
			conn.Close(context.Background())
		}
		return err != nil
	})
}
