package chaos

import (
	"bufio"
	"crypto/rand"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// vars are environment variables. An empty value stands for a variable that is not set.
type vars map[string]string

// secrets are those of all servers of a run, so that any two of them are replicas.
var secrets = vars{
	"JWT_SECRET":         "access " + rand.Text() + rand.Text(),
	"JWT_REFRESH_SECRET": "refresh " + rand.Text() + rand.Text(),
}

// A server is a running Latchkey.
type server struct {
	*process
	t       *testing.T
	env     vars
	url     string
	metered string // the URL of its metrics
	http    *http.Client

	mailLogger *server // a replica that writes its mails to its log; itself, unless it has SMTP_URL
}

// startServer starts the server with the variables of env, which must give DATABASE_URL and
// REDIS_URL, and waits until it is ready. Others have defaults that suit most tests: cheap password
// hashes, and no limit on requests.
func startServer(t *testing.T, env vars) *server {
	t.Helper()
	s := launchServer(t, env)
	s.awaitReady()
	return s
}

// launchServer is startServer, but does not wait.
func launchServer(t *testing.T, env vars) *server {
	t.Helper()
	all := vars{
		"NODE_ENV":         "development",
		"BCRYPT_COST":      "4",
		"PORT":             freePort(t),
		"METRICS_ADDR":     "127.0.0.1:" + freePort(t),
		"DB_POOL_SIZE":     "10",
		"FRONTEND_URL":     "http://localhost:5173",
		"TRUSTED_PROXIES":  "127.0.0.0/8",
		"RATE_LIMIT_MAX":   "0",
		"SHUTDOWN_TIMEOUT": "2s",
	}
	maps.Copy(all, secrets)
	maps.Copy(all, env)
	s := &server{
		t:       t,
		env:     all,
		url:     "http://127.0.0.1:" + all["PORT"],
		metered: "http://" + all["METRICS_ADDR"] + "/metrics",
		http:    newHTTPClient(),
	}
	s.mailLogger = s
	t.Cleanup(s.http.CloseIdleConnections)
	cmd := exec.Command(binary(t))
	cmd.Env = []string{} // nil would be ours
	for name, value := range all {
		if value != "" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	s.process = startProcess(t, "latchkey-"+all["PORT"], cmd)
	s.isReady = func() bool { return s.status("/readyz") == http.StatusOK }
	return s
}

// newHTTPClient makes a client whose requests are given up after 15 s. That is long past all that
// the server promises.
func newHTTPClient() *http.Client {
	return &http.Client{
		Timeout: 15 * time.Second,
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 1000,
			DisableCompression:  true,
		},
	}
}

// status is the status of the answer to GET, and 0 if there is none.
func (s *server) status(path string) int {
	resp, err := s.http.Get(s.url + path)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// metrics are the values of all series that the server shows, by name and labels.
func (s *server) metrics() map[string]float64 {
	s.t.Helper()
	resp, err := s.http.Get(s.metered)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		end := max(0, strings.LastIndexByte(lines.Text(), ' ')) // a label may have spaces
		series, value := lines.Text()[:end], lines.Text()[end:]
		if number, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
			values[series] = number
		}
	}
	return values
}

const (
	// quietLimit is how long after a test goroutines and connections may be left over. The server's
	// own deadlines end all of them within 5 s, and a busy machine may add as much.
	quietLimit = 10 * time.Second

	// spareGoroutines are those that the runtime and the pools may start at any time.
	spareGoroutines = 10
)

const (
	goroutines     = "go_goroutines"
	hashingWaiting = "latchkey_hashing_waiting"
	postgresInUse  = `latchkey_postgres_connections{state="in_use"}`
	redisOpen      = `latchkey_redis_connections{state="open"}`
	redisIdle      = `latchkey_redis_connections{state="idle"}`
)

// quietMetrics are the server's metrics while no connection to it is open but that of the question.
func (s *server) quietMetrics() map[string]float64 {
	s.t.Helper()
	s.http.CloseIdleConnections()
	return s.metrics()
}

// awaitQuiet waits until the server holds no more than it did before.
func (s *server) awaitQuiet(before map[string]float64) {
	s.t.Helper()
	var now map[string]float64
	isQuiet := func() bool {
		now = s.quietMetrics()
		return now[postgresInUse] == 0 &&
			now[redisOpen] == now[redisIdle] &&
			now[hashingWaiting] == 0 &&
			now[goroutines] <= before[goroutines]+spareGoroutines
	}
	for deadline := time.Now().Add(quietLimit); !isQuiet(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Errorf("%v later the server holds %v, before %v", quietLimit, now, before)
			return
		}
	}
}

// build builds the server's executable, at most once.
var build = sync.OnceValues(func() (string, error) {
	path := filepath.Join(shared, "latchkey")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %v\n%s", err, out)
	}
	return path, nil
})

func binary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("LATCHKEY_BINARY"); path != "" {
		return path
	}
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
