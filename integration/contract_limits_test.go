package integration

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// trySignup signs up with these credentials, whatever comes of it.
func (s *server) trySignup(t testing.TB, email, password string) *answer {
	t.Helper()
	return s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{email, password}})
}

// longEmail fills an address up to a size, with labels and a local part that no other rule could refuse.
func longEmail(size int) string {
	local := strings.Replace(newEmail(), "@example.com", "", 1)
	label := "." + strings.Repeat("d", 60)
	rest := size - len(local) - len("@example.com")
	domain := strings.Repeat(label, rest/len(label)) + "." + strings.Repeat("e", rest%len(label)-1)
	return local + "@example.com" + domain
}

var inputLimits = []promise{
	{"an email is trimmed and lower-cased", aURL, func(t *testing.T, s *server) {
		email, password := newEmail(), newPassword()
		a := s.trySignup(t, " \t"+strings.ToUpper(email)+"\r\n", password).want(201)
		if a.str("user", "email") != email {
			t.Errorf("email %s, want %s", a.str("user", "email"), email)
		}
		for _, spelled := range []string{email, strings.ToUpper(email), "  " + strings.ToTitle(email[:1]) + email[1:] + " "} {
			if got := s.tryLogin(t, spelled, password, "").want(200).str("user", "email"); got != email {
				t.Errorf("email %s, want %s", got, email)
			}
		}
	}},
	{"only ASCII letters change case", aURL, func(t *testing.T, s *server) {
		email, password := newEmail(), newPassword()
		a := s.trySignup(t, "ÉS\u212a"+strings.ToUpper(email), password).want(201) // the Kelvin sign, a k in lower case
		if want := "És\u212a" + email; a.str("user", "email") != want {
			t.Errorf("email %s, want %s", a.str("user", "email"), want)
		}
		s.tryLogin(t, "és\u212a"+email, password, "").refused(401, "invalid_credentials")
		s.tryLogin(t, "ÉSk"+email, password, "").refused(401, "invalid_credentials")
		s.tryLogin(t, "És\u212a"+email, password, "").want(200)
	}},
	{"at signup an email has at most 254 bytes", aURL, func(t *testing.T, s *server) {
		s.trySignup(t, longEmail(254), newPassword()).want(201)
		for _, size := range []int{255, 300, 5000} {
			s.trySignup(t, longEmail(size), newPassword()).refused(400, "validation_failed")
		}
	}},
	{"at signup an email has one @, no spaces or control characters, and is a plain address", aURL, func(t *testing.T, s *server) {
		for _, email := range []string{"", "   ", "a", "a@", "@example.com", "@", "a@@example.com", "a@b@example.com", "a b@example.com", "a@exam ple.com",
			"a\tb@example.com", "a\nb@example.com", "a@example.com\nbcc:x", "a\u0000b@example.com", "a\u007fb@example.com", "a\u0085b@example.com", "a\u00a0b@example.com",
			"Ada <ada@example.com>", "<ada@example.com>", "ada@example.com (Ada)", "ada@example.com, bob@example.com", `"a b"@example.com`, "mailto:<a@example.com>"} {
			a := s.trySignup(t, email, newPassword()).keepsCookie()
			if a.status() != 400 || a.code() != "validation_failed" || a.details()["email"] == nil {
				t.Errorf("%q: %d %s", email, a.status(), a.body)
			}
		}
		for _, email := range []string{"ada+tag." + newEmail(), "o'" + newEmail(), "x_-" + newEmail()} {
			s.trySignup(t, email, newPassword()).want(201)
		}
	}},
	{"a password has 8 to 72 bytes, not characters", aURL, func(t *testing.T, s *server) {
		for _, x := range []struct {
			password string
			status   int
		}{
			{"", 400}, {"k7#qZ!9", 400}, {"k7#qZ!9w", 201}, {"ééé", 400}, {"éüöß", 201}, {"日本", 400}, {"日本語", 201}, {"🔑🔐", 201},
			{strings.Repeat("k7#qZ!9w", 9), 201}, {strings.Repeat("k7#qZ!9w", 9) + "x", 400},
			{strings.Repeat("é", 36), 201}, {strings.Repeat("é", 36) + "x", 400}, {strings.Repeat("é", 37), 400},
			{strings.Repeat("日", 24), 201}, {strings.Repeat("日", 25), 400}, {strings.Repeat("x", 5000), 400},
		} {
			email := newEmail()
			a := s.trySignup(t, email, x.password)
			if a.status() != x.status || x.status == 400 && a.details()["password"] == nil {
				t.Errorf("%q (%d bytes): %d %s", x.password, len(x.password), a.status(), a.body)
			}
			if x.status == 201 {
				s.tryLogin(t, email, x.password, "").want(200)
			}
		}
	}},
	{"a password is any characters but NUL", aURL, func(t *testing.T, s *server) {
		for _, password := range []string{"        x", " leading and trailing ", "tab\tnewline\n\x01\x7f", `quotes"\'`, "\u202eabc\u0301def", "<script>alert(1)"} {
			email := newEmail()
			s.trySignup(t, email, password).want(201)
			s.tryLogin(t, email, password, "").want(200)
			s.tryLogin(t, email, strings.TrimSpace(password)+"!", "").refused(401, "invalid_credentials")
		}
		for _, password := range []string{"\x00longenough", "long\x00enough", "longenough\x00"} {
			a := s.trySignup(t, newEmail(), password).refused(400, "validation_failed")
			members(t, a.details(), "password")
		}
	}},
	{"a password is not trimmed", aURL, func(t *testing.T, s *server) {
		email := newEmail()
		s.trySignup(t, email, " k7#qZ!9wx ").want(201)
		s.tryLogin(t, email, "k7#qZ!9wx", "").refused(401, "invalid_credentials")
	}},
	{"the most common passwords are refused without regard to case, at signup and at a change", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, password := range []string{"password", "PASSWORD", "PassWord", "12345678", "123456789", "iloveyou", "sunshine", "princess", "football", "Superman", "BASEBALL", "trustno1", "qwertyuiop"} {
			a := s.trySignup(t, newEmail(), password)
			if a.status() != 400 || a.details()["password"] == nil {
				t.Errorf("signup with %s: %d %s", password, a.status(), a.body)
			}
			a = v.fromNewIP().send("PUT", "/auth/password", passwordChange{v.password, password})
			if a.status() != 400 || a.details()["newPassword"] == nil {
				t.Errorf("change to %s: %d %s", password, a.status(), a.body)
			}
		}
		v.login()
	}},
	{"a new password has the limits of signup", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, password := range []string{"", "k7#qZ!9", strings.Repeat("é", 36) + "x", "long\x00enough"} {
			a := v.send("PUT", "/auth/password", passwordChange{v.password, password}).refused(400, "validation_failed")
			members(t, a.details(), "newPassword")
		}
		longest := strings.Repeat("é", 36)
		v.send("PUT", "/auth/password", passwordChange{v.password, longest}).want(200)
		v.password = longest
		v.login().lives()
	}},
	{"a password of more than 72 bytes is simply wrong at login, never cut; so is one with a NUL", aURL, func(t *testing.T, s *server) {
		email, longest := newEmail(), strings.Repeat("k7#qZ!9w", 9)
		v := &visitor{t: t, s: s, email: email, password: longest, ip: newIP()}
		v.take(s.trySignup(t, email, longest).want(201))
		for _, wrong := range []string{longest + "x", longest + longest, longest[:71], longest + "\x00"} {
			s.tryLogin(t, email, wrong, "").refused(401, "invalid_credentials")
			v.send("DELETE", "/auth/me", passwordOnly{wrong}).refused(401, "invalid_credentials")
			v.send("PUT", "/auth/password", passwordChange{wrong, newPassword()}).refused(401, "invalid_credentials")
		}
		// x/crypto's bcrypt repeats a password with a NUL between: these two are one to it.
		short := newEmail()
		s.trySignup(t, short, "k7#qZ!9w").want(201)
		s.tryLogin(t, short, "k7#qZ!9w\x00k7#qZ!9w", "").refused(401, "invalid_credentials")
		s.tryLogin(t, short, "k7#qZ!9w\x00", "").refused(401, "invalid_credentials")
	}},
	{"at login only presence is validated", aURL, func(t *testing.T, s *server) {
		for _, x := range []struct {
			body   map[string]string
			fields []string
		}{
			{map[string]string{}, []string{"email", "password"}},
			{map[string]string{"email": newEmail()}, []string{"password"}},
			{map[string]string{"password": "x"}, []string{"email"}},
			{map[string]string{"email": "", "password": ""}, []string{"email", "password"}},
		} {
			a := s.send(t, request{method: "POST", path: "/auth/login", body: x.body}).refused(400, "validation_failed")
			members(t, a.details(), x.fields...)
		}
		for _, email := range []string{"nonsense", "a@b@c", "Ada <ada@example.com>", strings.Repeat("x", 5000) + "@example.com", "a\x00b@example.com", "\u0001"} {
			s.tryLogin(t, email, "x", "").refused(401, "invalid_credentials")
		}
		v := s.signup(t)
		for _, password := range []string{"x", strings.Repeat("x", 5000), "\x00", "password"} {
			s.tryLogin(t, v.email, password, "").refused(401, "invalid_credentials")
		}
	}},
}

// remaining is what RateLimit says is left.
func (a *answer) remaining() int {
	a.t.Helper()
	m := rateLimitPattern.FindStringSubmatch(a.Header.Get("RateLimit"))
	if m == nil {
		a.t.Fatalf("%s: RateLimit is %q", a.sent, a.Header.Get("RateLimit"))
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

var rateLimit = []promise{
	{"every limited response carries RateLimit-Policy and RateLimit, and a 429 Retry-After", aURL, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		ip := newIP()
		first := s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
		second := s.send(t, request{method: "GET", path: "/nowhere", ip: ip}).want(404)
		limit, _ := strconv.Atoi(s.conf("RATE_LIMIT_MAX"))
		if first.remaining() != limit-1 || second.remaining() != limit-2 {
			t.Errorf("%d and %d left of %d", first.remaining(), second.remaining(), limit)
		}
		window, _ := strconv.Atoi(s.conf("RATE_LIMIT_WINDOW"))
		if reset, _ := strconv.Atoi(rateLimitPattern.FindStringSubmatch(first.Header.Get("RateLimit"))[2]); reset < window-1 || reset > window {
			t.Errorf("a new window ends in %d s, want %d", reset, window)
		}
	}},
	{"exactly RATE_LIMIT_MAX pass, under any number of concurrent requests and replicas", own, func(t *testing.T, _ *server) {
		env := development.with(vars{"RATE_LIMIT_MAX": "50", "RATE_LIMIT_WINDOW": "600"})
		st := fresh(t)
		replicas := []*server{serve(t, st, env), serve(t, st, env)}
		for range 3 {
			ip := newIP()
			answers := together(300, func(i int) *answer {
				return replicas[i%2].send(t, request{method: "GET", path: "/auth/me", ip: ip})
			})
			left := map[int]bool{}
			for _, a := range answers {
				if a.status() == 429 {
					a.refused(429, "rate_limited")
					if after := a.number("Retry-After"); after < 1 || after > 600 || a.remaining() != 0 {
						t.Errorf("Retry-After is %d, RateLimit %s", after, a.Header.Get("RateLimit"))
					}
				} else if a.status() != 503 { // which a machine that stalls may bring
					left[a.want(401).remaining()] = true
				}
			}
			passed, unjudged := count(answers, 401), count(answers, 503)
			if passed > 50 || passed+unjudged < 50 || unjudged > 75 || len(left) != passed {
				t.Errorf("%d passed, with %d different numbers left, want 50; %d were not judged", passed, len(left), unjudged)
			}
			replicas[0].send(t, request{method: "GET", path: "/auth/me"}).want(401) // another address has its own
		}
	}},
	{"it covers every route but the health ones and preflights", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"RATE_LIMIT_MAX": "1"}))
		for _, route := range append(contractRoutes, "GET /nowhere", "PATCH /auth/me", "OPTIONS /auth/login", "HEAD /auth/me") {
			method, path, _ := strings.Cut(strings.Replace(route, "{id}", "4a1bb9d1-8c8a-4b8c-9d55-6a8f3f3ea0c1", 1), " ")
			ip := newIP()
			s.send(t, request{method: method, path: path, ip: ip})
			a := s.send(t, request{method: method, path: path, ip: ip})
			if health := strings.HasSuffix(path, "z"); (a.status() == 429) == health {
				t.Errorf("%s: %d", route, a.status())
			}
		}
		ip := newIP()
		for range 5 {
			s.send(t, request{method: "OPTIONS", path: "/auth/login", ip: ip, header: map[string]string{"Origin": frontend, "Access-Control-Request-Method": "POST"}}).want(204)
			s.send(t, request{method: "GET", path: "/readyz", ip: ip}).want(200)
		}
		s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).want(401)
	}},
	{"a new window begins after Retry-After", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"RATE_LIMIT_MAX": "3", "RATE_LIMIT_WINDOW": "2"}))
		ip := newIP()
		get := func() *answer { return s.send(t, request{method: "GET", path: "/auth/me", ip: ip}) }
		var refused *answer
		eventually(t, 5*time.Second, "the limit is reached", func() bool { refused = get(); return refused.status() == 429 })
		if after := refused.number("Retry-After"); after < 1 || after > 2 {
			t.Errorf("Retry-After is %d", after)
		}
		time.Sleep(time.Duration(refused.number("Retry-After")) * time.Second)
		get().want(401)
	}},
	{"RATE_LIMIT_MAX=0 turns it off", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"RATE_LIMIT_MAX": "0"}))
		ip := newIP()
		for _, a := range together(150, func(int) *answer { return s.send(t, request{method: "GET", path: "/auth/me", ip: ip}) }) {
			a.want(401)
		}
	}},
	{"an IPv6 address counts as its /64", aURL, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		net := fmt.Sprintf("2001:db8:%x:", time.Now().UnixNano()&0xffff)
		left := func(ip string) int { return s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).remaining() }
		first := left(net + "1::1")
		if second := left(net + "1:ffff:ffff:ffff:ffff"); second != first-1 {
			t.Errorf("two addresses of one /64: %d, then %d left", first, second)
		}
		if other := left(net + "2::1"); other != first {
			t.Errorf("another /64: %d left, want %d", other, first)
		}
	}},
	{"X-Forwarded-For is read from the right, skipping trusted hops and stopping at the last good one before garbage", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		peer := s.ipSeen(t, v, "garbage") // stopping at once leaves the connection's address
		for header, want := range map[string]string{
			"203.0.113.7":                                 "203.0.113.7",
			"1.1.1.1, 203.0.113.7":                        "203.0.113.7",
			"1.1.1.1,203.0.113.7":                         "203.0.113.7",
			"203.0.113.7, " + peer:                        "203.0.113.7",
			"1.1.1.1, 203.0.113.7, " + peer + ", " + peer: "203.0.113.7",
			"1.1.1.1, garbage, 203.0.113.7":               "203.0.113.7",
			"203.0.113.7, garbage":                        peer,
			"203.0.113.7, garbage, " + peer:               peer,
			"203.0.113.7, , " + peer:                      peer,
			"203.0.113.999":                               peer,
			"::ffff:203.0.113.7":                          "203.0.113.7",
			"203.0.113.7, ::ffff:" + peer:                 "203.0.113.7",
			"2001:DB8:0:0::1":                             "2001:db8::1",
			"unknown":                                     peer,
			"<script>":                                    peer,
		} {
			if got := s.ipSeen(t, v, header); got != want {
				t.Errorf("X-Forwarded-For: %s is taken for %q, want %q", header, got, want)
			}
		}
	}},
	{"X-Forwarded-For in several lines is one list", aURL, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		ip := newIP()
		first := s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).remaining()
		// As a proxy does that adds a line of its own below the one that its client has made up.
		resp, err := s.raw(t, fmt.Sprintf("GET /auth/me HTTP/1.1\r\nHost: %s\r\nX-Forwarded-For: %s\r\nX-Forwarded-For: %s\r\n\r\n", s.host(), newIP(), ip))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := resp.Header.Get("RateLimit"), fmt.Sprintf(`"ip";r=%d;`, first-1); !strings.HasPrefix(got, want) {
			t.Errorf("RateLimit is %s, want %s", got, want)
		}
	}},
	{"IPv4 in IPv6 (::ffff:a.b.c.d) is the IPv4 address", aURL, func(t *testing.T, s *server) {
		if s.conf("RATE_LIMIT_MAX") == "0" {
			t.Skip("RATE_LIMIT_MAX is 0")
		}
		ip := newIP()
		first := s.send(t, request{method: "GET", path: "/auth/me", ip: ip}).remaining()
		if second := s.send(t, request{method: "GET", path: "/auth/me", ip: "::ffff:" + ip}).remaining(); second != first-1 {
			t.Errorf("%d, then %d left", first, second)
		}
	}},
	{"X-Forwarded-For counts only from a peer in TRUSTED_PROXIES", own, func(t *testing.T, _ *server) {
		s := serve(t, fresh(t), development.with(vars{"TRUSTED_PROXIES": "", "RATE_LIMIT_MAX": "5"}))
		var last *answer
		for range 6 {
			last = s.send(t, request{method: "GET", path: "/auth/me"})
		}
		last.refused(429, "rate_limited")
	}},
}

// ipSeen is the client address that the server reads from an X-Forwarded-For header, as its session list tells.
func (s *server) ipSeen(t *testing.T, v *visitor, header string) string {
	t.Helper()
	x := *v
	x.take(s.send(t, request{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}, ip: header}).want(200))
	defer x.fromNewIP().send("POST", "/auth/logout", nil)
	for _, session := range x.fromNewIP().sessions() {
		if session["current"] == true {
			return session["ip"].(string)
		}
	}
	t.Fatal("no current session")
	return ""
}

var loginLimit = []promise{
	{"LOGIN_LIMIT_MAX failures from one IP, then even the right password gets 429; from another IP it is good", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "3"}))
		v := s.signup(t)
		for _, email := range []string{v.email, strings.ToUpper(v.email), " " + v.email} { // one account, however it is spelled
			s.tryLogin(t, email, newPassword(), v.ip).refused(401, "invalid_credentials")
		}
		a := s.tryLogin(t, v.email, v.password, v.ip).refused(429, "too_many_attempts")
		if after := a.number("Retry-After"); after < 1 || after > 900 {
			t.Errorf("Retry-After is %d", after)
		}
		v.login()
		other := s.signup(t)
		s.tryLogin(t, other.email, other.password, v.ip).want(200) // another account, from the same address
	}},
	{"the defaults are 10 failures and ten times that from all IPs together", aURL, func(t *testing.T, s *server) {
		if s.env["LOGIN_LIMIT_MAX"] != "" {
			t.Skip("LOGIN_LIMIT_MAX is given")
		}
		v := s.signup(t)
		for range 10 {
			ip := newIP()
			for range 10 {
				s.tryLogin(t, v.email, "wrong", ip).refused(401, "invalid_credentials")
			}
			s.tryLogin(t, v.email, v.password, ip).refused(429, "too_many_attempts")
		}
		s.tryLogin(t, v.email, v.password, "").refused(429, "too_many_attempts")
	}},
	{"an account that does not exist has the same limit", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "2"}))
		email, ip := newEmail(), newIP()
		for range 2 {
			s.tryLogin(t, email, newPassword(), ip).refused(401, "invalid_credentials")
		}
		s.tryLogin(t, email, newPassword(), ip).refused(429, "too_many_attempts")
		s.tryLogin(t, email, newPassword(), "").refused(401, "invalid_credentials")
	}},
	{"ten times the limit from all IPs together; an IP of its own does not help then", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "2"}))
		v := s.signup(t)
		for range 20 {
			s.tryLogin(t, v.email, newPassword(), "").refused(401, "invalid_credentials")
		}
		s.tryLogin(t, v.email, v.password, "").refused(429, "too_many_attempts")
		v.lives() // who is logged in stays so
	}},
	{"an attempt that is itself refused with 429 counts nowhere", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "1"}))
		v := s.signup(t)
		s.tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
		for range 30 { // three times what all IPs have together
			s.tryLogin(t, v.email, newPassword(), v.ip).refused(429, "too_many_attempts")
		}
		v.login()
	}},
	{"a refused attempt does not prolong the window", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "1", "LOGIN_LIMIT_WINDOW": "3"}))
		v := s.signup(t)
		s.tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
		// Asked all the time, as an attacker would.
		eventually(t, 8*time.Second, "the window ends", func() bool { return s.tryLogin(t, v.email, v.password, v.ip).status() == 200 })
	}},
	{"a successful login clears the pair's count", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "3"}))
		v := s.signup(t)
		for range 4 {
			s.tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
			s.tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
			s.tryLogin(t, v.email, v.password, v.ip).want(200)
		}
	}},
	{"a successful login is given back: any number of them is no failure", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "1"}))
		v := s.signup(t)
		for range 15 {
			v.login()
			s.tryLogin(t, v.email, v.password, v.ip).want(200)
		}
	}},
	{"simultaneous guesses cannot slip past", own, func(t *testing.T, _ *server) {
		st := fresh(t)
		env := development.with(vars{"RATE_LIMIT_MAX": "0"})
		replicas := []*server{serve(t, st, env), serve(t, st, env)}
		v := replicas[0].signup(t)
		ip := newIP()
		answers := together(200, func(i int) *answer { return replicas[i%2].tryLogin(t, v.email, "wrong", ip) })
		// On a machine that stalls some cannot be judged in time.
		failed, refused, unjudged := count(answers, 401), count(answers, 429), count(answers, 503)
		if failed > 10 || failed+unjudged < 10 || unjudged > 50 || failed+refused+unjudged != 200 {
			t.Errorf("%d guesses were tried and %d refused, want 10 and 190; %d were not judged", failed, refused, unjudged)
		}
	}},
	{"a wrong password on the account routes counts as a failed login", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "2"}))
		v := s.signup(t)
		v.send("PUT", "/auth/password", passwordChange{newPassword(), newPassword()}).refused(401, "invalid_credentials")
		v.send("DELETE", "/auth/me", passwordOnly{newPassword()}).refused(401, "invalid_credentials")
		s.tryLogin(t, v.email, v.password, v.ip).refused(429, "too_many_attempts")
		v.send("PUT", "/auth/password", passwordChange{v.password, newPassword()}).refused(429, "too_many_attempts")
		v.send("DELETE", "/auth/me", passwordOnly{v.password}).refused(429, "too_many_attempts")
		v.lives()
	}},
	{"an IPv6 /64 is one IP", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "2"}))
		v := s.signup(t)
		s.tryLogin(t, v.email, newPassword(), "2001:db8:1:2::1").refused(401, "invalid_credentials")
		s.tryLogin(t, v.email, newPassword(), "2001:db8:1:2:a::9").refused(401, "invalid_credentials")
		s.tryLogin(t, v.email, v.password, "2001:db8:1:2:b::").refused(429, "too_many_attempts")
		s.tryLogin(t, v.email, v.password, "2001:db8:1:3::1").want(200)
	}},
	{"LOGIN_LIMIT_MAX=0 turns it off", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "0"}))
		v := s.signup(t)
		for range 30 {
			s.tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
		}
		s.tryLogin(t, v.email, v.password, v.ip).want(200)
	}},
}
