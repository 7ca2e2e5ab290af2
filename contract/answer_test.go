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

// success is what a route answers where all is well.
type success struct {
	status  int
	members string // in their order
	message string
	cookie  string // it is set, cleared, cleared where the caller's own session ends, or left alone
}

// routes is the contract's table of routes.
var routes = map[string]success{
	"POST /auth/signup": {201, "{message user{id email createdAt} accessToken}",
		"User created successfully", "set"},
	"POST /auth/login": {200, "{message user{id email} accessToken}",
		"Login successful", "set"},
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

// isHealth reports whether a route or a path is exempt from the rate limit.
func isHealth(route string) bool {
	path := strings.TrimPrefix(route, "GET ")
	return path == "/healthz" || path == "/readyz"
}

// errorCodes is the contract's table of errors.
var errorCodes = map[int]string{
	400: "invalid_json validation_failed email_exists",
	401: "invalid_credentials missing_token token_expired invalid_token session_revoked " +
		"refresh_reused",
	403: "cross_origin",
	404: "not_found user_not_found session_not_found",
	405: "method_not_allowed",
	413: "body_too_large",
	415: "unsupported_media_type",
	429: "rate_limited too_many_attempts",
	500: "internal",
	503: "unavailable overloaded",
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

// want ends the test unless the answer has this status.
func (a *answer) want(status int) *answer {
	if a.status() != status {
		a.server.Fatalf("%s: got %d %s, want %d", a, a.status(), a.body, status)
	}
	return a
}

// ok ends the test unless the answer is a success, whose form send has checked.
func (a *answer) ok() *answer {
	if a.status()/100 != 2 {
		a.server.Fatalf("%s: got %d %s, want a success", a, a.status(), a.body)
	}
	return a
}

// refused ends the test unless the answer is this error, whose form send has checked.
func (a *answer) refused(code string) *answer {
	if a.code() != code {
		a.server.Fatalf("%s: got %d %s, want %s", a, a.status(), a.body, code)
	}
	return a
}

// shouldBe is refused, or ok for an empty code, in a table of many: the test goes on.
func (a *answer) shouldBe(code, what string) *answer {
	if a.code() != code || code == "" && a.status()/100 != 2 {
		a.server.Errorf("%s, %.100q: got %d %s, want %q", a, what, a.status(), a.body, code)
	}
	return a
}

// names asserts that the details of a validation error are about these fields.
func (a *answer) names(fields ...string) *answer {
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
	n, err := strconv.Atoi(a.Header.Get(header))
	if err != nil {
		a.server.Errorf("%s: header %s: %v", a, header, err)
	}
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
	if c := a.refreshCookie(); c.Value != "" || c.MaxAge >= 0 {
		a.server.Errorf("%s: the cookie is not cleared: %q", a, c.Raw)
	}
	return a
}

func (a *answer) keepsCookie() *answer {
	if a.setsCookie() {
		a.server.Errorf("%s: %d sets %q", a, a.status(), a.Header.Values("Set-Cookie"))
	}
	return a
}

var uuidForm = regexp.MustCompile(`(?i)^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// isTime asserts the contract's "times are RFC 3339 in UTC".
func (s *server) isTime(text string) time.Time {
	at, err := time.Parse(time.RFC3339, text)
	if err != nil || !strings.HasSuffix(text, "Z") {
		s.Errorf("the time %q is not RFC 3339 in UTC", text)
	}
	return at
}

// isNow allows for minutes, since the server's clock may be another machine's.
func (s *server) isNow(text string) {
	if d := time.Since(s.isTime(text)).Abs(); d > 2*time.Minute {
		s.Errorf("the time %s is %v from now", text, d)
	}
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

// A fault reports what is wrong with an answer.
type fault func(format string, args ...any)

// assertInvariants holds an answer to what the contract says of all answers.
func (a *answer) assertInvariants(req *http.Request) {
	wrong := func(format string, args ...any) {
		a.server.Errorf("%s: %d: %s", a, a.StatusCode, fmt.Sprintf(format, args...))
	}
	if id := a.Header.Get("X-Request-Id"); !uuidForm.MatchString(id) {
		wrong("X-Request-Id is %q", id)
	}
	if !slices.Contains(a.Header.Values("Vary"), "Origin") {
		wrong("Vary is %q, want Origin always", a.Header.Values("Vary"))
	}
	safe := a.Header.Get("Cache-Control") == "no-store" &&
		a.Header.Get("X-Content-Type-Options") == "nosniff"
	if strings.HasPrefix(req.URL.Path+"/", "/auth/") && !safe {
		wrong("all /auth answers are no-store and nosniff: %v", a.Header)
	}
	preflight := req.Method == "OPTIONS" && req.Header.Get("Origin") != "" &&
		req.Header.Get("Access-Control-Request-Method") != ""
	if !preflight && req.Method != "HEAD" {
		if a.Header.Get("Content-Type") != "application/json; charset=utf-8" {
			wrong("Content-Type is %q", a.Header.Get("Content-Type"))
		}
		if a.StatusCode < 400 {
			a.assertSuccess(req, wrong)
		} else if req.URL.Path != "/readyz" {
			a.assertError(wrong)
		}
	}
	a.assertChallenge(wrong)
	a.assertRateLimit(preflight || isHealth(req.URL.Path), wrong)
	a.assertCORS(req.Header.Get("Origin"), wrong)
}

func (a *answer) assertSuccess(req *http.Request, wrong fault) {
	route := req.Method + " " + req.URL.Path
	if strings.HasPrefix(route, "DELETE /auth/sessions/") {
		route = "DELETE /auth/sessions/{id}"
	}
	want := routes[route]
	message, _ := a.json["message"].(string)
	if a.StatusCode != want.status || message != want.message {
		wrong("message %q, want %d %q", message, want.status, want.message)
	}
	members := shape(json.NewDecoder(bytes.NewReader(a.body)))
	if members != want.members && members != "{sessions[]}" {
		wrong("the members are %s, want %s", members, want.members)
	}
	if a.setsCookie() != (want.cookie != "") && want.cookie != "own" {
		wrong("Set-Cookie is %q, want it %q", a.Header.Values("Set-Cookie"), want.cookie)
	}
	if a.setsCookie() {
		a.assertCookie(want.cookie == "set", wrong)
	}
}

var sameSites = map[string]http.SameSite{
	"strict": http.SameSiteStrictMode,
	"lax":    http.SameSiteLaxMode,
	"none":   http.SameSiteNoneMode,
}

// assertCookie is the contract's line on the cookie, which is set or cleared.
func (a *answer) assertCookie(set bool, wrong fault) {
	cookies := a.Cookies()
	if len(cookies) != 1 {
		wrong("%d cookies: %q", len(cookies), a.Header.Values("Set-Cookie"))
		return
	}
	c := cookies[0]
	secure := a.server.conf("NODE_ENV") != "development"
	if c.Name != "refreshToken" || c.Path != "/auth" || c.Domain != "" || !c.HttpOnly ||
		c.Secure != secure || c.SameSite != sameSites[a.server.conf("COOKIE_SAMESITE")] ||
		set != (c.Value != "") || !set && c.MaxAge >= 0 {
		wrong("Set-Cookie is %q", c.Raw)
	}
	if set {
		claims := a.server.claims(c.Value)
		if life := claims.number("exp") - claims.number("iat"); int64(c.MaxAge) != life {
			wrong("Max-Age is %d, but the token lives %d s", c.MaxAge, life)
		}
	}
}

func (a *answer) assertError(wrong fault) {
	want := "{error statusCode requestId timestamp code}"
	got := shape(json.NewDecoder(bytes.NewReader(a.body)))
	if a.code() == "validation_failed" {
		want = "{error statusCode requestId timestamp code details{"
		got = got[:min(len(got), len(want))]
	}
	if got != want {
		wrong("the members are %s, want %s", got, want)
	}
	if !slices.Contains(strings.Fields(errorCodes[a.StatusCode]), a.code()) ||
		a.json["statusCode"] != float64(a.StatusCode) || a.json["error"] == "" ||
		a.json["requestId"] != a.Header.Get("X-Request-Id") {
		wrong("X-Request-Id %s, body %s", a.Header.Get("X-Request-Id"), a.body)
	}
	a.server.isNow(a.str("timestamp"))
	if (a.StatusCode == 429 || a.StatusCode == 503) && a.number("Retry-After") < 1 {
		wrong("Retry-After is %q", a.Header.Get("Retry-After"))
	}
	route := a.String()
	clears := a.StatusCode == 401 && (route == "POST /auth/refresh" || route == "POST /auth/logout")
	if a.setsCookie() != clears && a.code() != "refresh_reused" {
		wrong("Set-Cookie is %q", a.Header.Values("Set-Cookie"))
	}
	if a.setsCookie() {
		a.assertCookie(false, wrong)
	}
}

// assertChallenge is "every 401 carries WWW-Authenticate". A logout is refused for its Bearer token
// or for its cookie.
func (a *answer) assertChallenge(wrong fault) {
	got := a.Header.Get("WWW-Authenticate")
	_, shown := strings.CutPrefix(a.asked.header["Authorization"], "Bearer ")
	shown = shown && a.asked.path != "/auth/refresh"
	want := ""
	if a.StatusCode == 401 {
		want = "Bearer"
	}
	code := a.code()
	if shown && (code == "token_expired" || code == "invalid_token" || code == "session_revoked") {
		want = `Bearer error="invalid_token"`
	}
	ofCookie := a.asked.path == "/auth/logout" && a.asked.header["Cookie"] != "" && got == "Bearer"
	if got != want && !ofCookie && a.asked.method != "HEAD" {
		wrong("WWW-Authenticate is %q, want %q", got, want)
	}
}

func (a *answer) assertRateLimit(exempt bool, wrong fault) {
	policy := ""
	if most := a.server.conf("RATE_LIMIT_MAX"); most != "0" && !exempt {
		policy = fmt.Sprintf(`"ip";q=%s;w=%s`, most, a.server.conf("RATE_LIMIT_WINDOW"))
	}
	if a.StatusCode >= 500 {
		return // Redis may not have decided.
	}
	got := a.Header.Get("RateLimit-Policy")
	if got != policy || rateLimitForm.MatchString(a.Header.Get("RateLimit")) != (policy != "") {
		wrong("RateLimit-Policy %q, want %q; RateLimit %q", got, policy, a.Header.Get("RateLimit"))
	}
}

// origins are the server's frontends.
func (s *server) origins() (origins []string) {
	for origin := range strings.SplitSeq(s.conf("FRONTEND_URL"), ",") {
		origins = append(origins, strings.TrimSuffix(strings.TrimSpace(origin), "/"))
	}
	return origins
}

// assertCORS is "exact match, with credentials; other origins, null too, get no CORS header".
func (a *answer) assertCORS(origin string, wrong fault) {
	if slices.Contains(a.server.origins(), origin) {
		if a.Header.Get("Access-Control-Allow-Origin") != origin ||
			a.Header.Get("Access-Control-Allow-Credentials") != "true" {
			wrong("the origin %q gets %v", origin, a.Header)
		}
		return
	}
	for name := range a.Header {
		if strings.HasPrefix(name, "Access-Control-") {
			wrong("the origin %q gets %s", origin, name)
		}
	}
}
