package contract

import (
	"time"
)

// rounds is how often a race is run: enough to meet a window of a few instructions.
const rounds = 12

var resend = env{"REFRESH_REUSE_POLICY": "resend"}

// raced asserts what two tabs of one browser get that refresh at once: the later one's 401, and no
// cookie header.
func (a *answer) raced() {
	a.refused("refresh_reused").keepsCookie()
}

// isTheft asserts that a refresh token counted as stolen: the whole session is over.
func (a *answer) isTheft(c *client) {
	a.refused("refresh_reused").clearsCookie()
	c.gone()
}

// takeTheOne asserts that one of simultaneous refreshes has won and the others got what is due to
// them, and takes the winner's tokens.
func (c *client) takeTheOne(answers []*answer) {
	if n := count(answers, 200); n != 1 {
		c.s.Fatalf("%d of %d simultaneous refreshes got 200", n, len(answers))
	}
	for _, a := range answers {
		if a.status() == 200 {
			c.take(a)
		} else {
			a.raced()
		}
	}
}

var rotationPromises = []promise{
	{"of simultaneous refreshes exactly one is 200, the others are refresh_reused", aURL,
		func(s *server) {
			c := s.signup()
			servers := []*server{s, s}
			if s.lab != nil {
				servers[1] = s.start(nil)
			}
			for range 2 * rounds {
				c.takeTheOne(together(8, func(i int) *answer {
					return c.elsewhere().on(servers[i%2]).show(c.refresh)
				}))
			}
			c.lives()
		}},
	{"a token shown again within the leeway gets only that 401; so do older ones", aURL,
		func(s *server) {
			c := s.signup()
			oldest := c.refresh
			c.rotate()
			old := c.refresh
			c.rotate()
			for range 3 {
				c.show(old).raced()
				c.show(oldest).raced()
			}
			c.lives()
		}},
	{"later it is theft: the 401 revokes the whole session and clears the cookie", own,
		func(s *server) {
			s = s.start(shortLeeway)
			c := s.signup()
			other := c.login()
			old := c.refresh
			c.rotate()
			s.afterLeeway()
			c.rotate() // which does not forgive what is older
			c.show(old).isTheft(c)
			other.lives() // the user's other session has nothing to do with it
			n := len(other.sessions())
			s.expect(n == 1, "%d sessions are listed, want 1", n)
		}},
	{"any other 401 of refresh or logout clears the cookie", aURL, func(s *server) {
		// It does on every answer, see assertError; here are some.
		for _, path := range []string{"/auth/refresh", "/auth/logout"} {
			c := s.signup()
			s.send(post(path)).refused("missing_token").clearsCookie()
			s.send(post(path).cookie("x")).refused("invalid_token").clearsCookie()
			c.revoke(c.sid()).ok()
			s.send(post(path).cookie(c.refresh)).refused("session_revoked").clearsCookie()
		}
	}},
	{"a living session's token that is not known to it is theft", secrets, func(s *server) {
		c := s.signup()
		c.show(c.refreshWith(claims{"jti": newUUID()})).isTheft(c)
	}},
	{"without its blacklist key only the token exchanged last is known, others are theft", stored,
		func(s *server) {
			c := s.signup()
			old := c.refresh
			c.rotate()
			s.evict(c.blacklistKey(old))
			c.show(old).raced()
			c.rotate()
			c.show(old).isTheft(c)
		}},
	{"an access token from before a refresh stays good until its exp", aURL, func(s *server) {
		c := s.signup()
		old := c.access
		c.rotate()
		c.rotate()
		c.me(old).ok()
	}},
	{"resend: within the leeway the token exchanged last gets the same Set-Cookie line", own,
		func(s *server) {
			s = s.start(resend.with(env{"REFRESH_REUSE_LEEWAY": "3s"}))
			c := s.signup()
			old := c.refresh
			first := c.rotate()
			time.Sleep(1100 * time.Millisecond) // a Max-Age reckoned from now would show
			s.exec("UPDATE users SET email = $1 WHERE id = $2", newEmail(), c.id)
			again := c.show(old).ok()
			s.expect(again.Header.Get("Set-Cookie") == first.Header.Get("Set-Cookie"),
				"the successor of one token:\n%s\n%s", first.Header.Get("Set-Cookie"),
				again.Header.Get("Set-Cookie"))
			s.expect(again.str("accessToken") != c.access, "the access token is no fresh one")
			c.me(again.str("accessToken")).ok()
			s.afterLeeway()
			c.show(old).isTheft(c) // then it is that all the same
		}},
	{"resend: no token older than that is answered, and the chain never forks", own, neverForks},
	{"resend: a token whose password was changed meanwhile gets nothing", own, func(s *server) {
		c := s.start(resend).signup()
		old := c.refresh
		c.rotate()
		c.setPassword(newPassword())
		c.show(old).refused("session_revoked")
		c.gone()
	}},
	{"without a leeway every second use is theft", own, func(s *server) {
		c := s.start(env{"REFRESH_REUSE_LEEWAY": "0s"}).signup()
		old := c.refresh
		c.rotate()
		time.Sleep(2 * time.Millisecond) // the clock counts milliseconds
		c.show(old).isTheft(c)
	}},
	{"resend: a token whose session was revoked meanwhile gets nothing", own, func(s *server) {
		s = s.start(resend)
		for name, revoke := range revocations {
			c := s.signup()
			other := c.login()
			old := c.refresh
			c.rotate()
			revoke(c, other).ok()
			a := c.show(old)
			s.expect(a.status() == 401, "%s: %d %s", name, a.status(), a.body)
			c.gone()
		}
	}},
}

func neverForks(s *server) {
	servers := []*server{s.start(resend), s.start(resend)}
	c := servers[0].signup()
	oldest := c.refresh
	c.rotate()
	older := c.refresh
	c.rotate()
	c.show(oldest).raced()
	s.expect(c.show(older).ok().refreshCookie().Value == c.refresh, "the chain has forked")
	for range rounds {
		lines := map[string]bool{}
		answers := together(8, func(i int) *answer {
			return c.elsewhere().on(servers[i%2]).show(c.refresh)
		})
		for _, a := range answers {
			lines[a.ok().Header.Get("Set-Cookie")] = true
			c.me(a.str("accessToken")).ok()
		}
		if len(lines) != 1 {
			s.Fatalf("%d successors of one token", len(lines))
		}
		c = c.elsewhere()
		c.take(answers[0])
	}
	c.lives()
}
