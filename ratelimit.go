package main

// ratelimit.go holds the limits, which are counters in Redis. Every decision is one run of
// ratelimit.lua, so a limit is exact for any number of simultaneous requests and replicas.

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"net/netip"
	"time"

	"github.com/redis/go-redis/v9"
)

//go:embed ratelimit.lua
var rateLimitLua string

var rateLimitScript = redis.NewScript("#!lua flags=allow-oom\n" + rateLimitLua)

const (
	// An IPv6 host has a network of 2^64 addresses to choose from, so it counts as that network.
	hostPrefixIPv6 = 64

	// A home line usually has a network of this size. Counting single hosts there would let one
	// person have 256 limits, enough to lock somebody else's account.
	homePrefixIPv6 = 56

	// accountFactor times the limit is what all addresses together may fail on one account, and
	// what one address may fail on all accounts together.
	accountFactor = 10
)

// limit is a counter and the number of events that it allows in a window.
type limit struct {
	key string
	max int
}

// refund is a number of events to take off a counter.
type refund struct {
	key    string
	events int
}

// counters counts events in fixed windows of so many seconds.
type counters struct {
	rdb    redis.Scripter
	window int
}

// take counts one event on each of the limits, or on none of them if one is exhausted. It returns
// how many more events are allowed, -1 if not even this one was, and the time until the window
// ends. The keys must lie in one slot of a cluster.
func (c counters) take(ctx context.Context, limits ...limit) (int, time.Duration, error) {
	names := make([]string, len(limits))
	args := []any{"take", c.window}
	for i, l := range limits {
		names[i] = l.key
		args = append(args, l.max)
	}
	reply, err := rateLimitScript.Run(ctx, c.rdb, names, args...).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// giveBack takes events off counters, whose keys must lie in one slot of a cluster.
func (c counters) giveBack(ctx context.Context, refunds ...refund) error {
	names := make([]string, len(refunds))
	args := []any{"give_back", c.window}
	for i, f := range refunds {
		names[i] = f.key
		args = append(args, f.events)
	}
	return rateLimitScript.Run(ctx, c.rdb, names, args...).Err()
}

// requestLimiter limits the requests of a client. A max of 0 means no limit.
type requestLimiter struct {
	counters counters
	max      int
}

// take counts a request from ip. It returns how many more are allowed, -1 if this one was not, and
// the time until the window ends.
func (l *requestLimiter) take(ctx context.Context, ip netip.Addr) (int, time.Duration, error) {
	key := "rate-limit:{" + network(ip, hostPrefixIPv6) + "}"
	return l.counters.take(ctx, limit{key, l.max})
}

// loginLimiter limits failed logins: on one account from one address, on one account from all
// addresses, and on all accounts from one address. A max of 0 means no limit.
type loginLimiter struct {
	counters counters
	max      int
}

// take counts an attempt to log in to the account of email, whether or not there is one. It is
// called before the password is looked at, so that simultaneous attempts cannot slip past. It
// returns how long to wait if this attempt is one too many, in which case it counts nowhere.
func (l *loginLimiter) take(
	ctx context.Context,
	email string,
	ip netip.Addr,
) (time.Duration, error) {
	if l.max == 0 {
		return 0, nil
	}
	left, wait, err := l.counters.take(ctx, limit{addressKey(ip), accountFactor * l.max})
	if err != nil {
		return 0, err
	}
	if left < 0 {
		return wait, nil
	}

	left, wait, err = l.counters.take(ctx,
		limit{pairKey(email, ip), l.max},
		limit{accountKey(email), accountFactor * l.max})
	if err == nil && left >= 0 {
		return 0, nil
	}
	return wait, errors.Join(err, l.counters.giveBack(ctx, refund{addressKey(ip), 1}))
}

// giveBack takes back an attempt that was not judged.
func (l *loginLimiter) giveBack(ctx context.Context, email string, ip netip.Addr) error {
	return l.refund(ctx, email, ip, 1)
}

// succeeded takes back an attempt with the right password, and with it all failures on the account
// from this address.
func (l *loginLimiter) succeeded(ctx context.Context, email string, ip netip.Addr) error {
	return l.refund(ctx, email, ip, l.max)
}

// refund takes so many events off the counter of the account and the address, and one off each of
// the other two.
func (l *loginLimiter) refund(
	ctx context.Context,
	email string,
	ip netip.Addr,
	pairEvents int,
) error {
	if l.max == 0 {
		return nil
	}
	account := l.counters.giveBack(ctx,
		refund{pairKey(email, ip), pairEvents},
		refund{accountKey(email), 1})
	address := l.counters.giveBack(ctx, refund{addressKey(ip), 1})
	return errors.Join(account, address)
}

// accountKey names the counter of failures on an account. It holds a hash of the email, so that no
// address of a user enters Redis.
func accountKey(email string) string {
	sum := sha256.Sum256([]byte(email))
	return "login-limit:{" + hex.EncodeToString(sum[:16]) + "}"
}

// pairKey names the counter of failures on an account from one address.
func pairKey(email string, ip netip.Addr) string {
	return accountKey(email) + ":" + network(ip, homePrefixIPv6)
}

// addressKey names the counter of failures on all accounts from one address.
func addressKey(ip netip.Addr) string {
	return "login-limit:{" + network(ip, hostPrefixIPv6) + "}"
}

// network names who an address counts as: an IPv4 address as itself, an IPv6 address as its network
// of the given prefix length.
func network(ip netip.Addr, prefixIPv6 int) string {
	if ip.Is6() {
		return netip.PrefixFrom(ip, prefixIPv6).Masked().String()
	}
	return ip.String()
}
