package chaos

// overload_test.go floods a server with logins and fills it with idle connections.

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"
)

const (
	// floodClients log in at the same time, and each of them again as soon as it is answered.
	floodClients = 200

	// floodMemory bounds the resident memory of the flooded server. It takes about a third of that.
	floodMemory = 100 << 20

	// floodedP99 bounds what hashes no password. It takes about 0.1 s on two cores, which the
	// server shares with its stores and with all clients.
	floodedP99 = 2 * time.Second

	// floodedFactor bounds its median by that of the calm time, which counts as a millisecond at
	// least. The factor is below 6, and above 25 if hashing may occupy all threads of the server.
	floodedFactor = 20

	// servedShare is the part of it that must succeed, also in the calm time. On a busy machine a
	// store may be silent for so long that a few requests are refused.
	servedShare = 0.99

	// slowestLogin bounds every login. The server gives each request 5 s; the rest is for a busy
	// machine.
	slowestLogin = 10 * time.Second

	// idleMemory bounds the resident memory of an idle connection. It takes about a third of that.
	idleMemory = 64 << 10
)

// TestLoginFlood floods a server with logins at the hashing cost of production. What hashes no
// password goes on, and logins that cannot be served in time are refused.
func TestLoginFlood(t *testing.T) {
	duration := 20 * time.Second
	if testing.Short() {
		duration = 5 * time.Second
	}
	env := vars{
		"DATABASE_URL":    startPostgres(t).url,
		"REDIS_URL":       startRedis(t).url,
		"LOGIN_LIMIT_MAX": "0",
	}
	l := newLoad(t, startServer(t, env)) // where opening the sessions hashes cheaply
	env["BCRYPT_COST"] = "12"
	s := startServer(t, env)
	u := signedUp(t, s)
	before := s.quietMetrics()

	calm := l.run(s, duration)
	stop := startFlood(t, u)
	flooded := l.run(s, duration)
	good, refused := stop()

	t.Log("\n" + latencyTable(calm, flooded))
	t.Logf("of the logins, %d were good and %d refused", good, refused)
	if good == 0 || refused == 0 {
		t.Error("the flood was not served in part and refused in part")
	}
	assertServed(t, calm)
	assertServed(t, flooded)
	for path, m := range flooded {
		p50 := floodedFactor * max(calm[path].Latencies.P50, time.Millisecond)
		if m.Latencies.P50 > p50 || m.Latencies.P99 > floodedP99 {
			t.Errorf("%s in the flood: p50 %v, want at most %v; p99 %v, want at most %v",
				path, m.Latencies.P50, p50, m.Latencies.P99, floodedP99)
		}
	}
	peak := memory(t, s, "VmHWM")
	t.Logf("the server has taken up to %d MB", peak>>20)
	if peak > floodMemory {
		t.Errorf("that is more than %d MB", floodMemory>>20)
	}
	s.awaitQuiet(before)
	if a := u.login(); !a.ok() {
		t.Errorf("login after it: %v", a)
	}
}

// A load is what is sent at a fixed rate: refreshes, reads and health checks.
type load struct {
	access  string
	cookies chan string // the refresh tokens of all sessions without a refresh under way
}

// newLoad opens as many sessions of one user as refreshes may be under way at once.
func newLoad(t *testing.T, s *server) *load {
	const sessions = 90 // a user has at most 100
	u := signedUp(t, s)
	l := &load{cookies: make(chan string, sessions)}
	for range sessions {
		if a := u.login(); !a.ok() {
			t.Fatalf("login: %v", a)
		}
		l.cookies <- u.cookie
	}
	l.access = u.access
	return l
}

// run sends 50 requests of each kind per second, however slow the answers are. It returns what
// became of them by path.
func (l *load) run(s *server, duration time.Duration) map[string]*vegeta.Metrics {
	var n atomic.Uint64
	next := func(target *vegeta.Target) error {
		target.Method = http.MethodGet
		target.Header = http.Header{}
		switch n.Add(1) % 3 {
		case 0:
			target.URL = s.url + "/healthz"
		case 1:
			target.URL = s.url + "/auth/me"
			target.Header.Set("Authorization", "Bearer "+l.access)
		default:
			target.Method = http.MethodPost
			target.URL = s.url + "/auth/refresh"
			select {
			case cookie := <-l.cookies:
				target.Header.Set("Cookie", "refreshToken="+cookie)
			default: // all sessions are being refreshed: without a cookie, this one fails
			}
		}
		return nil
	}
	attacker := vegeta.NewAttacker(vegeta.Client(s.http))
	metrics := map[string]*vegeta.Metrics{}
	for hit := range attacker.Attack(next, vegeta.Rate{Freq: 150, Per: time.Second}, duration, "") {
		path := strings.TrimPrefix(hit.URL, s.url)
		if metrics[path] == nil {
			metrics[path] = &vegeta.Metrics{}
		}
		metrics[path].Add(hit)
		if hit.Code != http.StatusOK {
			continue
		}
		answered := http.Response{Header: hit.Headers}
		for _, cookie := range answered.Cookies() {
			l.cookies <- cookie.Value
		}
	}
	for _, m := range metrics {
		m.Close()
	}
	return metrics
}

// assertServed checks that nearly all requests of a run have succeeded, and all health checks.
func assertServed(t *testing.T, run map[string]*vegeta.Metrics) {
	t.Helper()
	for path, m := range run {
		if m.Success < servedShare || path == "/healthz" && m.Success != 1 {
			t.Errorf("%s: %v %v", path, m.StatusCodes, m.Errors)
		}
	}
}

// latencyTable shows two runs side by side in Markdown.
func latencyTable(calm, flooded map[string]*vegeta.Metrics) string {
	var b strings.Builder
	b.WriteString("| 50 requests per second | p50 | p99 | p50 in a flood | p99 in a flood |\n" +
		"|---|---|---|---|---|\n")
	for _, path := range []string{"/auth/refresh", "/auth/me", "/healthz"} {
		fmt.Fprintf(&b, "| `%s`", path)
		for _, run := range []map[string]*vegeta.Metrics{calm, flooded} {
			latency := run[path].Latencies
			fmt.Fprintf(&b, " | %.1f ms | %.1f ms",
				latency.P50.Seconds()*1000, latency.P99.Seconds()*1000)
		}
		b.WriteString(" |\n")
	}
	return b.String()
}

// startFlood lets all clients log in until stop is called, which returns how many logins were good
// and how many refused. There is no third answer.
func startFlood(t *testing.T, u *user) (stop func() (good, refused int64)) {
	var succeeded, overloaded atomic.Int64
	var ended atomic.Bool
	var clients sync.WaitGroup
	for range floodClients {
		client := u.copy()
		clients.Go(func() {
			for !ended.Load() {
				a := client.login()
				switch {
				case a.took > slowestLogin:
					t.Errorf("login: %v", a)
				case a.ok():
					succeeded.Add(1)
				case a.status == 503 && a.code == "overloaded" && a.header.Get("Retry-After") != "":
					overloaded.Add(1)
				default:
					t.Errorf("login: %v", a)
				}
			}
		})
	}
	return func() (good, refused int64) {
		ended.Store(true)
		clients.Wait()
		return succeeded.Load(), overloaded.Load()
	}
}

// memory reads a line of /proc/PID/status in bytes: VmRSS is the resident memory, VmHWM its peak.
func memory(t *testing.T, s *server, line string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid()))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(line + `:\s+(\d+) kB`).FindSubmatch(status)
	if match == nil {
		t.Fatalf("no %s in\n%s", line, status)
	}
	kilobytes, _ := strconv.Atoi(string(match[1]))
	return kilobytes << 10
}

// TestIdleConnections opens many connections that send one request and then nothing. The server
// holds them with little memory, goes on answering, and closes them in the end.
func TestIdleConnections(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 2000
	}
	allowFiles(t, uint64(n)+1000)
	s := startServer(t, vars{"DATABASE_URL": startPostgres(t).url, "REDIS_URL": startRedis(t).url})
	u := signedUp(t, s)
	before := memory(t, s, "VmRSS")
	connections := make([]net.Conn, n)
	for i := range connections {
		connections[i] = openIdle(t, s)
	}
	each := (memory(t, s, "VmRSS") - before) / n
	t.Logf("%d idle connections take %d bytes each", n, each)
	if each > idleMemory {
		t.Errorf("that is more than %d", idleMemory)
	}
	if a := u.login(); !a.ok() {
		t.Errorf("login beside them: %v", a)
	}

	end := 10 * time.Second // a shutdown waits for nobody who is idle
	if testing.Short() {
		if err := s.terminate(); err != nil {
			t.Errorf("the server ended with %v", err)
		}
	} else {
		end = 150 * time.Second // the idle timeout is 120 s
	}
	deadline := time.Now().Add(end)
	for _, c := range connections {
		c.SetReadDeadline(deadline)
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("an idle connection: %v, want it closed within %v", err, end)
		}
	}
}

// openIdle opens a connection and has one request answered on it.
func openIdle(t *testing.T, s *server) net.Conn {
	t.Helper()
	conn, err := dial(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
	answer := make([]byte, 1024)
	size, err := conn.Read(answer)
	if err != nil || !strings.Contains(string(answer[:size]), `{"status":"ok"}`) {
		t.Fatalf("%v\n%s", err, answer[:size])
	}
	return conn
}

// allowFiles raises this process's limit of open files, which the server inherits. It skips the
// test where that is not allowed.
func allowFiles(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	raised := syscall.Rlimit{Cur: max(limit.Cur, n), Max: max(limit.Max, n)}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised); err != nil {
		t.Skipf("%d open files are not allowed here: %v", n, err)
	}
}
