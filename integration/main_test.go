// Package integration runs Latchkey as its users run it: the image of its own Dockerfile, in containers, against real
// PostgreSQL and Redis, over HTTP. Nothing here knows the server's inside; what is tested is the HTTP contract.
//
//	go test -C integration -count=1 -timeout 20m ./...        everything; needs a Docker engine and nothing else
//	go test -C integration -count=1 -run Contract -v          the contract's promises, one by one
//
// Mind the -count=1: the go command cannot see that the server has changed, and would show an old result.
//
// The contract's promises can also be held against a server that runs already, this one or another behind the same
// contract. It should trust X-Forwarded-For from here (TRUSTED_PROXIES), since every test is a client of its own:
//
//	LATCHKEY_BASE_URL=http://localhost:3000 go test -C integration -count=1 -run Contract -v
//
// What needs more than a URL is then skipped, with a word why, unless the same variables that configure the server
// (DATABASE_URL, REDIS_URL, JWT_SECRET, JWT_REFRESH_SECRET, NODE_ENV, FRONTEND_URL, ...) are given to the tests too.
package integration

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/moby/moby/api/types/container"
	mobynetwork "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/redis/go-redis/v9"
	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	tclog "github.com/testcontainers/testcontainers-go/log"
	pgmodule "github.com/testcontainers/testcontainers-go/modules/postgres"
	redismodule "github.com/testcontainers/testcontainers-go/modules/redis"
	"github.com/testcontainers/testcontainers-go/network"
	"github.com/testcontainers/testcontainers-go/wait"
)

const (
	postgresImage = "postgres:17-alpine"
	redisImage    = "redis:7-alpine"
	frontend      = "http://localhost:5173"

	databasePassword = "database-password-of-the-integration-tests"
)

// vars are environment variables of a server.
type vars map[string]string

// with returns a copy with more variables; an empty value stands for unset.
func (v vars) with(more vars) vars {
	all := maps.Clone(v)
	maps.Copy(all, more)
	return all
}

// development is the environment of most servers here: a cheap bcrypt, since nearly every test signs a user up.
var development = vars{"NODE_ENV": "development", "BCRYPT_COST": "4"}

// What TestMain prepares. In peer mode only suite is set.
var (
	image string                        // the image of the project's Dockerfile
	lan   *testcontainers.DockerNetwork // where servers and stores see each other
	home  *stores                       // the stores that the tests share
	suite *server                       // the server that the contract is held against
)

func TestMain(m *testing.M) {
	code, err := prepareAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

func prepareAndRun(m *testing.M) (code int, err error) {
	if base := os.Getenv("LATCHKEY_BASE_URL"); base != "" {
		suite, err = peer(base)
		if err != nil {
			return 1, err
		}
		fmt.Printf("integration: against %s\n", base)
		return m.Run(), nil
	}
	tclog.SetDefault(quiet{}) // what the containers do is no result
	ctx := context.Background()
	if lan, err = network.New(ctx); err != nil {
		return 1, fmt.Errorf("is a Docker engine running? %w", err)
	}
	defer func() { err = errors.Join(err, lan.Remove(ctx)) }()
	if image, err = buildImage(ctx); err != nil {
		return 1, err
	}
	if home, err = startStores(ctx, "shared"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, home.terminate()) }()
	if suite, err = startServer(ctx, home, development); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, testcontainers.TerminateContainer(suite.c)) }()
	if err := describeImages(ctx); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

type quiet struct{}

func (quiet) Printf(string, ...any) {}

func buildImage(ctx context.Context) (string, error) {
	provider, err := testcontainers.NewDockerProvider()
	if err != nil {
		return "", err
	}
	defer provider.Close()
	var log strings.Builder
	tag, err := provider.BuildImage(ctx, &testcontainers.ContainerRequest{FromDockerfile: testcontainers.FromDockerfile{
		Context: "..", Repo: "latchkey-integration", Tag: "latest", BuildLogWriter: &log,
	}})
	if err != nil {
		return "", fmt.Errorf("build the project's Dockerfile: %w\n%s", err, log.String())
	}
	return tag, nil
}

// describeImages says what the containers really are: a name like postgres:17-alpine may be a stand-in for the official
// image on a machine without a registry.
func describeImages(ctx context.Context) error {
	for _, x := range []struct {
		name string
		c    testcontainers.Container
		cmd  []string
	}{
		{postgresImage, home.postgres, []string{"postgres", "--version"}},
		{redisImage, home.redis, []string{"redis-server", "--version"}},
		{image, suite.c, nil},
	} {
		inspect, err := x.c.Inspect(ctx)
		if err != nil {
			return err
		}
		version := []byte("built from the project's Dockerfile")
		if x.cmd != nil {
			_, out, err := x.c.Exec(ctx, x.cmd, tcexec.Multiplexed())
			if err != nil {
				return err
			}
			if version, err = io.ReadAll(out); err != nil {
				return err
			}
		}
		fmt.Printf("integration: %s (%.19s): %s\n", x.name, inspect.Image, strings.TrimSpace(string(version)))
	}
	return nil
}

// A server is one running instance, and what is known of it.
type server struct {
	URL string
	env vars                     // its configuration; defaults are filled in by conf
	st  *stores                  // its stores, as far as they can be reached from here
	c   testcontainers.Container // nil for a peer
}

// conf is the server's setting of one variable, with the contract's default.
func (s *server) conf(name string) string {
	if v := s.env[name]; v != "" {
		return v
	}
	return map[string]string{
		"NODE_ENV": "production", "FRONTEND_URL": frontend, "RATE_LIMIT_WINDOW": "60", "RATE_LIMIT_MAX": "100",
		"ACCESS_TOKEN_TTL": "15m", "REFRESH_TOKEN_TTL": "168h", "SESSION_MAX_TTL": "720h", "COOKIE_SAMESITE": "strict",
	}[name]
}

func (s *server) duration(name string) time.Duration {
	d, err := time.ParseDuration(s.conf(name))
	if err != nil {
		panic(err)
	}
	return d
}

// peer is a server that was there before us.
func peer(base string) (*server, error) {
	if _, err := url.ParseRequestURI(base); err != nil {
		return nil, fmt.Errorf("LATCHKEY_BASE_URL: %w", err)
	}
	s := &server{URL: strings.TrimRight(base, "/"), env: vars{}}
	for _, line := range os.Environ() {
		name, value, _ := strings.Cut(line, "=")
		s.env[name] = value
	}
	left := map[string]bool{}
	for range 2 {
		req, err := http.NewRequest(http.MethodGet, s.URL+"/auth/me", nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("X-Forwarded-For", newIP())
		resp, err := httpClient.Do(req)
		if err != nil {
			return nil, fmt.Errorf("LATCHKEY_BASE_URL: %w", err)
		}
		resp.Body.Close()
		limit, _, _ := strings.Cut(resp.Header.Get("RateLimit"), ";t=")
		left[limit] = true
	}
	if len(left) > 1 {
		fmt.Println("integration: the server does not believe X-Forwarded-For from here, so its limits will refuse many tests: set its TRUSTED_PROXIES")
	}
	if s.env["DATABASE_URL"] != "" && s.env["REDIS_URL"] != "" {
		s.st = &stores{databaseURL: s.env["DATABASE_URL"], redisURL: s.env["REDIS_URL"]}
		return s, s.st.connect(context.Background())
	}
	return s, nil
}

// published puts a container's port on a free port of 127.0.0.1.
func published(port string) testcontainers.CustomizeRequestOption {
	return testcontainers.WithHostConfigModifier(func(hc *container.HostConfig) {
		hc.PortBindings = mobynetwork.PortMap{
			mobynetwork.MustParsePort(port): {{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: "0"}},
		}
	})
}

// stores are a PostgreSQL database and a Redis database.
type stores struct {
	postgres, redis       testcontainers.Container
	databaseURL, redisURL string // as seen from here
	inDatabase, inRedis   string // as seen from a server in the network
	sql                   *pgxpool.Pool
	keys                  *redis.Client
}

func (st *stores) connect(ctx context.Context) error {
	var err error
	if st.sql, err = pgxpool.New(ctx, st.databaseURL); err != nil {
		return err
	}
	options, err := redis.ParseURL(st.redisURL)
	if err != nil {
		return err
	}
	st.keys = redis.NewClient(options)
	return errors.Join(st.sql.Ping(ctx), st.keys.Ping(ctx).Err())
}

func (st *stores) close() error {
	st.sql.Close()
	return st.keys.Close()
}

func startStores(ctx context.Context, name string) (*stores, error) {
	pg, err := pgmodule.Run(ctx, postgresImage,
		pgmodule.WithDatabase("latchkey"), pgmodule.WithUsername("latchkey"), pgmodule.WithPassword(databasePassword),
		pgmodule.BasicWaitStrategies(), testcontainers.WithCmdArgs("-c", "fsync=off", "-c", "max_connections=500"),
		published("5432/tcp"), network.WithNetwork([]string{"postgres-" + name}, lan))
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", postgresImage, err)
	}
	rd, err := redismodule.Run(ctx, redisImage, testcontainers.WithCmd("redis-server", "--databases", "100"),
		published("6379/tcp"), network.WithNetwork([]string{"redis-" + name}, lan))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", redisImage, err), testcontainers.TerminateContainer(pg))
	}
	st := &stores{
		postgres: pg, redis: rd,
		inDatabase: "postgres://latchkey:" + databasePassword + "@postgres-" + name + ":5432/latchkey?sslmode=disable",
		inRedis:    "redis://redis-" + name + ":6379",
	}
	if st.databaseURL, err = pg.ConnectionString(ctx, "sslmode=disable"); err == nil {
		if st.redisURL, err = rd.ConnectionString(ctx); err == nil {
			err = st.connect(ctx)
		}
	}
	if err != nil {
		return nil, errors.Join(err, testcontainers.TerminateContainer(pg), testcontainers.TerminateContainer(rd))
	}
	return st, nil
}

func (st *stores) terminate() error {
	return errors.Join(st.close(), testcontainers.TerminateContainer(st.postgres), testcontainers.TerminateContainer(st.redis))
}

// ownStores are two containers that the test may break.
func ownStores(t testing.TB) *stores {
	t.Helper()
	st, err := startStores(t.Context(), strings.ToLower(rand.Text()[:8]))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.terminate(); err != nil {
			t.Error(err)
		}
	})
	return st
}

var databases atomic.Int64

// fresh is an empty database of each kind in the shared containers, for a test that needs to be alone.
func fresh(t testing.TB) *stores {
	t.Helper()
	n := databases.Add(1)
	name := fmt.Sprintf("latchkey_%d", n)
	if _, err := home.sql.Exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	st := *home
	st.databaseURL = strings.Replace(home.databaseURL, "/latchkey?", "/"+name+"?", 1)
	st.inDatabase = strings.Replace(home.inDatabase, "/latchkey?", "/"+name+"?", 1)
	st.redisURL = fmt.Sprintf("%s/%d", home.redisURL, n)
	st.inRedis = fmt.Sprintf("%s/%d", home.inRedis, n)
	if err := st.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.close(); err != nil {
			t.Error(err)
		}
	})
	return &st
}

// environment is a server's whole environment: production's, with what the harness gives.
func environment(st *stores, more vars) vars {
	env := vars{
		"NODE_ENV": "production", "PORT": "3000", "DB_POOL_SIZE": "10", "FRONTEND_URL": frontend,
		"DATABASE_URL": st.inDatabase, "REDIS_URL": st.inRedis,
		"JWT_SECRET": "access-secret-of-the-integration-tests", "JWT_REFRESH_SECRET": "refresh-secret-of-the-integration-tests",
		// Whoever connects from the Docker host is believed, so that each client can have an address of its own.
		"TRUSTED_PROXIES": "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16",
	}.with(more)
	maps.DeleteFunc(env, func(_, value string) bool { return value == "" })
	return env
}

// locked runs a container as the compose file does: nothing to write to, nothing to gain.
func locked(hc *container.HostConfig) {
	hc.ReadonlyRootfs = true
	hc.CapDrop = []string{"ALL"}
	hc.SecurityOpt = []string{"no-new-privileges"}
}

// startServer runs the image until its /readyz is good.
func startServer(ctx context.Context, st *stores, more vars) (*server, error) {
	env := environment(st, more)
	opts := []testcontainers.ContainerCustomizer{
		testcontainers.WithEnv(env), testcontainers.WithExposedPorts("3000/tcp"), published("3000/tcp"),
		testcontainers.WithHostConfigModifier(locked), network.WithNetwork(nil, lan),
		testcontainers.WithWaitStrategy(wait.ForHTTP("/readyz").WithPort("3000/tcp").WithPollInterval(20 * time.Millisecond)),
	}
	if addr := env["METRICS_ADDR"]; addr != "" {
		port := addr[strings.LastIndexByte(addr, ':')+1:] + "/tcp"
		opts = append(opts, testcontainers.WithExposedPorts(port), testcontainers.WithHostConfigModifier(func(hc *container.HostConfig) {
			hc.PortBindings[mobynetwork.MustParsePort(port)] = hc.PortBindings[mobynetwork.MustParsePort("3000/tcp")]
		}))
	}
	c, err := testcontainers.Run(ctx, image, opts...)
	if err != nil {
		if c != nil {
			err = fmt.Errorf("%w\n%s", err, logsOf(c))
		}
		return nil, errors.Join(err, testcontainers.TerminateContainer(c))
	}
	base, err := c.PortEndpoint(ctx, "3000/tcp", "http")
	if err != nil {
		return nil, errors.Join(err, testcontainers.TerminateContainer(c))
	}
	return &server{URL: base, env: env, st: st, c: c}, nil
}

// serve starts a server for one test, and stops it with the test. Its log must then be free of secrets.
func serve(t testing.TB, st *stores, more vars) *server {
	t.Helper()
	s, err := startServer(t.Context(), st, more)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		assertLogFreeOfSecrets(t, s)
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", s.URL, tail(logsOf(s.c), 30))
		}
		if err := testcontainers.TerminateContainer(s.c); err != nil {
			t.Error(err)
		}
	})
	return s
}

// runImage runs the image with exactly this environment until it ends by itself.
func runImage(t testing.TB, env vars, args ...string) (exit int, output string) {
	t.Helper()
	c, err := testcontainers.Run(t.Context(), image, testcontainers.WithEnv(env), testcontainers.WithCmd(args...),
		testcontainers.WithHostConfigModifier(locked), network.WithNetwork(nil, lan),
		testcontainers.WithWaitStrategy(wait.ForExit().WithExitTimeout(30*time.Second).WithPollInterval(20*time.Millisecond)))
	testcontainers.CleanupContainer(t, c)
	if err != nil {
		t.Fatal(err)
	}
	state, err := c.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return state.ExitCode, logsOf(c)
}

// logsOf reads with a context of its own, because it is asked when a test's is over.
func logsOf(c testcontainers.Container) string {
	r, err := c.Logs(context.Background())
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	log, err := io.ReadAll(r)
	if err != nil {
		return err.Error()
	}
	return string(log)
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// engine is the Docker engine, for what testcontainers does not wrap.
func engine(t testing.TB) *testcontainers.DockerClient {
	t.Helper()
	c, err := testcontainers.NewDockerClientWithOpts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// pause freezes a container, as a host that hangs, until the returned function lets it go on.
func pause(t testing.TB, c testcontainers.Container) (resume func()) {
	t.Helper()
	docker := engine(t)
	if _, err := docker.ContainerPause(t.Context(), c.GetContainerID(), client.ContainerPauseOptions{}); err != nil {
		t.Fatal(err)
	}
	resume = sync.OnceFunc(func() {
		if _, err := docker.ContainerUnpause(context.Background(), c.GetContainerID(), client.ContainerUnpauseOptions{}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(resume)
	return resume
}

// eventually polls until the condition holds: for what the contract promises to happen, not when.
func eventually(t testing.TB, within time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); ; {
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

var httpClient = &http.Client{
	Timeout:       time.Minute,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true},
}

var addresses = func() *atomic.Uint32 {
	// A random start, so that a second run against the same peer does not meet the first one's counters.
	var b [2]byte
	rand.Read(b[:])
	n := new(atomic.Uint32)
	n.Store(uint32(b[0])<<8 | uint32(b[1]))
	return n
}()

// newIP is an address that no other client of this run has, from the range that is set aside for benchmarks.
func newIP() string {
	n := addresses.Add(1) % (1 << 17)
	return "198." + strconv.Itoa(18+int(n>>16)) + "." + strconv.Itoa(int(n>>8&255)) + "." + strconv.Itoa(int(n&255))
}
