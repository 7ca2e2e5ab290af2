package main

// ratelimit.go counts in Redis what one client may do: all requests of an IP, and failed logins on an
// account. Each decision is one Lua script, one round trip and one hash slot, so it is exact under any
// number of concurrent requests and replicas. Windows are fixed: they begin at the first count.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/netip"
	"time"

	"github.com/redis/go-redis/v9"
)

// limiterTimeout bounds one decision; past it the request is refused with 503, never let through.
const limiterTimeout = 500 * time.Millisecond

// countLua defines count(key, window): one more, in a window of that many seconds that begins now if
// none is open. A key that has lost its TTL gets it back, or it would refuse for ever.
const countLua = `
local function count(key, window)
  local n, left = redis.call('INCR', key), redis.call('PTTL', key)
  if left < 0 then
    left = window * 1000
    redis.call('PEXPIRE', key, left)
  end
  return n, left
end
`

var (
	// KEYS: counter. ARGV: window. Returns the count and the milliseconds left of its window.
	ipScript = redis.NewScript(countLua + `
local n, left = count(KEYS[1], ARGV[1])
return {n, left}`)

	// KEYS: the account's failures from one IP, in all. ARGV: window, maximum from one IP.
	// Counts both and returns 0, or counts neither and returns the milliseconds to wait.
	attemptScript = redis.NewScript(countLua + `
local wait = 0
for i, max in ipairs({tonumber(ARGV[2]), ARGV[2] * 10}) do
  if tonumber(redis.call('GET', KEYS[i]) or 0) >= max then
    wait = math.max(wait, redis.call('PTTL', KEYS[i]), 1)
  end
end
if wait == 0 then
  for i = 1, 2 do count(KEYS[i], ARGV[1]) end
end
return wait`)

	// KEYS: as above. ARGV: '1' to clear the pair's count. Takes one attempt back.
	giveBackScript = redis.NewScript(`
for i = 1, 2 do
  local n = tonumber(redis.call('GET', KEYS[i]) or 0)
  if n == 1 or (i == 1 and ARGV[1] == '1') then
    redis.call('DEL', KEYS[i])
  elseif n > 1 then
    redis.call('DECR', KEYS[i])
  end
end
return 0`)
)

// limiter holds a limit: at most max per window seconds. A max of 0 is no limit.
type limiter struct {
	rdb         redis.Scripter
	max, window int
}

func newLimiter(rdb redis.Scripter, max, window int) (*limiter, error) {
	if rdb == nil || max < 0 || window < 1 {
		return nil, errors.New("limiter needs a Redis client, a maximum and a window")
	}
	return &limiter{rdb, max, window}, nil
}

// request counts a request of ip. It returns how many are left in the window, negative where this one is
// too many, and the time until the window ends.
func (l *limiter) request(ctx context.Context, ip netip.Addr) (left int, reset time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limiterTimeout)
	defer cancel()
	reply, err := ipScript.Run(ctx, l.rdb, []string{"rate-limit:{" + clientKey(ip) + "}"}, l.window).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return l.max - int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// attempt counts a login on the account of email from ip, before its password is looked at, so that
// simultaneous ones cannot slip past. It returns how long to wait where that is one too many.
func (l *limiter) attempt(ctx context.Context, email string, ip netip.Addr) (wait time.Duration, err error) {
	if l.max == 0 {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limiterTimeout)
	defer cancel()
	ms, err := attemptScript.Run(ctx, l.rdb, loginKeys(email, ip), l.window, l.max).Int64()
	return time.Duration(ms) * time.Millisecond, err
}

// giveBack takes an attempt back that did not fail. succeeded also clears the failures on the account
// from this IP; the account's count over all IPs keeps the others'.
func (l *limiter) giveBack(ctx context.Context, email string, ip netip.Addr, succeeded bool) error {
	if l.max == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limiterTimeout)
	defer cancel()
	return giveBackScript.Run(ctx, l.rdb, loginKeys(email, ip), succeeded).Err()
}

// loginKeys returns the counters of email's account: from ip, and in all. Email addresses stay out of Redis.
func loginKeys(email string, ip netip.Addr) []string {
	sum := sha256.Sum256([]byte(email))
	account := "login-limit:{" + hex.EncodeToString(sum[:16]) + "}"
	return []string{account + ":" + clientKey(ip), account}
}

// clientKey names who ip is counted as: itself, or its /64 if it is IPv6, of which one host has 2^64.
func clientKey(ip netip.Addr) string {
	if ip.Is6() {
		return netip.PrefixFrom(ip, 64).Masked().String()
	}
	return ip.String()
}
