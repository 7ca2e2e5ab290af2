package main

// auth.go is what the routes under /auth decide, and the hashing of passwords.

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/mail"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"golang.org/x/crypto/bcrypt"
)

const (
	maxBodyBytes     = 100 << 10
	maxEmailBytes    = 254 // RFC 5321 section 4.5.3.1.3, less the angle brackets
	maxPasswordBytes = 72  // all that bcrypt reads
	maxAgentBytes    = 256
	cookieName       = "refreshToken"
)

// auth is what the handlers decide with.
type auth struct {
	store           *store
	logins          *limiter
	hasher          *hasher
	access, refresh keys
	accessTTL       time.Duration
	secureCookie    bool
	sameSite        http.SameSite
	metrics         *metrics
	log             *slog.Logger
}

// answer is the body of every success but the list of sessions.
type answer struct {
	Message     string      `json:"message,omitempty"`
	User        *publicUser `json:"user,omitempty"`
	AccessToken string      `json:"accessToken,omitempty"`
}

type publicUser struct {
	ID        string     `json:"id"`
	Email     string     `json:"email"`
	CreatedAt *timestamp `json:"createdAt,omitempty"`
}

// ---- what the caller shows

// bearer returns the token of the Authorization header (RFC 6750 section 2.1), "" if there is none.
func bearer(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	token = strings.Trim(token, " ")
	aboutRequest(r).bearer = token != ""
	return token
}

// verify returns the claims of a token and notes whose it is.
func verify(r *http.Request, k keys, token string) (claims, error) {
	if token == "" {
		return claims{}, fail("missing_token")
	}
	c, err := k.verify(token, time.Now())
	aboutRequest(r).userID = c.UserID
	return c, err
}

// cookieClaims returns the claims of the refresh cookie.
func (a *auth) cookieClaims(r *http.Request) (claims, error) {
	cookie, err := r.Cookie(cookieName)
	if err != nil {
		return claims{}, fail("missing_token")
	}
	return verify(r, a.refresh, cookie.Value)
}

// requireAuth lets a request through whose access token verifies and whose session lives.
func (a *auth) requireAuth(next func(http.ResponseWriter, *http.Request, claims) error) http.Handler {
	return handle(func(w http.ResponseWriter, r *http.Request) error {
		c, err := verify(r, a.access, bearer(r))
		if err == nil {
			err = a.store.isLive(r.Context(), c.UserID, c.SessionID)
		}
		if err != nil {
			return err
		}
		return next(w, r, c)
	})
}

// input reads the body as a JSON object and the strings in it that checks names, by member name. A check returns what
// is wrong with its value, "" if nothing is.
func input(w http.ResponseWriter, r *http.Request, checks map[string]func(string) string) (map[string]string, error) {
	if r.ContentLength > maxBodyBytes {
		w.Header().Set("Connection", "close") // else net/http reads it all before it answers
		return nil, fail("body_too_large")
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return nil, fail("unsupported_media_type")
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, fail("body_too_large")
	}
	var members object
	if err == nil {
		members, err = readObject(data)
	}
	values, details := map[string]string{}, map[string]string{}
	for name, check := range checks {
		values[name] = members.text(name, &err)
		if fault := check(values[name]); fault != "" {
			details[name] = fault
		}
	}
	switch {
	case err != nil:
		return nil, fail("invalid_json")
	case len(details) > 0:
		return nil, &apiError{code: "validation_failed", details: details}
	}
	return values, nil
}

// deviceOf says where a request comes from.
func deviceOf(r *http.Request) device {
	agent := r.UserAgent()
	return device{aboutRequest(r).ip.String(), strings.ToValidUTF8(agent[:min(len(agent), maxAgentBytes)], "")}
}

// ---- what the caller gets

func (a *auth) setCookie(w http.ResponseWriter, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: value, Path: "/auth", MaxAge: maxAge,
		HttpOnly: true, Secure: a.secureCookie, SameSite: a.sameSite})
}

func (a *auth) clearCookie(w http.ResponseWriter) { a.setCookie(w, "", -1) }

// giveTokens sets the cookie of g and returns an access token of the same session. email is what the refresh
// token says: what it said before, so that a token made a second time is the same.
func (a *auth) giveTokens(w http.ResponseWriter, u user, g grant, email string) (access string) {
	c := claims{UserID: u.ID, Email: email, Subject: u.ID, SessionID: g.SessionID, TokenID: g.TokenID,
		IssuedAt: g.IssuedAt, ExpiresAt: g.ExpiresAt}
	a.setCookie(w, a.refresh.sign(c), int(g.ExpiresAt-g.IssuedAt))
	now := time.Now()
	c.Email, c.TokenID, c.IssuedAt, c.ExpiresAt = u.Email, newUUID(), now.Unix(), now.Add(a.accessTTL).Unix()
	return a.access.sign(c)
}

// ---- what is acceptable

//go:embed common-passwords.txt
var commonPasswordList string

// commonPasswords is the set of passwords too common to be accepted, in lower case.
var commonPasswords = func() map[string]bool {
	set := map[string]bool{}
	for line := range strings.Lines(commonPasswordList) {
		set[strings.TrimSuffix(line, "\n")] = !strings.HasPrefix(line, "#!")
	}
	return set
}()

// normalizeEmail trims and lower-cases an address, in ASCII only: as PostgreSQL does under collation "C".
func normalizeEmail(email string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, strings.TrimSpace(email))
}

// emailFault says what is wrong with the address of a new account, "" if nothing is.
func emailFault(email string) string {
	email = normalizeEmail(email)
	odd := func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsGraphic(r) }
	parsed, err := mail.ParseAddress(email)
	switch {
	case email == "":
		return "Email is required"
	case len(email) > maxEmailBytes:
		return "Email must be at most 254 bytes"
	case err != nil, parsed.Address != email, strings.Count(email, "@") != 1, strings.ContainsFunc(email, odd):
		return "Email must be a valid email address"
	}
	return ""
}

// passwordFault says what is wrong with a new password, "" if nothing is.
func passwordFault(password string) string {
	switch {
	case password == "":
		return "Password is required"
	case len(password) < 8:
		return "Password must be at least 8 bytes"
	case len(password) > maxPasswordBytes:
		return "Password must be at most 72 bytes"
	case strings.ContainsRune(password, 0): // bcrypt takes "P" and "P\x00P" for the same
		return "Password must not contain NUL"
	case commonPasswords[strings.ToLower(password)]:
		return "Password is too common"
	}
	return ""
}

// required says that a value is missing, "" if it is there.
func required(value string) string {
	if value == "" {
		return "This field is required"
	}
	return ""
}

// ---- password hashing

const (
	hashWait  = 2 * time.Second // longest wait for a slot
	hashQueue = 256             // most that wait at once
)

// hasher computes bcrypt in a fixed number of slots, so that logins cannot take the processors from all else.
type hasher struct {
	slots            chan struct{}
	cost             int
	dummy            string // stands in for the hash of an unknown user
	waiting, refused atomic.Int64
}

func newHasher(slots, cost int) (h *hasher, err error) {
	h = &hasher{slots: make(chan struct{}, slots), cost: cost}
	h.dummy, err = h.hash(context.Background(), newUUID())
	return h, err
}

// run calls fn in a slot; overloaded where none comes free in time.
func (h *hasher) run(ctx context.Context, fn func()) error {
	ctx, cancel := context.WithTimeout(ctx, hashWait)
	defer cancel()
	if h.waiting.Add(1) > hashQueue {
		cancel()
	}
	select {
	case h.slots <- struct{}{}:
		h.waiting.Add(-1)
		defer func() { <-h.slots }()
		fn()
		return nil
	case <-ctx.Done():
		h.waiting.Add(-1)
		h.refused.Add(1)
		return &apiError{code: "overloaded", cause: errors.New("no hashing slot")}
	}
}

// hash returns the bcrypt hash of an acceptable password, under the name that the backend before this one
// writes: x/crypto computes what it calls $2a$ as $2b$ is defined.
func (h *hasher) hash(ctx context.Context, password string) (hash string, err error) {
	slotErr := h.run(ctx, func() {
		var b []byte
		b, err = bcrypt.GenerateFromPassword([]byte(password), h.cost)
		hash = "$2b$" + strings.TrimPrefix(string(b), "$2a$")
	})
	return hash, errors.Join(slotErr, err)
}

// matches reports whether password is the one of hash. It takes as long where there is no hash, and for a
// password that cannot be right because bcrypt would not read all of it.
func (h *hasher) matches(ctx context.Context, hash, password string) (ok bool, err error) {
	possible := len(password) <= maxPasswordBytes && !strings.ContainsRune(password, 0)
	if _, err := bcrypt.Cost([]byte(hash)); err != nil {
		hash, possible = h.dummy, false
	}
	err = h.run(ctx, func() { ok = bcrypt.CompareHashAndPassword([]byte(hash), []byte(password)) == nil })
	return ok && possible, err
}

// withPassword calls then with the user that find finds, if password is theirs, else it is invalid_credentials.
// The attempt is counted beforehand, and given back if it succeeds or cannot be judged. Where the password hash
// has changed by the time then uses it (errStale), all is done again.
func (a *auth) withPassword(r *http.Request, email, password string, find func() (user, error), then func(user) error) error {
	ip := aboutRequest(r).ip
	wait, err := a.logins.attempt(r.Context(), email, ip)
	switch {
	case err != nil:
		return fmt.Errorf("%w: login limit: %v", errUnavailable, err)
	case wait > 0:
		a.metrics.add("latchkey_login_limited_total", 1)
		return &apiError{code: "too_many_attempts", retryAfter: wait}
	}
	ok := false
	err = errStale
	for tries := 0; tries < 3 && errors.Is(err, errStale); tries++ {
		var u user
		if u, err = find(); err != nil && !errors.Is(err, errNoUser) {
			break
		}
		if ok, err = a.hasher.matches(r.Context(), u.PasswordHash, password); err != nil {
			break
		}
		if !ok {
			return fail("invalid_credentials")
		}
		aboutRequest(r).userID = u.ID
		err = then(u)
	}
	if backErr := a.logins.giveBack(r.Context(), email, ip, err == nil); backErr != nil {
		a.log.Warn("login attempt not given back", "requestId", aboutRequest(r).id, "cause", backErr)
	}
	return err
}

// ---- handlers

func (a *auth) signup(w http.ResponseWriter, r *http.Request) error {
	in, err := input(w, r, map[string]func(string) string{"email": emailFault, "password": passwordFault})
	if err != nil {
		return err
	}
	hash, err := a.hasher.hash(r.Context(), in["password"])
	if err != nil {
		return err
	}
	u, g, err := a.store.createUser(r.Context(), normalizeEmail(in["email"]), hash, newUUID(), newUUID(), deviceOf(r))
	if err != nil {
		return err
	}
	aboutRequest(r).userID = u.ID
	return writeJSON(w, http.StatusCreated, answer{"User created successfully", &publicUser{u.ID, u.Email, &u.CreatedAt},
		a.giveTokens(w, u, g, u.Email)})
}

func (a *auth) login(w http.ResponseWriter, r *http.Request) error {
	in, err := input(w, r, map[string]func(string) string{"email": required, "password": required})
	if err != nil {
		return err
	}
	email := normalizeEmail(in["email"])
	find := func() (user, error) { return a.store.userByEmail(r.Context(), email) }
	return a.withPassword(r, email, in["password"], find, func(u user) error {
		g, err := a.store.openSession(r.Context(), u, newUUID(), newUUID(), deviceOf(r))
		if err != nil {
			return err
		}
		a.upgradeHash(r, u, in["password"])
		return writeJSON(w, http.StatusOK, answer{"Login successful", &publicUser{u.ID, u.Email, nil}, a.giveTokens(w, u, g, u.Email)})
	})
}

// upgradeHash hashes the password anew where its hash has another cost than the configured one. The login
// stands whether or not that succeeds: the next one tries again.
func (a *auth) upgradeHash(r *http.Request, u user, password string) {
	if cost, err := bcrypt.Cost([]byte(u.PasswordHash)); err != nil || cost == a.hasher.cost {
		return
	}
	hash, err := a.hasher.hash(r.Context(), password)
	if err == nil {
		err = a.store.rehash(r.Context(), u, hash)
	}
	if err != nil {
		a.log.Warn("password not rehashed", "requestId", aboutRequest(r).id, "cause", err)
	}
}

func (a *auth) refreshTokens(w http.ResponseWriter, r *http.Request) error {
	c, err := a.cookieClaims(r)
	if err != nil {
		a.clearCookie(w)
		return err
	}
	var g grant
	u, err := a.store.userByID(r.Context(), c.UserID) // first: with PostgreSQL down no token is used up
	if err == nil {
		g, err = a.store.rotate(r.Context(), u, c.SessionID, c.TokenID, newUUID(), deviceOf(r))
	} else if errors.Is(err, errNoUser) {
		if err = a.store.revoke(r.Context(), c.UserID, c.SessionID); err == nil || errors.Is(err, errNoSession) {
			err = errEnded
		}
	}
	outcome := map[error]string{nil: "rotated", errReused: "reused", errTheft: "theft"}[err]
	if g.Resent {
		outcome = "resent"
	}
	if outcome != "" {
		a.metrics.add(`latchkey_refresh_total{outcome="`+outcome+`"}`, 1)
	}
	if errors.Is(err, errTheft) || errors.Is(err, errEnded) { // at errReused two tabs raced: the other's cookie stays
		a.clearCookie(w)
	}
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer{AccessToken: a.giveTokens(w, u, g, c.Email)})
}

// logout ends the session of the access token or, where that is missing or expired, of the cookie.
func (a *auth) logout(w http.ResponseWriter, r *http.Request) error {
	token := bearer(r)
	c, err := verify(r, a.access, token)
	if _, noCookie := r.Cookie(cookieName); noCookie == nil && (token == "" || errors.Is(err, errTokenExpired)) {
		c, err = a.cookieClaims(r)
	}
	if err == nil {
		err = a.store.revoke(r.Context(), c.UserID, c.SessionID)
	}
	if errors.Is(err, errNoSession) {
		err = errEnded
	}
	if !errors.Is(err, errUnavailable) { // else the session may live
		a.clearCookie(w)
	}
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer{Message: "Logout successful"})
}

func (a *auth) me(w http.ResponseWriter, r *http.Request, c claims) error {
	u, err := a.store.userByID(r.Context(), c.UserID)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer{User: &publicUser{u.ID, u.Email, &u.CreatedAt}})
}

func (a *auth) listSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	sessions, err := a.store.sessions(r.Context(), c.UserID, c.SessionID)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string][]session{"sessions": sessions})
}

func (a *auth) revokeSession(w http.ResponseWriter, r *http.Request, c claims) error {
	sid := r.PathValue("id")
	if err := a.store.revoke(r.Context(), c.UserID, sid); err != nil {
		return err
	}
	if sid == c.SessionID {
		a.clearCookie(w)
	}
	return writeJSON(w, http.StatusOK, answer{Message: "Session revoked"})
}

func (a *auth) revokeSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	if err := a.store.revokeAll(r.Context(), c.UserID, c.SessionID, ""); err != nil {
		return err
	}
	a.clearCookie(w)
	return writeJSON(w, http.StatusOK, answer{Message: "All sessions revoked"})
}

func (a *auth) changePassword(w http.ResponseWriter, r *http.Request, c claims) error {
	in, err := input(w, r, map[string]func(string) string{"currentPassword": required, "newPassword": passwordFault})
	if err != nil {
		return err
	}
	return a.confirm(r, c, in["currentPassword"], func(u user) error {
		hash, err := a.hasher.hash(r.Context(), in["newPassword"])
		if err != nil {
			return err
		}
		if err := a.store.changePassword(r.Context(), u, hash, c.SessionID); err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, answer{Message: "Password changed"})
	})
}

func (a *auth) deleteAccount(w http.ResponseWriter, r *http.Request, c claims) error {
	in, err := input(w, r, map[string]func(string) string{"password": required})
	if err != nil {
		return err
	}
	return a.confirm(r, c, in["password"], func(u user) error {
		if err := a.store.deleteUser(r.Context(), u, c.SessionID); err != nil {
			return err
		}
		a.clearCookie(w)
		return writeJSON(w, http.StatusOK, answer{Message: "Account deleted"})
	})
}

// confirm calls then if password is the account's. A wrong one counts as a failed login.
func (a *auth) confirm(r *http.Request, c claims, password string, then func(user) error) error {
	find := func() (user, error) {
		u, err := a.store.userByID(r.Context(), c.UserID)
		if errors.Is(err, errNoUser) {
			err = fail("user_not_found")
		}
		return u, err
	}
	return a.withPassword(r, normalizeEmail(c.Email), password, find, then)
}
