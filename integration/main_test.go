// Package integration runs Latchkey as its users run it: the image of its own Dockerfile, in
// containers, against real PostgreSQL and Redis. It holds the image to the HTTP contract with the
// suite in contract/, and tests what is about Docker, Compose, a Redis Cluster, a browser, a mail
// server, and the files of examples/deploy.
//
//	go test -C integration -count=1 -timeout 25m ./...
//
// It needs a Docker engine on Linux, for the network of the host. The browser tests need Chromium,
// those of nginx need nginx, and the test of mails needs Postfix and root.
package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	tclog "github.com/testcontainers/testcontainers-go/log"
	"github.com/testcontainers/testcontainers-go/modules/postgres"
	"github.com/testcontainers/testcontainers-go/modules/redis"
)

const (
	image         = "latchkey-integration:latest"
	postgresImage = "postgres:17-alpine"
	redisImage    = "redis:7-alpine"
)

// vars are environment variables of a server.
type vars map[string]string

// with returns a copy with more variables.
func (v vars) with(more vars) vars {
	all := maps.Clone(v)
	maps.Copy(all, more)
	return all
}

// list returns the variables in the form of os.Environ.
func (v vars) list() (lines []string) {
	for name, value := range v {
		lines = append(lines, name+"="+value)
	}
	return lines
}

// home is what TestMain prepares for all tests.
var home struct {
	binary      string // an executable that runs the image
	postgres    *postgres.PostgresContainer
	databaseURL string
	redisURL    string
}

func TestMain(m *testing.M) {
	os.Exit(prepareAndRun(m))
}

// check panics on an error, so that what was deferred still stops the containers.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

func prepareAndRun(m *testing.M) (code int) {
	tclog.SetDefault(tclog.NewNoopLogger()) // what the containers do is no result
	ctx := context.Background()
	out, err := exec.Command("docker", "build", "--tag", image, "..").CombinedOutput()
	if err != nil {
		fmt.Fprintln(os.Stderr, "docker build:", err, tail(string(out), 30))
		return 1
	}
	dir, err := os.MkdirTemp("", "latchkey-integration-")
	check(err)
	defer os.RemoveAll(dir)
	home.binary = filepath.Join(dir, "latchkey")
	check(os.WriteFile(home.binary, []byte(wrapper()), 0o755))

	home.postgres, err = postgres.Run(ctx, postgresImage,
		postgres.WithUsername("latchkey"), postgres.WithPassword("password-of-the-tests"),
		postgres.BasicWaitStrategies(),
		testcontainers.WithCmdArgs("-c", "fsync=off", "-c", "max_connections=500"))
	defer func() { check(testcontainers.TerminateContainer(home.postgres)) }()
	check(err)
	home.databaseURL, err = home.postgres.ConnectionString(ctx, "sslmode=disable")
	check(err)

	store, err := redis.Run(ctx, redisImage,
		testcontainers.WithCmd("redis-server", "--databases", "100", "--save", ""))
	defer func() { check(testcontainers.TerminateContainer(store)) }()
	check(err)
	home.redisURL, err = store.ConnectionString(ctx)
	check(err)
	// Without a registry, an image with one of these names may be a stand-in.
	for name, c := range map[string]testcontainers.Container{
		"postgres": home.postgres, "redis-server": store,
	} {
		version, err := execute(ctx, c, name, "--version")
		check(err)
		fmt.Printf("integration: %s is %s\n", name, strings.TrimSpace(version))
	}
	return m.Run()
}

// wrapper is a script that runs the image in the network of the host, locked in, as if it were a
// program of this machine: with exactly the environment that it is given, its output, signals and
// exit status. The files that variables name are there too.
func wrapper() string {
	docker := ""
	for name := range strings.FieldsSeq("PATH HOME DOCKER_HOST DOCKER_CONFIG DOCKER_CONTEXT") {
		if value := os.Getenv(name); value != "" {
			docker += fmt.Sprintf("export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
		}
	}
	return `#!/bin/sh
flags=$(env | sed -n 's/^\([A-Z_]*\)=.*/\1/p' | grep -vx -e PWD -e SHLVL -e _ | sed 's/^/-e /')
for file in "$SSL_CERT_FILE" "$MAIL_TEMPLATES"; do
  [ ! -f "$file" ] || flags="$flags --volume $file:$file:ro"
done
` + docker + `exec docker run --rm --network host --read-only --cap-drop ALL \
  --security-opt no-new-privileges $flags ` + image + ` "$@"
`
}

// execute runs a command in a container.
func execute(ctx context.Context, c testcontainers.Container, cmd ...string) (string, error) {
	exit, out, err := c.Exec(ctx, cmd, tcexec.Multiplexed())
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(out)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%q: exit status %d: %s", cmd, exit, text)
	}
	return string(text), err
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// runSuite runs the tests of contract/ with these variables besides ours.
func runSuite(t *testing.T, more vars, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"test", "-count=1"}, args...)...)
	cmd.Dir = "../contract"
	cmd.Env = append(os.Environ(), more.list()...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go test -C contract: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestContract holds the image to the contract. It runs alone, since some promises are about time.
func TestContract(t *testing.T) {
	runSuite(t, vars{
		"LATCHKEY_BASE_URL": "",
		"LATCHKEY_BINARY":   home.binary,
		"DATABASE_URL":      home.databaseURL,
		"REDIS_URL":         home.redisURL,
	}, "./...")
}

// freePort is a port of 127.0.0.1 that nobody listens on right now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

var databases atomic.Int64

var secrets = vars{
	"JWT_SECRET":         "access " + rand.Text() + rand.Text(),
	"JWT_REFRESH_SECRET": "refresh " + rand.Text() + rand.Text(),
}

// serve runs the image, as in production, on a database and a Redis database of its own until the
// test ends, and returns its URL.
func serve(t *testing.T, more vars) string {
	t.Helper()
	n := databases.Add(1)
	name := fmt.Sprintf("latchkey_%d", n)
	_, err := execute(t.Context(), home.postgres, "createdb", "-U", "latchkey", name)
	if err != nil {
		t.Fatal(err)
	}
	env := vars{
		"PORT":            freePort(t),
		"DB_POOL_SIZE":    "10",
		"FRONTEND_URL":    "http://localhost:5173",
		"DATABASE_URL":    strings.Replace(home.databaseURL, "/postgres?", "/"+name+"?", 1),
		"REDIS_URL":       fmt.Sprintf("%s/%d", home.redisURL, n),
		"TRUSTED_PROXIES": "127.0.0.0/8",
		"SHUTDOWN_DELAY":  "0s", // no proxy is in front
	}.with(secrets).with(more)
	var log bytes.Buffer
	cmd := exec.Command(home.binary)
	cmd.Env = env.list()
	cmd.Stdout = &log
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the server ended with %v\n%s", err, tail(log.String(), 30))
		}
	})
	url := "http://127.0.0.1:" + env["PORT"]
	eventually(t, 30*time.Second, "the server is ready", func() bool {
		resp, err := http.Get(url + "/readyz")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil && resp.StatusCode == 200
	})
	return url
}

// eventually polls until a condition holds.
func eventually(t *testing.T, within time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// A user of the API, with the tokens of one session.
type user struct {
	t           *testing.T
	api         string
	ip          string
	credentials map[string]string
	access      string
	refresh     string
}

func newUser(t *testing.T, api string) *user {
	credentials := map[string]string{
		"email":    rand.Text() + "@example.com",
		"password": rand.Text(),
	}
	return &user{t: t, api: api, ip: newIP(), credentials: credentials}
}

var addresses atomic.Int64

func newIP() string {
	n := addresses.Add(1)
	return fmt.Sprintf("198.18.%d.%d", n>>8&255, n&255)
}

// A reply is what the API answers.
type reply struct {
	status int
	body   struct {
		Code        string
		AccessToken string
		User        struct{ ID string }
		Sessions    []struct{ ID string }
	}
}

// send sends a request with the user's tokens, and keeps those that it gets.
func (u *user) send(method, path string, body map[string]string) reply {
	u.t.Helper()
	encoded, _ := json.Marshal(body)
	req, err := http.NewRequest(method, u.api+path, bytes.NewReader(encoded))
	if err != nil {
		u.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+u.access)
	req.Header.Set("X-Forwarded-For", u.ip)
	req.AddCookie(&http.Cookie{Name: "refreshToken", Value: u.refresh})
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		u.t.Fatal(err)
	}
	defer resp.Body.Close()
	r := reply{status: resp.StatusCode}
	if err := json.NewDecoder(resp.Body).Decode(&r.body); err != nil {
		u.t.Fatalf("%s %s: %d: %v", method, path, r.status, err)
	}
	for _, cookie := range resp.Cookies() {
		u.refresh = cookie.Value
	}
	if r.body.AccessToken != "" {
		u.access = r.body.AccessToken
	}
	return r
}

// must is send for what has to succeed.
func (u *user) must(method, path string, body map[string]string) reply {
	u.t.Helper()
	r := u.send(method, path, body)
	if r.status/100 != 2 {
		u.t.Fatalf("%s %s: %d %s", method, path, r.status, r.body.Code)
	}
	return r
}

// login opens another session of the same user.
func (u *user) login() *user {
	u.t.Helper()
	other := *u
	other.ip = newIP()
	other.must("POST", "/auth/login", other.credentials)
	return &other
}

// lives asserts that both tokens of the session are good.
func (u *user) lives() {
	u.t.Helper()
	u.must("GET", "/auth/sessions", nil)
	u.must("POST", "/auth/refresh", nil)
}
