// Latchkey is an auth server: signup, login, refresh with rotation, logout, sessions and password change over HTTP,
// with users in PostgreSQL and sessions in Redis.
//
//	main.go        wiring, routes, shutdown, subcommands, configuration
//	middleware.go  what every request passes; errors become responses here and nowhere else
//	auth.go        the handlers: what they decide; password hashing
//	jwt.go         HS256 tokens and strict JSON: pure functions
//	store.go       users in PostgreSQL, sessions in Redis (session.lua), the migrations of schema.sql
//	ratelimit.go   limits on requests per IP and on failed logins, counted in Redis (ratelimit.lua)
//
// A request passes observe, cors, rateLimit, the mux, refuseCrossOrigin and, where the route is an account's, requireAuth.
// Its handler decodes, decides and asks the store; what error it returns is written by writeError.
//
// A session is a Redis hash that names the one refresh token it honours. A refresh exchanges that for the next in one
// Lua script: of any number of simultaneous ones a single one wins, on any number of replicas. An exchanged token shown
// again is a race within the leeway, and after it theft, which ends the session. An access token names its session and is
// refused once that is gone. Only a password makes one, so nothing brings it back. A session is bound to a digest of
// its password hash: a password changed by any means, plain SQL among them, ends it at its next refresh.
//
//	guessing        bcrypt; limits per account and IP, and per account; no common passwords
//	enumeration     login answers the same, in the same time, for unknown and known (signup has to tell)
//	stolen refresh  rotation, reuse detection; HttpOnly, SameSite, Path=/auth
//	forged token    one algorithm, one header, one spelling; nothing is parsed before its signature
//	CSRF            SameSite; Origin and Sec-Fetch-Site are checked
//	floods          a limit per IP; hashing in as many slots as processors; everything is bounded
//	outage          a store that does not answer means 503, never a request let through unchecked
//
// A stolen access token works until it expires or its session ends; who controls the stores controls the sessions.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run carries out the subcommand until it is done or ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	env := &environment{getenv: getenv, dev: getenv("NODE_ENV") == "development"}
	switch command := strings.Join(args, " "); command {
	case "", "serve":
		if cfg := env.config(); len(env.faults) == 0 {
			return serve(ctx, cfg, stdout)
		}
		return errors.Join(env.faults...)
	case "migrate", "migrate status":
		database := env.database()
		if len(env.faults) > 0 {
			return errors.Join(env.faults...)
		}
		steps, err := migrate(ctx, database.ConnConfig, schemaSQL, command == "migrate")
		for _, step := range steps {
			fmt.Fprintf(stdout, "%s  %-20s  %s\n", step.Version, step.Applied, step.Name)
		}
		return err
	case "healthcheck": // asks the server on this host whether it is ready
		client := http.Client{Timeout: 3 * time.Second}
		resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/readyz", env.integer("PORT", "", 0, 65535)))
		if err == nil && resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
		return errors.Join(append(env.faults, err)...)
	case "version":
		build, _ := debug.ReadBuildInfo()
		_, err := fmt.Fprintln(stdout, "latchkey", build.Main.Version, build.GoVersion)
		return err
	default:
		fmt.Fprintln(stderr, "usage: latchkey [serve | migrate | migrate status | healthcheck | version]")
		return fmt.Errorf("unknown command %q", command)
	}
}

// processors is how many the process may use. Go lets a hashing goroutine keep its processor for 10 ms; with
// twice as many threads the kernel shares the real ones out, and favours whoever waited.
var processors = sync.OnceValue(func() int {
	n := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(2 * n)
	return n
})

// serve migrates, serves until ctx ends, and drains: /readyz says so, the listener closes, requests end, the pools close.
func serve(ctx context.Context, cfg config, stdout io.Writer) error {
	log := newLogger(cfg, stdout)
	logging.Disable() // what fails a request in go-redis is logged with the request
	if cfg.randomSecrets {
		log.Warn("JWT_SECRET or JWT_REFRESH_SECRET is not set: random ones, sessions end with this process")
	}
	if _, err := migrate(ctx, cfg.database.ConnConfig, schemaSQL, true); err != nil {
		return err
	}
	db, err := pgxpool.NewWithConfig(context.WithoutCancel(ctx), cfg.database)
	if err != nil {
		return err
	}
	defer db.Close()
	rdb := redis.NewUniversalClient(cfg.redis)
	defer rdb.Close()
	var draining atomic.Bool
	handler, metrics, err := newHandler(cfg, log, db, rdb, &draining)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	listen := func(variable, addr string, h http.Handler) *http.Server {
		server := &http.Server{Handler: h, DisableGeneralOptionsHandler: true, // "OPTIONS *" is answered like anything else
			ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
			IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)}
		listener, err := net.Listen("tcp", addr)
		if err != nil {
			failed <- fmt.Errorf("%s: %v", variable, err)
			return server
		}
		log.Info("listening", "addr", listener.Addr().String(), "for", variable, "env", cfg.env)
		go func() { failed <- server.Serve(listener) }()
		return server
	}
	server := listen("PORT", ":"+strconv.Itoa(cfg.port), handler)
	defer server.Close()
	if cfg.metricsAddr != "" {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics)
		defer listen("METRICS_ADDR", cfg.metricsAddr, mux).Close()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("shutting down")
	draining.Store(true)
	time.Sleep(cfg.shutdownTimeout / 10) // for load balancers to ask /readyz and send no more
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.shutdownTimeout*9/10)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("requests cut off after SHUTDOWN_TIMEOUT: %v", err)
	}
	return nil
}

// newLogger writes JSON lines, or text in development, with times in UTC.
func newLogger(cfg config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey && len(groups) == 0 {
			a.Value = slog.TimeValue(a.Value.Time().UTC())
		}
		return a
	}}
	if cfg.env == "development" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// newHandler wires the parts, lists all routes and shows the order of what a request passes.
func newHandler(cfg config, log *slog.Logger, db *pgxpool.Pool, rdb redis.UniversalClient, draining *atomic.Bool) (http.Handler, *metrics, error) {
	hasher, err := newHasher(processors(), cfg.bcryptCost)
	if err != nil {
		return nil, nil, err
	}
	metrics := newMetrics(gauges(hasher, db, rdb))
	cfg.store.db, cfg.store.rdb = db, rdb
	a := &auth{store: &cfg.store, hasher: hasher, logins: &limiter{rdb, cfg.loginMax, cfg.loginWindow}, metrics: metrics, log: log,
		access: cfg.access, refresh: cfg.refresh, accessTTL: cfg.accessTTL, secureCookie: cfg.env != "development", sameSite: cfg.sameSite}
	mux, methods, sameOrigin := http.NewServeMux(), map[string][]string{}, refuseCrossOrigin(cfg.origins)
	route := func(method, path string, h http.Handler) {
		mux.Handle(method+" "+path, sameOrigin(h))
		methods[path] = append(methods[path], method)
	}
	route("POST", "/auth/signup", handle(a.signup))
	route("POST", "/auth/login", handle(a.login))
	route("POST", "/auth/refresh", handle(a.refreshTokens))
	route("POST", "/auth/logout", handle(a.logout))
	route("GET", "/auth/me", a.requireAuth(a.me))
	route("DELETE", "/auth/me", a.requireAuth(a.deleteAccount))
	route("GET", "/auth/sessions", a.requireAuth(a.listSessions))
	route("DELETE", "/auth/sessions", a.requireAuth(a.revokeSessions))
	route("DELETE", "/auth/sessions/{id}", a.requireAuth(a.revokeSession))
	route("PUT", "/auth/password", a.requireAuth(a.changePassword))
	route("GET", "/healthz", handle(func(w http.ResponseWriter, _ *http.Request) error {
		return reply(w, nil, body{"status": "ok"})
	}))
	route("GET", "/readyz", readiness(a.store, draining))
	for path, allowed := range methods { // any other method: RFC 9110 section 15.5.6
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		slices.Sort(allowed)
		mux.Handle(path, handle(func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			return fail("method_not_allowed")
		}))
	}
	limits := &limiter{rdb, cfg.rateMax, cfg.rateWindow}
	inner := cors(cfg.origins)(rateLimit(limits, metrics)(handle(func(w http.ResponseWriter, r *http.Request) error {
		if r.Pattern == "" {
			return fail("not_found")
		}
		mux.ServeHTTP(w, r)
		return nil
	})))
	return observe(log, metrics, cfg.trustedProxies)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Noted here for the log of what does not reach the mux, which would redirect to another spelling of a path.
		if p := r.URL.Path; p == path.Clean("/"+p) && p == r.URL.EscapedPath() {
			_, r.Pattern = mux.Handler(r)
		}
		inner.ServeHTTP(w, r)
	})), metrics, nil
}

// readiness answers whether both stores do, and whether the process means to stay.
func readiness(s *store, draining *atomic.Bool) http.Handler {
	word := map[bool]string{true: "ok", false: "unavailable"}
	return handle(func(w http.ResponseWriter, r *http.Request) error {
		postgresErr, redisErr := s.ready(r.Context())
		status, ready := http.StatusOK, postgresErr == nil && redisErr == nil && !draining.Load()
		if !ready {
			status = http.StatusServiceUnavailable
			w.Header().Set("Retry-After", "1")
			aboutRequest(r).err = &apiError{code: "unavailable", cause: errors.Join(postgresErr, redisErr)}
		}
		return writeJSON(w, status, body{"status": word[ready], "postgres": word[postgresErr == nil], "redis": word[redisErr == nil]})
	})
}

// gauges is what metrics reads when it is asked: hashing, connection pools, Go's runtime.
func gauges(h *hasher, db *pgxpool.Pool, rdb redis.UniversalClient) map[string]func() float64 {
	return map[string]func() float64{
		"latchkey_hashing_slots":                        func() float64 { return float64(cap(h.slots)) },
		"latchkey_hashing_slots_in_use":                 func() float64 { return float64(len(h.slots)) },
		"latchkey_hashing_waiting":                      func() float64 { return float64(h.waiting.Load()) },
		"latchkey_hashing_refused_total":                func() float64 { return float64(h.refused.Load()) },
		`latchkey_postgres_connections{state="idle"}`:   func() float64 { return float64(db.Stat().IdleConns()) },
		`latchkey_postgres_connections{state="in_use"}`: func() float64 { return float64(db.Stat().AcquiredConns()) },
		`latchkey_redis_connections{state="idle"}`:      func() float64 { return float64(rdb.PoolStats().IdleConns) },
		`latchkey_redis_connections{state="open"}`:      func() float64 { return float64(rdb.PoolStats().TotalConns) },
		"go_goroutines":                                 func() float64 { return float64(runtime.NumGoroutine()) },
		"go_memstats_sys_bytes":                         func() float64 { var m runtime.MemStats; runtime.ReadMemStats(&m); return float64(m.Sys) },
	}
}

// config is what the environment says, checked.
type config struct {
	env, metricsAddr                                             string
	port, rateMax, rateWindow, loginMax, loginWindow, bcryptCost int
	accessTTL, shutdownTimeout                                   time.Duration
	database                                                     *pgxpool.Config
	redis                                                        *redis.UniversalOptions
	store                                                        store // but for its clients
	access, refresh                                              keys
	randomSecrets                                                bool
	origins                                                      []string
	trustedProxies                                               []netip.Prefix
	sameSite                                                     http.SameSite
	logLevel                                                     slog.Level
}

// environment reads variables and collects their faults, each with the variable's name and never with its value.
type environment struct {
	getenv func(string) string
	dev    bool
	faults []error
}

func (e *environment) fault(name, format string, args ...any) {
	e.faults = append(e.faults, fmt.Errorf(name+": "+format, args...))
}

// inDevelopment is what only development has a default for.
var inDevelopment = map[string]string{"PORT": "3000", "DB_POOL_SIZE": "10", "FRONTEND_URL": "http://localhost:5173",
	"DATABASE_URL": "postgres://localhost:5432/postgres", "REDIS_URL": "redis://localhost:6379"}

// text returns a variable, its default where it is unset or empty; without a default it is required.
func (e *environment) text(name, fallback string) string {
	if fallback == "" && e.dev {
		fallback = inDevelopment[name]
	}
	value := cmp.Or(e.getenv(name), fallback)
	if value == "" {
		e.fault(name, "is required")
	}
	return value
}

// oneOf reads a word of a list; the first is the default.
func (e *environment) oneOf(name string, words ...string) string {
	word := e.text(name, words[0])
	if !slices.Contains(words, word) {
		e.fault(name, "must be one of %s", strings.Join(words, ", "))
	}
	return word
}

func (e *environment) integer(name, fallback string, low, high int) int {
	value := e.text(name, fallback)
	n, err := strconv.Atoi(value)
	if value != "" && (err != nil || n < low || n > high) {
		e.fault(name, "must be a whole number from %d to %d", low, high)
	}
	return n
}

// duration reads a Go duration of at least low; times in tokens and Redis are whole seconds, so those step by one.
func (e *environment) duration(name, fallback string, low, step time.Duration) time.Duration {
	d, err := time.ParseDuration(e.text(name, fallback))
	if err != nil || d < low || d%step != 0 {
		e.fault(name, "must be a duration such as %s, at least %v, in steps of %v", fallback, low, step)
	}
	return d
}

// An origin as browsers write it is in lower case and has no default port (RFC 6454 section 6.2).
var (
	originForm  = regexp.MustCompile(`^https?://(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[1-9][0-9]{0,4})?$`)
	defaultPort = regexp.MustCompile(`^(http://.*):80$|^(https://.*):443$`)
)

func (e *environment) config() config {
	c := config{
		env:         e.oneOf("NODE_ENV", "production", "staging", "development"),
		port:        e.integer("PORT", "", 0, 65535),
		database:    e.database(),
		redis:       e.redis(),
		accessTTL:   e.duration("ACCESS_TOKEN_TTL", "15m", time.Second, time.Second),
		rateMax:     e.integer("RATE_LIMIT_MAX", "100", 0, math.MaxInt32),
		rateWindow:  e.integer("RATE_LIMIT_WINDOW", "60", 1, math.MaxInt32),
		loginMax:    e.integer("LOGIN_LIMIT_MAX", "10", 0, math.MaxInt32),
		loginWindow: e.integer("LOGIN_LIMIT_WINDOW", "900", 1, math.MaxInt32),
		store: store{
			refreshTTL: e.duration("REFRESH_TOKEN_TTL", "168h", time.Second, time.Second),
			sessionTTL: e.duration("SESSION_MAX_TTL", "720h", time.Second, time.Second),
			leeway:     e.duration("REFRESH_REUSE_LEEWAY", "10s", 0, time.Millisecond),
			resend:     e.oneOf("REFRESH_REUSE_POLICY", "refuse", "resend") == "resend",
		},
		sameSite: map[string]http.SameSite{"strict": http.SameSiteStrictMode, "lax": http.SameSiteLaxMode,
			"none": http.SameSiteNoneMode}[e.oneOf("COOKIE_SAMESITE", "strict", "lax", "none")],
		bcryptCost:      e.integer("BCRYPT_COST", "12", map[bool]int{true: 4, false: 12}[e.dev], 16),
		metricsAddr:     e.getenv("METRICS_ADDR"),
		shutdownTimeout: e.duration("SHUTDOWN_TIMEOUT", "10s", time.Millisecond, time.Millisecond),
	}
	e.secrets(&c)
	frontends := e.text("FRONTEND_URL", "")
	for item := range strings.SplitSeq(frontends, ",") {
		origin := strings.TrimSuffix(strings.ToLower(strings.TrimSpace(item)), "/")
		c.origins = append(c.origins, defaultPort.ReplaceAllString(origin, "$1$2"))
		if frontends != "" && !originForm.MatchString(origin) {
			e.fault("FRONTEND_URL", "must be origins such as https://app.example.com, separated by commas")
			break
		}
	}
	for item := range strings.FieldsFuncSeq(e.getenv("TRUSTED_PROXIES"), func(r rune) bool { return r == ',' || r == ' ' }) {
		prefix, err := netip.ParsePrefix(item)
		if err != nil || prefix.Addr().Is4In6() {
			e.fault("TRUSTED_PROXIES", "must be CIDRs such as 10.0.0.0/8, separated by commas")
		}
		c.trustedProxies = append(c.trustedProxies, prefix)
	}
	if c.sameSite == http.SameSiteNoneMode && e.dev {
		e.fault("COOKIE_SAMESITE", "none needs a secure cookie, which development does not set")
	}
	if _, err := net.ResolveTCPAddr("tcp", c.metricsAddr); c.metricsAddr != "" && err != nil {
		e.fault("METRICS_ADDR", "must be host:port")
	}
	_ = c.logLevel.UnmarshalText([]byte(e.oneOf("LOG_LEVEL", "info", "debug", "warn", "error"))) // oneOf notes a fault
	return c
}

// database reads DATABASE_URL and DB_POOL_SIZE. Connections run in UTC, so that an adopted table's times without a
// zone are read, and written, as UTC.
func (e *environment) database() *pgxpool.Config {
	value, size := e.text("DATABASE_URL", ""), e.integer("DB_POOL_SIZE", "", 1, math.MaxInt32)
	cfg, err := pgxpool.ParseConfig(value)
	if err != nil || !strings.HasPrefix(value, "postgres://") && !strings.HasPrefix(value, "postgresql://") ||
		strings.Contains(cfg.ConnConfig.Database, "@") { // a password with a slash in it, which an error would print
		if value != "" {
			e.fault("DATABASE_URL", "must be a PostgreSQL URL, postgres://user:password@host:port/database")
		}
		return nil
	}
	cfg.MaxConns = int32(size)
	cfg.ConnConfig.ConnectTimeout = cmp.Or(cfg.ConnConfig.ConnectTimeout, postgresTimeout)
	maps.DeleteFunc(cfg.ConnConfig.RuntimeParams, func(name, _ string) bool { return strings.EqualFold(name, "timezone") })
	cfg.ConnConfig.RuntimeParams["timezone"], cfg.ConnConfig.RuntimeParams["client_encoding"] = "UTC", "UTF8"
	return cfg
}

// redis reads REDIS_URL. A call that is not answered in time has failed, and the client sends nothing a second time: what
// counts or rotates may have been carried out although its answer was lost. (A cluster's moved slot is a 503, once.)
func (e *environment) redis() *redis.UniversalOptions {
	value := e.text("REDIS_URL", "")
	o := &redis.UniversalOptions{MaxRetries: -1, MaxRedirects: -1, DialerRetries: 1, DialTimeout: redisTimeout, ReadTimeout: redisTimeout,
		WriteTimeout: redisTimeout, PoolSize: 100, PipelinePoolSize: -1, PoolTimeout: redisTimeout / 4,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}}
	if c, err := redis.ParseClusterURL(value); err == nil && len(c.Addrs) > 1 {
		o.IsClusterMode, o.Addrs, o.Username, o.Password, o.TLSConfig = true, c.Addrs, c.Username, c.Password, c.TLSConfig
	} else if c, err := redis.ParseURL(value); err == nil && c.Network == "tcp" {
		o.Addrs, o.DB, o.Username, o.Password, o.TLSConfig = []string{c.Addr}, c.DB, c.Username, c.Password, c.TLSConfig
	} else if value != "" {
		e.fault("REDIS_URL", "must be a Redis URL, redis://user:password@host:port, or rediss:// for TLS")
	}
	return o
}

// secrets reads the four secrets. They all differ: else a token of one kind would pass for the other.
func (e *environment) secrets(c *config) {
	var values [4][]byte
	for i, name := range []string{"JWT_SECRET", "JWT_REFRESH_SECRET", "JWT_SECRET_PREVIOUS", "JWT_REFRESH_SECRET_PREVIOUS"} {
		value := e.getenv(name)
		switch {
		case value == "" && i >= 2: // there was none before
		case value == "" && e.dev:
			value, c.randomSecrets = rand.Text()+rand.Text(), true
		case value == "":
			e.fault(name, "is required")
		case utf8.RuneCountInString(value) < 32:
			e.fault(name, "must be at least 32 characters")
		case slices.ContainsFunc(values[:i], func(other []byte) bool { return string(other) == value }):
			e.fault(name, "must differ from the other secrets")
		}
		values[i] = []byte(value)
	}
	c.access, c.refresh = keys{values[0], values[2]}, keys{values[1], values[3]}
}
