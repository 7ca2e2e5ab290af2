package main

// main_test.go has the harness of the tests in this folder, and the tests of main.go. The tests
// here are about what needs the inside of the server: pure functions, races, lost replies, stores
// that fail. What can be asked of a server by its URL is tested in contract/.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"golang.org/x/crypto/bcrypt"
)

// The stores

// testDatabase is the database of all tests that do not need their own.
var testDatabase = "latchkey_test_" + strings.ToLower(rand.Text())

func TestMain(m *testing.M) {
	if os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == "" {
		fmt.Fprintln(os.Stderr, "The tests need a PostgreSQL and a Redis. Run `make test`, which "+
			"starts both, or set DATABASE_URL (of a role that may create databases) and REDIS_URL.")
		os.Exit(1)
	}
	code := 1
	admin := os.Getenv("DATABASE_URL")
	err := execute(admin, "CREATE DATABASE "+testDatabase)
	if err == nil {
		code = m.Run()
		err = execute(admin, "DROP DATABASE "+testDatabase+" WITH (FORCE)")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// execute executes SQL in a database.
func execute(database, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql, args...)
	return err
}

// execSQL executes SQL behind the server's back.
func execSQL(t testing.TB, database, sql string, args ...any) {
	t.Helper()
	if err := execute(database, sql, args...); err != nil {
		t.Fatal(err)
	}
}

// newDatabase makes an empty database for one test and returns its URL. The isolation level that is
// its default is not the one that the server needs.
func newDatabase(t testing.TB) string {
	t.Helper()
	name := "latchkey_test_" + strings.ToLower(rand.Text())
	admin := os.Getenv("DATABASE_URL")
	execSQL(t, admin, "CREATE DATABASE "+name)
	execSQL(t, admin, "ALTER DATABASE "+name+" SET default_transaction_isolation = 'serializable'")
	t.Cleanup(func() { execSQL(t, admin, "DROP DATABASE "+name+" WITH (FORCE)") })
	return databaseURL(name)
}

// databaseURL returns DATABASE_URL with the name of another database.
func databaseURL(name string) string {
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		panic("DATABASE_URL is no URL") // the error would show the password
	}
	u.Path = "/" + name
	return u.String()
}

// redisClient returns a client for what happens behind the server's back. Tests touch only keys of
// their own users and addresses, because others may use this Redis too.
func redisClient(t testing.TB) *redis.Client {
	t.Helper()
	options, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		t.Fatal("REDIS_URL is no URL of a single Redis")
	}
	rdb := redis.NewClient(options)
	t.Cleanup(func() { rdb.Close() })
	return rdb
}

// The server

// testSecrets sign the tokens of all servers of this run, so that two of them are two replicas.
var testSecrets = map[string]string{
	"JWT_SECRET":         rand.Text() + rand.Text(),
	"JWT_REFRESH_SECRET": rand.Text() + rand.Text(),
}

// testEnvironment returns the environment of a test server, changed by env.
func testEnvironment(env map[string]string) map[string]string {
	all := map[string]string{
		"NODE_ENV":         "development",
		"PORT":             "0",
		"DATABASE_URL":     databaseURL(testDatabase),
		"DB_POOL_SIZE":     "10",
		"REDIS_URL":        os.Getenv("REDIS_URL"),
		"FRONTEND_URL":     "http://localhost:5173",
		"BCRYPT_COST":      "4",
		"RATE_LIMIT_MAX":   "0",
		"LOGIN_LIMIT_MAX":  "0",
		"SHUTDOWN_TIMEOUT": "500ms",
	}
	maps.Copy(all, testSecrets)
	maps.Copy(all, env)
	return all
}

// lookup returns what run and newEnvironment take for os.Getenv.
func lookup(env map[string]string) func(name string) string {
	return func(name string) string { return env[name] }
}

// runCommand runs a subcommand in the environment of a test server, changed by env, and returns
// what it printed.
func runCommand(t testing.TB, env map[string]string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var stdout bytes.Buffer
	err := run(ctx, args, lookup(testEnvironment(env)), &stdout, io.Discard)
	return stdout.String(), err
}

// server is a server under test.
type server struct {
	t         testing.TB
	url       string
	database  string
	http      *http.Client
	stop      func() error // does what SIGTERM does, and returns what run returned
	listening chan string  // gets the server's port once it listens
	expects   int          // the status from 500 on that the test provokes

	mu  sync.Mutex
	log bytes.Buffer
}

// start runs a server until the test ends, and then checks that it stopped well and what it logged.
func start(t testing.TB, env map[string]string) *server {
	t.Helper()
	all := testEnvironment(env)
	s := &server{
		t:         t,
		database:  all["DATABASE_URL"],
		http:      &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1000}},
		listening: make(chan string, 1),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, nil, lookup(all), s, io.Discard) }()
	s.stop = sync.OnceValue(func() error {
		s.http.CloseIdleConnections()
		cancel()
		return <-done
	})
	select {
	case port := <-s.listening:
		s.url = "http://127.0.0.1:" + port
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Errorf("run returned %v", err)
		}
		s.checkLog()
	})
	return s
}

// newHandler returns what run would serve, for a test that calls it without a network.
func newHandler(t testing.TB) http.Handler {
	t.Helper()
	cfg := newEnvironment(lookup(testEnvironment(nil))).config()
	db, dbErr := pgxpool.NewWithConfig(context.Background(), cfg.database)
	rdb := newRedisClient(cfg.redis)
	app, appErr := newApp(cfg, newLogger(cfg.development, cfg.logLevel, io.Discard), db, rdb)
	if err := errors.Join(dbErr, appErr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		db.Close()
		rdb.Close()
	})
	return app.handler
}

// replicas starts two servers on the same stores.
func replicas(t testing.TB, env map[string]string) []*server {
	t.Helper()
	return []*server{start(t, env), start(t, env)}
}

func portOf(address string) string {
	return address[strings.LastIndexByte(address, ':')+1:]
}

// listenLocally returns a listener on a free port.
func listenLocally(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// listeningLine matches the line of the log that names the server's port.
var listeningLine = regexp.MustCompile(`addr=\S*:(\d+) for=PORT`)

// Write takes a line of the server's log.
func (s *server) Write(line []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if match := listeningLine.FindSubmatch(line); match != nil {
		s.listening <- string(match[1])
	}
	return s.log.Write(line)
}

// logged returns what the server has logged.
func (s *server) logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// failedRequest matches the line of a request that was answered with a status from 500 on.
var failedRequest = regexp.MustCompile(`level=ERROR msg=request .* status=(5\d\d) .* error=.`)

// loggedMail matches the line of a mail that is logged instead of being sent. It has the only
// address and the only link that may be in a log.
var loggedMail = regexp.MustCompile(`(?m)^.* msg="mail is logged, .*\n`)

// checkLog fails the test if the log has a secret, an error that the test has not provoked, or a
// failed request without its cause. All tokens begin with eyJ.
func (s *server) checkLog() {
	logged := loggedMail.ReplaceAllString(s.logged(), "")
	secrets := append(slices.Collect(maps.Values(testSecrets)), "eyJ", "@example.test", "hunter2")
	for _, name := range []string{"DATABASE_URL", "REDIS_URL"} {
		if u, err := url.Parse(os.Getenv(name)); err == nil {
			password, _ := u.User.Password()
			secrets = append(secrets, password)
		}
	}
	for _, secret := range secrets {
		if len(secret) >= 3 && strings.Contains(logged, secret) {
			s.t.Errorf("the log has the secret %q:\n%s", secret, logged)
		}
	}
	for line := range strings.Lines(s.logged()) {
		failed := strings.Contains(line, "level=ERROR") || strings.Contains(line, " status=5")
		match := failedRequest.FindStringSubmatch(line)
		if failed && (match == nil || match[1] != strconv.Itoa(s.expects)) {
			s.t.Errorf("an unexpected error, or one without a cause, in the log: %s", line)
		}
	}
}

// The client

// client is a user at a browser, with the tokens that they have.
type client struct {
	t        testing.TB
	s        *server
	email    string
	password string
	access   string // the last access token; none is sent if it is empty
	cookie   string // the refresh token; none is sent if it is empty
}

// newClient returns a user who has not signed up yet. checkLog knows its email and its password by
// the parts that are not random.
func newClient(s *server) *client {
	return &client{
		t:        s.t,
		s:        s,
		email:    strings.ToLower(rand.Text()) + "@example.test",
		password: "hunter2 " + rand.Text(),
	}
}

// signedUp returns a user with an account and a session, whose mail is out of the way.
func signedUp(s *server) *client {
	s.t.Helper()
	c := newClient(s)
	want(c.t, c.signup(), 201, "")
	eventually(c.t, "the mail is logged", func() bool {
		return strings.Contains(s.logged(), "outcome=sent userId="+c.claims().UserID)
	})
	return c
}

// at returns another tab of the same browser, which asks this server. It has the same tokens until
// one of the two refreshes.
func (c *client) at(s *server) *client {
	tab := *c
	tab.s = s
	return &tab
}

func (c *client) tab() *client { return c.at(c.s) }

// device returns the same user at another device, not logged in.
func (c *client) device() *client {
	return &client{t: c.t, s: c.s, email: c.email, password: c.password}
}

// loggedIn returns the same user at another device, logged in.
func (c *client) loggedIn() *client {
	c.t.Helper()
	d := c.device()
	want(c.t, d.login(), 200, "")
	return d
}

// tabs returns n tabs of the client, by turns at each of the servers.
func (c *client) tabs(n int, servers []*server) []*client {
	var tabs []*client
	for i := range n {
		tabs = append(tabs, c.at(servers[i%len(servers)]))
	}
	return tabs
}

// claims returns the claims of the client's refresh token, whose session is the access token's too.
func (c *client) claims() claims {
	c.t.Helper()
	refresh := keys{current: []byte(testSecrets["JWT_REFRESH_SECRET"])}
	claims, err := refresh.verify(c.cookie, time.Now())
	if err != nil {
		c.t.Fatalf("the refresh token %q: %v", c.cookie, err)
	}
	return claims
}

// sessionKey and indexKey name what Redis has of the client.
func (c *client) sessionKey() string {
	return "session:{" + c.claims().UserID + "}:" + c.claims().SessionID
}

func (c *client) indexKey() string { return "user-sessions:{" + c.claims().UserID + "}" }

func (c *client) signup() response        { return c.do("POST", "/auth/signup", c.credentials()) }
func (c *client) login() response         { return c.do("POST", "/auth/login", c.credentials()) }
func (c *client) refresh() response       { return c.do("POST", "/auth/refresh", nil) }
func (c *client) logout() response        { return c.do("POST", "/auth/logout", nil) }
func (c *client) me() response            { return c.do("GET", "/auth/me", nil) }
func (c *client) sessions() response      { return c.do("GET", "/auth/sessions", nil) }
func (c *client) revokeAll() response     { return c.do("DELETE", "/auth/sessions", nil) }
func (c *client) ready() response         { return c.do("GET", "/readyz", nil) }
func (c *client) deleteAccount() response { return c.do("DELETE", "/auth/me", c.credentials()) }

func (c *client) revoke(sessionID string) response {
	return c.do("DELETE", "/auth/sessions/"+sessionID, nil)
}

func (c *client) changePassword(newPassword string) response {
	body := object{"currentPassword": c.password, "newPassword": newPassword}
	return c.do("PUT", "/auth/password", body)
}

// renewPassword changes the password to the same one, which is a change like any other.
func (c *client) renewPassword() response { return c.changePassword(c.password) }

func (c *client) credentials() object { return object{"email": c.email, "password": c.password} }

// object is a JSON object of strings.
type object map[string]string

// response is an answer, read to its end.
type response struct {
	status int
	raw    string
	body   map[string]any
	took   time.Duration
}

// text returns a member of the body if it is a string.
func (r response) text(name string) string {
	text, _ := r.body[name].(string)
	return text
}

// code returns the code of an error, "" of another answer.
func (r response) code() string { return r.text("code") }

// String returns the status and the code: "200", "401 refresh_reused".
func (r response) String() string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", r.status, r.code()))
}

// do sends a request with the tokens that the client has, and keeps those that it gets. It may be
// called from any goroutine.
func (c *client) do(method, path string, body object, headers ...string) response {
	c.t.Helper()
	var encoded []byte
	if body != nil {
		encoded, _ = json.Marshal(body) // strings always encode
	}
	req, err := http.NewRequest(method, c.s.url+path, bytes.NewReader(encoded))
	if err != nil {
		c.t.Error(err)
		return response{}
	}
	req.Header.Set("Content-Type", "application/json")
	if c.access != "" {
		req.Header.Set("Authorization", "Bearer "+c.access)
	}
	if c.cookie != "" {
		req.Header.Set("Cookie", "refreshToken="+c.cookie)
	}
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	sent := time.Now()
	resp, err := c.s.http.Do(req)
	if err != nil {
		c.t.Errorf("%s %s: %v", method, path, err)
		return response{}
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Errorf("%s %s: %v", method, path, err)
	}
	r := response{status: resp.StatusCode, raw: string(raw), took: time.Since(sent)}
	_ = json.Unmarshal(raw, &r.body) // an answer that is no JSON has no code
	if token := r.text("accessToken"); token != "" {
		c.access = token
	}
	for _, cookie := range resp.Cookies() {
		c.cookie = cookie.Value
	}
	refused := r.status == 429 || r.status == 503
	if refused && (resp.Header.Get("Retry-After") == "" || len(resp.Cookies()) > 0) {
		c.t.Errorf("%s %s: a 429 or 503 says when to come back and leaves the cookie: %v",
			method, path, resp.Header)
	}
	return r
}

// want ends the test unless the answer has that status and, if it is an error, that code.
func want(t testing.TB, r response, status int, code string) {
	t.Helper()
	if r.status != status || r.code() != code {
		t.Fatalf("got %d %q, want %d %q\n%s", r.status, r.code(), status, code, r.raw)
	}
}

// wantOnly fails the test unless every answer is one of those allowed.
func wantOnly(t testing.TB, answers []response, allowed ...string) {
	t.Helper()
	for _, r := range answers {
		if !slices.Contains(allowed, r.String()) {
			t.Errorf("got %v, want one of %q\n%s", r, allowed, r.raw)
		}
	}
}

// wantDead fails the test if a token of any of the clients still works at any of the servers.
func wantDead(t testing.TB, servers []*server, clients ...*client) {
	t.Helper()
	for _, s := range servers {
		for _, c := range clients {
			if r := c.at(s).me(); c.access != "" && r.String() != "401 session_revoked" {
				t.Errorf("the access token of a session that has ended: %v", r)
			}
			if r := c.at(s).refresh(); c.cookie != "" && r.status != 401 {
				t.Errorf("the refresh token of a session that has ended: %v", r)
			}
		}
	}
}

// together calls f n times at once and returns what the calls returned.
func together[T any](n int, f func(i int) T) []T {
	results := make([]T, n)
	barrier := make(chan struct{})
	var calls sync.WaitGroup
	for i := range n {
		calls.Go(func() {
			<-barrier
			results[i] = f(i)
		})
	}
	close(barrier)
	calls.Wait()
	return results
}

// eventually waits until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// The fault

// proxy stands between a server and a store, on real connections, and breaks them.
type proxy struct {
	url      string // of the store, through the proxy
	store    string // the store's host and port
	listener net.Listener

	requests atomic.Int64 // what the server has sent, in pieces
	steals   atomic.Bool  // the next reply of Redis is lost

	mu    sync.Mutex
	cut   bool // no connection is accepted
	conns []net.Conn
}

// newProxy returns a proxy before a store whose URL is given, with the port where it has none.
func newProxy(t testing.TB, storeURL, defaultPort string) *proxy {
	t.Helper()
	u, err := url.Parse(storeURL)
	if err != nil {
		t.Fatal("the URL of a store is no URL")
	}
	p := &proxy{
		store:    net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), defaultPort)),
		listener: listenLocally(t),
	}
	u.Host = p.listener.Addr().String()
	p.url = u.String()
	go func() {
		for {
			conn, err := p.listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
	t.Cleanup(p.Cut)
	return p
}

// postgresProxy returns a proxy before the shared database.
func postgresProxy(t testing.TB) *proxy { return newProxy(t, databaseURL(testDatabase), "5432") }

// redisProxy returns a proxy before Redis.
func redisProxy(t testing.TB) *proxy { return newProxy(t, os.Getenv("REDIS_URL"), "6379") }

func (p *proxy) serve(client net.Conn) {
	store, err := net.Dial("tcp", p.store)
	if err != nil {
		client.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cut {
		client.Close()
		store.Close()
		return
	}
	p.conns = append(p.conns, client, store)
	go p.pass(client, store, false)
	go p.pass(store, client, true)
}

// pass copies bytes until one side is closed or a reply is stolen.
func (p *proxy) pass(from, to net.Conn, replies bool) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		isError := buffer[0] == '-'
		if replies && !isError && p.steals.CompareAndSwap(true, false) {
			return
		}
		if !replies {
			p.requests.Add(1)
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// Cut breaks all connections and accepts no new ones, as if the store's process were gone.
func (p *proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.cut = true
}

// StealReply runs do, and breaks the connection instead of passing the first reply of Redis to it.
// The command has been carried out then, and the server cannot know.
func (p *proxy) StealReply(t testing.TB, do func()) {
	t.Helper()
	p.steals.Store(true)
	do()
	if p.steals.Load() {
		t.Fatal("no reply has been stolen")
	}
}

// Configuration

// variables has the limits of each variable: the values before the arrow are good, those behind it
// are faults. Values are separated by "|".
var variables = map[string]string{
	"NODE_ENV": `|staging|development -> test|Production`,
	"PORT":     `0|65535 -> |65536|-1|3000x|:3000`,
	"DATABASE_URL": `postgres://u:p@h/d|postgres://u:top%40secret@h/d` +
		`|postgresql://h1:5432,h2:5433/d?target_session_attrs=read-write` +
		`|postgres://h/d?default_query_exec_mode=exec&statement_cache_capacity=0 -> ` +
		`|host=localhost|mysql://h/d|h|postgres://h:x/d|postgres_x=1 host=h` +
		`|postgres://u:1/a-password-with-a-slash@h/d|postgres://u:top@secret@h/d` +
		`|postgres://u:p@h/d?x=@` +
		`|postgres://h/d?default_query_exec_mode=describe_exec` +
		`|postgres://h/d?statement_cache_capacity=0` +
		`|postgres://h/d?statement_cache_capacity=-1` +
		`|postgres://h/d?pool_health_check_period=0s` +
		`|postgres://h/d?default_query_exec_mode=cache_describe&description_cache_capacity=0`,
	"DB_POOL_SIZE": `1|50 -> |0|-1|many`,
	"FRONTEND_URL": `http://localhost:5173|https://a.example/, http://b.example:8080` +
		`|https://A.example:443|http://[::1]:3000 -> ` +
		`|*|null|a.example|ftp://a.example|https://a.example/path|https://a.example,*` +
		`|https://*.example|https://a.example?x|https://u:p@a.example|,|,https://a.example` +
		`|https://a.example:|https://exämple.com`,
	"REDIS_URL": `redis://h:1|rediss://u:p@h:1/2|redis://h:1?addr=h:2&addr=h:3` +
		`|redis://h:1?master_name=m` +
		`|rediss://u:p@h:1/2?master_name=m&addr=h:2&sentinel_username=u&sentinel_password=%40 -> ` +
		`|http://h|h:6379|redis://h:1/x|redis://:top@secret@h:1|redis://h:1?x=1` +
		`|redis://h:1?master_name=|redis://h:1?sentinel_password=p|redis://h:1/x?master_name=m` +
		`|redis://h:1?master_name=m&addr=h|redis://h:1?master_name=m&x=1` +
		`|redis://h:1?master_name=m&sentinel_password=top%` +
		`|redis://h:1?master_name=m&sentinel_password=@|redis://h:1?master_name=m;db=1`,
	"JWT_SECRET":                  `LONG|ÉÉ -> |SHORT|É| LONG|LONG |LONG` + "\n|REFRESH",
	"JWT_REFRESH_SECRET":          `LONG|ÉÉ -> |SHORT|É| LONG|LONG |LONG` + "\n|ACCESS",
	"JWT_SECRET_PREVIOUS":         `|LONG -> SHORT| LONG|ACCESS|REFRESH`,
	"JWT_REFRESH_SECRET_PREVIOUS": `|LONG -> SHORT| LONG|ACCESS|REFRESH`,
	"RATE_LIMIT_WINDOW":           `1 -> 0|-1|60s|1.5`,
	"RATE_LIMIT_MAX":              `0|1 -> -1|ten`,
	"LOGIN_LIMIT_WINDOW":          `1 -> 0|15m`,
	"LOGIN_LIMIT_MAX":             `0|1 -> -1|1e3`,
	"ACCESS_TOKEN_TTL":            `1s|1h30m -> 0s|-1m|15|1 h|1.5s`,
	"REFRESH_TOKEN_TTL":           `1s|8760h -> 0s|7d|1500ms`,
	"SESSION_MAX_TTL":             `1s|8760h -> 0s|30d`,
	"REFRESH_REUSE_LEEWAY":        `0s|50ms|1m -> -1s|10|1us`,
	"REFRESH_REUSE_POLICY":        `|refuse|resend -> accept`,
	"COOKIE_SAMESITE":             `|strict|lax|none -> no`,
	"TRUSTED_PROXIES": `|10.0.0.0/8, fd00::/8|127.0.0.1/32 -> ` +
		`10.0.0.1|10.0.0.0/33|proxy|10.0.0.0/8,x|::ffff:10.0.0.0/104`,
	"BCRYPT_COST": `12|16 -> 11|17|x`,
	"SMTP_URL": `|smtp://h|smtps://h|smtp://u:p@h:2525|smtps://u:top%40secret@h:1 -> ` +
		`h|http://h|smtp:h|smtp://|smtp://:25|smtp://u@h|smtp://:top@h|smtp://h:x|smtp://h/x` +
		`|smtp://h?x=1|smtp://h#x|smtp://u%00x:p@h|smtp://u:top@secret@h|smtp://u:p@h:0|smtp://h:65536`,
	"MAIL_FROM": `|a@b.example|Ädä <a@b.example>|"A, B" <a@b.example> -> ` +
		`a|a@|<a@b.example|a@b.example, c@d.example|é@b.example|a@[127.0.0.1]|A`,
	"PASSWORD_RESET_URL": `|https://a.example/reset|http://localhost:3000/?page=reset -> ` +
		`/reset|a.example|ftp://a.example|https://a.example/#/reset|https://u:p@a.example/|//a|https://:80/` +
		`|https://a.example/x |https://a.example/x y|https://a.example/"><`,
	"EMAIL_VERIFY_URL": `|https://a.example/verify -> verify|javascript:alert(1)`,
	"MAIL_TEMPLATES":   `|mail.tmpl -> no-such-file|.|main.go`,
	"METRICS_ADDR":     `|:9090|127.0.0.1:0|[::1]:9090 -> 9090|host|:99999|localhost:x`,
	"LOG_LEVEL":        `|debug|info|warn|error -> loud`,
	"SHUTDOWN_DELAY":   `|0s|1ms|1m -> -1s|10`,
	"SHUTDOWN_TIMEOUT": `1ms|1m -> 0s|-1s|10`,
}

func TestEachVariable(t *testing.T) {
	secrets := strings.NewReplacer(
		"LONG", strings.Repeat("l", 32),
		"SHORT", strings.Repeat("l", 31),
		"ÉÉ", strings.Repeat("é", 32),
		"É", strings.Repeat("é", 31),
		"ACCESS", testSecrets["JWT_SECRET"],
		"REFRESH", testSecrets["JWT_REFRESH_SECRET"],
	)
	for name, values := range variables {
		good, bad, _ := strings.Cut(secrets.Replace(values), " -> ")
		for value := range strings.SplitSeq(good, "|") {
			if err := productionFaults(name, value); err != nil {
				t.Errorf("%s=%q: %v", name, value, err)
			}
		}
		for value := range strings.SplitSeq(bad, "|") {
			got := fmt.Sprint(productionFaults(name, value))
			// If two secrets are equal, either of them may be named.
			named := strings.HasPrefix(got, name) || strings.HasPrefix(got, "JWT_")
			if !named || strings.Contains(got, "\n") {
				t.Errorf("%s=%q: %q", name, value, got)
			}
		}
	}
}

// TestSentinelURL checks whose name and password is whose, and that TLS lets no server show the
// certificate of another.
func TestSentinelURL(t *testing.T) {
	e := newEnvironment(lookup(map[string]string{
		"REDIS_URL": "rediss://u:p%40@a:1/2?master_name=m&addr=b:2" +
			"&sentinel_username=v&sentinel_password=q%26",
	}))
	o := e.redis()
	got := fmt.Sprint([]any{
		o.MasterName, o.Addrs, o.DB,
		o.Username, o.Password, o.SentinelUsername, o.SentinelPassword,
	})
	if want := "[m [a:1 b:2] 2 u p@ v q&]"; got != want || e.err() != nil {
		t.Errorf("the client gets %s, want %s (%v)", got, want, e.err())
	}
	if o.TLSConfig == nil || o.TLSConfig.ServerName != "" || o.TLSConfig.InsecureSkipVerify {
		t.Errorf("TLS is %+v", o.TLSConfig)
	}
}

// productionFaults returns what is wrong with a configuration for production with this variable.
func productionFaults(name, value string) error {
	env := testEnvironment(map[string]string{
		"NODE_ENV":    "production",
		"BCRYPT_COST": "",
		"MAIL_FROM":   "auth@example.com",
	})
	env[name] = value
	e := newEnvironment(lookup(env))
	e.config()
	return e.err()
}

// TestDefaultsByEnvironment checks the default that depends on NODE_ENV and has no test elsewhere.
func TestDefaultsByEnvironment(t *testing.T) {
	for name, want := range map[string]time.Duration{
		"production":  5 * time.Second,
		"development": 0,
	} {
		env := testEnvironment(map[string]string{"NODE_ENV": name})
		if got := newEnvironment(lookup(env)).config().shutdownDelay; got != want {
			t.Errorf("SHUTDOWN_DELAY in %s is %v, want %v", name, got, want)
		}
	}
}

// TestDeadlines checks that the deadlines add up to what the documents say.
func TestDeadlines(t *testing.T) {
	longest := func(cost int) time.Duration {
		return requestTimeout + 2*hashTime(cost) + undoTimeout
	}
	if longest(bcrypt.MinCost) != longest(defaultBcryptCost) {
		t.Error("cheaper hashes than the default leave less time for the stores")
	}
	for name, sum := range map[string]struct{ got, limit time.Duration }{
		"a request":                           {longest(defaultBcryptCost), 5 * time.Second},
		"a request with the costliest hashes": {longest(maxBcryptCost), writeTimeout},
		"a silent Redis":                      {redisPoolTimeout + redisTimeout, time.Second},
		"a sentinel, then a silent Redis":     {sentinelTimeout + redisTimeout, time.Second},
		"a silent PostgreSQL":                 {postgresTimeout, 2 * time.Second},
		"a try to send, greeted after 20 s":   {20 * time.Second, mailTimeout},
		"greylisting":                         {5 * time.Minute, mailFirstPause + mailSecondPause},
		"the last try to send": {
			mailFirstPause + mailSecondPause + 3*mailTimeout, mailMaxAge,
		},
		"a mail on its way": {mailMaxAge + mailTimeout, resetLifetime},
	} {
		if sum.got >= sum.limit {
			t.Errorf("%s takes up to %v, want less than %v", name, sum.got, sum.limit)
		}
	}
}

// TestDialTime checks that each of several hosts gets its share of the time, but what the URL says
// counts more.
func TestDialTime(t *testing.T) {
	for url, want := range map[string]time.Duration{
		"postgres://h/d":                           postgresTimeout,
		"postgres://h/d?sslmode=disable":           postgresTimeout,
		"postgres://h1,h2/d":                       postgresTimeout / 2,
		"postgres://h:1,h:2,h:3/d?sslmode=disable": postgresTimeout / 3,
		"postgres://h1,h2/d?connect_timeout=5":     5 * time.Second,
	} {
		env := testEnvironment(map[string]string{"DATABASE_URL": url})
		if got := newEnvironment(lookup(env)).database().ConnConfig.ConnectTimeout; got != want {
			t.Errorf("%s: one host has %v, want %v", url, got, want)
		}
	}
}

// Subcommands and the start

func TestSubcommands(t *testing.T) {
	version, err := runCommand(t, nil, "version")
	if err != nil || !strings.HasPrefix(version, "latchkey ") {
		t.Errorf("version: %q, %v", version, err)
	}
	for _, args := range [][]string{{"help"}, {"serve", "now"}, {"migrate", "down"}, {"-h"}} {
		var stderr strings.Builder
		err := run(t.Context(), args, lookup(nil), io.Discard, &stderr)
		if err == nil || !strings.Contains(stderr.String(), "usage") {
			t.Errorf("%q: %v, %q", args, err, stderr.String())
		}
	}
}

func TestHealthcheckCommand(t *testing.T) {
	p := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": p.url})
	s.expects = 503
	check := func(when string, healthy bool) {
		t.Helper()
		_, err := runCommand(t, map[string]string{"PORT": portOf(s.url)}, "healthcheck")
		if (err == nil) != healthy {
			t.Errorf("healthcheck %s: %v", when, err)
		}
	}
	check("with all there is", true)
	p.Cut()
	check("without Redis", false)
	_ = s.stop()
	check("without a server", false)
}

func TestStartFails(t *testing.T) {
	taken := portOf(start(t, nil).url)
	for name, value := range map[string]string{"PORT": taken, "METRICS_ADDR": ":" + taken} {
		_, err := runCommand(t, map[string]string{name: value})
		if err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s=%s: %v", name, value, err)
		}
	}
}
