package main

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func testLimiter(rdb redis.UniversalClient, max, window int) *limiter {
	return &limiter{rdb, max, window}
}

// randomAddr returns an IPv6 address of nobody else's /64 (RFC 4193), so that tests meet no counters but their own.
func randomAddr() netip.Addr {
	var b [16]byte
	rand.Read(b[:])
	b[0] = 0xfd
	return netip.AddrFrom16(b)
}

func randomEmail() string { return rand.Text() + "@example.test" }

func requestKey(ip netip.Addr) string { return "rate-limit:{" + clientKey(ip) + "}" }

// attempt counts a login and reports whether it may go on.
func attempt(t *testing.T, l *limiter, email string, ip netip.Addr) bool {
	t.Helper()
	wait, err := l.attempt(t.Context(), email, ip)
	if err != nil {
		t.Fatal(err)
	}
	if wait < 0 || wait > time.Duration(l.window)*time.Second {
		t.Errorf("wait %v, in a window of %d s", wait, l.window)
	}
	return wait == 0
}

// checkFailures compares the counters of an account, from ip and from all, with what they should be.
func checkFailures(t *testing.T, rdb redis.UniversalClient, email string, ip netip.Addr, pair, all int) {
	t.Helper()
	for i, want := range []int{pair, all} {
		key := loginKeys(email, ip)[i]
		n, err := rdb.Get(t.Context(), key).Int()
		if err == redis.Nil {
			err = nil
		}
		if err != nil || n != want {
			t.Errorf("%s is %d (%v), want %d", key, n, err, want)
		}
		if want > 0 {
			checkTTL(t, rdb, key, 60)
		}
	}
}

func checkTTL(t *testing.T, rdb redis.UniversalClient, key string, window int) {
	t.Helper()
	ttl, err := rdb.PTTL(t.Context(), key).Result()
	if err != nil || ttl <= 0 || ttl > time.Duration(window)*time.Second {
		t.Errorf("the TTL of %s is %v (%v), want at most %d s", key, ttl, err, window)
	}
}

// Of any number of simultaneous requests at two replicas exactly max pass, and each is told another number.
func TestRequestsAreCountedExactly(t *testing.T) {
	const max, calls = 100, 400
	rdb := redisClient(t)
	replicas, ip := []*limiter{testLimiter(rdb, max, 60), testLimiter(redisClient(t), max, 60)}, randomAddr()
	lefts := together(calls, func(i int) int {
		left, reset, err := replicas[i%2].request(t.Context(), ip)
		if err != nil || reset <= 0 || reset > time.Minute {
			t.Errorf("request: reset %v, %v", reset, err)
		}
		return left
	})
	slices.Sort(lefts)
	for i, left := range lefts {
		if left != max-calls+i {
			t.Fatalf("the lefts are not %d to %d, each once: %v", max-calls, max-1, lefts)
		}
	}
	checkTTL(t, rdb, requestKey(ip), 60)
}

// One command for each decision, once Redis knows the script.
func TestRequestIsOneRoundTrip(t *testing.T) {
	rdb, sent := redisClient(t), &commandCounter{}
	l, ip := testLimiter(rdb, 10, 60), randomAddr()
	if _, _, err := l.request(t.Context(), ip); err != nil {
		t.Fatal(err)
	}
	rdb.AddHook(sent)
	if _, _, err := l.request(t.Context(), ip); err != nil {
		t.Fatal(err)
	}
	if n := sent.Load(); n != 1 {
		t.Errorf("%d commands were sent, want 1", n)
	}
}

type commandCounter struct{ atomic.Int64 }

func (c *commandCounter) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c *commandCounter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.Add(1)
		return next(ctx, cmd)
	}
}

func (c *commandCounter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		c.Add(int64(len(cmds)))
		return next(ctx, cmds)
	}
}

func TestRequestWindow(t *testing.T) {
	rdb := redisClient(t)
	l, ip := testLimiter(rdb, 2, 60), randomAddr()
	for _, want := range []int{1, 0, -1, -2} {
		left, _, err := l.request(t.Context(), ip)
		if err != nil || left != want {
			t.Fatalf("left %d (%v), want %d", left, err, want)
		}
	}
	// The window began with the first request: later ones do not prolong it.
	rdb.PExpire(t.Context(), requestKey(ip), 5*time.Second)
	if _, reset, err := l.request(t.Context(), ip); err != nil || reset > 5*time.Second {
		t.Errorf("reset %v (%v) in a window with 5 s left", reset, err)
	}
	rdb.Del(t.Context(), requestKey(ip)) // what Redis does at the end of the window
	if left, _, err := l.request(t.Context(), ip); err != nil || left != 1 {
		t.Errorf("left %d (%v) in a new window, want 1", left, err)
	}
	if left, _, err := l.request(t.Context(), randomAddr()); err != nil || left != 1 {
		t.Errorf("left %d (%v) for another client, want 1", left, err)
	}
}

// A counter without a TTL would refuse for ever.
func TestLimitsPutTTLBack(t *testing.T) {
	rdb := redisClient(t)
	persist := func(keys ...string) {
		for _, key := range keys {
			if done, err := rdb.Persist(t.Context(), key).Result(); err != nil || !done {
				t.Fatalf("PERSIST %s: %v, %v", key, done, err)
			}
		}
	}
	requests, ip := testLimiter(rdb, 2, 60), randomAddr()
	for range 4 { // the last two are refused
		_, reset, err := requests.request(t.Context(), ip)
		if err != nil || reset <= 0 {
			t.Errorf("reset %v, %v", reset, err)
		}
		checkTTL(t, rdb, requestKey(ip), 60)
		persist(requestKey(ip))
	}

	logins, email := testLimiter(rdb, 1, 60), randomEmail()
	for i := range 2 { // the second one is refused
		if passed := attempt(t, logins, email, ip); passed != (i == 0) {
			t.Errorf("attempt %d passed: %v", i+1, passed)
		}
		checkFailures(t, rdb, email, ip, 1, 1)
		persist(loginKeys(email, ip)[0])
	}
	account := loginKeys(email, ip)[1]
	for i := range 10 { // the last one is refused: the account's count is full
		persist(account)
		if passed := attempt(t, logins, email, randomAddr()); passed != (i < 9) {
			t.Errorf("attempt %d on the account passed: %v", i+2, passed)
		}
		checkTTL(t, rdb, account, 60)
	}
}

func TestLoginLimitOfPair(t *testing.T) {
	rdb := redisClient(t)
	l, email, ip := testLimiter(rdb, 3, 60), randomEmail(), randomAddr()
	for range 3 {
		if !attempt(t, l, email, ip) {
			t.Fatal("refused within the limit")
		}
	}
	for range 5 {
		if attempt(t, l, email, ip) {
			t.Fatal("passed beyond the limit")
		}
	}
	checkFailures(t, rdb, email, ip, 3, 3) // the refused ones count nowhere

	// Neither another address nor another account suffers.
	other := randomAddr()
	if !attempt(t, l, email, other) || !attempt(t, l, randomEmail(), ip) {
		t.Error("a stranger locked an account or an address")
	}
	checkFailures(t, rdb, email, other, 1, 4)
	// The wait ends with the window.
	rdb.PExpire(t.Context(), loginKeys(email, ip)[0], 5*time.Second)
	if wait, err := l.attempt(t.Context(), email, ip); err != nil || wait <= 0 || wait > 5*time.Second {
		t.Errorf("wait %v (%v) in a window with 5 s left", wait, err)
	}
}

func TestLoginLimitOfAccount(t *testing.T) {
	rdb := redisClient(t)
	l, email := testLimiter(rdb, 2, 60), randomEmail()
	for range 20 { // ten times the limit of one address
		if !attempt(t, l, email, randomAddr()) {
			t.Fatal("refused within the limit")
		}
	}
	late := randomAddr()
	if attempt(t, l, email, late) {
		t.Error("passed beyond the limit of the account")
	}
	checkFailures(t, rdb, email, late, 0, 20)
	if err := l.giveBack(t.Context(), email, late, false); err != nil {
		t.Fatal(err)
	}
	if !attempt(t, l, email, late) || attempt(t, l, email, late) {
		t.Error("one attempt given back is one more, not none or two")
	}
}

func TestLoginGiveBack(t *testing.T) {
	rdb := redisClient(t)
	l, email, ip, other := testLimiter(rdb, 3, 60), randomEmail(), randomAddr(), randomAddr()
	giveBack := func(succeeded bool) {
		t.Helper()
		if err := l.giveBack(t.Context(), email, ip, succeeded); err != nil {
			t.Fatal(err)
		}
	}
	attempt(t, l, email, ip)
	giveBack(false) // a 503
	checkFailures(t, rdb, email, ip, 0, 0)
	attempt(t, l, email, other)
	attempt(t, l, email, ip)
	attempt(t, l, email, ip)
	giveBack(false)
	checkFailures(t, rdb, email, ip, 1, 2)
	attempt(t, l, email, ip)
	attempt(t, l, email, ip)
	giveBack(true) // success clears the pair, and takes itself off the account
	checkFailures(t, rdb, email, ip, 0, 3)
	checkFailures(t, rdb, email, other, 1, 3)

	// The window may end while a password is hashed: nothing is owed then, and no counter is made.
	if err := rdb.Del(t.Context(), loginKeys(email, ip)...).Err(); err != nil {
		t.Fatal(err)
	}
	giveBack(false)
	giveBack(true)
	checkFailures(t, rdb, email, ip, 0, 0)
	if n, err := rdb.Exists(t.Context(), loginKeys(email, ip)...).Result(); err != nil || n != 0 {
		t.Errorf("%d counters were left (%v)", n, err)
	}
}

func TestAttemptsAreCountedExactly(t *testing.T) {
	const max, calls = 10, 200
	rdb := redisClient(t)
	replicas := []*limiter{testLimiter(rdb, max, 60), testLimiter(redisClient(t), max, 60)}
	email, ip := randomEmail(), randomAddr()
	var passed atomic.Int64
	together(calls, func(i int) any {
		if wait, err := replicas[i%2].attempt(t.Context(), email, ip); err != nil {
			t.Error(err)
		} else if wait == 0 {
			passed.Add(1)
		}
		return nil
	})
	if passed.Load() != max {
		t.Errorf("%d of %d simultaneous attempts passed, want %d", passed.Load(), calls, max)
	}
	checkFailures(t, rdb, email, ip, max, max)
}

func TestLoginLimitOff(t *testing.T) {
	rdb := redisClient(t)
	l, email, ip := testLimiter(rdb, 0, 60), randomEmail(), randomAddr()
	for range 20 {
		if !attempt(t, l, email, ip) {
			t.Fatal("refused without a limit")
		}
	}
	if err := l.giveBack(t.Context(), email, ip, true); err != nil {
		t.Error(err)
	}
	if n, err := rdb.Exists(t.Context(), loginKeys(email, ip)...).Result(); err != nil || n != 0 {
		t.Errorf("%d counters (%v), though nothing is counted", n, err)
	}
}

func TestClientKey(t *testing.T) {
	for ip, want := range map[string]string{
		"203.0.113.9":               "203.0.113.9",
		"2001:db8:1:2:3:4:5:6":      "2001:db8:1:2::/64",
		"2001:db8:1:2:ffff:ffff::1": "2001:db8:1:2::/64",
		"2001:db8:1:3::":            "2001:db8:1:3::/64",
		"::1":                       "::/64",
	} {
		if got := clientKey(netip.MustParseAddr(ip)); got != want {
			t.Errorf("clientKey(%s) = %s, want %s", ip, got, want)
		}
	}

	// What clientIP made of a connection counts as one client, in both limits.
	l, email, host := testLimiter(redisClient(t), 2, 60), randomEmail(), randomAddr().As16()
	neighbour := host
	neighbour[15]++
	for i, ip := range []netip.Addr{netip.AddrFrom16(host), netip.AddrFrom16(neighbour), netip.AddrFrom16(host)} {
		left, _, err := l.request(t.Context(), ip)
		if err != nil || left != 1-i || attempt(t, l, email, ip) != (i < 2) {
			t.Errorf("request %d from a /64: left %d, %v", i+1, left, err)
		}
	}
	host[7]++
	if left, _, err := l.request(t.Context(), netip.AddrFrom16(host)); err != nil || left != 1 || !attempt(t, l, email, netip.AddrFrom16(host)) {
		t.Errorf("the next /64: left %d, %v", left, err)
	}
	ours := prefixes(t, "0.0.0.0/0")
	for _, peer := range []string{"203.0.113.9:1", "[::ffff:203.0.113.9]:2", "[::ffff:203.0.113.9%eth0]:3"} {
		if got := clientKey(clientIP(peer, nil, ours)); got != "203.0.113.9" {
			t.Errorf("%s counts as %s", peer, got)
		}
	}
}

// replyThief stands before Redis. When told to, it lets the next commands through, takes the first reply that is no
// error, and cuts the connection: the command was carried out, and the client cannot know.
type replyThief struct {
	addr   string
	armed  atomic.Bool
	stolen atomic.Int64
}

func newReplyThief(t *testing.T, network, redisAddr string) *replyThief {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	thief := &replyThief{addr: listener.Addr().String()}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			store, err := net.Dial(network, redisAddr)
			if err != nil {
				client.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(store, client)
				store.Close()
			}()
			go thief.pass(store, client)
		}
	}()
	return thief
}

func (thief *replyThief) pass(store, client net.Conn) {
	defer client.Close()
	defer store.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := store.Read(buffer)
		if err != nil {
			return
		}
		if buffer[0] != '-' && thief.armed.CompareAndSwap(true, false) {
			thief.stolen.Add(1)
			return
		}
		if _, err := client.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// A decision whose answer was lost is not made a second time, by neither of the server's two kinds of client: the caller
// gets an error, the count is one.
func TestLostReplyIsNotCountedTwice(t *testing.T) {
	target := redisClient(t).Options()
	thief := newReplyThief(t, target.Network, target.Addr)
	u, err := url.Parse(os.Getenv("REDIS_URL"))
	if err != nil {
		t.Fatal("REDIS_URL is no URL")
	}
	u.Host = thief.addr
	env := environment{getenv: func(string) string { return u.String() }}
	options := env.redis()
	cluster := options.Cluster()
	cluster.ClusterSlots = func(context.Context) ([]redis.ClusterSlot, error) {
		return []redis.ClusterSlot{{Start: 0, End: 16383, Nodes: []redis.ClusterNode{{Addr: thief.addr}}}}, nil
	}
	for name, rdb := range map[string]redis.UniversalClient{"single": redis.NewUniversalClient(options), "cluster": redis.NewClusterClient(cluster)} {
		t.Run(name, func(t *testing.T) {
			defer rdb.Close()
			l, email, ip := testLimiter(rdb, 10, 60), randomEmail(), randomAddr()
			steal := func(what string, call func() error) {
				t.Helper()
				if err := call(); err != nil { // connects, and makes the script known
					t.Fatalf("%s: %v", what, err)
				}
				before := thief.stolen.Load()
				thief.armed.Store(true)
				err := call()
				if stolen := thief.stolen.Load() - before; err == nil || stolen != 1 {
					t.Errorf("%s: err %v after %d stolen replies, want an error after 1", what, err, stolen)
				}
			}
			request := func() error {
				_, _, err := l.request(t.Context(), ip)
				return err
			}
			steal("request", request)
			if n, err := rdb.Get(t.Context(), requestKey(ip)).Int(); err != nil || n != 2 {
				t.Errorf("requests counted: %d (%v), want 2", n, err)
			}
			steal("attempt", func() error { _, err := l.attempt(t.Context(), email, ip); return err })
			checkFailures(t, rdb, email, ip, 2, 2)
			attempt(t, l, email, ip)
			attempt(t, l, email, ip)
			steal("giveBack", func() error { return l.giveBack(t.Context(), email, ip, false) })
			checkFailures(t, rdb, email, ip, 2, 2)

			// A Redis that does not know the script is sent its text.
			other := redisClient(t)
			steal("request", func() error {
				if err := other.ScriptFlush(t.Context()).Err(); err != nil {
					return err
				}
				return request()
			})
			if n, err := rdb.Get(t.Context(), requestKey(ip)).Int(); err != nil || n != 4 {
				t.Errorf("requests counted: %d (%v), want 4", n, err)
			}
		})
	}
}

// A client that hangs up does not get its request off the count.
func TestRequestOutlivesItsClient(t *testing.T) {
	rdb, ip := redisClient(t), randomAddr()
	counted := rateLimit(testLimiter(rdb, 10, 60), newMetrics(nil))
	h := observed(counted(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(299) })))
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp()
	r, w := httptest.NewRequestWithContext(ctx, "GET", "/auth/me", nil), httptest.NewRecorder()
	r.RemoteAddr = netip.AddrPortFrom(ip, 4711).String()
	h.ServeHTTP(w, r)
	if n, err := rdb.Get(t.Context(), requestKey(ip)).Int(); err != nil || n != 1 || w.Code != 299 {
		t.Errorf("counted %d (%v), answered %d, want 1 and 299", n, err, w.Code)
	}
}
