package contract

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// success is what a route answers where all is well: the members in their order, the message, and
// what becomes of the refresh cookie: it is set, cleared, cleared where the caller's own session
// ends, or left alone.
type success struct {
	status  int
	body    string
	message string
	cookie  string
}

// routes is the contract's table of routes.
var routes = map[string]success{
	"POST /auth/signup": {201, "{message user{id email createdAt} accessToken}",
		"User created successfully", "set"},
	"POST /auth/login":   {200, "{message user{id email} accessToken}", "Login successful", "set"},
	"POST /auth/refresh": {200, "{accessToken}", "", "set"},
	"POST /auth/logout":  {200, "{message}", "Logout successful", "cleared"},
	"GET /auth/me":       {200, "{user{id email createdAt}}", "", ""},
	"GET /auth/sessions": {200,
		"{sessions[{id createdAt lastUsedAt ip userAgent current}]}", "", ""},
	"DELETE /auth/sessions/{id}": {200, "{message}", "Session revoked", "own"},
	"DELETE /auth/sessions":      {200, "{message}", "All sessions revoked", "cleared"},
	"PUT /auth/password":         {200, "{message}", "Password changed", ""},
	"DELETE /auth/me":            {200, "{message}", "Account deleted", "cleared"},
	"GET /healthz":               {200, "{status}", "", ""},
	"GET /readyz":                {200, "{status postgres redis}", "", ""},
}

// errorStatus is the contract's table of errors.
var errorStatus = map[string]int{
	"invalid_json":           400,
	"validation_failed":      400,
	"email_exists":           400,
	"invalid_credentials":    401,
	"missing_token":          401,
	"token_expired":          401,
	"invalid_token":          401,
	"session_revoked":        401,
	"refresh_reused":         401,
	"cross_origin":           403,
	"not_found":              404,
	"user_not_found":         404,
	"session_not_found":      404,
	"method_not_allowed":     405,
	"body_too_large":         413,
	"unsupported_media_type": 415,
	"rate_limited":           429,
	"too_many_attempts":      429,
	"internal":               500,
	"unavailable":            503,
	"overloaded":             503,
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
func (a *answer) String() string { return a.asked.method + " " + a.asked.path }

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

// want ends the test unless the answer has this status.
func (a *answer) want(status int) *answer {
	a.server.Helper()
	if a.status() != status {
		a.server.Fatalf("%s: got %d %s, want %d", a, a.status(), a.body, status)
	}
	return a
}

// ok ends the test unless the answer is a success, whose form send has checked.
func (a *answer) ok() *answer {
	a.server.Helper()
	if a.status()/100 != 2 {
		a.server.Fatalf("%s: got %d %s, want a success", a, a.status(), a.body)
	}
	return a
}

// refused ends the test unless the answer is this error.
func (a *answer) refused(code string) *answer {
	a.server.Helper()
	if a.status() != errorStatus[code] || a.code() != code {
		a.server.Fatalf("%s: got %d %s, want %s", a, a.status(), a.body, code)
	}
	return a
}

// shouldBe is refused, or ok for an empty code, for tables of many: the test goes on.
func (a *answer) shouldBe(code, what string) *answer {
	a.server.Helper()
	if a.code() != code || code == "" && a.status()/100 != 2 {
		a.server.Errorf("%s, %.100q: got %d %s, want %q", a, what, a.status(), a.body, code)
	}
	return a
}

// names asserts that an error's details are about these fields.
func (a *answer) names(fields ...string) *answer {
	a.server.Helper()
	details, _ := a.json["details"].(map[string]any)
	for _, field := range fields {
		if text, _ := details[field].(string); text == "" {
			a.server.Errorf("%s: no details of %s: %s", a, field, a.body)
		}
	}
	if len(details) != len(fields) {
		a.server.Errorf("%s: details of more than %q: %s", a, fields, a.body)
	}
	return a
}

// str is a text of the body, by its path.
func (a *answer) str(path ...string) string {
	a.server.Helper()
	value := any(a.json)
	for _, name := range path {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	text, ok := value.(string)
	if !ok {
		a.server.Errorf("%s: %s has no text at %q", a, a.body, path)
	}
	return text
}

// number is the value of a header.
func (a *answer) number(header string) int {
	a.server.Helper()
	n, err := strconv.Atoi(a.Header.Get(header))
	if err != nil {
		a.server.Errorf("%s: header %s: %v", a, header, err)
	}
	return n
}

var rateLimitForm = regexp.MustCompile(`^"ip";r=(\d+);t=(\d+)$`)

// remaining is how many requests the RateLimit header leaves; -1 where there is none.
func (a *answer) remaining() int {
	match := rateLimitForm.FindStringSubmatch(a.Header.Get("RateLimit"))
	if match == nil {
		return -1
	}
	n, _ := strconv.Atoi(match[1])
	return n
}

// reset is how many seconds the RateLimit header gives the window.
func (a *answer) reset() int {
	match := rateLimitForm.FindStringSubmatch(a.Header.Get("RateLimit"))
	if match == nil {
		return -1
	}
	n, _ := strconv.Atoi(match[2])
	return n
}

// refreshCookie is the one cookie that the answer sets.
func (a *answer) refreshCookie() *http.Cookie {
	a.server.Helper()
	cookies := a.Cookies()
	if len(cookies) != 1 || cookies[0].Name != "refreshToken" {
		a.server.Fatalf("%s: %d with Set-Cookie %q, want one refreshToken",
			a, a.status(), a.Header.Values("Set-Cookie"))
	}
	return cookies[0]
}

func (a *answer) setsCookie() bool { return len(a.Header.Values("Set-Cookie")) > 0 }

func (a *answer) clearsCookie() *answer {
	a.server.Helper()
	if c := a.refreshCookie(); c.Value != "" || c.MaxAge >= 0 {
		a.server.Errorf("%s: the cookie is not cleared: %q", a, c.Raw)
	}
	return a
}

func (a *answer) keepsCookie() *answer {
	a.server.Helper()
	if a.setsCookie() {
		a.server.Errorf("%s: %d has a cookie header: %q",
			a, a.status(), a.Header.Values("Set-Cookie"))
	}
	return a
}

var (
	uuidForm = regexp.MustCompile(`(?i)^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	codeForm = regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
)

// isTime asserts the contract's "times are RFC 3339 in UTC".
func (s *server) isTime(text string) time.Time {
	s.Helper()
	at, err := time.Parse(time.RFC3339, text)
	if err != nil || !strings.HasSuffix(text, "Z") {
		s.Errorf("the time %q is not RFC 3339 in UTC", text)
	}
	return at
}

// isNow allows for minutes, since the server's clock may be another machine's.
func (s *server) isNow(text string) {
	s.Helper()
	if d := time.Since(s.isTime(text)).Abs(); d > 2*time.Minute {
		s.Errorf("the time %s is %v from now", text, d)
	}
}

// shape lists an object's members in their order, and those of the objects in it, as in
// {message user{id email}}.
func shape(body []byte) string { return shapeOf(json.NewDecoder(bytes.NewReader(body))) }

func shapeOf(d *json.Decoder) string {
	token, err := d.Token()
	if err != nil {
		return err.Error()
	}
	var parts []string
	switch token {
	case json.Delim('{'):
		for d.More() {
			name, err := d.Token()
			if err != nil {
				return err.Error()
			}
			parts = append(parts, fmt.Sprint(name)+shapeOf(d))
		}
		d.Token()
		return "{" + strings.Join(parts, " ") + "}"
	case json.Delim('['):
		for d.More() {
			if part := shapeOf(d); !slices.Contains(parts, part) {
				parts = append(parts, part)
			}
		}
		d.Token()
		return "[" + strings.Join(parts, " ") + "]"
	}
	return ""
}

// assertInvariants holds an answer to what the contract says of all answers, and of all successes
// of its route.
func (a *answer) assertInvariants(req *http.Request) {
	s := a.server
	s.Helper()
	fault := func(format string, args ...any) {
		s.Helper()
		s.Errorf("%s: %d: %s", a, a.StatusCode, fmt.Sprintf(format, args...))
	}
	if id := a.Header.Get("X-Request-Id"); !uuidForm.MatchString(id) {
		fault("X-Request-Id is %q", id)
	}
	if !slices.Contains(a.Header.Values("Vary"), "Origin") {
		fault("Vary is %q, want Origin always", a.Header.Values("Vary"))
	}
	if req.URL.Path == "/auth" || strings.HasPrefix(req.URL.Path, "/auth/") {
		if a.Header.Get("Cache-Control") != "no-store" ||
			a.Header.Get("X-Content-Type-Options") != "nosniff" {
			fault("all /auth answers are no-store and nosniff: %v", a.Header)
		}
	}
	hasBody := !a.isPreflight(req) && req.Method != http.MethodHead
	if hasBody && a.Header.Get("Content-Type") != "application/json; charset=utf-8" {
		fault("Content-Type is %q", a.Header.Get("Content-Type"))
	}
	if hasBody && a.StatusCode < 400 {
		a.assertSuccess(fault)
	}
	if hasBody && a.StatusCode >= 400 && req.URL.Path != "/readyz" {
		a.assertError(fault)
	}
	challenge := a.Header.Get("WWW-Authenticate")
	if (a.StatusCode == 401) != (challenge == "Bearer" || strings.HasPrefix(challenge, "Bearer ")) {
		fault("WWW-Authenticate is %q", challenge)
	}
	a.assertRateLimit(req, fault)
	a.assertCORS(req, fault)
}

func (a *answer) isPreflight(req *http.Request) bool {
	return req.Method == http.MethodOptions && req.Header.Get("Origin") != "" &&
		req.Header.Get("Access-Control-Request-Method") != ""
}

func (a *answer) assertSuccess(fault func(string, ...any)) {
	a.server.Helper()
	route := a.String()
	if strings.HasPrefix(route, "DELETE /auth/sessions/") {
		route = "DELETE /auth/sessions/{id}"
	}
	route, _, _ = strings.Cut(route, "?")
	want, known := routes[route]
	message, _ := a.json["message"].(string)
	if !known || a.StatusCode != want.status || message != want.message {
		fault("message %q, want %d %q", message, want.status, want.message)
	}
	if got := shape(a.body); got != want.body && got != "{sessions[]}" {
		fault("the members are %s, want %s", got, want.body)
	}
	if a.setsCookie() != (want.cookie != "") && want.cookie != "own" {
		fault("Set-Cookie is %q, want it %q", a.Header.Values("Set-Cookie"), want.cookie)
	}
	if a.setsCookie() {
		a.assertCookie(want.cookie == "set", fault)
	}
}

// assertCookie is the contract's line of the cookie.
func (a *answer) assertCookie(set bool, fault func(string, ...any)) {
	a.server.Helper()
	sameSite := map[string]http.SameSite{
		"strict": http.SameSiteStrictMode,
		"lax":    http.SameSiteLaxMode,
		"none":   http.SameSiteNoneMode,
	}
	cookies := a.Cookies()
	if len(cookies) != 1 {
		fault("%d cookies: %q", len(cookies), a.Header.Values("Set-Cookie"))
		return
	}
	c := cookies[0]
	if c.Name != "refreshToken" || c.Path != "/auth" || c.Domain != "" || !c.HttpOnly ||
		c.Secure != (a.server.conf("NODE_ENV") != "development") ||
		c.SameSite != sameSite[a.server.conf("COOKIE_SAMESITE")] {
		fault("Set-Cookie is %q", c.Raw)
	}
	if set != (c.Value != "") || !set && c.MaxAge >= 0 {
		fault("Set-Cookie is %q, want a token: %v", c.Raw, set)
	}
	if set {
		claims := a.server.claims(c.Value)
		if life := claims.number("exp") - claims.number("iat"); int64(c.MaxAge) != life {
			fault("Max-Age is %d, but the token lives %d s", c.MaxAge, life)
		}
	}
}

func (a *answer) assertError(fault func(string, ...any)) {
	a.server.Helper()
	want := "{error statusCode requestId timestamp code}"
	got := shape(a.body)
	if a.code() == "validation_failed" {
		want = "{error statusCode requestId timestamp code details{"
		got = got[:min(len(got), len(want))]
	}
	if got != want {
		fault("the members are %s, want %s", got, want)
	}
	if !codeForm.MatchString(a.code()) || errorStatus[a.code()] != a.StatusCode ||
		a.json["statusCode"] != float64(a.StatusCode) || a.json["error"] == "" ||
		a.json["requestId"] != a.Header.Get("X-Request-Id") {
		fault("X-Request-Id %s, body %s", a.Header.Get("X-Request-Id"), a.body)
	}
	a.server.isNow(a.str("timestamp"))
	if (a.StatusCode == 429 || a.StatusCode == 503) && a.number("Retry-After") < 1 {
		fault("Retry-After is %q", a.Header.Get("Retry-After"))
	}
	clears := a.StatusCode == 401 && (a.String() == "POST /auth/refresh" || a.String() == "POST /auth/logout")
	if a.code() != "refresh_reused" && a.setsCookie() != clears {
		fault("Set-Cookie is %q", a.Header.Values("Set-Cookie"))
	}
	if a.setsCookie() {
		a.assertCookie(false, fault)
	}
}

func (a *answer) assertRateLimit(req *http.Request, fault func(string, ...any)) {
	a.server.Helper()
	header := a.Header.Get("RateLimit")
	exempt := req.URL.Path == "/healthz" || req.URL.Path == "/readyz" || a.isPreflight(req) ||
		a.server.conf("RATE_LIMIT_MAX") == "0"
	if exempt && (header != "" || a.Header.Get("RateLimit-Policy") != "") {
		fault("not limited, but RateLimit is %q", header)
	}
	if exempt || a.StatusCode >= 500 { // Where Redis could not decide, there is nothing to say.
		return
	}
	policy := fmt.Sprintf(`"ip";q=%s;w=%s`,
		a.server.conf("RATE_LIMIT_MAX"), a.server.conf("RATE_LIMIT_WINDOW"))
	if a.Header.Get("RateLimit-Policy") != policy || !rateLimitForm.MatchString(header) {
		fault("RateLimit-Policy %q, want %q; RateLimit %q",
			a.Header.Get("RateLimit-Policy"), policy, header)
	}
}

// origins are the server's frontends.
func (s *server) origins() (origins []string) {
	for origin := range strings.SplitSeq(s.conf("FRONTEND_URL"), ",") {
		origins = append(origins, strings.TrimSuffix(strings.TrimSpace(origin), "/"))
	}
	return origins
}

// assertCORS is "exact match, with credentials; other origins, null among them, get no CORS header".
func (a *answer) assertCORS(req *http.Request, fault func(string, ...any)) {
	a.server.Helper()
	origin := req.Header.Get("Origin")
	if slices.Contains(a.server.origins(), origin) {
		if a.Header.Get("Access-Control-Allow-Origin") != origin ||
			a.Header.Get("Access-Control-Allow-Credentials") != "true" {
			fault("the origin %q gets %v", origin, a.Header)
		}
		return
	}
	for name := range a.Header {
		if strings.HasPrefix(name, "Access-Control-") {
			fault("the origin %q gets %s", origin, name)
		}
	}
}
