package contract

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
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
	// production undoes what makes the lab's servers quick: its bcrypt takes 0.2 s and more.
	production = env{"NODE_ENV": "production", "BCRYPT_COST": ""}
	// shortLeeway takes a token for stolen soon, so that a test need not wait long for theft.
	shortLeeway = env{"REFRESH_REUSE_LEEWAY": "200ms"}
	// someLeeway is for tests that also show a token within it.
	someLeeway = env{"REFRESH_REUSE_LEEWAY": "1s"}
	// noRateLimit is for tests that send more from one address than a window allows.
	noRateLimit = env{"RATE_LIMIT_MAX": "0"}
)

// afterLeeway waits until the server's leeway is over.
func (s *server) afterLeeway() {
	time.Sleep(s.duration("REFRESH_REUSE_LEEWAY") + 50*time.Millisecond)
}

// defaults are the contract's, as far as the tests have to know a server's configuration.
var defaults = env{
	"NODE_ENV":             "production",
	"FRONTEND_URL":         frontend,
	"RATE_LIMIT_WINDOW":    "60",
	"RATE_LIMIT_MAX":       "100",
	"LOGIN_LIMIT_WINDOW":   "900",
	"LOGIN_LIMIT_MAX":      "10",
	"ACCESS_TOKEN_TTL":     "15m",
	"REFRESH_TOKEN_TTL":    "168h",
	"REFRESH_REUSE_LEEWAY": "10s",
	"COOKIE_SAMESITE":      "strict",
}

// A server is one running instance, and what is known of it.
type server struct {
	*testing.T // the test that asks it
	URL        string
	env        env         // its configuration; conf adds the defaults
	stores     *stores     // nil where they cannot be reached from here
	lab        *lab        // nil for a peer, beside which no other server can be started
	mails      *mailServer // where its mails arrive; nil for a peer
	http       *http.Client
	logFile    string // of standard output
	process    *exec.Cmd
	ended      chan error // gets what became of the process
	mayFail    bool       // the test does not mind with which status it ends
}

// askedBy is the same server in another test.
func (s *server) askedBy(t *testing.T) *server {
	asked := *s
	asked.T = t
	return &asked
}

// expect reports a failure unless what the test expects holds.
func (s *server) expect(holds bool, format string, args ...any) {
	if !holds {
		s.Errorf(format, args...)
	}
}

// Errorf and Fatalf say which line of a promise has failed, whatever helper has found it out.

func (s *server) Errorf(format string, args ...any) {
	s.T.Errorf("%s: %s", failedLine(), fmt.Sprintf(format, args...))
}

func (s *server) Fatalf(format string, args ...any) {
	s.T.Fatalf("%s: %s", failedLine(), fmt.Sprintf(format, args...))
}

var (
	testLine   = regexp.MustCompile(`[a-z]+_test\.go:\d+`)
	helperLine = regexp.MustCompile(`^(answer|client|server|stores|openapi|mailserver|message)_`)
)

// failedLine is the innermost line of the call stack that is in no file of helpers.
func failedLine() string {
	lines := testLine.FindAllString(string(debug.Stack()), -1)
	return slices.DeleteFunc(lines, helperLine.MatchString)[0]
}

// conf is the server's value of a variable, with the contract's default.
func (s *server) conf(name string) string {
	if value := s.env[name]; value != "" {
		return value
	}
	return defaults[name]
}

// duration is the server's value of a variable, which is in seconds if it has no unit.
func (s *server) duration(name string) time.Duration {
	value := s.conf(name)
	if _, err := strconv.Atoi(value); err == nil {
		value += "s"
	}
	d, err := time.ParseDuration(value)
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
	s := &server{T: t, URL: strings.TrimRight(base, "/"), env: env{}, http: newHTTPClient()}
	for _, line := range os.Environ() {
		name, value, _ := strings.Cut(line, "=")
		s.env[name] = value
	}
	if s.env["DATABASE_URL"] != "" && s.env["REDIS_URL"] != "" {
		s.stores = openStores(t, s.env["DATABASE_URL"], s.env["REDIS_URL"])
	}
	return s
}

// A lab is where the tests start servers of their own.
type lab struct {
	binary string
	stores *stores // those of most servers
}

// newLab is no server yet, but one for start to be called on.
func newLab(t *testing.T) *server {
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
	return &server{T: t, lab: l, mails: sharedMailServer()}
}

// labSecrets are those of all servers of a run, so that any two of them are replicas.
var labSecrets = env{
	"JWT_SECRET":         "access " + rand.Text() + rand.Text(),
	"JWT_REFRESH_SECRET": "refresh " + rand.Text() + rand.Text(),
}

// environment is a server's whole environment: development's, for its cheap bcrypt, since nearly
// every test signs a user up, with all given that production requires.
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
		"SMTP_URL":         sharedMailServer().url("smtp", "127.0.0.1"),
		"MAIL_FROM":        mailSender,
		"SHUTDOWN_DELAY":   "0s", // not 5 s for each server in production
		"SHUTDOWN_TIMEOUT": "2s",
	}.with(labSecrets).with(more)
	maps.DeleteFunc(e, func(_, value string) bool { return value == "" })
	return e
}

// portsTaken are those that freePort has given out. A server takes a while until it listens.
var portsTaken sync.Map

// freePort finds a port that nobody listens on, below the range of the ports that systems give to
// outgoing connections. It gives none out twice.
func freePort() string {
	for {
		port := strconv.Itoa(10_000 + mathrand.IntN(10_000))
		if _, taken := portsTaken.LoadOrStore(port, true); taken {
			continue
		}
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
}

// command is the executable with exactly this environment.
func (l *lab) command(ctx context.Context, e env, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, l.binary, args...)
	cmd.Env = []string{} // nil would be ours
	for name, value := range e {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// start runs another server on the lab's stores for this test.
func (s *server) start(more env) *server { return s.startOn(s.lab.stores, more) }

// startOn runs a server until the test ends. It must then end well, and its log is searched.
func (s *server) startOn(st *stores, more env) *server {
	e := st.environment(more)
	file, err := os.Create(filepath.Join(s.TempDir(), "log"))
	if err != nil {
		s.Fatalf("%v", err)
	}
	defer file.Close()
	started := &server{
		T:       s.T,
		URL:     "http://127.0.0.1:" + e["PORT"],
		env:     e,
		stores:  st,
		lab:     s.lab,
		mails:   s.mails,
		http:    newHTTPClient(),
		logFile: file.Name(),
		process: s.lab.command(context.Background(), e),
		ended:   make(chan error, 1),
	}
	var stderr bytes.Buffer
	started.process.Stdout = file
	started.process.Stderr = &stderr
	if err := started.process.Start(); err != nil {
		s.Fatalf("%v", err)
	}
	go func() { started.ended <- started.process.Wait() }()
	s.Cleanup(func() {
		err := started.stop()
		started.expect(err == nil || started.mayFail, "a server ended with %v\n%s", err, &stderr)
		started.assertFreeOfSecrets(started.log() + stderr.String())
		if s.Failed() {
			s.Logf("the end of the log of %s:\n%s", started.URL, tail(started.log(), 30))
		}
	})
	for !started.ready() {
		select {
		case err := <-started.ended:
			started.ended <- err
			s.Fatalf("the server has not started: %v\n%s%s", err, started.log(), &stderr)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return started
}

func (s *server) ready() bool {
	resp, err := s.http.Get(s.URL + "/readyz")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// stop sends SIGTERM and waits for the process, which must end with exit status 0. It closes our
// idle connections first: one on which nothing was sent yet would hold the server up for 5 s.
func (s *server) stop() error {
	s.http.CloseIdleConnections()
	s.process.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-s.ended:
		s.ended <- err
		return err
	case <-time.After(20 * time.Second):
		s.process.Process.Kill()
		return errors.New("it has not ended")
	}
}

// exits runs the executable with exactly this environment until it ends by itself.
func (s *server) exits(e env) (status int, output string) {
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	cmd := s.lab.command(ctx, e)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		s.Fatalf("%v", err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// startFails runs the executable with exactly this environment until it ends or waits for
// PostgreSQL, and returns what it has printed by then.
func (s *server) startFails(e env) (output string) {
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	cmd := s.lab.command(ctx, e)
	reader, writer := io.Pipe()
	cmd.Stdout, cmd.Stderr = writer, writer
	if err := cmd.Start(); err != nil {
		s.Fatalf("%v", err)
	}
	go func() { writer.CloseWithError(cmd.Wait()) }()
	lines := bufio.NewScanner(reader)
	for lines.Scan() {
		output += lines.Text() + "\n"
		if strings.Contains(lines.Text(), "waiting for PostgreSQL") {
			cmd.Process.Signal(syscall.SIGTERM)
		}
	}
	return output
}

// log is what the server has logged so far.
func (s *server) log() string {
	text, err := os.ReadFile(s.logFile)
	if err != nil {
		s.Fatalf("%v", err)
	}
	return string(text)
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// eventually polls until a condition holds that the contract promises, but not when.
func (s *server) eventually(within time.Duration, what string, holds func() bool) {
	for deadline := time.Now().Add(within); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("not within %v: %s", within, what)
		}
	}
}
