package contract

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const frontend = "http://localhost:5173"

// env is environment variables. An empty value stands for a variable that is not set.
type env map[string]string

// with returns a copy with more variables.
func (e env) with(more env) env {
	all := maps.Clone(e)
	maps.Copy(all, more)
	return all
}

var (
	// production undoes what makes the lab's servers quick. Its bcrypt costs 0.2 s and more.
	production = env{"NODE_ENV": "production", "BCRYPT_COST": ""}
	// shortLeeway takes a token for stolen soon, so that a test need not wait long for theft.
	shortLeeway = env{"REFRESH_REUSE_LEEWAY": "200ms"}
	// noRateLimit is for tests that send more from one address than a window allows.
	noRateLimit = env{"RATE_LIMIT_MAX": "0"}
)

// afterLeeway waits until shortLeeway is over.
func afterLeeway() { time.Sleep(300 * time.Millisecond) }

// defaults are the contract's, for what the tests have to know of a server's configuration.
var defaults = env{
	"NODE_ENV":             "production",
	"FRONTEND_URL":         frontend,
	"RATE_LIMIT_WINDOW":    "60",
	"RATE_LIMIT_MAX":       "100",
	"LOGIN_LIMIT_WINDOW":   "900",
	"LOGIN_LIMIT_MAX":      "10",
	"ACCESS_TOKEN_TTL":     "15m",
	"REFRESH_TOKEN_TTL":    "168h",
	"SESSION_MAX_TTL":      "720h",
	"REFRESH_REUSE_LEEWAY": "10s",
	"COOKIE_SAMESITE":      "strict",
}

// A server is one running instance, and what is known of it.
type server struct {
	*testing.T // the test that asks it
	URL        string
	env        env     // its configuration; conf adds the defaults
	stores     *stores // nil where they cannot be reached from here
	lab        *lab    // nil for a peer, which no other server can be started beside
	http       *http.Client
	process    *exec.Cmd
	log        *output // of standard output; nil for a peer
	ended      func() error
	stopped    bool
}

// askedBy is the same server in another test.
func (s *server) askedBy(t *testing.T) *server {
	asked := *s
	asked.T = t
	return &asked
}

// conf is the server's value of a variable, with the contract's default.
func (s *server) conf(name string) string {
	if value := s.env[name]; value != "" {
		return value
	}
	return defaults[name]
}

func (s *server) duration(name string) time.Duration {
	d, err := time.ParseDuration(s.conf(name))
	if err != nil {
		panic(err)
	}
	return d
}

// host is the host and port of the server's URL.
func (s *server) host() string {
	_, host, _ := strings.Cut(s.URL, "://")
	return host
}

func newHTTPClient() *http.Client {
	return &http.Client{
		Timeout: time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
		Transport: &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true},
	}
}

// peer is a server that was there before us.
func peer(t *testing.T, base string) *server {
	if _, err := url.ParseRequestURI(base); err != nil {
		t.Fatalf("LATCHKEY_BASE_URL: %v", err)
	}
	s := &server{T: t, URL: strings.TrimRight(base, "/"), env: env{}, http: newHTTPClient()}
	for _, line := range os.Environ() {
		name, value, _ := strings.Cut(line, "=")
		s.env[name] = value
	}
	if s.env["DATABASE_URL"] != "" && s.env["REDIS_URL"] != "" {
		s.stores = openStores(t, s.env["DATABASE_URL"], s.env["REDIS_URL"])
	}
	if s.conf("RATE_LIMIT_MAX") != "0" {
		first, second := s.send(get("/auth/me")).remaining(), s.send(get("/auth/me")).remaining()
		if first != second {
			t.Log("The server does not believe X-Forwarded-For from here, so that its limits " +
				"will refuse many tests: set its TRUSTED_PROXIES.")
		}
	}
	return s
}

// A lab is where the tests start servers of their own.
type lab struct {
	binary string
	stores *stores // those of most servers
}

func newLab(t *testing.T) *lab {
	l := &lab{binary: os.Getenv("LATCHKEY_BINARY")}
	if l.binary == "" {
		l.binary = filepath.Join(t.TempDir(), "latchkey")
		build := exec.Command("go", "build", "-o", l.binary, ".")
		build.Dir = ".."
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
	}
	l.stores = newStores(t)
	return l
}

// labSecrets are those of all servers of a run, so that any two of them are replicas.
var labSecrets = env{
	"JWT_SECRET":         "access " + rand.Text() + rand.Text(),
	"JWT_REFRESH_SECRET": "refresh " + rand.Text() + rand.Text(),
}

// environment is the whole environment of a server: development's, for its cheap bcrypt, since
// nearly every test signs up a user, with all that is required given.
func (st *stores) environment(more env) env {
	e := env{
		"NODE_ENV":         "development",
		"BCRYPT_COST":      "4",
		"PORT":             freePort(),
		"DATABASE_URL":     st.databaseURL,
		"DB_POOL_SIZE":     "10",
		"REDIS_URL":        st.redisURL,
		"FRONTEND_URL":     frontend,
		"TRUSTED_PROXIES":  "127.0.0.0/8",
		"SHUTDOWN_TIMEOUT": "2s",
	}.with(labSecrets).with(more)
	maps.DeleteFunc(e, func(_, value string) bool { return value == "" })
	return e
}

// freePort finds a port that nobody listens on, below the range from which systems hand out the
// ports of outgoing connections.
func freePort() string {
	for {
		port := strconv.Itoa(10_000 + mathrand.IntN(10_000))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// command is the executable with exactly this environment.
func (l *lab) command(e env, args ...string) *exec.Cmd {
	cmd := exec.Command(l.binary, args...)
	cmd.Env = []string{} // nil would be ours
	for name, value := range e {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// start runs a server on the lab's stores until the test ends.
func (l *lab) start(t *testing.T, more env) *server { return l.startOn(t, l.stores, more) }

// startOn runs a server until the test ends. It must then end well, and its log is searched.
func (l *lab) startOn(t *testing.T, st *stores, more env) *server {
	t.Helper()
	e := st.environment(more)
	port := e["PORT"]
	if port == "" {
		port = "3000" // development's default
	}
	s := &server{
		T:       t,
		URL:     "http://127.0.0.1:" + port,
		env:     e,
		stores:  st,
		lab:     l,
		http:    newHTTPClient(),
		process: l.command(e),
		log:     &output{},
	}
	var stderr output
	s.process.Stdout = s.log
	s.process.Stderr = &stderr
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var result error
	go func() {
		result = s.process.Wait()
		close(ended)
	}()
	s.ended = func() error {
		select {
		case <-ended:
			return result
		case <-time.After(20 * time.Second):
			s.process.Process.Kill()
			return errors.New("the process has not ended")
		}
	}
	t.Cleanup(func() {
		if s.stopped { // by the test, which has said what it expects
		} else if err := s.stop(); err != nil {
			t.Errorf("a server ended with %v\n%s", err, &stderr)
		}
		s.assertLogFreeOfSecrets(stderr.String())
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", s.URL, tail(s.log.String(), 30))
		}
	})
	for !s.ready() {
		select {
		case <-ended:
			t.Fatalf("the server has not started: %v\n%s%s", result, s.log, &stderr)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return s
}

func (s *server) ready() bool {
	resp, err := s.http.Get(s.URL + "/readyz")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// stop sends SIGTERM and waits for the process to end, which it must with exit status 0. What is
// left of idle connections would hold it up: a new one, on which nothing was sent yet, for 5 s.
func (s *server) stop() error {
	s.stopped = true
	s.http.CloseIdleConnections()
	if err := s.process.Process.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		return errors.Join(err, s.ended())
	}
	return s.ended()
}

// start runs another server on the lab's stores for this test.
func (s *server) start(more env) *server {
	s.Helper()
	return s.lab.start(s.T, more)
}

// startOn runs another server for this test, on stores of its own.
func (s *server) startOn(st *stores, more env) *server {
	s.Helper()
	return s.lab.startOn(s.T, st, more)
}

// exits runs the executable with exactly this environment until it ends by itself.
func (s *server) exits(e env, args ...string) (status int, text string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	var out output
	cmd := s.lab.command(e, args...)
	cmd.Stdout = &out
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	stopKilling := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stopKilling()
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), out.String()
}

// output is what a process writes, to be read at any time.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// eventually polls until a condition holds, where the contract promises that it will, and not when.
func (s *server) eventually(within time.Duration, what string, holds func() bool) {
	s.Helper()
	for deadline := time.Now().Add(within); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("not within %v: %s", within, what)
		}
	}
}
