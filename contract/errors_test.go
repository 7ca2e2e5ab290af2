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

// The format, status, challenge and headers of an error are held on every answer, see assertError;
// here is when each of them is given.
var errorPromises = []promise{
	{"email_exists is 400 for a taken email, without regard to case", aURL, func(s *server) {
		c := s.signup()
		for _, email := range []string{c.email, strings.ToUpper(c.email), " " + c.email + "\t"} {
			a := s.trySignup(email, newPassword()).refused("email_exists")
			s.expect(a.json["error"] == "Email already exists", "body %s", a.body)
		}
		c.login()
	}},
	{"of simultaneous signups with one email exactly one is 201", aURL, func(s *server) {
		for range 5 {
			email := newEmail()
			answers := together(8, func(i int) *answer {
				return s.trySignup([]string{email, strings.ToUpper(email)}[i%2], newPassword())
			})
			for _, a := range answers {
				if a.status() != 201 {
					a.refused("email_exists")
				}
			}
			if n := count(answers, 201); n != 1 {
				s.Fatalf("%d signups succeeded", n)
			}
		}
	}},
	{"invalid_credentials has the same body, whatever is wrong", aURL, sameRefusal},
	{"missing_token is 401 where no Bearer token and no cookie is shown", aURL, func(s *server) {
		for _, route := range s.routes() {
			if isHealth(route) || slices.Contains(publicRoutes, route) {
				continue // those ask for none
			}
			for _, shown := range []string{"", "Basic dXNlcjpwYXNz", "Bearer", "Bearer "} {
				s.send(to(route).with("Authorization", shown)).shouldBe("missing_token", shown)
			}
		}
	}},
	{"a refused Bearer token is told in WWW-Authenticate, a refused cookie is not", aURL,
		func(s *server) {
			c := s.signup()
			gone := c.login()
			gone.logout().ok()
			for _, route := range []string{"GET /auth/me", "POST /auth/logout", "DELETE /auth/me"} {
				r := to(route)
				s.send(r.bearer("x")).refused("invalid_token")
				s.send(r.bearer(c.refresh)).refused("invalid_token")
				s.send(r.bearer(gone.access)).refused("session_revoked")
			}
			c.show("x").refused("invalid_token")
			s.send(post("/auth/logout").cookie("x")).refused("invalid_token")
		}},
	{"internal is 500 without a cause, which is in the log under the request id", own,
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
			key := "rate-limit:{" + c.ip + "}" // which every limited route asks
			s.evict(key)
			s.stores.redis.RPush(s.Context(), key, "nonsense")
			for _, a := range append(c.sweep(), c.send(get("/nowhere"))) {
				a.hidesItsCause()
			}
			s.evict(key)
			c.lives()
		}},
	{"malformed HTTP gets no 200, and neither do headers without bound", aURL, func(s *server) {
		for _, text := range []string{
			"GET /healthz HTTP/1.1\r\n\r\n", // no Host
			"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
			"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
			"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 2<<20) + "\r\n\r\n",
		} {
			// A server may also hang up on these.
			resp, err := s.raw(text)
			s.expect(err != nil || resp.StatusCode/100 == 4, "%.60q: %v", text, resp)
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
			err := <-results
			s.expect(!errors.As(err, &timeout) || !timeout.Timeout(),
				"the connection is still open")
		}
	}},
	{"what net/http refuses before any handler is exempt from the format", aURL, func(s *server) {
		for _, path := range []string{"/healthz", "/readyz"} {
			req, _ := http.NewRequest("GET", s.URL+path, nil)
			req.Header.Set("Cookie", strings.Repeat("x", 32<<10))
			resp, err := s.http.Do(req)
			if err != nil {
				s.Fatalf("%v", err)
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			a := &answer{Response: resp, server: s, asked: get(path), body: text}
			document.validate(a.want(431), req)
		}
	}},
}

// loadPromises are tested before all others, since those would disturb them, or they those.
var loadPromises = []promise{
	{"invalid_credentials takes the same time, whatever is wrong", own, sameTime},
	{"overloaded is 503 when hashing is saturated; what hashes nothing goes on", own, overloaded},
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

// sweep sends one request to every limited route at once, after the changes given.
func (c *client) sweep(changes ...func(request) request) []*answer {
	limited := slices.DeleteFunc(c.s.routes(), isHealth)
	bodies := map[string]request{
		"POST /auth/signup":          signupOf(newEmail(), newPassword()),
		"POST /auth/login":           loginOf(c.email, c.password),
		"PUT /auth/password":         changeOf(c.password, newPassword()),
		"DELETE /auth/me":            deletionOf(c.password),
		"POST /auth/password/forgot": forgotOf(c.email),
		"POST /auth/password/reset":  resetOf("no link", newPassword()),
		"POST /auth/email/verify":    verifyOf("no link"),
		"PUT /auth/email":            moveOf(newEmail(), c.password),
	}
	return together(len(limited), func(i int) *answer {
		r, given := bodies[limited[i]]
		if !given {
			r = to(limited[i])
		}
		r = r.cookie(c.refresh)
		for _, change := range changes {
			r = change(r)
		}
		return c.send(r)
	})
}

// hidesItsCause asserts a 500 whose cause only the log tells.
func (a *answer) hidesItsCause() {
	s := a.server
	a.refused("internal")
	for _, cause := range []string{"users", "relation", "SQLSTATE", "WRONGTYPE", "redis", "pgx"} {
		s.expect(!strings.Contains(string(a.body), cause),
			"%s: the answer tells the cause: %s", a, a.body)
	}
	line := s.logLine(a)
	cause, _ := line["error"].(string)
	s.expect(cause != "" && line["level"] == "ERROR", "%s: the log has no cause: %v", a, line)
}

func sameRefusal(s *server) {
	c := s.signup()
	bodies := map[string][]string{}
	for name, guess := range map[string][2]string{
		"a wrong password":            {c.email, newPassword()},
		"an unknown email":            {newEmail(), c.password},
		"no email at all":             {"nobody", c.password},
		"a NUL in the email":          {"a\x00" + c.email, c.password},
		"an email too long":           {strings.Repeat("a", 300) + c.email, c.password},
		"a password of 73 bytes":      {c.email, strings.Repeat("a", 73)},
		"a NUL behind the password":   {c.email, c.password + "\x00"},
		"unknown, with 5,000 bytes":   {newEmail(), strings.Repeat("a", 5000)},
		"a short and common password": {c.email, "x"},
	} {
		a := s.tryLogin(guess[0], guess[1], newIP()).refused("invalid_credentials")
		same := maps.Clone(a.json)
		delete(same, "requestId")
		delete(same, "timestamp")
		bodies[fmt.Sprint(same)] = append(bodies[fmt.Sprint(same)], name)
	}
	s.expect(len(bodies) == 1, "the refusals differ: %v", bodies)
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
	s.Errorf("a wrong password takes %v, an unknown email %v",
		slices.Min(wrong), slices.Min(unknown))
}

func overloaded(s *server) {
	s = s.start(env{"BCRYPT_COST": "10"})
	c := s.signup()
	flood := make(chan []*answer)
	go func() {
		flood <- together(120*runtime.NumCPU(), func(int) *answer {
			return s.guess(newEmail(), newIP())
		})
	}()
	var judged []*answer
	for judged == nil {
		select {
		case judged = <-flood:
		default:
			took := c.elsewhere().me(c.access).ok().took
			s.expect(took <= 2*time.Second, "GET /auth/me took %v beside the flood", took)
		}
	}
	codes := map[string]int{}
	for _, a := range judged {
		codes[a.code()]++
	}
	// On a machine this busy Redis may be late, too.
	known := codes["overloaded"] + codes["invalid_credentials"] + codes["unavailable"]
	s.expect(codes["overloaded"] != 0 && codes["invalid_credentials"] != 0 && known == len(judged),
		"of %d simultaneous logins %v", len(judged), codes)
	c.login() // over it goes
}
