package chaos

import (
	"context"
	"errors"
	"maps"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A lab is a server on stores of its own, and a replica without the rate limit. The rate limit
// could hide that what comes after it lets something through.
type lab struct {
	*server
	t             *testing.T
	fault         fault
	unlimited     *server
	pg            *postgres
	redis         *redisNode
	postgresProxy *proxy // the server reaches PostgreSQL and Redis through them
	redisProxy    *proxy // if the fault is one of the network
	heldConns     []*pgx.Conn
}

// limits are the server's settings that let a test reach a limit soon. A rate limit's window is
// longer than a test takes. The pool is large enough for all requests of a test at once.
var limits = vars{
	"RATE_LIMIT_MAX":    "20",
	"RATE_LIMIT_WINDOW": "900",
	"LOGIN_LIMIT_MAX":   strconv.Itoa(loginLimit),
	"DB_POOL_SIZE":      "40",
}

// startLab starts servers with the settings of limits. Their Redis loses nothing when it is killed:
// it writes to its file before it answers, and the operating system lives on.
func startLab(t *testing.T, f fault) *lab {
	startPostgres := startPostgres
	if f.disk {
		startPostgres = startPostgresOnSmallDisk
	}
	l := &lab{
		t:     t,
		fault: f,
		pg:    startPostgres(t, "max_connections=100"),
		redis: startRedis(t, "appendonly yes", "appendfsync no"),
	}
	env := vars{"DATABASE_URL": l.pg.url, "REDIS_URL": l.redis.url}
	if f.proxied {
		l.postgresProxy = startProxy(t, l.pg.url)
		l.redisProxy = startProxy(t, l.redis.url)
		env["DATABASE_URL"] = l.postgresProxy.through(l.pg.url)
		env["REDIS_URL"] = l.redisProxy.through(l.redis.url)
	}
	maps.Copy(env, limits)
	if f.costlyHashes {
		env["BCRYPT_COST"] = "12"
	}
	l.server = startServer(t, env)
	env["RATE_LIMIT_MAX"] = "0"
	l.unlimited = startServer(t, env)
	return l
}

// A fault is one way in which a store breaks.
type fault struct {
	store        string
	name         string
	short        bool          // it is also tried with -short
	proxied      bool          // the server reaches its stores through proxies
	costlyHashes bool          // password hashes cost what they cost in production
	disk         bool          // PostgreSQL has a small disk of its own
	delay        time.Duration // every answer of the store is late by that
	breaks       func(*lab)
	mends        func(*lab)
	limit        time.Duration          // the contract's limit on the time to any answer
	want         func(r route) []string // the outcomes that the contract allows
	after        func(r route) []string // those after the mending; nil if all must succeed
	forgets      bool                   // the counters of the limits are lost
}

func (f fault) String() string { return f.store + " " + f.name }

// concerns tells whether a route asks a store that the fault breaks.
func (f fault) concerns(r route) bool {
	return f.store != "PostgreSQL" && asksRedis(r) || f.store != "Redis" && asksPostgres(r)
}

// The limits on the time to an answer that the contract names.
const (
	redisLimit    = time.Second
	postgresLimit = 2 * time.Second
	requestLimit  = 5 * time.Second
)

var (
	good          = []string{"ok"}
	unavailable   = []string{"503 unavailable"}
	goodOr503     = []string{"ok", "503 unavailable"}
	nothing       = func(*lab) {}
	thawsRedis    = func(l *lab) { l.redis.thaw() }
	restartsRedis = func(l *lab) { l.redis.restart() }
	slowsRedis    = func(l *lab) { l.redisProxy.slow(l.fault.delay) }
	slowsPostgres = func(l *lab) { l.postgresProxy.slow(l.fault.delay) }
)

// unless expects 503 from the routes for which lost is true, and success from the others.
func unless(lost func(route) bool) func(route) []string {
	return func(r route) []string {
		if lost(r) {
			return unavailable
		}
		return good
	}
}

func asksRedis(r route) bool { return r.redis > unused }

func asksPostgres(r route) bool { return r.postgres > unused }

func either(r route) []string {
	if r.redis == unused && r.postgres == unused {
		return good
	}
	return goodOr503
}

// onReadOnlyRedis are the outcomes on a Redis that takes no writes. Without the rate limit, two
// routes only read, and may go on.
func onReadOnlyRedis(r route) []string {
	switch r.name {
	case "me", "verification":
		return goodOr503
	default:
		return unless(asksRedis)(r)
	}
}

// redisFaults are what can happen to Redis. Every route under /auth writes to it, if only the
// counter of the rate limit.
var redisFaults = []fault{
	{
		store:  "Redis",
		name:   "refused",
		short:  true,
		breaks: func(l *lab) { l.redis.kill() },
		mends:  restartsRedis,
		limit:  redisLimit,
		want:   unless(asksRedis),
	},
	{
		store:  "Redis",
		name:   "silent",
		short:  true,
		breaks: func(l *lab) { l.redis.freeze() },
		mends:  thawsRedis,
		limit:  redisLimit,
		want:   unless(asksRedis),
	},
	{
		store:   "Redis",
		name:    "slow, +600 ms",
		proxied: true,
		delay:   600 * time.Millisecond,
		breaks:  slowsRedis,
		mends:   func(l *lab) { l.redisProxy.mend() },
		limit:   requestLimit,
		want:    either,
	},
	{
		store:   "Redis",
		name:    "slow, +2 s",
		proxied: true,
		delay:   2 * time.Second,
		breaks:  slowsRedis,
		mends:   func(l *lab) { l.redisProxy.mend() },
		limit:   requestLimit,
		want:    unless(asksRedis),
	},
	{
		store:   "Redis",
		name:    "cut",
		proxied: true,
		breaks:  func(l *lab) { l.redisProxy.cut(3) },
		mends:   func(l *lab) { l.redisProxy.mend() },
		limit:   redisLimit,
		want:    unless(asksRedis),
	},
	{
		store:  "Redis",
		name:   "restarted before the request",
		breaks: restartsRedis,
		mends:  nothing,
		limit:  redisLimit,
		want:   either,
	},
	{
		store:   "Redis",
		name:    "emptied",
		short:   true,
		breaks:  func(l *lab) { l.redis.do("FLUSHALL") },
		mends:   nothing,
		limit:   redisLimit,
		want:    func(r route) []string { return r.redisEmptied },
		after:   func(r route) []string { return r.redisEmptied },
		forgets: true,
	},
	{
		store:  "Redis",
		name:   "read-only",
		short:  true,
		breaks: func(l *lab) { l.redis.do("REPLICAOF", "127.0.0.1", "1") },
		mends:  func(l *lab) { l.redis.do("REPLICAOF", "NO", "ONE") },
		limit:  redisLimit,
		want:   onReadOnlyRedis,
	},
	{
		store:  "Redis",
		name:   "full",
		short:  true,
		breaks: func(l *lab) { l.redis.do("CONFIG", "SET", "maxmemory", "1") },
		mends:  func(l *lab) { l.redis.do("CONFIG", "SET", "maxmemory", "0") },
		limit:  redisLimit,
		want:   unless(func(r route) bool { return r.redis == writes }),
	},
}

// bothFaults are what happens to both stores at once.
var bothFaults = []fault{
	{
		store:        "Both",
		name:         "slow, +300 ms, with hashes of cost 12",
		proxied:      true,
		costlyHashes: true,
		delay:        300 * time.Millisecond,
		breaks: func(l *lab) {
			slowsRedis(l)
			slowsPostgres(l)
		},
		mends: func(l *lab) {
			l.redisProxy.mend()
			l.postgresProxy.mend()
		},
		limit: requestLimit,
		want:  func(r route) []string { return append(either(r), "503 overloaded") },
	},
}

var postgresFaults = []fault{
	{
		store:  "PostgreSQL",
		name:   "refused",
		short:  true,
		breaks: func(l *lab) { l.pg.kill() },
		mends:  func(l *lab) { l.pg.restart() },
		limit:  postgresLimit,
		want:   unless(asksPostgres),
	},
	{
		store:  "PostgreSQL",
		name:   "silent",
		short:  true,
		breaks: func(l *lab) { l.pg.freeze() },
		mends:  func(l *lab) { l.pg.thaw() },
		limit:  postgresLimit,
		want:   unless(asksPostgres),
	},
	{
		store:   "PostgreSQL",
		name:    "slow, +300 ms",
		proxied: true,
		delay:   300 * time.Millisecond,
		breaks:  slowsPostgres,
		mends:   func(l *lab) { l.postgresProxy.mend() },
		limit:   requestLimit,
		want:    either,
	},
	{
		store:   "PostgreSQL",
		name:    "slow, +1 s",
		proxied: true,
		delay:   time.Second,
		breaks:  slowsPostgres,
		mends:   func(l *lab) { l.postgresProxy.mend() },
		limit:   requestLimit,
		want:    either,
	},
	{
		store:   "PostgreSQL",
		name:    "cut",
		proxied: true,
		breaks:  func(l *lab) { l.postgresProxy.cut(3) },
		mends:   func(l *lab) { l.postgresProxy.mend() },
		limit:   postgresLimit,
		want:    unless(asksPostgres),
	},
	{
		store:  "PostgreSQL",
		name:   "restarted before the request",
		breaks: func(l *lab) { l.pg.restart() },
		mends:  nothing,
		limit:  postgresLimit,
		want:   either,
	},
	{
		store:  "PostgreSQL",
		name:   "emptied",
		short:  true,
		breaks: func(l *lab) { l.pg.exec("DELETE FROM users") },
		mends:  nothing,
		limit:  postgresLimit,
		want:   func(r route) []string { return r.postgresEmptied },
		after:  func(r route) []string { return r.postgresEmptied },
	},
	{
		store:  "PostgreSQL",
		name:   "read-only",
		short:  true,
		breaks: func(l *lab) { l.setReadOnly("on") },
		mends:  func(l *lab) { l.setReadOnly("off") },
		limit:  postgresLimit,
		want:   unless(func(r route) bool { return r.postgres > reads }),
	},
	{
		store:  "PostgreSQL",
		name:   "out of connections",
		short:  true,
		breaks: (*lab).takeAllConnections,
		mends:  (*lab).giveConnectionsBack,
		limit:  postgresLimit,
		want:   unless(asksPostgres),
	},
	{
		store:  "PostgreSQL",
		name:   "full",
		short:  true,
		disk:   true,
		breaks: (*lab).fillDisk,
		mends:  (*lab).emptyDisk,
		limit:  postgresLimit,
		want:   onFullDisk,
	},
}

// onFullDisk are the outcomes on a full disk. What adds or changes a row may still find room in the
// pages where it belongs. What only locks or deletes rows needs none.
func onFullDisk(r route) []string {
	switch r.name {
	case "signup", "password", "reset", "verify", "verify new email", "readyz":
		return goodOr503
	default:
		return good
	}
}

// fillDisk writes a file until PostgreSQL's disk is full, and then signs users up until one of them
// finds no room in the pages where it belongs, and is answered with 503.
func (l *lab) fillDisk() {
	err := l.writeBallast("SELECT repeat('x', 1000), generate_series(1, 1000000)")
	var reported *pgconn.PgError
	if !errors.As(err, &reported) || reported.Code != "53100" { // disk_full
		l.t.Fatalf("filling the disk: %v", err)
	}
	eventually(l.t, startLimit, "a user cannot be stored", func() bool {
		return newUser(l.server).signup().outcome() == "503 unavailable"
	})
}

func (l *lab) emptyDisk() {
	if err := l.writeBallast("SELECT"); err != nil {
		l.t.Fatal(err)
	}
}

// writeBallast replaces a file on PostgreSQL's disk by the rows of a query.
func (l *lab) writeBallast(query string) error {
	ctx := context.Background()
	conn := l.pg.connect()
	defer conn.Close(ctx)
	_, err := conn.Exec(ctx, "COPY ("+query+") TO '"+l.pg.data+"/ballast'")
	return err
}

// setReadOnly makes every transaction read-only that does not say otherwise, also on connections
// that are open already.
func (l *lab) setReadOnly(value string) {
	l.pg.exec(
		"SET default_transaction_read_only = off",
		"ALTER SYSTEM SET default_transaction_read_only = "+value,
		"SELECT pg_reload_conf()",
	)
	eventually(l.t, startLimit, "PostgreSQL has read its configuration again", func() bool {
		return l.pg.query("current_setting('default_transaction_read_only')") == value
	})
}

// takeAllConnections opens connections until PostgreSQL accepts no more, and ends those of the
// server, until the server has none.
func (l *lab) takeAllConnections() {
	ctx := context.Background()
	first := l.pg.connect()
	l.heldConns = []*pgx.Conn{first}
	const endOthers = `
		SELECT count(pg_terminate_backend(pid))
		FROM pg_stat_activity
		WHERE backend_type = 'client backend' AND NOT pid = ANY($1)`
	eventually(l.t, startLimit, "the server has no connection to PostgreSQL", func() bool {
		for {
			conn, err := pgx.Connect(ctx, l.pg.url)
			if err != nil {
				break
			}
			l.heldConns = append(l.heldConns, conn)
		}
		var pids []uint32
		for _, conn := range l.heldConns {
			pids = append(pids, conn.PgConn().PID())
		}
		var others int
		if err := first.QueryRow(ctx, endOthers, pids).Scan(&others); err != nil {
			l.t.Fatal(err)
		}
		return others == 0
	})
}

func (l *lab) giveConnectionsBack() {
	for _, conn := range l.heldConns {
		conn.Close(context.Background())
	}
}
