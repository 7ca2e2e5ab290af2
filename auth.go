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
	minPasswordBytes = 8
	maxPasswordBytes = 72 // all that bcrypt reads
	maxAgentBytes    = 256

	cookieName = "refreshToken"
)

// auth holds what the handlers decide with.
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

// ---- what is shown: tokens, cookie, body

// bearer returns the token of the Authorization header (RFC 6750 section 2.1), or "".
func bearer(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.Trim(token, " ")
}

// verify returns the claims of a token, or the apiError that says why not.
func verify(k keys, token string) (claims, error) {
	if token == "" {
		return claims{}, fail("missing_token")
	}
	c, err := k.verify(token, time.Now())
	switch {
	case errors.Is(err, errTokenExpired):
		return claims{}, fail("token_expired")
	case err != nil:
		return claims{}, fail("invalid_token")
	}
	return c, nil
}

// bearerClaims returns the claims of the request's access token.
func (a *auth) bearerClaims(r *http.Request) (claims, error) {
	token := bearer(r)
	c, err := verify(a.access, token)
	if e, ok := err.(*apiError); ok {
		e.refused = token != ""
	}
	aboutRequest(r).userID = c.UserID
	return c, err
}

// cookieClaims returns the claims of the request's refresh token.
func (a *auth) cookieClaims(r *http.Request) (claims, error) {
	token := ""
	if cookie, err := r.Cookie(cookieName); err == nil {
		token = cookie.Value
	}
	c, err := verify(a.refresh, token)
	aboutRequest(r).userID = c.UserID
	return c, err
}

// requireAuth lets a request through whose access token verifies and whose session lives.
func (a *auth) requireAuth(next func(http.ResponseWriter, *http.Request, claims) error) http.Handler {
	return handle(func(w http.ResponseWriter, r *http.Request) error {
		c, err := a.bearerClaims(r)
		if err != nil {
			return err
		}
		live, err := a.store.isLive(r.Context(), c.UserID, c.SessionID)
		if err != nil {
			return err
		}
		if !live {
			return &apiError{code: "session_revoked", refused: true}
		}
		return next(w, r, c)
	})
}

func (a *auth) setCookie(w http.ResponseWriter, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: value, Path: "/auth", MaxAge: maxAge,
		HttpOnly: true, Secure: a.secureCookie, SameSite: a.sameSite})
}

func (a *auth) clearCookie(w http.ResponseWriter) { a.setCookie(w, "", -1) }

// giveTokens sets the refresh cookie of g and returns an access token for the same session. email is what the
// refresh token says: the same when the token is made a second time.
func (a *auth) giveTokens(w http.ResponseWriter, u user, g grant, email string) (access string) {
	c := claims{UserID: u.ID, Email: email, Subject: u.ID, SessionID: g.SessionID, TokenID: g.TokenID,
		IssuedAt: g.IssuedAt, ExpiresAt: g.ExpiresAt}
	a.setCookie(w, a.refresh.sign(c), int(g.ExpiresAt-g.IssuedAt))
	now := time.Now()
	c.Email, c.TokenID, c.IssuedAt, c.ExpiresAt = u.Email, newUUID(), now.Unix(), now.Add(a.accessTTL).Unix()
	return a.access.sign(c)
}

// fromDevice says where a session is used from.
func fromDevice(r *http.Request) device {
	agent := r.UserAgent()
	return device{aboutRequest(r).ip.String(), strings.ToValidUTF8(agent[:min(len(agent), maxAgentBytes)], "")}
}

// decode reads the body as a JSON object of strings into fields, by member name. Members not asked for are ignored.
func decode(w http.ResponseWriter, r *http.Request, fields map[string]*string) error {
	if r.ContentLength > maxBodyBytes {
		return fail("body_too_large")
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return fail("unsupported_media_type")
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return fail("body_too_large")
	}
	if err == nil {
		err = readObject(data, func(name string, value []byte) (err error) {
			if field := fields[name]; field != nil {
				*field, err = readString(value)
			}
			return err
		})
	}
	if err != nil {
		return fail("invalid_json")
	}
	return nil
}

// ---- what is acceptable

//go:embed common-passwords.txt
var commonPasswordList string

// commonPasswords is the set of passwords too common to be accepted, in lower case.
var commonPasswords = func() map[string]bool {
	set := map[string]bool{}
	for line := range strings.Lines(commonPasswordList) {
		if !strings.HasPrefix(line, "#!") {
			set[strings.TrimSuffix(line, "\n")] = true
		}
	}
	return set
}()

// normalizeEmail trims and lower-cases an address, in ASCII only: as PostgreSQL's lower() does under collation "C".
func normalizeEmail(email string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, strings.TrimSpace(email))
}

// emailFault says what is wrong with a normalized address, "" if nothing is.
func emailFault(email string) string {
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
	case len(password) < minPasswordBytes:
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

// required says that a field is missing, "" if it is there.
func required(value string) string {
	if value == "" {
		return "This field is required"
	}
	return ""
}

// validate returns validation_failed with the faults that are not "", or nil if none is.
func validate(faults map[string]string) error {
	for field, fault := range faults {
		if fault == "" {
			delete(faults, field)
		}
	}
	if len(faults) == 0 {
		return nil
	}
	return &apiError{code: "validation_failed", details: faults}
}

// ---- password hashing

const (
	hashWait   = 2 * time.Second // longest wait for a slot
	hashQueue  = 256             // most that wait at once: they hold memory
	bcryptName = "$2b$"          // what the backend before this one writes; x/crypto writes the same under $2a$
)

// hasher computes bcrypt in a fixed number of slots, so that logins cannot take the processors from all else.
type hasher struct {
	slots            chan struct{}
	cost             int
	dummy            string // stands in for the hash of an unknown user
	waiting, refused atomic.Int64
}

func newHasher(slots, cost int) (*hasher, error) {
	h := &hasher{slots: make(chan struct{}, slots), cost: cost}
	var err error
	h.dummy, err = h.hash(context.Background(), newUUID())
	return h, err
}

// run calls fn in a slot; overloaded where none comes free in time.
func (h *hasher) run(ctx context.Context, fn func()) error {
	ctx, cancel := context.WithTimeout(ctx, hashWait)
	defer cancel()
	defer h.waiting.Add(-1)
	if h.waiting.Add(1) <= hashQueue {
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
			fn()
			return nil
		case <-ctx.Done():
		}
	}
	h.refused.Add(1)
	return &apiError{code: "overloaded", cause: errors.New("no hashing slot")}
}

// hash returns the bcrypt hash of an acceptable password.
func (h *hasher) hash(ctx context.Context, password string) (hash string, err error) {
	slotErr := h.run(ctx, func() {
		var b []byte
		b, err = bcrypt.GenerateFromPassword([]byte(password), h.cost)
		hash = bcryptName + strings.TrimPrefix(string(b), "$2a$")
	})
	return hash, errors.Join(slotErr, err)
}

// matches reports whether password is the one of hash. It takes as long for no hash at all, and for a
// password that cannot be right because bcrypt would not read all of it.
func (h *hasher) matches(ctx context.Context, hash, password string) (ok bool, err error) {
	possible := len(password) <= maxPasswordBytes && !strings.ContainsRune(password, 0)
	if _, err := bcrypt.Cost([]byte(hash)); err != nil {
		hash, possible = h.dummy, false
	}
	err = h.run(ctx, func() { ok = bcrypt.CompareHashAndPassword([]byte(hash), []byte(password)) == nil })
	return ok && possible, err
}

// checkPassword runs then with the user that find finds, if password is theirs. It counts the attempt
// beforehand, and gives it back if it succeeds or cannot be judged. find and then may be called again, where the
// password hash changed between the two (errStale).
func (a *auth) checkPassword(r *http.Request, email, password string, find func() (user, error), then func(user) error) error {
	ip := aboutRequest(r).ip
	wait, err := a.logins.attempt(r.Context(), email, ip)
	if err != nil {
		return fmt.Errorf("%w: login limit: %v", errUnavailable, err)
	}
	if wait > 0 {
		a.metrics.count("latchkey_login_limited_total", "")
		return &apiError{code: "too_many_attempts", retryAfter: wait}
	}
	for range 3 {
		if err = a.tryPassword(r, password, find, then); !errors.Is(err, errStale) {
			break
		}
	}
	if e := (*apiError)(nil); errors.As(err, &e) && e.code == "invalid_credentials" {
		return err
	}
	if backErr := a.logins.giveBack(r.Context(), email, ip, err == nil); backErr != nil {
		a.log.Warn("login attempt not given back", "requestId", aboutRequest(r).id, "error", backErr)
	}
	return err
}

func (a *auth) tryPassword(r *http.Request, password string, find func() (user, error), then func(user) error) error {
	u, err := find()
	if err != nil && !errors.Is(err, errNoUser) {
		return err
	}
	ok, err := a.hasher.matches(r.Context(), u.PasswordHash, password)
	if err != nil {
		return err
	}
	if !ok {
		return fail("invalid_credentials")
	}
	aboutRequest(r).userID = u.ID
	return then(u)
}

// ---- handlers

// timestamp is how the API writes a time: RFC 3339 in UTC with milliseconds, as JavaScript does.
func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

type publicUser struct {
	ID        string `json:"id"`
	Email     string `json:"email"`
	CreatedAt string `json:"createdAt,omitempty"`
}

type signedIn struct {
	Message     string     `json:"message"`
	User        publicUser `json:"user"`
	AccessToken string     `json:"accessToken"`
}

type message struct {
	Message string `json:"message"`
}

func (a *auth) signup(w http.ResponseWriter, r *http.Request) error {
	var email, password string
	if err := decode(w, r, map[string]*string{"email": &email, "password": &password}); err != nil {
		return err
	}
	email = normalizeEmail(email)
	if err := validate(map[string]string{"email": emailFault(email), "password": passwordFault(password)}); err != nil {
		return err
	}
	hash, err := a.hasher.hash(r.Context(), password)
	if err != nil {
		return err
	}
	u, g, err := a.store.createUser(r.Context(), email, hash, newUUID(), newUUID(), fromDevice(r))
	if errors.Is(err, errEmailExists) {
		return fail("email_exists")
	}
	if err != nil {
		return err
	}
	aboutRequest(r).userID = u.ID
	access := a.giveTokens(w, u, g, u.Email)
	writeJSON(w, http.StatusCreated, signedIn{"User created successfully",
		publicUser{u.ID, u.Email, timestamp(u.CreatedAt)}, access})
	return nil
}

func (a *auth) login(w http.ResponseWriter, r *http.Request) error {
	var email, password string
	if err := decode(w, r, map[string]*string{"email": &email, "password": &password}); err != nil {
		return err
	}
	email = normalizeEmail(email)
	if err := validate(map[string]string{"email": required(email), "password": required(password)}); err != nil {
		return err
	}
	find := func() (user, error) {
		if strings.ContainsRune(email, 0) { // no text in PostgreSQL
			return user{}, errNoUser
		}
		return a.store.userByEmail(r.Context(), email)
	}
	return a.checkPassword(r, email, password, find, func(u user) error {
		g, err := a.store.openSession(r.Context(), u, newUUID(), newUUID(), fromDevice(r))
		if err != nil {
			return err
		}
		a.upgradeHash(r, u, password)
		access := a.giveTokens(w, u, g, u.Email)
		writeJSON(w, http.StatusOK, signedIn{"Login successful", publicUser{ID: u.ID, Email: u.Email}, access})
		return nil
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
	if err != nil && !errors.Is(err, errStale) {
		a.log.Warn("password not rehashed", "requestId", aboutRequest(r).id, "error", err)
	}
}

func (a *auth) refreshTokens(w http.ResponseWriter, r *http.Request) error {
	c, err := a.cookieClaims(r)
	if err != nil {
		a.clearCookie(w)
		return err
	}
	// PostgreSQL first: while it is down no refresh token is used up.
	u, err := a.store.userByID(r.Context(), c.UserID)
	if errors.Is(err, errNoUser) {
		if _, err := a.store.revoke(r.Context(), c.UserID, c.SessionID); err != nil {
			return err
		}
		a.clearCookie(w)
		return fail("session_revoked")
	}
	if err != nil {
		return err
	}
	g, err := a.store.rotate(r.Context(), u, c.SessionID, c.TokenID, newUUID(), fromDevice(r))
	switch {
	case errors.Is(err, errReused): // two tabs raced: the other one has the cookie's successor
		a.metrics.count("latchkey_refresh_total", `{outcome="reused"}`)
		return fail("refresh_reused")
	case errors.Is(err, errTheft):
		a.metrics.count("latchkey_refresh_total", `{outcome="theft"}`)
		a.log.Warn("refresh token reused after its leeway: session revoked", "requestId", aboutRequest(r).id, "userId", u.ID)
		a.clearCookie(w)
		return fail("refresh_reused")
	case errors.Is(err, errNoSession):
		a.clearCookie(w)
		return fail("session_revoked")
	case err != nil:
		return err
	}
	outcome := `{outcome="rotated"}`
	if g.Resent {
		outcome = `{outcome="resent"}`
	}
	a.metrics.count("latchkey_refresh_total", outcome)
	writeJSON(w, http.StatusOK, struct {
		AccessToken string `json:"accessToken"`
	}{a.giveTokens(w, u, g, c.Email)})
	return nil
}

func (a *auth) logout(w http.ResponseWriter, r *http.Request) error {
	c, err := a.bearerClaims(r)
	if e, ok := err.(*apiError); ok && e.code != "invalid_token" {
		// No access token, or one past its time: the cookie may speak for it.
		if _, cookieErr := r.Cookie(cookieName); cookieErr == nil {
			c, err = a.cookieClaims(r)
		}
	}
	if err == nil {
		var ended int
		ended, err = a.store.revoke(r.Context(), c.UserID, c.SessionID)
		if err != nil {
			return err
		}
		if ended == 0 {
			err = &apiError{code: "session_revoked", refused: bearer(r) != ""}
		}
	}
	a.clearCookie(w)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, message{"Logout successful"})
	return nil
}

func (a *auth) me(w http.ResponseWriter, r *http.Request, c claims) error {
	u, err := a.accountOf(r, c)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, struct {
		User publicUser `json:"user"`
	}{publicUser{u.ID, u.Email, timestamp(u.CreatedAt)}})
	return nil
}

// accountOf returns the user whose token it is, or user_not_found.
func (a *auth) accountOf(r *http.Request, c claims) (user, error) {
	u, err := a.store.userByID(r.Context(), c.UserID)
	if errors.Is(err, errNoUser) {
		return user{}, fail("user_not_found")
	}
	return u, err
}

func (a *auth) listSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	sessions, err := a.store.sessions(r.Context(), c.UserID)
	if err != nil {
		return err
	}
	type publicSession struct {
		ID         string `json:"id"`
		CreatedAt  string `json:"createdAt"`
		LastUsedAt string `json:"lastUsedAt"`
		IP         string `json:"ip"`
		UserAgent  string `json:"userAgent"`
		Current    bool   `json:"current"`
	}
	list := []publicSession{}
	for _, s := range sessions {
		list = append(list, publicSession{s.ID, timestamp(s.CreatedAt), timestamp(s.LastUsedAt), s.IP, s.UserAgent, s.ID == c.SessionID})
	}
	writeJSON(w, http.StatusOK, struct {
		Sessions []publicSession `json:"sessions"`
	}{list})
	return nil
}

func (a *auth) revokeSession(w http.ResponseWriter, r *http.Request, c claims) error {
	sid := r.PathValue("id")
	if !isUUID(sid) {
		return fail("session_not_found")
	}
	ended, err := a.store.revoke(r.Context(), c.UserID, sid)
	if err != nil {
		return err
	}
	if ended == 0 {
		return fail("session_not_found")
	}
	if sid == c.SessionID {
		a.clearCookie(w)
	}
	writeJSON(w, http.StatusOK, message{"Session revoked"})
	return nil
}

func (a *auth) revokeSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	if err := a.store.revokeAll(r.Context(), c.UserID, c.SessionID, ""); err != nil {
		return err
	}
	a.clearCookie(w)
	writeJSON(w, http.StatusOK, message{"All sessions revoked"})
	return nil
}

func (a *auth) changePassword(w http.ResponseWriter, r *http.Request, c claims) error {
	var current, next string
	if err := decode(w, r, map[string]*string{"currentPassword": &current, "newPassword": &next}); err != nil {
		return err
	}
	if err := validate(map[string]string{"currentPassword": required(current), "newPassword": passwordFault(next)}); err != nil {
		return err
	}
	return a.confirm(r, c, current, func(u user) error {
		hash, err := a.hasher.hash(r.Context(), next)
		if err != nil {
			return err
		}
		if err := a.store.changePassword(r.Context(), u, hash, c.SessionID); err != nil {
			return err
		}
		writeJSON(w, http.StatusOK, message{"Password changed"})
		return nil
	})
}

func (a *auth) deleteAccount(w http.ResponseWriter, r *http.Request, c claims) error {
	var password string
	if err := decode(w, r, map[string]*string{"password": &password}); err != nil {
		return err
	}
	if err := validate(map[string]string{"password": required(password)}); err != nil {
		return err
	}
	return a.confirm(r, c, password, func(u user) error {
		if err := a.store.deleteUser(r.Context(), u, c.SessionID); err != nil {
			return err
		}
		a.clearCookie(w)
		writeJSON(w, http.StatusOK, message{"Account deleted"})
		return nil
	})
}

// confirm runs then if password is the account's. A failure counts as a failed login on it.
func (a *auth) confirm(r *http.Request, c claims, password string, then func(user) error) error {
	find := func() (user, error) { return a.accountOf(r, c) }
	return a.checkPassword(r, normalizeEmail(c.Email), password, find, then)
}
