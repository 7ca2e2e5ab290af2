package contract

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"time"
)

// That an error has the contract's format, status and headers is held on every answer, see
// assertError; here is when each of them is given.
var errorPromises = []promise{
	{"validation_failed says in details which field and why", aURL, func(s *server) {
		c := s.signup()
		s.trySignup("nonsense", "short").refused("validation_failed").names("email", "password")
		s.trySignup(newEmail(), "short").refused("validation_failed").names("password")
		s.trySignup("nonsense", newPassword()).refused("validation_failed").names("email")
		c.changePassword("", "").refused("validation_failed").names("currentPassword", "newPassword")
		c.changePassword(c.password, "short").refused("validation_failed").names("newPassword")
		c.changePassword("", newPassword()).refused("validation_failed").names("currentPassword")
		c.deleteAccount("").refused("validation_failed").names("password")
	}},
	{"email_exists is 400 for a taken email, without regard to case", aURL, func(s *server) {
		c := s.signup()
		for _, email := range []string{c.email, strings.ToUpper(c.email), " " + c.email + "\t"} {
			a := s.trySignup(email, newPassword()).refused("email_exists")
			if a.json["error"] != "Email already exists" {
				s.Errorf("body %s", a.body)
			}
		}
		c.login()
	}},
	{"of simultaneous signups with one email exactly one is 201, the others are email_exists", aURL,
		func(s *server) {
			for range 5 {
				email := newEmail()
				answers := together(8, func(i int) *answer {
					return s.trySignup([]string{email, strings.ToUpper(email)}[i%2], newPassword())
				})
				if n := count(answers, 201); n != 1 {
					s.Fatalf("%d signups succeeded", n)
				}
				for _, a := range answers {
					if a.status() != 201 {
						a.refused("email_exists")
					}
				}
			}
		}},
	{"invalid_credentials is the same for a wrong password, an unknown email and an impossible one",
		aURL, sameRefusal},
	{"invalid_credentials takes the same time for a wrong password and an unknown email", own,
		sameTime},
	{"a wrong password on the account routes is invalid_credentials and changes nothing", aURL,
		func(s *server) {
			c := s.signup()
			other := c.login()
			c.changePassword(newPassword(), newPassword()).refused("invalid_credentials")
			c.deleteAccount(newPassword()).refused("invalid_credentials")
			c.lives()
			other.lives()
			c.login()
		}},
	{"missing_token is 401 with the bare challenge where no Bearer token is shown", aURL,
		func(s *server) {
			for route := range routes {
				if strings.HasSuffix(route, "z") || routes[route].cookie == "set" &&
					route != "POST /auth/refresh" {
					continue
				}
				for _, authorization := range []string{"", "Basic dXNlcjpwYXNz", "Bearer", "Bearer "} {
					a := s.send(to(route).with("Authorization", authorization)).refused("missing_token")
					if a.Header.Get("WWW-Authenticate") != "Bearer" {
						s.Errorf("%s: WWW-Authenticate is %q", a, a.Header.Get("WWW-Authenticate"))
					}
				}
			}
		}},
	{`WWW-Authenticate has error="invalid_token" where a Bearer token was shown and refused`, aURL,
		func(s *server) {
			c := s.signup()
			gone := c.login()
			gone.logout().ok()
			for _, token := range []string{"x", "a.b.c", c.refresh, gone.access} {
				for _, r := range []request{get("/auth/me"), post("/auth/logout"), del("/auth/sessions")} {
					a := s.send(r.bearer(token)).want(401)
					if a.Header.Get("WWW-Authenticate") != `Bearer error="invalid_token"` {
						s.Errorf("%s: WWW-Authenticate is %q", a, a.Header.Get("WWW-Authenticate"))
					}
				}
			}
		}},
	{"a refused cookie and a wrong password get the bare challenge", aURL, func(s *server) {
		c := s.signup()
		for _, a := range []*answer{
			c.show("nonsense").refused("invalid_token"),
			s.send(post("/auth/logout").cookie("nonsense")).refused("invalid_token"),
			s.guess(c.email, newIP()).refused("invalid_credentials"),
			c.changePassword(newPassword(), newPassword()).refused("invalid_credentials"),
			c.deleteAccount(newPassword()).refused("invalid_credentials"),
		} {
			if a.Header.Get("WWW-Authenticate") != "Bearer" {
				s.Errorf("%s: WWW-Authenticate is %q", a, a.Header.Get("WWW-Authenticate"))
			}
		}
	}},
	{"internal is 500, never with a cause in it: the cause is in the log, under the request id", own,
		func(s *server) {
			s = s.startOn(newStores(s.T), production)
			c := s.signup()
			s.exec("ALTER TABLE users RENAME TO people")
			s.trySignup(newEmail(), newPassword()).hidesItsCause()
			c.tryLogin().hidesItsCause()
			c.show(c.refresh).hidesItsCause()
			c.me(c.access).hidesItsCause()
			c.changePassword(c.password, newPassword()).hidesItsCause()
			c.deleteAccount(c.password).hidesItsCause()
			s.exec("ALTER TABLE people RENAME TO users")
			c.lives() // the refresh token was not used up
		}},
	{"internal is 500 on every limited route when Redis answers with nonsense", own,
		func(s *server) {
			s = s.start(production)
			c := s.signup()
			// Somebody else's data under the key of the rate limit, which every limited route asks.
			key := "rate-limit:{" + c.ip + "}"
			s.evict(key)
			if err := s.stores.redis.RPush(s.Context(), key, "nonsense").Err(); err != nil {
				s.Fatal(err)
			}
			for _, a := range append(c.sweep(), c.send(get("/nowhere"))) {
				a.hidesItsCause()
			}
			s.evict(key)
			c.lives()
		}},
	{"overloaded is 503 when hashing is saturated; what hashes nothing goes on", own, overloaded},
	{"malformed HTTP gets no 200, and neither do headers without bound", aURL, func(s *server) {
		for _, text := range []string{
			"GET /healthz HTTP/1.1\r\n\r\n", // no Host
			"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
			"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
			"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 2<<20) + "\r\n\r\n",
		} {
			// A server may also hang up on these.
			if resp, err := s.raw(text); err == nil && resp.StatusCode/100 != 4 {
				s.Errorf("%.60q: %s", text, resp.Status)
			}
		}
	}},
	{"read times are bounded: who never finishes a request is cut off", own, func(s *server) {
		const head = "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
		results := make(chan error)
		for _, text := range []string{head, head + "Content-Length: 50\r\n\r\n{"} {
			go func() {
				_, err := s.raw(text) // waits for 60 seconds at most
				results <- err
			}()
		}
		for range 2 {
			var timeout net.Error
			if err := <-results; errors.As(err, &timeout) && timeout.Timeout() {
				s.Error("the connection is still open")
			}
		}
	}},
}

// raw writes bytes to the server and reads one response.
func (s *server) raw(text string) (*http.Response, error) {
	conn, err := net.Dial("tcp", s.host())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(conn, text); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(conn), nil)
}

// sweep sends one request to every limited route at once.
func (c *client) sweep(change ...func(request) request) []*answer {
	limited := slices.Sorted(maps.Keys(routes))
	limited = slices.DeleteFunc(limited, func(route string) bool { return strings.HasSuffix(route, "z") })
	return together(len(limited), func(i int) *answer {
		r := to(limited[i]).cookie(c.refresh)
		switch limited[i] {
		case "POST /auth/signup":
			r = r.json(credentials{newEmail(), newPassword()})
		case "POST /auth/login":
			r = r.json(credentials{c.email, c.password})
		case "PUT /auth/password":
			r = r.json(passwordChange{c.password, newPassword()})
		case "DELETE /auth/me":
			r = r.json(passwordOnly{c.password})
		}
		for _, f := range change {
			r = f(r)
		}
		return c.send(r)
	})
}

// hidesItsCause asserts a 500 whose cause only the log tells.
func (a *answer) hidesItsCause() {
	s := a.server
	s.Helper()
	a.refused("internal")
	for _, cause := range []string{"users", "relation", "SQLSTATE", "WRONGTYPE", "redis", "pgx"} {
		if strings.Contains(string(a.body), cause) {
			s.Errorf("%s: the answer tells the cause: %s", a, a.body)
		}
	}
	line := s.logLine(a)
	if cause, _ := line["error"].(string); cause == "" || line["level"] != "ERROR" {
		s.Errorf("%s: the log has no cause: %v", a, line)
	}
}

func sameRefusal(s *server) {
	c := s.signup()
	bodies := map[string][]string{}
	for name, guess := range map[string]credentials{
		"a wrong password":            {c.email, newPassword()},
		"an unknown email":            {newEmail(), c.password},
		"no email at all":             {"nobody", c.password},
		"a NUL in the email":          {"a\x00" + c.email, c.password},
		"an email too long":           {strings.Repeat("a", 300) + c.email, c.password},
		"a password of 73 bytes":      {c.email, strings.Repeat("a", 73)},
		"a NUL behind the password":   {c.email, c.password + "\x00"},
		"an unknown email and a long": {newEmail(), strings.Repeat("a", 5000)},
		"a short password":            {c.email, "x"},
		"a common password":           {c.email, "password"},
	} {
		a := s.tryLogin(guess.Email, guess.Password, newIP()).refused("invalid_credentials")
		same := fmt.Sprint(fields(a.json, "requestId", "timestamp"), a.Header["Www-Authenticate"])
		bodies[same] = append(bodies[same], name)
	}
	if len(bodies) != 1 {
		s.Errorf("the refusals differ: %v", bodies)
	}
}

func sameTime(s *server) {
	s = s.start(production) // where there is something to measure
	c := s.signup()
	var wrong, unknown []time.Duration
	// In turns, so that a busy machine slows both. The fastest of each is the one that nothing
	// disturbed, and it may take more than five for that.
	for n := 1; n <= 40; n++ {
		wrong = append(wrong, s.guess(c.email, newIP()).want(401).took)
		unknown = append(unknown, s.guess(newEmail(), newIP()).want(401).took)
		ratio := float64(slices.Min(unknown)) / float64(slices.Min(wrong))
		if n >= 5 && ratio > 0.7 && ratio < 1.4 {
			return
		}
	}
	s.Errorf("a wrong password takes %v, an unknown email %v", slices.Min(wrong), slices.Min(unknown))
}

func overloaded(s *server) {
	s = s.start(env{"BCRYPT_COST": "10"})
	c := s.signup()
	flood := make(chan []*answer)
	go func() {
		flood <- together(120*runtime.NumCPU(), func(int) *answer { return s.guess(newEmail(), newIP()) })
	}()
	var judged []*answer
	for judged == nil {
		select {
		case judged = <-flood:
		default:
			if took := c.elsewhere().me(c.access).ok().took; took > 2*time.Second {
				s.Errorf("GET /auth/me took %v beside the flood", took)
			}
		}
	}
	codes := map[string]int{}
	for _, a := range judged {
		codes[a.code()]++
	}
	// On a machine this busy Redis may be late, too.
	known := codes["overloaded"] + codes["invalid_credentials"] + codes["unavailable"]
	if codes["overloaded"] == 0 || codes["invalid_credentials"] == 0 || known != len(judged) {
		s.Errorf("of %d simultaneous logins %v", len(judged), codes)
	}
	c.login() // over it goes
}
