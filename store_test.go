package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"
)

// Migrations

// relations lists what a database has, to see that nothing was changed.
func relations(t testing.TB, database string) string {
	t.Helper()
	return queryText(t, database, `
		SELECT coalesce(string_agg(relname, ' ' ORDER BY relname), '')
		FROM pg_class
		WHERE relnamespace = 'public'::regnamespace`)
}

func TestMigrateCommand(t *testing.T) {
	env := map[string]string{
		"DATABASE_URL": newDatabase(t),
		"JWT_SECRET":   "", // it needs the database and nothing else
		"REDIS_URL":    "",
		"NODE_ENV":     "",
	}
	migrate := func(args ...string) []string {
		t.Helper()
		printed, err := runCommand(t, env, append([]string{"migrate"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(printed), "\n")
	}
	before := migrate("status")
	if len(before) != 2 || !strings.HasPrefix(before[0], "0001  pending") {
		t.Errorf("before: %q", before)
	}
	if got := relations(t, env["DATABASE_URL"]); got != "" {
		t.Errorf("status has made %s", got)
	}
	migrate()
	applied := migrate("status")
	for _, line := range applied {
		at, err := time.Parse(time.RFC3339, strings.Fields(line)[1])
		if err != nil || time.Since(at).Abs() > 5*time.Minute {
			t.Errorf("after: %q", line)
		}
	}
	migrate()
	if again := migrate("status"); !slices.Equal(again, applied) {
		t.Errorf("applied again: %q, first %q", again, applied)
	}
}

// TestForeignMigrations holds that a schema which this version does not know is left alone.
func TestForeignMigrations(t *testing.T) {
	for version, sql := range map[string]string{
		"0001": "UPDATE schema_migrations SET checksum = 'another' WHERE version = '0001'",
		"9999": "INSERT INTO schema_migrations (version, name, checksum) VALUES ('9999', 'x', 'x')",
	} {
		env := map[string]string{"DATABASE_URL": newDatabase(t)}
		if _, err := runCommand(t, env, "migrate"); err != nil {
			t.Fatal(err)
		}
		execSQL(t, env["DATABASE_URL"], sql)
		for _, args := range [][]string{nil, {"serve"}, {"migrate"}, {"migrate", "status"}} {
			_, err := runCommand(t, env, args...)
			if err == nil || !strings.Contains(err.Error(), version) {
				t.Errorf("%q after %s: %v", args, sql, err)
			}
		}
	}
}

// TestServesWithoutDDLRights holds that the server's role needs to read and write rows only, once
// somebody else has migrated.
func TestServesWithoutDDLRights(t *testing.T) {
	role := "latchkey_test_" + strings.ReplaceAll(newUUID(), "-", "")
	t.Cleanup(func() { // after the database has gone, and the role's rights with it
		if err := onServer("DROP ROLE IF EXISTS " + role); err != nil {
			t.Error(err)
		}
	})
	database := newDatabase(t)
	if _, err := runCommand(t, map[string]string{"DATABASE_URL": database}, "migrate"); err != nil {
		t.Fatal(err)
	}
	execSQL(t, database, `
		CREATE ROLE `+role+` LOGIN PASSWORD 'some password';
		REVOKE CREATE ON SCHEMA public FROM PUBLIC;
		GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO `+role)
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "some password")
	c := signedUp(start(t, map[string]string{"DATABASE_URL": u.String()}))
	want(t, c.changePassword("another password"), 200, "")
	want(t, c.refresh(), 200, "")
}

// Round trips

// TestRoundTrips holds what each request costs, once the connections are there and Redis knows the
// scripts.
func TestRoundTrips(t *testing.T) {
	calls := &recorder{}
	env := map[string]string{"RATE_LIMIT_MAX": "1000"}
	s := startApp(t, env, nil, calls)
	dear := startApp(t, map[string]string{"BCRYPT_COST": "5"}, nil, calls)
	c := signedUp(s)
	other := c.loggedIn()
	all := []string{"rate-limit", "session"} // the rate limit and requireAuth
	for _, test := range []struct {
		name    string
		request func() response
		want    []string
	}{
		{"refresh", c.refresh, []string{"rate-limit", "sql", "user-sessions"}},
		{"me", c.me, append(all, "sql")},
		{"list", c.sessions, append(all, "user-sessions")},
		{"revoke", func() response { return c.revoke(other.sessionID()) }, append(all, "user-sessions")},
		// A transaction takes a statement to begin and one to commit.
		{"login", c.login, []string{"rate-limit", "sql", "sql", "sql", "user-sessions", "sql"}},
		{
			"rehash at login",
			c.at(dear).login,
			[]string{
				"sql", "sql", "sql", "user-sessions", "sql",
				"sql", "sql", "user-sessions", "sql",
			},
		},
		{
			"change the password",
			func() response { return c.changePassword(c.password) },
			append(all, "sql", "sql", "sql", "user-sessions", "sql"),
		},
		{"revoke all", c.revokeAll, append(all, "user-sessions")},
		{"log in again", c.login, []string{"rate-limit", "sql", "sql", "sql", "user-sessions", "sql"}},
		{"logout", c.logout, []string{"rate-limit", "user-sessions"}},
	} {
		calls.take()
		want(t, test.request(), 200, "")
		if got := calls.take(); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// Races: simultaneous requests of one user at two replicas

const rounds = 10

// TestEverythingAtOnce lets a user do at once all that can be done to sessions. However that
// interleaves, nothing fails, and what revokes all in the end leaves nothing.
func TestEverythingAtOnce(t *testing.T) {
	servers := replicas(t, nil)
	for range rounds {
		c := signedUp(servers[0])
		var mu sync.Mutex
		opened := []*client{c}
		actions := []func(d *client) response{
			(*client).refresh,
			(*client).me,
			(*client).sessions,
			(*client).logout,
			func(d *client) response { return d.changePassword(d.password) },
			func(d *client) response {
				d = d.device()
				r := d.login()
				mu.Lock()
				defer mu.Unlock()
				opened = append(opened, d)
				return r
			},
		}
		answers := together(4*len(actions), func(i int) response {
			d := c.at(servers[i%2])
			r := actions[i/4](d)
			if d.cookie != c.cookie {
				mu.Lock()
				defer mu.Unlock()
				opened = append(opened, d)
			}
			return r
		})
		wantOnly(t, answers, "200", "401 refresh_reused", "401 session_revoked")
		want(t, c.loggedIn().revokeAll(), 200, "")
		wantDead(t, servers, opened...)
	}
}

// TestCapRace holds that a user who has the most sessions that there may be, and logs in many times
// at once, has as many afterwards, the new ones among them.
func TestCapRace(t *testing.T) {
	servers := replicas(t, nil)
	short := start(t, map[string]string{"REFRESH_TOKEN_TTL": "1h"}) // these would expire first
	rdb := redisClient(t)
	c := signedUp(short)
	for range 100 {
		want(t, c.device().login(), 200, "")
	}
	for range rounds {
		devices := make([]*client, 9)
		answers := together(len(devices), func(i int) response {
			devices[i] = c.at(servers[i%2]).device()
			return devices[i].login()
		})
		wantOnly(t, answers, "200")
		for _, d := range devices {
			want(t, d.refresh(), 200, "")
		}
		if got := rdb.ZCard(t.Context(), "user-sessions:{"+c.userID()+"}").Val(); got != 100 {
			t.Errorf("the index has %d sessions, want 100", got)
		}
		living, err := rdb.Keys(t.Context(), "session:{"+c.userID()+"}:*").Result()
		if err != nil || len(living) != 100 {
			t.Errorf("%d sessions live (%v), want 100", len(living), err)
		}
	}
}

// TestRefreshAgainstSQL holds that no session outlives a change of the hash by plain SQL, whatever
// refreshes are under way.
func TestRefreshAgainstSQL(t *testing.T) {
	servers := replicas(t, nil)
	for range rounds {
		c := signedUp(servers[0])
		tabs := c.tabs(2, servers)
		answers := together(3, func(i int) response {
			if i == 2 {
				execSQL(t, servers[0].database,
					"UPDATE users SET password_hash = 'x' WHERE email = $1", c.email)
				return response{status: 200}
			}
			return tabs[i].refresh()
		})
		wantOnly(t, answers, "200", "401 refresh_reused", "401 session_revoked")
		for _, d := range tabs {
			if r := d.refresh(); r.status != 401 {
				t.Errorf("a session outlives the change: %v", r)
			}
		}
		wantDead(t, servers, tabs...)
	}
}

// TestSlowCommit widens the gap between what a change of the user's row does to the sessions and its
// commit. Meanwhile others log in and refresh.
func TestSlowCommit(t *testing.T) {
	database := newDatabase(t)
	env := map[string]string{"DATABASE_URL": database}
	servers := replicas(t, env)
	dear := start(t, map[string]string{"DATABASE_URL": database, "BCRYPT_COST": "5"})
	execSQL(t, database, `
		CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END';
		CREATE CONSTRAINT TRIGGER slow AFTER UPDATE OR DELETE ON users
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
	rehash := func(c *client) response { return c.at(dear).device().login() }
	change := func(c *client) response { return c.changePassword("new " + c.password) }
	for _, test := range []struct {
		name       string
		change     func(c *client) response
		ownLives   bool // the session itself goes on, all the while
		othersLive bool // and so does what logs in meanwhile
	}{
		{"change the password", change, true, false},
		{"delete the account", (*client).deleteAccount, false, false},
		{"rehash", rehash, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := signedUp(servers[0])
			own, others, changed := duringChange(c, servers[1], test.change)
			want(t, changed, 200, "")
			if test.ownLives {
				want(t, own.refresh(), 200, "")
			}
			for _, d := range others {
				if test.othersLive {
					want(t, d.refresh(), 200, "")
				}
			}
			if !test.othersLive {
				wantDead(t, servers, others...)
			}
		})
	}
}

// duringChange runs a change. Until it is done, one tab refreshes again and again as long as it can,
// and a new device logs in again and again at another server. It returns the tab, the devices that
// got in, and the answer to the change.
func duringChange(
	c *client,
	other *server,
	change func(c *client) response,
) (*client, []*client, response) {
	own := c.tab()
	var others []*client
	done := make(chan struct{})
	isDone := func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
	answers := together(3, func(i int) response {
		var r response
		switch i {
		case 0:
			defer close(done)
			return change(c.tab())
		case 1:
			for r = own.refresh(); r.status == 200 && !isDone(); {
				r = own.refresh()
			}
		case 2:
			for !isDone() {
				d := c.at(other).device()
				if r = d.login(); r.status == 200 {
					others = append(others, d)
				}
			}
		}
		return r
	})
	return own, others, answers[0]
}

// Sessions of other versions

// TestOversizedIndex holds that an index with more sessions than there may be is cut at the next
// login, and that a password change ends all of it.
func TestOversizedIndex(t *testing.T) {
	s := start(t, nil)
	rdb := redisClient(t)
	fill := func(c *client) {
		t.Helper()
		key := "session:{" + c.userID() + "}:"
		dump, err := rdb.Dump(t.Context(), key+c.sessionID()).Result()
		if err != nil {
			t.Fatal(err)
		}
		_, err = rdb.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
			for range 3000 {
				sid := newUUID()
				expiry := redis.Z{Score: float64(time.Now().Unix() + 600), Member: sid}
				pipe.Restore(t.Context(), key+sid, 10*time.Minute, dump)
				pipe.ZAdd(t.Context(), "user-sessions:{"+c.userID()+"}", expiry)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	count := func(c *client) int {
		living, err := rdb.Keys(t.Context(), "session:{"+c.userID()+"}:*").Result()
		if err != nil {
			t.Fatal(err)
		}
		return len(living)
	}
	for _, test := range []struct {
		name string
		act  func(c *client) response
		want int
	}{
		{"login", (*client).login, 100},
		{"change the password", func(c *client) response { return c.changePassword("new password") }, 1},
		{"revoke all", (*client).revokeAll, 0},
	} {
		c := signedUp(s)
		fill(c)
		want(t, test.act(c), 200, "")
		if got := count(c); got != test.want {
			t.Errorf("%s leaves %d sessions, want %d", test.name, got, test.want)
		}
	}
}

// Lost replies

// TestLostReplies holds that what Redis has carried out is not sent a second time if its reply is
// lost.
func TestLostReplies(t *testing.T) {
	p := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": p.url, "REFRESH_REUSE_POLICY": "resend"})
	s.expect(503)
	t.Run("logout", func(t *testing.T) {
		c := signedUp(s)
		want(t, c.loggedIn().logout(), 200, "") // now Redis knows the script
		p.StealReply()
		want(t, c.logout(), 503, "unavailable")
		p.wantStolen(t)
		want(t, c.logout(), 401, "session_revoked") // it was done
	})
	t.Run("refresh", func(t *testing.T) {
		c := signedUp(s)
		want(t, c.refresh(), 200, "")
		p.StealReply()
		want(t, c.refresh(), 503, "unavailable")
		p.wantStolen(t)
		lost := redisClient(t).HGet(t.Context(),
			"session:{"+c.userID()+"}:"+c.sessionID(), "token").Val()
		want(t, c.refresh(), 200, "") // the token that was lost is sent again
		if !strings.Contains(decodePayload(c.cookie), lost) {
			t.Error("the token was exchanged a second time")
		}
	})
}

// Outages

// TestPostgresOutage holds that without PostgreSQL no refresh token is used up, and that what needs
// only Redis goes on.
func TestPostgresOutage(t *testing.T) {
	p := postgresProxy(t)
	s := start(t, map[string]string{"DATABASE_URL": p.url})
	s.expect(503)
	for name, breakIt := range map[string]func(){"cut": p.Cut, "paused": p.Pause} {
		t.Run(name, func(t *testing.T) {
			c := signedUp(s)
			revoked := c.loggedIn()
			leaving := c.loggedIn()
			breakIt()
			unavailable := []func(d *client) response{
				(*client).refresh,
				(*client).me,
				(*client).deleteAccount,
				func(d *client) response { return d.changePassword("new password") },
				func(d *client) response { return d.device().login() },
				func(d *client) response { return newClient(s).signup() },
				func(d *client) response { return d.do("GET", "/readyz", nil) },
			}
			answers := together(len(unavailable), func(i int) response {
				return unavailable[i](c.tab())
			})
			for i, r := range answers {
				if r.status != 503 || r.took > 10*time.Second {
					t.Errorf("request %d: %v after %v, want 503 within 2 s", i, r, r.took)
				}
			}
			ready := answers[len(answers)-1]
			if ready.text("postgres") != "unavailable" || ready.text("redis") != "ok" {
				t.Errorf("/readyz: %s", ready.raw)
			}
			want(t, c.do("GET", "/healthz", nil), 200, "")
			want(t, c.sessions(), 200, "")
			want(t, c.revoke(revoked.sessionID()), 200, "")
			want(t, leaving.tab().logout(), 200, "")
			p.Restore()
			awaitReady(t, c)
			want(t, c.refresh(), 200, "")
			want(t, c.loggedIn().me(), 200, "")
			wantDead(t, []*server{s}, revoked, leaving)
		})
	}
}

// TestRedisOutage holds that without Redis nothing is let through unchecked, and nothing is changed.
func TestRedisOutage(t *testing.T) {
	p := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": p.url})
	limited := start(t, map[string]string{"REDIS_URL": p.url, "RATE_LIMIT_MAX": "1000"})
	s.expect(503)
	limited.expect(503)
	for name, breakIt := range map[string]func(){"cut": p.Cut, "paused": p.Pause} {
		t.Run(name, func(t *testing.T) {
			c := signedUp(s)
			stranger := newClient(s)
			breakIt()
			unavailable := []func(d *client) response{
				(*client).refresh,
				(*client).me,
				(*client).sessions,
				(*client).revokeAll,
				(*client).logout,
				(*client).deleteAccount,
				func(d *client) response { return d.changePassword("new password") },
				func(d *client) response { return d.device().login() },
				func(d *client) response { return stranger.signup() },
				func(d *client) response { return d.at(limited).do("GET", "/nothing", nil) },
				func(d *client) response { return d.do("GET", "/readyz", nil) },
			}
			answers := together(len(unavailable), func(i int) response {
				return unavailable[i](c.tab())
			})
			for i, r := range answers {
				if r.status != 503 || r.took > 10*time.Second {
					t.Errorf("request %d: %v after %v, want 503 within 1 s", i, r, r.took)
				}
			}
			ready := answers[len(answers)-1]
			if ready.text("postgres") != "ok" || ready.text("redis") != "unavailable" {
				t.Errorf("/readyz: %s", ready.raw)
			}
			want(t, c.at(limited).do("GET", "/healthz", nil), 200, "")
			p.Restore()
			awaitReady(t, c)
			want(t, c.refresh(), 200, "")
			want(t, c.loggedIn().me(), 200, "")
			want(t, stranger.signup(), 201, "")
		})
	}
}

// awaitReady waits until the server says that both stores answer.
func awaitReady(t testing.TB, c *client) {
	t.Helper()
	eventually(t, "the server recovers", func() bool {
		return c.do("GET", "/readyz", nil).status == 200
	})
}

// privateRedis starts a Redis that no other test uses, and returns its URL.
func privateRedis(t *testing.T) string {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("there is no redis-server here")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := portOf(listener.Addr().String())
	listener.Close()
	cmd := exec.Command(binary, "--bind", "127.0.0.1", "--port", port, "--save", "")
	cmd.Dir = t.TempDir()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return "redis://127.0.0.1:" + port
}

// TestFullRedis holds that a Redis whose memory is full still ends sessions, and that what needs
// memory is refused before it has changed anything.
func TestFullRedis(t *testing.T) {
	redisURL := privateRedis(t)
	options, err := redis.ParseURL(redisURL)
	if err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(options)
	defer rdb.Close()
	eventually(t, "Redis starts", func() bool { return rdb.Ping(t.Context()).Err() == nil })
	setMemory := func(bytes string) {
		t.Helper()
		if err := rdb.ConfigSet(t.Context(), "maxmemory", bytes).Err(); err != nil {
			t.Fatal(err)
		}
	}
	for name, limit := range map[string]string{"limits off": "0", "limits on": "1000"} {
		t.Run(name, func(t *testing.T) {
			s := start(t, map[string]string{
				"REDIS_URL":       redisURL,
				"RATE_LIMIT_MAX":  limit,
				"LOGIN_LIMIT_MAX": limit,
			})
			s.expect(503)
			c := signedUp(s)
			revoked, leaving, forgetful := c.loggedIn(), c.loggedIn(), c.loggedIn()
			gone := signedUp(s)
			stranger := newClient(s)
			setMemory("1")
			defer setMemory("0")
			if err := rdb.ScriptFlush(t.Context()).Err(); err != nil { // as after a restart
				t.Fatal(err)
			}

			before := rdb.HGetAll(t.Context(), "session:{"+c.userID()+"}:"+c.sessionID()).Val()
			want(t, c.refresh(), 503, "unavailable")
			want(t, c.changePassword("new password"), 503, "unavailable")
			want(t, c.device().login(), 503, "unavailable")
			want(t, stranger.signup(), 503, "unavailable")
			after := rdb.HGetAll(t.Context(), "session:{"+c.userID()+"}:"+c.sessionID()).Val()
			if fmt.Sprint(before) != fmt.Sprint(after) {
				t.Errorf("the session was %v and is %v", before, after)
			}
			if r := c.sessions(); len(r.body["sessions"].([]any)) != 4 {
				t.Errorf("GET /auth/sessions: %v %s", r, r.raw)
			}
			want(t, c.revoke(revoked.sessionID()), 200, "")
			want(t, leaving.tab().logout(), 200, "")
			forgetful.access = ""
			want(t, forgetful.tab().logout(), 200, "")
			want(t, gone.tab().revokeAll(), 200, "")

			setMemory("0")
			want(t, c.refresh(), 200, "")
			want(t, c.loggedIn().me(), 200, "") // the password is the old one
			want(t, stranger.signup(), 201, "")
			wantDead(t, []*server{s}, revoked, leaving, forgetful, gone)
		})
	}
}

// redisReply is an error that Redis reports.
type redisReply string

func (r redisReply) Error() string { return string(r) }
func (redisReply) RedisError()     {}

// TestStoreErrors holds which errors of the stores are outages, and which are faults.
func TestStoreErrors(t *testing.T) {
	reported := func(code string) error { return &pgconn.PgError{Code: code} }
	for _, test := range []struct {
		err     error
		outage  bool
		classed func(operation string, err error) error
	}{
		{io.EOF, true, redisError},
		{redisReply("LOADING Redis is loading the dataset in memory"), true, redisError},
		{redisReply("OOM command not allowed when used memory > 'maxmemory'."), true, redisError},
		{redisReply("READONLY You can't write against a read only replica."), true, redisError},
		{redisReply("MISCONF Redis is configured to save RDB snapshots"), true, redisError},
		{redisReply("CLUSTERDOWN The cluster is down"), true, redisError},
		{redisReply("MOVED 3999 127.0.0.1:6381"), true, redisError},
		{redisReply("ASK 3999 127.0.0.1:6381"), true, redisError},
		{redisReply("ERR max number of clients reached"), true, redisError},
		{redisReply("ERR Script attempted to access a non local key in a cluster node"), true, redisError},
		{redisReply("WRONGTYPE Operation against a key"), false, redisError},
		{redisReply("ERR unknown command"), false, redisError},
		{redisReply("NOPERM this user has no permissions"), false, redisError},
		{io.EOF, true, postgresError},
		{reported("08006"), true, postgresError}, // connection failure
		{reported("53300"), true, postgresError}, // too many connections
		{reported("57P01"), true, postgresError}, // shutting down
		{reported("25006"), true, postgresError}, // read-only
		{reported("42703"), false, postgresError},
		{reported("23505"), false, postgresError},
		{pgx.ScanArgError{Err: io.EOF}, false, postgresError},
		{errUnavailable, true, postgresError},
		{errStale, true, postgresError},
	} {
		err := test.classed("test", test.err)
		if err == nil || errors.Is(err, errUnavailable) != test.outage {
			t.Errorf("%v is classed as %v", test.err, err)
		}
	}
	for _, own := range []error{errNoUser, errEmailExists, errEnded, errReused, errTheft, errStale} {
		if err := postgresError("test", own); err != own {
			t.Errorf("%v became %v", own, err)
		}
	}
}
