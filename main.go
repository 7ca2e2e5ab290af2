// Latchkey is an auth server: signup, login, refresh with rotation, logout, sessions, passwords and
// links by mail over HTTP. Users live in PostgreSQL and sessions in Redis. The server itself keeps
// nothing but mails that it is about to send, so any number of replicas serve side by side.
//
//	main.go        run, serve, wiring, routes, configuration
//	middleware.go  what every request passes; errors become responses here and nowhere else; metrics
//	auth.go        the handlers under /auth, one after the other; passwords
//	jwt.go         signing and verifying HS256 tokens: pure functions
//	store.go       users in PostgreSQL, sessions in Redis (session.lua), migrations (schema.sql)
//	ratelimit.go   limits on requests, failed logins and mails, counted in Redis (ratelimit.lua)
//	mail.go        links by mail: their tokens, the texts (mail.tmpl), the queue, SMTP
//	admin.go       the operator's subcommands: accounts
//
// # A request
//
// A request passes observe, closeWhenDraining, matchRoute, cors, rateLimit and refuseUnknown. Then
// the mux calls the route, where the request passes refuseCrossOrigin and, if it needs an access
// token, requireAuth. The handler reads the body, decides, asks the stores and answers. If it
// returns an error, handle answers that.
//
// One deadline covers all that a request waits for: the stores, and a slot for hashing. If the
// client hangs up, the server still finishes what it has begun. All deadlines, pool sizes and
// retries of requests are in one place in main.go, each with its reason.
//
// # A session
//
// A session is a key in Redis that names the only refresh token it accepts. A refresh exchanges
// that token for the next one in a single script. So of any number of simultaneous refreshes, on
// any number of replicas, exactly one wins. If an exchanged token is used again within the leeway,
// two clients have raced, and the token is refused. If it is used again later, it counts as stolen,
// and the session ends. An access token names its session, and is refused when that has ended. A
// session id is never used twice, so a session that has ended never comes back.
//
// A session is bound to a digest of the password hash that it was opened with. A login takes a
// share lock on the user's row, reads the hash again, and opens its session only if the hash is
// still the one that the password matched. A password change ends the other sessions while it holds
// the exclusive lock on that row, so it leaves no session of the old password. An operator disables
// a user in the same way. If the row is changed otherwise, for example by plain SQL, a session ends
// at its next refresh.
//
// # A link by mail
//
// A link carries a signed statement: for which user and address it is, what it may be used for, and
// until when. Nothing is stored. A link that resets a password or changes an address is also bound
// to a digest of the user's password hash and address. Using it changes these, so it works once. No
// link opens a session.
//
// Mails wait in a bounded queue in memory. POST /auth/password/forgot only adds the address to that
// queue, and the worker behind it looks for the user. So the answer is the same, in the same time,
// for any address.
//
// # Words
//
//	shown     the refresh token in the request's cookie
//	exchange  to replace a session's refresh token by the next one; a token works for one exchange
//	leeway    the time after its exchange in which a token that is shown again counts as a race
//	grant     a refresh token that a session accepts, with its times
//	digest    a short form of a password hash; a session is bound to one
//	stale     said of a password hash that has been replaced since it was read
//	judge     to find out whether a password is right
//	give back to take an event off a counter again
//
// # What is defended against
//
//	guessing        bcrypt; limits per account, per address, and per pair; no common passwords
//	enumeration     login and forgot answer unknown and known emails alike, in the same time
//	stolen refresh  rotation and reuse detection; a cookie that is HttpOnly and SameSite
//	forged tokens   one algorithm, one header, one spelling; the signature is checked first
//	CSRF            SameSite; Origin and Sec-Fetch-Site are checked
//	floods          a limit per address; as many hashing slots as processors; everything is bounded
//	outages         a store that does not answer means 503, never a request let through unchecked
//
// A stolen access token works until it expires or its session ends. Whoever controls the stores
// controls the sessions, and whoever reads a user's mail controls the account.
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
	"net/mail"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
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
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
	"golang.org/x/crypto/bcrypt"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run executes a subcommand, by default serve, until it is done or ctx ends.
func run(
	ctx context.Context,
	args []string,
	getenv func(name string) string,
	stdout, stderr io.Writer,
) error {
	logging.Disable() // the log of go-redis; what fails is an error, which has its cause
	env := newEnvironment(getenv)
	if len(args) > 0 {
		switch args[0] {
		case "user":
			return runUser(ctx, env, args[1:], stdout, stderr)
		case "users":
			return runUsers(ctx, env, args[1:], stdout, stderr)
		}
	}
	switch strings.Join(args, " ") {
	case "", "serve":
		return runServe(ctx, env, stdout)
	case "migrate":
		return runMigrations(ctx, env, stdout, migrate)
	case "migrate status":
		return runMigrations(ctx, env, stdout, migrationStatus)
	case "healthcheck":
		return runHealthcheck(env)
	case "version":
		return runVersion(stdout)
	default:
		return usageError(stderr, args...)
	}
}

const usage = `usage: latchkey [serve | migrate | migrate status | healthcheck | version]
       latchkey user EMAIL [show | disable | enable | revoke | delete | reset-link] [--json]
       latchkey users [PREFIX] [--json]`

// usageError prints the subcommands, and returns an error about arguments that are none of them.
func usageError(stderr io.Writer, args ...string) error {
	fmt.Fprintln(stderr, usage)
	return fmt.Errorf("not understood: latchkey %s", strings.Join(args, " "))
}

func runServe(ctx context.Context, env *environment, stdout io.Writer) error {
	cfg := env.config()
	if err := env.err(); err != nil {
		return err
	}
	return serve(ctx, cfg, stdout)
}

// runMigrations calls do, which is migrate or migrationStatus, and prints the steps.
func runMigrations(
	ctx context.Context,
	env *environment,
	stdout io.Writer,
	do func(context.Context, *pgx.ConnConfig, string) ([]migration, error),
) error {
	database := env.databaseURL()
	if err := env.err(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, migrationTimeout)
	defer cancel()
	steps, err := do(ctx, database.ConnConfig, schemaSQL)
	for _, step := range steps {
		applied := "pending"
		if !step.AppliedAt.IsZero() {
			applied = step.AppliedAt.UTC().Format(time.RFC3339)
		}
		fmt.Fprintf(stdout, "%s  %-20s  %s\n", step.Version, applied, step.Name)
	}
	return err
}

// runHealthcheck asks the server on this host whether it is ready. The image uses it as its health
// check, because it has no shell and no curl.
func runHealthcheck(env *environment) error {
	port := env.port()
	if err := env.err(); err != nil {
		return err
	}
	client := http.Client{Timeout: healthcheckTimeout}
	resp, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/readyz", port))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func runVersion(stdout io.Writer) error {
	build, _ := debug.ReadBuildInfo() // every binary of a module has it
	_, err := fmt.Fprintln(stdout, "latchkey", build.Main.Version, build.GoVersion)
	return err
}

// Deadlines, pools and retries. A request is answered within 5 s of its headers being read. If a
// store is silent, the answer comes within 1 s of asking Redis, or 2 s of asking PostgreSQL.

const (
	// requestTimeout bounds all that a request waits for, from its headers on: the stores, and a
	// slot for hashing. The time that two hashes take is added (see hashTime): most requests
	// compute no more, and the operator chooses their cost. After the deadline there is only
	// undoTimeout. That makes 4.25 s at the default cost. The rest of the 5 s is for a busy
	// machine, where a hash takes longer. If the body is late, it leaves less time for the rest.
	requestTimeout = 3500 * time.Millisecond

	// defaultHashTime is about what one hash takes at the cost of defaultBcryptCost, on a machine
	// that is not busy.
	defaultHashTime = 250 * time.Millisecond

	// undoTimeout bounds what is still done after the deadline of a request: an attempt to log in
	// that could not be judged is given back.
	undoTimeout = 250 * time.Millisecond

	// postgresTimeout bounds one operation on PostgreSQL: waiting for a connection, making one, and
	// a whole transaction. The slowest that is of use is a commit on a busy disk.
	postgresTimeout = 1500 * time.Millisecond

	// operatorTimeout is postgresTimeout for the operator's subcommands. If many devices log in to
	// one account, disabling it waits longer for the row than a request could.
	operatorTimeout = 10 * time.Second

	// postgresPingTimeout bounds the question whether a connection is alive, which the pool asks
	// before it gives one away that was idle for a second. If the server is silent, there is still
	// time to connect to another one.
	postgresPingTimeout = 500 * time.Millisecond

	// postgresCloseTimeout bounds the last step of closing a connection whose operation has timed
	// out, which is to say goodbye. Before that, pgx asks the server to cancel the operation, which
	// takes at most two times the timeout for connecting. Until both are over, the connection
	// occupies its place in the pool. pgx would allow 15 s.
	postgresCloseTimeout = 300 * time.Millisecond

	// redisTimeout bounds each dial, write and read. A script takes well under 10 ms, so this is
	// time for the network to send a lost packet again.
	redisTimeout = 700 * time.Millisecond

	// redisPoolTimeout bounds the wait for a connection to Redis. If Redis is silent, a request
	// waits for a connection and then for an answer, and both together take less than a second.
	redisPoolTimeout = 175 * time.Millisecond

	// redisPoolSize is the number of connections to Redis, for each node of a cluster. A connection
	// is busy for less than a millisecond, so few requests wait for one. If a node is silent, these
	// are also the requests that wait for it at the same time.
	redisPoolSize = 100

	// redisMapInterval is how old the client's map of a cluster's slots gets before a request, for
	// example one to /readyz, makes it load the map again. So a replica of the server that has had
	// no users for a while learns of a new master, too. Sentinels are asked at the same interval,
	// even without requests.
	redisMapInterval = time.Second

	// sentinelTimeout bounds asking all sentinels which Redis is the master. Requests wait for that
	// only until the first answer after the start. Later it delays how soon the client follows a
	// failover if one of the sentinels is silent.
	sentinelTimeout = 250 * time.Millisecond

	// redisPipelinePoolSize turns off a second pool, which commands would wait for as well.
	redisPipelinePoolSize = -1

	// redisRetries and redisRedirects keep the Redis client from sending a command again. One that
	// counts or rotates may have been executed although its answer was lost. redisDials is the
	// number of tries to connect.
	redisRetries   = -1
	redisRedirects = -1
	redisDials     = 1

	// mailQueue bounds how many mails may wait for their text, and apart from them how many for the
	// mail server. Each takes about 10 KB. It is more than a healthy mail server ever lets wait.
	mailQueue = 1000

	// mailSenders is how many mails are sent at the same time.
	mailSenders = 2

	// mailTimeout bounds one try to write or to send a mail. Some mail servers let a client wait
	// for 20 s before they greet it, and look at a mail for as long before they accept it. If they
	// are given up too early, the mail arrives twice.
	mailTimeout = time.Minute

	// mailMaxAge is how old a mail may get before it is not sent any more. If the mail server is so
	// slow, a link to reset a password has lost half of its time.
	mailMaxAge = resetLifetime / 2

	// mailFirstPause and mailSecondPause are the times from one of the three tries to send a mail
	// to the next. The first is short, because a user waits for the mail. Both together are longer
	// than the five minutes for which many mail servers turn unknown clients away (greylisting).
	mailFirstPause  = 5 * time.Second
	mailSecondPause = 5 * time.Minute

	// mailWritePause is the time from one of the three tries to write a mail to the next, if a
	// store does not answer. It is short, because the mail takes a place in the queue meanwhile,
	// and others are refused when that is full.
	mailWritePause = 10 * time.Second

	// hashWait is the longest wait for a hashing slot. A user would hardly wait longer.
	hashWait = 2 * time.Second

	// hashQueue bounds how many requests wait for a slot, and so the memory that they take. It is
	// about what a machine with 32 processors can hash within hashWait.
	hashQueue = 256

	// startTimeout bounds how long the start tries to reach PostgreSQL. The contract says 30 s.
	startTimeout = 30 * time.Second

	// startPause is the time from one try to the next, each of which is a line in the log.
	startPause = time.Second

	// migrationTimeout bounds all migrations together. Building an index on an adopted table with
	// a few hundred million rows takes minutes.
	migrationTimeout = 10 * time.Minute

	// readTimeout bounds the time in which headers and body arrive. The largest body that is of use
	// is about 2 KB long.
	readTimeout = 4 * time.Second

	// writeTimeout bounds the time from a request's headers to the end of its answer. It has room
	// for hashes of the highest cost.
	writeTimeout = 20 * time.Second

	// idleTimeout bounds the time between two requests on a connection. It is longer than the
	// minute or so for which proxies keep theirs, so that the proxy is the one to close.
	idleTimeout = 2 * time.Minute

	// closePause is the time from closing the listener to closing the connections. It lets requests
	// that are just arriving be read, because net/http drops those once it is shutting down.
	closePause = 100 * time.Millisecond

	// healthcheckTimeout bounds the subcommand healthcheck. It is more than a server takes to find
	// out that both stores are silent.
	healthcheckTimeout = 3 * time.Second
)

const (
	// maxHeaderBytes leaves room for two tokens of 4 KB and the headers of a browser.
	maxHeaderBytes = 16 << 10

	// sendBuffer bounds what the kernel holds of answers that a client does not read. A list of 100
	// sessions has about 44 KB, so it goes out at once even if the client reads slowly. Without
	// this bound the kernel holds 4 MB for each connection: thousands of answers to a client that
	// sends requests and reads nothing, and each of these requests sets the write deadline anew.
	sendBuffer = 64 << 10
)

// hashTime returns about how long a password hash takes. Each step of the cost doubles it. Cheaper
// hashes than the default do not count less.
func hashTime(bcryptCost int) time.Duration {
	return defaultHashTime << max(0, bcryptCost-defaultBcryptCost)
}

// Serving

// doubleThreads doubles GOMAXPROCS once, and returns how many processors the process can use.
// Hashing may occupy as many threads as there are processors, and Go lets a hashing goroutine keep
// its thread for 10 ms at a time. The other half of the threads is then still free for short
// requests, and the kernel shares the processors fairly between all threads.
var doubleThreads = sync.OnceValue(func() int {
	n := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(2 * n)
	return n
})

// serve migrates, serves until ctx ends, and then shuts down.
func serve(ctx context.Context, cfg config, stdout io.Writer) error {
	log := newLogger(cfg.development, cfg.logLevel, stdout)
	if cfg.randomSecrets {
		log.Warn("JWT_SECRET or JWT_REFRESH_SECRET is not set: " +
			"random ones are used, and sessions end with this process")
	}
	err := migrateWhenReachable(ctx, cfg.database.ConnConfig, log)
	if err != nil || ctx.Err() != nil {
		return err
	}
	// The pool must outlive ctx, because requests in flight still need it.
	db, err := pgxpool.NewWithConfig(context.WithoutCancel(ctx), cfg.database)
	if err != nil {
		return err
	}
	defer db.Close()
	rdb := newRedisClient(cfg.redis)
	defer rdb.Close()
	app, err := newApp(cfg, log, db, rdb)
	if err != nil {
		return err
	}

	go app.mails.check()
	failed := make(chan error, 2)
	server := newServer(app.handler, log)
	defer server.Close()
	listener, err := listen(server, "PORT", ":"+strconv.Itoa(cfg.port), log, failed)
	if err != nil {
		return err
	}
	if cfg.metricsAddr != "" {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", app.metrics)
		metricsServer := newServer(mux, log)
		defer metricsServer.Close()
		_, err := listen(metricsServer, "METRICS_ADDR", cfg.metricsAddr, log, failed)
		if err != nil {
			return err
		}
	}
	select {
	case err = <-failed:
	case <-ctx.Done():
		log.Info("shutting down")
		app.draining.Store(true)
		// Everything is still served. Meanwhile proxies see /readyz fail, and send no more.
		time.Sleep(cfg.shutdownDelay)
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.shutdownTimeout)
	defer cancel()
	err = errors.Join(err, shutDown(ending, server, listener))
	app.mails.drain(ending)
	return err
}

// shutDown closes the listener, and waits until the requests in flight have been answered. It
// returns an error if ctx ends before.
func shutDown(ctx context.Context, server *http.Server, listener net.Listener) error {
	_ = listener.Close()
	time.Sleep(closePause)
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("requests cut off after SHUTDOWN_TIMEOUT: %v", err)
	}
	return nil
}

// migrateWhenReachable migrates as soon as PostgreSQL can be reached. It begins no try later than
// startTimeout, and logs each that fails. It returns nil if ctx ends meanwhile.
func migrateWhenReachable(ctx context.Context, database *pgx.ConnConfig, log *slog.Logger) error {
	migrating, cancel := context.WithTimeout(ctx, migrationTimeout)
	defer cancel()
	pause := time.NewTicker(startPause)
	defer pause.Stop()
	start := time.Now()
	for {
		_, err := migrate(migrating, database, schemaSQL)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, errUnavailable) || time.Since(start) > startTimeout {
			return err
		}
		log.Warn("waiting for PostgreSQL", "error", err.Error())
		select {
		case <-pause.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// newRedisClient returns a client for a single Redis, a cluster, or the master that sentinels name.
func newRedisClient(options *redis.UniversalOptions) redis.UniversalClient {
	switch {
	case options.MasterName != "":
		watchers := newSentinels(options, sentinelTimeout)
		clusterOptions := options.Cluster()
		clusterOptions.Addrs = nil // these are the sentinels
		clusterOptions.ClusterSlots = watchers.slots
		if options.DB != 0 {
			clusterOptions.OnConnect = func(ctx context.Context, conn *redis.Conn) error {
				return conn.Select(ctx, options.DB).Err()
			}
		}
		return followMaster(newClusterClient(clusterOptions), watchers, redisMapInterval)
	case options.IsClusterMode:
		return newClusterClient(options.Cluster())
	default:
		return redis.NewClient(options.Simple())
	}
}

// newClusterClient returns a client for a Redis Cluster.
func newClusterClient(options *redis.ClusterOptions) *redis.ClusterClient {
	// Without this, the client asks for the list of all commands before it sends its first one.
	// That takes up to 5 s, which no deadline of ours bounds.
	options.DisableRoutingPolicies = true
	options.ClusterStateReloadInterval = redisMapInterval
	cluster := redis.NewClusterClient(options)
	cluster.AddHook(reloadHook{cluster})
	return cluster
}

// newServer returns an HTTP server with bounded resources.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:                      h,
		DisableGeneralOptionsHandler: true, // so that "OPTIONS *" is answered like anything else
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			_ = conn.(*net.TCPConn).SetWriteBuffer(sendBuffer) // it fails if the client is gone
			return ctx
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// listen returns a listener on which it serves in the background. variable is the name of the
// variable that addr comes from. If serving ends, listen sends the reason to failed.
func listen(
	server *http.Server,
	variable, addr string,
	log *slog.Logger,
	failed chan<- error,
) (net.Listener, error) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %v", variable, err)
	}
	log.Info("listening", "addr", listener.Addr().String(), "for", variable)
	go func() { failed <- server.Serve(listener) }()
	return listener, nil
}

// newLogger returns a logger that writes JSON, or text in development. Its times are in UTC.
func newLogger(development bool, level slog.Level, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 {
				a.Value = slog.TimeValue(a.Value.Time().UTC())
			}
			return a
		},
	}
	if development {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// Wiring

// app is the finished server, without its listeners.
type app struct {
	handler  http.Handler
	metrics  *metrics
	mails    *mailer
	draining *atomic.Bool // set when the process is about to stop
}

// newApp connects the parts of the server.
func newApp(
	cfg config,
	log *slog.Logger,
	db *pgxpool.Pool,
	rdb redis.UniversalClient,
) (*app, error) {
	h, err := newHasher(doubleThreads(), cfg.bcryptCost, hashLimits{
		queue: hashQueue,
		wait:  hashWait,
		takes: hashTime(cfg.bcryptCost),
	})
	if err != nil {
		return nil, err
	}
	s := &store{
		db:              db,
		rdb:             rdb,
		policy:          cfg.sessions,
		postgresTimeout: postgresTimeout,
	}
	mails := newMailer(mailPartsOf(cfg, log, s, rdb))
	m := newMetrics(func() []sample {
		return slices.Concat(
			hashingSamples(h),
			storeSamples(db, rdb),
			processSamples(),
			mailSamples(mails),
		)
	})
	draining := &atomic.Bool{}
	handlers := &auth{
		store: s,
		logins: &loginLimiter{
			window:      fixedWindow{rdb, cfg.loginWindow},
			max:         cfg.loginMax,
			undoTimeout: undoTimeout,
		},
		hasher:       h,
		mails:        mails,
		links:        cfg.links,
		metrics:      m,
		log:          log,
		access:       cfg.access,
		refresh:      cfg.refresh,
		accessTTL:    cfg.accessTTL,
		secureCookie: !cfg.development,
		sameSite:     cfg.sameSite,
	}
	table := routes(handlers, s, draining)
	if mails.isOn() {
		table = append(table, mailRoutes(handlers)...)
	}
	return &app{
		handler:  newRoot(cfg, log, m, rdb, draining, table),
		metrics:  m,
		mails:    mails,
		draining: draining,
	}, nil
}

// newRoot returns the handler of all requests.
func newRoot(
	cfg config,
	log *slog.Logger,
	m *metrics,
	rdb redis.UniversalClient,
	draining *atomic.Bool,
	table []route,
) http.Handler {
	requests := &requestLimiter{
		window: fixedWindow{rdb, cfg.rateWindow},
		max:    cfg.rateMax,
	}
	mux := newMux(table, refuseCrossOrigin(cfg.origins))
	pass := chain(
		observe(log, m, cfg.trustedProxies, requestTimeout+2*hashTime(cfg.bcryptCost)),
		closeWhenDraining(draining),
		matchRoute(mux),
		cors(cfg.origins),
		rateLimit(requests, m),
		refuseUnknown,
	)
	return pass(mux)
}

// mailPartsOf connects the parts of the mailer.
func mailPartsOf(cfg config, log *slog.Logger, s *store, rdb redis.UniversalClient) mailParts {
	return mailParts{
		transport: cfg.mail.transport(log),
		users:     s,
		limiter:   &mailLimiter{fixedWindow{rdb, mailWindow}},
		links:     cfg.links,
		texts:     cfg.mail.texts,
		site:      cfg.mail.site,
		log:       log,
		limits: mailLimits{
			queue:       mailQueue,
			senders:     mailSenders,
			timeout:     mailTimeout,
			age:         mailMaxAge,
			writePauses: []time.Duration{mailWritePause, mailWritePause},
			sendPauses:  []time.Duration{mailFirstPause, mailSecondPause},
		},
	}
}

// route is one row of the table of routes.
type route struct {
	method  string
	path    string
	handler handlerFunc
}

// routes returns the routes that every server has.
func routes(a *auth, s *store, draining *atomic.Bool) []route {
	return []route{
		{"POST", "/auth/signup", a.signup},
		{"POST", "/auth/login", a.login},
		{"POST", "/auth/refresh", a.refreshTokens},
		{"POST", "/auth/logout", a.logout},
		{"GET", "/auth/me", a.requireAuth(a.me)},
		{"DELETE", "/auth/me", a.requireAuth(a.deleteAccount)},
		{"GET", "/auth/sessions", a.requireAuth(a.listSessions)},
		{"DELETE", "/auth/sessions", a.requireAuth(a.revokeSessions)},
		{"DELETE", "/auth/sessions/{id}", a.requireAuth(a.revokeSession)},
		{"PUT", "/auth/password", a.requireAuth(a.changePassword)},
		{"POST", "/auth/password/reset", a.resetPassword},
		{"GET", "/healthz", healthz},
		{"GET", "/readyz", readyz(s, draining)},
	}
}

// mailRoutes returns the routes of a server that sends mails. Links to reset a password can also
// come from an operator, so their route is not among these.
func mailRoutes(a *auth) []route {
	return []route{
		{"POST", "/auth/password/forgot", a.forgotPassword},
		{"POST", "/auth/email/verification", a.requireAuth(a.sendVerification)},
		{"POST", "/auth/email/verify", a.verifyEmail},
		{"PUT", "/auth/email", a.requireAuth(a.changeEmail)},
	}
}

// newMux returns a mux with the routes. pass wraps the handler of each. For every path it also adds
// a handler that answers other methods with 405 and Allow (RFC 9110 section 15.5.6).
func newMux(table []route, pass middleware) *http.ServeMux {
	mux := http.NewServeMux()
	allowed := map[string][]string{}
	for _, row := range table {
		mux.Handle(row.method+" "+row.path, pass(handle(row.handler)))
		allowed[row.path] = append(allowed[row.path], row.method)
		if row.method == http.MethodGet {
			allowed[row.path] = append(allowed[row.path], http.MethodHead)
		}
	}
	for path, methods := range allowed {
		slices.Sort(methods)
		mux.Handle(path, handle(func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Allow", strings.Join(methods, ", "))
			return errMethodNotAllowed
		}))
	}
	return mux
}

// refuseUnknown answers requests without a route, which the mux would answer in plain text or with
// a redirect. It relies on matchRoute.
func refuseUnknown(next http.Handler) http.Handler {
	return handle(func(w http.ResponseWriter, r *http.Request) error {
		if r.Pattern == "" {
			return errNotFound
		}
		next.ServeHTTP(w, r)
		return nil
	})
}

// healthAnswer is the answer of /healthz and, with the stores, of /readyz.
type healthAnswer struct {
	Status   string `json:"status"`
	Postgres string `json:"postgres,omitempty"`
	Redis    string `json:"redis,omitempty"`
}

// healthz answers as long as the process serves.
func healthz(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, healthAnswer{Status: "ok"})
}

// readyz answers 200 as long as both stores take writes and the process is not shutting down.
func readyz(s *store, draining *atomic.Bool) handlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		var postgresErr, redisErr error
		var checks sync.WaitGroup
		checks.Go(func() { postgresErr = s.postgresReady(r.Context()) })
		checks.Go(func() { redisErr = s.redisReady(r.Context()) })
		checks.Wait()
		answer := healthAnswer{
			Status:   "ok",
			Postgres: availability(postgresErr),
			Redis:    availability(redisErr),
		}
		if postgresErr == nil && redisErr == nil && !draining.Load() {
			return writeJSON(w, http.StatusOK, answer)
		}
		cause := errors.Join(postgresErr, redisErr)
		if cause == nil {
			cause = errors.New("shutting down")
		}
		infoOf(r).err = fmt.Errorf("%w: not ready: %v", errUnavailable, cause)
		answer.Status = "unavailable"
		w.Header().Set("Retry-After", "1")
		return writeJSON(w, http.StatusServiceUnavailable, answer)
	}
}

func availability(err error) string {
	if err != nil {
		return "unavailable"
	}
	return "ok"
}

// hashingSamples reads the metrics about hashing.
func hashingSamples(h *hasher) []sample {
	return []sample{
		{
			series: "latchkey_hashing_slots",
			help:   "Passwords that can be hashed at the same time.",
			value:  float64(cap(h.slots)),
		},
		{
			series: "latchkey_hashing_slots_in_use",
			help:   "Passwords that are being hashed.",
			value:  float64(len(h.slots)),
		},
		{
			series: "latchkey_hashing_waiting",
			help:   "Requests that wait for a hashing slot.",
			value:  float64(h.waiting.Load()),
		},
		{
			series: "latchkey_hashing_refused_total",
			help:   "Requests refused because no hashing slot came free in time.",
			value:  float64(h.refused.Load()),
		},
	}
}

// storeSamples reads the metrics about the connections to the stores.
func storeSamples(db *pgxpool.Pool, rdb redis.UniversalClient) []sample {
	postgres := db.Stat()
	connections := rdb.PoolStats()
	return []sample{
		{
			series: `latchkey_postgres_connections{state="idle"}`,
			help:   "Connections to PostgreSQL.",
			value:  float64(postgres.IdleConns()),
		},
		{
			series: `latchkey_postgres_connections{state="in_use"}`,
			value:  float64(postgres.AcquiredConns()),
		},
		{
			series: "latchkey_postgres_connections_max",
			help:   "Connections to PostgreSQL that there can be.",
			value:  float64(postgres.MaxConns()),
		},
		{
			series: "latchkey_postgres_waits_total",
			help:   "Operations that had to wait for a connection to PostgreSQL.",
			value:  float64(postgres.EmptyAcquireCount() + postgres.CanceledAcquireCount()),
		},
		{
			series: `latchkey_redis_connections{state="idle"}`,
			help:   "Connections to Redis.",
			value:  float64(connections.IdleConns),
		},
		{
			series: `latchkey_redis_connections{state="open"}`,
			value:  float64(connections.TotalConns),
		},
		{
			series: "latchkey_redis_timeouts_total",
			help:   "Operations that got no connection to Redis in time, because all were busy.",
			value:  float64(connections.Timeouts),
		},
	}
}

// processSamples reads the metrics about the process.
func processSamples() []sample {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	return []sample{
		{
			series: "go_goroutines",
			help:   "Goroutines that exist.",
			value:  float64(runtime.NumGoroutine()),
		},
		{
			series: "go_memstats_sys_bytes",
			help:   "Bytes of memory obtained from the system.",
			value:  float64(memory.Sys),
		},
	}
}

// mailSamples reads the counters of the mails.
func mailSamples(mails *mailer) []sample {
	var samples []sample
	for _, outcome := range mailOutcomes {
		s := sample{
			series: fmt.Sprintf("latchkey_mail_total{outcome=%q}", outcome),
			value:  float64(mails.outcomes[outcome].Load()),
		}
		if len(samples) == 0 {
			s.help = "Mails and tries to send them, by outcome."
		}
		samples = append(samples, s)
	}
	return samples
}

// Configuration

// config is the validated configuration.
type config struct {
	development     bool
	port            int
	database        *pgxpool.Config
	redis           *redis.UniversalOptions
	origins         []string
	access          keys
	refresh         keys
	randomSecrets   bool
	accessTTL       time.Duration
	sessions        sessionPolicy
	rateMax         int
	rateWindow      int // seconds
	loginMax        int
	loginWindow     int // seconds
	sameSite        http.SameSite
	trustedProxies  []netip.Prefix
	bcryptCost      int
	mail            mailConfig
	links           links
	metricsAddr     string // empty: no metrics
	logLevel        slog.Level
	shutdownDelay   time.Duration // how long /readyz says 503 while all is still served
	shutdownTimeout time.Duration // how long requests in flight may then take
}

// environment reads variables and collects their faults, so that all of them are reported at once.
// A fault names its variable and never shows its value.
type environment struct {
	getenv      func(name string) string
	development bool
	faults      []error
}

func newEnvironment(getenv func(name string) string) *environment {
	return &environment{
		getenv:      getenv,
		development: getenv("NODE_ENV") == "development",
	}
}

// err returns all faults, one per line.
func (e *environment) err() error {
	return errors.Join(e.faults...)
}

func (e *environment) fault(name, format string, args ...any) {
	e.faults = append(e.faults, fmt.Errorf(name+": "+format, args...))
}

// required returns a variable that only development has a default for.
func (e *environment) required(name, developmentValue string) string {
	value := e.getenv(name)
	if value == "" && e.development {
		return developmentValue
	}
	if value == "" {
		e.fault(name, "is required")
	}
	return value
}

// oneOf returns a variable that must be one of these words. The first word is the default.
func (e *environment) oneOf(name string, words ...string) string {
	word := cmp.Or(e.getenv(name), words[0])
	if !slices.Contains(words, word) {
		e.fault(name, "must be one of %s", strings.Join(words, ", "))
	}
	return word
}

// integer reads a value that must be a whole number from low to high. It does not report an empty
// value, because required has already done so.
func (e *environment) integer(name, value string, low, high int) int {
	if value == "" {
		return 0
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < low || n > high {
		e.fault(name, "must be a whole number from %d to %d", low, high)
	}
	return n
}

// count returns a variable that must be a whole number of at least low.
func (e *environment) count(name, defaultValue string, low int) int {
	return e.integer(name, cmp.Or(e.getenv(name), defaultValue), low, math.MaxInt32)
}

// duration returns a variable that must be a Go duration of at least low, and a multiple of step.
func (e *environment) duration(name, defaultValue string, low, step time.Duration) time.Duration {
	d, err := time.ParseDuration(cmp.Or(e.getenv(name), defaultValue))
	if err != nil || d < low || d%step != 0 {
		e.fault(name, "must be a duration such as %s, at least %v, in steps of %v",
			defaultValue, low, step)
	}
	return d
}

// lifetime returns a variable that must be a duration in whole seconds, the unit of tokens and of
// Redis.
func (e *environment) lifetime(name, defaultValue string) time.Duration {
	return e.duration(name, defaultValue, time.Second, time.Second)
}

// config reads the whole configuration.
func (e *environment) config() config {
	e.oneOf("NODE_ENV", "production", "staging", "development")
	cfg := config{
		development: e.development,
		port:        e.port(),
		database:    e.database(),
		redis:       e.redis(),
		origins:     e.origins(),
		accessTTL:   e.lifetime("ACCESS_TOKEN_TTL", "15m"),
		sessions: sessionPolicy{
			RefreshTTL: e.lifetime("REFRESH_TOKEN_TTL", "168h"),
			SessionTTL: e.lifetime("SESSION_MAX_TTL", "720h"),
			Leeway:     e.duration("REFRESH_REUSE_LEEWAY", "10s", 0, time.Millisecond),
			Resend:     e.oneOf("REFRESH_REUSE_POLICY", "refuse", "resend") == "resend",
		},
		rateMax:         e.count("RATE_LIMIT_MAX", "100", 0),
		rateWindow:      e.count("RATE_LIMIT_WINDOW", "60", 1),
		loginMax:        e.count("LOGIN_LIMIT_MAX", "10", 0),
		loginWindow:     e.count("LOGIN_LIMIT_WINDOW", "900", 1),
		sameSite:        e.sameSite(),
		trustedProxies:  e.trustedProxies(),
		bcryptCost:      e.bcryptCost(),
		metricsAddr:     e.metricsAddr(),
		logLevel:        e.logLevel(),
		randomSecrets:   e.getenv("JWT_SECRET") == "" || e.getenv("JWT_REFRESH_SECRET") == "",
		shutdownDelay:   e.shutdownDelay(),
		shutdownTimeout: e.duration("SHUTDOWN_TIMEOUT", "10s", time.Millisecond, time.Millisecond),
	}
	cfg.access, cfg.refresh = e.secrets()
	cfg.mail = e.mail(cfg.origins)
	cfg.links = links{
		keys:      linkKeys(cfg.refresh),
		resetURL:  e.page("PASSWORD_RESET_URL", "/reset-password", cfg.origins),
		verifyURL: e.page("EMAIL_VERIFY_URL", "/verify-email", cfg.origins),
	}
	return cfg
}

func (e *environment) port() int {
	return e.integer("PORT", e.required("PORT", "3000"), 0, math.MaxUint16)
}

// database reads DATABASE_URL and DB_POOL_SIZE.
func (e *environment) database() *pgxpool.Config {
	cfg := e.databaseURL()
	size := e.integer("DB_POOL_SIZE", e.required("DB_POOL_SIZE", "10"), 1, math.MaxInt32)
	if cfg != nil {
		cfg.MaxConns = int32(size)
	}
	return cfg
}

// databaseURL reads DATABASE_URL.
func (e *environment) databaseURL() *pgxpool.Config {
	value := e.required("DATABASE_URL", "postgres://localhost:5432/postgres")
	if value == "" {
		return nil
	}
	cfg, err := pgxpool.ParseConfig(value)
	if err != nil || !isServerURL(value, "postgres", "postgresql") {
		e.fault("DATABASE_URL", "must be a PostgreSQL URL, "+
			"postgres://user:password@host:port/database, with the password percent-encoded")
		return nil
	}

	e.statements(cfg.ConnConfig)
	if cfg.HealthCheckPeriod <= 0 {
		e.fault("DATABASE_URL", "pool_health_check_period must be above 0")
	}
	cfg.PingTimeout = postgresPingTimeout
	cfg.ConnConfig.ConnectTimeout = cmp.Or(cfg.ConnConfig.ConnectTimeout, dialTime(cfg.ConnConfig))
	boundClosing(&cfg.ConnConfig.Config)
	params := cfg.ConnConfig.RuntimeParams
	maps.DeleteFunc(params, func(name, _ string) bool {
		return strings.EqualFold(name, "timezone")
	})
	params["timezone"] = "UTC" // an adopted table may have times without a zone, which are in UTC
	params["client_encoding"] = "UTF8"
	return cfg
}

// statements refuses settings for prepared statements with which the server would not work.
func (e *environment) statements(cfg *pgx.ConnConfig) {
	mode := cfg.DefaultQueryExecMode
	switch {
	case mode == pgx.QueryExecModeDescribeExec:
		// This mode takes two round trips. A pooler such as PgBouncer may send the second one to
		// another connection, which then executes the statement of another request.
		e.fault("DATABASE_URL", "default_query_exec_mode must not be describe_exec; "+
			"for PgBouncer it can be exec")
	case mode == pgx.QueryExecModeCacheStatement && cfg.StatementCacheCapacity <= 0:
		e.fault("DATABASE_URL", "statement_cache_capacity must be above 0, "+
			"unless default_query_exec_mode is exec")
	case mode == pgx.QueryExecModeCacheDescribe && cfg.DescriptionCacheCapacity <= 0:
		e.fault("DATABASE_URL", "description_cache_capacity must be above 0, "+
			"unless default_query_exec_mode is exec")
	}
}

// dialTime returns how long connecting to one host may take. It is an equal share of the time for
// an operation, so that hosts that are silent leave time for the last one.
func dialTime(cfg *pgx.ConnConfig) time.Duration {
	type address struct {
		host string
		port uint16
	}
	hosts := map[address]bool{{cfg.Host, cfg.Port}: true}
	for _, fallback := range cfg.Fallbacks { // they include each host once more without TLS
		hosts[address{fallback.Host, fallback.Port}] = true
	}
	return postgresTimeout / time.Duration(len(hosts))
}

// boundClosing makes a connection to a silent server end soon after an operation on it has timed
// out. pgx then makes a second connection, to ask the server to cancel the operation, and waits for
// the end of both.
func boundClosing(cfg *pgconn.Config) {
	dial := cfg.DialFunc
	cfg.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, cfg.ConnectTimeout)
		defer cancel()
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		// Without this, the second connection would have 15 s. AfterConnect takes it off the first.
		_ = conn.SetDeadline(time.Now().Add(cfg.ConnectTimeout))
		return closingConn{conn}, nil
	}
	cfg.AfterConnect = func(_ context.Context, connected *pgconn.PgConn) error {
		return connected.Conn().SetDeadline(time.Time{})
	}
}

// closingConn is a connection whose deadlines are no later than postgresCloseTimeout from now. pgx
// sets a deadline in the future only if it is about to close the connection.
type closingConn struct {
	net.Conn
}

func (c closingConn) SetDeadline(t time.Time) error {
	latest := time.Now().Add(postgresCloseTimeout)
	if t.After(latest) {
		t = latest
	}
	return c.Conn.SetDeadline(t)
}

// isServerURL reports whether a URL has one of the schemes, and no @ except one before its host.
// Any other @ belongs to a password that should be escaped. Without this check, a part of that
// password would be taken for a host or a database name, and would appear in errors.
func isServerURL(value string, schemes ...string) bool {
	scheme, rest, _ := strings.Cut(value, "://")
	userinfo := rest[:max(0, strings.LastIndexByte(rest, '@'))]
	return slices.Contains(schemes, scheme) && !strings.ContainsAny(userinfo, "@/?#")
}

// redis reads REDIS_URL.
func (e *environment) redis() *redis.UniversalOptions {
	options := &redis.UniversalOptions{
		MaxRetries:            redisRetries,
		MaxRedirects:          redisRedirects,
		DialerRetries:         redisDials,
		DialTimeout:           redisTimeout,
		ReadTimeout:           redisTimeout,
		WriteTimeout:          redisTimeout,
		ContextTimeoutEnabled: true, // the deadline of the request holds too
		PoolSize:              redisPoolSize,
		PoolTimeout:           redisPoolTimeout,
		PipelinePoolSize:      redisPipelinePoolSize,
		MaintNotificationsConfig: &maintnotifications.Config{
			Mode: maintnotifications.ModeDisabled,
		},
	}
	value := e.required("REDIS_URL", "redis://localhost:6379")
	if value == "" {
		return options
	}
	failover, failoverErr := parseSentinelURL(value)
	cluster, clusterErr := redis.ParseClusterURL(value)
	single, singleErr := redis.ParseURL(value)
	_, query, _ := strings.Cut(value, "?")
	_, queryErr := url.ParseQuery(query) // go-redis would ignore what it cannot parse
	isURL := isServerURL(value, "redis", "rediss") && queryErr == nil
	switch {
	case isURL && failoverErr == nil && failover.MasterName != "":
		options.MasterName = failover.MasterName
		options.Addrs = failover.SentinelAddrs
		options.DB = failover.DB
		options.Username = failover.Username
		options.Password = failover.Password
		options.SentinelUsername = failover.SentinelUsername
		options.SentinelPassword = failover.SentinelPassword
		options.TLSConfig = failover.TLSConfig
	case isURL && clusterErr == nil && len(cluster.Addrs) > 1:
		options.IsClusterMode = true
		options.Addrs = cluster.Addrs
		options.Username = cluster.Username
		options.Password = cluster.Password
		options.TLSConfig = cluster.TLSConfig
	case isURL && singleErr == nil:
		options.Addrs = []string{single.Addr}
		options.DB = single.DB
		options.Username = single.Username
		options.Password = single.Password
		options.TLSConfig = single.TLSConfig
	default:
		e.fault("REDIS_URL", "must be a Redis URL, redis://user:password@host:port or rediss:// "+
			"for TLS, with the password percent-encoded")
	}
	return options
}

// parseSentinelURL is redis.ParseFailoverURL for a URL whose user and password are those of Redis,
// as they are in the URLs without sentinels. Those of the sentinels are parameters.
func parseSentinelURL(value string) (*redis.FailoverOptions, error) {
	u, err := url.Parse(value)
	if err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, err
	}
	username := query.Get("sentinel_username")
	password := query.Get("sentinel_password")
	query.Del("sentinel_username")
	query.Del("sentinel_password")
	u.RawQuery = query.Encode()
	options, err := redis.ParseFailoverURL(u.String())
	if err != nil {
		return nil, err
	}
	options.Username = options.SentinelUsername
	options.Password = options.SentinelPassword
	options.SentinelUsername = username
	options.SentinelPassword = password
	if options.TLSConfig != nil {
		options.TLSConfig.ServerName = "" // each server has to prove its own name
	}
	return options, nil
}

var (
	// originForm matches an origin in the way browsers write it (RFC 6454 section 6.2).
	originForm = regexp.MustCompile(`^https?://` +
		`(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[1-9][0-9]{0,4})?$`)

	// defaultPort matches an origin with a port that browsers leave out.
	defaultPort = regexp.MustCompile(`^(http://.*):80$|^(https://.*):443$`)
)

// origins reads FRONTEND_URL.
func (e *environment) origins() []string {
	value := e.required("FRONTEND_URL", "http://localhost:5173")
	if value == "" {
		return nil
	}
	var origins []string
	for item := range strings.SplitSeq(value, ",") {
		origin := strings.TrimSuffix(strings.ToLower(strings.TrimSpace(item)), "/")
		if !originForm.MatchString(origin) {
			e.fault("FRONTEND_URL",
				"must be origins such as https://app.example.com, separated by commas")
			return nil
		}
		origins = append(origins, defaultPort.ReplaceAllString(origin, "$1$2"))
	}
	return origins
}

// mailConfig says how mails are sent. If there is no server they are logged in development, and
// elsewhere there are none.
type mailConfig struct {
	server      *smtpServer
	development bool
	from        mail.Address
	texts       mailTexts
	site        string
}

// transport returns what sends the mails, or nil if there are none.
func (c mailConfig) transport(log *slog.Logger) mailTransport {
	switch {
	case c.server != nil:
		return &smtpTransport{server: *c.server, from: c.from}
	case c.development:
		return logTransport{log}
	default:
		return nil
	}
}

// mail reads the variables about mails, except those about links.
func (e *environment) mail(origins []string) mailConfig {
	cfg := mailConfig{
		server:      e.smtpServer(),
		development: e.development,
		from:        e.mailFrom(),
		texts:       e.mailTexts(),
	}
	if len(origins) > 0 {
		_, cfg.site, _ = strings.Cut(origins[0], "://")
	}
	return cfg
}

// smtpServer reads SMTP_URL. It returns nil if that is not set.
func (e *environment) smtpServer() *smtpServer {
	value := e.getenv("SMTP_URL")
	if value == "" {
		return nil
	}
	u, err := url.Parse(value)
	if err != nil || !isServerURL(value, "smtp", "smtps") || !isBare(u) {
		e.fault("SMTP_URL", "must be smtps://user:password@host:465, or smtp:// and port 587 for "+
			"STARTTLS, with user and password percent-encoded")
		return nil
	}
	server := &smtpServer{
		host: u.Hostname(),
		port: cmp.Or(u.Port(), "587"),
		tls:  u.Scheme == "smtps",
		user: u.User.Username(),
	}
	if server.tls {
		server.port = cmp.Or(u.Port(), "465")
	}
	server.password, _ = u.User.Password()
	if strings.ContainsFunc(server.user+server.password, unicode.IsControl) {
		e.fault("SMTP_URL", "must have no control characters in user and password")
	}
	return server
}

// isBare reports whether a URL has a host and, apart from a port and a user with a password,
// nothing more.
func isBare(u *url.URL) bool {
	_, hasPassword := u.User.Password()
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "1"), 10, 16)
	return u.Hostname() != "" &&
		err == nil && port > 0 &&
		hasPassword == (u.User.Username() != "") &&
		(u.Path == "" || u.Path == "/") &&
		u.RawQuery == "" &&
		u.Fragment == ""
}

// mailFrom reads MAIL_FROM.
func (e *environment) mailFrom() mail.Address {
	value := e.getenv("MAIL_FROM")
	if value == "" && e.getenv("SMTP_URL") != "" {
		e.fault("MAIL_FROM", "is required with SMTP_URL")
	}
	from, err := mail.ParseAddress(cmp.Or(value, "Latchkey <latchkey@localhost>"))
	if err != nil || !isPlainAddress(from.Address) || !isASCII(from.Address) {
		e.fault("MAIL_FROM", "must be an address such as Example <auth@example.com>, in ASCII")
		return mail.Address{}
	}
	return *from
}

// mailTexts reads the file that MAIL_TEMPLATES names, or else mail.tmpl.
func (e *environment) mailTexts() mailTexts {
	text := mailTemplates
	if name := e.getenv("MAIL_TEMPLATES"); name != "" {
		data, err := os.ReadFile(name)
		if err != nil {
			e.fault("MAIL_TEMPLATES", "the file cannot be read: %v", errors.Unwrap(err))
			return mailTexts{}
		}
		text = string(data)
	}
	texts, err := parseMailTexts(text)
	if err != nil {
		e.fault("MAIL_TEMPLATES", "%v", err)
	}
	return texts
}

// page reads the URL of a page of the frontend. By default it is a path at the first origin.
func (e *environment) page(name, path string, origins []string) string {
	value := e.getenv(name)
	if value == "" && len(origins) > 0 {
		return origins[0] + path
	}
	u, err := url.Parse(value)
	isPage := err == nil &&
		(u.Scheme == "https" || u.Scheme == "http") &&
		u.Hostname() != "" &&
		u.User == nil &&
		u.String() == value && // nothing in it ends a link in a mail
		!strings.Contains(value, "#")
	if value != "" && !isPage {
		e.fault(name, "must be the URL of a page without #, such as https://app.example.com%s",
			path)
	}
	return value
}

// resetLinks reads what an operator's links to reset a password need. Unlike a server, it takes no
// random secret in development, since no server would know it.
func (e *environment) resetLinks() links {
	const name = "JWT_REFRESH_SECRET"
	secret := e.secret(name, e.getenv(name))
	if len(secret) == 0 {
		e.fault(name, "is required, and must be the server's")
	}
	var origins []string
	if e.getenv("PASSWORD_RESET_URL") == "" {
		origins = e.origins()
	}
	return links{
		keys:     linkKeys(keys{current: secret}),
		resetURL: e.page("PASSWORD_RESET_URL", "/reset-password", origins),
	}
}

func (e *environment) sameSite() http.SameSite {
	switch e.oneOf("COOKIE_SAMESITE", "strict", "lax", "none") {
	case "lax":
		return http.SameSiteLaxMode
	case "none":
		if e.development {
			e.fault("COOKIE_SAMESITE",
				"none needs a secure cookie, which development does not set")
		}
		return http.SameSiteNoneMode
	default:
		return http.SameSiteStrictMode
	}
}

func (e *environment) trustedProxies() []netip.Prefix {
	separator := func(r rune) bool { return r == ',' || r == ' ' }
	var prefixes []netip.Prefix
	for item := range strings.FieldsFuncSeq(e.getenv("TRUSTED_PROXIES"), separator) {
		prefix, err := netip.ParsePrefix(item)
		if err != nil || prefix.Addr().Is4In6() {
			e.fault("TRUSTED_PROXIES", "must be CIDRs such as 10.0.0.0/8, separated by commas")
			return nil
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}

// defaultBcryptCost is also the lowest cost outside development.
const defaultBcryptCost = 12

// bcryptCost reads BCRYPT_COST. Only in development may hashes be cheap.
func (e *environment) bcryptCost() int {
	lowest := defaultBcryptCost
	if e.development {
		lowest = bcrypt.MinCost
	}
	value := cmp.Or(e.getenv("BCRYPT_COST"), strconv.Itoa(defaultBcryptCost))
	return e.integer("BCRYPT_COST", value, lowest, maxBcryptCost)
}

// shutdownDelay reads SHUTDOWN_DELAY. In development nobody waits for a proxy.
func (e *environment) shutdownDelay() time.Duration {
	defaultValue := "5s"
	if e.development {
		defaultValue = "0s"
	}
	return e.duration("SHUTDOWN_DELAY", defaultValue, 0, time.Millisecond)
}

func (e *environment) metricsAddr() string {
	addr := e.getenv("METRICS_ADDR")
	if _, err := net.ResolveTCPAddr("tcp", addr); addr != "" && err != nil {
		e.fault("METRICS_ADDR", "must be host:port")
	}
	return addr
}

func (e *environment) logLevel() slog.Level {
	var level slog.Level
	word := e.oneOf("LOG_LEVEL", "info", "debug", "warn", "error")
	_ = level.UnmarshalText([]byte(word)) // oneOf has reported a fault
	return level
}

// secrets reads the secrets for access and refresh tokens. In development the current ones have
// random defaults. All must differ, or a token of one kind would be accepted as the other.
func (e *environment) secrets() (access, refresh keys) {
	const (
		current         = "JWT_SECRET"
		currentRefresh  = "JWT_REFRESH_SECRET"
		previous        = "JWT_SECRET_PREVIOUS"
		previousRefresh = "JWT_REFRESH_SECRET_PREVIOUS"
	)
	access.current = e.secret(current, e.required(current, randomSecret()))
	refresh.current = e.secret(currentRefresh, e.required(currentRefresh, randomSecret()), current)
	access.previous = e.secret(previous, e.getenv(previous), current, currentRefresh)
	refresh.previous = e.secret(previousRefresh, e.getenv(previousRefresh),
		current, currentRefresh, previous)
	return access, refresh
}

func randomSecret() string {
	return rand.Text() + rand.Text()
}

// secret checks the value of a secret, which may be empty. It must differ from the variables that
// others names.
func (e *environment) secret(name, value string, others ...string) []byte {
	const minCharacters = 32 // HMAC-SHA-256 needs as many bytes (RFC 7518 section 3.2)
	isTaken := func(other string) bool { return e.getenv(other) == value }
	switch {
	case value == "":
	case utf8.RuneCountInString(value) < minCharacters:
		e.fault(name, "must be at least %d characters", minCharacters)
	case strings.TrimSpace(value) != value:
		e.fault(name, "must not begin or end with white space")
	case slices.ContainsFunc(others, isTaken):
		e.fault(name, "must differ from the other secrets")
	}
	return []byte(value)
}
