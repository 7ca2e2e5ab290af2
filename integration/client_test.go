package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A request as a test writes it down: only what matters to it.
type request struct {
	method, path string
	body         any    // a string goes as it is, anything else as JSON
	chunked      bool   // without declaring the body's length
	contentType  string // default: application/json where there is a body
	bearer       string // access token
	cookie       string // refresh token
	ip           string // the client's own address; default: a new one
	agent        string // User-Agent
	header       map[string]string
}

// An answer is a response, read to its end.
type answer struct {
	*http.Response
	t    testing.TB
	sent string // what it answers, for messages
	body []byte
	json map[string]any // nil where the body is no JSON object
	took time.Duration
}

// send does not end the test by itself, so it serves in goroutines too; want and refused do.
// Every answer, whatever the test is about, is held to what the contract says of all answers, and to openapi.yaml.
func (s *server) send(t testing.TB, r request) *answer {
	t.Helper()
	a := &answer{t: t, sent: r.method + " " + r.path}
	raw, err := r.bytes()
	if err != nil {
		t.Error(err)
		return a
	}
	var body io.Reader
	if r.chunked {
		body = io.MultiReader(bytes.NewReader(raw)) // a reader whose length net/http cannot see
	} else if raw != nil {
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(t.Context(), r.method, s.URL+r.path, body)
	if err != nil {
		t.Errorf("%s: %v", a.sent, err)
		return a
	}
	if r.contentType != "" {
		req.Header.Set("Content-Type", r.contentType)
	} else if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if r.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+r.bearer)
	}
	if r.cookie != "" {
		req.Header.Set("Cookie", "refreshToken="+r.cookie)
	}
	if r.ip == "" {
		r.ip = newIP()
	}
	req.Header.Set("X-Forwarded-For", r.ip)
	if r.agent != "" {
		req.Header.Set("User-Agent", r.agent)
	}
	for name, value := range r.header {
		req.Header.Set(name, value)
	}
	start := time.Now()
	a.Response, err = httpClient.Do(req)
	if err == nil {
		defer a.Body.Close()
		a.body, err = io.ReadAll(a.Body)
	}
	a.took = time.Since(start)
	if err != nil {
		t.Errorf("%s: %v", a.sent, err)
		return a
	}
	json.Unmarshal(a.body, &a.json)
	a.remember()
	s.assertInvariants(a, req)
	document.validate(t, req, raw, a)
	return a
}

// bytes is the body as it is sent; nil where there is none.
func (r request) bytes() ([]byte, error) {
	switch b := r.body.(type) {
	case nil:
		return nil, nil
	case string:
		return []byte(b), nil
	default:
		return json.Marshal(b)
	}
}

// together sends n requests at once and waits for all of the answers.
func together(n int, send func(i int) *answer) []*answer {
	answers := make([]*answer, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			answers[i] = send(i)
		})
	}
	close(start)
	wg.Wait()
	return answers
}

// status is 0 where there was no answer; send has reported that.
func (a *answer) status() int {
	if a.Response == nil {
		return 0
	}
	return a.StatusCode
}

func (a *answer) code() string {
	code, _ := a.json["code"].(string)
	return code
}

func (a *answer) want(status int) *answer {
	a.t.Helper()
	if a.status() != status {
		a.t.Fatalf("%s: got %d %s, want %d", a.sent, a.status(), a.body, status)
	}
	return a
}

func (a *answer) refused(status int, code string) *answer {
	a.t.Helper()
	if a.status() != status || a.code() != code {
		a.t.Fatalf("%s: got %d %s, want %d %s", a.sent, a.status(), a.body, status, code)
	}
	return a
}

// members asserts the exact names of an object's members.
func members(t testing.TB, object map[string]any, names ...string) {
	t.Helper()
	got := []string{}
	for name := range object {
		got = append(got, name)
	}
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		t.Errorf("members %q, want %q", got, names)
	}
}

func (a *answer) str(path ...string) string {
	a.t.Helper()
	v := any(a.json)
	for _, name := range path {
		object, _ := v.(map[string]any)
		v = object[name]
	}
	text, ok := v.(string)
	if !ok {
		a.t.Errorf("%s: %s has no text at %q", a.sent, a.body, path)
	}
	return text
}

func (a *answer) details() map[string]any {
	details, _ := a.json["details"].(map[string]any)
	return details
}

func (a *answer) setsCookie() bool { return len(a.Header.Values("Set-Cookie")) > 0 }

// refreshCookie is the one cookie that an answer sets.
func (a *answer) refreshCookie() *http.Cookie {
	a.t.Helper()
	cookies := a.Cookies()
	if len(cookies) != 1 || cookies[0].Name != "refreshToken" {
		a.t.Fatalf("%s: Set-Cookie %q, want one refreshToken", a.sent, a.Header.Values("Set-Cookie"))
	}
	return cookies[0]
}

func (a *answer) clearsCookie() *answer {
	a.t.Helper()
	if c := a.refreshCookie(); c.Value != "" || c.MaxAge >= 0 || c.Path != "/auth" {
		a.t.Errorf("%s: cookie not cleared: %q", a.sent, a.Header.Values("Set-Cookie"))
	}
	return a
}

func (a *answer) keepsCookie() *answer {
	a.t.Helper()
	if a.setsCookie() {
		a.t.Errorf("%s: %d has a cookie header: %q", a.sent, a.status(), a.Header.Values("Set-Cookie"))
	}
	return a
}

func (a *answer) number(header string) int {
	a.t.Helper()
	n, err := strconv.Atoi(a.Header.Get(header))
	if err != nil {
		a.t.Errorf("%s: header %s: %v", a.sent, header, err)
	}
	return n
}

var (
	uuidPattern      = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	codePattern      = regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
	rateLimitPattern = regexp.MustCompile(`^"ip";r=(\d+);t=(\d+)$`)
)

// isTime is the contract's "times are RFC 3339 in UTC".
func isTime(t testing.TB, text string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, text)
	if err != nil || !strings.HasSuffix(text, "Z") {
		t.Errorf("time %q is not RFC 3339 in UTC", text)
	}
	return at
}

func isNow(t testing.TB, text string) {
	t.Helper()
	// Minutes of slack: the server's clock may be another machine's.
	if d := time.Since(isTime(t, text)).Abs(); d > 2*time.Minute {
		t.Errorf("time %s is %v from now", text, d)
	}
}

// assertInvariants holds an answer to the sentences that begin with "every", "all" and "never".
func (s *server) assertInvariants(a *answer, req *http.Request) {
	a.t.Helper()
	fault := func(format string, args ...any) {
		a.t.Helper()
		a.t.Errorf("%s: %d: %s", a.sent, a.StatusCode, fmt.Sprintf(format, args...))
	}
	path := req.URL.Path
	health := path == "/healthz" || path == "/readyz"
	preflight := req.Method == http.MethodOptions && req.Header.Get("Origin") != "" &&
		req.Header.Get("Access-Control-Request-Method") != ""
	id := a.Header.Get("X-Request-Id")
	if !uuidPattern.MatchString(strings.ToLower(id)) {
		fault("X-Request-Id is %q", id)
	}
	if !slices.ContainsFunc(a.Header.Values("Vary"), func(v string) bool { return strings.Contains(v, "Origin") }) {
		fault("Vary is %q, want Origin always", a.Header.Values("Vary"))
	}
	if path == "/auth" || strings.HasPrefix(path, "/auth/") {
		if a.Header.Get("Cache-Control") != "no-store" || a.Header.Get("X-Content-Type-Options") != "nosniff" {
			fault("all /auth answers are no-store and nosniff: %v", a.Header)
		}
	}
	if !preflight && req.Method != http.MethodHead && a.Header.Get("Content-Type") != "application/json" &&
		a.Header.Get("Content-Type") != "application/json; charset=utf-8" {
		fault("Content-Type is %q", a.Header.Get("Content-Type"))
	}
	if a.StatusCode >= 400 && req.Method != http.MethodHead && path != "/readyz" {
		s.assertErrorFormat(a, id)
	}
	challenge := a.Header.Get("WWW-Authenticate")
	if (a.StatusCode == 401) != (challenge == "Bearer" || strings.HasPrefix(challenge, "Bearer ")) {
		fault("WWW-Authenticate is %q", challenge)
	}
	if a.StatusCode == 429 || a.StatusCode == 503 {
		if path != "/readyz" && a.number("Retry-After") < 1 {
			fault("Retry-After is %q", a.Header.Get("Retry-After"))
		}
		if a.setsCookie() {
			fault("a 429 or a 503 never clears or replaces the cookie: %q", a.Header.Values("Set-Cookie"))
		}
	}
	// Where Redis could not decide, there is nothing to say of the limit.
	if limited := a.Header.Get("RateLimit"); !health && !preflight && s.conf("RATE_LIMIT_MAX") != "0" && a.StatusCode < 500 {
		policy := fmt.Sprintf(`"ip";q=%s;w=%s`, s.conf("RATE_LIMIT_MAX"), s.conf("RATE_LIMIT_WINDOW"))
		if a.Header.Get("RateLimit-Policy") != policy || !rateLimitPattern.MatchString(limited) {
			fault("RateLimit-Policy %q, RateLimit %q, want %q", a.Header.Get("RateLimit-Policy"), limited, policy)
		}
	} else if (health || preflight || s.conf("RATE_LIMIT_MAX") == "0") && limited != "" {
		fault("not limited, but RateLimit is %q", limited)
	}
	s.assertCORS(a, req)
}

func (s *server) assertErrorFormat(a *answer, id string) {
	a.t.Helper()
	names := []string{"error", "statusCode", "requestId", "timestamp", "code"}
	if a.code() == "validation_failed" {
		names = append(names, "details")
		if len(a.details()) == 0 {
			a.t.Errorf("%s: %s has no details", a.sent, a.body)
		}
	}
	members(a.t, a.json, names...)
	if a.json["statusCode"] != float64(a.StatusCode) || a.json["requestId"] != id || a.json["error"] == "" ||
		!codePattern.MatchString(a.code()) {
		a.t.Errorf("%s: %d with X-Request-Id %s has the body %s", a.sent, a.StatusCode, id, a.body)
	}
	isNow(a.t, a.str("timestamp"))
}

// assertCORS is "exact match, with credentials; other origins, null among them, get no CORS header".
func (s *server) assertCORS(a *answer, req *http.Request) {
	a.t.Helper()
	origin, listed := req.Header.Get("Origin"), false
	for o := range strings.SplitSeq(s.conf("FRONTEND_URL"), ",") {
		listed = listed || origin != "" && origin == strings.TrimSuffix(strings.TrimSpace(o), "/")
	}
	for name, values := range a.Header {
		if strings.HasPrefix(name, "Access-Control-") && !listed {
			a.t.Errorf("%s: origin %q gets %s: %q", a.sent, origin, name, values)
		}
	}
	if listed && (a.Header.Get("Access-Control-Allow-Origin") != origin || a.Header.Get("Access-Control-Allow-Credentials") != "true") {
		a.t.Errorf("%s: %d: origin %q gets %v", a.sent, a.StatusCode, origin, a.Header)
	}
}

// spoken is every secret, and every email address, that these tests and the servers said to each other.
var spoken sync.Map

// remember notes the tokens of an answer. The signature alone is noted: whoever has it in a log has the token.
func (a *answer) remember() {
	tokens := []string{}
	if token, ok := a.json["accessToken"].(string); ok {
		tokens = append(tokens, token)
	}
	for _, c := range a.Cookies() {
		tokens = append(tokens, c.Value)
	}
	for _, token := range tokens {
		if parts := strings.Split(token, "."); len(parts) == 3 {
			spoken.Store(parts[2], true)
		}
	}
}

// assertLogFreeOfSecrets is "never a password, a token, a cookie, a secret or an email address".
func assertLogFreeOfSecrets(t testing.TB, s *server) {
	t.Helper()
	log := logsOf(s.c)
	secrets := []string{s.conf("JWT_SECRET"), s.conf("JWT_REFRESH_SECRET"), s.conf("JWT_SECRET_PREVIOUS"),
		s.conf("JWT_REFRESH_SECRET_PREVIOUS"), databasePassword, "$2a$", "$2b$", "eyJhbGci", "refreshToken"}
	spoken.Range(func(secret, _ any) bool {
		secrets = append(secrets, secret.(string))
		return true
	})
	for _, secret := range secrets {
		if secret != "" && strings.Contains(log, secret) {
			line := log[:strings.Index(log, secret)]
			t.Errorf("the log of %s shows %q, after ...%s", s.URL, secret, tail(line, 1))
		}
	}
}

func newEmail() string {
	email := "user-" + strings.ToLower(rand.Text()) + "@example.com"
	spoken.Store(email, true)
	return email
}

func newPassword() string {
	password := "pw " + rand.Text()
	spoken.Store(password, true)
	return password
}

type credentials struct {
	Email    string `json:"email"`
	Password string `json:"password"`
}

type passwordChange struct {
	Current string `json:"currentPassword"`
	New     string `json:"newPassword"`
}

type passwordOnly struct {
	Password string `json:"password"`
}

// A visitor is one session of one user, as a client holds it.
type visitor struct {
	t               testing.TB
	s               *server
	id              string
	email, password string
	ip, agent       string
	access, refresh string
}

// signup makes a user, and logs in by it.
func (s *server) signup(t testing.TB) *visitor {
	t.Helper()
	v := &visitor{t: t, s: s, email: newEmail(), password: newPassword(), ip: newIP(), agent: "test agent"}
	a := s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{v.email, v.password}, ip: v.ip, agent: v.agent}).want(201)
	v.id = a.str("user", "id")
	v.take(a)
	return v
}

func (s *server) tryLogin(t testing.TB, email, password, ip string) *answer {
	t.Helper()
	return s.send(t, request{method: "POST", path: "/auth/login", body: credentials{email, password}, ip: ip})
}

// login opens another session of the same user, from another place.
func (v *visitor) login() *visitor {
	v.t.Helper()
	other := *v
	other.ip = newIP()
	other.take(v.s.tryLogin(v.t, v.email, v.password, other.ip).want(200))
	return &other
}

// on is the same session, as it is seen through another server.
func (v *visitor) on(s *server) *visitor {
	other := *v
	other.s = s
	return &other
}

// take keeps the tokens of an answer.
func (v *visitor) take(a *answer) {
	v.t.Helper()
	v.access, v.refresh = a.str("accessToken"), a.refreshCookie().Value
}

// send sends with the access token.
func (v *visitor) send(method, path string, body any) *answer {
	v.t.Helper()
	return v.s.send(v.t, request{method: method, path: path, body: body, bearer: v.access, ip: v.ip, agent: v.agent})
}

// show shows a refresh token, and changes nothing in the visitor.
func (v *visitor) show(refresh string) *answer {
	v.t.Helper()
	return v.s.send(v.t, request{method: "POST", path: "/auth/refresh", cookie: refresh, ip: v.ip, agent: v.agent})
}

// rotate exchanges the refresh token, which must succeed.
func (v *visitor) rotate() *answer {
	v.t.Helper()
	a := v.show(v.refresh).want(200)
	v.take(a)
	return a
}

// sid is the session's id.
func (v *visitor) sid() string {
	v.t.Helper()
	return claimsOf(v.t, v.access)["sid"].(string)
}

// lives asserts that both tokens are good.
func (v *visitor) lives() {
	v.t.Helper()
	v.send("GET", "/auth/sessions", nil).want(200)
	v.rotate()
}

// gone asserts that neither token is good, now and afterwards.
func (v *visitor) gone() {
	v.t.Helper()
	v.send("GET", "/auth/sessions", nil).refused(401, "session_revoked")
	v.show(v.refresh).want(401)
	v.send("GET", "/auth/me", nil).want(401)
}

// sessions is the caller's list.
func (v *visitor) sessions() []map[string]any {
	v.t.Helper()
	list, ok := v.send("GET", "/auth/sessions", nil).want(200).json["sessions"].([]any)
	if !ok {
		v.t.Fatal("sessions is no array")
	}
	sessions := []map[string]any{}
	for _, entry := range list {
		sessions = append(sessions, entry.(map[string]any))
	}
	return sessions
}

// host is the host and port of a server's URL.
func (s *server) host() string {
	u, err := url.Parse(s.URL)
	if err != nil {
		panic(err)
	}
	return u.Host
}

// count is how many answers have a status.
func count(answers []*answer, status int) int {
	n := 0
	for _, a := range answers {
		if a.status() == status {
			n++
		}
	}
	return n
}
