package main

// ratelimit.go holds the limits, which are counters in Redis. Each is checked and counted up in one
// run of ratelimit.lua, so it is exact for any number of simultaneous requests and replicas.

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

// counter names a counter in Redis. events is the most that it may count in a window when an event
// is taken, and how many it shall count less when events are given back.
type counter struct {
	key    string
	events int
}

// fixedWindow counts events in windows of so many seconds. The first event opens a window.
type fixedWindow struct {
	rdb     redis.Scripter
	seconds int
}

// take counts one event on each counter, or on none of them if one has reached its maximum. It
// returns how many more events are allowed, -1 if not even this one was, and the time until the
// window ends.
func (w fixedWindow) take(ctx context.Context, all ...counter) (int, time.Duration, error) {
	reply, err := w.run(ctx, "take", all).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// giveBack takes events off each counter.
func (w fixedWindow) giveBack(ctx context.Context, all ...counter) error {
	return w.run(ctx, "give_back", all).Err()
}

// run runs a command of ratelimit.lua. The counters must lie in one slot of a cluster.
func (w fixedWindow) run(ctx context.Context, command string, all []counter) *redis.Cmd {
	names := make([]string, len(all))
	args := []any{command, w.seconds}
	for i, one := range all {
		names[i] = one.key
		args = append(args, one.events)
	}
	return rateLimitScript.Run(ctx, w.rdb, names, args...)
}

// requestLimiter limits the requests of a client. A max of 0 means no limit.
type requestLimiter struct {
	window fixedWindow
	max    int
}

// take counts a request from ip. It returns how many more are allowed, -1 if this one was not, and
// the time until the window ends.
func (l *requestLimiter) take(ctx context.Context, ip netip.Addr) (int, time.Duration, error) {
	key := "rate-limit:{" + network(ip, hostPrefixIPv6) + "}"
	return l.window.take(ctx, counter{key, l.max})
}

// loginLimiter limits failed logins: on one account from one address, on one account from all
// addresses, and on all accounts from one address. A max of 0 means no limit.
type loginLimiter struct {
	window fixedWindow
	max    int
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
	left, wait, err := l.window.take(ctx,
		counter{pairKey(email, ip), l.max},
		counter{accountKey(email), accountFactor * l.max})
	if err != nil {
		return 0, err
	}
	if left < 0 {
		return wait, nil
	}

	// The counter of the address lies in another slot. It comes second, so that attempts on a pair
	// that is exhausted never touch it: others behind the address would be refused meanwhile.
	left, wait, err = l.window.take(ctx, counter{addressKey(ip), accountFactor * l.max})
	if err == nil && left >= 0 {
		return 0, nil
	}
	return wait, errors.Join(err, l.window.giveBack(ctx,
		counter{pairKey(email, ip), 1},
		counter{accountKey(email), 1}))
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
	account := l.window.giveBack(ctx,
		counter{pairKey(email, ip), pairEvents},
		counter{accountKey(email), 1})
	address := l.window.giveBack(ctx, counter{addressKey(ip), 1})
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
