package main

// auth_test.go holds the routes under /auth to the contract, one request after the other. What simultaneous
// requests may do to each other is in store_test.go.

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// ---- tokens, made and read without the server's code

const tokenHeader = `{"alg":"HS256","typ":"JWT"}`

// forge signs a token with one of the server's secrets.
func forge(secret, header, payload string) string {
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(header)) + "." + encode([]byte(payload))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

// payload returns the claims of a token.
func payload(t testing.TB, token string) map[string]any {
	t.Helper()
	_, rest, _ := strings.Cut(token, ".")
	middle, _, _ := strings.Cut(rest, ".")
	data, err := base64.RawURLEncoding.DecodeString(middle)
	var claims map[string]any
	if err == nil {
		err = json.Unmarshal(data, &claims)
	}
	if err != nil {
		t.Fatalf("token %q: %v", token, err)
	}
	return claims
}

// resigned is a token with some claims changed (nil removes one), properly signed again.
func resigned(t testing.TB, secret, token string, changes map[string]any) string {
	t.Helper()
	claims := payload(t, token)
	for name, value := range changes {
		if claims[name] = value; value == nil {
			delete(claims, name)
		}
	}
	encoded, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return forge(testSecrets[secret], tokenHeader, string(encoded))
}

// expired is an access or refresh token whose time has just run out.
func expired(t testing.TB, secret, token string) string {
	return resigned(t, secret, token, map[string]any{"exp": time.Now().Unix()})
}

func sessionOf(t testing.TB, token string) string {
	sid, _ := payload(t, token)["sid"].(string)
	return sid
}

// ---- routes

// members lists the names in an object, and in the objects in it, as {a b{c}}.
func members(value any) string {
	switch value := value.(type) {
	case map[string]any:
		var names []string
		for _, name := range slices.Sorted(maps.Keys(value)) {
			names = append(names, name+members(value[name]))
		}
		return "{" + strings.Join(names, " ") + "}"
	case []any:
		if len(value) > 0 {
			return "[" + members(value[0]) + "]"
		}
	}
	return ""
}

func TestRoutes(t *testing.T) {
	s := start(t, nil)
	c := newClient(s)
	check := func(r response, status int, shape, message string) {
		t.Helper()
		want(t, r, status, "")
		if got := members(map[string]any(r.body)); got != shape || r.text("message") != message {
			t.Errorf("got %s with the message %q, want %s with %q", got, r.text("message"), shape, message)
		}
	}
	isTime := func(value string) {
		t.Helper()
		at, err := time.Parse(time.RFC3339, value)
		if err != nil || at.Location() != time.UTC || time.Since(at).Abs() > time.Minute {
			t.Errorf("%q is not now in UTC", value)
		}
	}

	signup := c.signup()
	check(signup, 201, "{accessToken message user{createdAt email id}}", "User created successfully")
	isTime(signup.text("user", "createdAt"))
	if signup.text("user", "email") != c.email || !uuidPattern.MatchString(signup.text("user", "id")) {
		t.Errorf("another user: %s", signup.raw)
	}
	login := c.login()
	check(login, 200, "{accessToken message user{email id}}", "Login successful")
	if login.text("user", "id") != signup.text("user", "id") {
		t.Errorf("another user: %s", login.raw)
	}
	before := *c
	check(c.refresh(), 200, "{accessToken}", "")
	if c.access == before.access || c.cookie == before.cookie {
		t.Error("refresh gave the same tokens")
	}
	me := c.me()
	check(me, 200, "{user{createdAt email id}}", "")
	if fmt.Sprint(me.body["user"]) != fmt.Sprint(signup.body["user"]) {
		t.Errorf("me says %s, signup said %s", me.raw, signup.raw)
	}
	check(c.do("GET", "/auth/sessions", nil), 200, "{sessions[{createdAt current id ip lastUsedAt userAgent}]}", "")
	other := c.device()
	want(t, other.login(), 200, "")
	check(c.do("DELETE", "/auth/sessions/"+sessionOf(t, other.access), nil), 200, "{message}", "Session revoked")
	change := map[string]any{"currentPassword": c.password, "newPassword": "another " + c.password}
	check(c.do("PUT", "/auth/password", change), 200, "{message}", "Password changed")
	c.password = "another " + c.password
	check(c.do("DELETE", "/auth/sessions", nil), 200, "{message}", "All sessions revoked")
	check(c.login(), 200, "{accessToken message user{email id}}", "Login successful")
	check(c.logout(), 200, "{message}", "Logout successful")
	check(c.login(), 200, "{accessToken message user{email id}}", "Login successful")
	check(c.do("DELETE", "/auth/me", map[string]any{"password": c.password}), 200, "{message}", "Account deleted")
	want(t, c.login(), 401, "invalid_credentials")

	for path, body := range map[string]string{"/healthz": "map[status:ok]", "/readyz": "map[postgres:ok redis:ok status:ok]"} {
		if r := c.do("GET", path, nil); r.status != 200 || fmt.Sprint(r.body) != body {
			t.Errorf("%s: %d %s", path, r.status, r.raw)
		}
	}
}

func TestEveryErrorCode(t *testing.T) {
	s := start(t, map[string]string{"RATE_LIMIT_MAX": "30", "LOGIN_LIMIT_MAX": "1"})
	c := signedUp(s)
	gone := signedUp(s)
	stale := c.tab()
	want(t, c.refresh(), 200, "")
	execSQL(t, s.database, "DELETE FROM users WHERE email = $1", gone.email)
	out := signedUp(s)
	want(t, out.tab().logout(), 200, "")
	locked := newClient(s)
	want(t, locked.login(), 401, "invalid_credentials")
	flood := newClient(s)
	for range 30 {
		flood.me()
	}
	longBody := `{"email":"` + strings.Repeat("a", 102400) + `"}`
	none := c.bearing("").holding("")

	for _, test := range []struct {
		c            *client
		method, path string
		body         any
		status       int
		code         string
		challenge    string
	}{
		{none, "POST", "/auth/login", "{", 400, "invalid_json", ""},
		{none, "POST", "/auth/signup", map[string]any{"email": "", "password": ""}, 400, "validation_failed", ""},
		{none, "POST", "/auth/signup", c.credentials(), 400, "email_exists", ""},
		{none, "POST", "/auth/login", newClient(s).credentials(), 401, "invalid_credentials", "Bearer"},
		{none, "GET", "/auth/me", nil, 401, "missing_token", "Bearer"},
		{none, "POST", "/auth/refresh", nil, 401, "missing_token", "Bearer"},
		{none, "POST", "/auth/logout", nil, 401, "missing_token", "Bearer"},
		{c.bearing(expired(t, "JWT_SECRET", c.access)), "GET", "/auth/me", nil, 401, "token_expired", `Bearer error="invalid_token"`},
		{c.bearing("x"), "GET", "/auth/me", nil, 401, "invalid_token", `Bearer error="invalid_token"`},
		{c.holding(expired(t, "JWT_REFRESH_SECRET", c.cookie)).bearing(""), "POST", "/auth/refresh", nil, 401, "token_expired", "Bearer"},
		{none.holding("x"), "POST", "/auth/refresh", nil, 401, "invalid_token", "Bearer"},
		{none.holding("x"), "POST", "/auth/logout", nil, 401, "invalid_token", "Bearer"},
		{out, "GET", "/auth/me", nil, 401, "session_revoked", `Bearer error="invalid_token"`},
		{out, "POST", "/auth/logout", nil, 401, "session_revoked", `Bearer error="invalid_token"`},
		{stale.bearing(""), "POST", "/auth/refresh", nil, 401, "refresh_reused", "Bearer"},
		{none, "GET", "/auth", nil, 404, "not_found", ""},
		{gone, "GET", "/auth/me", nil, 404, "user_not_found", ""},
		{c, "DELETE", "/auth/sessions/" + sessionOf(t, gone.access), nil, 404, "session_not_found", ""},
		{none, "GET", "/auth/login", nil, 405, "method_not_allowed", ""},
		{none, "POST", "/auth/login", longBody, 413, "body_too_large", ""},
		{none, "POST", "/auth/login", nil, 415, "unsupported_media_type", ""},
		{flood, "GET", "/auth/me", nil, 429, "rate_limited", ""},
		{locked, "POST", "/auth/login", locked.credentials(), 429, "too_many_attempts", ""},
	} {
		t.Run(fmt.Sprintf("%s %s %s", test.code, test.method, test.path), func(t *testing.T) {
			r := test.c.tab().do(test.method, test.path, test.body)
			want(t, r, test.status, test.code)
			if got := r.header.Get("WWW-Authenticate"); got != test.challenge {
				t.Errorf("challenge %q, want %q", got, test.challenge)
			}
		})
	}
	r := none.do("POST", "/auth/logout", nil, "Origin", "https://evil.example")
	want(t, r, 403, "cross_origin")
}

// A fault of the server's own is told to nobody but the log, under the request id.
func TestInternalError(t *testing.T) {
	s := start(t, map[string]string{"DATABASE_URL": newDatabase(t)})
	s.expect("500")
	c := newClient(s)
	execSQL(t, s.database, "ALTER TABLE users RENAME COLUMN password_hash TO something_else")
	id := "01234567-89ab-cdef-0123-456789abcdef"
	r := c.do("POST", "/auth/login", c.credentials(), "X-Request-Id", id)
	want(t, r, 500, "internal")
	if r.text("error") != "Internal server error" || strings.Contains(r.raw, "password_hash") {
		t.Errorf("the cause is told: %s", r.raw)
	}
	line := s.log.await(t, func(line logLine) bool { return line["requestId"] == id && line["status"] == "500" })
	if !strings.Contains(line["error"], "password_hash") {
		t.Errorf("the cause is not in the log: %v", line)
	}
}

// ---- bodies

func TestBody(t *testing.T) {
	s := start(t, map[string]string{"LOGIN_LIMIT_MAX": "0"})
	c := newClient(s)
	login := `{"email":"a@example.test","password":"wrong password"}`
	pad := func(size int) string { return login + strings.Repeat(" ", size-len(login)) }
	field := func(value string) string { return `{"email":"a@example.test","password":` + value + `}` }
	const invalid, judged = "invalid_json", "invalid_credentials" // judged: the body was understood
	status := map[string]int{invalid: 400, judged: 401, "validation_failed": 400, "body_too_large": 413, "unsupported_media_type": 415}

	for _, test := range []struct {
		name string
		body any
		code string
	}{
		{"102,400 bytes", pad(102400), judged},
		{"102,400 bytes, chunked", chunked(pad(102400)), judged},
		{"102,401 bytes", pad(102401), "body_too_large"},
		{"102,401 bytes, chunked", chunked(pad(102401)), "body_too_large"},
		{"102,401 bytes of no JSON", strings.Repeat("x", 102401), "body_too_large"},
		{"102,401 bytes of no JSON, chunked", chunked(strings.Repeat("x", 102401)), "body_too_large"},
		{"empty", "", invalid},
		{"white space", " \n", invalid},
		{"null", "null", invalid},
		{"array", "[" + login + "]", invalid},
		{"string", `"x"`, invalid},
		{"cut off", login[:len(login)-1], invalid},
		{"trailing object", login + login, invalid},
		{"trailing bracket", login + "}", invalid},
		{"trailing comma", `{"email":"a@example.test","password":"x",}`, invalid},
		{"comment", "/**/" + login, invalid},
		{"byte order mark", "\ufeff" + login, invalid},
		{"white space around", " \t\r\n" + login + " \t\r\n", judged},
		{"number", field("12345678"), invalid},
		{"null member", field("null"), invalid},
		{"array member", field(`["x"]`), invalid},
		{"object member", field(`{"x":"y"}`), invalid},
		{"true", field("true"), invalid},
		{"given twice", field(`"x","password":"y"`), invalid},
		{"given twice alike", field(`"x","password":"x"`), invalid},
		{"given twice by escape", field(`"x","p\u0061ssword":"y"`), invalid},
		{"unknown given twice", field(`"x","other":1,"other":2`), invalid},
		{"deep down given twice", field(`"x","other":[{"a":1,"a":2}]`), invalid},
		{"unknown member", field(`"x","other":{"a":[1,2.5e3,null,true,"s"]}`), judged},
		{"escaped name", `{"\u0065mail":"a@example.test","password":"x"}`, judged},
		{"another case", `{"Email":"a@example.test","password":"x"}`, "validation_failed"},
		{"another case beside", field(`"x","Password":5`), judged},
		{"invalid UTF-8", field("\"\xff\xfe\""), invalid},
		{"invalid UTF-8 in an unknown member", field("\"x\",\"other\":\"\xc3\""), invalid},
		{"overlong UTF-8", field("\"\xc0\xaf\""), invalid},
		{"lone high surrogate", field(`"\ud83d"`), invalid},
		{"lone low surrogate", field(`"\ude00"`), invalid},
		{"surrogates in the wrong order", field(`"\ude00\ud83d"`), invalid},
		{"lone surrogate in an unknown member", field(`"x","other":"\ud83d"`), invalid},
		{"pair of surrogates", field(`"\ud83d\ude00"`), judged},
		{"control character", field("\"a\nb\""), invalid},
		{"single quotes", `{'email':'a@example.test','password':'x'}`, invalid},
		{"missing member", `{"email":"a@example.test"}`, "validation_failed"},
		{"empty member", field(`""`), "validation_failed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			want(t, c.do("POST", "/auth/login", test.body), status[test.code], test.code)
		})
	}
	for mediaType, code := range map[string]string{
		"application/json": judged, "application/json; charset=utf-8": judged, "Application/JSON": judged,
		"": "unsupported_media_type", "text/plain": "unsupported_media_type", "application/json-patch+json": "unsupported_media_type",
		"application/x-www-form-urlencoded": "unsupported_media_type", "application/jsonx": "unsupported_media_type",
	} {
		t.Run("type "+mediaType, func(t *testing.T) {
			want(t, c.do("POST", "/auth/login", login, "Content-Type", mediaType), status[code], code)
		})
	}
	t.Run("no body", func(t *testing.T) {
		want(t, c.do("POST", "/auth/login", nil), 415, "unsupported_media_type")
		want(t, c.do("POST", "/auth/login", nil, "Content-Type", "application/json"), 400, "invalid_json")
	})
	t.Run("refresh and logout ask for none", func(t *testing.T) {
		u := signedUp(s)
		want(t, u.do("POST", "/auth/refresh", "{", "Content-Type", "text/plain"), 200, "")
		want(t, u.do("POST", "/auth/logout", "no JSON", "Content-Type", "text/plain"), 200, "")
	})
	t.Run("details name each field", func(t *testing.T) {
		for _, test := range []struct {
			route, body string
			fields      string
		}{
			{"/auth/signup", `{}`, "{email password}"},
			{"/auth/signup", `{"email":"a@example.test"}`, "{password}"},
			{"/auth/signup", `{"email":"a","password":"long enough"}`, "{email}"},
			{"/auth/login", `{}`, "{email password}"},
			{"/auth/login", `{"password":"x"}`, "{email}"},
		} {
			r := c.do("POST", test.route, test.body)
			want(t, r, 400, "validation_failed")
			if got := members(r.body["details"]); got != test.fields {
				t.Errorf("%s %s: details for %s, want %s", test.route, test.body, got, test.fields)
			}
		}
	})
}

// A body that is declared too long is refused although not a byte of it is ever sent.
func TestDeclaredTooLongIsRefusedUnread(t *testing.T) {
	s := start(t, nil)
	conn := dial(t, s)
	fmt.Fprintf(conn, "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 102401\r\n\r\n")
	resp := readResponse(t, conn)
	if resp.StatusCode != 413 {
		t.Errorf("got %s", resp.Status)
	}
}

// Each request breaks several rules: the first of the contract's order decides.
func TestOrderOfChecks(t *testing.T) {
	s := start(t, map[string]string{"RATE_LIMIT_MAX": "2", "LOGIN_LIMIT_MAX": "1"})
	locked := newClient(s)
	want(t, locked.login(), 401, "invalid_credentials")
	longBody := strings.Repeat("x", 102401)
	for _, test := range []struct {
		name         string
		method, path string
		body         any
		headers      []string
		status       int
		code         string
	}{
		{"404 before 403 and 401", "POST", "/auth/nothing", longBody, []string{"Origin", "https://evil.example"}, 404, "not_found"},
		{"405 before 403 and 401", "POST", "/auth/me", longBody, []string{"Origin", "https://evil.example"}, 405, "method_not_allowed"},
		{"403 before 401", "DELETE", "/auth/me", longBody, []string{"Origin", "https://evil.example", "Content-Type", "text/plain"}, 403, "cross_origin"},
		{"401 before 413", "DELETE", "/auth/me", longBody, []string{"Content-Type", "text/plain"}, 401, "missing_token"},
		{"declared 413 before 415", "POST", "/auth/login", longBody, []string{"Content-Type", "text/plain"}, 413, "body_too_large"},
		{"415 before read 413", "POST", "/auth/login", chunked(longBody), []string{"Content-Type", "text/plain"}, 415, "unsupported_media_type"},
		{"read 413 before 400", "POST", "/auth/login", chunked(longBody), nil, 413, "body_too_large"},
		{"400 before too_many_attempts", "POST", "/auth/login", `{"email":"` + locked.email + `"}`, nil, 400, "validation_failed"},
		{"too_many_attempts", "POST", "/auth/login", locked.credentials(), nil, 429, "too_many_attempts"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newClient(s)
			if test.status != 429 {
				c.do("GET", "/auth/nothing", nil)
			} else {
				c = locked
			}
			want(t, c.do(test.method, test.path, test.body, test.headers...), test.status, test.code)
			if r := c.do(test.method, test.path, test.body, test.headers...); r.code() != "rate_limited" {
				t.Errorf("rate_limited comes before all: got %d %s", r.status, r.code())
			}
		})
	}
}

// ---- emails and passwords

func TestPasswords(t *testing.T) {
	s := start(t, map[string]string{"LOGIN_LIMIT_MAX": "0"})
	for _, test := range []struct {
		name, password string
		ok             bool
	}{
		{"7 bytes", "aQ3#x9z", false},
		{"8 bytes", "aQ3#x9zk", true},
		{"4 characters of 2 bytes", "éßñü", true},
		{"72 bytes", strings.Repeat("aQ3#x9zk", 9), true},
		{"73 bytes", strings.Repeat("aQ3#x9zk", 9) + "!", false},
		{"25 characters of 3 bytes", strings.Repeat("語", 25), false},
		{"NUL", "aQ3#x9zk\x00", false},
		{"NUL alone", "\x00\x00\x00\x00\x00\x00\x00\x00", false},
		{"spaces around", "  aQ3#x9zk  ", true},
		{"control characters", "aQ3\n#x9z\x01k", true},
		{"common", "trustno1", false},
		{"common, in another case", "TrustNo1", false},
		{"common, with more", "trustno1 and more", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newClient(s)
			c.password = test.password
			r := c.signup()
			if !test.ok {
				want(t, r, 400, "validation_failed")
				if got := members(r.body["details"]); got != "{password}" {
					t.Errorf("details for %s", got)
				}
				want(t, c.login(), 401, "invalid_credentials")
				return
			}
			want(t, r, 201, "")
			want(t, c.login(), 200, "")
			for _, other := range []string{test.password + "\x00", test.password + "\x00" + test.password, test.password + "!", test.password[:len(test.password)-1],
				strings.TrimSpace(test.password) + " ", strings.ToUpper(test.password)} {
				wrong := c.device()
				if wrong.password = other; other != "" && other != test.password {
					want(t, wrong.login(), 401, "invalid_credentials")
				}
			}
		})
	}
}

func TestEmails(t *testing.T) {
	s := start(t, map[string]string{"LOGIN_LIMIT_MAX": "0"})
	unique := strings.ToLower(newClient(s).email)
	local, _, _ := strings.Cut(unique, "@")
	of := func(length int) string { // a valid address of that many bytes
		label := strings.Repeat("d", 60)
		domain := label + "." + label + "." + label + ".test"
		return local + "@" + strings.Repeat("d", length-len(local)-len(domain)-2) + "." + domain
	}
	for _, test := range []struct {
		name, email string
		stored      string // "" is a refusal
	}{
		{"plain", "a" + unique, "a" + unique},
		{"upper case", "B" + strings.ToUpper(unique), "b" + unique},
		{"spaces around", " \tc" + unique + "\n", "c" + unique},
		{"plus and dots", "d.d+tag" + unique, "d.d+tag" + unique},
		{"letters beyond ASCII keep their case", "É" + unique, "É" + unique},
		{"Kelvin sign is no k", "\u212a" + unique, "\u212a" + unique},
		{"254 bytes", of(254), of(254)},
		{"255 bytes", of(255), ""},
		{"no @", "example.test", ""},
		{"nothing before the @", "@example.test", ""},
		{"nothing behind the @", local + "@", ""},
		{"two @", local + "@a@example.test", ""},
		{"quoted @", `"a@b"` + unique, ""},
		{"space within", "a b" + unique, ""},
		{"no-break space", "a\u00a0b" + unique, ""},
		{"control character", "a\x01" + unique, ""},
		{"NUL", "a\x00" + unique, ""},
		{"line break", "a\r\nBcc: x" + unique, ""},
		{"display name", "Me <" + unique + ">", ""},
		{"angle brackets", "<" + unique + ">", ""},
		{"two addresses", unique + ",x" + unique, ""},
		{"comment", unique + " (me)", ""},
		{"zero-width space", "a\u200b" + unique, ""},
		{"white space only", " ", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newClient(s)
			c.email = test.email
			r := c.signup()
			if test.stored == "" {
				want(t, r, 400, "validation_failed")
				if got := members(r.body["details"]); got != "{email}" {
					t.Errorf("details for %s", got)
				}
				if strings.TrimSpace(test.email) != "" {
					want(t, c.login(), 401, "invalid_credentials")
				}
				return
			}
			want(t, r, 201, "")
			if got := r.text("user", "email"); got != test.stored {
				t.Errorf("kept as %q, want %q", got, test.stored)
			}
			for _, spelling := range []string{test.stored, " " + test.stored + " ", asciiUpper(test.stored)} {
				d := c.device()
				d.email = spelling
				want(t, d.login(), 200, "")
				want(t, d.signup(), 400, "email_exists")
			}
		})
	}
}

func asciiUpper(s string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' {
			r -= 'a' - 'A'
		}
		return r
	}, s)
}

// Neither the body nor the time of a refused login says whether the account exists.
func TestLoginTellsNothing(t *testing.T) {
	s := start(t, map[string]string{"LOGIN_LIMIT_MAX": "0"})
	c := signedUp(s)
	guesses := map[string][2]string{
		"wrong password":                    {c.email, "wrong password"},
		"unknown email":                     {"x" + c.email, c.password},
		"no email at all":                   {"nobody", c.password},
		"NUL in the email":                  {"a\x00" + c.email, c.password},
		"email too long":                    {strings.Repeat("a", 300) + c.email, c.password},
		"password of 73 bytes":              {c.email, strings.Repeat("a", 73)},
		"NUL behind the right password":     {c.email, c.password + "\x00"},
		"unknown email and a long password": {"x" + c.email, strings.Repeat("a", 73)},
		"short password":                    {c.email, "x"},
	}
	bodies := map[string]string{}
	for name, guess := range guesses {
		d := c.device()
		d.email, d.password = guess[0], guess[1]
		r := d.login()
		want(t, r, 401, "invalid_credentials")
		delete(r.body, "requestId")
		delete(r.body, "timestamp")
		bodies[name] = fmt.Sprint(r.body, r.header.Values("WWW-Authenticate"), r.header.Values("Set-Cookie"))
	}
	for name := range guesses {
		if bodies[name] != bodies["wrong password"] {
			t.Errorf("%s: %s, a wrong password: %s", name, bodies[name], bodies["wrong password"])
		}
	}
}

// Nothing is refused without the work of a hash: with no slot free, none of these can be judged. That the work is the
// same is what BenchmarkRefusal measures.
func TestEveryRefusalHashes(t *testing.T) {
	h, err := newHasher(1, bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	h.slots <- struct{}{}
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp() // it need not wait for a slot
	for name, shown := range map[string][2]string{
		"a wrong password":       {h.dummy, "wrong password"},
		"no account":             {"", "some password"},
		"no bcrypt hash":         {"some text", "some password"},
		"a hash that costs days": {"$2b$31$MeMND/z2k0ryfi5Wj2dMquCHgKc3.odEL4BfBAEltIRyxhHzG/LZ.", "some password"},
		"73 bytes":               {h.dummy, strings.Repeat("a", 73)},
		"NUL":                    {h.dummy, "some\x00password"},
		"nothing":                {h.dummy, ""},
	} {
		var e *apiError
		if ok, err := h.matches(ctx, shown[0], shown[1]); ok || !errors.As(err, &e) || e.code != "overloaded" {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
}

// ---- tokens

func TestTokenContents(t *testing.T) {
	s := start(t, map[string]string{"ACCESS_TOKEN_TTL": "7m", "REFRESH_TOKEN_TTL": "3h"})
	c := newClient(s)
	r := c.signup()
	want(t, r, 201, "")
	for token, ttl := range map[string]float64{c.access: 7 * 60, c.cookie: 3 * 3600} {
		header, _, _ := strings.Cut(token, ".")
		if decoded, _ := base64.RawURLEncoding.DecodeString(header); string(decoded) != tokenHeader {
			t.Errorf("header %s", decoded)
		}
		claims := payload(t, token)
		if got := members(claims); got != "{email exp iat jti sid sub userId}" {
			t.Errorf("claims %s", got)
		}
		if claims["userId"] != r.text("user", "id") || claims["sub"] != claims["userId"] || claims["email"] != c.email {
			t.Errorf("not the user's: %v", claims)
		}
		iat, _ := claims["iat"].(float64)
		exp, _ := claims["exp"].(float64)
		if exp-iat != ttl || time.Since(time.Unix(int64(iat), 0)).Abs() > time.Minute {
			t.Errorf("from %v for %v s, want from now for %v s", iat, exp-iat, ttl)
		}
	}
	if sessionOf(t, c.access) != sessionOf(t, c.cookie) || payload(t, c.access)["jti"] == payload(t, c.cookie)["jti"] {
		t.Error("one session, two tokens")
	}
}

func TestForgedTokens(t *testing.T) {
	s := start(t, nil)
	c := signedUp(s)
	claims := func(token string) string {
		encoded, _ := json.Marshal(payload(t, token))
		return string(encoded)
	}
	encode := base64.RawURLEncoding.EncodeToString
	forgeries := func(secret, other, token string) map[string]string {
		signedPart, signature := token[:strings.LastIndexByte(token, '.')+1], token[strings.LastIndexByte(token, '.')+1:]
		with := func(changes map[string]any) string { return resigned(t, secret, token, changes) }
		raw := func(payload string) string { return forge(testSecrets[secret], tokenHeader, payload) }
		inFuture := time.Now().Add(time.Hour).Unix()
		return map[string]string{
			"alg none":                        encode([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + encode([]byte(claims(token))) + ".",
			"alg none with the signature":     encode([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + encode([]byte(claims(token))) + "." + signature,
			"another algorithm named":         forge(testSecrets[secret], `{"alg":"HS512","typ":"JWT"}`, claims(token)),
			"header in another order":         forge(testSecrets[secret], `{"typ":"JWT","alg":"HS256"}`, claims(token)),
			"header with a space":             forge(testSecrets[secret], `{"alg": "HS256","typ":"JWT"}`, claims(token)),
			"header with kid":                 forge(testSecrets[secret], `{"alg":"HS256","typ":"JWT","kid":"1"}`, claims(token)),
			"signed with another secret":      forge("another secret of 32 characters!", tokenHeader, claims(token)),
			"signed with the empty secret":    forge("", tokenHeader, claims(token)),
			"expired and wrongly signed":      expired(t, other, token),
			"of the other kind":               forge(testSecrets[other], tokenHeader, claims(token)),
			"no signature":                    signedPart,
			"padded":                          token + "=",
			"another last character":          token[:len(token)-1] + nextInBase64(token[len(token)-1]),
			"two parts":                       strings.TrimSuffix(signedPart, "."),
			"four parts":                      token + ".x",
			"no exp":                          with(map[string]any{"exp": nil}),
			"exp as a string":                 with(map[string]any{"exp": fmt.Sprint(inFuture)}),
			"exp with a fraction":             with(map[string]any{"exp": float64(inFuture) + 0.5}),
			"exp null":                        raw(strings.Replace(claims(token), `"exp":`, `"exp":null,"x":`, 1)),
			"exp beyond 64 bits":              raw(strings.Replace(claims(token), `"exp":`, `"exp":99999999999999999999,"x":`, 1)),
			"exp with an exponent":            raw(strings.Replace(claims(token), `"exp":`, `"exp":9e9,"x":`, 1)),
			"nbf in the future":               with(map[string]any{"nbf": inFuture}),
			"nbf as a string":                 with(map[string]any{"nbf": "0"}),
			"no session":                      with(map[string]any{"sid": nil}),
			"sub of someone else":             with(map[string]any{"sub": "someone else"}),
			"userId given twice":              raw(strings.Replace(claims(token), `{`, `{"userId":"x",`, 1)),
			"claims that are no object":       raw(`[]`),
			"above 4 KB":                      with(map[string]any{"x": strings.Repeat("x", 4096)}),
			"claims of no UTF-8":              raw(strings.Replace(claims(token), `{`, "{\"x\":\"\xff\",", 1)),
			"payload with a set trailing bit": trailingBit(t, secret, token),
		}
	}
	for name, token := range forgeries("JWT_SECRET", "JWT_REFRESH_SECRET", c.access) {
		want(t, c.bearing(token).me(), 401, "invalid_token")
		if t.Failed() {
			t.Fatal("access token: " + name)
		}
	}
	for name, token := range forgeries("JWT_REFRESH_SECRET", "JWT_SECRET", c.cookie) {
		r := c.bearing("").holding(token).refresh()
		want(t, r, 401, "invalid_token")
		if !r.cleared() {
			t.Errorf("refresh token: %s: the cookie stays", name)
		}
	}
	want(t, c.bearing(c.cookie).me(), 401, "invalid_token")
	want(t, c.holding(c.access).refresh(), 401, "invalid_token")
	for name, token := range map[string]string{ // and what passes
		"iat in the future": resigned(t, "JWT_SECRET", c.access, map[string]any{"iat": time.Now().Add(time.Hour).Unix()}),
		"nbf in the past":   resigned(t, "JWT_SECRET", c.access, map[string]any{"nbf": 1}),
		"unknown claim":     resigned(t, "JWT_SECRET", c.access, map[string]any{"x": map[string]any{"y": []int{1}}}),
	} {
		if r := c.bearing(token).me(); r.status != 200 {
			t.Errorf("%s: %d %s", name, r.status, r.raw)
		}
	}
	for authorization, status := range map[string]int{
		"bearer " + c.access: 200, "BEARER  " + c.access: 200,
		"Basic " + c.access: 401, "Bearer": 401, "Bearer ": 401, c.access: 401,
	} {
		if r := c.bearing("").do("GET", "/auth/me", nil, "Authorization", authorization); r.status != status {
			t.Errorf("Authorization: %.10s…: %d, want %d", authorization, r.status, status)
		}
	}
	want(t, c.refresh(), 200, "") // and none of all that harmed the session
}

// nextInBase64 returns a character whose low bits differ: where it stands last, they are padding.
func nextInBase64(c byte) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.IndexByte(alphabet, c)^1:][:1]
}

// trailingBit spells the payload in another way that careless decoders take for the same, and signs that.
func trailingBit(t testing.TB, secret, token string) string {
	t.Helper()
	claims := payload(t, token)
	for pad := ""; ; pad += "x" {
		claims["x"] = pad
		data, _ := json.Marshal(claims)
		if len(data)%3 == 0 {
			continue // no padding bits
		}
		encoded := base64.RawURLEncoding.EncodeToString(data)
		signed := base64.RawURLEncoding.EncodeToString([]byte(tokenHeader)) + "." + encoded[:len(encoded)-1] + nextInBase64(encoded[len(encoded)-1])
		mac := hmac.New(sha256.New, []byte(testSecrets[secret]))
		mac.Write([]byte(signed))
		return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
}

func TestCookieAttributes(t *testing.T) {
	for _, test := range []struct {
		env  map[string]string
		want string
	}{
		{nil, "Path=/auth; Max-Age=604800; HttpOnly; SameSite=Strict"},
		{map[string]string{"COOKIE_SAMESITE": "lax", "REFRESH_TOKEN_TTL": "1h"}, "Path=/auth; Max-Age=3600; HttpOnly; SameSite=Lax"},
	} {
		c := signedUp(start(t, test.env))
		check := func(r response, value, attributes string) {
			t.Helper()
			if got := r.header.Get("Set-Cookie"); got != "refreshToken="+value+"; "+attributes {
				t.Errorf("%v: got %q, want the value %q and %q", test.env, got, value, attributes)
			}
		}
		check(c.refresh(), c.cookie, test.want)
		check(c.logout(), "", regexp.MustCompile("Max-Age=[0-9]+").ReplaceAllString(test.want, "Max-Age=0"))
	}
}

func TestSecretRotation(t *testing.T) {
	secret := func() string { return rand.Text() + rand.Text() }
	a, b := [2]string{secret(), secret()}, [2]string{secret(), secret()}
	env := func(current, previous [2]string) map[string]string {
		return map[string]string{"JWT_SECRET": current[0], "JWT_REFRESH_SECRET": current[1],
			"JWT_SECRET_PREVIOUS": previous[0], "JWT_REFRESH_SECRET_PREVIOUS": previous[1]}
	}
	first := start(t, env(a, [2]string{}))
	second := start(t, env(b, a))
	third := start(t, env([2]string{secret(), secret()}, b))

	c := signedUp(first)
	old := c.tab()
	c.s = second
	want(t, c.me(), 200, "")
	want(t, c.refresh(), 200, "")
	want(t, c.me(), 200, "")
	want(t, old.at(second).me(), 200, "") // until it expires
	want(t, c.at(first).me(), 401, "invalid_token")
	want(t, c.at(first).refresh(), 401, "invalid_token") // the new secret signs
	want(t, c.at(third).me(), 200, "")
	want(t, old.at(third).me(), 401, "invalid_token")
	want(t, old.at(third).refresh(), 401, "invalid_token")
	want(t, c.at(third).refresh(), 200, "")
	want(t, old.at(second).logout(), 200, "")
	want(t, c.at(third).me(), 401, "session_revoked")

	// A previous secret makes neither kind of token pass for the other.
	d := signedUp(first)
	want(t, d.at(second).bearing(d.cookie).me(), 401, "invalid_token")
	want(t, d.at(second).holding(d.access).refresh(), 401, "invalid_token")
}

// ---- refresh

func TestRefreshReuse(t *testing.T) {
	s := start(t, nil)
	brief := start(t, map[string]string{"REFRESH_REUSE_LEEWAY": "50ms"})
	rdb := redisClient(t)
	raced := func(t *testing.T, r response) {
		t.Helper()
		want(t, r, 401, "refresh_reused")
		if r.header["Set-Cookie"] != nil {
			t.Errorf("two tabs raced, and the loser is told %q", r.header["Set-Cookie"])
		}
	}
	dead := func(t *testing.T, c *client) {
		t.Helper()
		want(t, c.bearing(c.access).me(), 401, "session_revoked")
		if r := c.tab().refresh(); r.status != 401 || !r.cleared() {
			t.Errorf("the session goes on: %d %s", r.status, r.raw)
		}
	}
	forget := func(c *client) { // Redis evicts the blacklist entry of the client's refresh token
		claims := payload(t, c.cookie)
		key := fmt.Sprintf("blacklist:{%s}:%s", claims["sid"], claims["jti"])
		if n, err := rdb.Del(t.Context(), key).Result(); n != 1 || err != nil {
			t.Fatalf("%s was not there: %v", key, err)
		}
	}

	t.Run("within the leeway", func(t *testing.T) {
		c := signedUp(s)
		first := c.tab()
		want(t, c.refresh(), 200, "")
		second := c.tab()
		want(t, c.refresh(), 200, "")
		raced(t, second.refresh())
		raced(t, first.refresh()) // an older one, too
		want(t, first.me(), 200, "")
		want(t, c.refresh(), 200, "")
	})
	t.Run("after the leeway", func(t *testing.T) {
		c := signedUp(brief)
		stolen := c.tab()
		want(t, c.refresh(), 200, "")
		eventually(t, "theft is noticed", func() bool {
			r := stolen.tab().refresh()
			want(t, r, 401, "refresh_reused")
			return r.cleared()
		})
		dead(t, c)
		want(t, stolen.bearing(c.access).me(), 401, "session_revoked")
		want(t, c.login(), 200, "")
	})
	t.Run("blacklist entry evicted within the leeway", func(t *testing.T) {
		c := signedUp(s)
		old := c.tab()
		want(t, c.refresh(), 200, "")
		forget(old)
		raced(t, old.refresh())
		want(t, c.refresh(), 200, "")
	})
	t.Run("blacklist entry of an older token evicted", func(t *testing.T) {
		c := signedUp(s)
		old := c.tab()
		want(t, c.refresh(), 200, "")
		want(t, c.refresh(), 200, "")
		forget(old)
		r := old.tab().refresh()
		want(t, r, 401, "refresh_reused")
		if !r.cleared() {
			t.Error("the cookie stays")
		}
		dead(t, c)
	})
	t.Run("session lost", func(t *testing.T) {
		c := signedUp(s)
		old := c.tab()
		want(t, c.refresh(), 200, "")
		rdb.Del(t.Context(), "session:{"+sessionOf(t, c.access)+"}")
		r := c.tab().refresh()
		want(t, r, 401, "session_revoked")
		if !r.cleared() {
			t.Error("the cookie stays")
		}
		dead(t, c)
		if r := old.refresh(); r.status != 401 {
			t.Errorf("an exchanged token came back to life: %d", r.status)
		}
	})
	t.Run("an access token from before", func(t *testing.T) {
		c := signedUp(s)
		before := c.tab()
		want(t, c.refresh(), 200, "")
		want(t, before.me(), 200, "")
	})
}

func TestRefreshResend(t *testing.T) {
	resend := map[string]string{"REFRESH_REUSE_POLICY": "resend"}
	s := start(t, resend)
	brief := start(t, map[string]string{"REFRESH_REUSE_POLICY": "resend", "REFRESH_REUSE_LEEWAY": "50ms"})
	t.Run("the same successor", func(t *testing.T) {
		c := signedUp(s)
		oldest := c.tab()
		first := c.refresh()
		want(t, first, 200, "")
		execSQL(t, s.database, "UPDATE users SET email = 'new' || email WHERE email = $1", c.email)
		for began := time.Now(); time.Since(began) < 1100*time.Millisecond; { // into another second
			r := oldest.tab().refresh()
			want(t, r, 200, "")
			if r.header.Get("Set-Cookie") != first.header.Get("Set-Cookie") {
				t.Fatalf("another successor:\n%s\n%s", r.header.Get("Set-Cookie"), first.header.Get("Set-Cookie"))
			}
			if r.text("accessToken") == first.text("accessToken") {
				t.Fatal("the access token is not fresh")
			}
			want(t, c.bearing(r.text("accessToken")).me(), 200, "")
		}
		previous := c.tab()
		second := c.refresh()
		want(t, second, 200, "")
		if r := previous.refresh(); r.header.Get("Set-Cookie") != second.header.Get("Set-Cookie") {
			t.Errorf("another successor: %d %v", r.status, r.header)
		}
		r := oldest.refresh()
		want(t, r, 401, "refresh_reused")
		if r.header["Set-Cookie"] != nil {
			t.Errorf("an older token is told %q", r.header["Set-Cookie"])
		}
		want(t, c.refresh(), 200, "")
	})
	t.Run("after the leeway", func(t *testing.T) {
		c := signedUp(brief)
		stolen := c.tab()
		want(t, c.refresh(), 200, "")
		eventually(t, "theft is noticed", func() bool {
			r := stolen.tab().refresh()
			if r.status != 200 {
				want(t, r, 401, "refresh_reused")
			}
			return r.cleared()
		})
		want(t, c.me(), 401, "session_revoked")
	})
	t.Run("password changed since", func(t *testing.T) {
		c := signedUp(s)
		old := c.tab()
		want(t, c.refresh(), 200, "")
		execSQL(t, s.database, "UPDATE users SET password_hash = 'other' WHERE email = $1", c.email)
		if r := old.refresh(); r.status != 401 {
			t.Errorf("a session of the old password goes on: %d %s", r.status, r.raw)
		}
		want(t, c.refresh(), 401, "session_revoked")
	})
}

// A session ends at its refresh when its user is gone or has another password, however that came about.
func TestRefreshAsksPostgres(t *testing.T) {
	s := start(t, nil)
	for name, sql := range map[string]string{
		"user gone":             "DELETE FROM users WHERE email = $1",
		"password hash changed": "UPDATE users SET password_hash = '$2b$04$abcdefghijklmnopqrstuuabcdefghijklmnopqrstuabcdefghijklmn' WHERE email = $1",
	} {
		t.Run(name, func(t *testing.T) {
			c := signedUp(s)
			execSQL(t, s.database, sql, c.email)
			r := c.tab().refresh()
			want(t, r, 401, "session_revoked")
			if !r.cleared() {
				t.Error("the cookie stays")
			}
			want(t, c.me(), 401, "session_revoked")
		})
	}
}

func TestSessionLifetime(t *testing.T) {
	seconds := func(c *client, from, to string) float64 {
		claims := payload(t, c.cookie)
		return claims[to].(float64) - claims[from].(float64)
	}
	t.Run("the refresh token ends with the session", func(t *testing.T) {
		t.Parallel() // mostly it waits
		c := signedUp(start(t, map[string]string{"SESSION_MAX_TTL": "1h"}))
		if got := seconds(c, "iat", "exp"); got != 3600 {
			t.Errorf("a refresh token of %v s in a session of an hour", got)
		}
	})
	t.Run("refreshing does not prolong it", func(t *testing.T) {
		t.Parallel()
		c := newClient(start(t, map[string]string{"SESSION_MAX_TTL": "2s"}))
		began := time.Now()
		want(t, c.signup(), 201, "")
		end := payload(t, c.cookie)["exp"].(float64)
		eventually(t, "the session has run out", func() bool {
			r := c.refresh()
			if r.status == 200 {
				if exp := payload(t, c.cookie)["exp"].(float64); exp > end {
					t.Fatalf("the session was to end at %v, its refresh token expires at %v", end, exp)
				}
				return false
			}
			if r.code() != "session_revoked" && r.code() != "token_expired" || !r.cleared() {
				t.Errorf("got %d %s", r.status, r.raw)
			}
			return true
		})
		if lived := time.Since(began); lived < 900*time.Millisecond {
			t.Errorf("it ended after %v", lived)
		}
		eventually(t, "its access token is dead", func() bool { return c.me().code() == "session_revoked" })
		want(t, c.login(), 200, "")
	})
	t.Run("so does one that is not refreshed", func(t *testing.T) {
		t.Parallel()
		c := signedUp(start(t, map[string]string{"REFRESH_TOKEN_TTL": "1s"}))
		eventually(t, "the session has run out", func() bool { return c.me().code() == "session_revoked" })
		want(t, c.tab().refresh(), 401, "token_expired")
	})
	t.Run("access tokens expire", func(t *testing.T) {
		t.Parallel()
		c := signedUp(start(t, map[string]string{"ACCESS_TOKEN_TTL": "1s"}))
		eventually(t, "the access token has expired", func() bool { return c.me().code() == "token_expired" })
		want(t, c.refresh(), 200, "")
	})
}

// ---- logout

func TestLogout(t *testing.T) {
	s := start(t, nil)
	replica := start(t, nil)
	for _, test := range []struct {
		name   string
		bearer func(c, other *client) string
		cookie func(c, other *client) string
		status int
		code   string
		ends   string // whose session: "c", "other" or none
	}{
		{"bearer and cookie", access, cookie, 200, "", "c"},
		{"bearer alone", access, nothing, 200, "", "c"},
		{"bearer and another session's cookie", access, ofOther(cookie), 200, "", "c"},
		{"bearer and an unreadable cookie", access, garbage, 200, "", "c"},
		{"cookie alone", nothing, cookie, 200, "", "c"},
		{"expired bearer and cookie", tooOld(access), cookie, 200, "", "c"},
		{"expired bearer and another session's cookie", tooOld(access), ofOther(cookie), 200, "", "other"},
		{"unreadable bearer and cookie", garbage, cookie, 401, "invalid_token", ""},
		{"refresh token as bearer, and cookie", cookie, cookie, 401, "invalid_token", ""},
		{"expired bearer alone", tooOld(access), nothing, 401, "token_expired", ""},
		{"expired cookie alone", nothing, tooOld(cookie), 401, "token_expired", ""},
		{"expired both", tooOld(access), tooOld(cookie), 401, "token_expired", ""},
		{"unreadable cookie alone", nothing, garbage, 401, "invalid_token", ""},
		{"access token as cookie", nothing, access, 401, "invalid_token", ""},
		{"nothing", nothing, nothing, 401, "missing_token", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := signedUp(s)
			other := c.device()
			want(t, other.login(), 200, "")
			r := c.bearing(test.bearer(c, other)).holding(test.cookie(c, other)).logout()
			want(t, r, test.status, test.code)
			if !r.cleared() {
				t.Errorf("the cookie stays: %v", r.header)
			}
			for name, d := range map[string]*client{"c": c, "other": other} {
				for _, at := range []*server{s, replica} {
					me, refreshed := d.at(at).me(), response{}
					if name != test.ends {
						want(t, me, 200, "")
						continue
					}
					want(t, me, 401, "session_revoked")
					if refreshed = d.at(at).refresh(); refreshed.status != 401 || !refreshed.cleared() {
						t.Errorf("the refresh token works on: %d %s", refreshed.status, refreshed.raw)
					}
				}
				if name != test.ends {
					want(t, d.refresh(), 200, "")
				}
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		c := signedUp(s)
		again := c.tab()
		want(t, c.logout(), 200, "")
		want(t, again.tab().logout(), 401, "session_revoked")
		want(t, again.bearing("").logout(), 401, "session_revoked")
	})
	t.Run("another scheme is no bearer", func(t *testing.T) {
		c := signedUp(s)
		want(t, c.bearing("").do("POST", "/auth/logout", nil, "Authorization", "Basic eDp5"), 200, "")
		want(t, c.me(), 401, "session_revoked")
	})
}

// What a request at TestLogout shows.
func access(c, _ *client) string  { return c.access }
func cookie(c, _ *client) string  { return c.cookie }
func nothing(_, _ *client) string { return "" }
func garbage(_, _ *client) string { return "garbage" }

func ofOther(token func(c, other *client) string) func(c, other *client) string {
	return func(c, other *client) string { return token(other, c) }
}

func tooOld(token func(c, other *client) string) func(c, other *client) string {
	return func(c, other *client) string {
		secret := "JWT_SECRET"
		if token(c, other) == c.cookie {
			secret = "JWT_REFRESH_SECRET"
		}
		return expired(c.t, secret, token(c, other))
	}
}

// ---- the account

func TestSessions(t *testing.T) {
	s := start(t, nil)
	type entry struct{ id, createdAt, lastUsedAt, ip, userAgent string }
	list := func(c *client) (entries []entry, current string) {
		t.Helper()
		r := c.do("GET", "/auth/sessions", nil)
		want(t, r, 200, "")
		for _, item := range r.body["sessions"].([]any) {
			one := response{body: item.(map[string]any)}
			entries = append(entries, entry{one.text("id"), one.text("createdAt"), one.text("lastUsedAt"), one.text("ip"), one.text("userAgent")})
			if one.body["current"] == true {
				current += one.text("id")
			}
		}
		return entries, current
	}
	ids := func(c *client) (ids []string) {
		entries, _ := list(c)
		for _, e := range entries {
			ids = append(ids, e.id)
		}
		return ids
	}
	newest := func(c *client, r response) { // makes times differ, which have milliseconds
		t.Helper()
		want(t, r, 200, "")
		time.Sleep(2 * time.Millisecond)
	}

	c := signedUp(s)
	phone, laptop := c.device(), c.device()
	newest(phone, phone.do("POST", "/auth/login", c.credentials(), "User-Agent", "phone/1.0"))
	newest(laptop, laptop.do("POST", "/auth/login", c.credentials(), "User-Agent", strings.Repeat("é", 5000)))
	newest(c, c.refresh())
	entries, current := list(phone)
	if len(entries) != 3 || current != sessionOf(t, phone.access) {
		t.Fatalf("sessions %v, current %s", entries, current)
	}
	if order := []string{sessionOf(t, c.access), sessionOf(t, laptop.access), current}; !slices.Equal(ids(c), order) {
		t.Errorf("newest use first: got %v, want %v", ids(c), order)
	}
	if e := entries[2]; e.ip != phone.ip || e.userAgent != "phone/1.0" || e.createdAt != e.lastUsedAt {
		t.Errorf("the phone is listed as %v", e)
	}
	if e := entries[0]; e.lastUsedAt <= e.createdAt || e.ip != c.ip {
		t.Errorf("the refreshed one is listed as %v", e)
	}
	if agent := entries[1].userAgent; !strings.HasPrefix(agent, "éé") || len(agent) > 1000 || strings.Contains(agent, "\ufffd") {
		t.Errorf("a long user agent is listed as %q", agent)
	}
	for _, e := range entries {
		for _, at := range []string{e.createdAt, e.lastUsedAt} {
			if parsed, err := time.Parse(time.RFC3339, at); err != nil || parsed.Location() != time.UTC || time.Since(parsed).Abs() > time.Minute {
				t.Errorf("%q is not now in UTC", at)
			}
		}
	}

	stranger := signedUp(s)
	phoneID := sessionOf(t, phone.access)
	for _, id := range []string{phoneID, "00000000-0000-4000-8000-000000000000", "x", strings.ToUpper(phoneID) + "x"} {
		want(t, stranger.do("DELETE", "/auth/sessions/"+id, nil), 404, "session_not_found")
	}
	want(t, phone.me(), 200, "")
	r := c.do("DELETE", "/auth/sessions/"+phoneID, nil)
	want(t, r, 200, "")
	if r.header["Set-Cookie"] != nil {
		t.Error("another session is revoked, and this one's cookie is touched")
	}
	want(t, phone.me(), 401, "session_revoked")
	want(t, phone.tab().refresh(), 401, "session_revoked")
	want(t, c.do("DELETE", "/auth/sessions/"+phoneID, nil), 404, "session_not_found")
	if got := len(ids(c)); got != 2 {
		t.Errorf("%d sessions are left", got)
	}
	want(t, c.tab().do("DELETE", "/auth/sessions", nil), 200, "")
	for _, d := range []*client{c, laptop} {
		want(t, d.me(), 401, "session_revoked")
		want(t, d.tab().refresh(), 401, "session_revoked")
	}
	want(t, c.login(), 200, "")
	if got := ids(c); !slices.Equal(got, []string{sessionOf(t, c.access)}) {
		t.Errorf("sessions after a new login: %v", got)
	}
	r = c.do("DELETE", "/auth/sessions/"+sessionOf(t, c.access), nil)
	want(t, r, 200, "")
	if !r.cleared() {
		t.Error("this session is revoked, and its cookie stays")
	}
	want(t, c.me(), 401, "session_revoked")
	want(t, stranger.me(), 200, "")
}

func TestChangePassword(t *testing.T) {
	s := start(t, map[string]string{"LOGIN_LIMIT_MAX": "3"})
	c := signedUp(s)
	other := c.device()
	want(t, other.login(), 200, "")
	change := func(c *client, current, next string) response {
		return c.do("PUT", "/auth/password", map[string]any{"currentPassword": current, "newPassword": next})
	}
	next := "the next " + c.password
	for _, test := range []struct{ current, next, fields string }{
		{"", next, "{currentPassword}"},
		{c.password, "", "{newPassword}"},
		{c.password, "aQ3#x9z", "{newPassword}"},
		{c.password, strings.Repeat("x", 73), "{newPassword}"},
		{c.password, next + "\x00", "{newPassword}"},
		{c.password, "TrustNo1", "{newPassword}"},
		{"", "", "{currentPassword newPassword}"},
	} {
		r := change(c, test.current, test.next)
		want(t, r, 400, "validation_failed")
		if got := members(r.body["details"]); got != test.fields {
			t.Errorf("details for %s, want %s", got, test.fields)
		}
	}
	r := change(c, "wrong password", next)
	want(t, r, 401, "invalid_credentials")
	if r.header["Set-Cookie"] != nil {
		t.Error("a wrong password costs the cookie")
	}
	want(t, change(c.bearing("").holding(c.cookie), c.password, next), 401, "missing_token")

	before := c.tab()
	want(t, change(c, c.password, next), 200, "")
	want(t, other.me(), 401, "session_revoked")
	want(t, other.tab().refresh(), 401, "session_revoked")
	want(t, before.me(), 200, "")
	want(t, c.refresh(), 200, "")
	want(t, c.refresh(), 200, "")
	want(t, c.device().login(), 401, "invalid_credentials")
	c.password = next
	want(t, c.device().login(), 200, "")
	want(t, change(c, next, next), 200, "") // to the same: nothing speaks against it

	c.ip = randomIP() // and guessing here is guessing there
	for range 3 {
		want(t, change(c, "wrong password", "yet another one"), 401, "invalid_credentials")
	}
	want(t, change(c, next, "yet another one"), 429, "too_many_attempts")
	want(t, c.tab().login(), 429, "too_many_attempts")
	want(t, c.me(), 200, "")
}

func TestDeleteAccount(t *testing.T) {
	s := start(t, nil)
	c := signedUp(s)
	other := c.device()
	want(t, other.login(), 200, "")
	want(t, c.do("DELETE", "/auth/me", map[string]any{"password": ""}), 400, "validation_failed")
	want(t, c.do("DELETE", "/auth/me", map[string]any{"password": "wrong password"}), 401, "invalid_credentials")
	r := c.tab().do("DELETE", "/auth/me", map[string]any{"password": c.password})
	want(t, r, 200, "")
	if !r.cleared() {
		t.Error("the cookie stays")
	}
	if got := queryText(t, s.database, "SELECT count(*)::text FROM users WHERE email = $1", c.email); got != "0" {
		t.Error("the row is still there")
	}
	for _, d := range []*client{c, other} {
		want(t, d.me(), 401, "session_revoked")
		want(t, d.tab().refresh(), 401, "session_revoked")
	}
	want(t, c.device().login(), 401, "invalid_credentials")
	want(t, c.device().signup(), 201, "")
}

// What Redis holds of a user, and for how long.
func TestRedisKeys(t *testing.T) {
	s := start(t, map[string]string{"RATE_LIMIT_MAX": "1000", "REFRESH_TOKEN_TTL": "1h"})
	c := signedUp(s)
	old := c.tab()
	claims := payload(t, c.access)
	rdb := redisClient(t)
	for _, key := range []string{fmt.Sprintf("session:{%s}", claims["sid"]), fmt.Sprintf("user-sessions:{%s}", claims["sub"])} {
		if !rdb.Expire(t.Context(), key, time.Minute).Val() { // as if it were old: the refresh prolongs it
			t.Errorf("no %s", key)
		}
	}
	want(t, c.refresh(), 200, "")
	wrong := c.device()
	wrong.password = "wrong password"
	want(t, wrong.login(), 401, "invalid_credentials")
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(c.email)))[:32]
	for key, seconds := range map[string]int{
		fmt.Sprintf("session:{%s}", claims["sid"]):                                     3600,
		fmt.Sprintf("blacklist:{%s}:%s", claims["sid"], payload(t, old.cookie)["jti"]): 3600,
		fmt.Sprintf("user-sessions:{%s}", claims["sub"]):                               3600,
		fmt.Sprintf("rate-limit:{%s}", c.ip):                                           60,
		fmt.Sprintf("login-limit:{%s}", sum):                                           900,
		fmt.Sprintf("login-limit:{%s}:%s", sum, wrong.ip):                              900,
	} {
		ttl := rdb.TTL(t.Context(), key).Val()
		if ttl <= time.Duration(seconds-60)*time.Second || ttl > time.Duration(seconds)*time.Second {
			t.Errorf("%s lives for %v, want %d s", key, ttl, seconds)
		}
	}
	held := fmt.Sprint(rdb.HGetAll(t.Context(), fmt.Sprintf("session:{%s}", claims["sid"])).Val())
	for _, secret := range []string{c.password, c.email, c.access, c.cookie, strings.Split(c.cookie, ".")[2]} {
		if strings.Contains(held, secret) {
			t.Errorf("the session holds %q: %s", secret, held)
		}
	}
	want(t, c.logout(), 200, "")
	if n := rdb.Exists(t.Context(), fmt.Sprintf("session:{%s}", claims["sid"])).Val(); n != 0 {
		t.Error("the session is still there")
	}
}

// A hash may be of any cost that bcrypt knows, up to days; whoever wrote it, a login does not wait for it.
func TestCostlyHashIsNoHash(t *testing.T) {
	h, err := newHasher(1, bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		ok, err := h.matches(t.Context(), "$2b$31$MeMND/z2k0ryfi5Wj2dMquCHgKc3.odEL4BfBAEltIRyxhHzG/LZ.", "some password")
		done <- ok || err != nil
	}()
	select {
	case failed := <-done:
		if failed {
			t.Error("it was taken for a hash")
		}
	case <-time.After(time.Minute):
		t.Error("it is being computed")
	}
}
