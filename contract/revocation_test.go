package contract

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// revocations are all that ends a client's session; other is another session of the user.
var revocations = map[string]func(c, other *client) *answer{
	"logged out": func(c, _ *client) *answer { return c.logout() },
	"logged out by the cookie": func(c, _ *client) *answer {
		return c.s.send(post("/auth/logout").cookie(c.refresh))
	},
	"revoked by id":  func(c, other *client) *answer { return other.revoke(c.sid()) },
	"revoked by all": func(_, other *client) *answer { return other.revokeAll() },
	"ended by a change": func(_, other *client) *answer {
		return other.changePassword(other.password, newPassword())
	},
	"ended by a deletion": func(_, other *client) *answer {
		return other.deleteAccount(other.password)
	},
}

var revocationPromises = []promise{
	{"a refresh in flight while its session is revoked never brings it back", own, func(s *server) {
		refresh := func(c *client) *answer { return c.show(c.refresh) }
		race(s, refresh, slices.Collect(maps.Keys(revocations))...)
	}},
	{"a refresh beside a change of the password by the same session goes on", own, func(s *server) {
		servers := []*server{s, s.start(nil)}
		for range rounds {
			c := s.signup()
			answers := together(4, func(i int) *answer {
				if i == 0 {
					return c.on(servers[1]).changePassword(c.password, newPassword())
				}
				return c.elsewhere().on(servers[i%2]).show(c.refresh)
			})
			answers[0].ok()
			c.takeTheOne(answers[1:])
			c.on(servers[1]).lives()
		}
	}},
	{"a login beside a change of its password, or a deletion, leaves no session", own,
		func(s *server) {
			race(s, (*client).tryLogin, "ended by a change", "ended by a deletion")
		}},
	{"of two simultaneous changes of the password one is made", own, twoChanges},
	{"beside a change of the password a deletion needs the new one", own, deletionBesideChange},
	{"a deletion that cannot end the sessions is not made", stored, func(s *server) {
		c := s.signup()
		s.spoil(c.indexKey())
		c.deleteAccount(c.password).refused("internal").keepsCookie()
		s.evict(c.indexKey())
		c.login().lives()
	}},
	{"a session older than a SESSION_MAX_TTL that was lowered ends at its next refresh", own,
		func(s *server) {
			c := s.signup()
			time.Sleep(1100 * time.Millisecond)
			c.on(s.start(env{"SESSION_MAX_TTL": "1s"})).show(c.refresh).refused("session_revoked")
		}},
	{"a password hash changed by other means ends the sessions at their next refresh", stored,
		func(s *server) {
			c := s.signup()
			other := c.login()
			c.password = newPassword()
			c.setPassword(c.password)
			for _, x := range []*client{c, other} {
				x.show(x.refresh).refused("session_revoked")
				x.gone()
			}
			c.login().lives()
		}},
	{"a refresh token whose user is gone is session_revoked", stored, func(s *server) {
		c := s.signup()
		s.exec("DELETE FROM users WHERE id = $1", c.id)
		c.show(c.refresh).refused("session_revoked")
		c.gone()
	}},
	{"a rehash at login (another cost) carries every session of the user along", own,
		func(s *server) {
			c := s.signup()
			other := c.login()
			for _, server := range []*server{s.start(env{"BCRYPT_COST": "5"}), s} {
				third := c.on(server).login()
				hash := c.passwordHash()
				s.expect(hash[5:6] == server.env["BCRYPT_COST"],
					"after a login at the cost %s: %s", server.env["BCRYPT_COST"], hash)
				for _, living := range []*client{c, other, third} {
					living.lives()
				}
			}
			s.guess(c.email, newIP()).refused("invalid_credentials")
		}},
	{"a rehash revives no session of an older password", own, func(s *server) {
		c := s.signup()
		owner := c.on(s.start(env{"BCRYPT_COST": "5"}))
		owner.password = newPassword()
		c.setPassword(owner.password)
		owner = owner.login()
		c.show(c.refresh).refused("session_revoked")
		owner.lives()
	}},
	{"rehashes by replicas of different costs end no session meanwhile", own, refreshAgainstRehash},
	{"logout: a valid Bearer decides, the cookie counts beside a missing or expired one", secrets,
		logouts},
	{"logout: a genuine cookie ends its session even if it was exchanged before", aURL,
		func(s *server) {
			c := s.signup()
			old := c.refresh
			c.rotate()
			s.send(post("/auth/logout").cookie(old)).ok()
			c.gone()
		}},
	{"logout: one that fails leaves the cookie where it is", stored, func(s *server) {
		c := s.signup()
		s.spoil(c.indexKey())
		c.logout().refused("internal").keepsCookie()
	}},
	{"revocation holds on every replica at once", own, func(s *server) {
		replica := s.start(nil)
		for name, revoke := range revocations {
			c := s.signup()
			other := c.login()
			c.on(replica).me(c.access).ok()
			revoke(c, other).ok()
			c.on(replica).me(c.access).shouldBe("session_revoked", name)
			c.on(replica).show(c.refresh).shouldBe("session_revoked", name)
		}
	}},
	{"if Redis loses its data, sessions end, and no dead token comes back to life", stored,
		func(s *server) {
			c := s.signup()
			dead := c.refresh
			c.rotate()
			s.evict(c.userKeys()...)
			c.me(c.access).refused("session_revoked")
			c.show(c.refresh).refused("session_revoked")
			again := c.login()
			c.show(dead).want(401)
			c.gone()
			again.lives()
		}},
	{"an index that cannot be written uses up no refresh token", stored, func(s *server) {
		c := s.signup()
		s.spoil(c.indexKey())
		c.show(c.refresh).refused("internal").keepsCookie()
		s.evict(c.indexKey())
		c.rotate() // and the index is whole again
		c.login().revokeAll().ok()
		c.gone()
	}},
	{"a refresh reads the user: its access token has the email of PostgreSQL", stored,
		func(s *server) {
			c := s.signup()
			email := newEmail()
			s.exec("UPDATE users SET email = $1 WHERE id = $2", email, c.id)
			c.rotate()
			got := s.claims(c.access).text("email")
			s.expect(got == email, "email %s, want %s", got, email)
		}},
	{"a session that has run out is over, and not listed", own, func(s *server) {
		c := s.start(env{"REFRESH_TOKEN_TTL": "1s"}).signup()
		lasting := c.on(s).login()
		s.eventually(5*time.Second, "the session is listed no more", func() bool {
			return len(lasting.sessions()) == 1
		})
		c.me(c.access).refused("session_revoked")
	}},
	{"a session lives at most SESSION_MAX_TTL, however often it is refreshed", own, livesAtMost},
	{"a longer REFRESH_TOKEN_TTL is capped by SESSION_MAX_TTL", own, func(s *server) {
		c := s.start(env{"SESSION_MAX_TTL": "1h", "REFRESH_TOKEN_TTL": "2h"}).signup()
		for range 2 {
			got := s.claims(c.refresh)
			life := got.number("exp") - got.number("iat")
			s.expect(life <= 3600 && life >= 3590, "the refresh token lives %d s, want 3600", life)
			c.rotate()
		}
	}},
}

func bcryptHash(password string, cost int) string {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		panic(err)
	}
	return string(hash)
}

// setPassword changes the password in PostgreSQL, behind the server's back.
func (c *client) setPassword(password string) {
	hash := bcryptHash(password, 4)
	c.s.exec("UPDATE users SET password_hash = $1 WHERE id = $2", hash, c.id)
}

// race lets something that would give tokens run against what ends the session of a user, at two
// servers, and asserts that no such token is good afterwards.
func race(s *server, attempt func(c *client) *answer, ways ...string) {
	servers := []*server{s, s.start(nil)}
	for _, way := range ways {
		won := 0
		for range rounds {
			c := s.signup()
			other := c.login()
			won += c.against(servers, attempt, func(on *server) *answer {
				return revocations[way](c, other.on(on))
			})
		}
		s.Logf("%s: it came too late in %d of %d rounds", way, won, rounds)
	}
}

// against lets four things that would give tokens to a client run beside what ends its sessions,
// at two servers, and asserts that no such token is good afterwards. It returns how many came.
func (c *client) against(
	servers []*server,
	attempt func(c *client) *answer,
	end func(on *server) *answer,
) (won int) {
	answers := together(4, func(i int) *answer {
		if i == 0 {
			return end(servers[1])
		}
		return attempt(c.elsewhere().on(servers[i%2]))
	})
	answers[0].ok()
	c.gone()
	for _, a := range answers[1:] {
		if a.status() != 200 {
			a.want(401)
			continue
		}
		won++
		late := c.elsewhere().on(servers[1])
		late.take(a)
		late.gone()
	}
	return won
}

func twoChanges(s *server) {
	for range rounds {
		c := s.signup()
		both := []*client{c, c.login()}
		next := []string{newPassword(), newPassword()}
		answers := together(2, func(i int) *answer {
			return both[i].changePassword(c.password, next[i])
		})
		won := 0
		if answers[1].status() == 200 {
			won = 1
		}
		answers[won].ok()
		answers[1-won].want(401)
		both[won].lives()
		both[1-won].gone()
		s.tryLogin(c.email, next[won], newIP()).ok()
		s.tryLogin(c.email, next[1-won], newIP()).refused("invalid_credentials")
	}
}

func deletionBesideChange(s *server) {
	for range rounds {
		c := s.signup()
		other := c.login()
		next := newPassword()
		answers := together(2, func(i int) *answer {
			if i == 0 {
				return c.changePassword(c.password, next)
			}
			return other.deleteAccount(c.password)
		})
		changed, deleted := answers[0].status() == 200, answers[1].status() == 200
		s.expect(changed != deleted, "change: %v, deletion: %v", answers[0], answers[1])
	}
}

func refreshAgainstRehash(s *server) {
	servers := []*server{s, s.start(env{"BCRYPT_COST": "5"})}
	for range rounds {
		c := s.signup()
		living := []*client{c, c.login()}
		answers := together(6, func(i int) *answer {
			if i < 2 {
				return living[i].show(living[i].refresh)
			}
			return c.elsewhere().on(servers[i%2]).tryLogin()
		})
		for i, a := range answers {
			if i >= 2 {
				living = append(living, c.elsewhere())
			}
			living[i].take(a.ok())
		}
		for _, x := range living {
			x.lives()
		}
	}
}

func logouts(s *server) {
	replica := s
	if s.lab != nil {
		replica = s.start(nil)
	}
	for _, x := range []struct {
		bearer string
		cookie string
		code   string
		ends   string // whose session
	}{
		{"good", "good", "", "own"},
		{"good", "none", "", "own"},
		{"good", "other's", "", "own"},
		{"good", "nonsense", "", "own"},
		{"none", "good", "", "own"},
		{"expired", "good", "", "own"},
		{"expired", "other's", "", "other's"},
		{"nonsense", "good", "invalid_token", ""},
		{"swapped", "good", "invalid_token", ""},
		{"expired", "none", "token_expired", ""},
		{"none", "expired", "token_expired", ""},
		{"expired", "expired", "token_expired", ""},
		{"none", "nonsense", "invalid_token", ""},
		{"none", "swapped", "invalid_token", ""},
		{"none", "none", "missing_token", ""},
	} {
		c := s.signup()
		other := c.login()
		bearer := map[string]string{
			"good": c.access, "swapped": c.refresh, "nonsense": "x",
			"expired": c.accessWith(expired()),
		}[x.bearer]
		cookie := map[string]string{
			"good": c.refresh, "swapped": c.access, "nonsense": "x", "other's": other.refresh,
			"expired": c.refreshWith(expired()),
		}[x.cookie]
		r := post("/auth/logout").with("Authorization", "Basic eDp5") // which is no Bearer
		if bearer != "" {
			r = r.bearer(bearer)
		}
		if cookie != "" {
			r = r.cookie(cookie)
		}
		name := fmt.Sprintf("Bearer %s, cookie %s", x.bearer, x.cookie)
		s.send(r).shouldBe(x.code, name).clearsCookie()
		for owner, session := range map[string]*client{"own": c, "other's": other} {
			a := session.on(replica).me(session.access)
			s.expect((a.status() != 200) == (owner == x.ends),
				"%s: the %s session: %d %s", name, owner, a.status(), a.body)
		}
	}
}

func livesAtMost(s *server) {
	s = s.start(env{"SESSION_MAX_TTL": "3s", "REFRESH_TOKEN_TTL": "2s"})
	c := s.signup()
	end := s.claims(c.refresh).number("iat") + 3
	s.eventually(10*time.Second, "the session ends", func() bool {
		a := c.elsewhere().show(c.refresh)
		if a.status() != 200 {
			s.expect(strings.Contains("session_revoked token_expired", a.code()),
				"it ends with %s", a.body)
			return true
		}
		c.take(a)
		// One second is for the rounding of two clocks.
		if exp := s.claims(c.refresh).number("exp"); exp > end+1 {
			s.Fatalf("a refresh token passes the session's end by %d s", exp-end)
		}
		return false
	})
	now := time.Now().Unix()
	s.expect(now >= end-1 && now <= end+3, "the session ended %d s after its end", now-end)
	s.eventually(5*time.Second, "its access token is dead", func() bool {
		return c.elsewhere().me(c.access).code() == "session_revoked"
	})
	c.login().lives()
}
