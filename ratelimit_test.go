package main

import (
	"context"
	"crypto/rand"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/redis/go-redis/v9"
)

// randomAddr returns an IPv6 address of a network that nobody else uses (RFC 4193).
func randomAddr() netip.Addr {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[0] = 0xfd
	return netip.AddrFrom16(b)
}

// wantCounts compares the counters of an account and an address with what they should be.
func wantCounts(t *testing.T, email string, ip netip.Addr, pair, account, address int) {
	t.Helper()
	rdb := redisClient(t)
	for key, want := range map[string]int{
		pairKey(email, ip): pair,
		accountKey(email):  account,
		addressKey(ip):     address,
	} {
		got, err := rdb.Get(t.Context(), key).Int()
		if err == redis.Nil {
			err = nil
		}
		if got != want || err != nil {
			t.Errorf("%s is %d (%v), want %d", key, got, err, want)
		}
	}
}

// TestUnjudgedAttempt holds that an attempt to log in counts nowhere if hashing is saturated.
func TestUnjudgedAttempt(t *testing.T) {
	h := newTestHasher(t)
	rdb := redisClient(t)
	a := &auth{
		hasher:  h,
		logins:  &loginLimiter{window: fixedWindow{rdb, 60}, max: 3},
		metrics: newMetrics(nil),
	}
	email, ip := rand.Text()+"@example.test", randomAddr()
	judge := func() error {
		ctx := context.WithValue(t.Context(), requestInfoKey{}, &requestInfo{ip: ip})
		r := httptest.NewRequestWithContext(ctx, "POST", "/auth/login", nil)
		return a.judgePassword(r, email, h.dummy, "wrong password")
	}
	if err := judge(); err != errInvalidCredentials {
		t.Errorf("judgePassword = %v", err)
	}
	wantCounts(t, email, ip, 1, 1, 1)
	h.waiting.Store(hashQueue)
	if err := judge(); err != errOverloaded {
		t.Errorf("judgePassword = %v", err)
	}
	wantCounts(t, email, ip, 1, 1, 1)
}

// TestGiveBackAfterTheWindow holds that an attempt whose window has ended while its password was
// hashed leaves no counter below zero, which would allow more than the limit.
func TestGiveBackAfterTheWindow(t *testing.T) {
	rdb := redisClient(t)
	l := &loginLimiter{window: fixedWindow{rdb, 60}, max: 3}
	email, ip := rand.Text()+"@example.test", randomAddr()
	if err := l.giveBack(t.Context(), email, ip); err != nil {
		t.Error(err)
	}
	if err := l.succeeded(t.Context(), email, ip); err != nil {
		t.Error(err)
	}
	keys := []string{pairKey(email, ip), accountKey(email), addressKey(ip)}
	if n := rdb.Exists(t.Context(), keys...).Val(); n != 0 {
		t.Errorf("%d counters were made", n)
	}
}

// TestLostReplyIsCountedOnce holds that neither of the two kinds of client sends a command again
// whose reply was lost.
func TestLostReplyIsCountedOnce(t *testing.T) {
	p := redisProxy(t)
	env := map[string]string{"NODE_ENV": "development", "REDIS_URL": p.url}
	options := newEnvironment(lookup(env)).redis()
	cluster := options.Cluster()
	cluster.ClusterSlots = func(context.Context) ([]redis.ClusterSlot, error) {
		node := redis.ClusterNode{Addr: p.listener.Addr().String()}
		return []redis.ClusterSlot{{Start: 0, End: 16383, Nodes: []redis.ClusterNode{node}}}, nil
	}
	for name, rdb := range map[string]redis.UniversalClient{
		"single":  redis.NewUniversalClient(options),
		"cluster": redis.NewClusterClient(cluster),
	} {
		t.Run(name, func(t *testing.T) {
			defer rdb.Close()
			l := &requestLimiter{window: fixedWindow{rdb, 60}, max: 10}
			ip := randomAddr()
			if _, _, err := l.take(t.Context(), ip); err != nil { // now Redis knows the script
				t.Fatal(err)
			}
			p.StealReply(t, func() {
				if _, _, err := l.take(t.Context(), ip); err == nil {
					t.Error("a decision without a reply")
				}
			})
			left, _, err := l.take(t.Context(), ip)
			if left != 7 || err != nil {
				t.Errorf("%d requests are left (%v), want 7", left, err)
			}
		})
	}
}
