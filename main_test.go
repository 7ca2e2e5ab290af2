package main

// main_test.go has the harness of the end-to-end tests, and those of what main.go promises: configuration,
// subcommands, limits, outages, shutdown. Every test talks HTTP to a server that the same run as in production
// serves, on the PostgreSQL and the Redis of DATABASE_URL and REDIS_URL.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"runtime"
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
func newDatabase(t testing.TB, options ...string) string {
	t.Helper()
	name := "latchkey_test_" + strings.ToLower(rand.Text())
	if err := onServer("CREATE DATABASE " + name + " " + strings.Join(options, " ")); err != nil {
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

// startError returns the error that keeps a server from starting, nil where nothing does.
func startError(t testing.TB, env map[string]string, args ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return command(t, ctx, env, io.Discard, args...)
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
	listening := s.log.await(t, listeningFor("PORT"))
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
	s.mu.Lock()
	defer s.mu.Unlock()
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
	timeout := time.After(2 * time.Minute)
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

// listeningFor matches the line that says where the server listens.
func listeningFor(variable string) func(logLine) bool {
	return func(line logLine) bool { return line["msg"] == "listening" && line["for"] == variable }
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

// dial opens a connection for what net/http's client would not send.
func dial(t testing.TB, s *server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second)) // half of what the server waits for a slow client
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

// ---- configuration

// production is a configuration without a fault.
var production = map[string]string{"NODE_ENV": "production", "PORT": "3000", "BCRYPT_COST": "", "RATE_LIMIT_MAX": "", "TRUSTED_PROXIES": "",
	"FRONTEND_URL": "https://app.example.com", "SHUTDOWN_TIMEOUT": ""}

// configure returns what the configuration has against it: "" if nothing, else one line for each fault.
func configure(t testing.TB, env map[string]string) string {
	t.Helper()
	all := maps.Clone(production)
	maps.Copy(all, env)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // a server that has nothing against it gets no further than this
	err := command(t, ctx, all, io.Discard)
	if err == nil {
		t.Fatal("run served")
	}
	if strings.Contains(err.Error(), "canceled") {
		return ""
	}
	return err.Error()
}

func TestEveryFaultAtOnce(t *testing.T) {
	env := map[string]string{
		"NODE_ENV": "prod", "PORT": "http", "DATABASE_URL": "mysql://root:hunter2hunter2@db/auth", "DB_POOL_SIZE": "none", "FRONTEND_URL": "*",
		"REDIS_URL": "http://:hunter3hunter3@redis", "JWT_SECRET": "a short secret", "JWT_REFRESH_SECRET": "another short secret",
		"JWT_SECRET_PREVIOUS": "an old short secret", "JWT_REFRESH_SECRET_PREVIOUS": "an older short secret",
		"RATE_LIMIT_WINDOW": "0", "RATE_LIMIT_MAX": "-1", "LOGIN_LIMIT_WINDOW": "1h", "LOGIN_LIMIT_MAX": "1e3",
		"ACCESS_TOKEN_TTL": "15", "REFRESH_TOKEN_TTL": "-1h", "SESSION_MAX_TTL": "ever", "REFRESH_REUSE_LEEWAY": "-1s", "REFRESH_REUSE_POLICY": "maybe",
		"COOKIE_SAMESITE": "maybe", "TRUSTED_PROXIES": "10.0.0.1", "BCRYPT_COST": "11", "METRICS_ADDR": "9090", "LOG_LEVEL": "loud", "SHUTDOWN_TIMEOUT": "soon",
	}
	faults := configure(t, env)
	lines := strings.Split(faults, "\n")
	for name, value := range env {
		if n := len(regexp.MustCompile(`(?m)^`+name+`\b`).FindAllString(faults, -1)); n != 1 {
			t.Errorf("%d lines for %s", n, name)
		}
		if len(value) >= 8 && strings.Contains(faults, value) {
			t.Errorf("the value of %s is shown", name)
		}
	}
	if len(lines) != len(env) || strings.Contains(faults, "hunter") {
		t.Errorf("%d lines for %d faults:\n%s", len(lines), len(env), faults)
	}
}

func TestRequiredVariables(t *testing.T) {
	required := []string{"DATABASE_URL", "DB_POOL_SIZE", "FRONTEND_URL", "JWT_REFRESH_SECRET", "JWT_SECRET", "PORT", "REDIS_URL"}
	env := map[string]string{}
	for _, name := range required {
		env[name] = ""
	}
	for _, name := range []string{"", "production", "staging"} {
		env["NODE_ENV"] = name
		var missing []string
		for line := range strings.Lines(configure(t, env)) {
			name, _, _ := strings.Cut(line, ":")
			missing = append(missing, name)
		}
		if slices.Sort(missing); !slices.Equal(missing, required) {
			t.Errorf("NODE_ENV=%s: required are %v, want %v", name, missing, required)
		}
	}
	env["NODE_ENV"] = "development"
	if faults := configure(t, env); faults != "" {
		t.Errorf("development requires something: %s", faults)
	}
}

func TestEachVariable(t *testing.T) {
	long := strings.Repeat("s", 32)
	for name, values := range map[string]struct{ good, bad []string }{
		"NODE_ENV":                    {[]string{"", "staging", "development"}, []string{"test", "Production"}},
		"PORT":                        {[]string{"0", "65535"}, []string{"65536", "-1", "3000x", ":3000"}},
		"DATABASE_URL":                {[]string{"postgres://u:p@h/d", "postgresql://h1:5432,h2:5433/d?target_session_attrs=read-write"}, []string{"host=localhost", "mysql://h/d", "h", "postgres://h:x/d", "postgres_x=1 host=h", "postgres://u:1/a-password-with-a-slash-in-it@h/d"}},
		"DB_POOL_SIZE":                {[]string{"1", "50"}, []string{"0", "-1", "many"}},
		"FRONTEND_URL":                {[]string{"http://localhost:5173", "https://a.example/, http://b.example:8080"}, []string{"*", "null", "a.example", "ftp://a.example", "https://a.example/path", "https://a.example,*", "https://*.example", "https://a.example?x", "https://u:p@a.example", ",", ",https://a.example", "https://a.example:", "https://exämple.com"}},
		"REDIS_URL":                   {[]string{"redis://h:1", "rediss://u:p@h:1/2", "redis://h:1?addr=h:2&addr=h:3"}, []string{"http://h", "h:6379", "redis://h:1/x"}},
		"JWT_SECRET":                  {[]string{long, strings.Repeat("é", 32)}, []string{long[1:], strings.Repeat("é", 31), testSecrets["JWT_REFRESH_SECRET"]}},
		"JWT_REFRESH_SECRET":          {[]string{long}, []string{long[1:], testSecrets["JWT_SECRET"]}},
		"JWT_SECRET_PREVIOUS":         {[]string{"", long}, []string{long[1:], testSecrets["JWT_SECRET"], testSecrets["JWT_REFRESH_SECRET"]}},
		"JWT_REFRESH_SECRET_PREVIOUS": {[]string{"", long}, []string{long[1:], testSecrets["JWT_SECRET"], testSecrets["JWT_REFRESH_SECRET"]}},
		"RATE_LIMIT_WINDOW":           {[]string{"1"}, []string{"0", "-1", "60s", "1.5"}},
		"RATE_LIMIT_MAX":              {[]string{"0", "1"}, []string{"-1", "ten"}},
		"LOGIN_LIMIT_WINDOW":          {[]string{"1"}, []string{"0", "15m"}},
		"LOGIN_LIMIT_MAX":             {[]string{"0", "1"}, []string{"-1"}},
		"ACCESS_TOKEN_TTL":            {[]string{"1s", "1h30m"}, []string{"0s", "-1m", "15", "1 h"}},
		"REFRESH_TOKEN_TTL":           {[]string{"1s", "8760h"}, []string{"0s", "7d"}},
		"SESSION_MAX_TTL":             {[]string{"1s", "8760h"}, []string{"0s", "30d"}},
		"REFRESH_REUSE_LEEWAY":        {[]string{"0s", "1m"}, []string{"-1s", "10"}},
		"REFRESH_REUSE_POLICY":        {[]string{"", "refuse", "resend"}, []string{"accept"}},
		"COOKIE_SAMESITE":             {[]string{"", "strict", "lax", "none"}, []string{"no"}},
		"TRUSTED_PROXIES":             {[]string{"10.0.0.0/8, fd00::/8", "127.0.0.1/32"}, []string{"10.0.0.1", "10.0.0.0/33", "proxy", "10.0.0.0/8,x"}},
		"BCRYPT_COST":                 {[]string{"12", "16"}, []string{"11", "17", "x"}},
		"METRICS_ADDR":                {[]string{":9090", "127.0.0.1:0", "[::1]:9090"}, []string{"9090", "host", ":99999", "localhost:x"}},
		"LOG_LEVEL":                   {[]string{"debug", "info", "warn", "error"}, []string{"loud"}},
		"SHUTDOWN_TIMEOUT":            {[]string{"1s", "1m"}, []string{"-1s", "10"}},
	} {
		for _, value := range values.good {
			if faults := configure(t, map[string]string{name: value}); faults != "" {
				t.Errorf("%s=%q: %s", name, value, faults)
			}
		}
		for _, value := range values.bad {
			faults := configure(t, map[string]string{name: value})
			if !regexp.MustCompile(`(?m)^(JWT\w+|`+name+`)\b`).MatchString(faults) || strings.Contains(faults, "\n") {
				t.Errorf("%s=%q: %s", name, value, faults)
			}
			if len(value) >= 31 && strings.Contains(faults, value) {
				t.Errorf("%s: the secret is shown", name)
			}
		}
	}
	for cost, ok := range map[string]bool{"3": false, "4": true} {
		if faults := configure(t, map[string]string{"NODE_ENV": "development", "BCRYPT_COST": cost}); (faults == "") != ok {
			t.Errorf("BCRYPT_COST=%s in development: %q", cost, faults)
		}
	}
	if faults := configure(t, map[string]string{"NODE_ENV": "development", "COOKIE_SAMESITE": "none"}); !strings.HasPrefix(faults, "COOKIE_SAMESITE") {
		t.Errorf("SameSite=None without Secure: %q", faults)
	}
}

// ---- subcommands and the start

func TestSubcommands(t *testing.T) {
	var stdout strings.Builder
	if err := command(t, t.Context(), nil, &stdout, "version"); err != nil || !strings.HasPrefix(stdout.String(), "latchkey ") {
		t.Errorf("version: %q, %v", stdout.String(), err)
	}
	for _, args := range [][]string{{"help"}, {"serve", "now"}, {"migrate", "down"}, {"-h"}} {
		var stderr strings.Builder
		if err := run(t.Context(), args, func(string) string { return "" }, io.Discard, &stderr); err == nil || !strings.Contains(stderr.String(), "usage") {
			t.Errorf("%q: %v, %q", args, err, stderr.String())
		}
	}
}

func TestHealthcheckCommand(t *testing.T) {
	proxy, redisURL := redisProxy(t)
	s := start(t, map[string]string{"REDIS_URL": redisURL})
	s.expect("503")
	healthcheck := func() error {
		_, port, _ := net.SplitHostPort(strings.TrimPrefix(s.url, "http://"))
		return command(t, t.Context(), map[string]string{"PORT": port, "JWT_SECRET": ""}, io.Discard, "healthcheck")
	}
	if err := healthcheck(); err != nil {
		t.Error(err)
	}
	proxy.Cut()
	if err := healthcheck(); err == nil {
		t.Error("healthy without Redis")
	}
	s.cancel()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if err := healthcheck(); err == nil {
		t.Error("healthy without a server")
	}
}

func TestStartFails(t *testing.T) {
	s := start(t, nil)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(s.url, "http://"))
	for name, value := range map[string]string{"PORT": port, "DATABASE_URL": "postgres://u:hunter2hunter2@127.0.0.1:1/d"} {
		err := startError(t, map[string]string{name: value})
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s=%s: %v", name, value, err)
		}
	}
}

func TestShutdown(t *testing.T) {
	s := start(t, map[string]string{"SHUTDOWN_TIMEOUT": "10s"})
	s.expect("503")
	c := signedUp(s)
	body := fmt.Sprintf(`{"email":%q,"password":%q}`, c.email, c.password)
	half := func() net.Conn { // a login that has begun
		conn := dial(t, s)
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		fmt.Fprintf(conn, "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:9])
		return conn
	}
	logins := []net.Conn{half(), half(), half(), half()}
	s.cancel()
	eventually(t, "readyz says so", func() bool {
		r := c.do("GET", "/readyz", nil)
		return r.status == 503 && r.text("status") == "unavailable"
	})
	logins = append(logins, half()) // whoever has not seen it yet is served
	want(t, c.refresh(), 200, "")
	eventually(t, "the listener closes", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	for _, conn := range logins {
		fmt.Fprint(conn, body[9:])
		if resp := readResponse(t, conn); resp.StatusCode != 200 {
			t.Errorf("a login in flight: %s", resp.Status)
		}
	}
	if err := s.wait(); err != nil {
		t.Error(err)
	}
}

// A client that never ends its request does not keep the process.
func TestShutdownTimeout(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	log := &logLines{more: make(chan struct{})}
	done := make(chan error, 1)
	go func() { done <- command(t, ctx, nil, log) }()
	listening := log.await(t, listeningFor("PORT"))
	_, port, _ := net.SplitHostPort(listening["addr"])
	fmt.Fprint(dial(t, &server{url: "127.0.0.1:" + port}), "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a request was cut off, and run says nothing")
		}
	case <-time.After(5 * time.Second):
		t.Error("SHUTDOWN_TIMEOUT is 500 ms, and run goes on")
	}
}

// Without secrets, development makes its own: they end with the process, and nobody learns them.
func TestDevelopmentSecrets(t *testing.T) {
	none := map[string]string{"JWT_SECRET": "", "JWT_REFRESH_SECRET": ""}
	s, other := start(t, none), start(t, none)
	s.log.await(t, func(line logLine) bool { return line["level"] == "WARN" && strings.Contains(line["msg"], "JWT_SECRET") })
	c := signedUp(s)
	want(t, c.refresh(), 200, "")
	want(t, c.at(other).me(), 401, "invalid_token")
	want(t, c.at(start(t, nil)).me(), 401, "invalid_token")
}

// ---- limits

var ratePattern = regexp.MustCompile(`^"ip";r=([0-9]+);t=([0-9]+)$`)

func TestRateLimitIsExact(t *testing.T) {
	const limit, requests = 100, 300
	servers := replicas(t, map[string]string{"RATE_LIMIT_MAX": fmt.Sprint(limit)})
	expectUnjudged(servers)
	racers := tabs(newClient(servers[0]), requests, servers)
	paths := []string{"/auth/me", "/nothing", "/auth/login", "//"}
	var left []int
	unjudged := 0
	for _, r := range together(requests, func(i int) response { return racers[i].do("GET", paths[i/2%4], nil) }) {
		if r.status == 503 {
			unjudged++
			continue
		}
		rate := ratePattern.FindStringSubmatch(r.header.Get("RateLimit"))
		if rate == nil || r.header.Get("RateLimit-Policy") != `"ip";q=100;w=60` {
			t.Fatalf("headers %v", r.header)
		}
		n, _ := strconv.Atoi(rate[1])
		wait, _ := strconv.Atoi(rate[2])
		if wait < 1 || wait > 60 {
			t.Errorf("%d seconds of 60 are left", wait)
		}
		if r.status != 429 {
			left = append(left, n)
		} else if n != 0 || r.code() != "rate_limited" || r.header.Get("Retry-After") != rate[2] {
			t.Errorf("a 429 says %v", r.header)
		}
	}
	slices.Sort(left)
	if n := len(left); n > limit || n+unjudged < limit || unjudged > limit/2 || len(slices.Compact(slices.Clone(left))) != n {
		t.Errorf("%d of %d passed, %d are unjudged, left: %v", n, requests, unjudged, left)
	}
}

// expectUnjudged lets Redis take too long for some of hundreds of simultaneous requests, on a machine that is busy
// with other things: 503. Such a one may have been counted or not.
func expectUnjudged(servers []*server) {
	for _, s := range servers {
		s.expect("503")
	}
}

func TestRateLimit(t *testing.T) {
	s := start(t, map[string]string{"RATE_LIMIT_MAX": "3", "RATE_LIMIT_WINDOW": "2"})
	t.Run("another address has its own", func(t *testing.T) {
		c := newClient(s)
		exhaust(t, c)
		want(t, newClient(s).me(), 401, "missing_token")
		s.log.await(t, func(line logLine) bool { // what was refused is on record, although it never got there
			return line["ip"] == c.ip && line["status"] == "429" && line["route"] == "GET /auth/me"
		})
	})
	t.Run("the window ends", func(t *testing.T) {
		c := newClient(s)
		exhaust(t, c)
		r := c.me()
		if after := r.header.Get("Retry-After"); after != "1" && after != "2" {
			t.Errorf("Retry-After: %s", after)
		}
		eventually(t, "the next window", func() bool { return c.me().status == 401 })
	})
	t.Run("health and preflights are exempt", func(t *testing.T) {
		c := newClient(s)
		exhaust(t, c)
		preflight := []string{"Origin", "http://localhost:5173", "Access-Control-Request-Method", "POST"}
		for _, r := range []response{c.do("GET", "/healthz", nil), c.do("GET", "/readyz", nil), c.do("HEAD", "/healthz", nil), c.do("OPTIONS", "/auth/login", nil, preflight...)} {
			if r.status >= 300 || r.header["Ratelimit"] != nil || r.header["Ratelimit-Policy"] != nil {
				t.Errorf("%d %v", r.status, r.header)
			}
		}
	})
	t.Run("a browser may read the refusal", func(t *testing.T) {
		c := newClient(s)
		exhaust(t, c)
		r := c.do("POST", "/auth/login", nil, "Origin", "http://localhost:5173")
		if r.status != 429 || r.header.Get("Access-Control-Allow-Origin") != "http://localhost:5173" {
			t.Errorf("%d %v", r.status, r.header)
		}
	})
	t.Run("an IPv6 network of 64 bits is one client", func(t *testing.T) {
		network := fmt.Sprintf("2001:db8:%x:%x", mathrand.IntN(1<<16), mathrand.IntN(1<<16-1))
		c := newClient(s)
		c.ip = network + "::1"
		exhaust(t, c)
		c.ip = network + ":ffff:ffff:ffff:ffff"
		want(t, c.me(), 429, "rate_limited")
		c.ip = strings.Replace(network, "2001:db8", "2001:db9", 1) + "::1"
		want(t, c.me(), 401, "missing_token")
	})
	t.Run("IPv4 in IPv6 is IPv4", func(t *testing.T) {
		c := newClient(s)
		exhaust(t, c)
		c.ip = "::ffff:" + c.ip
		want(t, c.me(), 429, "rate_limited")
	})
	t.Run("0 turns it off", func(t *testing.T) {
		if r := newClient(start(t, nil)).me(); r.header["Ratelimit"] != nil {
			t.Errorf("%v", r.header)
		}
	})
}

// exhaust uses up a rate limit of 3.
func exhaust(t testing.TB, c *client) {
	t.Helper()
	for range 3 {
		want(t, c.me(), 401, "missing_token")
	}
	want(t, c.me(), 429, "rate_limited")
}

func TestClientIP(t *testing.T) {
	trusting := start(t, map[string]string{"TRUSTED_PROXIES": "127.0.0.0/8, 10.0.0.0/8,fd00::/8"})
	plain := start(t, map[string]string{"TRUSTED_PROXIES": ""})
	for _, test := range []struct {
		s         *server
		forwarded string
		want      string
	}{
		{plain, "1.2.3.4", "127.0.0.1"},
		{trusting, "1.2.3.4", "1.2.3.4"},
		{trusting, "6.6.6.6, 1.2.3.4", "1.2.3.4"},
		{trusting, "6.6.6.6, 1.2.3.4, 10.0.0.1, 10.0.0.2", "1.2.3.4"},
		{trusting, "6.6.6.6, garbage, 1.2.3.4, 10.0.0.1", "1.2.3.4"},
		{trusting, "6.6.6.6, garbage, 10.0.0.1", "10.0.0.1"},
		{trusting, "6.6.6.6, , 10.0.0.1", "10.0.0.1"},
		{trusting, "garbage", "127.0.0.1"},
		{trusting, "", "127.0.0.1"},
		{trusting, "10.0.0.1", "10.0.0.1"},
		{trusting, "::ffff:1.2.3.4", "1.2.3.4"},
		{trusting, "1.2.3.4,::ffff:10.0.0.1", "1.2.3.4"},
		{trusting, "2001:db8::1, fd00::1", "2001:db8::1"},
	} {
		c, id := newClient(test.s), newRequestID()
		c.do("GET", "/auth/me", nil, "X-Forwarded-For", test.forwarded, "X-Request-Id", id)
		line := test.s.log.await(t, func(line logLine) bool { return line["requestId"] == id })
		if line["ip"] != test.want {
			t.Errorf("X-Forwarded-For: %s: the client is %s, want %s", test.forwarded, line["ip"], test.want)
		}
	}
}

func newRequestID() string {
	var b [16]byte
	rand.Read(b[:])
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func TestLoginLimit(t *testing.T) {
	servers := replicas(t, map[string]string{"LOGIN_LIMIT_MAX": "3", "LOGIN_LIMIT_WINDOW": "600"})
	s := servers[0]
	wrong := func(c *client) *client {
		d := c.tab()
		d.password = "wrong password"
		return d
	}
	refused := func(t *testing.T, r response) {
		t.Helper()
		want(t, r, 429, "too_many_attempts")
		if after, _ := strconv.Atoi(r.header.Get("Retry-After")); after < 500 || after > 600 {
			t.Errorf("Retry-After: %s", r.header.Get("Retry-After"))
		}
	}
	fail := func(t *testing.T, c *client, times int) {
		t.Helper()
		for range times {
			want(t, wrong(c).login(), 401, "invalid_credentials")
		}
	}
	t.Run("from one address", func(t *testing.T) {
		c := signedUp(s)
		fail(t, c, 3)
		refused(t, wrong(c).login())
		refused(t, c.login()) // even with the right password
		refused(t, c.at(servers[1]).login())
		shouting := c.tab()
		shouting.email = strings.ToUpper(c.email)
		refused(t, shouting.login())
		want(t, c.device().login(), 200, "") // nobody locks the owner out
		want(t, c.refresh(), 200, "")
		refused(t, c.login()) // the owner's success elsewhere does not help the guesser
	})
	t.Run("of an account that does not exist", func(t *testing.T) {
		c := newClient(s)
		fail(t, c, 3)
		refused(t, c.login())
	})
	t.Run("from an IPv6 network", func(t *testing.T) {
		c := newClient(s)
		for _, host := range []string{"1", "2:3", "ffff"} {
			c.ip = "2001:db8:1:2::" + host
			fail(t, c, 1)
		}
		c.ip = "2001:db8:1:2::ab"
		refused(t, c.login())
	})
	t.Run("success clears the count", func(t *testing.T) {
		c := signedUp(s)
		for range 4 {
			fail(t, c, 2)
			want(t, c.login(), 200, "")
		}
		for range 5 {
			want(t, c.login(), 200, "")
		}
	})
	t.Run("from all addresses together", func(t *testing.T) {
		c := signedUp(s)
		for range 10 {
			fail(t, c.device(), 3)
		}
		refused(t, c.device().login())
		want(t, c.refresh(), 200, "")
		rdb := redisClient(t)
		sum := fmt.Sprintf("%x", sha256.Sum256([]byte(c.email)))[:32]
		if n := rdb.Get(t.Context(), "login-limit:{"+sum+"}").Val(); n != "30" {
			t.Errorf("%s failures counted: the refused one counts nowhere", n)
		}
	})
	t.Run("signup and refusals of the body count nothing", func(t *testing.T) {
		c := signedUp(s)
		for range 5 {
			want(t, wrong(c).signup(), 400, "email_exists")
			want(t, c.do("POST", "/auth/login", map[string]any{"email": c.email}), 400, "validation_failed")
		}
		want(t, c.login(), 200, "")
	})
	t.Run("deleting the account", func(t *testing.T) {
		c := signedUp(s)
		for range 3 {
			want(t, c.do("DELETE", "/auth/me", map[string]any{"password": "wrong password"}), 401, "invalid_credentials")
		}
		refused(t, c.do("DELETE", "/auth/me", map[string]any{"password": c.password}))
		refused(t, c.login())
	})
}

// However many guess at once, only as many as the limit says are compared with the password.
func TestLoginLimitIsExact(t *testing.T) {
	servers := replicas(t, nil)
	few := replicas(t, map[string]string{"LOGIN_LIMIT_MAX": "2"})
	for name, test := range map[string]struct {
		servers []*server
		compare int
		device  func(*client) *client
	}{
		"one address":    {servers, 10, (*client).tab},
		"many addresses": {few, 20, (*client).device},
	} {
		t.Run(name, func(t *testing.T) {
			expectUnjudged(test.servers)
			racers := tabs(signedUp(test.servers[0]), 200, test.servers)
			for i := range racers {
				racers[i] = test.device(racers[i])
				racers[i].password = "wrong password"
			}
			counts := tally(together(len(racers), func(i int) response { return racers[i].login() }))
			compared, refused, unjudged := counts["401 invalid_credentials"], counts["429 too_many_attempts"], counts["503 unavailable"]
			if compared > test.compare || compared+unjudged < test.compare || unjudged > len(racers)/4 || compared+refused+unjudged != len(racers) {
				t.Errorf("answers %v, want %d compared", counts, test.compare)
			}
		})
	}
}

// An attempt that the server could not judge is no failed one.
func TestLoginLimitGivesBack(t *testing.T) {
	proxy, database := postgresProxy(t)
	s := start(t, map[string]string{"DATABASE_URL": database, "LOGIN_LIMIT_MAX": "1"})
	s.expect("503")
	c := signedUp(s)
	proxy.Cut()
	for range 12 {
		want(t, c.login(), 503, "unavailable")
	}
	proxy.Restore()
	eventually(t, "the server recovers", func() bool { return c.do("GET", "/readyz", nil).status == 200 })
	want(t, c.login(), 200, "")
}

// When more passwords are to be hashed than can be, some are refused at once, and nothing else waits for the rest.
func TestHashingSaturated(t *testing.T) {
	s := start(t, map[string]string{"BCRYPT_COST": "8"})
	s.expect("503")
	c := signedUp(s)
	saturated, once := make(chan struct{}), sync.Once{}
	crowd := make(chan []response)
	go func() { // more than can wait, on any number of processors, and they come again until one is sent away
		crowd <- together(350+4*runtime.NumCPU(), func(int) (r response) {
			for {
				select {
				case <-saturated:
					return r
				default:
				}
				if r = newClient(s).login(); r.code() == "overloaded" && r.took < 1900*time.Millisecond { // sooner than a slot is waited for
					once.Do(func() { close(saturated) })
				}
			}
		})
	}()
	select {
	case <-saturated:
	case <-time.After(30 * time.Second):
		t.Error("the queue has no bound")
		once.Do(func() { close(saturated) })
	}
	for range 5 {
		want(t, c.refresh(), 200, "")
		want(t, c.do("GET", "/healthz", nil), 200, "")
	}
	answers := <-crowd
	wantOnly(t, answers, "401 invalid_credentials", "503 overloaded")
	for _, r := range answers {
		if r.status == 503 && r.header.Get("Retry-After") != "1" {
			t.Errorf("Retry-After: %s", r.header.Get("Retry-After"))
		}
	}
	want(t, newClient(s).login(), 401, "invalid_credentials")
}

// ---- paths, browsers, request ids, log, metrics

func TestPathsAndMethods(t *testing.T) {
	s := start(t, nil)
	c := signedUp(s)
	for _, path := range []string{"/", "/auth", "/auth/", "/auth/me/", "//auth/me", "/auth//me", "/auth/./me", "/auth/x/../me", "/auth/%6de", "/auth%2fme",
		"/AUTH/me", "/auth/sessions/", "/auth/sessions/a/b", "/auth/sessions/a%2fb", "/healthz/", "/metrics", "/favicon.ico"} {
		for _, method := range []string{"GET", "POST", "DELETE"} {
			r := c.do(method, path, nil)
			if r.status != 404 || r.code() != "not_found" || r.header.Get("Location") != "" {
				t.Errorf("%s %s: %d %s", method, path, r.status, r.raw)
			}
		}
	}
	for path, allow := range map[string]string{
		"/auth/signup": "POST", "/auth/login": "POST", "/auth/refresh": "POST", "/auth/logout": "POST", "/auth/me": "DELETE, GET, HEAD",
		"/auth/sessions": "DELETE, GET, HEAD", "/auth/sessions/x": "DELETE", "/auth/password": "PUT", "/healthz": "GET, HEAD", "/readyz": "GET, HEAD",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"} {
			if slices.Contains(strings.Split(allow, ", "), method) {
				continue
			}
			r := c.do(method, path, nil)
			got := strings.Split(r.header.Get("Allow"), ", ")
			if slices.Sort(got); r.status != 405 || strings.Join(got, ", ") != allow || method != "HEAD" && r.code() != "method_not_allowed" {
				t.Errorf("%s %s: %d, Allow: %s", method, path, r.status, got)
			}
		}
	}
	for path, status := range map[string]int{"/healthz": 200, "/readyz": 200, "/auth/me": 200, "/auth/sessions": 200, "/nothing": 404} {
		if r := c.do("HEAD", path, nil); r.status != status || r.raw != "" {
			t.Errorf("HEAD %s: %d %q", path, r.status, r.raw)
		}
	}
	want(t, c.do("GET", "/auth/me?x=y", nil), 200, "")
	conn := dial(t, s)
	fmt.Fprint(conn, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp := readResponse(t, conn); resp.StatusCode != 404 || resp.Header.Get("Content-Type") != "application/json; charset=utf-8" {
		t.Errorf("OPTIONS *: %s", resp.Status)
	}
}

func TestCORS(t *testing.T) {
	s := start(t, map[string]string{"FRONTEND_URL": "http://localhost:5173, https://App.example.com/"})
	c := newClient(s)
	for origin, listed := range map[string]bool{
		"http://localhost:5173": true, "https://app.example.com": true,
		"": false, "null": false, "*": false, "http://localhost:5174": false, "https://localhost:5173": false, "http://localhost": false,
		"https://app.example.com.evil.example": false, "https://evil.example/https://app.example.com": false, "https://sub.app.example.com": false,
		"https://app.example.com:444": false, "http://app.example.com": false,
	} {
		var headers []string
		if origin != "" {
			headers = []string{"Origin", origin}
		}
		r := c.do("GET", "/auth/me", nil, headers...)
		preflight := c.do("OPTIONS", "/auth/login", nil, append(headers, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "content-type")...)
		if origin != "" && (preflight.status != 204 || preflight.raw != "") {
			t.Errorf("preflight from %q: %d %s", origin, preflight.status, preflight.raw)
		}
		if origin == "" && preflight.status != 405 {
			t.Errorf("OPTIONS without Origin is no preflight: %d", preflight.status)
		}
		if !listed {
			for _, header := range []http.Header{r.header, preflight.header} {
				for name := range header {
					if strings.HasPrefix(name, "Access-Control-") {
						t.Errorf("%q gets %s", origin, name)
					}
				}
			}
			continue
		}
		for _, header := range []http.Header{r.header, preflight.header} {
			if header.Get("Access-Control-Allow-Origin") != origin || header.Get("Access-Control-Allow-Credentials") != "true" {
				t.Errorf("%q gets %v", origin, header)
			}
		}
		if got := r.header.Get("Access-Control-Expose-Headers"); got != "X-Request-Id, Retry-After, RateLimit, RateLimit-Policy" {
			t.Errorf("exposed: %s", got)
		}
		for name, words := range map[string]string{"Access-Control-Allow-Methods": "GET POST PUT DELETE", "Access-Control-Allow-Headers": "Authorization Content-Type X-Request-Id"} {
			for word := range strings.FieldsSeq(words) {
				if !slices.Contains(strings.Split(preflight.header.Get(name), ", "), word) {
					t.Errorf("%s: %s", name, preflight.header.Get(name))
				}
			}
		}
		if age, err := strconv.Atoi(preflight.header.Get("Access-Control-Max-Age")); err != nil || age <= 0 {
			t.Errorf("Access-Control-Max-Age: %v", preflight.header)
		}
	}
}

func TestCrossOrigin(t *testing.T) {
	s := start(t, nil)
	host := strings.TrimPrefix(s.url, "http://")
	const refused, passes = "cross_origin", ""
	for _, test := range []struct {
		method  string
		headers []string
		code    string
	}{
		{"POST", nil, passes},
		{"POST", []string{"Origin", "http://localhost:5173"}, passes},
		{"POST", []string{"Origin", "http://localhost:5173", "Sec-Fetch-Site", "cross-site"}, passes},
		{"POST", []string{"Origin", "http://localhost:5173", "Sec-Fetch-Site", "same-site"}, passes},
		{"POST", []string{"Origin", "http://" + host}, passes},
		{"POST", []string{"Origin", "http://" + host, "Sec-Fetch-Site", "same-origin"}, passes},
		{"POST", []string{"Sec-Fetch-Site", "same-origin"}, passes},
		{"POST", []string{"Sec-Fetch-Site", "none"}, passes},
		{"POST", []string{"Sec-Fetch-Site", "cross-site"}, refused},
		{"POST", []string{"Sec-Fetch-Site", "same-site"}, refused},
		{"POST", []string{"Origin", "https://evil.example"}, refused},
		{"POST", []string{"Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site"}, refused},
		{"POST", []string{"Origin", "https://evil.example", "Sec-Fetch-Site", "same-origin"}, refused},
		{"POST", []string{"Origin", "https://evil.example", "Sec-Fetch-Site", "none"}, refused},
		{"POST", []string{"Origin", "null"}, refused},
		{"POST", []string{"Origin", "http://localhost:5174"}, refused},
		{"POST", []string{"Origin", "http://localhost:5173.evil.example"}, refused},
		{"POST", []string{"Origin", "http://" + host + ".evil.example"}, refused},
		{"GET", []string{"Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site"}, passes},
		{"HEAD", []string{"Origin", "https://evil.example"}, passes},
		{"DELETE", []string{"Origin", "https://evil.example"}, refused},
		{"PUT", []string{"Origin", "https://evil.example"}, refused},
	} {
		path := map[string]string{"POST": "/auth/refresh", "GET": "/auth/me", "HEAD": "/auth/me", "DELETE": "/auth/me", "PUT": "/auth/password"}[test.method]
		c := signedUp(s)
		before := c.tab()
		r := c.do(test.method, path, nil, test.headers...)
		if test.code == passes && r.status != 200 {
			t.Errorf("%s %v: %d %s", test.method, test.headers, r.status, r.raw)
		}
		if test.code == refused {
			want(t, r, 403, refused)
			want(t, before.refresh(), 200, "") // and it did nothing
		}
	}
}

func TestRequestID(t *testing.T) {
	s := start(t, nil)
	c := newClient(s)
	for id, kept := range map[string]bool{
		"01234567-89ab-cdef-0123-456789abcdef": true, "01234567-89AB-CDEF-0123-456789ABCDEF": true, "00000000-0000-0000-0000-000000000000": true,
		"": false, "x": false, "0123456789abcdef0123456789abcdef": false, "{01234567-89ab-cdef-0123-456789abcdef}": false,
		"urn:uuid:01234567-89ab-cdef-0123-456789abcdef": false, "01234567-89ab-cdef-0123-456789abcdeg": false, "01234567-89ab-cdef-0123_456789abcdef": false,
	} {
		r := c.do("GET", "/auth/me", nil, "X-Request-Id", id)
		got := r.header.Get("X-Request-Id")
		if (got == id) != kept || r.text("requestId") != got {
			t.Errorf("X-Request-Id: %q became %q, and %q in the body", id, got, r.text("requestId"))
		}
		s.log.await(t, func(line logLine) bool { return line["requestId"] == got })
	}
	if a, b := c.me().text("requestId"), c.me().text("requestId"); a == b {
		t.Error("two requests, one id")
	}
}

// What is different outside development: the log is JSON, and the cookie is Secure.
func TestProduction(t *testing.T) {
	s := start(t, map[string]string{"NODE_ENV": "", "BCRYPT_COST": "12", "COOKIE_SAMESITE": "none"})
	c := signedUp(start(t, nil)).at(s) // a hash of cost 12 takes its time
	id := newRequestID()
	r := c.do("POST", "/auth/refresh", nil, "X-Request-Id", id, "User-Agent", "agent")
	want(t, r, 200, "")
	if got := r.header.Get("Set-Cookie"); got != "refreshToken="+c.cookie+"; Path=/auth; Max-Age=604800; HttpOnly; Secure; SameSite=None" {
		t.Errorf("Set-Cookie: %s", got)
	}
	c.do("DELETE", "/auth/sessions/x?token="+c.access, nil)
	s.log.await(t, func(line logLine) bool {
		return line["route"] == "DELETE /auth/sessions/{id}" && line["path"] == "/auth/sessions/x"
	})
	s.log.await(t, func(line logLine) bool { return line["requestId"] == id })
	for line := range strings.Lines(s.log.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("no JSON: %v: %s", err, line)
		}
		if entry["requestId"] != id {
			continue
		}
		at, err := time.Parse(time.RFC3339, fmt.Sprint(entry["time"]))
		took, _ := entry["durationMs"].(float64)
		if err != nil || at.Location() != time.UTC || time.Since(at).Abs() > time.Minute || took <= 0 || took > 60000 {
			t.Errorf("time and duration: %s", line)
		}
		delete(entry, "time")
		delete(entry, "durationMs")
		want := map[string]any{"level": "INFO", "msg": "request", "requestId": id, "method": "POST", "path": "/auth/refresh",
			"route": "POST /auth/refresh", "status": 200.0, "ip": c.ip, "userId": payload(t, c.access)["sub"]}
		if !maps.Equal(entry, want) {
			t.Errorf("got %v, want %v", entry, want)
		}
	}
}

func TestMetrics(t *testing.T) {
	s := start(t, map[string]string{"METRICS_ADDR": "127.0.0.1:0", "RATE_LIMIT_MAX": "30", "LOGIN_LIMIT_MAX": "1", "REFRESH_REUSE_LEEWAY": "50ms"})
	metrics := s.log.await(t, listeningFor("METRICS_ADDR"))
	c := signedUp(s)
	old := c.tab()
	want(t, c.refresh(), 200, "")
	eventually(t, "theft is noticed", func() bool {
		old.ip = randomIP()
		return old.tab().refresh().cleared()
	})
	wrong := newClient(s)
	want(t, wrong.login(), 401, "invalid_credentials")
	want(t, wrong.login(), 429, "too_many_attempts")
	for range 29 {
		wrong.me()
	}

	resp, err := http.Get("http://" + metrics["addr"] + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Fatalf("%v %s %v", err, resp.Status, resp.Header)
	}
	sample := regexp.MustCompile(`^([a-z_]+)(\{([a-z]+="[^"]*",?)+\})? ([0-9.e+-]+|NaN)$`)
	values := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "# ") {
			continue
		}
		parts := sample.FindStringSubmatch(line)
		if parts == nil {
			t.Errorf("no sample: %s", line)
			continue
		}
		values[parts[1]+parts[2]] = parts[4]
	}
	for name, value := range map[string]string{
		`latchkey_http_requests_total{route="POST /auth/login",method="POST",status="401"}`:  "1",
		`latchkey_http_requests_total{route="POST /auth/login",method="POST",status="429"}`:  "1",
		`latchkey_http_requests_total{route="POST /auth/signup",method="POST",status="201"}`: "1",
		`latchkey_http_request_duration_seconds_count{route="POST /auth/signup"}`:            "1",
		`latchkey_rate_limited_total`:             "1",
		`latchkey_login_limited_total`:            "1",
		`latchkey_refresh_total{outcome="theft"}`: "1",
	} {
		if values[name] != value {
			t.Errorf("%s is %q, want %s", name, values[name], value)
		}
	}
	for _, family := range []string{`latchkey_refresh_total{outcome="rotated"}`, `latchkey_refresh_total{outcome="reused"}`, "hashing", "postgres", "redis", "go_"} {
		if !strings.Contains(string(raw), family) {
			t.Errorf("nothing of %s", family)
		}
	}
	for _, secret := range []string{c.email, c.access, payload(t, c.access)["sub"].(string), c.ip} {
		if strings.Contains(string(raw), secret) {
			t.Errorf("the metrics name %s", secret)
		}
	}
	want(t, c.do("GET", "/metrics", nil), 404, "not_found")
}
