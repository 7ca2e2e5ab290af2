package integration

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// redisKeyPatterns are the contract's keys, and the type of each.
var redisKeyPatterns = map[*regexp.Regexp]string{
	regexp.MustCompile(`^session:\{[0-9a-f-]{36}\}$`):                    "hash",
	regexp.MustCompile(`^blacklist:\{[0-9a-f-]{36}\}:[0-9A-Za-z_-]+$`):   "string",
	regexp.MustCompile(`^user-sessions:\{[0-9a-f-]{36}\}$`):              "zset",
	regexp.MustCompile(`^rate-limit:\{[0-9a-f.:/]+\}$`):                  "",
	regexp.MustCompile(`^login-limit:\{[0-9A-Za-z_=-]+\}$`):              "",
	regexp.MustCompile(`^login-limit:\{[0-9A-Za-z_=-]+\}:[0-9a-f.:/]+$`): "",
}

// ttl is a key's time to live, which every key has.
func (st *stores) ttl(t testing.TB, key string) time.Duration {
	t.Helper()
	ttl, err := st.keys.PTTL(t.Context(), key).Result()
	if err != nil || ttl <= 0 {
		t.Errorf("%s has the TTL %v (%v)", key, ttl, err)
	}
	return ttl
}

func (st *stores) exists(t testing.TB, key string) bool {
	t.Helper()
	n, err := st.keys.Exists(t.Context(), key).Result()
	if err != nil {
		t.Fatal(err)
	}
	return n == 1
}

// about asserts a duration, with slack for a slow run.
func about(t testing.TB, what string, got, want time.Duration) {
	t.Helper()
	if got > want+2*time.Second || got < want-30*time.Second {
		t.Errorf("%s: %v, want about %v", what, got, want)
	}
}

func (s *server) seconds(name string) time.Duration {
	n, err := strconv.Atoi(s.conf(name))
	if err != nil {
		panic(err)
	}
	return time.Duration(n) * time.Second
}

var redisKeys = []promise{
	{"session:{<sid>} lives as long as the refresh token, and holds the session but nothing secret", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		key := "session:{" + v.sid() + "}"
		about(t, key, s.st.ttl(t, key), s.duration("REFRESH_TOKEN_TTL"))
		var hash string
		if err := s.st.sql.QueryRow(t.Context(), "SELECT password_hash FROM users WHERE id = $1", v.id).Scan(&hash); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			fields, err := s.st.keys.HGetAll(t.Context(), key).Result()
			if err != nil {
				t.Fatal(err)
			}
			all := fmt.Sprint(fields)
			for _, there := range []string{v.id, claimsOf(t, v.refresh)["jti"].(string), v.ip, v.agent} {
				if !strings.Contains(all, there) {
					t.Errorf("%s does not hold %s: %s", key, there, all)
				}
			}
			for _, secret := range []string{v.refresh, strings.Split(v.refresh, ".")[2], hash, hash[7:], v.email, v.password} {
				if strings.Contains(all, secret) {
					t.Errorf("%s holds %s", key, secret)
				}
			}
			v.rotate()
		}
		v.send("POST", "/auth/logout", nil).want(200)
		if s.st.exists(t, key) {
			t.Errorf("%s is there after the logout", key)
		}
	}},
	{"blacklist:{<sid>}:<jti> is there for an exchanged and a logged out token, for what that token had left", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		exchanged := v.refresh
		v.rotate()
		about(t, "the exchanged token's key", s.st.ttl(t, blacklistKey(t, exchanged)), s.duration("REFRESH_TOKEN_TTL"))
		if s.st.exists(t, blacklistKey(t, v.refresh)) {
			t.Error("a token that is good is on the blacklist")
		}
		v.send("POST", "/auth/logout", nil).want(200)
		about(t, "the logged out token's key", s.st.ttl(t, blacklistKey(t, v.refresh)), s.duration("REFRESH_TOKEN_TTL"))
	}},
	{"user-sessions:{<userId>} is the user's session ids by expiry, and lives as long as the longest of them", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		key := "user-sessions:{" + v.id + "}"
		ids, err := s.st.keys.ZRangeWithScores(t.Context(), key, 0, -1).Result()
		if err != nil {
			t.Fatal(err)
		}
		want := map[any]bool{v.sid(): true, other.sid(): true}
		for _, id := range ids {
			delete(want, id.Member)
		}
		if len(ids) != 2 || len(want) != 0 {
			t.Errorf("%s is %v", key, ids)
		}
		about(t, key, s.st.ttl(t, key), s.duration("REFRESH_TOKEN_TTL"))
		v.send("DELETE", "/auth/sessions", nil).want(200)
		if s.st.exists(t, key) {
			t.Errorf("%s is there after all were revoked", key)
		}
	}},
	{"rate-limit:{<ip>} lives for the window; an IPv6 address is its /64 there", kept, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		ip := newIP()
		s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
		about(t, "the counter", s.st.ttl(t, "rate-limit:{"+ip+"}"), s.seconds("RATE_LIMIT_WINDOW"))
		s.send(t, request{method: "GET", path: "/auth/me", ip: "2001:db8:77:88:1:2:3:4"}).want(401)
		if n := s.count(t, "rate-limit:{2001:db8:77:88:*"); n != 1 {
			t.Errorf("%d counters of the /64", n)
		}
		if n := s.count(t, "rate-limit:{2001:db8:77:88:1*"); n != 0 {
			t.Error("the counter is the address's own")
		}
	}},
	{"a rate limit that has lost its TTL gets it back", kept, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		ip := newIP()
		s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
		if err := s.st.keys.Persist(t.Context(), "rate-limit:{"+ip+"}").Err(); err != nil {
			t.Fatal(err)
		}
		s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
		s.st.ttl(t, "rate-limit:{"+ip+"}")
	}},
	{"login-limit:{<email hash>} and login-limit:{<email hash>}:<ip> live for the window, and never hold the email", own, func(t *testing.T, _ *server) {
		s := serve(t, fresh(t), development)
		v := s.signup(t)
		before := s.count(t, "login-limit:*")
		s.tryLogin(t, v.email, newPassword(), v.ip).want(401)
		keys, err := s.st.keys.Keys(t.Context(), "login-limit:*").Result()
		if err != nil || len(keys) != before+2 {
			t.Errorf("keys %q (%v)", keys, err)
		}
		pair := 0
		for _, key := range keys {
			if ttl := s.st.ttl(t, key); ttl > 900*time.Second {
				t.Errorf("%s lives for %v", key, ttl)
			}
			if strings.Contains(key, v.email) || strings.Contains(key, "@") {
				t.Errorf("%s has the email in it", key)
			}
			if strings.HasSuffix(key, "}:"+v.ip) {
				pair++
			}
		}
		if pair != 1 {
			t.Errorf("%d keys for the pair: %q", pair, keys)
		}
	}},
	{"there are no other keys, and none without a TTL", kept, func(t *testing.T, s *server) {
		// After all that the other tests have done to the shared Redis.
		met := map[string]int{}
		iter := s.st.keys.Scan(t.Context(), 0, "*", 1000).Iterator()
		for iter.Next(t.Context()) {
			key := iter.Val()
			ttl, err := s.st.keys.PTTL(t.Context(), key).Result()
			if err != nil {
				t.Fatal(err)
			}
			if ttl == -2 { // it ran out in this moment
				continue
			}
			known := false
			for pattern, kind := range redisKeyPatterns {
				if !pattern.MatchString(key) {
					continue
				}
				known = true
				met[pattern.String()]++
				if got, err := s.st.keys.Type(t.Context(), key).Result(); err != nil || kind != "" && got != kind && got != "none" {
					t.Errorf("%s is a %s (%v), want %s", key, got, err, kind)
				}
			}
			if !known || ttl == -1 { // of -2 nothing was left, and of 0 a part of a millisecond
				t.Errorf("key %s, TTL %v", key, ttl)
			}
		}
		if err := iter.Err(); err != nil {
			t.Fatal(err)
		}
		for pattern := range redisKeyPatterns {
			if s.c != nil && met[pattern.String()] == 0 {
				t.Errorf("no key is like %s", pattern)
			}
		}
		t.Logf("%v", met)
	}},
}

// count is how many keys match a glob.
func (s *server) count(t testing.TB, glob string) int {
	t.Helper()
	keys, err := s.st.keys.Keys(t.Context(), strings.ReplaceAll(glob, "{", "[{]")).Result()
	if err != nil {
		t.Fatal(err)
	}
	return len(keys)
}
