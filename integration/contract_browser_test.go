package integration

import (
	"strings"
	"testing"

	"github.com/google/uuid"
)

// from are the headers of a request that a browser makes for a page of this origin.
func from(origin string) map[string]string { return map[string]string{"Origin": origin} }

// listed is the first of the server's frontends.
func (s *server) listed() string {
	first, _, _ := strings.Cut(s.conf("FRONTEND_URL"), ",")
	return strings.TrimSuffix(strings.TrimSpace(first), "/")
}

// strangers are origins that look like the frontend, and are not.
func (s *server) strangers() []string {
	origin := s.listed()
	_, host, _ := strings.Cut(origin, "://")
	return []string{"https://evil.example", "null", origin + "/", origin + ".evil.example", origin + "@evil.example", origin + "0",
		"ftp://" + host, "http://evil." + host, strings.ToUpper(origin), "*", "http://", host}
}

var browserRules = []promise{
	{"CORS: a listed origin is echoed, with credentials, on every answer", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		// The check itself is made on every answer, see assertCORS.
		for _, r := range []request{
			{method: "GET", path: "/healthz"}, {method: "GET", path: "/nowhere"}, {method: "PATCH", path: "/auth/me"}, {method: "GET", path: "/auth/me"},
			{method: "GET", path: "/auth/me", bearer: v.access}, {method: "POST", path: "/auth/login", body: "{"}, {method: "POST", path: "/auth/refresh", cookie: v.refresh},
			{method: "POST", path: "/auth/logout"}, {method: "POST", path: "/auth/login", body: credentials{v.email, "wrong"}},
		} {
			r.header = from(s.listed())
			if a := s.send(t, r); a.Header.Get("Access-Control-Allow-Origin") != s.listed() {
				t.Errorf("%s: no CORS header", a.sent)
			}
		}
	}},
	{"CORS: exposed are X-Request-Id, Retry-After, RateLimit and RateLimit-Policy", aURL, func(t *testing.T, s *server) {
		a := s.send(t, request{method: "GET", path: "/auth/me", header: from(s.listed())}).want(401)
		assertList(t, a.Header.Get("Access-Control-Expose-Headers"), "X-Request-Id", "Retry-After", "RateLimit", "RateLimit-Policy")
	}},
	{"CORS: a preflight is 204 with methods, headers and Access-Control-Max-Age", aURL, func(t *testing.T, s *server) {
		for _, route := range contractRoutes {
			method, path, _ := strings.Cut(strings.Replace(route, "{id}", uuid.NewString(), 1), " ")
			a := s.send(t, request{method: "OPTIONS", path: path, header: map[string]string{"Origin": s.listed(),
				"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,content-type,x-request-id"}}).want(204)
			assertList(t, a.Header.Get("Access-Control-Allow-Headers"), "Authorization", "Content-Type", "X-Request-Id")
			if methods := a.Header.Get("Access-Control-Allow-Methods"); !strings.Contains(methods, method) {
				t.Errorf("%s: Access-Control-Allow-Methods is %q", route, methods)
			}
			if a.number("Access-Control-Max-Age") < 1 || len(a.body) != 0 {
				t.Errorf("%s: Max-Age %q, body %q", route, a.Header.Get("Access-Control-Max-Age"), a.body)
			}
		}
	}},
	{"CORS: other origins, null among them, get no CORS header, and no preflight either", aURL, func(t *testing.T, s *server) {
		for _, origin := range s.strangers() {
			a := s.send(t, request{method: "GET", path: "/auth/me", header: from(origin)}).want(401)
			b := s.send(t, request{method: "OPTIONS", path: "/auth/login", header: map[string]string{"Origin": origin, "Access-Control-Request-Method": "POST"}})
			for _, x := range []*answer{a, b} {
				for name := range x.Header {
					if strings.HasPrefix(name, "Access-Control-") {
						t.Errorf("origin %s: %s: %s", origin, x.sent, name)
					}
				}
			}
		}
	}},
	{"CORS: every origin of FRONTEND_URL counts, a trailing slash is dropped", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"FRONTEND_URL": "https://app.example.com/, http://localhost:8080"}))
		for _, origin := range []string{"https://app.example.com", "http://localhost:8080"} {
			a := s.send(t, request{method: "POST", path: "/auth/refresh", header: from(origin)}).refused(401, "missing_token")
			if a.Header.Get("Access-Control-Allow-Origin") != origin {
				t.Errorf("origin %s: %q", origin, a.Header.Get("Access-Control-Allow-Origin"))
			}
		}
		for _, origin := range []string{"https://app.example.com/", frontend, "http://app.example.com", "https://app.example.com, http://localhost:8080"} {
			s.send(t, request{method: "POST", path: "/auth/refresh", header: from(origin)}).refused(403, "cross_origin")
		}
	}},
	{"cross_origin is 403 for a state-changing request from an origin neither listed nor the server's own", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, origin := range append(s.strangers(), "http://127.0.0.1:1", "http://"+s.host()+".evil.example") {
			for _, r := range []request{
				{method: "POST", path: "/auth/signup", body: credentials{newEmail(), newPassword()}},
				{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}},
				{method: "POST", path: "/auth/refresh", cookie: v.refresh},
				{method: "POST", path: "/auth/logout", bearer: v.access},
				{method: "DELETE", path: "/auth/sessions", bearer: v.access},
				{method: "DELETE", path: "/auth/sessions/" + v.sid(), bearer: v.access},
				{method: "PUT", path: "/auth/password", bearer: v.access, body: passwordChange{v.password, newPassword()}},
				{method: "DELETE", path: "/auth/me", bearer: v.access, body: passwordOnly{v.password}},
			} {
				r.header = from(origin)
				s.send(t, r).refused(403, "cross_origin").keepsCookie()
			}
		}
		v.lives()
	}},
	{"cross_origin does not depend on what Sec-Fetch-Site says beside an Origin", aURL, func(t *testing.T, s *server) {
		for _, site := range []string{"same-origin", "none", "same-site", "cross-site"} {
			s.send(t, request{method: "POST", path: "/auth/refresh", header: map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": site}}).
				refused(403, "cross_origin")
			s.send(t, request{method: "POST", path: "/auth/refresh", header: map[string]string{"Origin": s.listed(), "Sec-Fetch-Site": site}}).
				refused(401, "missing_token")
		}
	}},
	{"without Origin, Sec-Fetch-Site: cross-site or same-site is 403", aURL, func(t *testing.T, s *server) {
		for site, status := range map[string]int{"cross-site": 403, "same-site": 403, "same-origin": 401, "none": 401} {
			a := s.send(t, request{method: "POST", path: "/auth/refresh", header: map[string]string{"Sec-Fetch-Site": site}}).want(status)
			if status == 403 {
				a.refused(403, "cross_origin")
			}
		}
	}},
	{"the server's own origin passes, and so does a client that sends neither header", aURL, func(t *testing.T, s *server) {
		s.send(t, request{method: "POST", path: "/auth/refresh", header: from(s.URL)}).refused(401, "missing_token")
		s.send(t, request{method: "POST", path: "/auth/refresh"}).refused(401, "missing_token")
	}},
	{"what changes no state passes from everywhere", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, header := range []map[string]string{from("https://evil.example"), from("null"), {"Sec-Fetch-Site": "cross-site"}} {
			for _, method := range []string{"GET", "HEAD"} {
				s.send(t, request{method: method, path: "/auth/me", bearer: v.access, header: header}).want(200)
				s.send(t, request{method: method, path: "/healthz", header: header}).want(200)
			}
		}
	}},
	{"OPTIONS that is no preflight is an ordinary request", aURL, func(t *testing.T, s *server) {
		for _, header := range []map[string]string{nil, from(s.listed()), from("https://evil.example"), {"Access-Control-Request-Method": "POST"}} {
			a := s.send(t, request{method: "OPTIONS", path: "/auth/login", header: header}).refused(405, "method_not_allowed")
			if !strings.Contains(a.Header.Get("Allow"), "POST") {
				t.Errorf("Allow is %q", a.Header.Get("Allow"))
			}
			s.send(t, request{method: "OPTIONS", path: "/nowhere", header: header}).refused(404, "not_found")
		}
	}},
	{"Vary: Origin, no-store and nosniff are on all answers that need them", aURL, func(t *testing.T, s *server) {
		// Checked on every answer, see assertInvariants; here are answers of each kind.
		v := s.signup(t)
		v.send("GET", "/auth/me", nil).want(200)
		s.send(t, request{method: "GET", path: "/auth/nowhere"}).want(404)
		s.send(t, request{method: "PATCH", path: "/auth/me"}).want(405)
		s.send(t, request{method: "POST", path: "/auth/login", header: from("https://evil.example")}).want(403)
		s.send(t, request{method: "GET", path: "/healthz"}).want(200)
		s.send(t, request{method: "OPTIONS", path: "/auth/me", header: map[string]string{"Origin": s.listed(), "Access-Control-Request-Method": "GET"}}).want(204)
	}},
	{"X-Request-Id: a UUID in its usual form is kept, in the header and in error bodies", aURL, func(t *testing.T, s *server) {
		id := uuid.NewString()
		for _, path := range []string{"/healthz", "/auth/me", "/nowhere"} {
			a := s.send(t, request{method: "GET", path: path, header: map[string]string{"X-Request-Id": id}})
			if a.Header.Get("X-Request-Id") != id {
				t.Errorf("%s: X-Request-Id is %s, want %s", path, a.Header.Get("X-Request-Id"), id)
			}
		}
	}},
	{"X-Request-Id: anything else is replaced by a fresh one", aURL, func(t *testing.T, s *server) {
		id := uuid.NewString()
		seen := map[string]bool{}
		for _, other := range []string{"", "x", "{" + id + "}", "urn:uuid:" + id, strings.ReplaceAll(id, "-", ""), id + "0", id[:35], id[:35] + "g", id + "," + id,
			strings.Replace(id, "-", "_", 1), "<script>", strings.Repeat("a", 36), id + " " + id, "--------" + id[8:], id[:8] + "0" + id[9:]} {
			got := s.send(t, request{method: "GET", path: "/auth/me", header: map[string]string{"X-Request-Id": other}}).Header.Get("X-Request-Id")
			if got == other || strings.Contains(other, got) || seen[got] {
				t.Errorf("X-Request-Id %q becomes %q", other, got)
			}
			seen[got] = true
		}
	}},
}

// assertList compares a comma-separated header's members, in any order and case.
func assertList(t *testing.T, header string, want ...string) {
	t.Helper()
	got := map[string]any{}
	for name := range strings.SplitSeq(header, ",") {
		got[strings.ToLower(strings.TrimSpace(name))] = true
	}
	for i := range want {
		want[i] = strings.ToLower(want[i])
	}
	members(t, got, want...)
}
