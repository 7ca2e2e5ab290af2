package contract

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A request is what a test sends: only what matters to it. Its methods return changed copies.
type request struct {
	method  string
	path    string
	body    []byte // nil: none
	chunked bool   // the length of the body is not declared
	stalled bool   // the end of the body never comes
	header  map[string]string
}

func get(path string) request  { return request{method: "GET", path: path} }
func post(path string) request { return request{method: "POST", path: path} }
func put(path string) request  { return request{method: "PUT", path: path} }
func del(path string) request  { return request{method: "DELETE", path: path} }

// to is a request of a route as the table of routes names it, with the id of no session.
func to(route string) request {
	method, path, _ := strings.Cut(route, " ")
	return request{method: method, path: strings.Replace(path, "{id}", newUUID(), 1)}
}

func (r request) with(name, value string) request {
	header := map[string]string{}
	maps.Copy(header, r.header)
	header[name] = value
	r.header = header
	return r
}

func (r request) bearer(token string) request { return r.with("Authorization", "Bearer "+token) }
func (r request) cookie(token string) request { return r.with("Cookie", "refreshToken="+token) }
func (r request) agent(name string) request   { return r.with("User-Agent", name) }
func (r request) ip(ip string) request        { return r.with("X-Forwarded-For", ip) }
func (r request) from(origin string) request  { return r.with("Origin", origin) }
func (r request) typed(kind string) request   { return r.with("Content-Type", kind) }

// evil makes it a request that a browser sends for a stranger's page.
func evil(r request) request { return r.from("https://evil.example") }

// preflight makes it what a browser asks before it sends a request of this method.
func (r request) preflight(origin string) request {
	asked := request{method: "OPTIONS", path: r.path}.from(origin)
	return asked.with("Access-Control-Request-Method", r.method)
}

// text gives it a body that goes as it is.
func (r request) text(body string) request {
	r.body = []byte(body)
	return r.typed("application/json")
}

// members gives it a body of JSON with these names and values.
func (r request) members(members ...string) request {
	object := map[string]string{}
	for i := 0; i < len(members); i += 2 {
		object[members[i]] = members[i+1]
	}
	body, _ := json.Marshal(object)
	return r.text(string(body))
}

func (r request) chunks() request {
	r.chunked = true
	return r
}

// stalls lets the end of the body never come.
func (r request) stalls() request {
	r.stalled = true
	return r
}

// send sends a request, from an address of its own unless it has one, and reads the answer to its
// end. Whatever the test is about, the answer is held to what the contract says of all answers, and
// to openapi.yaml. It does not end the test by itself, so goroutines may use it, too.
func (s *server) send(r request) *answer {
	a := &answer{server: s, asked: r}
	var body io.Reader
	switch {
	case r.stalled:
		rest, _ := io.Pipe()
		body = io.MultiReader(bytes.NewReader(r.body), rest)
	case r.chunked:
		body = io.MultiReader(bytes.NewReader(r.body)) // net/http cannot see its length
	case r.body != nil:
		body = bytes.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(s.Context(), r.method, s.URL+r.path, body)
	if err != nil {
		s.Errorf("%s: %v", a, err)
		return a
	}
	req.Header.Set("X-Forwarded-For", newIP())
	for name, value := range r.header {
		req.Header.Set(name, value)
	}
	sent := time.Now()
	resp, err := s.http.Do(req)
	if err == nil {
		defer resp.Body.Close()
		a.body, err = io.ReadAll(resp.Body)
	}
	if err != nil {
		s.Errorf("%s: %v", a, err)
		return a
	}
	a.Response = resp
	a.took = time.Since(sent)
	json.Unmarshal(a.body, &a.json)
	a.assertInvariants(req)
	document.validate(a, req)
	return a
}

// together calls send n times at once and waits for all answers.
func together(n int, send func(i int) *answer) []*answer {
	answers := make([]*answer, n)
	start := make(chan struct{})
	var wait sync.WaitGroup
	for i := range n {
		wait.Go(func() {
			<-start
			answers[i] = send(i)
		})
	}
	close(start)
	wait.Wait()
	return answers
}

// count is how many of the answers have a status.
func count(answers []*answer, status int) (n int) {
	for _, a := range answers {
		if a.status() == status {
			n++
		}
	}
	return n
}

// The addresses begin anywhere, so that a second run does not meet the counters of the first.
var (
	addresses    atomic.Uint32
	firstAddress = mathrand.Uint32()
)

// newIP is an address that no other client has, of the reserved range 240.0.0.0/4.
func newIP() string {
	n := firstAddress + addresses.Add(1)
	b := [4]byte{240 | byte(n>>24), byte(n >> 16), byte(n >> 8), byte(n)}
	return netip.AddrFrom4(b).String()
}

// All emails and passwords that the tests make up have these in them, which no log may show.
const (
	emailMark    = "@promise.example"
	passwordMark = "pass phrase "
)

func newEmail() string    { return "user-" + strings.ToLower(rand.Text()) + emailMark }
func newPassword() string { return passwordMark + rand.Text() }

func signupOf(email, password string) request {
	return post("/auth/signup").members("email", email, "password", password)
}

func loginOf(email, password string) request {
	return post("/auth/login").members("email", email, "password", password)
}

func changeOf(current, next string) request {
	return put("/auth/password").members("currentPassword", current, "newPassword", next)
}

func deletionOf(password string) request { return del("/auth/me").members("password", password) }

func forgotOf(email string) request { return post("/auth/password/forgot").members("email", email) }

func resetOf(token, password string) request {
	return post("/auth/password/reset").members("token", token, "newPassword", password)
}

func verifyOf(token string) request { return post("/auth/email/verify").members("token", token) }

func moveOf(email, password string) request {
	return put("/auth/email").members("newEmail", email, "password", password)
}

// A client is a user at a device, with what that device holds of one session.
type client struct {
	s        *server
	id       string // the user's
	email    string
	password string
	ip       string
	agent    string
	access   string
	refresh  string
	last     *answer // the one that gave these tokens
}

// newUser is a user who has not signed up yet.
func (s *server) newUser() *client {
	return &client{s: s, email: newEmail(), password: newPassword(), ip: newIP(), agent: "an agent"}
}

// signup makes a user, who is logged in by it.
func (s *server) signup() *client {
	c := s.newUser()
	c.take(c.send(signupOf(c.email, c.password)).ok())
	c.id = c.last.str("user", "id")
	return c
}

// The methods named try and guess send a request and leave it to the caller what comes of it.

func (s *server) trySignup(email, password string) *answer {
	return s.send(signupOf(email, password))
}

func (s *server) tryLogin(email, password, ip string) *answer {
	return s.send(loginOf(email, password).ip(ip))
}

func (s *server) guess(email, ip string) *answer { return s.tryLogin(email, newPassword(), ip) }

func (c *client) tryLogin() *answer { return c.send(loginOf(c.email, c.password)) }

// login opens another session of the same user at another device.
func (c *client) login() *client {
	other := c.elsewhere()
	other.take(other.tryLogin().ok())
	return other
}

// on is the same session as it is seen through another server.
func (c *client) on(s *server) *client {
	other := *c
	other.s = s
	return &other
}

// elsewhere is the same session at an address of its own.
func (c *client) elsewhere() *client {
	other := *c
	other.ip = newIP()
	return &other
}

// take keeps the tokens of an answer.
func (c *client) take(a *answer) {
	c.access = a.str("accessToken")
	c.refresh = a.refreshCookie().Value
	c.last = a
}

// send sends a request with the access token, unless it has another.
func (c *client) send(r request) *answer {
	if _, given := r.header["Authorization"]; !given && c.access != "" {
		r = r.bearer(c.access)
	}
	return c.s.send(r.ip(c.ip).agent(c.agent))
}

// show sends a refresh token, and keeps nothing of the answer.
func (c *client) show(refresh string) *answer {
	return c.s.send(post("/auth/refresh").cookie(refresh).ip(c.ip).agent(c.agent))
}

// rotate exchanges the refresh token, which must succeed.
func (c *client) rotate() *answer {
	c.take(c.show(c.refresh).ok())
	return c.last
}

// me asks whom an access token belongs to.
func (c *client) me(access string) *answer { return c.send(get("/auth/me").bearer(access)) }

func (c *client) logout() *answer { return c.send(post("/auth/logout")) }

func (c *client) revoke(sid string) *answer { return c.send(del("/auth/sessions/" + sid)) }

func (c *client) revokeAll() *answer { return c.send(del("/auth/sessions")) }

func (c *client) changePassword(current, next string) *answer {
	return c.send(changeOf(current, next))
}

func (c *client) deleteAccount(password string) *answer { return c.send(deletionOf(password)) }

// verification asks for another message that verifies the address.
func (c *client) verification() *answer { return c.send(post("/auth/email/verification")) }

// move asks for another address.
func (c *client) move(email, password string) *answer { return c.send(moveOf(email, password)) }

// resetToken is that of a link for a forgotten password, which the user asks for.
func (c *client) resetToken() string {
	c.elsewhere().send(forgotOf(c.email)).want(202)
	return c.s.mailTo(c.email, toReset).token()
}

// verifyToken is that of the link that came at signup.
func (c *client) verifyToken() string { return c.s.mailTo(c.email, toVerify).token() }

// moveToken is that of a link that confirms another address, which the user asks for.
func (c *client) moveToken(email string) string {
	c.elsewhere().move(email, c.password).want(202)
	return c.s.mailTo(email, toChange).token()
}

// row is all that PostgreSQL has of the user.
func (c *client) row() string {
	return c.s.query("SELECT users::text FROM users WHERE id = $1", c.id)
}

// sid is the session's id.
func (c *client) sid() string { return c.s.claims(c.access).text("sid") }

// passwordHash is the hash that PostgreSQL has of the user's password.
func (c *client) passwordHash() string {
	return c.s.query("SELECT password_hash FROM users WHERE id = $1", c.id)
}

// A listed session is one of GET /auth/sessions.
type listed struct {
	ID         string
	CreatedAt  string
	LastUsedAt string
	IP         string
	UserAgent  string
	Current    bool
}

func (c *client) sessions() []listed {
	var list struct{ Sessions []listed }
	json.Unmarshal(c.send(get("/auth/sessions")).ok().body, &list)
	return list.Sessions
}

// lives asserts that both tokens are good.
func (c *client) lives() {
	c.me(c.access).ok()
	c.rotate()
}

// gone asserts that the session is over for both tokens, and that asking does not bring it back.
func (c *client) gone() {
	c.send(get("/auth/sessions")).refused("session_revoked")
	c.show(c.refresh).want(401).clearsCookie()
	c.me(c.access).refused("session_revoked")
}
