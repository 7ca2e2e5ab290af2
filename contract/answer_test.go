package contract

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// routes is the contract's table of routes: what each answers where all is well, its members in
// their order. What they hold, openapi.yaml says.
var routes = map[string]string{
	"POST /auth/signup":             "{message user{id email createdAt} accessToken}",
	"POST /auth/login":              "{message user{id email} accessToken}",
	"POST /auth/refresh":            "{accessToken}",
	"POST /auth/logout":             "{message}",
	"GET /auth/me":                  "{user{id email createdAt emailVerified}}",
	"GET /auth/sessions":            "{sessions[{id createdAt lastUsedAt ip userAgent current}]}",
	"DELETE /auth/sessions/{id}":    "{message}",
	"DELETE /auth/sessions":         "{message}",
	"PUT /auth/password":            "{message}",
	"DELETE /auth/me":               "{message}",
	"POST /auth/password/forgot":    "{message}",
	"POST /auth/password/reset":     "{message}",
	"POST /auth/email/verification": "{message}",
	"POST /auth/email/verify":       "{message user{id email emailVerified}}",
	"PUT /auth/email":               "{message}",
	"GET /healthz":                  "{status}",
	"GET /readyz":                   "{status postgres redis}",
}

// mailRoutes exist only where mail is configured.
var mailRoutes = []string{
	"POST /auth/password/forgot", "POST /auth/email/verification", "POST /auth/email/verify",
	"PUT /auth/email",
}

// routes are the server's: those that send mails are there where it is known to have a mail server.
func (s *server) routes() []string {
	known := slices.Sorted(maps.Keys(routes))
	if s.conf("SMTP_URL") != "" || s.conf("NODE_ENV") == "development" {
		return known
	}
	return slices.DeleteFunc(known, func(route string) bool {
		return slices.Contains(mailRoutes, route)
	})
}

// isHealth reports whether a route or a path is exempt from the rate limit.
func isHealth(route string) bool {
	path := strings.TrimPrefix(route, "GET ")
	return path == "/healthz" || path == "/readyz"
}

// An answer is a response, read to its end.
type answer struct {
	*http.Response
	server *server
	asked  request
	body   []byte
	json   map[string]any // nil where the body is no JSON object
	took   time.Duration
}

// String says what the answer answers.
func (a *answer) String() string { return fmt.Sprintf("%.20s %.80s", a.asked.method, a.asked.path) }

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

// must ends the test unless what it wants of the answer holds.
func (a *answer) must(holds bool, want any) *answer {
	if !holds {
		a.server.Fatalf("%s: got %d %s, want %v", a, a.status(), a.body, want)
	}
	return a
}

func (a *answer) want(status int) *answer { return a.must(a.status() == status, status) }

// ok and refused want a success, or an error with this code, whose form send has checked.

func (a *answer) ok() *answer { return a.must(a.status()/100 == 2, "a success") }

func (a *answer) refused(code string) *answer { return a.must(a.code() == code, code) }

// shouldBe is refused, or ok for an empty code, in a table of many: the test goes on.
func (a *answer) shouldBe(code, what string) *answer {
	a.server.expect(a.code() == code && (code != "" || a.status()/100 == 2),
		"%s, %.100q: got %d %s, want %q", a, what, a.status(), a.body, code)
	return a
}

// names asserts that the details of a validation error are about these fields.
func (a *answer) names(fields ...string) *answer {
	details, _ := a.json["details"].(map[string]any)
	for _, field := range fields {
		a.expect(details[field] != nil, "no details of %s: %s", field, a.body)
	}
	a.server.expect(len(details) == len(fields),
		"%s: details of more than %q: %s", a, fields, a.body)
	return a
}

// str is a text of the body, by its path.
func (a *answer) str(path ...string) string {
	value := any(a.json)
	for _, name := range path {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	text, ok := value.(string)
	a.server.expect(ok, "%s: %s has no text at %q", a, a.body, path)
	return text
}

// number is the value of a header.
func (a *answer) number(header string) int {
	n, err := strconv.Atoi(a.Header.Get(header))
	a.server.expect(err == nil, "%s: header %s: %v", a, header, err)
	return n
}

var rateLimitForm = regexp.MustCompile(`^"ip";r=(\d+);t=(\d+)$`)

// limit is what the RateLimit header tells: how many requests are left for how many seconds.
func (a *answer) limit() (left, seconds int) {
	match := rateLimitForm.FindStringSubmatch(a.Header.Get("RateLimit"))
	if match == nil {
		return -1, -1
	}
	left, _ = strconv.Atoi(match[1])
	seconds, _ = strconv.Atoi(match[2])
	return left, seconds
}

func (a *answer) remaining() int {
	left, _ := a.limit()
	return left
}

// refreshCookie is the one cookie that the answer sets.
func (a *answer) refreshCookie() *http.Cookie {
	cookies := a.Cookies()
	if len(cookies) != 1 || cookies[0].Name != "refreshToken" {
		a.server.Fatalf("%s: %d with Set-Cookie %q, want one refreshToken",
			a, a.status(), a.Header.Values("Set-Cookie"))
	}
	return cookies[0]
}

func (a *answer) setsCookie() bool { return len(a.Header.Values("Set-Cookie")) > 0 }

func (a *answer) clearsCookie() *answer {
	c := a.refreshCookie()
	a.server.expect(c.Value == "" && c.MaxAge < 0, "%s: the cookie is not cleared: %q", a, c.Raw)
	return a
}

func (a *answer) keepsCookie() *answer {
	a.server.expect(!a.setsCookie(), "%s: %d sets %q", a, a.status(), a.Header.Values("Set-Cookie"))
	return a
}

var uuidForm = regexp.MustCompile(`(?i)^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// isTime asserts the contract's "times are RFC 3339 in UTC".
func (s *server) isTime(text string) time.Time {
	at, err := time.Parse(time.RFC3339, text)
	s.expect(err == nil && strings.HasSuffix(text, "Z"), "the time %q is not RFC 3339 in UTC", text)
	return at
}

// isNow allows for minutes, since the server's clock may be another machine's.
func (s *server) isNow(text string) {
	d := time.Since(s.isTime(text)).Abs()
	s.expect(d <= 2*time.Minute, "the time %s is %v from now", text, d)
}

// shape lists an object's members in their order, and those of the objects in it, as in
// {message user{id email}}.
func shape(d *json.Decoder) string {
	token, err := d.Token()
	if err != nil {
		return err.Error()
	}
	var parts []string
	switch token {
	case json.Delim('{'):
		for d.More() {
			name, _ := d.Token()
			parts = append(parts, fmt.Sprint(name)+shape(d))
		}
		d.Token()
		return "{" + strings.Join(parts, " ") + "}"
	case json.Delim('['):
		for d.More() {
			parts = append(parts, shape(d))
		}
		d.Token()
		return "[" + strings.Join(slices.Compact(parts), " ") + "]"
	}
	return ""
}

// expect reports what is wrong with an answer.
func (a *answer) expect(holds bool, format string, args ...any) {
	if !holds {
		a.server.Errorf("%s: %d: %s", a, a.StatusCode, fmt.Sprintf(format, args...))
	}
}

// assertInvariants holds an answer to what the contract says of all and openapi.yaml cannot.
func (a *answer) assertInvariants(req *http.Request) {
	preflight := req.Method == "OPTIONS" && req.Header.Get("Origin") != "" &&
		req.Header.Get("Access-Control-Request-Method") != ""
	a.expect(slices.Contains(a.Header.Values("Vary"), "Origin"), "Vary is %q", a.Header["Vary"])
	if strings.HasPrefix(req.URL.Path+"/", "/auth/") {
		a.expect(a.Header.Get("Cache-Control") == "no-store" &&
			a.Header.Get("X-Content-Type-Options") == "nosniff", "may be stored: %v", a.Header)
	}
	if !preflight && req.Method != "HEAD" {
		a.assertMembers(req)
	}
	if a.setsCookie() {
		a.assertCookie(req.URL.Path)
	}
	a.assertChallenge()
	a.assertRateLimit(preflight || isHealth(req.URL.Path))
	a.assertCORS(req.Header.Get("Origin"))
}

// assertMembers holds the members of a body to their order, and those of an error to the answer.
func (a *answer) assertMembers(req *http.Request) {
	got := shape(json.NewDecoder(bytes.NewReader(a.body)))
	route := req.Method + " " + req.URL.Path
	if strings.HasPrefix(route, "DELETE /auth/sessions/") {
		route = "DELETE /auth/sessions/{id}"
	}
	want := routes[route]
	if a.StatusCode >= 400 && route != "GET /readyz" {
		want = "{error statusCode requestId timestamp code}"
		if a.code() == "validation_failed" {
			want = "{error statusCode requestId timestamp code details{"
			got = got[:min(len(got), len(want))]
		}
		a.server.isNow(a.str("timestamp"))
		id := a.Header.Get("X-Request-Id")
		a.expect(a.json["requestId"] == id, "X-Request-Id is %s: %s", id, a.body)
	}
	a.expect(got == want || got == "{sessions[]}", "the members are %s, want %s", got, want)
}

var sameSites = map[string]http.SameSite{
	"strict": http.SameSiteStrictMode,
	"lax":    http.SameSiteLaxMode,
	"none":   http.SameSiteNoneMode,
}

// assertCookie is the contract's line on the cookie. Successes set or clear it, and of the errors
// the 401 of refresh and logout clear it.
func (a *answer) assertCookie(path string) {
	ofError := a.StatusCode == 401 && (path == "/auth/refresh" || path == "/auth/logout")
	a.expect(a.StatusCode < 300 || ofError, "Set-Cookie is %q", a.Header["Set-Cookie"])
	secure := a.server.conf("NODE_ENV") != "development"
	sameSite := sameSites[a.server.conf("COOKIE_SAMESITE")]
	for _, c := range a.Cookies() {
		a.expect(len(a.Cookies()) == 1 && c.Secure == secure && c.SameSite == sameSite &&
			(c.Value == "" || !ofError) && c.Domain == "" && c.Path == "/auth" && c.HttpOnly,
			"Set-Cookie is %q", c.Raw)
		if c.Value != "" {
			claims := a.server.claims(c.Value)
			life := claims.number("exp") - claims.number("iat")
			a.expect(int64(c.MaxAge) == life, "Max-Age is %d, the token lives %d s", c.MaxAge, life)
		}
	}
}

// assertChallenge is "every 401 carries WWW-Authenticate". A logout is refused for its Bearer token
// or for its cookie.
func (a *answer) assertChallenge() {
	got := a.Header.Get("WWW-Authenticate")
	want := ""
	if a.StatusCode == 401 {
		want = "Bearer"
	}
	shown := strings.HasPrefix(a.asked.header["Authorization"], "Bearer ")
	ofToken := []string{"token_expired", "invalid_token", "session_revoked"}
	if shown && a.asked.path != "/auth/refresh" && slices.Contains(ofToken, a.code()) {
		want = `Bearer error="invalid_token"`
	}
	ofCookie := a.asked.path == "/auth/logout" && a.asked.header["Cookie"] != "" && got == "Bearer"
	a.expect(got == want || ofCookie || a.asked.method == "HEAD", "WWW-Authenticate is %q", got)
}

func (a *answer) assertRateLimit(exempt bool) {
	policy := ""
	if most := a.server.conf("RATE_LIMIT_MAX"); most != "0" && !exempt {
		policy = fmt.Sprintf(`"ip";q=%s;w=%s`, most, a.server.conf("RATE_LIMIT_WINDOW"))
	}
	got := a.Header.Get("RateLimit-Policy")
	left, _ := a.limit()
	// An answer of 500 and above may be because Redis has not decided.
	a.expect(got == policy && (left >= 0) == (policy != "") || a.StatusCode >= 500,
		"RateLimit-Policy %q, want %q; RateLimit %q", got, policy, a.Header.Get("RateLimit"))
}

// origins are the server's frontends.
func (s *server) origins() (origins []string) {
	for origin := range strings.SplitSeq(s.conf("FRONTEND_URL"), ",") {
		origins = append(origins, strings.TrimSuffix(strings.TrimSpace(origin), "/"))
	}
	return origins
}

// assertCORS is "exact match, with credentials; other origins, null too, get no CORS header".
func (a *answer) assertCORS(origin string) {
	if slices.Contains(a.server.origins(), origin) {
		a.expect(a.Header.Get("Access-Control-Allow-Origin") == origin &&
			a.Header.Get("Access-Control-Allow-Credentials") == "true", "CORS: %v", a.Header)
		return
	}
	for name := range a.Header {
		a.expect(!strings.HasPrefix(name, "Access-Control-"), "the origin %q gets %s", origin, name)
	}
}
