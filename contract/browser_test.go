package contract

import (
	"slices"
	"strings"
)

// strangers are origins that look like the server's frontend and are not.
func (s *server) strangers() []string {
	origin := s.origins()[0]
	_, host, _ := strings.Cut(origin, "://")
	return []string{
		"https://evil.example", "null", "*", "http://", host, origin + "/", origin + "0",
		origin + ".evil.example", origin + "@evil.example", "ftp://" + host, "http://evil." + host,
		strings.ToUpper(origin), "http://127.0.0.1:1", "http://" + s.host() + ".evil.example",
	}
}

// lists compares a comma-separated header's members, in any order and case.
func (a *answer) lists(header string, want ...string) {
	var got []string
	for name := range strings.SplitSeq(a.Header.Get(header), ",") {
		got = append(got, strings.ToLower(strings.TrimSpace(name)))
	}
	wanted := strings.Split(strings.ToLower(strings.Join(want, ",")), ",")
	slices.Sort(got)
	slices.Sort(wanted)
	a.server.expect(slices.Equal(got, wanted), "%s: %s is %q, want %q", a, header, got, want)
}

// That a listed origin is echoed with credentials, and no other gets a CORS header, is held on
// every answer, see assertCORS.
var browserPromises = []promise{
	{"CORS: every answer has headers for a listed origin, and for no other", aURL, func(s *server) {
		c := s.signup()
		for _, r := range []request{
			get("/healthz"), get("/nowhere"), to("PATCH /auth/me"), get("/auth/me"),
			get("/auth/me").bearer(c.access), post("/auth/login").text("{"), post("/auth/refresh"),
			post("/auth/logout"),
		} {
			for _, origin := range s.strangers() {
				s.send(r.from(origin))
			}
			s.send(r.from(s.origins()[0])).lists("Access-Control-Expose-Headers",
				"X-Request-Id", "Retry-After", "RateLimit", "RateLimit-Policy")
		}
	}},
	{"CORS: a preflight is 204 with methods, headers and a Max-Age", aURL, func(s *server) {
		for route := range routes {
			r := to(route)
			a := s.send(r.preflight(s.origins()[0])).want(204)
			a.lists("Access-Control-Allow-Headers", "Authorization", "Content-Type", "X-Request-Id")
			methods := strings.Split(a.Header.Get("Access-Control-Allow-Methods"), ", ")
			s.expect(slices.Contains(methods, r.method) &&
				a.number("Access-Control-Max-Age") >= 1 && len(a.body) == 0,
				"the preflight of %s: %v %q", route, a.Header, a.body)
			for _, origin := range s.strangers() {
				s.send(r.preflight(origin)).want(204)
			}
		}
	}},
	{"CORS: every origin of FRONTEND_URL counts, without a trailing slash", own, func(s *server) {
		s = s.start(env{"FRONTEND_URL": "https://app.example.com/, http://localhost:8080"})
		for _, origin := range []string{"https://app.example.com", "http://localhost:8080"} {
			s.send(post("/auth/refresh").from(origin)).refused("missing_token")
		}
		for _, origin := range []string{
			"https://app.example.com/", frontend, "http://app.example.com",
			"https://app.example.com:444", "https://sub.app.example.com",
			"https://app.example.com, http://localhost:8080",
		} {
			s.send(post("/auth/refresh").from(origin)).refused("cross_origin")
		}
	}},
	{"cross_origin is 403 for what changes state, from a stranger's origin", aURL, func(s *server) {
		c := s.signup()
		for _, origin := range s.strangers() {
			answers := c.elsewhere().sweep(func(r request) request { return r.from(origin) })
			for _, a := range answers {
				if a.asked.method != "GET" {
					a.refused("cross_origin")
				}
			}
		}
		c.lives()
	}},
	{"Sec-Fetch-Site: cross-site and same-site are 403, but count only without Origin", aURL,
		func(s *server) {
			for site, code := range map[string]string{
				"cross-site": "cross_origin", "same-site": "cross_origin",
				"same-origin": "missing_token", "none": "missing_token",
			} {
				r := post("/auth/refresh").with("Sec-Fetch-Site", site)
				s.send(r).shouldBe(code, site)
				s.send(evil(r)).shouldBe("cross_origin", site)
				s.send(r.from(s.origins()[0])).shouldBe("missing_token", site)
			}
		}},
	{"the server's own origin passes, and who sends no such header", aURL, func(s *server) {
		s.send(post("/auth/refresh").from("http://" + s.host())).refused("missing_token")
		s.send(post("/auth/refresh")).refused("missing_token")
	}},
	{"what changes no state passes from everywhere", aURL, func(s *server) {
		c := s.signup()
		for _, route := range []string{"GET /auth/me", "HEAD /auth/me", "GET /healthz"} {
			c.send(evil(to(route))).ok()
			c.send(to(route).from("null")).ok()
			c.send(to(route).with("Sec-Fetch-Site", "cross-site")).ok()
		}
	}},
	{"OPTIONS that is no preflight is an ordinary request", aURL, func(s *server) {
		resp, err := s.raw("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
		s.expect(err == nil && resp.StatusCode == 404, "OPTIONS *: %v (%v), want 404", resp, err)
		for _, r := range []request{
			to("OPTIONS /auth/login"),
			to("OPTIONS /auth/login").from(s.origins()[0]),
			evil(to("OPTIONS /auth/login")),
			to("OPTIONS /auth/login").with("Access-Control-Request-Method", "POST"),
		} {
			s.send(r).refused("method_not_allowed").lists("Allow", "POST")
			r.path = "/nowhere"
			s.send(r).refused("not_found")
		}
	}},
	{"X-Request-Id: a UUID in its usual form is kept", aURL, func(s *server) {
		for _, id := range []string{newUUID(), strings.ToUpper(newUUID())} {
			for _, path := range []string{"/healthz", "/auth/me", "/nowhere"} {
				a := s.send(get(path).with("X-Request-Id", id))
				got := a.Header.Get("X-Request-Id")
				s.expect(got == id, "%s: X-Request-Id %s became %s", a, id, got)
			}
		}
	}},
	{"X-Request-Id: anything else is replaced by a fresh one", aURL, func(s *server) {
		id := newUUID()
		seen := map[string]bool{}
		for _, other := range []string{
			"", "x", "{" + id + "}", "urn:uuid:" + id, strings.ReplaceAll(id, "-", ""), id + "0",
			id[:35], id[:35] + "g", id + "," + id, strings.Replace(id, "-", "_", 1), "<script>",
			strings.Repeat("a", 36), id + " " + id, "--------" + id[8:], id[:8] + "0" + id[9:],
		} {
			got := s.send(get("/auth/me").with("X-Request-Id", other)).Header.Get("X-Request-Id")
			s.expect(!strings.Contains(other, got) && !(seen[got]),
				"X-Request-Id %q became %q", other, got)
			seen[got] = true
		}
	}},
}
