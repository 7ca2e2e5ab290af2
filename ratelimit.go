package main

// ratelimit.go counts in Redis what a client may do: all requests of an IP, and failed logins on an account. Each
// decision is one Lua script, one round trip and one hash slot, so it is exact under any number of concurrent
// requests and replicas. Windows are fixed: they begin with the first count.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"time"

	"github.com/redis/go-redis/v9"
)

// countLua defines left(key, window), the milliseconds that a counter's window still lasts, and count(key, window): one
// more. A window begins when none is open, and anew where the key lost its TTL, or it would refuse for ever.
const countLua = `
local function left(key, window)
  local ms = redis.call('PTTL', key)
  if ms < 0 then
    ms = window * 1000
    redis.call('PEXPIRE', key, ms)
  end
  return ms
end
local function count(key, window)
  return {redis.call('INCR', key), left(key, window)}
end
`

var (
	// KEYS: counter. ARGV: window. Returns the count and the milliseconds left of its window.
	requestScript = redis.NewScript(countLua + `return count(KEYS[1], ARGV[1])`)

	// KEYS: an account's failures from one IP, from all. ARGV: window, maximum from one IP. Counts both and
	// returns 0, or counts neither and returns the milliseconds to wait.
	attemptScript = redis.NewScript(countLua + `
local wait = 0
for i, max in ipairs({tonumber(ARGV[2]), ARGV[2] * 10}) do
  if tonumber(redis.call('GET', KEYS[i]) or 0) >= max then
    wait = math.max(wait, left(KEYS[i], ARGV[1]), 1)
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

// limiter is a limit: at most max per window seconds. A max of 0 is no limit.
type limiter struct {
	rdb         redis.Scripter
	max, window int
}

// request counts a request of ip. It returns how many are left, negative where this one is too many, and the time
// until the window ends.
func (l *limiter) request(ctx context.Context, ip netip.Addr) (left int, reset time.Duration, err error) {
	reply, err := requestScript.Run(ctx, l.rdb, []string{"rate-limit:{" + clientKey(ip) + "}"}, l.window).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return l.max - int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// attempt counts a login on the account of email from ip, before its password is looked at, so that simultaneous
// ones cannot slip past. It returns how long to wait where that is one too many.
func (l *limiter) attempt(ctx context.Context, email string, ip netip.Addr) (wait time.Duration, err error) {
	if l.max == 0 {
		return 0, nil
	}
	ms, err := attemptScript.Run(ctx, l.rdb, loginKeys(email, ip), l.window, l.max).Int64()
	return time.Duration(ms) * time.Millisecond, err
}

// giveBack takes back an attempt that did not fail. succeeded also clears the account's failures from this IP; those
// from all IPs together stay.
func (l *limiter) giveBack(ctx context.Context, email string, ip netip.Addr, succeeded bool) error {
	if l.max == 0 {
		return nil
	}
	return giveBackScript.Run(ctx, l.rdb, loginKeys(email, ip), succeeded).Err()
}

// loginKeys names the counters of email's account: from ip, and from all. No address of a user enters Redis.
func loginKeys(email string, ip netip.Addr) []string {
	sum := sha256.Sum256([]byte(email))
	account := "login-limit:{" + hex.EncodeToString(sum[:16]) + "}"
	return []string{account + ":" + clientKey(ip), account}
}

// clientKey names who ip counts as: itself, or its /64 if it is IPv6, where one host has 2^64 of them.
func clientKey(ip netip.Addr) string {
	if ip.Is6() {
		return netip.PrefixFrom(ip, 64).Masked().String()
	}
	return ip.String()
}
