package integration

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// contractRoutes is the contract's table of routes.
var contractRoutes = []string{
	"POST /auth/signup", "POST /auth/login", "POST /auth/refresh", "POST /auth/logout",
	"GET /auth/me", "GET /auth/sessions", "DELETE /auth/sessions/{id}", "DELETE /auth/sessions",
	"PUT /auth/password", "DELETE /auth/me", "GET /healthz", "GET /readyz",
}

var routes = []promise{
	{"POST /auth/signup is 201 with the user, an access token and the refresh cookie", aURL, func(t *testing.T, s *server) {
		email, password := newEmail(), newPassword()
		a := s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{email, password}}).want(201)
		members(t, a.json, "message", "user", "accessToken")
		user := a.json["user"].(map[string]any)
		members(t, user, "id", "email", "createdAt")
		if a.json["message"] != "User created successfully" || user["email"] != email || !uuidPattern.MatchString(a.str("user", "id")) {
			t.Errorf("body %s", a.body)
		}
		isNow(t, a.str("user", "createdAt"))
		s.assertRefreshCookie(a)
		v := &visitor{t: t, s: s, ip: newIP()}
		v.take(a)
		v.lives()
	}},
	{"POST /auth/login is 200 with the user, an access token and the refresh cookie", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		a := s.tryLogin(t, v.email, v.password, "").want(200)
		members(t, a.json, "message", "user", "accessToken")
		members(t, a.json["user"].(map[string]any), "id", "email")
		if a.json["message"] != "Login successful" || a.str("user", "id") != v.id || a.str("user", "email") != v.email {
			t.Errorf("body %s", a.body)
		}
		s.assertRefreshCookie(a)
		v.take(a)
		v.lives()
	}},
	{"POST /auth/refresh is 200 with an access token and a new refresh cookie; the old token is dead from then on", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		old, oldAccess := v.refresh, v.access
		a := v.rotate()
		members(t, a.json, "accessToken")
		s.assertRefreshCookie(a)
		if v.refresh == old || v.access == oldAccess {
			t.Error("a token was handed out twice")
		}
		v.show(old).refused(401, "refresh_reused")
		v.lives()
	}},
	{"POST /auth/logout is 200; the session is gone, its access and refresh tokens with it, and the cookie is cleared", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		a := v.send("POST", "/auth/logout", nil).want(200).clearsCookie()
		members(t, a.json, "message")
		if a.json["message"] != "Logout successful" {
			t.Errorf("body %s", a.body)
		}
		v.gone()
	}},
	{"POST /auth/logout takes the refresh cookie alone", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.send(t, request{method: "POST", path: "/auth/logout", cookie: v.refresh}).want(200).clearsCookie()
		v.gone()
	}},
	{"POST /auth/logout takes the refresh cookie when the access token has expired", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.send(t, request{method: "POST", path: "/auth/logout", cookie: v.refresh, bearer: s.expired(v.access)}).want(200).clearsCookie()
		v.gone()
	}},
	{"GET /auth/me is 200 with the user", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		a := v.send("GET", "/auth/me", nil).want(200)
		members(t, a.json, "user")
		members(t, a.json["user"].(map[string]any), "id", "email", "createdAt")
		if a.str("user", "id") != v.id || a.str("user", "email") != v.email {
			t.Errorf("body %s", a.body)
		}
		isNow(t, a.str("user", "createdAt"))
	}},
	{"GET /auth/me is read from PostgreSQL", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		email := newEmail()
		s.st.exec(t, "UPDATE users SET email = $1, created_at = '2001-02-03 04:05:06' WHERE id = $2", email, v.id)
		a := v.send("GET", "/auth/me", nil).want(200)
		if a.str("user", "email") != email || !strings.HasPrefix(a.str("user", "createdAt"), "2001-02-03T04:05:06") {
			t.Errorf("body %s", a.body)
		}
	}},
	{"GET /auth/me is 404 User not found if the account is gone", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.st.exec(t, "DELETE FROM users WHERE id = $1", v.id)
		a := v.send("GET", "/auth/me", nil).refused(404, "user_not_found")
		if a.json["error"] != "User not found" {
			t.Errorf("body %s", a.body)
		}
	}},
	{"PUT /auth/password and DELETE /auth/me are 404 user_not_found if the account is gone", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.st.exec(t, "DELETE FROM users WHERE id = $1", v.id)
		v.send("PUT", "/auth/password", passwordChange{v.password, newPassword()}).refused(404, "user_not_found")
		v.send("DELETE", "/auth/me", passwordOnly{v.password}).refused(404, "user_not_found")
	}},
	{"GET /auth/sessions lists the caller's sessions, newest use first", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		others := []*visitor{v.login(), v.login(), v.login()}
		s.signup(t) // somebody else, who must not be in it
		// The time of use may be kept in whole seconds: the refresh must be later than the logins by more than that.
		time.Sleep(1100 * time.Millisecond)
		others[1].agent = "another agent"
		others[1].rotate()
		sessions := v.sessions()
		if len(sessions) != 4 {
			t.Fatalf("%d sessions, want 4", len(sessions))
		}
		if sessions[0]["id"] != others[1].sid() {
			t.Error("the session that was refreshed last is not first")
		}
		used := []time.Time{}
		for _, x := range sessions {
			members(t, x, "id", "createdAt", "lastUsedAt", "ip", "userAgent", "current")
			if x["current"] != (x["id"] == v.sid()) {
				t.Errorf("current is wrong in %v", x)
			}
			isNow(t, x["createdAt"].(string))
			isNow(t, x["lastUsedAt"].(string))
			used = append(used, isTime(t, x["lastUsedAt"].(string)))
		}
		if !slices.IsSortedFunc(used, func(a, b time.Time) int { return b.Compare(a) }) {
			t.Errorf("not newest first: %v", used)
		}
	}},
	{"GET /auth/sessions tells each session's ip and user agent", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		v.agent = "Ψ agent/1.0 (" + strings.Repeat("x", 40) + ")"
		v.ip = newIP()
		v.take(s.send(t, request{method: "POST", path: "/auth/login", body: credentials{v.email, v.password}, ip: v.ip, agent: v.agent}).want(200))
		for _, x := range v.sessions() {
			if x["current"] == true && (x["ip"] != v.ip || x["userAgent"] != v.agent) {
				t.Errorf("session %v, want ip %s and agent %q", x, v.ip, v.agent)
			}
		}
	}},
	{"DELETE /auth/sessions/{id} is 200 and ends that session only", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other, third := v.login(), v.login()
		a := v.send("DELETE", "/auth/sessions/"+other.sid(), nil).want(200)
		members(t, a.json, "message")
		if a.json["message"] != "Session revoked" {
			t.Errorf("body %s", a.body)
		}
		other.gone()
		if n := len(v.sessions()); n != 2 {
			t.Errorf("%d sessions listed, want 2", n)
		}
		v.lives()
		third.lives()
	}},
	{"DELETE /auth/sessions/{id} is 404 for one that is not the caller's", aURL, func(t *testing.T, s *server) {
		v, stranger := s.signup(t), s.signup(t)
		for _, id := range []string{stranger.sid(), uuid.NewString(), "not-a-uuid", "*"} {
			v.send("DELETE", "/auth/sessions/"+id, nil).refused(404, "session_not_found")
		}
		gone := v.login()
		gone.send("POST", "/auth/logout", nil).want(200)
		v.send("DELETE", "/auth/sessions/"+gone.sid(), nil).refused(404, "session_not_found")
		stranger.lives()
	}},
	{"DELETE /auth/sessions is 200 and logs out everywhere, this session too", aURL, func(t *testing.T, s *server) {
		v, stranger := s.signup(t), s.signup(t)
		others := []*visitor{v.login(), v.login()}
		a := v.send("DELETE", "/auth/sessions", nil).want(200)
		members(t, a.json, "message")
		if a.json["message"] != "All sessions revoked" {
			t.Errorf("body %s", a.body)
		}
		for _, x := range append(others, v) {
			x.gone()
		}
		stranger.lives()
		if n := len(v.login().sessions()); n != 1 {
			t.Errorf("%d sessions after a new login, want 1", n)
		}
	}},
	{"PUT /auth/password is 200; every other session is revoked, this one goes on", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		password := newPassword()
		a := v.send("PUT", "/auth/password", passwordChange{v.password, password}).want(200)
		members(t, a.json, "message")
		if a.json["message"] != "Password changed" {
			t.Errorf("body %s", a.body)
		}
		other.gone()
		v.lives()
		v.lives() // and its next refresh as well
		s.tryLogin(t, v.email, v.password, "").refused(401, "invalid_credentials")
		v.password = password
		v.login().lives()
	}},
	{"DELETE /auth/me is 200; the user row and all its sessions are gone", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		a := v.send("DELETE", "/auth/me", passwordOnly{v.password}).want(200)
		members(t, a.json, "message")
		if a.json["message"] != "Account deleted" {
			t.Errorf("body %s", a.body)
		}
		v.gone()
		other.gone()
		s.tryLogin(t, v.email, v.password, "").refused(401, "invalid_credentials")
		again := s.send(t, request{method: "POST", path: "/auth/signup", body: credentials{v.email, newPassword()}}).want(201)
		if again.str("user", "id") == v.id {
			t.Error("the new account has the id of the deleted one")
		}
	}},
	{"GET /healthz is 200 {status: ok}", aURL, func(t *testing.T, s *server) {
		a := s.send(t, request{method: "GET", path: "/healthz"}).want(200)
		members(t, a.json, "status")
		if a.json["status"] != "ok" {
			t.Errorf("body %s", a.body)
		}
	}},
	{"GET /readyz is 200 {status: ok, postgres: ok, redis: ok}", aURL, func(t *testing.T, s *server) {
		a := s.send(t, request{method: "GET", path: "/readyz"}).want(200)
		members(t, a.json, "status", "postgres", "redis")
		if a.json["status"] != "ok" || a.json["postgres"] != "ok" || a.json["redis"] != "ok" {
			t.Errorf("body %s", a.body)
		}
	}},
	{"anything else is 404", aURL, func(t *testing.T, s *server) {
		for _, path := range []string{"/", "/auth", "/metrics", "/auth/unknown", "/auth/sessions/a/b", "/index.html", "/favicon.ico", "/.env", "/debug/pprof/"} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				s.send(t, request{method: method, path: path}).refused(404, "not_found")
			}
		}
	}},
	{"paths are taken as written: a trailing slash, // or another case is 404, never a redirect", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, path := range []string{"/auth/me/", "//auth/me", "/auth//me", "/auth/./me", "/auth/x/../me", "/AUTH/me", "/auth/Me", "/healthz/", "//healthz", "/auth/sessions/"} {
			v.send("GET", path, nil).refused(404, "not_found")
			if path != "/auth/sessions/" {
				v.send("POST", path, nil).refused(404, "not_found")
			}
		}
		s.send(t, request{method: "POST", path: "/auth/login/", body: credentials{v.email, v.password}}).refused(404, "not_found")
	}},
	{"a known path with another method is 405 with Allow", aURL, func(t *testing.T, s *server) {
		for path, allowed := range map[string]string{
			"/auth/signup": "POST", "/auth/login": "POST", "/auth/refresh": "POST", "/auth/logout": "POST",
			"/auth/me": "GET HEAD DELETE", "/auth/sessions": "GET HEAD DELETE", "/auth/password": "PUT",
			"/auth/sessions/" + uuid.NewString(): "DELETE", "/healthz": "GET HEAD", "/readyz": "GET HEAD",
		} {
			for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"} {
				if slices.Contains(strings.Fields(allowed), method) {
					continue
				}
				a := s.send(t, request{method: method, path: path}).refused(405, "method_not_allowed")
				for _, m := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
					if want := slices.Contains(strings.Fields(allowed), m); strings.Contains(a.Header.Get("Allow"), m) != want {
						t.Errorf("%s %s: Allow is %q, of %q", method, path, a.Header.Get("Allow"), allowed)
					}
				}
			}
		}
	}},
	{"HEAD goes where GET goes", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, path := range []string{"/healthz", "/readyz", "/auth/me", "/auth/sessions"} {
			if a := v.send("HEAD", path, nil).want(200); len(a.body) != 0 {
				t.Errorf("HEAD %s has a body", path)
			}
		}
		s.send(t, request{method: "HEAD", path: "/auth/me"}).want(401)
		s.send(t, request{method: "HEAD", path: "/auth/login"}).want(405)
		s.send(t, request{method: "HEAD", path: "/nowhere"}).want(404)
	}},
}

// assertRefreshCookie is the cookie's line in the contract.
func (s *server) assertRefreshCookie(a *answer) {
	a.t.Helper()
	c := a.refreshCookie()
	sameSite := map[string]http.SameSite{"strict": http.SameSiteStrictMode, "lax": http.SameSiteLaxMode, "none": http.SameSiteNoneMode}
	if c.Path != "/auth" || !c.HttpOnly || c.Domain != "" || c.SameSite != sameSite[s.conf("COOKIE_SAMESITE")] ||
		c.Secure != (s.conf("NODE_ENV") != "development") {
		a.t.Errorf("%s: Set-Cookie %q", a.sent, c.Raw)
	}
	claims := claimsOf(a.t, c.Value)
	if life := claims["exp"].(float64) - claims["iat"].(float64); c.MaxAge != int(life) {
		a.t.Errorf("%s: %s, but the token lives %v seconds", a.sent, fmt.Sprintf("Max-Age=%d", c.MaxAge), life)
	}
}
