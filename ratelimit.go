package main

// ratelimit.go has the limits, which are counters in Redis. ratelimit.lua compares a counter with
// its maximum and increments it in one step. So the limits are exact for any number of simultaneous
// requests and replicas.

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
	// hostPrefixIPv6 is the network that an IPv6 address counts as. A single host can choose from
	// 2^64 addresses in it.
	hostPrefixIPv6 = 64

	// homePrefixIPv6 is the larger network that an address counts as when it guesses the password
	// of one account. A home line usually gets a /56, which has 256 networks of /64. If each of
	// those counted alone, one attacker could use up the limit of the whole account, and so lock
	// out its owner.
	homePrefixIPv6 = 56

	// wideFactor times the limit for one account and one address is the limit for one account and
	// all addresses, and also the limit for one address and all accounts.
	wideFactor = 10

	// maxMails is how many mails can be asked for at one address within mailWindow. A user who
	// misses one or two can ask again, and they are too few to be a nuisance.
	maxMails = 5

	// maxChangeMails is the limit for mails to an address that an account is to change to. Whoever
	// has them sent to somebody else's address leaves its owner one to reset a password with.
	maxChangeMails = maxMails - 1

	// maxNotices is the limit for all mails to an address that is not verified, notices included.
	maxNotices = 10

	// mailWindow is an hour, in seconds.
	mailWindow = 3600
)

// limit is a counter with the number of events that it allows in a window.
type limit struct {
	key string
	max int
}

// refund is a counter with a number of events to take off it.
type refund struct {
	key    string
	events int
}

// fixedWindow counts events in windows of a fixed length. The first event opens a window.
type fixedWindow struct {
	rdb     redis.Scripter
	seconds int
}

// take counts one event on each of the limits. If one of them is exhausted, it counts on none and
// returns -1. Otherwise it returns how many more events are allowed. It also returns the time until
// the window ends. The keys must lie in one slot of a Redis Cluster.
func (w fixedWindow) take(ctx context.Context, limits ...limit) (int, time.Duration, error) {
	names := make([]string, len(limits))
	args := []any{"take", w.seconds}
	for i, l := range limits {
		names[i] = l.key
		args = append(args, l.max)
	}
	reply, err := rateLimitScript.Run(ctx, w.rdb, names, args...).Int64Slice()
	if err != nil {
		return 0, 0, err
	}
	return int(reply[0]), time.Duration(reply[1]) * time.Millisecond, nil
}

// giveBack takes events off counters. The keys must lie in one slot of a Redis Cluster.
func (w fixedWindow) giveBack(ctx context.Context, refunds ...refund) error {
	names := make([]string, len(refunds))
	args := []any{"give_back", w.seconds}
	for i, f := range refunds {
		names[i] = f.key
		args = append(args, f.events)
	}
	return rateLimitScript.Run(ctx, w.rdb, names, args...).Err()
}

// requestLimiter limits the requests of a client. If max is 0 there is no limit, and take must not
// be called.
type requestLimiter struct {
	window fixedWindow
	max    int
}

// take counts a request from ip. It returns how many more are allowed, or -1 if this one is not,
// and the time until the window ends.
func (l *requestLimiter) take(ctx context.Context, ip netip.Addr) (int, time.Duration, error) {
	key := "rate-limit:{" + network(ip, hostPrefixIPv6) + "}"
	return l.window.take(ctx, limit{key, l.max})
}

// loginLimiter limits failed logins with three counters: one account from one address, one account
// from all addresses, and all accounts from one address. If max is 0 there is no limit.
type loginLimiter struct {
	window      fixedWindow
	max         int
	undoTimeout time.Duration // at least this long is left for taking events off the counters
}

// take counts an attempt to log in to the account of email, whether or not the account exists. It
// must be called before the password is checked, so that simultaneous attempts cannot exceed the
// limit. It reports whether the attempt is allowed and, if not, how long to wait. In the end an
// attempt that is not allowed counts on none of the counters.
func (l *loginLimiter) take(
	ctx context.Context,
	email string,
	ip netip.Addr,
) (bool, time.Duration, error) {
	if l.max == 0 {
		return true, 0, nil
	}
	left, wait, err := l.window.take(ctx,
		limit{pairKey(email, ip), l.max},
		limit{accountKey(email), wideFactor * l.max})
	if err != nil {
		return false, 0, err
	}
	if left < 0 {
		return false, wait, nil
	}

	// The counter of the address lies in another slot, so it takes a second step. If it came first,
	// refused attempts on one account would for a moment use up the limit of everybody behind this
	// address. An address holds at most its own pair's limit on an account in this way.
	left, wait, err = l.window.take(ctx, limit{addressKey(ip), wideFactor * l.max})
	if err == nil && left >= 0 {
		return true, 0, nil
	}
	ctx, cancel := l.timeToUndo(ctx)
	defer cancel()
	return false, wait, errors.Join(err, l.refundAccount(ctx, email, ip, 1))
}

// giveBack takes back an attempt whose password could not be judged.
func (l *loginLimiter) giveBack(ctx context.Context, email string, ip netip.Addr) error {
	return l.refund(ctx, email, ip, 1)
}

// forgive takes back an attempt whose password was right, and also forgets all failures on the
// account from this address.
func (l *loginLimiter) forgive(ctx context.Context, email string, ip netip.Addr) error {
	return l.refund(ctx, email, ip, l.max)
}

// refund takes pairEvents off the counter of the account and the address, and one event off each of
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
	ctx, cancel := l.timeToUndo(ctx)
	defer cancel()
	accountErr := l.refundAccount(ctx, email, ip, pairEvents)
	addressErr := l.window.giveBack(ctx, refund{addressKey(ip), 1})
	return errors.Join(accountErr, addressErr)
}

// refundAccount takes pairEvents off the counter of the account and the address, and one event off
// that of the account.
func (l *loginLimiter) refundAccount(
	ctx context.Context,
	email string,
	ip netip.Addr,
	pairEvents int,
) error {
	return l.window.giveBack(ctx,
		refund{pairKey(email, ip), pairEvents},
		refund{accountKey(email), 1})
}

// timeToUndo returns a context like ctx that does not end before undoTimeout has passed. So an
// attempt is given back even if the time of its request is over.
func (l *loginLimiter) timeToUndo(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, _ := ctx.Deadline()
	earliest := time.Now().Add(l.undoTimeout)
	if deadline.Before(earliest) {
		deadline = earliest
	}
	return context.WithDeadline(context.WithoutCancel(ctx), deadline)
}

// forgivePair forgets the failures on an account from one address, although nobody has logged in.
func (l *loginLimiter) forgivePair(ctx context.Context, email string, ip netip.Addr) error {
	if l.max == 0 {
		return nil
	}
	ctx, cancel := l.timeToUndo(ctx)
	defer cancel()
	return l.window.giveBack(ctx, refund{pairKey(email, ip), l.max})
}

// mailLimiter limits the mails to one address.
type mailLimiter struct {
	window fixedWindow
}

// take counts a mail to an address, whether or not it has an account. It reports whether the mail
// is allowed, which it is if fewer than most were counted before.
func (l *mailLimiter) take(ctx context.Context, email string, most int) (bool, error) {
	left, _, err := l.window.take(ctx, limit{"mail-limit:{" + emailHash(email) + "}", most})
	return left >= 0, err
}

// emailHash stands for an email in the name of a key, so that Redis holds no email address.
func emailHash(email string) string {
	sum := sha256.Sum256([]byte(email))
	return hex.EncodeToString(sum[:16])
}

// accountKey names the counter of an account.
func accountKey(email string) string {
	return "login-limit:{" + emailHash(email) + "}"
}

// pairKey names the counter of an account and an address.
func pairKey(email string, ip netip.Addr) string {
	return accountKey(email) + ":" + network(ip, homePrefixIPv6)
}

// addressKey names the counter of an address and all accounts.
func addressKey(ip netip.Addr) string {
	return "login-limit:{" + network(ip, hostPrefixIPv6) + "}"
}

// network returns what an address counts as: an IPv4 address as itself, an IPv6 address as its
// network with this prefix length.
func network(ip netip.Addr, prefixIPv6 int) string {
	if ip.Is6() {
		return netip.PrefixFrom(ip, prefixIPv6).Masked().String()
	}
	return ip.String()
}
