package main

// store_test.go holds the two stores to the contract: the migrations, the adoption of another backend's table, and
// what simultaneous requests at two replicas may do to each other.

import (
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// ---- migrations

// drizzleTable is the table that the backend before this one made.
const drizzleTable = `CREATE TABLE users (
	id            uuid      PRIMARY KEY DEFAULT gen_random_uuid() NOT NULL,
	email         text      NOT NULL,
	password_hash text      NOT NULL,
	created_at    timestamp DEFAULT now() NOT NULL,
	updated_at    timestamp DEFAULT now() NOT NULL,
	CONSTRAINT users_email_unique UNIQUE (email))`

// objects lists what a database has, to see that nothing was changed.
func objects(t testing.TB, database string) string {
	t.Helper()
	return queryText(t, database, `SELECT coalesce(string_agg(relname || ' ' || relkind::text, ', ' ORDER BY relname), '')
		FROM pg_class WHERE relnamespace = 'public'::regnamespace`)
}

func TestAdoptDrizzleTable(t *testing.T) {
	database := newDatabase(t)
	execSQL(t, database, drizzleTable)
	execSQL(t, database, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET timezone = ''America/New_York''', current_database()); END $$`)
	// Their hash of "correct horse battery staple", but of cost 10 for a test's sake.
	execSQL(t, database, `INSERT INTO users (email, password_hash, created_at) VALUES ('Mixed.Case@Example.test',
		'$2b$10$MeMND/z2k0ryfi5Wj2dMquCHgKc3.odEL4BfBAEltIRyxhHzG/LZ.', '2024-03-01 12:00:00.123')`)
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.RawQuery += "&TimeZone=America/New_York" // which does not count either
	s := start(t, map[string]string{"DATABASE_URL": u.String()})

	c := newClient(s)
	c.email, c.password = " mixed.case@EXAMPLE.test", "correct horse battery staple"
	want(t, c.login(), 200, "")
	me := c.me()
	want(t, me, 200, "")
	if got := me.text("user", "createdAt"); got != "2024-03-01T12:00:00.123Z" {
		t.Errorf("createdAt %s is not the row's, in UTC", got)
	}
	want(t, c.refresh(), 200, "")
	want(t, c.device().signup(), 400, "email_exists")
	if got := queryText(t, database, "SELECT data_type FROM information_schema.columns WHERE table_name = 'users' AND column_name = 'created_at'"); got != "timestamp without time zone" {
		t.Errorf("the table was changed: created_at is %s", got)
	}
	fresh := signedUp(s)
	at, err := time.Parse(time.RFC3339, fresh.me().text("user", "createdAt"))
	if err != nil || time.Since(at).Abs() > time.Minute {
		t.Errorf("a new user of now was created at %v", at)
	}
	if got := queryText(t, database, "SELECT (abs(extract(epoch FROM created_at - now() AT TIME ZONE 'UTC')) < 60)::text FROM users WHERE email = $1", fresh.email); got != "true" {
		t.Error("the new row's created_at is not in UTC")
	}
}

// Which of two rows is the user's is not for a program to say.
// What a database calls é is its own affair: the address is the one that was sent.
func TestLatin1Database(t *testing.T) {
	database := newDatabase(t, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
	c := newClient(start(t, map[string]string{"DATABASE_URL": database}))
	c.email = "é" + c.email
	want(t, c.signup(), 201, "")
	want(t, c.login(), 200, "")
	if got, want := queryText(t, database, "SELECT char_length(email)::text FROM users"), fmt.Sprint(utf8.RuneCountInString(c.email)); got != want {
		t.Errorf("the address has %s characters in the table, and %s as it was sent", got, want)
	}
}

// A row that cannot be read is a fault of the table's, and no outage that a client should wait for.
func TestUnreadableRow(t *testing.T) {
	database := newDatabase(t)
	execSQL(t, database, strings.Replace(drizzleTable, "created_at    timestamp DEFAULT now() NOT NULL", "created_at timestamp", 1))
	s := start(t, map[string]string{"DATABASE_URL": database})
	s.expect("500")
	c := newClient(s)
	execSQL(t, database, `INSERT INTO users (email, password_hash) VALUES ($1, '')`, c.email)
	want(t, c.login(), 500, "internal")
}

func TestAdoptionStopsAtDuplicates(t *testing.T) {
	database := newDatabase(t)
	execSQL(t, database, drizzleTable)
	execSQL(t, database, `INSERT INTO users (email, password_hash) VALUES ('Two@example.test', 'x'), ('two@example.test', 'y'), ('one@example.test', 'z')`)
	before := objects(t, database)
	err := startError(t, map[string]string{"DATABASE_URL": database})
	if err == nil {
		t.Fatal("the server started")
	}
	if after := objects(t, database); after != before {
		t.Errorf("changed from %s to %s", before, after)
	}
	if strings.Contains(err.Error(), "two@example.test") {
		t.Errorf("an address in the error: %v", err)
	}
	_, query, _ := strings.Cut(err.Error(), "SELECT")
	query, _, _ = strings.Cut(query, ";")
	rows, _ := connect(t, database).Query(t.Context(), "SELECT"+query)
	listed, queryErr := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
		values, err := row.Values()
		return fmt.Sprint(values), err
	})
	if queryErr != nil || len(listed) != 1 || !strings.Contains(listed[0], "Two@example.test") || !strings.Contains(listed[0], "two@example.test") {
		t.Errorf("the query that the error gives lists %q (%v): %v", listed, queryErr, err)
	}
	execSQL(t, database, "DELETE FROM users WHERE email = 'Two@example.test'")
	start(t, map[string]string{"DATABASE_URL": database})
}

func TestForeignUsersTable(t *testing.T) {
	database := newDatabase(t)
	execSQL(t, database, "CREATE TABLE users (id serial PRIMARY KEY, name text, email text)")
	before := objects(t, database)
	if err := startError(t, map[string]string{"DATABASE_URL": database}); err == nil || !strings.Contains(err.Error(), "0001") {
		t.Errorf("the server took another's table for its own: %v", err)
	}
	if after := objects(t, database); after != before {
		t.Errorf("changed from %s to %s", before, after)
	}
}

func TestMigrationByReplicasAtOnce(t *testing.T) {
	database := newDatabase(t)
	for _, s := range together(4, func(int) *server { return start(t, map[string]string{"DATABASE_URL": database}) }) {
		signedUp(s)
	}
	if got := queryText(t, database, "SELECT string_agg(version, ' ' ORDER BY version) FROM schema_migrations"); got != "0001 0002" {
		t.Errorf("on record: %s", got)
	}
}

func TestForeignMigrationsStopTheStart(t *testing.T) {
	for name, sql := range map[string]string{
		"0001": "UPDATE schema_migrations SET checksum = 'another' WHERE version = '0001'",
		"9999": "INSERT INTO schema_migrations (version, name, checksum) VALUES ('9999', 'from the future', 'x')",
	} {
		env := map[string]string{"DATABASE_URL": newDatabase(t)}
		if err := command(t, t.Context(), env, io.Discard, "migrate"); err != nil {
			t.Fatal(err)
		}
		execSQL(t, env["DATABASE_URL"], sql)
		for _, args := range [][]string{nil, {"serve"}, {"migrate"}, {"migrate", "status"}} {
			if err := startError(t, env, args...); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%v after %s: %v", args, sql, err)
			}
		}
	}
}

func TestMigrateCommand(t *testing.T) {
	env := map[string]string{"DATABASE_URL": newDatabase(t), "JWT_SECRET": "", "JWT_REFRESH_SECRET": "", "REDIS_URL": "", "NODE_ENV": ""}
	migrate := func(args ...string) []string {
		t.Helper()
		var stdout strings.Builder
		if err := command(t, t.Context(), env, &stdout, args...); err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(stdout.String()), "\n")
	}
	status := migrate("migrate", "status")
	if len(status) != 2 || !strings.HasPrefix(status[0], "0001 ") || strings.Count(strings.Join(status, ""), "pending") != 2 {
		t.Errorf("before: %q", status)
	}
	if got := objects(t, env["DATABASE_URL"]); got != "" {
		t.Errorf("status made %s", got)
	}
	migrate("migrate")
	applied := migrate("migrate", "status")
	for i, line := range applied {
		at, err := time.Parse(time.RFC3339, strings.Fields(line)[1])
		if err != nil || time.Since(at).Abs() > time.Minute || i > 1 {
			t.Errorf("after: %q", line)
		}
	}
	migrate("migrate")
	if again := migrate("migrate", "status"); !slices.Equal(again, applied) {
		t.Errorf("applied again: %q, first %q", again, applied)
	}
}

// ---- races

const rounds = 10

// replicas are two servers on the same stores.
// The server's role needs no more than to read and write rows, once someone else has migrated.
func TestServesWithoutDDLRights(t *testing.T) {
	role := "latchkey_test_" + strings.ReplaceAll(newUUID(), "-", "")
	t.Cleanup(func() { // once the database is gone, and what the role may do there
		if err := onServer(`DROP ROLE IF EXISTS ` + role); err != nil {
			t.Error(err)
		}
	})
	database := newDatabase(t)
	if err := command(t, t.Context(), map[string]string{"DATABASE_URL": database}, io.Discard, "migrate"); err != nil {
		t.Fatal(err)
	}
	execSQL(t, database, `CREATE ROLE `+role+` LOGIN PASSWORD 'some password';
		REVOKE CREATE ON SCHEMA public FROM PUBLIC;
		GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO `+role)
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "some password")
	want(t, signedUp(start(t, map[string]string{"DATABASE_URL": u.String()})).login(), 200, "")
}

func replicas(t testing.TB, env map[string]string) []*server {
	return []*server{start(t, env), start(t, env)}
}

// wantDead fails the test if any of the tokens still works anywhere.
func wantDead(t testing.TB, servers []*server, clients ...*client) {
	t.Helper()
	for _, s := range servers {
		for _, c := range clients {
			if r := c.at(s).me(); c.access != "" && r.code() != "session_revoked" {
				t.Errorf("an access token of a revoked session: %d %s", r.status, r.raw)
			}
			if r := c.at(s).refresh(); c.cookie != "" && (r.status != 401 || !r.cleared()) {
				t.Errorf("a refresh token of a revoked session: %d %s", r.status, r.raw)
			}
		}
	}
}

// wantOnly fails the test unless all answers are among those.
func wantOnly(t testing.TB, responses []response, allowed ...string) {
	t.Helper()
	for answer, n := range tally(responses) {
		if !slices.Contains(allowed, answer) {
			t.Errorf("%d answers %s", n, answer)
		}
	}
}

// tabs returns n copies of the client, by turns at each of the servers.
func tabs(c *client, n int, servers []*server) (copies []*client) {
	for i := range n {
		copies = append(copies, c.at(servers[i%len(servers)]))
	}
	return copies
}

func TestRefreshRace(t *testing.T) {
	servers := replicas(t, nil)
	c := signedUp(servers[0])
	for range 4 * rounds {
		racers := tabs(c, 16, servers)
		answers := together(len(racers), func(i int) response { return racers[i].refresh() })
		if counts := tally(answers); counts["200"] != 1 || counts["401 refresh_reused"] != len(racers)-1 {
			t.Fatalf("answers %v, want exactly one 200", counts)
		}
		for i, r := range answers {
			if r.status == 200 {
				c = racers[i]
			} else if r.header["Set-Cookie"] != nil {
				t.Errorf("a loser is told %q", r.header["Set-Cookie"])
			}
		}
	}
}

func TestResendRace(t *testing.T) {
	servers := replicas(t, map[string]string{"REFRESH_REUSE_POLICY": "resend"})
	c := signedUp(servers[0])
	for range rounds {
		racers := tabs(c, 12, servers)
		answers := together(len(racers), func(i int) response { return racers[i].refresh() })
		for i, r := range answers {
			if want(t, r, 200, ""); r.header.Get("Set-Cookie") != answers[0].header.Get("Set-Cookie") {
				t.Fatalf("the chain forks: %s\n%s", r.header.Get("Set-Cookie"), answers[0].header.Get("Set-Cookie"))
			}
			want(t, racers[i].me(), 200, "")
		}
		c = racers[0]
	}
}

func TestSignupRace(t *testing.T) {
	servers := replicas(t, nil)
	for range rounds {
		c := newClient(servers[0])
		racers := tabs(c, 12, servers)
		answers := together(len(racers), func(i int) response {
			if i%3 == 0 {
				racers[i].email = strings.ToUpper(c.email)
			}
			return racers[i].signup()
		})
		if counts := tally(answers); counts["201"] != 1 || counts["400 email_exists"] != len(racers)-1 {
			t.Fatalf("answers %v, want exactly one 201", counts)
		}
		for i, r := range answers {
			if r.status == 201 {
				uid := r.text("user", "id")
				if n := redisClient(t).ZCard(t.Context(), "user-sessions:{"+uid+"}").Val(); n != 1 {
					t.Errorf("%d sessions for one user", n)
				}
				want(t, racers[i].refresh(), 200, "")
			}
		}
	}
}

// Whatever ends a session while its refresh token is being exchanged: nothing of it is left.
func TestRevocationRace(t *testing.T) {
	servers := replicas(t, nil)
	for name, end := range map[string]func(c, other *client) response{
		"logout":           func(c, _ *client) response { return c.logout() },
		"logout by cookie": func(c, _ *client) response { return c.bearing("").logout() },
		"revoke": func(c, other *client) response {
			return other.do("DELETE", "/auth/sessions/"+sessionOf(c.t, c.access), nil)
		},
		"revoke all":          func(_, other *client) response { return other.do("DELETE", "/auth/sessions", nil) },
		"change the password": func(_, other *client) response { return other.do("PUT", "/auth/password", newPassword(other)) },
		"delete the account": func(_, other *client) response {
			return other.do("DELETE", "/auth/me", map[string]any{"password": other.password})
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range rounds {
				c := signedUp(servers[0])
				other := c.at(servers[1]).device()
				want(t, other.login(), 200, "")
				racers := tabs(c, 5, servers)
				answers := together(len(racers)+1, func(i int) response {
					if i == len(racers) {
						return end(c.tab(), other.tab())
					}
					return racers[i].refresh()
				})
				want(t, answers[len(racers)], 200, "")
				wantOnly(t, answers[:len(racers)], "200", "401 refresh_reused", "401 session_revoked")
				wantDead(t, servers, append(racers, c)...)
			}
		})
	}
}

func newPassword(c *client) map[string]any {
	return map[string]any{"currentPassword": c.password, "newPassword": "new " + c.password}
}

func TestPasswordChangeRaces(t *testing.T) {
	servers := replicas(t, map[string]string{"LOGIN_LIMIT_MAX": "0"})
	t.Run("refresh of the same session", func(t *testing.T) {
		for range rounds {
			c := signedUp(servers[0])
			racers := tabs(c, 3, servers)
			answers := together(len(racers)+1, func(i int) response {
				if i == len(racers) {
					return c.at(servers[1]).do("PUT", "/auth/password", newPassword(c))
				}
				return racers[i].refresh()
			})
			want(t, answers[len(racers)], 200, "")
			if counts := tally(answers[:len(racers)]); counts["200"] != 1 || counts["401 refresh_reused"] != len(racers)-1 {
				t.Fatalf("answers %v", counts)
			}
			for _, d := range racers {
				want(t, d.me(), 200, "")
			}
			i := slices.IndexFunc(answers, func(r response) bool { return r.status == 200 })
			want(t, racers[i].refresh(), 200, "")
			want(t, racers[i].at(servers[1]).refresh(), 200, "")
		}
	})
	t.Run("login with the old password", func(t *testing.T) {
		for range rounds {
			c := signedUp(servers[0])
			racers := tabs(c.device(), 5, servers)
			answers := together(len(racers)+1, func(i int) response {
				if i == len(racers) {
					return c.tab().do("PUT", "/auth/password", newPassword(c))
				}
				return racers[i].login()
			})
			want(t, answers[len(racers)], 200, "")
			wantOnly(t, answers[:len(racers)], "200", "401 invalid_credentials")
			wantDead(t, servers, racers...)
			want(t, c.refresh(), 200, "")
		}
	})
	t.Run("two changes", func(t *testing.T) {
		for range rounds {
			c := signedUp(servers[0])
			other := c.at(servers[1]).device()
			want(t, other.login(), 200, "")
			both := []*client{c, other}
			answers := together(2, func(i int) response {
				body := map[string]any{"currentPassword": c.password, "newPassword": fmt.Sprint(i, c.password)}
				return both[i].tab().do("PUT", "/auth/password", body)
			})
			wantOnly(t, answers, "200", "401 invalid_credentials", "401 session_revoked")
			if tally(answers)["200"] != 1 {
				t.Fatalf("answers %v, want exactly one 200", tally(answers))
			}
			won := slices.IndexFunc(answers, func(r response) bool { return r.status == 200 })
			want(t, both[won].refresh(), 200, "")
			wantDead(t, servers, both[1-won])
			for i, status := range map[int]int{won: 200, 1 - won: 401} {
				d := c.device()
				d.password = fmt.Sprint(i, c.password)
				if r := d.login(); r.status != status {
					t.Errorf("login with password %d, of which %d won: %d", i, won, r.status)
				}
			}
		}
	})
	t.Run("login against the deletion of the account", func(t *testing.T) {
		for range rounds {
			c := signedUp(servers[0])
			racers := tabs(c.device(), 4, servers)
			answers := together(len(racers)+1, func(i int) response {
				if i == len(racers) {
					return c.tab().do("DELETE", "/auth/me", map[string]any{"password": c.password})
				}
				return racers[i].login()
			})
			want(t, answers[len(racers)], 200, "")
			wantOnly(t, answers[:len(racers)], "200", "401 invalid_credentials")
			wantDead(t, servers, append(racers, c)...)
		}
	})
}

// A change of the row is at its weakest between its work on the sessions and its commit: here that takes long.
func TestSlowCommit(t *testing.T) {
	database := newDatabase(t)
	servers := replicas(t, map[string]string{"DATABASE_URL": database, "LOGIN_LIMIT_MAX": "0"})
	dear := start(t, map[string]string{"DATABASE_URL": database, "LOGIN_LIMIT_MAX": "0", "BCRYPT_COST": "5"})
	execSQL(t, database, `CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END';
		CREATE CONSTRAINT TRIGGER slow AFTER UPDATE OR DELETE ON users DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()`)
	for _, test := range []struct {
		name      string
		change    func(c *client) response
		goesOn    bool // the session itself, all the while
		othersToo bool // and what logs in meanwhile
	}{
		{"change the password", func(c *client) response { return c.do("PUT", "/auth/password", newPassword(c)) }, true, false},
		{"delete the account", func(c *client) response {
			return c.do("DELETE", "/auth/me", map[string]any{"password": c.password})
		}, false, false},
		{"rehash", func(c *client) response { return c.at(dear).device().login() }, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := signedUp(servers[0])
			changing, going := c.tab(), c.tab()
			done := make(chan struct{})
			var others []*client
			answers := together(3, func(i int) (r response) {
				if i == 0 {
					defer close(done)
					return test.change(changing)
				}
				for {
					select {
					case <-done:
						return r
					default:
					}
					if i == 1 {
						d := c.at(servers[1]).device()
						if r = d.login(); r.status == 200 {
							others = append(others, d)
						}
					} else if r = going.refresh(); r.status != 200 {
						return r
					}
				}
			})
			want(t, answers[0], 200, "")
			if test.goesOn {
				want(t, answers[2], 200, "")
				want(t, going.refresh(), 200, "")
			}
			if !test.othersToo {
				wantDead(t, servers, others...)
				return
			}
			for _, d := range others {
				want(t, d.refresh(), 200, "")
			}
		})
	}
}

// ---- another cost

func costOf(t testing.TB, c *client) string {
	t.Helper()
	return queryText(t, c.s.database, "SELECT substr(password_hash, 5, 2) FROM users WHERE email = $1", c.email)
}

func TestRehashAtLogin(t *testing.T) {
	cheap, dear := start(t, nil), start(t, map[string]string{"BCRYPT_COST": "5"})
	t.Run("ends no session", func(t *testing.T) {
		c := signedUp(cheap)
		phone := c.device()
		want(t, phone.login(), 200, "")
		if got := costOf(t, c); got != "04" {
			t.Fatalf("cost %s after signup", got)
		}
		login := c.at(dear).device()
		want(t, login.login(), 200, "")
		if got := costOf(t, c); got != "05" {
			t.Errorf("cost %s after the login at the other server", got)
		}
		for _, d := range []*client{c, phone, login} {
			for _, at := range []*server{cheap, dear} {
				if d.s = at; d.me().status != 200 || d.refresh().status != 200 {
					t.Error("the rehash ended a session")
				}
			}
		}
		want(t, c.device().login(), 200, "")
		c.password = "wrong password"
		want(t, c.device().login(), 401, "invalid_credentials")
	})
	t.Run("revives no session of an older password", func(t *testing.T) {
		c := signedUp(cheap)
		donor := signedUp(cheap)
		execSQL(t, cheap.database, "UPDATE users SET password_hash = (SELECT password_hash FROM users WHERE email = $2) WHERE email = $1", c.email, donor.email)
		owner := c.at(dear).device()
		owner.password = donor.password
		want(t, owner.login(), 200, "")
		if got := costOf(t, c); got != "05" {
			t.Fatalf("cost %s", got)
		}
		want(t, c.refresh(), 401, "session_revoked")
		want(t, owner.refresh(), 200, "")
	})
	t.Run("under simultaneous logins and refreshes", func(t *testing.T) {
		for range rounds {
			c := signedUp(cheap)
			phone := c.device()
			want(t, phone.login(), 200, "")
			living := append([]*client{c, phone}, tabs(c.device(), 6, []*server{cheap, dear})...)
			answers := together(len(living), func(i int) response {
				if i < 2 {
					return living[i].refresh()
				}
				return living[i].login()
			})
			wantOnly(t, answers, "200")
			for _, d := range living {
				want(t, d.me(), 200, "")
				want(t, d.refresh(), 200, "")
			}
		}
	})
}

// ---- a store that does not answer

// While PostgreSQL is away no refresh token is used up, and what needs only Redis goes on.
func userOf(t testing.TB, c *client) string {
	uid, _ := payload(t, c.access)["userId"].(string)
	return uid
}

// Whoever revokes all of a user's sessions finds them by the index: what cannot enter it is not prolonged.
func TestRefreshNeedsTheIndex(t *testing.T) {
	s, rdb := start(t, nil), redisClient(t)
	s.expect("500")
	c := signedUp(s)
	index := "user-sessions:{" + userOf(t, c) + "}"
	if err := rdb.Rename(t.Context(), index, index+"-away").Err(); err != nil {
		t.Fatal(err)
	}
	if err := rdb.Set(t.Context(), index, "no index", time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	want(t, c.refresh(), 500, "internal")
	if err := rdb.Del(t.Context(), index, index+"-away").Err(); err != nil {
		t.Fatal(err)
	}
	want(t, c.refresh(), 200, "") // the token was not used up, and the lost index is whole again
	want(t, c.device().login(), 200, "")
	want(t, c.do("DELETE", "/auth/sessions", nil), 200, "")
	wantDead(t, []*server{s}, c)
}

// A logout that failed leaves the cookie where it is, for the session may live.
func TestFailedLogoutKeepsTheCookie(t *testing.T) {
	s, rdb := start(t, nil), redisClient(t)
	s.expect("500")
	c := signedUp(s)
	key := "session:{" + sessionOf(t, c.access) + "}"
	if err := rdb.Del(t.Context(), key).Err(); err != nil {
		t.Fatal(err)
	}
	if err := rdb.Set(t.Context(), key, "no session", time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	r := c.logout()
	want(t, r, 500, "internal")
	if got := r.header["Set-Cookie"]; got != nil {
		t.Errorf("Set-Cookie: %q", got)
	}
}

// Who knows the password can open any number of sessions; the owner can still see and end them.
func TestManySessions(t *testing.T) {
	s, rdb := start(t, nil), redisClient(t)
	c := signedUp(s)
	const many = 1300
	dump, err := rdb.Dump(t.Context(), "session:{"+sessionOf(t, c.access)+"}").Result()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rdb.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
		for range many {
			sid := newUUID()
			pipe.Restore(t.Context(), "session:{"+sid+"}", time.Minute, dump)
			pipe.ZAdd(t.Context(), "user-sessions:{"+userOf(t, c)+"}", redis.Z{Score: float64(time.Now().Unix() + 60), Member: sid})
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if r := c.do("GET", "/auth/sessions", nil); len(r.body["sessions"].([]any)) != many+1 {
		t.Errorf("%d sessions are listed", len(r.body["sessions"].([]any)))
	}
	want(t, c.do("PUT", "/auth/password", newPassword(c)), 200, "")
	if r := c.do("GET", "/auth/sessions", nil); len(r.body["sessions"].([]any)) != 1 {
		t.Errorf("%d sessions are left", len(r.body["sessions"].([]any)))
	}
}

func TestPostgresOutage(t *testing.T) {
	proxy, database := postgresProxy(t)
	s := start(t, map[string]string{"DATABASE_URL": database})
	s.expect("503")
	for name, breakIt := range map[string]func(){"cut": proxy.Cut, "paused": proxy.Pause} {
		t.Run(name, func(t *testing.T) {
			c, phone, leaving := signedUp(s), newClient(s), signedUp(s)
			phone.email, phone.password = c.email, c.password
			want(t, phone.login(), 200, "")
			breakIt()
			together(7, func(i int) (none struct{}) {
				d := c.tab()
				want503 := func(r response) {
					if r.code() != "unavailable" || r.took > 4*time.Second {
						t.Errorf("%d %q after %v, want unavailable within 2 s", r.status, r.code(), r.took)
					}
				}
				switch i {
				case 0:
					want503(d.refresh())
				case 1:
					want503(d.device().login())
				case 2:
					want503(newClient(s).signup())
				case 3:
					want503(d.me())
				case 4:
					want503(d.do("PUT", "/auth/password", newPassword(d)))
				case 5:
					if r := d.do("GET", "/readyz", nil); r.status != 503 || fmt.Sprint(r.body) != "map[postgres:unavailable redis:ok status:unavailable]" || r.took > 4*time.Second {
						t.Errorf("readyz: %d %s after %v", r.status, r.raw, r.took)
					}
				case 6:
					for r, status := range map[string]int{"GET /healthz": 200, "GET /auth/sessions": 200, "DELETE /auth/sessions/" + sessionOf(t, phone.access): 200} {
						method, path, _ := strings.Cut(r, " ")
						if got := d.do(method, path, nil); got.status != status {
							t.Errorf("%s: %d %s", r, got.status, got.raw)
						}
					}
					if r := leaving.logout(); r.status != 200 {
						t.Errorf("logout: %d %s", r.status, r.raw)
					}
				}
				return
			})
			proxy.Restore()
			eventually(t, "the server recovers", func() bool { return c.do("GET", "/readyz", nil).status == 200 })
			want(t, c.refresh(), 200, "")
			want(t, c.device().login(), 200, "")
			want(t, phone.me(), 401, "session_revoked")
			want(t, leaving.me(), 401, "session_revoked")
		})
	}
}

// While Redis is away nothing is let through unchecked.
func TestRedisOutage(t *testing.T) {
	proxy, redisURL := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": redisURL})
	limited := start(t, map[string]string{"REDIS_URL": redisURL, "RATE_LIMIT_MAX": "1000"})
	s.expect("503")
	limited.expect("503")
	for name, breakIt := range map[string]func(){"cut": proxy.Cut, "paused": proxy.Pause} {
		t.Run(name, func(t *testing.T) {
			c := signedUp(s)
			breakIt()
			requests := []func(d *client) response{
				(*client).me, (*client).refresh, (*client).logout, (*client).login,
				func(d *client) response { return newClient(s).signup() },
				func(d *client) response { return d.do("GET", "/auth/sessions", nil) },
				func(d *client) response { return d.do("DELETE", "/auth/sessions", nil) },
				func(d *client) response { return d.do("PUT", "/auth/password", newPassword(d)) },
				func(d *client) response { return d.at(limited).do("GET", "/nothing", nil) },
			}
			for i, r := range together(len(requests), func(i int) response { return requests[i](c.tab()) }) {
				if r.code() != "unavailable" || r.took > 2*time.Second {
					t.Errorf("request %d: %d %q after %v, want unavailable within 1 s", i, r.status, r.code(), r.took)
				}
			}
			if r := c.do("GET", "/readyz", nil); r.status != 503 || fmt.Sprint(r.body) != "map[postgres:ok redis:unavailable status:unavailable]" || r.took > 2*time.Second {
				t.Errorf("readyz: %d %s after %v", r.status, r.raw, r.took)
			}
			want(t, c.at(limited).do("GET", "/healthz", nil), 200, "")
			proxy.Restore()
			eventually(t, "the server recovers", func() bool { return c.do("GET", "/readyz", nil).status == 200 })
			want(t, c.device().login(), 200, "")
			want(t, signedUp(s).refresh(), 200, "")
		})
	}
}
