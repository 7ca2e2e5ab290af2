package contract

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

var rateLimitPromises = []promise{
	{"every limited response says what is left of the limit, and when the window ends", aURL,
		func(s *server) {
			limit, _ := strconv.Atoi(s.conf("RATE_LIMIT_MAX"))
			window, _ := strconv.Atoi(s.conf("RATE_LIMIT_WINDOW"))
			ip := newIP()
			for i, path := range []string{"/auth/me", "/nowhere", "/auth/login"} {
				left, seconds := s.send(get(path).ip(ip)).limit()
				s.expect(left == limit-1-i && seconds >= window-2 && seconds <= window,
					"request %d: %d left for %d seconds", i+1, left, seconds)
			}
		}},
	{"exactly RATE_LIMIT_MAX pass, of simultaneous requests at two replicas", own, passesExactly},
	{"it covers every route but the health ones and preflights", own, func(s *server) {
		s = s.start(env{"RATE_LIMIT_MAX": "1"})
		others := []string{"GET /nowhere", "PATCH /auth/me", "OPTIONS /auth/login", "HEAD /auth/me"}
		others = append(others, s.routes()...)
		for _, route := range others {
			ip := newIP()
			s.send(to(route).ip(ip))
			a := s.send(to(route).ip(ip))
			s.expect((a.status() == 429) != isHealth(route), "%s: %d", route, a.status())
		}
		ip := newIP()
		for range 3 {
			s.send(post("/auth/login").preflight(frontend).ip(ip)).want(204)
			s.send(to("HEAD /healthz").ip(ip)).ok()
		}
		s.send(get("/auth/me").ip(ip)).refused("missing_token")
	}},
	{"a window ends on time, however often it is asked; a new one begins", own, func(s *server) {
		s = s.start(env{"RATE_LIMIT_MAX": "1", "RATE_LIMIT_WINDOW": "1"})
		ip := newIP()
		began := time.Now()
		s.send(get("/auth/me").ip(ip)).refused("missing_token")
		s.eventually(3*time.Second, "a new window", func() bool {
			a := s.send(get("/auth/me").ip(ip))
			after := a.Header.Get("Retry-After")
			s.expect(a.status() != 429 || after == "1", "Retry-After is %s", after)
			return a.status() == 401
		})
		took := time.Since(began)
		s.expect(took >= 900*time.Millisecond, "the new window came after %v", took)
	}},
	{"RATE_LIMIT_MAX=0 turns it off", own, func(s *server) {
		s = s.start(noRateLimit)
		ip := newIP()
		for range 150 {
			s.send(get("/auth/me").ip(ip)).refused("missing_token")
		}
	}},
	{"an IPv6 address counts as its /64, IPv4 in IPv6 as the IPv4 address", aURL, func(s *server) {
		left := func(ip string) int { return s.send(get("/auth/me").ip(ip)).remaining() }
		ip, net := newIP(), newIPv6Net()
		first := left(ip)
		for what, x := range map[string]struct{ got, want int }{
			"IPv4 in IPv6":                     {left("::ffff:" + ip), first - 1},
			"an IPv6 address":                  {left(net + "::1"), first},
			"another of the same /64":          {left(net + ":ffff:ffff:ffff:ffff"), first - 1},
			"one with a zone of the same /64":  {left(net + "::1%25"), first - 2},
			"one of another /64 of the /48":    {left(net[:len(net)-4] + "2000::1"), first},
			"an address that is not near them": {left(newIP()), first},
		} {
			s.expect(x.got == x.want, "%s: %d left, want %d", what, x.got, x.want)
		}
	}},
	{"X-Forwarded-For is read from the right, past trusted hops, up to garbage", aURL,
		readsForwardedFor},
	{"X-Forwarded-For in several lines is one list", aURL, func(s *server) {
		ip := newIP()
		first := s.send(get("/auth/me").ip(ip)).remaining()
		// As a proxy does that adds a line of its own below one that its client has made up.
		resp, err := s.raw(fmt.Sprintf("GET /auth/me HTTP/1.1\r\nHost: %s\r\n"+
			"X-Forwarded-For: %s\r\nX-Forwarded-For: %s\r\n\r\n", s.host(), newIP(), ip))
		if err != nil {
			s.Fatal(err)
		}
		got := (&answer{Response: resp}).remaining()
		s.expect(got == first-1, "%d are left, want %d", got, first-1)
	}},
	{"X-Forwarded-For counts only from a peer in TRUSTED_PROXIES", own, func(s *server) {
		s = s.start(env{"TRUSTED_PROXIES": "10.0.0.0/8", "RATE_LIMIT_MAX": "1000"})
		c := s.signup()
		got := c.sessions()[0].IP
		s.expect(got == "127.0.0.1", "the client is %s, want the connection's address", got)
	}},
}

// passesExactly allows for a machine that stalls: some of hundreds of simultaneous requests may be
// 503, and such a one may have been counted or not.
func passesExactly(s *server) {
	const limit = 50
	more := env{"RATE_LIMIT_MAX": strconv.Itoa(limit), "RATE_LIMIT_WINDOW": "600"}
	replicas := []*server{s.start(more), s.start(more)}
	for range 3 {
		ip := newIP()
		left := map[int]bool{}
		me := get("/auth/me").ip(ip)
		answers := together(200, func(i int) *answer { return replicas[i%2].send(me) })
		for _, a := range answers {
			switch a.status() {
			case 429:
				after := a.number("Retry-After")
				s.expect(after <= 600 && a.remaining() == 0,
					"Retry-After is %d, RateLimit %s", after, a.Header.Get("RateLimit"))
			case 401:
				left[a.remaining()] = true
			}
		}
		passed, unjudged := count(answers, 401), count(answers, 503)
		s.expect(passed <= limit && passed+unjudged >= limit && passed > 0 &&
			len(left) == passed,
			"%d passed, with %d different numbers left, want %d; %d were not judged", passed,
			len(left), limit, unjudged)
	}
}

func readsForwardedFor(s *server) {
	c := s.signup()
	peer := s.ipSeen(c, "garbage") // stopping at once leaves the connection's address
	for header, want := range map[string]string{
		"1.1.1.1,203.0.113.7":                         "203.0.113.7",
		"1.1.1.1, 203.0.113.7, " + peer + ", " + peer: "203.0.113.7",
		"1.1.1.1, garbage, ::ffff:203.0.113.7":        "203.0.113.7",
		"203.0.113.7, garbage, " + peer:               peer,
		"203.0.113.7, ::ffff:" + peer:                 "203.0.113.7",
		"2001:DB8:0:0::1":                             "2001:db8::1",
		"unknown":                                     peer,
	} {
		got := s.ipSeen(c, header)
		s.expect(got == want, "X-Forwarded-For: %s is taken for %q, want %q", header, got, want)
	}
}

// ipSeen is the client's address as the server reads it from an X-Forwarded-For header.
func (s *server) ipSeen(c *client, header string) string {
	device := c.elsewhere()
	device.take(s.tryLogin(c.email, c.password, header).ok())
	list := device.sessions()
	return list[slices.IndexFunc(list, func(x listed) bool { return x.Current })].IP
}

// loginLimit is a server with this LOGIN_LIMIT_MAX.
func (s *server) loginLimit(most int) *server {
	return s.start(noRateLimit.with(env{"LOGIN_LIMIT_MAX": strconv.Itoa(most)}))
}

// lockedFor asserts the 429 of a limit on failed logins, at the start of this window.
func (a *answer) lockedFor(window time.Duration) {
	a.refused("too_many_attempts")
	after := time.Duration(a.number("Retry-After")) * time.Second
	a.server.expect(after <= window && after >= window-window/10,
		"%s: Retry-After is %v, want %v", a, after, window)
}

// fails guesses wrongly so many times, which the limit must let happen.
func (s *server) fails(times int, email, ip string) {
	for range times {
		s.guess(email, ip).refused("invalid_credentials")
	}
}

var loginLimitPromises = []promise{
	{"after LOGIN_LIMIT_MAX failures from one IP even the right password gets 429", own,
		func(s *server) {
			s = s.loginLimit(3)
			for _, c := range []*client{s.signup(), s.newUser()} { // whether or not it exists
				// It is one account, however its email is spelled.
				for _, email := range []string{c.email, strings.ToUpper(c.email), " " + c.email} {
					s.fails(1, email, c.ip)
				}
				c.tryLogin().lockedFor(900 * time.Second)
				s.fails(1, c.email, newIP())
				s.fails(1, newEmail(), c.ip)
			}
			c := s.signup()
			s.fails(3, c.email, c.ip)
			c.login()                                 // The owner is not locked out elsewhere,
			c.tryLogin().refused("too_many_attempts") // which does not help who guesses,
			c.lives()                                 // and who is logged in stays so.
		}},
	{"the defaults are 10 failures in 900 seconds, and ten times that on one account", aURL,
		func(s *server) {
			c := s.signup()
			most, _ := strconv.Atoi(s.conf("LOGIN_LIMIT_MAX"))
			for range 10 {
				ip := newIP()
				s.fails(most, c.email, ip)
				s.tryLogin(c.email, c.password, ip).lockedFor(s.duration("LOGIN_LIMIT_WINDOW"))
			}
			c.elsewhere().tryLogin().lockedFor(s.duration("LOGIN_LIMIT_WINDOW"))
			c.lives()
		}},
	{"where two limits refuse, the longer one says how long to wait", own, func(s *server) {
		s = s.loginLimit(1)
		c := s.signup()
		s.fails(1, c.email, c.ip)
		account := s.accountKey(c.ip)
		s.stores.redis.Set(s.Context(), account, 10, 5*time.Second)
		c.tryLogin().lockedFor(900 * time.Second)
	}},
	{"ten times the limit from one IP over all accounts, then no account helps", own,
		func(s *server) {
			s = s.loginLimit(2)
			c := s.signup()
			ip := newIP()
			for range 20 {
				s.fails(1, newEmail(), ip)
			}
			s.tryLogin(c.email, c.password, ip).lockedFor(900 * time.Second)
			c.login()
		}},
	{"an IPv6 address counts as its /56 for one account, and as its /64 over all", own,
		func(s *server) {
			s = s.loginLimit(2)
			c := s.signup()
			net := newIPv6Net()[:17] // fdxx:xxxx:xxxx:1x of the /56, and its last byte
			s.fails(1, c.email, net+"00::1")
			s.fails(1, c.email, net+"ff:1:2:3:4")
			s.tryLogin(c.email, c.password, net+"42::1").refused("too_many_attempts")
			s.tryLogin(c.email, c.password, strings.Replace(net, ":1", ":2", 1)+"00::1").ok()
			for i := range 19 {
				s.fails(1, newEmail(), fmt.Sprintf("%s00::%x", net, i+2))
			}
			s.guess(newEmail(), net+"00::ffff").refused("too_many_attempts")
			s.fails(1, newEmail(), net+"01::1")
		}},
	{"an attempt that is itself refused with 429 counts nowhere", own, refusedCountsNowhere},
	{"a refused attempt does not prolong the window", own, func(s *server) {
		s = s.start(env{"LOGIN_LIMIT_MAX": "1", "LOGIN_LIMIT_WINDOW": "1", "RATE_LIMIT_MAX": "0"})
		c := s.signup()
		s.fails(1, c.email, c.ip)
		// It is asked all the time, as an attacker would.
		s.eventually(3*time.Second, "its end", func() bool { return c.tryLogin().status() == 200 })
	}},
	{"a successful login clears the pair's count, and takes its own off the others", own,
		func(s *server) {
			s = s.loginLimit(3)
			c := s.signup()
			account := ""
			for range 4 {
				s.fails(2, c.email, c.ip)
				account = s.accountKey(c.ip)
				c.tryLogin().ok()
				c.login() // and any number of successes is no failure
			}
			for _, key := range []string{account, "login-limit:{" + c.ip + "}"} {
				n, err := s.stores.redis.Get(s.Context(), key).Int()
				s.expect(n == 8, "%s counts %d (%v), want the 8 failures", key, n, err)
			}
		}},
	{"what is refused before the password is looked at counts nothing", own, func(s *server) {
		s = s.loginLimit(1)
		c := s.signup()
		for range 12 {
			c.send(signupOf(c.email, newPassword())).refused("email_exists")
			c.send(loginOf(c.email, "")).refused("validation_failed")
		}
		c.tryLogin().ok()
	}},
	{"simultaneous guesses cannot slip past, from one address or from many", own, noneSlipsPast},
	{"a wrong password on the account routes counts as a failed login", own, func(s *server) {
		s = s.loginLimit(2)
		c := s.signup()
		c.changePassword(newPassword(), newPassword()).refused("invalid_credentials")
		c.deleteAccount(newPassword()).refused("invalid_credentials")
		c.tryLogin().refused("too_many_attempts")
		c.changePassword(c.password, newPassword()).refused("too_many_attempts")
		c.deleteAccount(c.password).refused("too_many_attempts")
		c.lives()
	}},
	{"LOGIN_LIMIT_MAX=0 turns it off", own, func(s *server) {
		s = s.loginLimit(0)
		c := s.signup()
		s.fails(30, c.email, c.ip)
		c.tryLogin().ok()
		keys := append(s.keys("login-limit:[{]"+c.ip+"[}]"), s.keys("login-limit:*[}]:"+c.ip)...)
		s.expect(len(keys) <= 0, "nothing is counted, but there are %q", keys)
	}},
}

func refusedCountsNowhere(s *server) {
	s = s.loginLimit(1)
	refused := func(email, ip string) {
		for range 15 {
			s.guess(email, ip).refused("too_many_attempts")
		}
	}
	// The pair is full: neither the account nor the IP is charged.
	c, ip := s.signup(), newIP()
	s.fails(1, c.email, ip)
	refused(c.email, ip)
	for range 9 {
		s.fails(1, c.email, newIP())
		s.fails(1, newEmail(), ip)
	}
	// Now the account is full, and so is the IP: neither charges the other, nor a pair.
	c.elsewhere().tryLogin().refused("too_many_attempts")
	other, stranger := newIP(), s.signup()
	refused(c.email, other)
	refused(stranger.email, ip)
	for range 10 {
		s.fails(1, newEmail(), other)
		s.fails(1, stranger.email, newIP())
	}
}

func noneSlipsPast(s *server) {
	one := newIP()
	for what, x := range map[string]struct {
		most int // LOGIN_LIMIT_MAX
		want int
		ip   func() string
	}{
		"one address":    {10, 10, func() string { return one }},
		"many addresses": {2, 20, newIP},
	} {
		replicas := []*server{s.loginLimit(x.most), s.loginLimit(x.most)}
		email := s.signup().email
		answers := together(100, func(i int) *answer { return replicas[i%2].guess(email, x.ip()) })
		// On a machine that stalls some cannot be judged in time.
		tried, refused, unjudged := count(answers, 401), count(answers, 429), count(answers, 503)
		s.expect(tried <= x.want && tried+unjudged >= x.want && tried > 0 &&
			tried+refused+unjudged == len(answers),
			"from %s %d guesses were tried, %d refused, %d not judged, want %d tried", what, tried,
			refused, unjudged, x.want)
	}
}
