package contract

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

func (c *client) sessionKey() string { return "session:{" + c.id + "}:" + c.sid() }
func (c *client) indexKey() string   { return "user-sessions:{" + c.id + "}" }

// blacklistKey is the key of a refresh token that was exchanged.
func (c *client) blacklistKey(refresh string) string {
	return "blacklist:{" + c.id + "}:" + c.s.claims(refresh).text("jti")
}

// accountKey is the key of the failed logins on the one account that an address has guessed at.
func (s *server) accountKey(ip string) string {
	pair := s.keys("login-limit:[{]*[}]:" + ip)
	if len(pair) != 1 {
		s.Fatalf("the keys of pairs with %s are %q", ip, pair)
	}
	return strings.TrimSuffix(pair[0], ":"+ip)
}

// keyForms are the contract's keys and the type of each, "" where it says nothing of the type.
var keyForms = map[*regexp.Regexp]string{
	regexp.MustCompile(`^session:\{[0-9a-f-]{36}\}:[0-9a-f-]{36}$`):      "hash",
	regexp.MustCompile(`^user-sessions:\{[0-9a-f-]{36}\}$`):              "zset",
	regexp.MustCompile(`^blacklist:\{[0-9a-f-]{36}\}:[0-9A-Za-z_-]+$`):   "string",
	regexp.MustCompile(`^rate-limit:\{[0-9a-f.:/]+\}$`):                  "",
	regexp.MustCompile(`^login-limit:\{[0-9A-Za-z_=-]{20,}\}$`):          "",
	regexp.MustCompile(`^login-limit:\{[0-9A-Za-z_=-]+\}:[0-9a-f.:/]+$`): "",
	regexp.MustCompile(`^login-limit:\{[0-9a-f:]*[.:][0-9a-f.:/]+\}$`):   "",
	regexp.MustCompile(`^mail-limit:\{[0-9A-Za-z_=-]{20,}\}$`):           "",
}

var keyPromises = []promise{
	{"session:{<userId>}:<sid> lives as long as the refresh token, without a secret", stored,
		holdsNothingSecret},
	{"user-sessions:{<userId>} is the user's session ids by expiry, as long as the last", stored,
		func(s *server) {
			c := s.signup()
			for _, x := range []*client{c, c.login()} {
				score, err := s.stores.redis.ZScore(s.Context(), c.indexKey(), x.sid()).Result()
				exp := s.claims(x.refresh).number("exp")
				s.expect(int64(score) == exp,
					"the session until %d has the score %f (%v)", exp, score, err)
			}
			s.stores.redis.Expire(s.Context(), c.indexKey(), time.Minute)
			c.rotate() // which prolongs what has grown old
			s.lasts(c.indexKey(), s.duration("REFRESH_TOKEN_TTL"))
			c.revokeAll().ok()
			keys := s.keys(c.indexKey())
			s.expect(len(keys) == 0, "after all were revoked there is %q", keys)
		}},
	{"blacklist:{<userId>}:<jti> is an exchanged token, for REFRESH_REUSE_LEEWAY", stored,
		func(s *server) {
			c := s.signup()
			exchanged := c.blacklistKey(c.refresh)
			c.rotate()
			ttl := s.ttl(exchanged)
			leeway := s.duration("REFRESH_REUSE_LEEWAY")
			s.expect(ttl <= leeway && ttl >= leeway/2,
				"%s lives for %v, want %v", exchanged, ttl, leeway)
			keys := s.keys("blacklist:{" + c.id + "}*")
			s.expect(len(keys) == 1, "the keys are %q, want that of the exchanged token", keys)
		}},
	{"a revocation only deletes: it leaves no session and no blacklist key", own, func(s *server) {
		s = s.start(shortLeeway)
		for name, revoke := range revocations {
			c := s.signup()
			other := c.login()
			before := c.userKeys()
			revoke(c, other).ok()
			for _, key := range c.userKeys() {
				s.expect(slices.Contains(before, key) && key != c.sessionKey(),
					"%s: there is %s", name, key)
			}
		}
	}},
	{"a user has at most 100 sessions: one more ends what would expire first", own, atMost100},
	{"a session's memory does not grow with its refreshes", own, func(s *server) {
		s = s.start(shortLeeway.with(noRateLimit))
		c := s.signup()
		c.rotate()
		size := func() (bytes int64) {
			s.afterLeeway()
			for _, key := range c.userKeys() {
				bytes += s.stores.redis.MemoryUsage(s.Context(), key).Val() // 0 if it has run out
			}
			return bytes
		}
		before := size()
		for range 100 {
			c.rotate()
		}
		after := size()
		s.expect(before > 0 && after <= before+16, // a number more or less of a digit
			"the user's keys took %d bytes after one refresh, %d after 101", before, after)
	}},
	{"rate-limit and login-limit live for the window, and get a lost TTL back", stored,
		func(s *server) {
			c := s.newUser()
			for n := range 2 {
				s.guess(c.email, c.ip).refused("invalid_credentials")
				account := s.accountKey(c.ip)
				s.expect(!strings.Contains(account, "@"), "%s has the email in it", account)
				counters := map[string]string{
					"rate-limit:{" + c.ip + "}":  "RATE_LIMIT_WINDOW",
					"login-limit:{" + c.ip + "}": "LOGIN_LIMIT_WINDOW",
					account + ":" + c.ip:         "LOGIN_LIMIT_WINDOW",
					account:                      "LOGIN_LIMIT_WINDOW",
				}
				for key, window := range counters {
					s.lasts(key, s.duration(window))
					counted, err := s.stores.redis.Get(s.Context(), key).Int()
					s.expect(counted == n+1, "%s counts %d (%v), want %d", key, counted, err, n+1)
					s.stores.redis.Persist(s.Context(), key)
				}
				if n == 1 {
					s.evict(slices.Collect(maps.Keys(counters))...)
				}
			}
			s.fails(10, c.email, c.ip)
			pair := s.accountKey(c.ip) + ":" + c.ip
			s.stores.redis.Persist(s.Context(), pair)
			s.guess(c.email, c.ip).refused("too_many_attempts")
			s.lasts(pair, s.duration("LOGIN_LIMIT_WINDOW")) // also where it refuses
		}},
	{"an IPv6 address is its /64 in rate-limit:{<ip>}", stored, func(s *server) {
		net := newIPv6Net()
		s.send(get("/auth/me").ip(net + ":2:3:4:5"))
		keys := s.keys("rate-limit:[{]" + net + ":*")
		s.expect(len(keys) == 1 && !strings.Contains(keys[0], ":2:"), "the counters are %q", keys)
	}},
	{"there are no other keys, and none without a TTL", own, noOtherKeys},
}

// newIPv6Net is the first half of an IPv6 address, which no other client has (RFC 4193).
func newIPv6Net() string {
	id := newUUID()
	return fmt.Sprintf("fd%s:1%s:1%s:1%s", id[:2], id[2:5], id[9:12], id[15:18])
}

func holdsNothingSecret(s *server) {
	c := s.signup()
	s.lasts(c.sessionKey(), s.duration("REFRESH_TOKEN_TTL"))
	hash := c.passwordHash()
	for range 2 {
		fields, err := s.stores.redis.HGetAll(s.Context(), c.sessionKey()).Result()
		if err != nil {
			s.Fatal(err)
		}
		held := fmt.Sprint(fields)
		for _, there := range []string{s.claims(c.refresh).text("jti"), c.ip, c.agent} {
			s.expect(strings.Contains(held, there),
				"%s does not hold %s: %s", c.sessionKey(), there, held)
		}
		signature := strings.Split(c.refresh, ".")[2]
		for _, secret := range []string{signature, hash, hash[7:], c.email, c.password} {
			s.expect(!strings.Contains(held, secret), "%s holds %s", c.sessionKey(), secret)
		}
		s.stores.redis.Expire(s.Context(), c.sessionKey(), time.Minute)
		c.rotate() // which prolongs what has grown old
		s.lasts(c.sessionKey(), s.duration("REFRESH_TOKEN_TTL"))
	}
	c.logout().ok()
	keys := s.keys(c.sessionKey())
	s.expect(len(keys) == 0, "the session is there after the logout")
}

func atMost100(s *server) {
	brief := s.start(env{"REFRESH_TOKEN_TTL": "1h"})
	c := s.start(env{"REFRESH_TOKEN_TTL": "2h"}).signup().on(s)
	second := c.login()
	shortest := c.on(brief).login() // logged in last, but it would expire first
	for range 97 {
		c.login()
	}
	shortest.me(shortest.access).ok()
	hundredth := c.login()
	shortest.gone()
	c.me(c.access).ok()
	n := len(hundredth.sessions())
	s.expect(n == 100, "%d sessions, want 100", n)
	late := c.on(brief).login() // itself the one that would expire first
	late.me(late.access).ok()
	c.gone()
	second.me(second.access).ok()
	n = len(s.keys("session:{" + c.id + "}:*"))
	s.expect(n == 100, "%d sessions are kept, want 100", n)
	late.lives()
	s.lasts(c.indexKey(), s.duration("REFRESH_TOKEN_TTL")) // as long as the longest session
}

// emptyRedis is the URL of an empty database of the same Redis.
func (s *server) emptyRedis() string {
	options := *s.stores.redis.Options()
	for options.DB = 15; options.DB > 0; options.DB-- {
		db := redis.NewClient(&options)
		n, err := db.DBSize(s.Context()).Result()
		db.Close()
		if err == nil && n == 0 {
			base, query, _ := strings.Cut(s.stores.redisURL, "?")
			scheme, rest, _ := strings.Cut(base, "://")
			host, _, _ := strings.Cut(rest, "/")
			return fmt.Sprintf("%s://%s/%d?%s", scheme, host, options.DB, query)
		}
	}
	s.Skip("needs an empty database of this Redis, of the numbers 1 to 15")
	return ""
}

func noOtherKeys(s *server) {
	st := openStores(s.T, s.stores.databaseURL, strings.TrimSuffix(s.emptyRedis(), "?"))
	s = s.startOn(st, env{"LOGIN_LIMIT_MAX": "1"})
	left := s.signup() // and never asked again
	left.rotate()
	for _, revoke := range revocations {
		c := s.signup()
		other := c.login()
		c.rotate()
		revoke(c, other).ok()
		c.show(c.refresh)
	}
	s.signup().sweep()
	for _, ip := range []string{newIP(), newIPv6Net() + "::1"} {
		email := newEmail()
		s.guess(email, ip).refused("invalid_credentials")
		s.guess(email, ip).refused("too_many_attempts")
	}
	met := map[string]int{}
	all := s.keys("*")
	for _, key := range all {
		known := false
		for form, kind := range keyForms {
			if form.MatchString(key) {
				known = true
				met[form.String()]++
				got := s.stores.redis.Type(s.Context(), key).Val()
				s.expect(kind == "" || got == kind, "%s is a %s, want a %s", key, got, kind)
			}
		}
		ttl, err := s.stores.redis.PTTL(s.Context(), key).Result()
		s.expect(known && ttl != -1, "there is %s, with the TTL %v (%v)", key, ttl, err)
	}
	for form := range keyForms {
		s.expect(met[form.String()] != 0, "no key is like %s", form)
	}
	s.evict(all...)
}
