package integration

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// raceRounds is how often a race is run: enough to meet a window of a few instructions on a busy machine.
const raceRounds = 15

// shortLeeway servers forgive a reused token for a second only, so that tests need not wait long for theft.
var shortLeeway = development.with(vars{"REFRESH_REUSE_LEEWAY": "1s"})

// afterLeeway waits until a second's leeway is over, with a server's clock in whole seconds.
func afterLeeway() { time.Sleep(2100 * time.Millisecond) }

// blacklistKey is the contract's key of a refresh token that was exchanged or logged out.
func blacklistKey(t testing.TB, refresh string) string {
	claims := claimsOf(t, refresh)
	return "blacklist:{" + claims["sid"].(string) + "}:" + claims["jti"].(string)
}

func (st *stores) exec(t testing.TB, query string, args ...any) {
	t.Helper()
	if _, err := st.sql.Exec(t.Context(), query, args...); err != nil {
		t.Fatal(err)
	}
}

// evict deletes a key, as Redis does when memory is short.
func (st *stores) evict(t testing.TB, key string) {
	t.Helper()
	if n, err := st.keys.Del(t.Context(), key).Result(); err != nil || n != 1 {
		t.Fatalf("delete %s: %d, %v", key, n, err)
	}
}

var rotation = []promise{
	{"of any number of simultaneous refreshes exactly one is 200; the others are 401 refresh_reused with no cookie header", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for range raceRounds {
			answers := together(8, func(int) *answer { return v.fromNewIP().show(v.refresh) })
			v.takeTheOne(answers)
		}
		v.lives()
	}},
	{"exactly one across two servers too", own, func(t *testing.T, one *server) {
		two := serve(t, home, development)
		v := one.signup(t)
		for range raceRounds {
			answers := together(8, func(i int) *answer { return v.on([]*server{one, two}[i%2]).fromNewIP().show(v.refresh) })
			v.takeTheOne(answers)
		}
		v.on(two).lives()
	}},
	{"a token shown again within the leeway gets only that 401", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		old := v.refresh
		v.rotate()
		for range 3 {
			v.show(old).refused(401, "refresh_reused").keepsCookie()
		}
		v.lives()
	}},
	{"a token shown again later is theft: the 401 also revokes the whole session and clears the cookie", own, func(t *testing.T, _ *server) {
		s := serve(t, home, shortLeeway)
		v := s.signup(t)
		other := v.login()
		old := v.refresh
		v.rotate()
		afterLeeway()
		v.show(old).refused(401, "refresh_reused").clearsCookie()
		v.gone()
		other.lives() // the user's other session has nothing to do with it
		if n := len(other.sessions()); n != 1 {
			t.Errorf("%d sessions listed, want 1", n)
		}
	}},
	{"the leeway counts from the exchange, not from the last use of the session", own, func(t *testing.T, _ *server) {
		s := serve(t, home, shortLeeway)
		v := s.signup(t)
		old := v.refresh
		v.rotate()
		afterLeeway()
		v.rotate() // a fresh exchange of another token does not forgive the old one's reuse
		v.show(old).refused(401, "refresh_reused").clearsCookie()
		v.gone()
	}},
	{"any other 401 of refresh clears the cookie too", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.send(t, request{method: "POST", path: "/auth/refresh"}).refused(401, "missing_token").clearsCookie()
		v.show("nonsense").refused(401, "invalid_token").clearsCookie()
		v.send("DELETE", "/auth/sessions/"+v.sid(), nil).want(200)
		v.show(v.refresh).refused(401, "session_revoked").clearsCookie()
	}},
	{"a token of a living session that is not its current one is refresh_reused, whether or not its blacklist key is there", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		old := v.refresh
		v.rotate()
		s.st.evict(t, blacklistKey(t, old))
		v.show(old).refused(401, "refresh_reused").keepsCookie() // exchanged last, just now: the session remembers
		v.lives()
	}},
	{"with the blacklist key evicted, anything older than the last exchange is theft", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		old := v.refresh
		v.rotate()
		v.rotate()
		s.st.evict(t, blacklistKey(t, old))
		v.show(old).refused(401, "refresh_reused").clearsCookie()
		v.gone()
	}},
	{"an access token from before a refresh stays good until its exp", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		old := v.access
		v.rotate()
		v.rotate()
		v.me(old).want(200)
	}},
	{"resend: within the leeway the token exchanged last gets 200 and the same Set-Cookie line byte for byte", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"REFRESH_REUSE_POLICY": "resend"}))
		v := s.signup(t)
		old := v.refresh
		first := v.rotate()
		time.Sleep(1100 * time.Millisecond) // a Max-Age reckoned from now would show
		again := v.show(old).want(200)
		if a, b := first.Header.Values("Set-Cookie"), again.Header.Values("Set-Cookie"); len(a) != 1 || len(b) != 1 || a[0] != b[0] {
			t.Errorf("the successor differs:\n%q\n%q", a, b)
		}
		s.assertRefreshCookie(again)
		access := again.str("accessToken")
		if access == first.str("accessToken") {
			t.Error("the access token is no fresh one")
		}
		members(t, again.json, "accessToken")
		v.me(access).want(200)
		v.lives()
	}},
	{"resend: no older token than the one exchanged last is answered, and the chain never forks", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"REFRESH_REUSE_POLICY": "resend"}))
		v := s.signup(t)
		oldest := v.refresh
		v.rotate()
		older := v.refresh
		v.rotate()
		v.show(oldest).refused(401, "refresh_reused").keepsCookie()
		if v.show(older).want(200).refreshCookie().Value != v.refresh {
			t.Error("the chain forked")
		}
		for range raceRounds {
			lines := map[string]bool{}
			answers := together(8, func(int) *answer { return v.fromNewIP().show(v.refresh) })
			for _, a := range answers {
				lines[a.want(200).Header.Get("Set-Cookie")] = true
			}
			if len(lines) != 1 {
				t.Fatalf("%d successors of one token", len(lines))
			}
			v.take(answers[0])
		}
		v.lives()
	}},
	{"resend: later than the leeway it is theft all the same", own, func(t *testing.T, _ *server) {
		s := serve(t, home, shortLeeway.with(vars{"REFRESH_REUSE_POLICY": "resend"}))
		v := s.signup(t)
		old := v.refresh
		v.rotate()
		afterLeeway()
		v.show(old).refused(401, "refresh_reused").clearsCookie()
		v.gone()
	}},
	{"resend: a token of a session that was revoked meanwhile gets nothing", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"REFRESH_REUSE_POLICY": "resend"}))
		for name, revoke := range map[string]func(v, other *visitor) *answer{
			"logout": func(v, _ *visitor) *answer { return v.send("POST", "/auth/logout", nil) },
			"by id":  func(v, other *visitor) *answer { return other.send("DELETE", "/auth/sessions/"+v.sid(), nil) },
			"all":    func(_, other *visitor) *answer { return other.send("DELETE", "/auth/sessions", nil) },
			"password": func(v, other *visitor) *answer {
				return other.send("PUT", "/auth/password", passwordChange{v.password, newPassword()})
			},
			"account": func(v, other *visitor) *answer { return other.send("DELETE", "/auth/me", passwordOnly{v.password}) },
		} {
			v := s.signup(t)
			other := v.login()
			old := v.refresh
			v.rotate()
			revoke(v, other).want(200)
			if a := v.show(old); a.status() != 401 {
				t.Errorf("%s: %d %s", name, a.status(), a.body)
			}
			v.gone()
		}
	}},
	{"a session that has run out is not listed", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"REFRESH_TOKEN_TTL": "3s"}))
		v := s.signup(t)
		ids := func() (ids []any) {
			for _, x := range v.login().sessions() {
				ids = append(ids, x["id"])
			}
			return ids
		}
		if !slices.Contains(ids(), any(v.sid())) {
			t.Error("the living session is not listed")
		}
		eventually(t, 15*time.Second, "the session is listed no more", func() bool { return !slices.Contains(ids(), any(v.sid())) })
	}},
	{"a session lives at most SESSION_MAX_TTL, however often it is refreshed", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"SESSION_MAX_TTL": "5s", "REFRESH_TOKEN_TTL": "4s"}))
		v := s.signup(t)
		end := int64(claimsOf(t, v.refresh)["iat"].(float64)) + 5
		eventually(t, 15*time.Second, "the session ends", func() bool {
			a := v.fromNewIP().show(v.refresh)
			if a.status() != 200 {
				return a.want(401) != nil
			}
			v.take(a)
			if exp := int64(claimsOf(t, v.refresh)["exp"].(float64)); exp > end+1 { // one second for the rounding of two clocks
				t.Fatalf("a refresh token passes the session's end by %d s", exp-end)
			}
			return false
		})
		if now := time.Now().Unix(); now < end-2 || now > end+3 {
			t.Errorf("the session ended %d s from its end", now-end)
		}
	}},
	{"a longer REFRESH_TOKEN_TTL is capped by SESSION_MAX_TTL", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"SESSION_MAX_TTL": "1h", "REFRESH_TOKEN_TTL": "2h"}))
		v := s.signup(t)
		for range 2 {
			claims := claimsOf(t, v.refresh)
			if life := claims["exp"].(float64) - claims["iat"].(float64); life > 3600 || life < 3590 {
				t.Errorf("the refresh token lives %v s, want 3600", life)
			}
			s.assertRefreshCookie(v.rotate())
		}
	}},
}

// takeTheOne asserts that exactly one of simultaneous refreshes won, and takes its tokens.
func (v *visitor) takeTheOne(answers []*answer) {
	v.t.Helper()
	if n := count(answers, 200); n != 1 {
		v.t.Fatalf("%d of %d simultaneous refreshes got 200", n, len(answers))
	}
	for _, a := range answers {
		if a.status() == 200 {
			v.take(a)
		} else {
			a.refused(401, "refresh_reused").keepsCookie()
		}
	}
}

// race refreshes a session while it is revoked, and asserts that nothing of it is left. The refresh may win or lose.
func race(t *testing.T, s *server, revoke func(v, other *visitor) *answer) {
	t.Helper()
	won := 0
	for range raceRounds {
		v := s.signup(t)
		other := v.login()
		answers := together(4, func(i int) *answer {
			if i == 0 {
				return revoke(v, other)
			}
			return other.fromNewIP().show(other.refresh)
		})
		answers[0].want(200)
		other.gone()
		for _, a := range answers[1:] {
			if a.status() == 200 {
				won++
				other.take(a)
				other.gone()
			}
		}
	}
	t.Logf("the refresh came first in %d of %d rounds", won, raceRounds)
}

// rehashRace logs in on two servers while two sessions of the user, who signed up on cheap, are refreshed.
func rehashRace(t *testing.T, cheap *server, logins ...*server) {
	t.Helper()
	for range raceRounds {
		v := cheap.signup(t)
		other := v.login()
		answers := together(4, func(i int) *answer {
			switch i {
			case 0:
				return other.show(other.refresh)
			case 1:
				return v.show(v.refresh)
			default:
				return logins[i-2].tryLogin(t, v.email, v.password, "")
			}
		})
		for i, x := range []*visitor{other, v, v.fromNewIP(), v.fromNewIP()} {
			x.take(answers[i].want(200))
			x.lives()
		}
	}
}

var revocation = []promise{
	{"a refresh in flight while its session is logged out never brings it back", aURL, func(t *testing.T, s *server) {
		race(t, s, func(v, other *visitor) *answer { return other.send("POST", "/auth/logout", nil) })
	}},
	{"a refresh in flight while its session is revoked by id never brings it back", aURL, func(t *testing.T, s *server) {
		race(t, s, func(v, other *visitor) *answer { return v.send("DELETE", "/auth/sessions/"+other.sid(), nil) })
	}},
	{"a refresh in flight while all sessions are revoked never brings it back", aURL, func(t *testing.T, s *server) {
		race(t, s, func(v, other *visitor) *answer { return v.send("DELETE", "/auth/sessions", nil) })
	}},
	{"a refresh in flight while the password is changed never brings its session back", aURL, func(t *testing.T, s *server) {
		race(t, s, func(v, other *visitor) *answer {
			return v.send("PUT", "/auth/password", passwordChange{v.password, newPassword()})
		})
	}},
	{"a refresh in flight while the account is deleted never brings its session back", aURL, func(t *testing.T, s *server) {
		race(t, s, func(v, other *visitor) *answer { return v.send("DELETE", "/auth/me", passwordOnly{v.password}) })
	}},
	{"a login with the old password in flight while it is changed leaves no session that refreshes", aURL, func(t *testing.T, s *server) {
		won := 0
		for range raceRounds {
			v := s.signup(t)
			answers := together(4, func(i int) *answer {
				if i == 0 {
					return v.send("PUT", "/auth/password", passwordChange{v.password, newPassword()})
				}
				return s.tryLogin(t, v.email, v.password, "")
			})
			answers[0].want(200)
			for _, a := range answers[1:] {
				if a.status() == 200 {
					won++
					v.show(a.refreshCookie().Value).want(401)
				}
			}
			v.lives()
		}
		t.Logf("a login came first %d times in %d rounds", won, raceRounds)
	}},
	{"a session ends at its next refresh when the password hash in PostgreSQL was changed by other means", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		hash, err := bcrypt.GenerateFromPassword([]byte("set by an administrator"), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		s.st.exec(t, "UPDATE users SET password_hash = $1 WHERE id = $2", string(hash), v.id)
		for _, x := range []*visitor{v, other} {
			x.show(x.refresh).refused(401, "session_revoked").clearsCookie()
			x.gone()
		}
		v.password = "set by an administrator"
		v.login().lives()
	}},
	{"a refresh token whose user is gone is session_revoked", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.st.exec(t, "DELETE FROM users WHERE id = $1", v.id)
		v.show(v.refresh).refused(401, "session_revoked").clearsCookie()
		v.gone()
	}},
	{"a rehash at login (another cost) carries every session of the user along", own, func(t *testing.T, cheap *server) {
		dear := serve(t, home, development.with(vars{"BCRYPT_COST": "5"}))
		v := cheap.signup(t)
		other := v.login()
		third := v.on(dear).login()
		var hash string
		if err := home.sql.QueryRow(t.Context(), "SELECT password_hash FROM users WHERE id = $1", v.id).Scan(&hash); err != nil {
			t.Fatal(err)
		}
		if cost, err := bcrypt.Cost([]byte(hash)); err != nil || cost != 5 {
			t.Errorf("the cost after the login is %d (%v), want 5", cost, err)
		}
		v.lives()
		other = other.on(dear)
		other.lives()
		third.lives()
		v.login().lives() // back to the cost of 4
		other.lives()
	}},
	{"a rehash ends no session that is refreshed meanwhile", own, func(t *testing.T, cheap *server) {
		dear := serve(t, home, development.with(vars{"BCRYPT_COST": "5"}))
		rehashRace(t, cheap, dear, dear)
	}},
	{"nor do rehashes of replicas with different costs, as in a rolling change", own, func(t *testing.T, cheap *server) {
		dear := serve(t, home, development.with(vars{"BCRYPT_COST": "5"}))
		rehashRace(t, cheap, cheap, dear)
	}},
	{"session_revoked is 401 for a never exchanged token whose session was logged out or revoked", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		revoked, loggedOut := v.login(), v.login()
		v.send("DELETE", "/auth/sessions/"+revoked.sid(), nil).want(200)
		loggedOut.send("POST", "/auth/logout", nil).want(200)
		for _, x := range []*visitor{revoked, loggedOut} {
			x.show(x.refresh).refused(401, "session_revoked").clearsCookie()
			x.me(x.access).refused(401, "session_revoked")
		}
	}},
	{"logout: a valid Bearer token decides, whatever the cookie is", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: v.access, cookie: other.refresh}).want(200).clearsCookie()
		v.gone()
		other.lives()
		// The session of this Bearer is over, which the cookie of another does not mend.
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: v.access, cookie: other.refresh}).refused(401, "session_revoked").clearsCookie()
		other.lives()
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: other.access, cookie: "nonsense"}).want(200).clearsCookie()
		other.gone()
	}},
	{"logout: the cookie does not count beside an invalid Bearer", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: "nonsense", cookie: v.refresh}).refused(401, "invalid_token").clearsCookie()
		v.lives()
	}},
	{"logout: its 401 clears the cookie", aURL, func(t *testing.T, s *server) {
		s.send(t, request{method: "POST", path: "/auth/logout"}).refused(401, "missing_token").clearsCookie()
		s.send(t, request{method: "POST", path: "/auth/logout", cookie: "nonsense"}).refused(401, "invalid_token").clearsCookie()
		v := s.signup(t)
		v.send("POST", "/auth/logout", nil).want(200)
		v.send("POST", "/auth/logout", nil).refused(401, "session_revoked").clearsCookie()
		s.send(t, request{method: "POST", path: "/auth/logout", cookie: v.refresh}).want(401).clearsCookie()
	}},
	{"revocation holds on every replica at once", own, func(t *testing.T, one *server) {
		two := serve(t, home, development)
		v := one.signup(t)
		v.on(two).me(v.access).want(200)
		v.send("POST", "/auth/logout", nil).want(200)
		v.on(two).gone()
	}},
	{"if Redis loses its data, sessions end, users log in again, and a dead token never comes back to life", own, func(t *testing.T, _ *server) {
		s := serve(t, fresh(t), development)
		v := s.signup(t)
		dead := v.refresh
		v.rotate()
		if err := s.st.keys.FlushDB(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		v.me(v.access).refused(401, "session_revoked")
		v.show(v.refresh).refused(401, "session_revoked").clearsCookie()
		again := v.login()
		v.show(dead).want(401)
		v.gone()
		again.lives()
	}},
	{"a refresh reads the user: its access token has the email of PostgreSQL", kept, func(t *testing.T, s *server) {
		v := s.signup(t)
		email := newEmail()
		s.st.exec(t, "UPDATE users SET email = $1 WHERE id = $2", email, v.id)
		v.rotate()
		if claimsOf(t, v.access)["email"] != email {
			t.Errorf("email %v, want %s", claimsOf(t, v.access)["email"], email)
		}
	}},
}
