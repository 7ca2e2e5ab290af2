package main

// auth.go is what the routes under /auth decide, and the hashing of passwords.

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
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

const maxBodyBytes, maxPasswordBytes = 100 << 10, 72 // which is all that bcrypt reads

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

// bearer returns the token of the Authorization header (RFC 6750 section 2.1), "" if there is none.
func bearer(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if token = strings.Trim(token, " "); !strings.EqualFold(scheme, "Bearer") {
		token = ""
	}
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

func refreshCookie(r *http.Request) string {
	if cookie, err := r.Cookie("refreshToken"); err == nil {
		return cookie.Value
	}
	return ""
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

type checks map[string]func(string) string

// input reads the body as a JSON object and returns the strings that want names, none of them empty. A check, where there
// is one, says what is wrong with a string, "" if nothing is.
func input(w http.ResponseWriter, r *http.Request, want checks) (map[string]string, error) {
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
	for name, check := range want {
		if values[name] = members.text(name, &err); values[name] == "" {
			details[name] = "This field is required"
		} else if check != nil {
			if fault := check(values[name]); fault != "" {
				details[name] = fault
			}
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
	return device{aboutRequest(r).ip.String(), strings.ToValidUTF8(agent[:min(len(agent), 256)], "")}
}

func (a *auth) setCookie(w http.ResponseWriter, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{Name: "refreshToken", Value: value, Path: "/auth", MaxAge: maxAge,
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

//go:embed common-passwords.txt
var commonPasswords string // one a line, in lower case

// normalizeEmail trims and lower-cases an address, in ASCII only: as PostgreSQL does under collation "C".
func normalizeEmail(email string) string {
	return strings.Map(func(r rune) rune {
		if r <= unicode.MaxASCII {
			return unicode.ToLower(r)
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
	case len(email) > 254: // RFC 5321 section 4.5.3.1.3, less the angle brackets
		return "Email must be at most 254 bytes"
	case err != nil, parsed.Address != email, strings.Count(email, "@") != 1, strings.ContainsFunc(email, odd):
		return "Email must be a valid email address"
	}
	return ""
}

// passwordFault says what is wrong with a new password, "" if nothing is.
func passwordFault(password string) string {
	switch {
	case len(password) < 8:
		return "Password must be at least 8 bytes"
	case len(password) > maxPasswordBytes:
		return "Password must be at most 72 bytes"
	case strings.ContainsRune(password, 0): // bcrypt takes "P" and "P\x00P" for the same
		return "Password must not contain NUL"
	case strings.Contains(commonPasswords, "\n"+strings.ToLower(password)+"\n"):
		return "Password is too common"
	}
	return ""
}

const hashWait, hashQueue = 2 * time.Second, 256 // longest wait for a slot; most that wait at once

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

// hash returns the bcrypt hash of an acceptable password. What x/crypto calls $2a$ is what others define as $2b$.
func (h *hasher) hash(ctx context.Context, password string) (hash string, err error) {
	slotErr := h.run(ctx, func() {
		var b []byte
		b, err = bcrypt.GenerateFromPassword([]byte(password), h.cost)
		hash = "$2b$" + strings.TrimPrefix(string(b), "$2a$")
	})
	return hash, errors.Join(slotErr, err)
}

// matches reports whether password is the one of hash. A "no" takes as long for a hash of a lower cost, for no hash, and
// for a password that bcrypt would not read all of.
func (h *hasher) matches(ctx context.Context, hash, password string) (ok bool, err error) {
	cost, err := bcrypt.Cost([]byte(hash))
	noHash := err != nil || cost > 16 // which could hold a slot for hours
	if noHash {
		hash, cost = h.dummy, h.cost
	}
	err = h.run(ctx, func() {
		ok = bcrypt.CompareHashAndPassword([]byte(hash), []byte(password)) == nil && !noHash &&
			len(password) <= maxPasswordBytes && !strings.ContainsRune(password, 0)
		for ; !ok && cost < h.cost; cost++ { // 2^cost and all up to 2^(h.cost-1) are 2^h.cost
			_, _ = bcrypt.GenerateFromPassword(nil, cost)
		}
	})
	return ok, err
}

// withPassword calls then with the user found by key if password is theirs, and again if the hash has changed meanwhile
// (errStale). The attempt is counted beforehand, on the account of email, and given back if it does not fail.
func (a *auth) withPassword(r *http.Request, by, key, email, password string, then func(user) error) error {
	ip := aboutRequest(r).ip
	wait, err := a.logins.attempt(r.Context(), email, ip)
	switch {
	case err != nil:
		return redisError("login limit", err)
	case wait > 0:
		a.metrics.add("latchkey_login_limited_total", 1)
		return &apiError{code: "too_many_attempts", retryAfter: wait}
	}
	ok := false
	err = errStale
	for tries := 0; tries < 3 && errors.Is(err, errStale); tries++ {
		var u user
		if u, err = a.store.findUser(r.Context(), by, key); err != nil && (by == byID || !errors.Is(err, errNoUser)) {
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

func (a *auth) signup(w http.ResponseWriter, r *http.Request) error {
	in, err := input(w, r, checks{"email": emailFault, "password": passwordFault})
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
	return writeJSON(w, http.StatusCreated, body{"message": "User created successfully", "accessToken": a.giveTokens(w, u, g, u.Email),
		"user": body{"id": u.ID, "email": u.Email, "createdAt": u.CreatedAt}})
}

func (a *auth) login(w http.ResponseWriter, r *http.Request) error {
	in, err := input(w, r, checks{"email": nil, "password": nil})
	if err != nil {
		return err
	}
	email := normalizeEmail(in["email"])
	return a.withPassword(r, byEmail, email, email, in["password"], func(u user) error {
		g, err := a.store.openSession(r.Context(), u, newUUID(), newUUID(), deviceOf(r))
		if err != nil {
			return err
		}
		a.upgradeHash(r, u, in["password"])
		return reply(w, nil, body{"message": "Login successful", "accessToken": a.giveTokens(w, u, g, u.Email),
			"user": body{"id": u.ID, "email": u.Email}})
	})
}

// upgradeHash hashes the password anew if its hash has another cost than configured. The login stands either way.
func (a *auth) upgradeHash(r *http.Request, u user, password string) {
	if cost, err := bcrypt.Cost([]byte(u.PasswordHash)); err != nil || cost == a.hasher.cost {
		return
	}
	hash, err := a.hasher.hash(r.Context(), password)
	if err == nil {
		err = a.store.replaceHash(r.Context(), u, hash, "")
	}
	if err != nil {
		a.log.Warn("password not rehashed", "requestId", aboutRequest(r).id, "cause", err)
	}
}

func (a *auth) refreshTokens(w http.ResponseWriter, r *http.Request) error {
	c, err := verify(r, a.refresh, refreshCookie(r))
	if err != nil {
		a.clearCookie(w)
		return err
	}
	var g grant
	u, err := a.store.findUser(r.Context(), byID, c.UserID) // first: with PostgreSQL down no token is used up
	if err == nil {
		g, err = a.store.rotate(r.Context(), u, c.SessionID, c.TokenID, newUUID(), deviceOf(r))
		a.metrics.add(`latchkey_refresh_total{outcome="`+cmp.Or(g.Outcome, "failed")+`"}`, 1)
	} else if errors.Is(err, errNoUser) {
		_ = a.store.revoke(r.Context(), c.UserID, c.SessionID) // it could never be refreshed again anyway
		err = errEnded
	}
	if errors.Is(err, errTheft) || errors.Is(err, errEnded) { // at errReused two tabs raced: the other's cookie stays
		a.clearCookie(w)
	}
	if err != nil {
		return err
	}
	return reply(w, nil, body{"accessToken": a.giveTokens(w, u, g, c.Email)})
}

// logout ends the session of the access token or, where that is missing or expired, of the cookie.
func (a *auth) logout(w http.ResponseWriter, r *http.Request) error {
	token, cookie := bearer(r), refreshCookie(r)
	c, err := verify(r, a.access, token)
	if cookie != "" && (token == "" || errors.Is(err, errTokenExpired)) {
		c, err = verify(r, a.refresh, cookie)
	}
	if err == nil {
		if err = a.store.revoke(r.Context(), c.UserID, c.SessionID); errors.Is(err, errNoSession) {
			err = errEnded
		} else if err != nil {
			return err // with the cookie as it is: the session may live
		}
	}
	a.clearCookie(w)
	return reply(w, err, body{"message": "Logout successful"})
}

func (a *auth) me(w http.ResponseWriter, r *http.Request, c claims) error {
	u, err := a.store.findUser(r.Context(), byID, c.UserID)
	return reply(w, err, body{"user": body{"id": u.ID, "email": u.Email, "createdAt": u.CreatedAt}})
}

func (a *auth) listSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	sessions, err := a.store.sessions(r.Context(), c.UserID, c.SessionID)
	return reply(w, err, body{"sessions": sessions})
}

func (a *auth) revokeSession(w http.ResponseWriter, r *http.Request, c claims) error {
	err := a.store.revoke(r.Context(), c.UserID, r.PathValue("id"))
	if err == nil && r.PathValue("id") == c.SessionID {
		a.clearCookie(w)
	}
	return reply(w, err, body{"message": "Session revoked"})
}

func (a *auth) revokeSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	err := a.store.revokeAll(r.Context(), c.UserID, c.SessionID, "")
	if err == nil {
		a.clearCookie(w)
	}
	return reply(w, err, body{"message": "All sessions revoked"})
}

func (a *auth) changePassword(w http.ResponseWriter, r *http.Request, c claims) error {
	in, err := input(w, r, checks{"currentPassword": nil, "newPassword": passwordFault})
	if err != nil {
		return err
	}
	return a.withPassword(r, byID, c.UserID, normalizeEmail(c.Email), in["currentPassword"], func(u user) error {
		hash, err := a.hasher.hash(r.Context(), in["newPassword"])
		if err == nil {
			err = a.store.replaceHash(r.Context(), u, hash, c.SessionID)
		}
		return reply(w, err, body{"message": "Password changed"})
	})
}

func (a *auth) deleteAccount(w http.ResponseWriter, r *http.Request, c claims) error {
	in, err := input(w, r, checks{"password": nil})
	if err != nil {
		return err
	}
	return a.withPassword(r, byID, c.UserID, normalizeEmail(c.Email), in["password"], func(u user) error {
		err := a.store.deleteUser(r.Context(), u, c.SessionID)
		if err == nil {
			a.clearCookie(w)
		}
		return reply(w, err, body{"message": "Account deleted"})
	})
}
