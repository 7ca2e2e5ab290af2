package main

// main_test.go has the harness of the end-to-end tests, and those of what main.go promises: configuration,
// subcommands, limits, outages, shutdown. Every test talks HTTP to a server that the same run as in production
// serves, on the PostgreSQL and the Redis of DATABASE_URL and REDIS_URL.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"
)

// ---- the two stores

// testDatabase is this run's own; it is made when the first test asks for it.
var testDatabase = "latchkey_test_" + strings.ToLower(rand.Text())

func TestMain(m *testing.M) {
	if os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == "" {
		fmt.Fprintln(os.Stderr, "the tests need a PostgreSQL and a Redis: run `make test`, which starts both,\n"+
			"or set DATABASE_URL (of a user that may create databases) and REDIS_URL")
		os.Exit(1)
	}
	code := m.Run()
	if err := onServer("DROP DATABASE IF EXISTS " + testDatabase + " WITH (FORCE)"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// onServer executes SQL in the database of DATABASE_URL.
func onServer(sql string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %v", err)
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

// sharedDatabase returns the URL of the database that all tests use which do not need one of their own.
var sharedDatabase = sync.OnceValues(func() (string, error) {
	return databaseURL(testDatabase), onServer("CREATE DATABASE " + testDatabase)
})

// newDatabase makes an empty database for one test and returns its URL.
func newDatabase(t testing.TB) string {
	t.Helper()
	name := "latchkey_test_" + strings.ToLower(rand.Text())
	if err := onServer("CREATE DATABASE " + name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := onServer("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	return databaseURL(name)
}

// databaseURL is DATABASE_URL with another database.
func databaseURL(name string) string {
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		panic("DATABASE_URL is no URL") // the error would print it, with its password
	}
	u.Path = "/" + name
	return u.String()
}

// execSQL executes statements, for what happens behind the server's back.
func execSQL(t testing.TB, database, sql string, args ...any) {
	t.Helper()
	conn := connect(t, database)
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// queryText returns the one value that the query yields, as text.
func queryText(t testing.TB, database, sql string, args ...any) (value string) {
	t.Helper()
	conn := connect(t, database)
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

func connect(t testing.TB, database string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// redisClient returns a client for what happens behind the server's back. Tests touch only keys of their own
// sessions, accounts and addresses: this Redis may be in use by others.
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

// ---- the server

// testSecrets are what all servers of this run sign with, so that two of them are two replicas.
var testSecrets = map[string]string{"JWT_SECRET": rand.Text() + rand.Text(), "JWT_REFRESH_SECRET": rand.Text() + rand.Text()}

// defaults is the environment of a test server.
func defaults(t testing.TB) map[string]string {
	t.Helper()
	database, err := sharedDatabase()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		"NODE_ENV": "development", "PORT": "0", "DATABASE_URL": database, "DB_POOL_SIZE": "10",
		"REDIS_URL": os.Getenv("REDIS_URL"), "FRONTEND_URL": "http://localhost:5173",
		"JWT_SECRET": testSecrets["JWT_SECRET"], "JWT_REFRESH_SECRET": testSecrets["JWT_REFRESH_SECRET"],
		"BCRYPT_COST": "4", "RATE_LIMIT_MAX": "0", "TRUSTED_PROXIES": "127.0.0.0/8", "SHUTDOWN_TIMEOUT": "500ms",
	}
}

// command runs a subcommand, or the server with none, in the default environment changed by env.
func command(t testing.TB, ctx context.Context, env map[string]string, stdout io.Writer, args ...string) error {
	t.Helper()
	all := defaults(t)
	for name, value := range env {
		all[name] = value
	}
	return run(ctx, args, func(name string) string { return all[name] }, stdout, io.Discard)
}

// server is one under test.
type server struct {
	t        testing.TB
	url      string
	database string
	http     *http.Client
	log      *logLines
	cancel   context.CancelFunc // what SIGTERM does
	wait     func() error       // for run to return

	mu       sync.Mutex
	secrets  map[string]bool // what must not be in the log
	expected []string        // statuses from 500 on that may be
}

// start runs a server until the test ends, and then checks that it stopped well and what it logged.
func start(t testing.TB, env map[string]string) *server {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &server{t: t, cancel: cancel, log: &logLines{more: make(chan struct{})}, secrets: map[string]bool{}}
	done := make(chan error, 1)
	go func() { done <- command(t, ctx, env, s.log) }()
	s.wait = sync.OnceValue(func() error {
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return fmt.Errorf("run has not returned")
		}
	})
	transport := &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true}
	s.http = &http.Client{Transport: transport, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := s.wait(); err != nil {
			t.Errorf("run returned %v", err)
		}
		s.checkLog()
	})

	all := defaults(t)
	for name, value := range env {
		all[name] = value
	}
	s.database = all["DATABASE_URL"]
	for _, name := range []string{"JWT_SECRET", "JWT_REFRESH_SECRET", "JWT_SECRET_PREVIOUS", "JWT_REFRESH_SECRET_PREVIOUS"} {
		s.keepSecret(all[name])
	}
	for _, name := range []string{"DATABASE_URL", "REDIS_URL"} {
		if u, err := url.Parse(all[name]); err == nil {
			password, _ := u.User.Password()
			s.keepSecret(password)
		}
	}
	listening := s.log.await(t, func(line logLine) bool { return line["msg"] == "listening" })
	_, port, err := net.SplitHostPort(listening["addr"])
	if err != nil {
		t.Fatalf("no address in %v", listening)
	}
	s.url = "http://127.0.0.1:" + port
	return s
}

// keepSecret notes what must not appear in the log. Short words could be there by chance.
func (s *server) keepSecret(values ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, value := range values {
		if len(value) >= 8 {
			s.secrets[value] = true
		}
	}
}

// expect says which statuses from 500 on the test provokes.
func (s *server) expect(statuses ...string) { s.expected = append(s.expected, statuses...) }

// checkLog fails the test on an unexpected error, on a request line that lacks something, and on a secret.
func (s *server) checkLog() {
	raw := s.log.String()
	for secret := range s.secrets {
		if i := strings.Index(raw, secret); i >= 0 {
			begin, end := strings.LastIndexByte(raw[:i], '\n')+1, i+strings.IndexByte(raw[i:], '\n')
			s.t.Errorf("the log has the secret %q: %s", secret, raw[begin:end])
		}
	}
	for _, line := range s.log.all() {
		status := line["status"]
		if (line["level"] == "ERROR" || status >= "500") && !slices.Contains(s.expected, status) {
			s.t.Errorf("unexpected error in the log: %v", line)
		}
		if line["msg"] != "request" {
			continue
		}
		for _, key := range []string{"time", "level", "requestId", "method", "path", "status", "durationMs", "ip"} {
			if line[key] == "" {
				s.t.Errorf("a request line without %s: %v", key, line)
			}
		}
		if _, there := line["error"]; there != (status >= "500") {
			s.t.Errorf("a cause is for a status from 500 on, and always: %v", line)
		}
	}
}

// logLines takes what a server logs, a line in each Write.
type logLines struct {
	mu    sync.Mutex
	lines []string
	more  chan struct{} // closed when a line is added
}

type logLine map[string]string

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	close(l.more)
	l.more = make(chan struct{})
	return len(p), nil
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "")
}

func (l *logLines) all() (parsed []logLine) {
	for line := range strings.Lines(l.String()) {
		parsed = append(parsed, parseLogLine(strings.TrimSuffix(line, "\n")))
	}
	return parsed
}

// await returns the first line that matches, as soon as it is there.
func (l *logLines) await(t testing.TB, match func(logLine) bool) logLine {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		more := l.more
		l.mu.Unlock()
		if all := l.all(); slices.ContainsFunc(all, match) {
			return all[slices.IndexFunc(all, match)]
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("no such line in the log:\n%s", l)
		}
	}
}

// parseLogLine reads a line of slog's JSON or text handler.
func parseLogLine(line string) logLine {
	parsed := logLine{}
	if strings.HasPrefix(line, "{") {
		var members map[string]any
		if err := json.Unmarshal([]byte(line), &members); err != nil {
			return logLine{"level": "ERROR", "msg": "no JSON: " + line}
		}
		for name, value := range members {
			parsed[name] = fmt.Sprint(value)
		}
		return parsed
	}
	for line != "" {
		name, rest, _ := strings.Cut(line, "=")
		if quoted, err := strconv.QuotedPrefix(rest); err == nil {
			parsed[name], _ = strconv.Unquote(quoted)
			line = strings.TrimPrefix(rest[len(quoted):], " ")
		} else {
			parsed[name], line, _ = strings.Cut(rest, " ")
		}
	}
	return parsed
}

// ---- the client

// client is a user at a browser of their own, with an address of their own, and the tokens they have.
type client struct {
	t               testing.TB
	s               *server
	ip              string // as a trusted proxy reports it
	email, password string
	access          string // the last access token; "" sends none
	cookie          string // the refresh token; "" sends none
}

// newClient returns a user who has not signed up yet.
func newClient(s *server) *client {
	return &client{t: s.t, s: s, ip: randomIP(), email: strings.ToLower(rand.Text()) + "@example.test", password: "pw " + rand.Text()}
}

// signedUp returns a user with an account and a session.
func signedUp(s *server) *client {
	c := newClient(s)
	want(c.t, c.signup(), 201, "")
	return c
}

func randomIP() string {
	return fmt.Sprintf("10.%d.%d.%d", mathrand.IntN(256), mathrand.IntN(256), mathrand.IntN(256))
}

// tab is another tab of the same browser: the same tokens, until one of the two gets others.
func (c *client) tab() *client {
	d := *c
	return &d
}

// at is tab, at another server.
func (c *client) at(s *server) *client {
	d := c.tab()
	d.s = s
	return d
}

// device is the same user at another device, not logged in.
func (c *client) device() *client {
	d := c.tab()
	d.ip, d.access, d.cookie = randomIP(), "", ""
	return d
}

// bearing is tab with another access token, or none.
func (c *client) bearing(access string) *client {
	d := c.tab()
	d.access = access
	return d
}

// holding is tab with another refresh token, or none.
func (c *client) holding(cookie string) *client {
	d := c.tab()
	d.cookie = cookie
	return d
}

func (c *client) credentials() map[string]any {
	return map[string]any{"email": c.email, "password": c.password}
}

func (c *client) signup() response  { return c.do("POST", "/auth/signup", c.credentials()) }
func (c *client) login() response   { return c.do("POST", "/auth/login", c.credentials()) }
func (c *client) refresh() response { return c.do("POST", "/auth/refresh", nil) }
func (c *client) logout() response  { return c.do("POST", "/auth/logout", nil) }
func (c *client) me() response      { return c.do("GET", "/auth/me", nil) }

// response is an answer, read to its end.
type response struct {
	status int
	header http.Header
	raw    string
	body   map[string]any // nil where it is no JSON object
	took   time.Duration
}

func (r response) code() string {
	code, _ := r.body["code"].(string)
	return code
}

// text returns a string member of the body by its path.
func (r response) text(path ...string) string {
	var value any = r.body
	for _, name := range path {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	s, _ := value.(string)
	return s
}

// cleared reports whether the answer removes the refresh cookie.
func (r response) cleared() bool {
	return strings.HasPrefix(r.header.Get("Set-Cookie"), "refreshToken=; ") && strings.Contains(r.header.Get("Set-Cookie"), "Max-Age=0")
}

// chunked is a body that is sent without a declared length.
type chunked string

// do sends a request with the tokens the client has, keeps those it gets, and holds the answer to what the
// contract says of all answers. body is nil, raw text, chunked text, or what is to be encoded as JSON; headers are
// names and values in turn, and replace those sent by default. It may be called from any goroutine.
func (c *client) do(method, path string, body any, headers ...string) response {
	c.t.Helper()
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(body)
	case chunked:
		reader = io.MultiReader(strings.NewReader(string(body))) // a type whose length net/http does not know
	default:
		encoded, err := json.Marshal(body)
		if err != nil {
			c.t.Error(err)
			return response{}
		}
		reader = bytes.NewReader(encoded)
		if members, ok := body.(map[string]any); ok {
			for _, member := range members {
				if s, ok := member.(string); ok {
					c.s.keepSecret(s)
				}
			}
		}
	}
	req, err := http.NewRequest(method, c.s.url+path, reader)
	if err != nil {
		c.t.Error(err)
		return response{}
	}
	req.Header.Set("X-Forwarded-For", c.ip)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.access != "" {
		req.Header.Set("Authorization", "Bearer "+c.access)
	}
	if c.cookie != "" {
		req.Header.Set("Cookie", "refreshToken="+c.cookie)
	}
	for i := 0; i < len(headers); i += 2 {
		if req.Header.Set(headers[i], headers[i+1]); headers[i] == "Host" {
			req.Host = headers[i+1]
		}
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
	r := response{status: resp.StatusCode, header: resp.Header, raw: string(raw), took: time.Since(sent)}
	_ = json.Unmarshal(raw, &r.body)
	c.keep(r)
	if fault := r.fault(req); fault != "" {
		c.t.Errorf("%s %s: %s\n%d %v\n%s", method, path, fault, r.status, r.header, r.raw)
	}
	return r
}

// keep takes over the tokens of an answer, as a browser and its page would.
func (c *client) keep(r response) {
	if token := r.text("accessToken"); token != "" {
		c.access = token
	}
	for _, cookie := range (&http.Response{Header: r.header}).Cookies() {
		if c.cookie = cookie.Value; cookie.MaxAge < 0 {
			c.cookie = ""
		}
	}
	c.s.keepSecret(c.access, c.cookie)
}

// fault returns what of the rules for every answer this one breaks.
func (r response) fault(req *http.Request) string {
	id := r.header.Get("X-Request-Id")
	switch {
	case !uuidPattern.MatchString(id):
		return "no request id"
	case r.header.Get("X-Content-Type-Options") != "nosniff", r.header.Get("Cache-Control") != "no-store":
		return "may be sniffed or stored"
	case !slices.Contains(r.header.Values("Vary"), "Origin"):
		return "no Vary: Origin"
	case len(r.header.Values("Set-Cookie")) > 1:
		return "more than one cookie"
	case (r.status == 429 || r.status == 503) && (r.header.Get("Retry-After") == "" || r.header.Get("Set-Cookie") != ""):
		return "a 429 or 503 says when to come back, and leaves the cookie alone"
	case req.Method == "HEAD" || r.status == 204 || req.URL.Path == "/readyz":
		return ""
	case r.header.Get("Content-Type") != "application/json; charset=utf-8" || r.body == nil:
		return "not JSON"
	case (r.status == 401) != (r.header.Get("WWW-Authenticate") != ""):
		return "a challenge is for 401, and always"
	case r.status < 400:
		return ""
	}
	at, err := time.Parse(time.RFC3339, r.text("timestamp"))
	switch {
	case r.text("error") == "" || r.code() == "" || r.body["statusCode"] != float64(r.status) || r.text("requestId") != id:
		return "not the error format"
	case err != nil || at.Location() != time.UTC || time.Since(at).Abs() > time.Minute:
		return "timestamp is not now in UTC"
	case (r.body["details"] != nil) != (r.code() == "validation_failed"):
		return "details are for validation_failed, and always"
	case r.code() == "validation_failed" && len(r.body) == 6, len(r.body) == 5:
		return ""
	}
	return "unknown members in the error"
}

var uuidPattern = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// want ends the test unless the answer has that status and, if it is an error, that code.
func want(t testing.TB, r response, status int, code string) {
	t.Helper()
	if r.status != status || r.code() != code {
		t.Fatalf("got %d %q, want %d %q\n%s", r.status, r.code(), status, code, r.raw)
	}
}

// together calls f n times, all from one barrier, and returns what they returned.
func together[T any](n int, f func(i int) T) []T {
	results, barrier := make([]T, n), make(chan struct{})
	var ready, done sync.WaitGroup
	ready.Add(n)
	for i := range n {
		done.Go(func() {
			ready.Done()
			<-barrier
			results[i] = f(i)
		})
	}
	ready.Wait()
	close(barrier)
	done.Wait()
	return results
}

// tally counts the answers by status and code: "200", "401 refresh_reused".
func tally(responses []response) map[string]int {
	counts := map[string]int{}
	for _, r := range responses {
		counts[strings.TrimSpace(fmt.Sprintf("%d %s", r.status, r.code()))]++
	}
	return counts
}

// eventually waits until ok, which something that takes its time will bring about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// ---- the fault

// proxy stands between a server and a store, on a real connection, and breaks it.
type proxy struct {
	network, target string
	listener        net.Listener

	mu    sync.Mutex
	cut   bool
	open  chan struct{} // closed while bytes pass
	conns map[net.Conn]bool
}

func newProxy(t testing.TB, network, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{network: network, target: target, listener: listener, open: make(chan struct{}), conns: map[net.Conn]bool{}}
	close(p.open)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
	t.Cleanup(func() {
		p.Cut()
		listener.Close()
	})
	return p
}

// postgresProxy returns a proxy before PostgreSQL and the URL of the shared database through it.
func postgresProxy(t testing.TB) (*proxy, string) {
	t.Helper()
	database, err := sharedDatabase()
	if err != nil {
		t.Fatal(err)
	}
	config, err := pgconn.ParseConfig(database)
	if err != nil {
		t.Fatal("DATABASE_URL cannot be read")
	}
	network, target := pgconn.NetworkAddress(config.Host, config.Port)
	p := newProxy(t, network, target)
	u, _ := url.Parse(database)
	u.Host = p.listener.Addr().String()
	q := u.Query()
	q.Del("host")
	q.Del("port")
	u.RawQuery = q.Encode()
	return p, u.String()
}

// redisProxy returns a proxy before Redis and the URL of it.
func redisProxy(t testing.TB) (*proxy, string) {
	t.Helper()
	options := redisClient(t).Options()
	p := newProxy(t, options.Network, options.Addr)
	u, _ := url.Parse(os.Getenv("REDIS_URL"))
	u.Host = p.listener.Addr().String()
	return p, u.String()
}

func (p *proxy) serve(client net.Conn) {
	store, err := net.Dial(p.network, p.target)
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
	p.conns[client], p.conns[store] = true, true
	go p.pass(client, store)
	go p.pass(store, client)
}

// pass copies bytes, while they may pass, until one side is closed.
func (p *proxy) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		open := p.open
		p.mu.Unlock()
		<-open
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// Cut breaks all connections and refuses new ones: the store's process is gone.
func (p *proxy) Cut() {
	p.Restore() // nothing waits in a broken connection
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = true
	for conn := range p.conns {
		conn.Close()
	}
	clear(p.conns)
}

// Pause lets connections be made, but nothing through: the store hangs.
func (p *proxy) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = make(chan struct{})
}

// Restore ends what Cut or Pause began.
func (p *proxy) Restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = false
	select {
	case <-p.open:
	default:
		close(p.open)
	}
}

// ---- the whole flow, once

func TestFlow(t *testing.T) {
	s := start(t, nil)
	c := newClient(s)
	r := c.signup()
	want(t, r, 201, "")
	if r.text("message") != "User created successfully" || r.text("user", "email") != c.email || !uuidPattern.MatchString(r.text("user", "id")) {
		t.Errorf("signup: %s", r.raw)
	}
	want(t, c.me(), 200, "")
	want(t, c.refresh(), 200, "")
	want(t, c.logout(), 200, "")
	want(t, c.me(), 401, "session_revoked")
}

// dial opens a connection for what net/http's client would not send.
func dial(t testing.TB, s *server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func readResponse(t testing.TB, conn net.Conn) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp
}
