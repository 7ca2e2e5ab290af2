package main

// ratelimit.go counts what a client may do. Each decision is one call of ratelimit.lua: exact, however many ask at once.

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"net/netip"
	"time"

	"github.com/redis/go-redis/v9"
)

//go:embed ratelimit.lua
var limitLua string
var limitScript = redis.NewScript(limitLua)

// limiter is a limit: at most max per window seconds. A max of 0 is no limit.
type limiter struct {
	rdb         redis.Scripter
	max, window int
}

// request counts a request of ip. It returns how many are left, negative if this one is too many, until the reset.
func (l *limiter) request(ctx context.Context, ip netip.Addr) (left int, reset time.Duration, err error) {
	key := "rate-limit:{" + clientKey(ip) + "}"
	reply, err := limitScript.Run(ctx, l.rdb, []string{key}, "request", l.window).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return l.max - int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// attempt counts a login on the account of email from ip, before its password is looked at, so that simultaneous ones
// cannot slip past. It returns how long to wait where that is one too many.
func (l *limiter) attempt(ctx context.Context, email string, ip netip.Addr) (wait time.Duration, err error) {
	ms, err := limitScript.Run(ctx, l.rdb, loginKeys(email, ip), "attempt", l.window, l.max).Int64()
	return time.Duration(ms) * time.Millisecond, err
}

// giveBack takes back an attempt that did not fail; if it succeeded, the account's failures from this IP with it.
func (l *limiter) giveBack(ctx context.Context, email string, ip netip.Addr, succeeded bool) error {
	return limitScript.Run(ctx, l.rdb, loginKeys(email, ip), "give back", l.window, succeeded).Err()
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
