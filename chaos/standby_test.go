package chaos

// standby_test.go takes the primary PostgreSQL away from under the server, which must go on with
// the standby once that has been promoted.

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// A pair is a primary PostgreSQL and its standby. A commit waits for the standby, so that a
// promotion loses nothing. Without synchronous_standby_names, which is empty by default, it would
// lose the signups and password changes that the standby has not received yet.
type pair struct {
	t       *testing.T
	primary *postgres
	standby *postgres
}

func startPair(t *testing.T) *pair {
	t.Helper()
	bin := postgresBin(t)
	primary := startPostgres(t, "synchronous_standby_names=*")
	data := filepath.Join(newPostgresFolder(t), "data")
	backup := asPostgres(exec.Command(filepath.Join(bin, "pg_basebackup"),
		"--pgdata="+data,
		"--dbname="+primary.url,
		"--write-recovery-conf",
		"--checkpoint=fast",
		"--no-sync",
	))
	if out, err := backup.CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	p := &pair{t: t, primary: primary, standby: startPostgresOn(t, bin, data)}
	eventually(t, startLimit, "commits wait for the standby", func() bool {
		return primary.query(`
			SELECT count(*)
			FROM pg_stat_replication
			WHERE application_name = 'walreceiver' AND sync_state = 'sync'`) == "1"
	})
	return p
}

// env has a DATABASE_URL with both hosts, the primary first.
func (p *pair) env() vars {
	return vars{
		"DATABASE_URL": "postgres://postgres@127.0.0.1:" + p.primary.port +
			",127.0.0.1:" + p.standby.port +
			"/postgres?sslmode=disable&target_session_attrs=read-write",
		"REDIS_URL":       startRedis(p.t).url,
		"LOGIN_LIMIT_MAX": "0",
	}
}

// promote makes the standby the primary, and returns when it takes writes.
func (p *pair) promote() time.Time {
	p.t.Helper()
	p.standby.query("SELECT pg_promote()")
	eventually(p.t, startLimit, "the standby is promoted", func() bool {
		return p.standby.query("SELECT pg_is_in_recovery()") == "false"
	})
	return time.Now()
}

// signUpAnother signs somebody else up.
func (u *actor) signUpAnother() {
	other := newUser(u.server)
	if u.send("signup", other.signup).ok() {
		u.traffic.mu.Lock()
		defer u.traffic.mu.Unlock()
		u.traffic.joined = append(u.traffic.joined, other)
	}
}

// A handover is a way in which the primary goes.
type handover struct {
	name  string
	users int
	lose  func(primary *postgres)
}

// handovers begins with the one for short mode. With few users, the server has idle connections to
// a silent primary, which nobody notices until they are used.
var handovers = []handover{
	{"killed", 12, func(pg *postgres) { pg.kill() }},
	{"stopped", 12, func(pg *postgres) { pg.freeze() }},
	{"stopped, few users", 2, func(pg *postgres) { pg.freeze() }},
	{"read-only", 12, func(pg *postgres) {
		pg.exec("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
	}},
}

func TestStandbyPromoted(t *testing.T) {
	for i, h := range handovers {
		t.Run(h.name, func(t *testing.T) {
			if i > 0 {
				skipIfShort(t)
			}
			h.test(t)
		})
	}
}

func (h handover) test(t *testing.T) {
	const outage = 3 * time.Second // until an operator, or a program, promotes the standby
	p := startPair(t)
	s := startServer(t, p.env())
	everybody := func(*actor) bool { return true }
	warmup := newTraffic(t, s, 12, everybody) // fills the pool of connections
	warmup.start((*actor).logInAgain)
	time.Sleep(time.Second)
	warmup.end()
	tr := newTraffic(t, s, h.users, everybody)
	tr.start(append(session, (*actor).signUpAnother)...)
	time.Sleep(2 * time.Second)

	broken := tr.breaks("")
	h.lose(p.primary)
	time.Sleep(outage)
	promoted := p.promote()
	refused, last := tr.calmed(broken)
	tr.end()
	late := max(0, last.Sub(promoted))
	t.Logf("| Primary | Standby promoted after | Last 503 after that | 503 | Signups |\n"+
		"| %s | %.1f s | %.1f s | %d | %d |",
		h.name, promoted.Sub(broken).Seconds(), late.Seconds(), refused, len(tr.joined))
	if refused == 0 {
		t.Error("there was no 503, so the primary was not lost")
	}
	if late > recoveryLimit+recoveryMargin {
		t.Errorf("the last 503 came %v after the promotion", late)
	}
	for _, u := range tr.joined {
		if a := u.login(); !a.ok() {
			t.Errorf("the login of a user whose signup was answered: %v", a)
		}
	}
}

// A server that starts while the first host of its URL is silent must serve at once.
func TestStandbyFirstHostSilent(t *testing.T) {
	const signups = 30
	p := startPair(t)
	p.promote()
	p.primary.freeze()
	began := time.Now()
	s := startServer(t, p.env())
	ready := time.Since(began)
	answers := make([]answer, signups)
	var all sync.WaitGroup
	for i := range answers {
		all.Go(func() { answers[i] = newUser(s).signup() })
	}
	all.Wait()
	var slowest time.Duration
	for _, a := range answers {
		if !a.ok() {
			t.Errorf("signup beside a silent host: %v", a)
		}
		slowest = max(slowest, a.took)
	}
	t.Logf("ready after %.1f s; the slowest of %d signups took %.1f s",
		ready.Seconds(), signups, slowest.Seconds())
}
