package main

// auth.go holds the handlers of the routes under /auth, one after the other, and what they share:
// reading bodies and tokens, judging passwords, giving tokens.

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
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
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

const (
	// maxBodyBytes bounds a body. The largest acceptable one, with every character escaped, has
	// about 4 KB.
	maxBodyBytes = 100 << 10

	// maxPasswordBytes is as much of a password as bcrypt reads.
	maxPasswordBytes = 72

	// minPasswordBytes is the least that NIST SP 800-63B section 5.1.1.2 asks for.
	minPasswordBytes = 8

	// maxEmailBytes is the longest address that SMTP can deliver to (RFC 5321 section 4.5.3.1.3,
	// less the angle brackets).
	maxEmailBytes = 254

	// maxUserAgentBytes bounds what a session remembers of the client's name.
	maxUserAgentBytes = 256

	// maxBcryptCost bounds the time that a stored hash may take: 16 is three seconds, 31 is days.
	maxBcryptCost = 16

	// staleTries bounds how often a request judges a password whose hash is replaced each time
	// before it can act. A change needs one more try. Logins on replicas with different costs may
	// need several.
	staleTries = 5
)

// auth serves the routes under /auth.
type auth struct {
	store        *store
	logins       *loginLimiter
	hasher       *hasher
	metrics      *metrics
	log          *slog.Logger
	access       keys
	refresh      keys
	accessTTL    time.Duration
	secureCookie bool
	sameSite     http.SameSite
}

// Answers

// message is an answer that only says what was done.
type message struct {
	Message string `json:"message"`
}

// userAnswer is what the answer to a login says of the user.
type userAnswer struct {
	ID    string `json:"id"`
	Email string `json:"email"`
}

// accountAnswer is a user's account.
type accountAnswer struct {
	ID        string    `json:"id"`
	Email     string    `json:"email"`
	CreatedAt timestamp `json:"createdAt"`
}

type signupAnswer struct {
	Message     string        `json:"message"`
	User        accountAnswer `json:"user"`
	AccessToken string        `json:"accessToken"`
}

type loginAnswer struct {
	Message     string     `json:"message"`
	User        userAnswer `json:"user"`
	AccessToken string     `json:"accessToken"`
}

type refreshAnswer struct {
	AccessToken string `json:"accessToken"`
}

type meAnswer struct {
	User accountAnswer `json:"user"`
}

type sessionsAnswer struct {
	Sessions []sessionAnswer `json:"sessions"`
}

type sessionAnswer struct {
	ID         string    `json:"id"`
	CreatedAt  timestamp `json:"createdAt"`
	LastUsedAt timestamp `json:"lastUsedAt"`
	IP         string    `json:"ip"`
	UserAgent  string    `json:"userAgent"`
	Current    bool      `json:"current"`
}

func accountOf(u user) accountAnswer {
	return accountAnswer{
		ID:        u.ID,
		Email:     u.Email,
		CreatedAt: timestamp(u.CreatedAt),
	}
}

// Handlers

// signup creates an account and opens its first session.
func (a *auth) signup(w http.ResponseWriter, r *http.Request) error {
	var in credentials
	if err := readBody(w, r, &in); err != nil {
		return err
	}
	email := normalizeEmail(in.Email)
	err := validate(
		field{"email", emailFault(email)},
		field{"password", passwordFault(in.Password)},
	)
	if err != nil {
		return err
	}
	hash, err := a.hasher.hash(r.Context(), in.Password)
	if err != nil {
		return err
	}
	u, g, err := a.store.createUser(r.Context(), email, hash, newUUID(), newUUID(), deviceOf(r))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, signupAnswer{
		Message:     "User created successfully",
		User:        accountOf(u),
		AccessToken: a.giveTokens(w, r, u, g, u.Email),
	})
}

// login opens a session. It answers the same, in the same time, for a wrong password and for an
// email that nobody has.
func (a *auth) login(w http.ResponseWriter, r *http.Request) error {
	var in credentials
	if err := readBody(w, r, &in); err != nil {
		return err
	}
	err := validate(
		field{"email", missingFault(in.Email)},
		field{"password", missingFault(in.Password)},
	)
	if err != nil {
		return err
	}
	var u user
	var g grant
	err = retryStale(func() error {
		var err error
		u, err = a.authenticate(r, normalizeEmail(in.Email), in.Password)
		if err != nil {
			return err
		}
		g, err = a.store.openSession(r.Context(), u, newUUID(), newUUID(), deviceOf(r))
		return err
	})
	if err != nil {
		return err
	}
	a.upgradeHash(r, u, in.Password)
	return writeJSON(w, http.StatusOK, loginAnswer{
		Message:     "Login successful",
		User:        userAnswer{ID: u.ID, Email: u.Email},
		AccessToken: a.giveTokens(w, r, u, g, u.Email),
	})
}

// refreshTokens exchanges the refresh cookie for an access token and the next refresh cookie.
func (a *auth) refreshTokens(w http.ResponseWriter, r *http.Request) error {
	c, err := a.verifyRefresh(r)
	if err != nil {
		a.clearCookie(w)
		return err
	}
	u, g, err := a.store.refresh(r.Context(), exchange{
		UserID:    c.UserID,
		SessionID: c.SessionID,
		Shown:     c.TokenID,
		Next:      newUUID(),
		Device:    deviceOf(r),
	})
	a.metrics.countRefresh(outcomeOf(g, err))
	if errors.Is(err, errTheft) || errors.Is(err, errEnded) {
		a.clearCookie(w) // but not at errReused: two tabs raced, and the cookie is the other's
	}
	if err != nil {
		return err
	}
	// The refresh token goes on naming the email that it named before. So the successor of a token
	// is the same whenever it is made, also when it is sent a second time.
	return writeJSON(w, http.StatusOK, refreshAnswer{
		AccessToken: a.giveTokens(w, r, u, g, c.Email),
	})
}

// outcomeOf names what became of a refresh, for the metrics.
func outcomeOf(g grant, err error) refreshOutcome {
	switch {
	case errors.Is(err, errTheft):
		return refreshTheft
	case errors.Is(err, errReused):
		return refreshReused
	case errors.Is(err, errEnded):
		return refreshEnded
	case err != nil:
		return refreshFailed
	case g.Resent:
		return refreshResent
	default:
		return refreshRotated
	}
}

// logout ends the session of the access token. The cookie counts only if there is no access token,
// or one that has expired.
func (a *auth) logout(w http.ResponseWriter, r *http.Request) error {
	c, err := a.verifyAccess(r)
	if errors.Is(err, errMissingToken) || errors.Is(err, errTokenExpired) {
		fromCookie, cookieErr := a.verifyRefresh(r)
		if !errors.Is(cookieErr, errMissingToken) {
			c, err = fromCookie, cookieErr
		}
	}
	if err != nil {
		a.clearCookie(w)
		return err
	}
	err = a.store.revoke(r.Context(), c.UserID, c.SessionID)
	if err != nil && !errors.Is(err, errNoSession) {
		return err // the cookie stays, for the session may live
	}
	a.clearCookie(w)
	if err != nil {
		return errEnded
	}
	return writeJSON(w, http.StatusOK, message{"Logout successful"})
}

// me returns the caller's account.
func (a *auth) me(w http.ResponseWriter, r *http.Request, c claims) error {
	u, err := a.store.findUserByID(r.Context(), c.UserID)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, meAnswer{accountOf(u)})
}

// listSessions returns the caller's sessions.
func (a *auth) listSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	sessions, err := a.store.listSessions(r.Context(), c.UserID)
	if err != nil {
		return err
	}
	answer := sessionsAnswer{Sessions: []sessionAnswer{}}
	for _, s := range sessions {
		answer.Sessions = append(answer.Sessions, sessionAnswer{
			ID:         s.ID,
			CreatedAt:  timestamp(s.CreatedAt),
			LastUsedAt: timestamp(s.LastUsedAt),
			IP:         s.Device.IP,
			UserAgent:  s.Device.UserAgent,
			Current:    s.ID == c.SessionID,
		})
	}
	return writeJSON(w, http.StatusOK, answer)
}

// revokeSession ends one of the caller's sessions.
func (a *auth) revokeSession(w http.ResponseWriter, r *http.Request, c claims) error {
	id := r.PathValue("id")
	if err := a.store.revoke(r.Context(), c.UserID, id); err != nil {
		return err
	}
	if id == c.SessionID {
		a.clearCookie(w)
	}
	return writeJSON(w, http.StatusOK, message{"Session revoked"})
}

// revokeSessions ends all of the caller's sessions, this one too.
func (a *auth) revokeSessions(w http.ResponseWriter, r *http.Request, c claims) error {
	if err := a.store.revokeAll(r.Context(), c.UserID, c.SessionID); err != nil {
		return err
	}
	a.clearCookie(w)
	return writeJSON(w, http.StatusOK, message{"All sessions revoked"})
}

// changePassword replaces the caller's password and ends all other sessions.
func (a *auth) changePassword(w http.ResponseWriter, r *http.Request, c claims) error {
	var in passwordChange
	if err := readBody(w, r, &in); err != nil {
		return err
	}
	err := validate(
		field{"currentPassword", missingFault(in.CurrentPassword)},
		field{"newPassword", passwordFault(in.NewPassword)},
	)
	if err != nil {
		return err
	}
	err = retryStale(func() error {
		u, err := a.reauthenticate(r, c, in.CurrentPassword)
		if err != nil {
			return err
		}
		hash, err := a.hasher.hash(r.Context(), in.NewPassword)
		if err != nil {
			return err
		}
		return a.store.changePassword(r.Context(), u, hash, c.SessionID)
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, message{"Password changed"})
}

// deleteAccount deletes the caller's account and ends all of its sessions.
func (a *auth) deleteAccount(w http.ResponseWriter, r *http.Request, c claims) error {
	var in passwordOnly
	if err := readBody(w, r, &in); err != nil {
		return err
	}
	if err := validate(field{"password", missingFault(in.Password)}); err != nil {
		return err
	}
	err := retryStale(func() error {
		u, err := a.reauthenticate(r, c, in.Password)
		if err != nil {
			return err
		}
		return a.store.deleteUser(r.Context(), u, c.SessionID)
	})
	if err != nil {
		return err
	}
	a.clearCookie(w)
	return writeJSON(w, http.StatusOK, message{"Account deleted"})
}

// Tokens

// bearerToken returns the token of the Authorization header, "" if there is none (RFC 6750 section
// 2.1).
func bearerToken(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.Trim(token, " ")
}

// verifyAccess returns the claims of the Bearer token.
func (a *auth) verifyAccess(r *http.Request) (claims, error) {
	token := bearerToken(r)
	if token == "" {
		return claims{}, errMissingToken
	}
	infoOf(r).bearer = true
	return verify(r, a.access, token)
}

// verifyRefresh returns the claims of the refresh cookie. A browser that sends two of them has got
// one from elsewhere, a sibling domain perhaps, and nobody can tell which. Both are refused then.
func (a *auth) verifyRefresh(r *http.Request) (claims, error) {
	token := ""
	for i, cookie := range r.CookiesNamed("refreshToken") {
		if i > 0 && cookie.Value != token {
			return claims{}, errTokenInvalid
		}
		token = cookie.Value
	}
	if token == "" {
		return claims{}, errMissingToken
	}
	return verify(r, a.refresh, token)
}

// verify returns the claims of a token and notes whose it is.
func verify(r *http.Request, k keys, token string) (claims, error) {
	c, err := k.verify(token, time.Now())
	if err != nil {
		return claims{}, err
	}
	infoOf(r).userID = c.UserID
	infoOf(r).sessionID = c.SessionID
	return c, nil
}

// requireAuth lets a request pass whose access token verifies and whose session is alive.
func (a *auth) requireAuth(
	next func(w http.ResponseWriter, r *http.Request, c claims) error,
) handlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		c, err := a.verifyAccess(r)
		if err != nil {
			return err
		}
		if err := a.store.checkSession(r.Context(), c.UserID, c.SessionID); err != nil {
			return err
		}
		return next(w, r, c)
	}
}

// giveTokens sets the refresh cookie of a grant and returns an access token of the same session.
// The refresh token names the user by refreshEmail.
func (a *auth) giveTokens(
	w http.ResponseWriter,
	r *http.Request,
	u user,
	g grant,
	refreshEmail string,
) string {
	infoOf(r).userID = u.ID
	infoOf(r).sessionID = g.SessionID

	refresh := a.refresh.sign(claims{
		UserID:    u.ID,
		Email:     refreshEmail,
		IssuedAt:  g.IssuedAt.Unix(),
		ExpiresAt: g.ExpiresAt.Unix(),
		Subject:   u.ID,
		SessionID: g.SessionID,
		TokenID:   g.TokenID,
	})
	a.setCookie(w, refresh, int(g.ExpiresAt.Sub(g.IssuedAt).Seconds()))

	now := time.Now()
	return a.access.sign(claims{
		UserID:    u.ID,
		Email:     u.Email,
		IssuedAt:  now.Unix(),
		ExpiresAt: now.Add(a.accessTTL).Unix(),
		Subject:   u.ID,
		SessionID: g.SessionID,
		TokenID:   newUUID(),
	})
}

// setCookie sets the refresh cookie for so many seconds.
func (a *auth) setCookie(w http.ResponseWriter, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{
		Name:     "refreshToken",
		Value:    value,
		Path:     "/auth",
		MaxAge:   maxAge,
		HttpOnly: true,
		Secure:   a.secureCookie,
		SameSite: a.sameSite,
	})
}

// clearCookie tells the browser to forget the refresh cookie.
func (a *auth) clearCookie(w http.ResponseWriter) {
	a.setCookie(w, "", -1)
}

// deviceOf returns where a request comes from, as the list of sessions shows it.
func deviceOf(r *http.Request) device {
	agent := r.UserAgent()
	return device{
		IP:        infoOf(r).ip.String(),
		UserAgent: strings.ToValidUTF8(agent[:min(len(agent), maxUserAgentBytes)], ""),
	}
}

// Bodies

// body is a request's body. Its members are strings.
type body interface {
	// member returns where the member of this name is kept, nil for one that nobody asked for.
	member(name string) *string
}

// credentials is the body of signup and login.
type credentials struct {
	Email    string
	Password string
}

func (b *credentials) member(name string) *string {
	switch name {
	case "email":
		return &b.Email
	case "password":
		return &b.Password
	}
	return nil
}

// passwordChange is the body of PUT /auth/password.
type passwordChange struct {
	CurrentPassword string
	NewPassword     string
}

func (b *passwordChange) member(name string) *string {
	switch name {
	case "currentPassword":
		return &b.CurrentPassword
	case "newPassword":
		return &b.NewPassword
	}
	return nil
}

// passwordOnly is the body of DELETE /auth/me.
type passwordOnly struct {
	Password string
}

func (b *passwordOnly) member(name string) *string {
	if name == "password" {
		return &b.Password
	}
	return nil
}

// readBody reads the body of a request into b. A member that is missing stays empty.
func readBody(w http.ResponseWriter, r *http.Request, b body) error {
	if r.ContentLength > maxBodyBytes {
		w.Header().Set("Connection", "close") // otherwise net/http waits for the body first
		return errBodyTooLarge
	}
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return errUnsupportedMediaType
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return errBodyTooLarge
	}
	if err != nil {
		return errInvalidJSON
	}
	return parseObject(data, b)
}

// parseObject reads data, one JSON object, into b. It is stricter than encoding/json, so that a
// proxy or a log that reads the same text finds the same members in it (RFC 8259 section 4): names
// are matched with their exact case, no name is given twice, and the text is valid UTF-8. What is
// inside a member that b does not have needs only to be JSON. An escape of half a surrogate pair
// becomes U+FFFD, as it does when JavaScript writes such a string in UTF-8.
func parseObject(data []byte, b body) error {
	if !utf8.Valid(data) || !json.Valid(data) {
		return errInvalidJSON
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	opening, _ := decoder.Token()
	if opening != json.Delim('{') {
		return errInvalidJSON
	}
	seen := map[string]bool{}
	for decoder.More() {
		token, _ := decoder.Token()
		name, _ := token.(string)
		if seen[name] {
			return errInvalidJSON
		}
		seen[name] = true

		var value json.RawMessage
		if err := decoder.Decode(&value); err != nil {
			return errInvalidJSON
		}
		member := b.member(name)
		if member == nil {
			continue
		}
		if value[0] != '"' {
			return errInvalidJSON
		}
		if err := json.Unmarshal(value, member); err != nil {
			return errInvalidJSON
		}
	}
	return nil
}

// Emails and passwords

// field is a member of a body and what is wrong with it, "" if nothing is.
type field struct {
	name  string
	fault string
}

// validate returns a validationError if anything is wrong with one of the fields.
func validate(fields ...field) error {
	faults := validationError{}
	for _, f := range fields {
		if f.fault != "" {
			faults[f.name] = f.fault
		}
	}
	if len(faults) > 0 {
		return faults
	}
	return nil
}

const faultMissing = "This field is required"

// missingFault returns what is wrong with a value that only has to be there, "" if nothing is.
func missingFault(value string) string {
	if value == "" {
		return faultMissing
	}
	return ""
}

// normalizeEmail trims and lower-cases an email. Only ASCII letters have a case here, as they do in
// PostgreSQL under the collation "C".
func normalizeEmail(email string) string {
	return strings.Map(func(r rune) rune {
		if r <= unicode.MaxASCII {
			return unicode.ToLower(r)
		}
		return r
	}, strings.TrimSpace(email))
}

// emailFault returns what is wrong with the normalized email of a new account, "" if nothing is.
func emailFault(email string) string {
	if email == "" {
		return faultMissing
	}
	if len(email) > maxEmailBytes {
		return "Email must be at most 254 bytes"
	}
	parsed, err := mail.ParseAddress(email)
	plain := err == nil && parsed.Address == email && strings.Count(email, "@") == 1
	if !plain || strings.ContainsFunc(email, isUnprintable) {
		return "Email must be a valid email address"
	}
	return ""
}

// isUnprintable reports whether an email must not contain r: spaces of all kinds, control
// characters, and what cannot be seen.
func isUnprintable(r rune) bool {
	return unicode.IsSpace(r) || !unicode.IsGraphic(r)
}

//go:embed common-passwords.txt
var commonPasswordsFile string

// commonPasswords holds the passwords that attackers try first, in lower case.
var commonPasswords = parseCommonPasswords(commonPasswordsFile)

// parseCommonPasswords reads one password a line. Lines that begin with "#!" are comments.
func parseCommonPasswords(file string) map[string]bool {
	passwords := map[string]bool{}
	for line := range strings.Lines(file) {
		if !strings.HasPrefix(line, "#!") {
			passwords[strings.TrimSuffix(line, "\n")] = true
		}
	}
	return passwords
}

// passwordFault returns what is wrong with a new password, "" if nothing is.
func passwordFault(password string) string {
	switch {
	case password == "":
		return faultMissing
	case len(password) < minPasswordBytes:
		return "Password must be at least 8 bytes"
	case len(password) > maxPasswordBytes:
		return "Password must be at most 72 bytes"
	case strings.ContainsRune(password, 0): // to bcrypt "P" and "P\x00P" are the same
		return "Password must not contain NUL"
	case commonPasswords[strings.ToLower(password)]:
		return "Password is too common"
	}
	return ""
}

// authenticate returns the user of an email if the password is theirs, and errInvalidCredentials if
// it is not or if there is no such user.
func (a *auth) authenticate(r *http.Request, email, password string) (user, error) {
	u, err := a.store.findUserByEmail(r.Context(), email)
	if err != nil && !errors.Is(err, errNoUser) {
		return user{}, err
	}
	// Without such a user the hash is empty. No password matches it, which takes as long to find.
	infoOf(r).userID = u.ID // the log names whose login fails
	return u, a.judgePassword(r, email, u.PasswordHash, password)
}

// reauthenticate returns the user of an access token if the password is theirs.
func (a *auth) reauthenticate(r *http.Request, c claims, password string) (user, error) {
	u, err := a.store.findUserByID(r.Context(), c.UserID)
	if err != nil {
		return user{}, err
	}
	return u, a.judgePassword(r, normalizeEmail(u.Email), u.PasswordHash, password)
}

// judgePassword returns errInvalidCredentials if password does not match hash. The attempt counts
// as a failure on the account of email until the password turns out to be right.
func (a *auth) judgePassword(r *http.Request, email, hash, password string) error {
	ctx := r.Context()
	ip := infoOf(r).ip
	wait, err := a.logins.take(ctx, email, ip)
	if err != nil {
		return redisError("login limit", err)
	}
	if wait > 0 {
		a.metrics.loginLimited.Add(1)
		return &limitError{errTooManyAttempts, wait}
	}

	matches, err := a.hasher.matches(ctx, hash, password)
	if err != nil {
		a.warn(r, "login attempt not given back", a.logins.giveBack(ctx, email, ip))
		return err
	}
	if !matches {
		return errInvalidCredentials
	}
	a.warn(r, "login attempt not given back", a.logins.succeeded(ctx, email, ip))
	return nil
}

// warn logs an error that does not change the answer. It does nothing if err is nil.
func (a *auth) warn(r *http.Request, text string, err error) {
	if err != nil {
		a.log.Warn(text, "requestId", infoOf(r).id, "error", err.Error())
	}
}

// retryStale calls try, which judges a password and acts on the hash that it matched. It calls try
// again if that hash was replaced in between, since the password may match the new one too.
func retryStale(try func() error) error {
	err := try()
	for tries := 1; tries < staleTries && errors.Is(err, errStale); tries++ {
		err = try()
	}
	return err
}

// upgradeHash hashes the password anew if its hash has another cost than new ones get. If that
// fails, the login still succeeds.
func (a *auth) upgradeHash(r *http.Request, u user, password string) {
	cost, err := bcrypt.Cost([]byte(u.PasswordHash))
	if err != nil || cost == a.hasher.cost {
		return
	}
	hash, err := a.hasher.hash(r.Context(), password)
	if err == nil {
		err = a.store.rehash(r.Context(), u, hash)
	}
	a.warn(r, "password not rehashed", err)
}

// Hashing

const (
	// hashWait is the longest wait for a hashing slot. Hardly anybody waits longer for a login.
	hashWait = 2 * time.Second

	// hashQueue bounds how many requests wait, and so the memory that they take. A machine with 32
	// processors hashes about this many passwords in hashWait.
	hashQueue = 256
)

// hasher computes bcrypt hashes in a fixed number of slots, so that logins cannot take the
// processors from everything else.
type hasher struct {
	cost    int
	dummy   string // is compared with the password where there is no hash
	slots   chan struct{}
	waiting atomic.Int64
	refused atomic.Int64
}

func newHasher(slots, cost int) (*hasher, error) {
	h := &hasher{
		cost:  cost,
		slots: make(chan struct{}, slots),
	}
	dummy, err := h.hash(context.Background(), newUUID())
	h.dummy = dummy
	return h, err
}

// acquire takes a slot. It returns errOverloaded if none comes free in time, or if too many wait.
func (h *hasher) acquire(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, hashWait)
	defer cancel()
	defer h.waiting.Add(-1)
	if h.waiting.Add(1) <= hashQueue {
		select {
		case h.slots <- struct{}{}:
			return nil
		case <-ctx.Done():
		}
	}
	h.refused.Add(1)
	return errOverloaded
}

// release gives a slot back.
func (h *hasher) release() {
	<-h.slots
}

// hash returns the bcrypt hash of a password that is acceptable.
func (h *hasher) hash(ctx context.Context, password string) (string, error) {
	if err := h.acquire(ctx); err != nil {
		return "", err
	}
	defer h.release()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), h.cost)
	if err != nil {
		return "", err
	}
	// What x/crypto calls $2a$ is what the other implementations call $2b$.
	return "$2b$" + strings.TrimPrefix(string(hash), "$2a$"), nil
}

// matches reports whether password is the one of hash. It takes the same time to say no for a hash
// of a lower cost than configured, for no hash, and for a password that cannot be right.
func (h *hasher) matches(ctx context.Context, hash, password string) (bool, error) {
	possible := len(password) <= maxPasswordBytes && !strings.ContainsRune(password, 0)
	cost, err := bcrypt.Cost([]byte(hash))
	if err != nil || cost > maxBcryptCost {
		possible = false
		hash, cost = h.dummy, h.cost
	}

	if err := h.acquire(ctx); err != nil {
		return false, err
	}
	defer h.release()
	err = bcrypt.CompareHashAndPassword([]byte(hash), []byte(password))
	if err == nil && possible {
		return true, nil
	}
	// 2^cost rounds are done. One hash of each cost from there to h.cost-1 makes them 2^h.cost.
	for ; cost < h.cost; cost++ {
		_, _ = bcrypt.GenerateFromPassword(nil, cost)
	}
	return false, nil
}
