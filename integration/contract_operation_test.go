package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/bcrypt"
)

// configuration, database and log: what the operator sees.

var configuration = []promise{
	{"all faults are reported at once, one line each that names its variable; exit status 1; no line shows a secret", own, func(t *testing.T, _ *server) {
		faults := vars{
			"NODE_ENV": "prod", "PORT": "seventy", "DATABASE_URL": "mysql://user:hunter2-database@h/x", "DB_POOL_SIZE": "0", "FRONTEND_URL": "*",
			"REDIS_URL": "http://:hunter2-redis@h", "JWT_SECRET": "hunter2-short", "JWT_REFRESH_SECRET": "hunter2-brief",
			"RATE_LIMIT_WINDOW": "0", "RATE_LIMIT_MAX": "-1", "LOGIN_LIMIT_WINDOW": "x", "LOGIN_LIMIT_MAX": "1.5",
			"ACCESS_TOKEN_TTL": "900", "REFRESH_TOKEN_TTL": "-1h", "SESSION_MAX_TTL": "a month", "REFRESH_REUSE_LEEWAY": "x",
			"REFRESH_REUSE_POLICY": "forgive", "JWT_SECRET_PREVIOUS": "hunter2-old", "JWT_REFRESH_SECRET_PREVIOUS": "hunter2-older",
			"COOKIE_SAMESITE": "maybe", "TRUSTED_PROXIES": "everyone", "BCRYPT_COST": "11", "METRICS_ADDR": "nowhere",
			"LOG_LEVEL": "loud", "SHUTDOWN_TIMEOUT": "soon",
		}
		exit, output := runImage(t, faults)
		if exit != 1 {
			t.Errorf("exit status %d, want 1", exit)
		}
		assertFaults(t, output, faults)
		if strings.Contains(output, "hunter2") {
			t.Errorf("a secret is shown:\n%s", output)
		}
	}},
	{"what is required must be given in production", own, func(t *testing.T, _ *server) {
		exit, output := runImage(t, vars{})
		if exit != 1 {
			t.Errorf("exit status %d, want 1", exit)
		}
		assertFaults(t, output, vars{"PORT": "", "DATABASE_URL": "", "DB_POOL_SIZE": "", "FRONTEND_URL": "", "REDIS_URL": "", "JWT_SECRET": "", "JWT_REFRESH_SECRET": ""})
	}},
	{"each fault alone stops the start, and no good value does", own, func(t *testing.T, _ *server) {
		// A store that cannot be reached ends a server with a good configuration, with a message of that.
		nowhere := environment(home, vars{"DATABASE_URL": "postgres://u:p@127.0.0.1:1/x?sslmode=disable", "REDIS_URL": "redis://127.0.0.1:1"})
		short := strings.Repeat("s", 31)
		// Several rows start the server once: each is another fault of another variable.
		for _, bad := range []vars{
			{"NODE_ENV": "test", "JWT_SECRET": short, "FRONTEND_URL": "https://app.example.com/login", "BCRYPT_COST": "17", "PORT": "65536", "TRUSTED_PROXIES": "10.0.0.0/8, 1.2.3.4/33", "ACCESS_TOKEN_TTL": "0s", "REFRESH_REUSE_LEEWAY": "-1s"},
			{"JWT_REFRESH_SECRET": short, "FRONTEND_URL": "null", "BCRYPT_COST": "4"},
			{"JWT_REFRESH_SECRET": nowhere["JWT_SECRET"], "FRONTEND_URL": "app.example.com"},
			{"JWT_SECRET_PREVIOUS": nowhere["JWT_SECRET"], "FRONTEND_URL": "https://app.example.com,*"},
			{"JWT_REFRESH_SECRET_PREVIOUS": nowhere["JWT_SECRET"], "FRONTEND_URL": "https://user@app.example.com"},
			{"JWT_SECRET_PREVIOUS": short, "JWT_REFRESH_SECRET_PREVIOUS": short, "FRONTEND_URL": "https://app.example.com?x=1"},
			{"BCRYPT_COST": "11"},
			{"NODE_ENV": "staging", "BCRYPT_COST": "11"},
			{"NODE_ENV": "development", "BCRYPT_COST": "3", "COOKIE_SAMESITE": "none"},
		} {
			exit, output := runImage(t, nowhere.with(bad))
			if exit != 1 {
				t.Errorf("%v: exit status %d, want 1", bad, exit)
			}
			faults := vars{}.with(bad)
			maps.DeleteFunc(faults, func(name, value string) bool { return name == "NODE_ENV" && value != "test" })
			assertFaults(t, output, faults)
			if strings.Contains(output, "PostgreSQL cannot be reached") || strings.Contains(output, nowhere["JWT_SECRET"]) || strings.Contains(output, short) {
				t.Errorf("%v: started before its fault was reported, or shows a secret:\n%s", bad, output)
			}
		}
		exit, output := runImage(t, nowhere)
		if exit != 1 || !strings.Contains(output, "DATABASE_URL") {
			t.Errorf("a good configuration without its stores: exit status %d\n%s", exit, output)
		}
	}},
	{"in development everything has a default, and the secrets are random; the log says so, never what they are", own, func(t *testing.T, _ *server) {
		env := vars{"NODE_ENV": "development", "JWT_SECRET": "", "JWT_REFRESH_SECRET": "", "PORT": "", "DB_POOL_SIZE": "", "FRONTEND_URL": ""}
		st := fresh(t)
		one, two := serve(t, st, env), serve(t, st, env)
		v := one.signup(t)
		v.lives()
		v.on(two).me(v.access).refused(401, "invalid_token") // another start has other secrets
		if log := logsOf(one.c); !strings.Contains(log, "JWT_SECRET") {
			t.Errorf("the log does not say that the secrets are random:\n%s", log)
		}
		a := one.send(t, request{method: "GET", path: "/healthz", header: from(frontend)}).want(200)
		if a.Header.Get("Access-Control-Allow-Origin") != frontend {
			t.Error("the default FRONTEND_URL is not http://localhost:5173")
		}
	}},
	{"DATABASE_URL may name several hosts (target_session_attrs)", own, func(t *testing.T, _ *server) {
		several := strings.Replace(home.inDatabase, "@", "@127.0.0.1:1,", 1) + "&target_session_attrs=read-write"
		serve(t, home, development.with(vars{"DATABASE_URL": several})).signup(t).lives()
	}},
	{"on SIGTERM requests in flight end, /readyz is 503 first, then the listener closes; exit status 0", own, func(t *testing.T, _ *server) {
		s := serve(t, home, vars{"LOG_LEVEL": "debug"}) // production's cost: a login takes long enough to be in flight
		v := s.signup(t)
		stopped := make(chan error, 1)
		started := make(chan struct{}, 2)
		go func() {
			<-started
			<-started
			time.Sleep(50 * time.Millisecond) // the two requests are on their way
			stopped <- s.c.Stop(context.Background(), new(20*time.Second))
		}()
		sawUnready, sawClosed := false, false
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 2000 {
				resp, err := httpClient.Get(s.URL + "/readyz")
				if err != nil {
					sawClosed = true
					return
				}
				resp.Body.Close()
				if resp.StatusCode == 503 {
					sawUnready = true
				} else if sawUnready {
					t.Error("/readyz was good again after a 503")
				}
				time.Sleep(5 * time.Millisecond)
			}
		}()
		for _, a := range together(2, func(int) *answer {
			started <- struct{}{}
			return s.tryLogin(t, v.email, v.password, "")
		}) {
			a.want(200)
		}
		if err := <-stopped; err != nil {
			t.Fatal(err)
		}
		<-done
		if !sawUnready || !sawClosed {
			t.Errorf("/readyz 503 seen: %v; listener closed: %v", sawUnready, sawClosed)
		}
		state, err := s.c.State(t.Context())
		if err != nil || state.ExitCode != 0 {
			t.Errorf("exit status %d (%v)", state.ExitCode, err)
		}
	}},
}

// assertFaults asserts that each variable has exactly one line of its own.
func assertFaults(t *testing.T, output string, faults vars) {
	t.Helper()
	for name := range faults {
		lines := 0
		for line := range strings.Lines(output) {
			// JWT_SECRET is a part of the name of another variable; a line is about the one it begins with.
			first := strings.TrimLeft(line, " \t-*")
			if rest, ok := strings.CutPrefix(first, name); ok && !strings.HasPrefix(rest, "_") {
				lines++
			}
		}
		if lines != 1 {
			t.Errorf("%d lines are about %s:\n%s", lines, name, output)
		}
	}
}

// drizzle is the table that the Hono backend's ORM has made.
const drizzle = `CREATE TABLE users (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), email text NOT NULL UNIQUE, password_hash text NOT NULL,
	created_at timestamp DEFAULT now() NOT NULL, updated_at timestamp DEFAULT now() NOT NULL)`

// nodeHash is a hash as Node's bcrypt writes it, which calls the same algorithm 2b.
func nodeHash(t *testing.T, password string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), 12)
	if err != nil {
		t.Fatal(err)
	}
	return "$2b$" + string(hash[4:])
}

var database = []promise{
	{"the table users is as the mission has it, with timestamptz; schema_migrations beside it", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		serve(t, st, development)
		rows, err := st.sql.Query(t.Context(), `SELECT table_name || '.' || column_name, data_type || ' ' || is_nullable FROM information_schema.columns WHERE table_schema = 'public'`)
		if err != nil {
			t.Fatal(err)
		}
		columns := map[string]string{}
		for rows.Next() {
			var name, kind string
			if err := rows.Scan(&name, &kind); err != nil {
				t.Fatal(err)
			}
			columns[name] = kind
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		for name, kind := range map[string]string{"users.id": "uuid NO", "users.email": "text NO", "users.password_hash": "text NO",
			"users.created_at": "timestamp with time zone NO", "users.updated_at": "timestamp with time zone NO"} {
			if columns[name] != kind {
				t.Errorf("%s is %q, want %q", name, columns[name], kind)
			}
			delete(columns, name)
		}
		for name := range columns {
			if !strings.HasPrefix(name, "schema_migrations.") {
				t.Errorf("there is %s too", name)
			}
		}
		st.exec(t, "INSERT INTO users (email, password_hash) VALUES ('a@example.com', 'x')") // id by default
		if _, err := st.sql.Exec(t.Context(), "INSERT INTO users (email, password_hash) VALUES ('a@example.com', 'x')"); err == nil {
			t.Error("email is not unique")
		}
	}},
	{"an adopted table's users log in, mixed-case rows too, and its timestamp columns are read as UTC", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		st.exec(t, drizzle)
		st.exec(t, fmt.Sprintf("ALTER DATABASE %s SET timezone TO 'America/New_York'", st.sql.Config().ConnConfig.Database))
		password := newPassword()
		st.exec(t, "INSERT INTO users (email, password_hash, created_at, updated_at) VALUES ('Ada.Lovelace@Example.COM', $1, '2024-03-10 02:30:00', '2024-03-10 02:30:00')", nodeHash(t, password))
		s := serve(t, st, nil)
		v := &visitor{t: t, s: s, email: "ada.lovelace@example.com", password: password, ip: newIP()}
		for _, email := range []string{"ada.lovelace@example.com", "Ada.Lovelace@Example.COM", "ADA.LOVELACE@EXAMPLE.COM"} {
			v.take(s.tryLogin(t, email, password, "").want(200))
		}
		if created := v.send("GET", "/auth/me", nil).want(200).str("user", "createdAt"); !isTime(t, created).Equal(time.Date(2024, 3, 10, 2, 30, 0, 0, time.UTC)) {
			t.Errorf("createdAt %s, want 2024-03-10T02:30:00Z", created)
		}
		s.trySignup(t, "ada.LOVELACE@example.com", newPassword()).refused(400, "email_exists")
		v.lives()
		changed := newPassword()
		v.send("PUT", "/auth/password", passwordChange{password, changed}).want(200)
		v.password = changed
		v.login().lives()
		// A new row's default now() is in the database's time zone, but its createdAt is not.
		n := s.signup(t)
		isNow(t, n.send("GET", "/auth/me", nil).want(200).str("user", "createdAt"))
		v.send("DELETE", "/auth/me", passwordOnly{changed}).want(200)
	}},
	{"two adopted rows that differ only by case stop the migration, which changes nothing and prints the query that lists them", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		st.exec(t, drizzle)
		st.exec(t, "INSERT INTO users (email, password_hash) VALUES ('a@example.com', 'x'), ('A@example.com', 'x'), ('b@example.com', 'x')")
		schema := func() (dump string) {
			err := st.sql.QueryRow(t.Context(), `SELECT
				(SELECT coalesce(string_agg(c.table_name||c.column_name||c.data_type, ',' ORDER BY 1), '') FROM information_schema.columns c WHERE table_schema = 'public') ||
				(SELECT coalesce(string_agg(indexdef, ',' ORDER BY 1), '') FROM pg_indexes WHERE schemaname = 'public')`).Scan(&dump)
			if err != nil {
				t.Fatal(err)
			}
			return dump
		}
		users := func(column string) (n int) {
			if err := st.sql.QueryRow(t.Context(), "SELECT count(DISTINCT "+column+") FROM users").Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := schema()
		exit, output := runImage(t, environment(st, nil))
		if exit != 1 {
			t.Errorf("exit status %d, want 1", exit)
		}
		// schema_migrations may be there, but nothing that was there may have changed.
		if after := schema(); !strings.Contains(after, before) && users("email") != 3 {
			t.Errorf("the schema was\n%s\nand is\n%s", before, after)
		}
		if users("email") != 3 {
			t.Error("rows have changed")
		}
		query := strings.ToUpper(output)
		if !strings.Contains(query, "SELECT") || !strings.Contains(query, "FROM USERS") {
			t.Errorf("the output has no query:\n%s", output)
		}
		st.exec(t, "DELETE FROM users WHERE email = 'A@example.com'")
		serve(t, st, development).signup(t).lives() // mended, it starts
	}},
	{"any number of replicas may start at once", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		servers := make(chan *server, 3)
		for range 3 {
			go func() {
				s, err := startServer(context.Background(), st, development)
				if err != nil {
					t.Error(err)
				}
				servers <- s
			}()
		}
		for range 3 {
			s := <-servers
			if s == nil {
				continue
			}
			s.signup(t).lives()
			if err := s.c.Terminate(context.Background()); err != nil {
				t.Error(err)
			}
		}
		serve(t, st, development).signup(t).lives() // and a later one
	}},
	{"a password is kept as its bcrypt hash of BCRYPT_COST (12)", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		s := serve(t, st, nil)
		v := s.signup(t)
		var hash string
		if err := st.sql.QueryRow(t.Context(), "SELECT password_hash FROM users WHERE id = $1", v.id).Scan(&hash); err != nil {
			t.Fatal(err)
		}
		if cost, err := bcrypt.Cost([]byte(hash)); err != nil || cost != 12 || bcrypt.CompareHashAndPassword([]byte(hash), []byte(v.password)) != nil {
			t.Errorf("hash %s (%v)", hash, err)
		}
	}},
	{"users are looked up by an index, by lower(email COLLATE \"C\")", kept, func(t *testing.T, s *server) {
		tx, err := s.st.sql.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(context.Background())
		if _, err := tx.Exec(t.Context(), "SET LOCAL enable_seqscan = off"); err != nil {
			t.Fatal(err)
		}
		rows, err := tx.Query(t.Context(), `EXPLAIN SELECT id FROM users WHERE lower(email COLLATE "C") = 'x'`)
		if err != nil {
			t.Fatal(err)
		}
		plan := ""
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				t.Fatal(err)
			}
			plan += line + "\n"
		}
		if !strings.Contains(plan, "Index Cond") {
			t.Errorf("the plan is\n%s", plan)
		}
	}},
}

// sweep sends one request to every limited route at once, as somebody logged in.
func (s *server) sweep(t *testing.T, v *visitor, ip string, header map[string]string) []*answer {
	t.Helper()
	limited := slices.DeleteFunc(slices.Clone(contractRoutes), func(route string) bool { return strings.HasSuffix(route, "z") })
	return together(len(limited), func(i int) *answer {
		method, path, _ := strings.Cut(strings.Replace(limited[i], "{id}", uuid.NewString(), 1), " ")
		r := request{method: method, path: path, bearer: v.access, cookie: v.refresh, ip: ip, header: header}
		switch limited[i] {
		case "POST /auth/signup":
			r.body = credentials{newEmail(), newPassword()}
		case "POST /auth/login":
			r.body = credentials{v.email, v.password}
		case "PUT /auth/password":
			r.body = passwordChange{v.password, newPassword()}
		case "DELETE /auth/me":
			r.body = passwordOnly{v.password}
		}
		return s.send(t, r)
	})
}

// Bounds on a slow answer: design allows 1 s where Redis hangs and 2 s for PostgreSQL; the rest is a busy machine's.
const (
	redisBound    = 2500 * time.Millisecond
	postgresBound = 4 * time.Second
)

var outages = []promise{
	{"every state-changing route is 403 for a stranger's origin, and every route 429 past the limit", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"RATE_LIMIT_MAX": "10"}))
		v := s.signup(t)
		refused := s.sweep(t, v, newIP(), from("https://evil.example"))
		if n := count(refused, 403); n != len(refused)-2 { // all but the two GETs
			t.Errorf("%d of %d are 403", n, len(refused))
		}
		ip := newIP()
		for range 10 {
			s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
		}
		for _, a := range append(s.sweep(t, v, ip, nil), s.send(t, request{method: "GET", path: "/nowhere", ip: ip})) {
			a.refused(429, "rate_limited")
		}
		v.lives()
	}},
	{"unavailable is 503 while Redis does not answer: for all but health, in bounded time, with nothing let through", own, func(t *testing.T, _ *server) {
		st := ownStores(t)
		s := serve(t, st, development)
		v := s.signup(t)
		resume := pause(t, st.redis)
		for _, a := range append(s.sweep(t, v, "", nil), s.send(t, request{method: "GET", path: "/nowhere"})) {
			a.refused(503, "unavailable").keepsCookie()
			if a.took > redisBound {
				t.Errorf("%s took %v", a.sent, a.took)
			}
		}
		s.send(t, request{method: "GET", path: "/healthz"}).want(200)
		assertUnready(t, s, "ok", "unavailable")
		resume()
		eventually(t, 20*time.Second, "ready again", func() bool { return s.send(t, request{method: "GET", path: "/readyz"}).status() == 200 })
		v.lives() // the refresh token was not used up
		v.login()
	}},
	{"unavailable is 503 while PostgreSQL does not answer; logout, session list and revoke go on, and no refresh token is used up", own, func(t *testing.T, _ *server) {
		st := ownStores(t)
		s := serve(t, st, development.with(vars{"LOGIN_LIMIT_MAX": "3"}))
		v := s.signup(t)
		other, third := v.login(), v.login()
		resume := pause(t, st.postgres)
		// Four attempts at the password from one address, which must be given back since nobody could judge them.
		judge := func() *answer { return s.tryLogin(t, v.email, v.password, v.ip) }
		down := []func() *answer{
			judge, judge,
			func() *answer { return v.send("PUT", "/auth/password", passwordChange{v.password, newPassword()}) },
			func() *answer { return v.send("DELETE", "/auth/me", passwordOnly{v.password}) },
			func() *answer { return s.trySignup(t, newEmail(), newPassword()) },
			func() *answer { return v.show(v.refresh) },
			func() *answer { return v.send("GET", "/auth/me", nil) },
		}
		for i, a := range together(len(down), func(i int) *answer { return down[i]() }) {
			if i < 4 && a.status() == 429 {
				continue // of simultaneous attempts only as many are let in as could all be failures
			}
			a.refused(503, "unavailable").keepsCookie()
			if a.took > postgresBound {
				t.Errorf("%s took %v", a.sent, a.took)
			}
		}
		s.send(t, request{method: "GET", path: "/healthz"}).want(200)
		assertUnready(t, s, "unavailable", "ok")
		if n := len(v.sessions()); n != 3 {
			t.Errorf("%d sessions, want 3", n)
		}
		v.send("DELETE", "/auth/sessions/"+other.sid(), nil).want(200)
		third.send("POST", "/auth/logout", nil).want(200)
		resume()
		eventually(t, 20*time.Second, "ready again", func() bool { return s.send(t, request{method: "GET", path: "/readyz"}).status() == 200 })
		v.lives()
		other.gone()
		third.gone()
		for range 3 {
			s.tryLogin(t, v.email, "wrong", v.ip).refused(401, "invalid_credentials")
		}
	}},
	{"all sessions can be revoked while PostgreSQL does not answer", own, func(t *testing.T, _ *server) {
		st := ownStores(t)
		s := serve(t, st, development)
		v := s.signup(t)
		resume := pause(t, st.postgres)
		v.send("DELETE", "/auth/sessions", nil).want(200)
		resume()
		eventually(t, 20*time.Second, "ready again", func() bool { return s.send(t, request{method: "GET", path: "/readyz"}).status() == 200 })
		v.gone()
	}},
	{"a server outlives stores that were stopped and started again", own, func(t *testing.T, _ *server) {
		st := ownStores(t)
		s := serve(t, st, development)
		v := s.signup(t)
		for _, c := range []interface {
			Start(context.Context) error
			Stop(context.Context, *time.Duration) error
		}{st.postgres, st.redis} {
			if err := c.Stop(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			s.tryLogin(t, v.email, v.password, "").refused(503, "unavailable")
			s.send(t, request{method: "GET", path: "/readyz"}).want(503)
			if err := c.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			eventually(t, 30*time.Second, "ready again", func() bool { return s.send(t, request{method: "GET", path: "/readyz"}).status() == 200 })
		}
		v.login().lives()
	}},
	{"a Redis that has lost its scripts is no outage", own, func(t *testing.T, _ *server) {
		st := ownStores(t)
		s := serve(t, st, development)
		v := s.signup(t)
		for range 3 {
			if err := st.keys.ScriptFlush(t.Context()).Err(); err != nil {
				t.Fatal(err)
			}
			v.lives()
			v.login().send("POST", "/auth/logout", nil).want(200)
		}
	}},
	{"overloaded is 503 when hashing is saturated; what hashes nothing goes on", own, func(t *testing.T, _ *server) {
		s := serve(t, home, nil)
		v := s.signup(t)
		flood := make(chan []*answer)
		go func() {
			flood <- together(60*runtime.NumCPU(), func(int) *answer { return s.tryLogin(t, newEmail(), "a wrong password", "") })
		}()
		slowest, judged := time.Duration(0), []*answer(nil)
		for judged == nil {
			select {
			case judged = <-flood:
			default:
				start := time.Now()
				v.fromNewIP().me(v.access).want(200)
				slowest = max(slowest, time.Since(start))
			}
		}
		if slowest > 2*time.Second {
			t.Errorf("GET /auth/me took %v beside the flood", slowest)
		}
		codes := map[string]int{}
		for _, a := range judged {
			switch codes[a.code()]++; a.code() {
			case "overloaded", "invalid_credentials":
			case "unavailable": // on a machine this busy, Redis may be late too
			default:
				t.Errorf("%s: %d %s", a.sent, a.status(), a.body)
			}
		}
		if codes["overloaded"] == 0 || codes["invalid_credentials"] == 0 {
			t.Errorf("of %d simultaneous logins %v", len(judged), codes)
		}
		v.login() // over it goes
	}},
	{"internal is 500, never with a cause in it: the cause is in the log, under the request id", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		s := serve(t, st, nil)
		v := s.signup(t)
		st.exec(t, "ALTER TABLE users RENAME TO people")
		for _, r := range []request{
			{method: "POST", path: "/auth/signup", body: credentials{newEmail(), newPassword()}},
			{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}},
			{method: "POST", path: "/auth/refresh", cookie: v.refresh},
			{method: "GET", path: "/auth/me", bearer: v.access},
			{method: "PUT", path: "/auth/password", bearer: v.access, body: passwordChange{v.password, newPassword()}},
			{method: "DELETE", path: "/auth/me", bearer: v.access, body: passwordOnly{v.password}},
		} {
			s.assertCauseOnlyInLog(t, s.send(t, r).keepsCookie())
		}
		st.exec(t, "ALTER TABLE people RENAME TO users")
		v.lives() // the refresh token was not used up
		v.login()
	}},
	{"internal is 500 on every limited route when Redis answers with nonsense", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		s := serve(t, st, nil)
		v := s.signup(t)
		ip := newIP()
		// Somebody else's data under the key of the rate limit, which every limited route asks.
		if err := st.keys.RPush(t.Context(), "rate-limit:{"+ip+"}", "nonsense").Err(); err != nil {
			t.Fatal(err)
		}
		for _, a := range append(s.sweep(t, v, ip, nil), s.send(t, request{method: "GET", path: "/nowhere", ip: ip})) {
			a.refused(500, "internal").keepsCookie()
			s.assertCauseOnlyInLog(t, a)
		}
		v.lives()
	}},
}

func (s *server) assertCauseOnlyInLog(t *testing.T, a *answer) {
	t.Helper()
	a.refused(500, "internal")
	for _, cause := range []string{"users", "relation", "SQLSTATE", "WRONGTYPE", "redis", "pgx", "panic"} {
		if strings.Contains(string(a.body), cause) {
			t.Errorf("%s: the answer tells the cause: %s", a.sent, a.body)
		}
	}
	line := s.logLine(t, a.Header.Get("X-Request-Id"))
	if cause, _ := line["error"].(string); cause == "" || line["status"] != float64(500) {
		t.Errorf("%s: the log has no cause: %v", a.sent, line)
	}
}

func assertUnready(t *testing.T, s *server, postgres, redis string) {
	t.Helper()
	a := s.send(t, request{method: "GET", path: "/readyz"}).want(503)
	members(t, a.json, "status", "postgres", "redis")
	if a.json["status"] != "unavailable" || a.json["postgres"] != postgres || a.json["redis"] != redis {
		t.Errorf("/readyz says %s, want postgres %s and redis %s", a.body, postgres, redis)
	}
}

// logLine is the one line of a request in a log of JSON lines.
func (s *server) logLine(t *testing.T, requestID string) map[string]any {
	t.Helper()
	var found []map[string]any
	// Docker hands a line on a moment after it was written.
	eventually(t, 5*time.Second, "a log line of request "+requestID, func() bool {
		found = nil
		for text := range strings.Lines(logsOf(s.c)) {
			line := map[string]any{}
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatalf("the log line %q is no JSON: %v", text, err)
			}
			if line["requestId"] == requestID && line["status"] != nil {
				found = append(found, line)
			}
		}
		return len(found) > 0
	})
	if len(found) != 1 {
		t.Errorf("%d lines of one request: %v", len(found), found)
	}
	return found[0]
}

var logging = []promise{
	{"one JSON line per request, with time, level, msg, requestId, method, path, route, status, durationMs and ip; userId where known", own, func(t *testing.T, _ *server) {
		s := serve(t, home, nil)
		v := s.signup(t)
		for _, x := range []struct {
			r      request
			route  string
			status int
			user   bool
		}{
			{request{method: "GET", path: "/auth/me?token=" + v.access, bearer: v.access}, "/auth/me", 200, true},
			{request{method: "DELETE", path: "/auth/sessions/" + uuid.NewString() + "?x=" + v.password[3:], bearer: v.access}, "/auth/sessions/{id}", 404, true},
			{request{method: "POST", path: "/auth/refresh", cookie: v.refresh}, "/auth/refresh", 200, true},
			{request{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}}, "/auth/login", 200, true},
			{request{method: "POST", path: "/auth/login", body: credentials{newEmail(), v.password}}, "/auth/login", 401, false},
			{request{method: "GET", path: "/auth/me"}, "/auth/me", 401, false},
			{request{method: "GET", path: "/nowhere/" + strings.Repeat("x", 20)}, "", 404, false},
			{request{method: "GET", path: "/healthz"}, "/healthz", 200, false},
		} {
			x.r.ip = newIP()
			a := s.send(t, x.r).want(x.status)
			line := s.logLine(t, a.Header.Get("X-Request-Id"))
			path, _, _ := strings.Cut(x.r.path, "?")
			for name, want := range map[string]any{"method": x.r.method, "path": path, "status": float64(x.status), "ip": x.r.ip} {
				if line[name] != want {
					t.Errorf("%s: %s is %v, want %v", a.sent, name, line[name], want)
				}
			}
			if route, _ := line["route"].(string); !strings.HasSuffix(route, x.route) || x.route == "" && strings.Contains(route, "nowhere") {
				t.Errorf("%s: route is %q, want %q", a.sent, route, x.route)
			}
			if x.user != (line["userId"] == v.id) {
				t.Errorf("%s: userId is %v", a.sent, line["userId"])
			}
			if ms, ok := line["durationMs"].(float64); !ok || ms < 0 || ms > 60_000 {
				t.Errorf("%s: durationMs is %v", a.sent, line["durationMs"])
			}
			if at, err := time.Parse(time.RFC3339, fmt.Sprint(line["time"])); err != nil || time.Since(at).Abs() > 2*time.Minute {
				t.Errorf("%s: time is %v", a.sent, line["time"])
			}
			for _, name := range []string{"level", "msg"} {
				if text, ok := line[name].(string); !ok || text == "" {
					t.Errorf("%s: %s is %v", a.sent, name, line[name])
				}
			}
		}
	}},
	{"never a password, a token, a cookie, a secret or an email address", own, func(t *testing.T, s *server) {
		// Every other server's log is searched at its end; this one has seen most of the suite by now.
		assertLogFreeOfSecrets(t, s)
		if lines := strings.Count(logsOf(s.c), "\n"); lines < 100 {
			t.Errorf("only %d lines were searched", lines)
		}
	}},
	{"no user can write a line of the log", own, func(t *testing.T, _ *server) {
		s := serve(t, home, nil)
		forged := "%0a%7B%22level%22:%22FORGED%22%7D"
		a := s.send(t, request{method: "GET", path: "/nowhere/" + forged, agent: `{"level":"FORGED"}`}).want(404)
		s.logLine(t, a.Header.Get("X-Request-Id"))
		for line := range strings.Lines(logsOf(s.c)) {
			entry := struct{ Level string }{}
			if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level == "FORGED" {
				t.Errorf("a line of the log is %s (%v)", line, err)
			}
		}
	}},
}
