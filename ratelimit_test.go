package main

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// randomAddr returns an IPv6 address of a network that no other test uses.
func randomAddr() netip.Addr {
	return netip.AddrFrom16([16]byte([]byte(rand.Text())))
}

// TestUnjudgedAttempt checks that an attempt to log in counts nowhere if hashing is saturated. What
// is given back when its window has ended leaves no counter below zero, which would allow more.
func TestUnjudgedAttempt(t *testing.T) {
	h := newTestHasher(t)
	rdb := redisClient(t)
	logins := &loginLimiter{window: fixedWindow{rdb, 60}, max: 3, undoTimeout: undoTimeout}
	a := &auth{hasher: h, logins: logins}
	email, ip := rand.Text()+"@example.test", randomAddr()
	judge := func(timeout time.Duration, want error, counters int64) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		ctx = context.WithValue(ctx, requestInfoKey{}, &requestInfo{ip: ip})
		r := httptest.NewRequestWithContext(ctx, "POST", "/auth/login", nil)
		if err := a.judgePassword(r, email, h.dummy, "wrong password"); err != want {
			t.Errorf("judgePassword = %v, want %v", err, want)
		}
		keys := []string{pairKey(email, ip), accountKey(email), addressKey(ip)}
		if n := rdb.Exists(t.Context(), keys...).Val(); n != counters {
			t.Errorf("there are %d counters, want %d", n, counters)
		}
	}
	h.waiting.Store(hashQueue)
	judge(time.Minute, errOverloaded, 0)
	if err := errors.Join(
		logins.giveBack(t.Context(), email, ip),
		logins.forgive(t.Context(), email, ip),
	); err != nil {
		t.Error(err)
	}
	judge(time.Minute, errOverloaded, 0)
	h.waiting.Store(0)
	h.slots <- struct{}{}
	judge(500*time.Millisecond, errOverloaded, 0) // the time of the request ends before hashWait
	h.release()
	judge(time.Minute, errInvalidCredentials, 3)
}

// TestLostReplyIsCountedOnce checks that neither of the two kinds of client sends a command again
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
