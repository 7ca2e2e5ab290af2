package main

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// Migrations

func TestMigrateCommand(t *testing.T) {
	// It needs the database and nothing else.
	env := map[string]string{"DATABASE_URL": newDatabase(t), "JWT_SECRET": "", "REDIS_URL": ""}
	migrate := func(args ...string) string {
		t.Helper()
		printed, err := runCommand(t, env, append([]string{"migrate"}, args...)...)
		if err != nil {
			t.Error(err)
		}
		return printed
	}
	before := migrate("status")
	execSQL(t, env["DATABASE_URL"], `
		CREATE TABLE schema_migrations (); -- which status has not made
		DROP TABLE schema_migrations`)
	migrate()
	applied := migrate("status")
	migrate()
	again := migrate("status")
	if strings.Count(before, " pending ") != 3 || strings.Count(applied, "Z ") != 3 ||
		again != applied {
		t.Errorf("the status was\n%s\nthen\n%s\nand again\n%s", before, applied, again)
	}
}

// migratedDatabase returns the URL of a database as the command migrate leaves it.
func migratedDatabase(t *testing.T) string {
	t.Helper()
	database := newDatabase(t)
	if _, err := runCommand(t, map[string]string{"DATABASE_URL": database}, "migrate"); err != nil {
		t.Fatal(err)
	}
	return database
}

// TestForeignMigrations checks that a schema which this version does not know is left alone.
func TestForeignMigrations(t *testing.T) {
	for version, sql := range map[string]string{
		"0001": "UPDATE schema_migrations SET checksum = 'another' WHERE version = '0001'",
		"9999": "INSERT INTO schema_migrations (version, name, checksum) VALUES ('9999', 'x', 'x')",
	} {
		env := map[string]string{"DATABASE_URL": migratedDatabase(t)}
		execSQL(t, env["DATABASE_URL"], sql)
		for _, args := range [][]string{nil, {"serve"}, {"migrate"}, {"migrate", "status"}} {
			_, err := runCommand(t, env, args...)
			if err == nil || !strings.Contains(err.Error(), version) {
				t.Errorf("%q after %s: %v", args, sql, err)
			}
		}
	}
}

// TestServesWithoutDDLRights checks that the server's role needs to read and write rows only, once
// somebody else has migrated.
func TestServesWithoutDDLRights(t *testing.T) {
	role := "latchkey_test_" + strings.ToLower(rand.Text())
	t.Cleanup(func() { // after the database has gone, and the role's rights with it
		execSQL(t, os.Getenv("DATABASE_URL"), "DROP ROLE IF EXISTS "+role)
	})
	database := migratedDatabase(t)
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

// verified marks the client's email as verified, so that notices to it ask no store for a limit.
func verified(c *client) *client {
	c.t.Helper()
	execSQL(c.t, databaseURL(testDatabase), `
		UPDATE users
		SET email_verified_at = now()
		WHERE id = $1::uuid`, c.claims().UserID)
	return c
}

// TestRoundTrips counts how often each request asks PostgreSQL and Redis. A transaction takes a
// statement to begin and one to commit, and Redis is asked before it whether it is there. Where a
// Bearer token is shown, one command asks whether its session lives.
func TestRoundTrips(t *testing.T) {
	postgres, redis := postgresProxy(t), redisProxy(t)
	env := map[string]string{"DATABASE_URL": postgres.url, "REDIS_URL": redis.url}
	s := start(t, env)
	env["RATE_LIMIT_MAX"] = "1000"
	limited := start(t, env)
	env["BCRYPT_COST"] = "5"
	dear := start(t, env)
	for _, test := range []struct {
		name     string
		request  func(c *client) response
		postgres int64
		redis    int64
	}{
		{"refresh", (*client).refresh, 1, 1},
		{"refresh, limited", func(c *client) response { return c.at(limited).refresh() }, 1, 2},
		{"me", (*client).me, 1, 1},
		{"list", (*client).sessions, 0, 2},
		{"revoke one", func(c *client) response { return c.revoke(c.claims().SessionID) }, 0, 2},
		{"revoke all", (*client).revokeAll, 0, 2},
		{"logout", (*client).logout, 0, 1},
		{"login", (*client).login, 4, 2},
		{"login, rehashed, limited", func(c *client) response { return c.at(dear).login() }, 7, 5},
		{"change the password", (*client).renewPassword, 4, 3},
		{"delete the account", (*client).deleteAccount, 4, 3},
	} {
		askedPostgres, askedRedis := int64(100), int64(100)
		for range 3 { // the first one opens connections, and teaches Redis the scripts
			c := verified(signedUp(s))
			postgres.requests.Store(0)
			redis.requests.Store(0)
			want(t, test.request(c), 200, "")
			askedPostgres = min(askedPostgres, postgres.requests.Load())
			askedRedis = min(askedRedis, redis.requests.Load())
		}
		if askedPostgres != test.postgres || askedRedis != test.redis {
			t.Errorf("%s asks PostgreSQL %d times and Redis %d times, want %d and %d",
				test.name, askedPostgres, askedRedis, test.postgres, test.redis)
		}
	}
}

// TestStaleUser checks that nothing is done to a user by what was read of it before its password or
// its email was changed.
func TestStaleUser(t *testing.T) {
	c := signedUp(start(t, nil))
	s := newStore(t)
	current, err := s.findUserByID(t.Context(), c.claims().UserID)
	if err != nil {
		t.Fatal(err)
	}
	otherHash, otherEmail := current, current
	otherHash.PasswordHash += "x"
	otherEmail.Email = "x" + current.Email
	reset := func(u user) error { return s.resetPassword(t.Context(), u, "hash", true) }
	change := func(u user) error {
		_, err := s.changeEmail(t.Context(), u, "new-"+current.Email)
		return err
	}
	verify := func(u user) error {
		_, err := s.verifyEmail(t.Context(), u)
		return err
	}
	for name, err := range map[string]error{
		"reset, another hash":   reset(otherHash),
		"reset, another email":  reset(otherEmail),
		"change, another hash":  change(otherHash),
		"change, another email": change(otherEmail),
		"verify, another email": verify(otherEmail),
	} {
		if !errors.Is(err, errStale) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after, err := s.findUserByID(t.Context(), current.ID); after != current || err != nil {
		t.Errorf("the user is %+v, %v", after, err)
	}
}

// newStore returns a store on the database and the Redis of the tests.
func newStore(t *testing.T) *store {
	t.Helper()
	db, err := pgxpool.New(t.Context(), databaseURL(testDatabase))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return &store{
		db:              db,
		rdb:             redisClient(t),
		postgresTimeout: postgresTimeout,
	}
}

// Races: simultaneous requests of one user at two replicas

const rounds = 10

// TestEverythingAtOnce lets a user do at once all that can be done to sessions. However that
// interleaves, nothing fails, at most one refresh wins, and revoking all leaves nothing.
func TestEverythingAtOnce(t *testing.T) {
	servers := replicas(t, nil)
	actions := []func(c *client) response{
		(*client).refresh,
		(*client).me,
		(*client).sessions,
		(*client).logout,
		(*client).renewPassword,
		(*client).login,
	}
	for range rounds {
		c := signedUp(servers[0])
		tabs := c.tabs(3*len(actions), servers)
		answers := together(len(tabs), func(i int) response { return actions[i/3](tabs[i]) })
		wantOnly(t, answers, "200", "401 refresh_reused", "401 session_revoked")
		wins := slices.DeleteFunc(answers[:3], func(r response) bool { return r.status != 200 })
		if len(wins) > 1 {
			t.Errorf("%d refreshes with one token got another one", len(wins))
		}
		want(t, c.loggedIn().revokeAll(), 200, "")
		wantDead(t, servers, tabs...)
	}
}

// TestDisableRace disables a user while devices log in and a tab refreshes. Whatever was answered,
// no session is left, and there is no login until the user is enabled. Enabling revives no session.
func TestDisableRace(t *testing.T) {
	servers := replicas(t, nil)
	s := newStore(t)
	admitted := 0
	for range rounds {
		c := signedUp(servers[0])
		tabs := c.tabs(7, servers)
		first := make(chan struct{}) // is closed when a login has been answered
		var once sync.Once
		answers := together(len(tabs)+1, func(i int) response {
			switch {
			case i == 0:
				<-first
				if _, err := s.disableUser(t.Context(), c.claims().UserID); err != nil {
					t.Error(err)
				}
				return response{status: 200}
			case i == 1:
				return tabs[0].refresh()
			default:
				defer once.Do(func() { close(first) })
				return tabs[i-1].login()
			}
		})
		wantOnly(t, answers, "200", "401 session_revoked", "403 account_disabled")
		for _, r := range answers[2:] {
			if r.status == 200 {
				admitted++
			}
		}
		wantDead(t, servers, append(tabs, c)...)
		want(t, c.login(), 403, "account_disabled")
		if _, err := s.enableUser(t.Context(), c.claims().UserID); err != nil {
			t.Error(err)
		}
		wantDead(t, servers, append(tabs, c)...)
		want(t, c.login(), 200, "")
	}
	t.Logf("%d of %d logins came before", admitted, 6*rounds)
}

// TestListUsersInPages asks for more users than fit on a page.
func TestListUsersInPages(t *testing.T) {
	replicas(t, nil) // which make the table
	s := newStore(t)
	_, err := s.db.Exec(t.Context(), `INSERT INTO users (email, password_hash)
		SELECT 'page-' || n || '@example.com', ''
		FROM generate_series(0, $1::int) AS n`, usersPage)
	if err != nil {
		t.Fatal(err)
	}
	page, err := s.listUsers(t.Context(), "page-", "")
	if err != nil || len(page) != usersPage {
		t.Errorf("a page has %d users, %v", len(page), err)
	}
}

// TestCapRace lets a user who has the most sessions that there may be log in many times at once.
// Afterwards there are as many, the new ones among them.
func TestCapRace(t *testing.T) {
	servers := replicas(t, nil)
	short := start(t, map[string]string{"REFRESH_TOKEN_TTL": "1h"}) // these would expire first
	c := signedUp(short)
	for range 100 {
		c.loggedIn()
	}
	for range rounds {
		devices := c.tabs(9, servers)
		answers := together(len(devices), func(i int) response { return devices[i].login() })
		wantOnly(t, answers, "200")
		for _, d := range devices {
			want(t, d.refresh(), 200, "")
		}
		indexed := redisClient(t).ZCard(t.Context(), c.indexKey()).Val()
		if n := countSessions(t, c); n != 100 || indexed != 100 {
			t.Errorf("%d sessions live and %d are in the index, want 100", n, indexed)
		}
	}
}

// countSessions returns how many sessions of a user Redis has, in the index or not.
func countSessions(t *testing.T, c *client) int {
	t.Helper()
	living, err := redisClient(t).Keys(t.Context(), "session:{"+c.claims().UserID+"}:*").Result()
	if err != nil {
		t.Fatal(err)
	}
	return len(living)
}

// TestRefreshAgainstSQL checks that no session outlives a change of the hash by plain SQL, whatever
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

// TestSlowCommit widens two gaps: before a change locks the user's row, and between what it does to
// the sessions and its commit. Meanwhile one tab refreshes again and again, and devices log in.
func TestSlowCommit(t *testing.T) {
	env := map[string]string{"DATABASE_URL": newDatabase(t)}
	servers := replicas(t, env)
	env["BCRYPT_COST"] = "5"
	dear := start(t, env)
	execSQL(t, servers[0].database, `
		CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END';
		CREATE TRIGGER slow_lock BEFORE UPDATE OR DELETE ON users
			FOR EACH STATEMENT EXECUTE FUNCTION slow();
		CREATE CONSTRAINT TRIGGER slow_commit AFTER UPDATE OR DELETE ON users
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
	for _, test := range []struct {
		name       string
		change     func(c *client) response
		ownLives   bool // the tab's session goes on, all the while
		othersLive bool // and so do those of the devices
	}{
		{"change", func(c *client) response { return c.changePassword("new pass") }, true, false},
		{"delete", (*client).deleteAccount, false, false},
		{"rehash", func(c *client) response { return c.at(dear).device().login() }, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := signedUp(servers[0])
			tab := c.tab()
			var devices []*client
			var done atomic.Bool
			answers := together(3, func(i int) response {
				if i == 0 {
					defer done.Store(true)
					return test.change(c)
				}
				for ; !done.Load(); time.Sleep(10 * time.Millisecond) {
					if i == 1 {
						tab.refresh()
					} else if len(devices) < 50 { // a 101st session would end the first
						devices = append(devices, c.at(servers[1]).device())
						devices[len(devices)-1].login()
					}
				}
				return response{}
			})
			want(t, answers[0], 200, "")
			if test.ownLives {
				want(t, tab.refresh(), 200, "")
			}
			if !test.othersLive {
				wantDead(t, servers, devices...)
				return
			}
			for _, d := range devices {
				want(t, d.refresh(), 200, "")
			}
		})
	}
}

// TestOversizedIndex lets a user have more sessions than there may be, perhaps from another
// version. The next login cuts their number, and a password change or a revocation ends them all.
func TestOversizedIndex(t *testing.T) {
	s := start(t, nil)
	fill := redis.NewScript(`
		for i = 1, 3000 do
			redis.call('COPY', KEYS[2], KEYS[2] .. i)
			redis.call('ZADD', KEYS[1], ARGV[1] + 600 + i, ARGV[2] .. i)
		end`)
	for _, test := range []struct {
		name string
		act  func(c *client) response
		want int
	}{
		{"login", (*client).login, 100},
		{"change the password", (*client).renewPassword, 1},
		{"revoke all", (*client).revokeAll, 0},
	} {
		c := signedUp(s)
		keys, now := []string{c.indexKey(), c.sessionKey()}, time.Now().Unix()
		err := fill.Run(t.Context(), redisClient(t), keys, now, c.claims().SessionID).Err()
		if err != nil && err != redis.Nil {
			t.Fatal(err)
		}
		want(t, test.act(c.tab()), 200, "")
		if n := countSessions(t, c); n != test.want {
			t.Errorf("%s leaves %d sessions, want %d", test.name, n, test.want)
		}
	}
}

// Lost replies and outages

// TestLostReplies checks that what Redis has carried out is not sent a second time if its reply is
// lost.
func TestLostReplies(t *testing.T) {
	p := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": p.url, "REFRESH_REUSE_POLICY": "resend"})
	s.expects = 503
	c := signedUp(s)
	leaving := c.loggedIn()
	want(t, c.loggedIn().logout(), 200, "") // now Redis knows the script
	p.StealReply(t, func() { want(t, leaving.logout(), 503, "unavailable") })
	want(t, leaving.logout(), 401, "session_revoked") // it was done

	want(t, c.refresh(), 200, "")
	p.StealReply(t, func() { want(t, c.refresh(), 503, "unavailable") })
	exchanged := redisClient(t).HGet(t.Context(), c.sessionKey(), "token").Val()
	want(t, c.refresh(), 200, "")
	if c.claims().TokenID != exchanged {
		t.Error("the token was exchanged a second time")
	}
}

// TestLockedRow lets another program hold the row of a user. A login must not wait for ever.
func TestLockedRow(t *testing.T) {
	s := start(t, nil)
	s.expects = 503
	c := signedUp(s)
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	lock := "BEGIN; SELECT FROM users WHERE email = '" + c.email + "' FOR UPDATE"
	if _, err := conn.Exec(t.Context(), lock); err != nil {
		t.Fatal(err)
	}
	want(t, c.device().login(), 503, "unavailable")
	want(t, c.me(), 200, "")
}

// wantUnchanged waits until the stores are there again, and fails the test unless the client's
// tokens and password are still good.
func wantUnchanged(t *testing.T, c *client) {
	t.Helper()
	eventually(t, "the server recovers", func() bool { return c.ready().status == 200 })
	want(t, c.refresh(), 200, "")
	want(t, c.loggedIn().me(), 200, "")
}

// privateRedis starts a Redis that no other test uses. It returns its URL and a client.
func privateRedis(t *testing.T) (string, *redis.Client) {
	t.Helper()
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("there is no redis-server here")
	}
	listener := listenLocally(t)
	addr := listener.Addr().String()
	listener.Close()
	cmd := exec.Command(binary, "--bind", "127.0.0.1", "--port", portOf(addr), "--save", "")
	cmd.Dir = t.TempDir()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(&redis.Options{Addr: addr})
	t.Cleanup(func() {
		rdb.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	eventually(t, "Redis starts", func() bool { return rdb.Ping(t.Context()).Err() == nil })
	return "redis://" + addr, rdb
}

// TestFullRedis checks that a Redis whose memory is full still ends sessions, and that what needs
// memory is refused before it has changed anything.
func TestFullRedis(t *testing.T) {
	redisURL, rdb := privateRedis(t)
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
			s.expects = 503
			c, everywhere, deleted, stranger := signedUp(s), signedUp(s), signedUp(s), newClient(s)
			revoked, leaving, forgetful := c.loggedIn(), c.loggedIn(), c.loggedIn()
			setMemory("1")
			defer setMemory("0")
			if err := rdb.ScriptFlush(t.Context()).Err(); err != nil { // as after a restart
				t.Fatal(err)
			}

			before := rdb.HGetAll(t.Context(), c.sessionKey()).Val()
			want(t, c.refresh(), 503, "unavailable")
			want(t, c.renewPassword(), 503, "unavailable")
			want(t, c.device().login(), 503, "unavailable")
			want(t, stranger.signup(), 503, "unavailable")
			if after := rdb.HGetAll(t.Context(), c.sessionKey()).Val(); !maps.Equal(before, after) {
				t.Errorf("the session was %v and is %v", before, after)
			}

			want(t, c.sessions(), 200, "")
			want(t, c.revoke(revoked.claims().SessionID), 200, "")
			want(t, leaving.tab().logout(), 200, "")
			cookieOnly := forgetful.tab()
			cookieOnly.access = ""
			want(t, cookieOnly.logout(), 200, "")
			want(t, everywhere.tab().revokeAll(), 200, "")
			want(t, deleted.tab().deleteAccount(), 200, "")

			setMemory("0")
			wantDead(t, []*server{s}, revoked, leaving, forgetful, everywhere, deleted)
			wantUnchanged(t, c)
			want(t, stranger.signup(), 201, "")
		})
	}
}

// TestRedisLogin checks that a password that Redis refuses is an outage, and that the log names the
// setting.
func TestRedisLogin(t *testing.T) {
	address, rdb := privateRedis(t)
	c := signedUp(start(t, map[string]string{"REDIS_URL": address}))
	if err := rdb.ConfigSet(t.Context(), "requirepass", "sesame").Err(); err != nil {
		t.Fatal(err)
	}
	wrong := strings.Replace(address, "redis://", "redis://default:wrong@", 1)
	for _, url := range []string{address, wrong} {
		s := start(t, map[string]string{"REDIS_URL": url})
		s.expects = 503
		want(t, newClient(s).signup(), 503, "unavailable")
		want(t, c.tab().at(s).refresh(), 503, "unavailable")
		if r := newClient(s).ready(); r.status != 503 || r.text("redis") != "unavailable" {
			t.Errorf("/readyz: %s", r.raw)
		}
		if strings.Count(s.logged(), "check user and password in REDIS_URL") != 3 {
			t.Errorf("the log does not name the setting:\n%s", s.logged())
		}
	}
}

// redisReply is an error that Redis reports.
type redisReply string

func (r redisReply) Error() string { return string(r) }
func (redisReply) RedisError()     {}

// TestStoreErrors checks which errors that the stores report are outages, and which are faults.
func TestStoreErrors(t *testing.T) {
	check := func(reported, got error, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Errorf("%q became %v, want %v", reported, got, want)
		}
	}
	for _, reply := range []redisReply{
		"LOADING Redis is loading the dataset in memory",
		"OOM command not allowed when used memory > 'maxmemory'.",
		"READONLY You can't write against a read only replica.",
		"MISCONF Redis is configured to save RDB snapshots",
		"CLUSTERDOWN The cluster is down",
		"MOVED 3999 127.0.0.1:6381",
		"ASK 3999 127.0.0.1:6381",
		"TRYAGAIN Multiple keys request during rehashing of slot",
		"ERR max number of clients reached",
		"ERR Error running script: Script attempted to access a non local key in a cluster node",
	} {
		check(reply, redisError("test", reply), errUnavailable)
	}
	for _, reply := range []redisReply{
		"WRONGTYPE Operation against a key",
		"ERR unknown command",
		"NOPERM this user has no permissions",
	} {
		check(reply, redisError("test", reply), errFault)
	}
	// Connection lost, too many connections, shutting down, read-only.
	for _, code := range []string{"08006", "53300", "57P01", "25006"} {
		reported := &pgconn.PgError{Code: code}
		check(reported, postgresError("test", reported), errUnavailable)
	}
	for _, code := range []string{"42703", "23505"} {
		reported := &pgconn.PgError{Code: code}
		check(reported, postgresError("test", reported), errFault)
	}
}
