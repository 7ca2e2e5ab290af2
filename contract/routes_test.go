package contract

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// What a route answers where all is well stands in the table named routes and is held on every
// answer; here is what each of them does.
var routePromises = []promise{
	{"POST /auth/signup opens an account and its first session", aURL, func(s *server) {
		c := s.signup()
		s.expect(uuidForm.MatchString(c.id) && c.last.str("user", "email") == c.email,
			"body %s", c.last.body)
		s.isNow(c.last.str("user", "createdAt"))
		c.lives()
	}},
	{"POST /auth/login opens another session", aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		s.expect(other.last.str("user", "id") == c.id && other.last.str("user", "email") == c.email,
			"body %s", other.last.body)
		other.lives()
		c.lives()
	}},
	{"POST /auth/refresh gives new tokens; the old refresh token is dead", aURL, func(s *server) {
		c := s.signup()
		old := *c
		c.rotate()
		s.expect(c.refresh != old.refresh && c.access != old.access && c.sid() == old.sid(),
			"a token was handed out twice, or the session's id has changed")
		c.show(old.refresh).refused("refresh_reused")
		c.lives()
	}},
	{"POST /auth/logout ends the session with its tokens, and no other", aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		c.logout().ok()
		c.gone()
		c.logout().refused("session_revoked")
		other.lives()
	}},
	{"GET /auth/me tells the user as PostgreSQL has it", stored, func(s *server) {
		c := s.signup()
		user, _ := c.me(c.access).json["user"].(map[string]any)
		delete(user, "emailVerified") // which signup does not tell
		same := fmt.Sprint(user) == fmt.Sprint(c.last.json["user"])
		s.expect(same, "me says another user than signup, %s", c.last.body)
		email := newEmail()
		at := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
		s.exec("UPDATE users SET email = $1, created_at = $2 WHERE id = $3", email, at, c.id)
		a := c.me(c.access).ok()
		s.expect(a.str("user", "email") == email && s.isTime(a.str("user", "createdAt")).Equal(at),
			"body %s", a.body)
	}},
	{"the account routes are 404 where the user is gone and the session is not", stored,
		func(s *server) {
			c := s.signup()
			s.exec("DELETE FROM users WHERE id = $1", c.id)
			a := c.me(c.access).refused("user_not_found")
			s.expect(a.json["error"] == "User not found", "body %s", a.body)
			c.changePassword(c.password, newPassword()).refused("user_not_found")
			c.deleteAccount(c.password).refused("user_not_found")
			if slices.Contains(s.routes(), "PUT /auth/email") {
				c.verification().refused("user_not_found")
				c.move(newEmail(), c.password).refused("user_not_found")
			}
		}},
	{"GET /auth/sessions lists the caller's sessions, newest use first", aURL, listsSessions},
	{"GET /auth/sessions tells ip and user agent, an endless one cut", aURL, func(s *server) {
		c := s.signup()
		for _, agent := range []string{"phone/1.0 Ψ", strings.Repeat("é", 5000)} {
			c.agent = agent
			device := c.login()
			got := device.sessions()[0]
			whole := got.UserAgent == agent || len(agent) > 50 && len(got.UserAgent) > 50
			s.expect(got.IP == device.ip && len(got.UserAgent) <= 1000 && whole &&
				strings.HasPrefix(agent, got.UserAgent),
				"the session is %v, want ip %s and agent %.20q", got, device.ip, agent)
		}
	}},
	{"DELETE /auth/sessions/{id} ends that session only", aURL, func(s *server) {
		c, stranger := s.signup(), s.signup()
		other, third := c.login(), c.login()
		c.revoke(other.sid()).ok().keepsCookie()
		other.gone()
		for _, id := range []string{other.sid(), stranger.sid(), newUUID(), "*", c.sid() + "x"} {
			c.revoke(id).refused("session_not_found")
		}
		s.expect(len(c.sessions()) == 2, "the sessions are %v, want 2", c.sessions())
		c.lives()
		c.revoke(c.sid()).ok().clearsCookie() // the caller's own
		c.gone()
		third.lives()
		stranger.lives()
	}},
	{"DELETE /auth/sessions logs out everywhere, this session too", aURL, func(s *server) {
		c, stranger := s.signup(), s.signup()
		other := c.login()
		c.revokeAll().ok().clearsCookie()
		c.gone()
		other.gone()
		stranger.lives()
		list := c.login().sessions()
		s.expect(len(list) == 1, "the sessions after a new login are %v", list)
	}},
	{"PUT /auth/password revokes every other session; this one goes on", aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		old, access := c.password, c.access
		c.changePassword(newPassword(), newPassword()).refused("invalid_credentials")
		other.lives()
		c.password = newPassword()
		c.changePassword(old, c.password).ok()
		other.gone()
		c.me(access).ok()
		c.lives()
		c.lives() // and its next refresh as well
		s.tryLogin(c.email, old, newIP()).refused("invalid_credentials")
		c.login().lives()
		c.changePassword(c.password, c.password).ok() // nothing speaks against the same again
	}},
	{"DELETE /auth/me deletes the user and all its sessions", aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		c.deleteAccount(newPassword()).refused("invalid_credentials")
		c.lives()
		c.deleteAccount(c.password).ok().clearsCookie()
		c.gone()
		other.gone()
		c.tryLogin().refused("invalid_credentials")
		again := s.trySignup(c.email, c.password).ok().str("user", "id")
		s.expect(again != c.id, "the new account has the id of the deleted one")
	}},
	{"GET /healthz and GET /readyz say that all is ok", aURL, func(s *server) {
		for _, path := range []string{"/healthz", "/readyz"} {
			for name, value := range s.send(get(path)).ok().json {
				s.expect(value == "ok", "%s: %s is %v", path, name, value)
			}
		}
	}},
	{"anything else is 404: paths are taken as written, never redirected", aURL, func(s *server) {
		c := s.signup()
		for _, path := range []string{
			"/", "/auth", "/auth/", "/auth/unknown", "/metrics", "/favicon.ico", "/debug/pprof/",
			"/auth/me/", "//auth/me", "/auth//me", "/auth/./me", "/auth/x/../me", "/AUTH/me",
			"/auth/Me", "/auth/%6de", "/auth%2fme", "/healthz/", "//healthz", "/auth/sessions/",
			"/auth/sessions/a/b",
		} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				a := c.elsewhere().send(to(method+" "+path)).shouldBe("not_found", path)
				s.expect(a.Header.Get("Location") == "",
					"%s redirects to %s", a, a.Header.Get("Location"))
			}
		}
		c.send(get("/auth/me?x=y")).ok()
	}},
	{"a known path with another method is 405 with Allow", aURL, func(s *server) {
		allowed := map[string][]string{}
		for _, route := range s.routes() {
			method, path, _ := strings.Cut(route, " ")
			allowed[path] = append(allowed[path], method)
			if method == "GET" {
				allowed[path] = append(allowed[path], "HEAD")
			}
		}
		for path, methods := range allowed {
			for _, method := range strings.Fields("GET POST PUT PATCH DELETE OPTIONS TRACE BREW") {
				if !slices.Contains(methods, method) {
					a := s.send(to(method + " " + path)).refused("method_not_allowed")
					a.lists("Allow", methods...)
				}
			}
		}
	}},
	{"HEAD goes where GET goes", aURL, func(s *server) {
		c := s.signup()
		for path, status := range map[string]int{
			"/healthz": 200, "/readyz": 200, "/auth/me": 200, "/auth/sessions": 200,
			"/auth/login": 405, "/nowhere": 404,
		} {
			a := c.send(to("HEAD " + path)).want(status)
			s.expect(len(a.body) == 0, "%s has a body", a)
		}
		s.send(to("HEAD /auth/me")).want(401)
	}},
}

func listsSessions(s *server) {
	c := s.signup()
	phone := c.login()
	c.login()
	s.signup()                       // somebody else, who must not be in it
	time.Sleep(2 * time.Millisecond) // times have milliseconds
	phone.rotate()
	list := c.sessions()
	var used []time.Time
	for _, x := range list {
		s.isNow(x.CreatedAt)
		lastUsed := s.isTime(x.LastUsedAt)
		refreshed := lastUsed.After(s.isTime(x.CreatedAt))
		s.expect(x.Current == (x.ID == c.sid()) && refreshed == (x.ID == phone.sid()),
			"current or last used is wrong in %v", x)
		used = append(used, lastUsed)
	}
	sorted := slices.IsSortedFunc(used, func(a, b time.Time) int { return b.Compare(a) })
	s.expect(len(list) == 3 && list[0].ID == phone.sid() && sorted,
		"the list is %v, want three sessions with the phone first", list)
}
