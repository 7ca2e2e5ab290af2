package chaos

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"
)

// An answer is what became of one request. If err is set, there was no answer, and status is 0.
type answer struct {
	status int
	code   string
	body   string
	header http.Header
	took   time.Duration
	err    error
}

func (a answer) String() string {
	if a.err != nil {
		return fmt.Sprintf("%v after %v", a.err, a.took.Round(time.Millisecond))
	}
	return strings.Join(strings.Fields(fmt.Sprintf("%d %s", a.status, a.code)), " ") +
		fmt.Sprintf(" after %v", a.took.Round(time.Millisecond))
}

// ok tells whether the request succeeded.
func (a answer) ok() bool { return a.status >= 200 && a.status < 300 }

// A user is one who asks a server. A user makes one request at a time; copies may ask at once.
type user struct {
	server   *server
	email    string
	password string
	access   string // the access token that was given last
	cookie   string // the refresh token that was given last
	ip       string // the address that the server sees
}

// newUser makes up a user, who has no account yet.
func newUser(s *server) *user {
	return &user{
		server:   s,
		email:    strings.ToLower(rand.Text()) + "@example.com",
		password: "password " + rand.Text(),
		ip:       randomIP(),
	}
}

// signedUp makes up a user and signs them up, which must succeed.
func signedUp(t *testing.T, s *server) *user {
	t.Helper()
	u := newUser(s)
	if a := u.signup(); a.status != http.StatusCreated {
		t.Fatalf("signup: %v", a)
	}
	return u
}

func randomIP() string {
	n := mathrand.Uint32()
	return fmt.Sprintf("10.%d.%d.%d", n>>16&0xff, n>>8&0xff, n&0xff)
}

// at makes the user ask another server from now on.
func (u *user) at(s *server) *user {
	u.server = s
	return u
}

// copy is the same user with the same tokens in another browser.
func (u *user) copy() *user {
	other := *u
	return &other
}

func (u *user) signup() answer {
	return u.ask("POST", "/auth/signup", u.credentials())
}

func (u *user) login() answer {
	return u.ask("POST", "/auth/login", u.credentials())
}

func (u *user) credentials() map[string]string {
	return map[string]string{"email": u.email, "password": u.password}
}

func (u *user) refresh() answer { return u.ask("POST", "/auth/refresh", nil) }

func (u *user) logout() answer { return u.ask("POST", "/auth/logout", nil) }

func (u *user) me() answer { return u.ask("GET", "/auth/me", nil) }

func (u *user) sessions() answer { return u.ask("GET", "/auth/sessions", nil) }

func (u *user) revoke(session string) answer {
	return u.ask("DELETE", "/auth/sessions/"+session, nil)
}

func (u *user) revokeAll() answer { return u.ask("DELETE", "/auth/sessions", nil) }

// changePassword changes the password to next. The user remembers it if the server has.
func (u *user) changePassword(next string) answer {
	a := u.ask("PUT", "/auth/password", map[string]string{
		"currentPassword": u.password,
		"newPassword":     next,
	})
	if a.ok() {
		u.password = next
	}
	return a
}

func (u *user) forgot() answer {
	return u.ask("POST", "/auth/password/forgot", map[string]string{"email": u.email})
}

// reset changes the password to another with the token of a link. The user remembers it if the
// server has.
func (u *user) reset(token string) answer {
	next := "password " + rand.Text()
	a := u.ask("POST", "/auth/password/reset", map[string]string{
		"token":       token,
		"newPassword": next,
	})
	if a.ok() {
		u.password = next
	}
	return a
}

func (u *user) sendVerification() answer { return u.ask("POST", "/auth/email/verification", nil) }

func (u *user) verify(token string) answer {
	return u.ask("POST", "/auth/email/verify", map[string]string{"token": token})
}

// changeEmail asks for a mail to another address, with a link that changes the user's to that.
func (u *user) changeEmail(next string) answer {
	return u.ask("PUT", "/auth/email", map[string]string{
		"newEmail": next,
		"password": u.password,
	})
}

func (u *user) deleteAccount() answer {
	return u.ask("DELETE", "/auth/me", map[string]string{"password": u.password})
}

// otherSession is the id of a session in a list that is not the current one. It is empty if there
// is none.
func otherSession(list answer) string {
	var members struct {
		Sessions []struct {
			ID      string
			Current bool
		}
	}
	json.Unmarshal([]byte(list.body), &members) // what is no JSON has no sessions
	for _, session := range members.Sessions {
		if !session.Current {
			return session.ID
		}
	}
	return ""
}

// ask sends one request with all tokens that the user has, and keeps the tokens of the answer.
func (u *user) ask(method, path string, body map[string]string) answer {
	encoded, _ := json.Marshal(body) // a map of strings always encodes
	req, err := http.NewRequest(method, u.server.url+path, nil)
	if err != nil {
		return answer{err: err}
	}
	if body != nil {
		req.Body = io.NopCloser(bytes.NewReader(encoded))
		req.ContentLength = int64(len(encoded))
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("X-Forwarded-For", u.ip)
	if u.access != "" {
		req.Header.Set("Authorization", "Bearer "+u.access)
	}
	if u.cookie != "" {
		req.AddCookie(&http.Cookie{Name: "refreshToken", Value: u.cookie})
	}
	began := time.Now()
	a := u.send(req)
	a.took = time.Since(began)
	return a
}

func (u *user) send(req *http.Request) answer {
	resp, err := u.server.http.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{err: err}
	}
	var members struct {
		Code        string
		AccessToken string
	}
	json.Unmarshal(text, &members) // what is no JSON has no code, and no test expects that
	if members.AccessToken != "" {
		u.access = members.AccessToken
	}
	for _, cookie := range resp.Cookies() {
		if cookie.Name == "refreshToken" {
			u.cookie = cookie.Value
		}
	}
	return answer{
		status: resp.StatusCode,
		code:   members.Code,
		body:   string(text),
		header: resp.Header,
	}
}
