package integration

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

const bodyLimit = 102_400

// padded is the JSON of a login, made longer by white space up to a size.
func padded(email, password string, size int) string {
	body := fmt.Sprintf(`{"email":%q,"password":%q}`, email, password)
	return body + strings.Repeat(" ", size-len(body))
}

// post is a login request with exactly this body.
func (s *server) post(t testing.TB, body string) *answer {
	t.Helper()
	return s.send(t, request{method: "POST", path: "/auth/login", body: body})
}

// raw writes bytes to the server, and reads one response with what follows of the connection.
func (s *server) raw(t testing.TB, text string) (*http.Response, error) {
	t.Helper()
	conn, err := net.Dial("tcp", s.host())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(90 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(conn), nil)
}

var errorFormat = []promise{
	{"invalid_json is 400: not one JSON object", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		good := fmt.Sprintf(`{"email":%q,"password":%q}`, v.email, v.password)
		s.post(t, good).want(200)
		for name, body := range map[string]string{
			"empty body": "", "white space only": " \n", "null": "null", "a string": `"x"`, "a number": "1", "an array": "[" + good + "]",
			"syntax": `{"email":`, "no quotes": `{email:"a"}`, "a comment": good + "// x", "a trailing comma": `{"email":"a","password":"b",}`,
			"trailing data": good + "x", "two objects": good + good, "an object and null": good + " null",
			"a byte order mark": "\xef\xbb\xbf" + good, "single quotes": `{'email':'a','password':'b'}`,
			"email is a number": `{"email":1,"password":"b"}`, "email is an object": `{"email":{},"password":"b"}`,
			"password is an array": `{"email":"a","password":["b"]}`, "password is a boolean": `{"email":"a","password":true}`,
			"not a number": `{"email":"a","password":"b","x":NaN}`, "a leading zero": `{"email":"a","password":"b","x":01}`,
			"a raw control character": "{\"email\":\"a\x01\",\"password\":\"b\"}",
		} {
			if a := s.post(t, body); a.status() != 400 || a.code() != "invalid_json" {
				t.Errorf("%s: %d %s", name, a.status(), a.body)
			}
		}
	}},
	{"a member given twice is invalid_json", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, body := range []string{
			fmt.Sprintf(`{"email":%[1]q,"email":%[1]q,"password":%[2]q}`, v.email, v.password),
			fmt.Sprintf(`{"email":%q,"password":"wrong","password":%q}`, v.email, v.password),
			fmt.Sprintf(`{"email":%[1]q,"\u0065mail":%[1]q,"password":%[2]q}`, v.email, v.password),
			fmt.Sprintf(`{"email":%q,"password":%q,"unknown":1,"unknown":1}`, v.email, v.password),
			fmt.Sprintf(`{"email":%q,"password":%q,"unknown":{"a":1,"a":2}}`, v.email, v.password),
		} {
			s.post(t, body).refused(400, "invalid_json")
		}
	}},
	{"invalid UTF-8 is invalid_json", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, body := range []string{
			fmt.Sprintf(`{"email":%q,"password":"`, v.email) + "\xff" + `"}`,
			fmt.Sprintf(`{"email":%q,"password":%q,"unknown":"`, v.email, v.password) + "\xc3\x28" + `"}`,
			fmt.Sprintf(`{"email":%q,"password":%q,"`, v.email, v.password) + "\xed\xa0\x80" + `":1}`,
			fmt.Sprintf(`{"email":%q,"password":"`, v.email) + "\xc0\x80" + `"}`,
		} {
			s.post(t, body).refused(400, "invalid_json")
		}
	}},
	{"JSON members are matched with their exact case", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		a := s.post(t, fmt.Sprintf(`{"Email":%q,"password":%q}`, v.email, v.password)).refused(400, "validation_failed")
		members(t, a.details(), "email")
		a = s.post(t, fmt.Sprintf(`{"email":%q,"PASSWORD":%q}`, v.email, v.password)).refused(400, "validation_failed")
		members(t, a.details(), "password")
		// The other case is an unknown member, and no second one of the same name.
		s.post(t, fmt.Sprintf(`{"email":%q,"Email":"x","password":%q}`, v.email, v.password)).want(200)
	}},
	{"unknown JSON members are ignored", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.post(t, fmt.Sprintf(`{"remember":true,"email":%q,"x":{"y":[1,2,null]},"password":%q,"role":"admin"}`, v.email, v.password)).want(200)
	}},
	{"validation_failed says in details which field and why", aURL, func(t *testing.T, s *server) {
		a := s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{"nonsense", "short"}}).refused(400, "validation_failed")
		members(t, a.details(), "email", "password")
		for field, message := range a.details() {
			if text, ok := message.(string); !ok || text == "" {
				t.Errorf("details of %s: %v", field, message)
			}
		}
		a = s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{newEmail(), "short"}}).refused(400, "validation_failed")
		members(t, a.details(), "password")
		a = s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{"nonsense", newPassword()}}).refused(400, "validation_failed")
		members(t, a.details(), "email")
		v := s.signup(t)
		a = v.send("PUT", "/auth/password", map[string]string{}).refused(400, "validation_failed")
		members(t, a.details(), "currentPassword", "newPassword")
		a = v.send("PUT", "/auth/password", passwordChange{v.password, "short"}).refused(400, "validation_failed")
		members(t, a.details(), "newPassword")
		a = v.send("DELETE", "/auth/me", map[string]string{}).refused(400, "validation_failed")
		members(t, a.details(), "password")
	}},
	{"email_exists is 400 for a taken email, without regard to case", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, email := range []string{v.email, strings.ToUpper(v.email), " " + v.email + "\t"} {
			a := s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{email, newPassword()}}).refused(400, "email_exists").keepsCookie()
			if a.json["error"] != "Email already exists" {
				t.Errorf("body %s", a.body)
			}
		}
		v.login()
	}},
	{"of simultaneous signups of one email exactly one is 201, the others email_exists", aURL, func(t *testing.T, s *server) {
		for range 5 {
			email := newEmail()
			answers := together(8, func(i int) *answer {
				cased := email
				if i%2 == 1 {
					cased = strings.ToUpper(email)
				}
				return s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{cased, newPassword()}})
			})
			if count(answers, 201) != 1 {
				t.Fatalf("%d signups succeeded", count(answers, 201))
			}
			for _, a := range answers {
				if a.status() != 201 {
					a.refused(400, "email_exists")
				}
			}
		}
	}},
	{"invalid_credentials is 401 with the same body for a wrong password and an unknown email", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		wrong := s.tryLogin(t, v.email, newPassword(), "").refused(401, "invalid_credentials").keepsCookie()
		unknown := s.tryLogin(t, newEmail(), v.password, "").refused(401, "invalid_credentials").keepsCookie()
		for _, a := range []*answer{wrong, unknown} {
			delete(a.json, "requestId")
			delete(a.json, "timestamp")
		}
		if fmt.Sprint(wrong.json) != fmt.Sprint(unknown.json) {
			t.Errorf("%s and %s differ", wrong.body, unknown.body)
		}
	}},
	{"invalid_credentials takes the same time for a wrong password and an unknown email", own, func(t *testing.T, _ *server) {
		s := serve(t, home, nil) // at production's cost, where there is something to measure
		v := s.signup(t)
		var wrong, unknown []time.Duration
		// In turns, so that a busy machine slows both; the fastest of each is the one that nothing disturbed. It may take more
		// than seven for that. Who stops where it fits may miss a difference near the bounds, not one of a hash left out.
		for n := 1; ; n++ {
			wrong = append(wrong, s.tryLogin(t, v.email, newPassword(), "").want(401).took)
			unknown = append(unknown, s.tryLogin(t, newEmail(), newPassword(), "").want(401).took)
			w, u := slices.Min(wrong), slices.Min(unknown)
			ratio := float64(u) / float64(w)
			if n >= 7 && ratio > 0.7 && ratio < 1.4 {
				return
			}
			if n == 40 {
				t.Fatalf("a wrong password takes %v, an unknown email %v", w, u)
			}
		}
	}},
	{"missing_token is 401 with the bare challenge where no Bearer token is shown", aURL, func(t *testing.T, s *server) {
		for _, route := range contractRoutes {
			method, path, _ := strings.Cut(strings.Replace(route, "{id}", "4a1bb9d1-8c8a-4b8c-9d55-6a8f3f3ea0c1", 1), " ")
			if strings.HasSuffix(path, "z") || path == "/auth/signup" || path == "/auth/login" {
				continue
			}
			for _, header := range []map[string]string{nil, {"Authorization": "Basic dXNlcjpwYXNz"}, {"Authorization": ""}} {
				a := s.send(t, request{method: method, path: path, header: header}).refused(401, "missing_token")
				if a.Header.Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("%s: WWW-Authenticate is %q", route, a.Header.Get("WWW-Authenticate"))
				}
			}
		}
	}},
	{"WWW-Authenticate has error=\"invalid_token\" where a Bearer token was shown and refused", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		gone := v.login()
		gone.send("POST", "/auth/logout", nil).want(200)
		for _, token := range []string{"x", "a.b.c", v.refresh, gone.access} {
			for _, r := range []request{{method: "GET", path: "/auth/me"}, {method: "POST", path: "/auth/logout"}, {method: "DELETE", path: "/auth/sessions"}} {
				r.bearer = token
				a := s.send(t, r).want(401)
				if !strings.Contains(a.Header.Get("WWW-Authenticate"), `error="invalid_token"`) {
					t.Errorf("%s: WWW-Authenticate is %q", a.sent, a.Header.Get("WWW-Authenticate"))
				}
			}
		}
	}},
	{"a refused cookie, and a wrong password, get the bare challenge", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, a := range []*answer{
			v.show("nonsense").refused(401, "invalid_token"),
			s.send(t, request{method: "POST", path: "/auth/logout", cookie: "nonsense"}).refused(401, "invalid_token"),
			s.tryLogin(t, v.email, "wrong", "").refused(401, "invalid_credentials"),
			v.send("PUT", "/auth/password", passwordChange{"wrong", newPassword()}).refused(401, "invalid_credentials"),
			v.send("DELETE", "/auth/me", passwordOnly{"wrong"}).refused(401, "invalid_credentials"),
		} {
			if a.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s: WWW-Authenticate is %q", a.sent, a.Header.Get("WWW-Authenticate"))
			}
		}
		v.lives()
	}},
	{"body_too_large is 413 for more than 102,400 bytes, declared or chunked; white space counts", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, x := range []struct {
			size, status int
		}{{bodyLimit, 200}, {bodyLimit + 1, 413}, {2 * bodyLimit, 413}} {
			body := padded(v.email, v.password, x.size)
			for _, r := range []request{{body: body}, {body: body, chunked: true}} {
				r.method, r.path = "POST", "/auth/login"
				a := s.send(t, r).want(x.status)
				if x.status == 413 {
					a.refused(413, "body_too_large")
				}
			}
		}
	}},
	{"body_too_large is 413 on every route where a body is due", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, route := range []string{"POST /auth/signup", "POST /auth/login", "PUT /auth/password", "DELETE /auth/me"} {
			method, path, _ := strings.Cut(route, " ")
			for _, chunked := range []bool{false, true} {
				s.send(t, request{method: method, path: path, bearer: v.access, body: strings.Repeat("x", bodyLimit+1), chunked: chunked}).
					refused(413, "body_too_large")
			}
		}
	}},
	{"a body declared too long is refused unread", aURL, func(t *testing.T, s *server) {
		// Not one byte of it is ever sent.
		resp, err := s.raw(t, fmt.Sprintf("POST /auth/signup HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nX-Forwarded-For: %s\r\nContent-Length: %d\r\n\r\n",
			s.host(), newIP(), bodyLimit+1))
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 413 {
			t.Errorf("status %d, want 413", resp.StatusCode)
		}
	}},
	{"unsupported_media_type is 415 for a body whose type is not application/json", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		login := request{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}}
		for _, good := range []string{"application/json", "application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"} {
			login.contentType = good
			s.send(t, login).want(200)
		}
		for _, bad := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp",
			"application/problem+json", "text/json", "application/json, text/plain", "application/json/x", "json", ";"} {
			login.contentType = bad
			s.send(t, login).refused(415, "unsupported_media_type")
		}
		for _, r := range []request{
			{method: "POST", path: "/auth/signup", body: credentials{newEmail(), newPassword()}},
			{method: "PUT", path: "/auth/password", body: passwordChange{v.password, newPassword()}, bearer: v.access},
			{method: "DELETE", path: "/auth/me", body: passwordOnly{v.password}, bearer: v.access},
		} {
			r.contentType = "text/plain"
			s.send(t, r).refused(415, "unsupported_media_type")
		}
	}},
	{"no body at all is 415 where a body is due, 400 if the type is there", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, route := range []string{"POST /auth/signup", "POST /auth/login", "PUT /auth/password", "DELETE /auth/me"} {
			method, path, _ := strings.Cut(route, " ")
			v.send(method, path, nil).refused(415, "unsupported_media_type")
			s.send(t, request{method: method, path: path, bearer: v.access, contentType: "application/json"}).refused(400, "invalid_json")
		}
	}},
	{"refresh and logout read no body and ask for no type", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, contentType := range []string{"application/json", "text/plain", "application/x-www-form-urlencoded"} {
			a := s.send(t, request{method: "POST", path: "/auth/refresh", cookie: v.refresh, body: "{{{ no JSON", contentType: contentType}).want(200)
			v.take(a)
		}
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: v.access, body: "{{{ no JSON", contentType: "text/plain"}).want(200)
	}},
	{"a wrong password on the account routes is 401 invalid_credentials and changes nothing", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		v.send("PUT", "/auth/password", passwordChange{newPassword(), newPassword()}).refused(401, "invalid_credentials").keepsCookie()
		v.send("DELETE", "/auth/me", passwordOnly{newPassword()}).refused(401, "invalid_credentials").keepsCookie()
		v.lives()
		other.lives()
		v.login()
	}},
	{"malformed HTTP gets no 200, and neither do headers without bound", aURL, func(t *testing.T, s *server) {
		for _, text := range []string{
			"GET /healthz HTTP/1.1\r\n\r\n", // no Host
			"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
			"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
			"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 2<<20) + "\r\n\r\n",
		} {
			// A server may also hang up on these.
			if resp, err := s.raw(t, text); err == nil && (resp.StatusCode < 400 || resp.StatusCode >= 500) {
				t.Errorf("%.60q: status %d", text, resp.StatusCode)
			}
		}
	}},
	{"read times are bounded: who never finishes a request is cut off", own, func(t *testing.T, s *server) {
		for _, text := range []string{
			"GET /healthz HTTP/1.1\r\nHost: x\r\n",
			fmt.Sprintf("POST /auth/login HTTP/1.1\r\nHost: %s\r\nX-Forwarded-For: %s\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{", s.host(), newIP()),
		} {
			start := time.Now()
			_, err := s.raw(t, text) // waits for 90 seconds at most
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("%.40q: still open after %v", text, time.Since(start))
			}
		}
	}},
}

var orderOfChecks = []promise{
	{"rate_limited comes before all but CORS", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"RATE_LIMIT_MAX": "1"}))
		ip := newIP()
		s.send(t, request{method: "GET", path: "/nowhere", ip: ip}).want(404)
		for _, r := range []request{
			{method: "GET", path: "/nowhere"},
			{method: "PATCH", path: "/auth/me"},
			{method: "POST", path: "/auth/login", header: map[string]string{"Origin": "https://evil.example"}},
			{method: "GET", path: "/auth/me"},
			{method: "POST", path: "/auth/login", body: strings.Repeat("x", bodyLimit+1)},
			{method: "POST", path: "/auth/refresh"},
		} {
			r.ip = ip
			s.send(t, r).refused(429, "rate_limited")
		}
		a := s.send(t, request{method: "POST", path: "/auth/login", ip: ip, header: map[string]string{"Origin": frontend}}).refused(429, "rate_limited")
		if a.Header.Get("Access-Control-Allow-Origin") != frontend {
			t.Error("a frontend cannot read its 429: no CORS header")
		}
		preflight := map[string]string{"Origin": frontend, "Access-Control-Request-Method": "POST"}
		s.send(t, request{method: "OPTIONS", path: "/auth/login", ip: ip, header: preflight}).want(204)
		s.send(t, request{method: "GET", path: "/healthz", ip: ip}).want(200)
	}},
	{"404 and 405 come before 403 cross-origin", aURL, func(t *testing.T, s *server) {
		evil := map[string]string{"Origin": "https://evil.example"}
		s.send(t, request{method: "POST", path: "/nowhere", header: evil}).refused(404, "not_found")
		s.send(t, request{method: "POST", path: "/auth/me", header: evil}).refused(405, "method_not_allowed")
		s.send(t, request{method: "DELETE", path: "/healthz", header: evil}).refused(405, "method_not_allowed")
	}},
	{"403 cross-origin comes before 401, 413, 415 and 400", aURL, func(t *testing.T, s *server) {
		for _, r := range []request{
			{method: "POST", path: "/auth/logout"},
			{method: "POST", path: "/auth/refresh"},
			{method: "PUT", path: "/auth/password", body: "x", contentType: "text/plain"},
			{method: "POST", path: "/auth/login", body: strings.Repeat("x", bodyLimit+1)},
			{method: "POST", path: "/auth/login", body: "{"},
		} {
			r.header = map[string]string{"Origin": "https://evil.example"}
			s.send(t, r).refused(403, "cross_origin")
		}
	}},
	{"401 comes before 413, 415 and 400", aURL, func(t *testing.T, s *server) {
		for _, route := range []string{"PUT /auth/password", "DELETE /auth/me"} {
			method, path, _ := strings.Cut(route, " ")
			for _, r := range []request{
				{body: strings.Repeat(" ", bodyLimit+1)}, {body: "x", contentType: "text/plain"}, {body: "{"}, {},
			} {
				r.method, r.path = method, path
				s.send(t, r).refused(401, "missing_token")
			}
		}
	}},
	{"413 by the declared length comes before 415", aURL, func(t *testing.T, s *server) {
		s.send(t, request{method: "POST", path: "/auth/login", body: strings.Repeat("x", bodyLimit+1), contentType: "text/plain"}).refused(413, "body_too_large")
	}},
	{"415 comes before 413 by what was read", aURL, func(t *testing.T, s *server) {
		s.send(t, request{method: "POST", path: "/auth/login", body: strings.Repeat("x", bodyLimit+1), chunked: true, contentType: "text/plain"}).
			refused(415, "unsupported_media_type")
	}},
	{"413 by what was read comes before 400", aURL, func(t *testing.T, s *server) {
		for _, body := range []string{strings.Repeat("x", bodyLimit+1), "{}" + strings.Repeat(" ", bodyLimit), `{"email":1}` + strings.Repeat("x", bodyLimit)} {
			s.send(t, request{method: "POST", path: "/auth/login", body: body, chunked: true}).refused(413, "body_too_large")
		}
	}},
	{"too_many_attempts comes once the body is understood", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"LOGIN_LIMIT_MAX": "1"}))
		v := s.signup(t)
		s.tryLogin(t, v.email, newPassword(), v.ip).want(401)
		s.tryLogin(t, v.email, v.password, v.ip).refused(429, "too_many_attempts")
		s.send(t, request{method: "POST", path: "/auth/login", ip: v.ip, body: fmt.Sprintf(`{"email":%q,`, v.email)}).refused(400, "invalid_json")
		s.send(t, request{method: "POST", path: "/auth/login", ip: v.ip, body: map[string]string{"email": v.email}}).refused(400, "validation_failed")
		s.send(t, request{method: "POST", path: "/auth/login", ip: v.ip, body: credentials{v.email, v.password}, contentType: "text/plain"}).refused(415, "unsupported_media_type")
	}},
}
