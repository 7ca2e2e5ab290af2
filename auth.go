package main

// auth.go has the handlers of the routes under /auth, one after the other. Below them is what they
// share: issuing and reading tokens, reading bodies, judging and hashing passwords.

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

const (
	// maxBodyBytes bounds a body. The largest one that is of use, with every character escaped, is
	// about 2 KB long. The rest is for members that we ignore.
	maxBodyBytes = 100 << 10

	// maxPasswordBytes is how much of a password bcrypt reads.
	maxPasswordBytes = 72

	// minPasswordBytes is 8 as in NIST SP 800-63B section 5.1.1.2, but in bytes and not characters.
	minPasswordBytes = 8

	// maxEmailBytes is the length of the longest address that SMTP can deliver to (RFC 5321 section
	// 4.5.3.1.3, without the angle brackets).
	maxEmailBytes = 254

	// maxUserAgentBytes bounds how much of a client's user agent a session remembers.
	maxUserAgentBytes = 256

	// maxBcryptCost bounds the time that a stored hash can take: 16 takes three seconds, 31 a day.
	maxBcryptCost = 16

	// maxTries bounds how often a request reads a user again because the user was changed before
	// the request could act on it. One such change is a coincidence. Several in a row happen only
	// if replicas have different costs and rehash each other's hashes.
	maxTries = 5
)

// auth serves the routes under /auth.
type auth struct {
	store        *store
	logins       *loginLimiter
	hasher       *hasher
	mails        *mailer
	links        links
	metrics      *metrics
	log          *slog.Logger
	access       keys
	refresh      keys
	accessTTL    time.Duration
	secureCookie bool
	sameSite     http.SameSite
}

// Answers. Their members are in the order of the contract.

// message is an answer that only says what was done.
type message struct {
	Message string `json:"message"`
}

// userAnswer is the user in the answer to a login.
type userAnswer struct {
	ID    string `json:"id"`
	Email string `json:"email"`
}

// newAccountAnswer is the user in the answer to a signup.
type newAccountAnswer struct {
	ID        string    `json:"id"`
	Email     string    `json:"email"`
	CreatedAt timestamp `json:"createdAt"`
}

// accountAnswer is the user in the answer about the caller's account.
type accountAnswer struct {
	ID            string    `json:"id"`
	Email         string    `json:"email"`
	CreatedAt     timestamp `json:"createdAt"`
	EmailVerified bool      `json:"emailVerified"`
}

// verifiedAnswer is the user in the answer to a verification.
type verifiedAnswer struct {
	ID            string `json:"id"`
	Email         string `json:"email"`
	EmailVerified bool   `json:"emailVerified"`
}

type signupAnswer struct {
	Message     string           `json:"message"`
	User        newAccountAnswer `json:"user"`
	AccessToken string           `json:"accessToken"`
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

type verifyAnswer struct {
	Message string         `json:"message"`
	User    verifiedAnswer `json:"user"`
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

// Handlers

// signup creates an account and opens its first session.
func (a *auth) signup(w http.ResponseWriter, r *http.Request) error {
	var in credentials
	err := readBody(w, r, members{
		"email":    &in.Email,
		"password": &in.Password,
	})
	if err != nil {
		return err
	}
	email := normalizeEmail(in.Email)
	err = validate(validationError{
		"email":    a.newEmailFault(email),
		"password": passwordFault(in.Password),
	})
	if err != nil {
		return err
	}
	hash, err := a.hasher.hash(r.Context(), in.Password)
	if err != nil {
		return err
	}
	created := newUser{
		ID:           newUUID(),
		Email:        email,
		PasswordHash: hash,
	}
	u, g, err := a.store.createUser(r.Context(), created, sessionFor(r))
	if err != nil {
		return err
	}
	accessToken := a.issueTokens(w, r, u, g, u.Email)
	_ = a.sendMail(r, mailVerify, u, u.Email)
	return writeJSON(w, http.StatusCreated, signupAnswer{
		Message: "User created successfully",
		User: newAccountAnswer{
			ID:        u.ID,
			Email:     u.Email,
			CreatedAt: timestamp(u.CreatedAt),
		},
		AccessToken: accessToken,
	})
}

// login opens a session. It answers a wrong password and an unknown email alike, in the same time.
func (a *auth) login(w http.ResponseWriter, r *http.Request) error {
	var in credentials
	err := readBody(w, r, members{
		"email":    &in.Email,
		"password": &in.Password,
	})
	if err != nil {
		return err
	}
	err = validate(validationError{
		"email":    missingFault(in.Email),
		"password": missingFault(in.Password),
	})
	if err != nil {
		return err
	}
	var u user
	var g grant
	err = retryStale(func() (err error) {
		u, err = a.authenticate(r, normalizeEmail(in.Email), in.Password)
		if err != nil {
			return err
		}
		g, err = a.store.openSession(r.Context(), u, sessionFor(r))
		return err
	})
	if err != nil {
		return err
	}
	a.upgradeHash(r, u, in.Password)
	accessToken := a.issueTokens(w, r, u, g, u.Email)
	return writeJSON(w, http.StatusOK, loginAnswer{
		Message:     "Login successful",
		User:        userAnswer{ID: u.ID, Email: u.Email},
		AccessToken: accessToken,
	})
}

// refreshTokens exchanges the refresh cookie for an access token and the next refresh cookie.
func (a *auth) refreshTokens(w http.ResponseWriter, r *http.Request) error {
	c, err := a.verifyCookie(r)
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
		a.clearCookie(w) // not after errReused: another tab has won, and the cookie is the new one
	}
	if err != nil {
		return err
	}
	// The refresh token keeps the email of the one before, so that a successor that is sent again
	// is the same to the last byte.
	accessToken := a.issueTokens(w, r, u, g, c.Email)
	return writeJSON(w, http.StatusOK, refreshAnswer{accessToken})
}

// outcomeOf returns the outcome of a refresh for the metrics.
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

// logout ends the session that the access token names or, without one, the cookie.
func (a *auth) logout(w http.ResponseWriter, r *http.Request) error {
	c, err := a.verifyEither(r)
	if err != nil {
		a.clearCookie(w)
		return err
	}
	err = a.store.revoke(r.Context(), c.UserID, c.SessionID)
	if err != nil && !errors.Is(err, errNoSession) {
		return err // the cookie stays, because the session may be alive
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
	return writeJSON(w, http.StatusOK, meAnswer{accountAnswer{
		ID:            u.ID,
		Email:         u.Email,
		CreatedAt:     timestamp(u.CreatedAt),
		EmailVerified: u.Verified,
	}})
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
	err := readBody(w, r, members{
		"currentPassword": &in.CurrentPassword,
		"newPassword":     &in.NewPassword,
	})
	if err != nil {
		return err
	}
	err = validate(validationError{
		"currentPassword": missingFault(in.CurrentPassword),
		"newPassword":     passwordFault(in.NewPassword),
	})
	if err != nil {
		return err
	}
	var u user
	err = retryStale(func() (err error) {
		u, err = a.reauthenticate(r, c, in.CurrentPassword)
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
	_ = a.sendMail(r, mailPasswordChanged, u, u.Email)
	return writeJSON(w, http.StatusOK, message{"Password changed"})
}

// deleteAccount deletes the caller's account and ends all of its sessions.
func (a *auth) deleteAccount(w http.ResponseWriter, r *http.Request, c claims) error {
	var in passwordOnly
	err := readBody(w, r, members{"password": &in.Password})
	if err != nil {
		return err
	}
	err = validate(validationError{"password": missingFault(in.Password)})
	if err != nil {
		return err
	}
	err = retryStale(func() error {
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

// forgotPassword asks for a mail with a link to reset the password. It decides nothing, so that
// addresses with and without an account cannot be told apart by its answer or by its time.
func (a *auth) forgotPassword(w http.ResponseWriter, r *http.Request) error {
	var in emailOnly
	err := readBody(w, r, members{"email": &in.Email})
	if err != nil {
		return err
	}
	email := normalizeEmail(in.Email)
	err = validate(validationError{"email": emailFault(email)})
	if err != nil {
		return err
	}
	err = a.mails.enqueue(mailRequest{
		RequestID: infoOf(r).id,
		Kind:      mailReset,
		Address:   email,
	})
	if err != nil {
		return err
	}
	const text = "If the address has an account, a mail is on its way"
	return writeJSON(w, http.StatusAccepted, message{text})
}

// resetPassword sets a new password for the user of a link, and ends all sessions.
func (a *auth) resetPassword(w http.ResponseWriter, r *http.Request) error {
	var in passwordReset
	err := readBody(w, r, members{
		"token":       &in.Token,
		"newPassword": &in.NewPassword,
	})
	if err != nil {
		return err
	}
	err = validate(validationError{
		"token":       missingFault(in.Token),
		"newPassword": passwordFault(in.NewPassword),
	})
	if err != nil {
		return err
	}
	opened, u, err := a.openLink(r, in.Token, linkReset, linkOperatorReset)
	if err != nil {
		return err
	}
	if opened.State != stateOf(u) {
		return errLinkInvalid
	}
	hash, err := a.hasher.hash(r.Context(), in.NewPassword)
	if err != nil {
		return err
	}
	mailed := opened.Purpose == linkReset
	err = a.store.resetPassword(r.Context(), u, hash, mailed)
	if errors.Is(err, errStale) {
		return errLinkInvalid // another request was faster, perhaps with the same link
	}
	if err != nil {
		return err
	}
	// Whoever forgot a password has often tried several, and should not have to wait now.
	forgiveErr := a.logins.forgivePair(r.Context(), normalizeEmail(u.Email), infoOf(r).ip)
	a.warn(r, "failed logins not forgiven", forgiveErr)
	u.Verified = u.Verified || mailed
	_ = a.sendMail(r, mailPasswordChanged, u, u.Email)
	return writeJSON(w, http.StatusOK, message{"Password changed"})
}

// sendVerification asks for another mail with a link to verify the caller's email, unless it is
// verified.
func (a *auth) sendVerification(w http.ResponseWriter, r *http.Request, c claims) error {
	u, err := a.store.findUserByID(r.Context(), c.UserID)
	if err != nil {
		return err
	}
	if !u.Verified {
		if err := a.sendMail(r, mailVerify, u, u.Email); err != nil {
			return err
		}
	}
	return writeJSON(w, http.StatusAccepted, message{"A mail is on its way"})
}

// changeEmail asks for a mail to the new address, with a link that changes the caller's email to
// it. It does so even if another account has that address, since the answer must not tell.
func (a *auth) changeEmail(w http.ResponseWriter, r *http.Request, c claims) error {
	var in emailChange
	err := readBody(w, r, members{
		"newEmail": &in.NewEmail,
		"password": &in.Password,
	})
	if err != nil {
		return err
	}
	email := normalizeEmail(in.NewEmail)
	err = validate(validationError{
		"newEmail": a.newEmailFault(email),
		"password": missingFault(in.Password),
	})
	if err != nil {
		return err
	}
	u, err := a.reauthenticate(r, c, in.Password)
	if err != nil {
		return err
	}
	if err := a.sendMail(r, mailChange, u, email); err != nil {
		return err
	}
	return writeJSON(w, http.StatusAccepted, message{"A mail is on its way"})
}

// verifyEmail marks the email of a link's user as verified, after it has changed the email if that
// is what the link is for. If the link is opened again, nothing changes and the answer is the same.
func (a *auth) verifyEmail(w http.ResponseWriter, r *http.Request) error {
	var in tokenOnly
	err := readBody(w, r, members{"token": &in.Token})
	if err != nil {
		return err
	}
	err = validate(validationError{"token": missingFault(in.Token)})
	if err != nil {
		return err
	}
	var before, u user
	err = retryStale(func() (err error) {
		before, u, err = a.useEmailLink(r, in.Token)
		return err
	})
	if err != nil {
		return err
	}
	if normalizeEmail(u.Email) != normalizeEmail(before.Email) {
		_ = a.sendMail(r, mailEmailChanged, before, before.Email)
	}
	return writeJSON(w, http.StatusOK, verifyAnswer{
		Message: "Email verified",
		User: verifiedAnswer{
			ID:            u.ID,
			Email:         u.Email,
			EmailVerified: u.Verified,
		},
	})
}

// Links

// openLink returns what a link's token says, and its user. It notes the user for the log.
func (a *auth) openLink(
	r *http.Request,
	token string,
	purposes ...linkPurpose,
) (link, user, error) {
	opened, err := a.links.open(token, time.Now(), purposes...)
	if err != nil {
		return link{}, user{}, err
	}
	infoOf(r).userID = opened.UserID
	u, err := a.store.findUserByID(r.Context(), opened.UserID)
	if errors.Is(err, errNoUser) {
		return link{}, user{}, errLinkInvalid
	}
	return opened, u, err
}

// useEmailLink verifies or changes the email of a link's user. It returns the user before and
// after. The email of a disabled user stays, so that an operator finds the account by it.
func (a *auth) useEmailLink(r *http.Request, token string) (before, after user, err error) {
	opened, u, err := a.openLink(r, token, linkVerify, linkChange)
	if err != nil {
		return user{}, user{}, err
	}
	switch {
	case u.Verified && u.Email == opened.Email: // the link was opened before
		return u, u, nil
	case opened.Purpose == linkVerify && u.Email == opened.Email:
		after, err = a.store.verifyEmail(r.Context(), u)
		return u, after, err
	case opened.Purpose == linkChange && opened.State == stateOf(u) && !u.Disabled:
		after, err = a.store.changeEmail(r.Context(), u, opened.Email)
		return u, after, err
	default:
		return user{}, user{}, errLinkInvalid
	}
}

// sendMail asks for a mail about u to an address. If that fails, it is logged. A caller ignores the
// error if what it has done stands without the mail.
func (a *auth) sendMail(r *http.Request, kind mailKind, u user, address string) error {
	return a.mails.enqueue(mailRequest{
		RequestID: infoOf(r).id,
		Kind:      kind,
		User:      u,
		Address:   address,
	})
}

// Tokens

// bearerToken returns the token in the Authorization header, or "" if there is none (RFC 6750
// section 2.1).
func bearerToken(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.Trim(token, " ")
}

// verifyBearer returns the claims of the access token in the Authorization header.
func (a *auth) verifyBearer(r *http.Request) (claims, error) {
	token := bearerToken(r)
	if token == "" {
		return claims{}, errMissingToken
	}
	infoOf(r).bearer = true
	return verify(r, a.access, token)
}

// verifyCookie returns the claims of the refresh token in the cookie. If a browser sends two
// different ones, it got one of them from elsewhere, perhaps from a sibling domain. We cannot tell
// which, so we refuse both.
func (a *auth) verifyCookie(r *http.Request) (claims, error) {
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

// verifyEither returns the claims of the Bearer token. If that is missing or has expired, and there
// is a cookie, it returns those of the cookie.
func (a *auth) verifyEither(r *http.Request) (claims, error) {
	c, err := a.verifyBearer(r)
	if !errors.Is(err, errMissingToken) && !errors.Is(err, errTokenExpired) {
		return c, err
	}
	fromCookie, cookieErr := a.verifyCookie(r)
	if errors.Is(cookieErr, errMissingToken) {
		return c, err
	}
	return fromCookie, cookieErr
}

// verify returns the claims of a token, and notes its user and session for the log.
func verify(r *http.Request, k keys, token string) (claims, error) {
	c, err := k.verify(token, time.Now())
	if err != nil {
		return claims{}, err
	}
	infoOf(r).userID = c.UserID
	infoOf(r).sessionID = c.SessionID
	return c, nil
}

// authedHandler is a handler that needs the claims of an access token.
type authedHandler func(w http.ResponseWriter, r *http.Request, c claims) error

// requireAuth calls next if the access token verifies and its session is alive.
func (a *auth) requireAuth(next authedHandler) handlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		c, err := a.verifyBearer(r)
		if err != nil {
			return err
		}
		if err := a.store.checkSession(r.Context(), c.UserID, c.SessionID); err != nil {
			return err
		}
		return next(w, r, c)
	}
}

// issueTokens sets the refresh token of a grant as the cookie, and returns an access token of the
// same session. The refresh token has refreshEmail as its email.
func (a *auth) issueTokens(
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

// setCookie sets the refresh cookie. maxAge is in seconds.
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

// sessionFor returns a new session for the client of a request.
func sessionFor(r *http.Request) newSession {
	return newSession{
		ID:      newUUID(),
		TokenID: newUUID(),
		Device:  deviceOf(r),
	}
}

// deviceOf returns the client of a request as the list of sessions shows it.
func deviceOf(r *http.Request) device {
	agent := r.UserAgent()
	return device{
		IP:        infoOf(r).ip.String(),
		UserAgent: strings.ToValidUTF8(agent[:min(len(agent), maxUserAgentBytes)], ""),
	}
}

// Bodies

// credentials is the body of signup and login.
type credentials struct {
	Email    string
	Password string
}

// passwordChange is the body of PUT /auth/password.
type passwordChange struct {
	CurrentPassword string
	NewPassword     string
}

// passwordOnly is the body of DELETE /auth/me.
type passwordOnly struct {
	Password string
}

// emailOnly is the body of POST /auth/password/forgot.
type emailOnly struct {
	Email string
}

// passwordReset is the body of POST /auth/password/reset.
type passwordReset struct {
	Token       string
	NewPassword string
}

// emailChange is the body of PUT /auth/email.
type emailChange struct {
	NewEmail string
	Password string
}

// tokenOnly is the body of POST /auth/email/verify.
type tokenOnly struct {
	Token string
}

// members maps the names of a body's members, all of them strings, to where they are stored.
type members map[string]*string

// readBody reads the body of a request into the members. One that is missing stays empty.
func readBody(w http.ResponseWriter, r *http.Request, into members) error {
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
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errRequestTimeout
	}
	if err != nil {
		return errInvalidJSON
	}
	return parseObject(data, into)
}

// parseObject reads a JSON object into the members. It is stricter than encoding/json, so that
// another program that reads the same text finds the same values (RFC 8259 section 4): names must
// match in their exact case, no name may be given twice, and the text must be valid UTF-8. Members
// that we do not know only need to be valid JSON.
func parseObject(data []byte, into members) error {
	if !utf8.Valid(data) || !json.Valid(data) {
		return errInvalidJSON
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	opening, _ := decoder.Token() // data is valid, so no call of Token fails
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
		member, known := into[name]
		if !known {
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

// validate returns the faults as an error, or nil if all of them are empty.
func validate(faults validationError) error {
	maps.DeleteFunc(faults, func(_, fault string) bool { return fault == "" })
	if len(faults) == 0 {
		return nil
	}
	return faults
}

const requiredFault = "This field is required"

// missingFault returns the fault of a value that must not be empty, or "".
func missingFault(value string) string {
	if value == "" {
		return requiredFault
	}
	return ""
}

// emailFault returns the fault of an email, which is normalized, or "".
func emailFault(email string) string {
	switch {
	case email == "":
		return requiredFault
	case len(email) > maxEmailBytes:
		return "Email must be at most 254 bytes"
	case !isPlainAddress(email):
		return "Email must be a valid email address"
	}
	return ""
}

// newEmailFault returns the fault of an email that an account is to have, or "".
func (a *auth) newEmailFault(email string) string {
	if !a.mails.canReach(email) {
		return "Email must be in ASCII: the mail server here takes no other"
	}
	return emailFault(email)
}

//go:embed common-passwords.txt
var commonPasswordsFile string

// commonPasswords holds the passwords that attackers try first, in lower case.
var commonPasswords = parseCommonPasswords(commonPasswordsFile)

// parseCommonPasswords reads a file with one password per line. Lines with "#!" are comments.
func parseCommonPasswords(file string) map[string]bool {
	passwords := map[string]bool{}
	for line := range strings.Lines(file) {
		if !strings.HasPrefix(line, "#!") {
			passwords[strings.TrimSuffix(line, "\n")] = true
		}
	}
	return passwords
}

// passwordFault returns the fault of a new password, or "".
func passwordFault(password string) string {
	switch {
	case password == "":
		return requiredFault
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

// authenticate returns the user with this email if the password is right. It returns
// errInvalidCredentials if the password is wrong or if there is no such user.
func (a *auth) authenticate(r *http.Request, email, password string) (user, error) {
	u, err := a.store.findUserByEmail(r.Context(), email)
	if err != nil && !errors.Is(err, errNoUser) {
		return user{}, err
	}
	infoOf(r).userID = u.ID // so the log names the account even if the login fails
	// If there is no such user, the hash is empty. No password matches it, and finding that out
	// takes as long as for a real one.
	return u, a.judgePassword(r, email, u.PasswordHash, password)
}

// reauthenticate returns the user of an access token if the password is right.
func (a *auth) reauthenticate(r *http.Request, c claims, password string) (user, error) {
	u, err := a.store.findUserByID(r.Context(), c.UserID)
	if err != nil {
		return user{}, err
	}
	return u, a.judgePassword(r, normalizeEmail(u.Email), u.PasswordHash, password)
}

// judgePassword returns errInvalidCredentials if password does not match hash. The attempt is
// counted as a failure beforehand. It is given back if the password is right, or if it could not be
// judged.
func (a *auth) judgePassword(r *http.Request, email, hash, password string) error {
	ctx := r.Context()
	ip := infoOf(r).ip
	allowed, wait, err := a.logins.take(ctx, email, ip)
	if err != nil {
		return redisError("login limit", err)
	}
	if !allowed {
		a.metrics.loginLimited.Add(1)
		return &limitError{errTooManyAttempts, wait}
	}

	matches, err := a.hasher.matches(ctx, hash, password)
	if err != nil {
		giveBackErr := a.logins.giveBack(ctx, email, ip)
		a.warn(r, "login attempt not given back", giveBackErr)
		return err
	}
	if !matches {
		return errInvalidCredentials
	}
	forgiveErr := a.logins.forgive(ctx, email, ip)
	a.warn(r, "failed logins not forgiven", forgiveErr)
	return nil
}

// warn logs err, unless it is nil. It is for errors that do not change the answer.
func (a *auth) warn(r *http.Request, text string, err error) {
	if err != nil {
		a.log.Warn(text, "requestId", infoOf(r).id, "error", err.Error())
	}
}

// retryStale calls try, which reads a user and then acts on what it has read. If the user was
// changed in between, retryStale calls try again: the password may match the new hash, too, or the
// change may have been the same one.
func retryStale(try func() error) error {
	err := try()
	for tries := 1; tries < maxTries && errors.Is(err, errStale); tries++ {
		err = try()
	}
	return err
}

// upgradeHash replaces the user's password hash if its cost is not the configured one. If that
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

// hashLimits are the limits on waiting for a hashing slot.
type hashLimits struct {
	queue int64         // how many requests may wait
	wait  time.Duration // how long each of them may wait
	takes time.Duration // how much of a request's time must be left for the hash
}

// hasher computes bcrypt hashes. It has a fixed number of slots, so that logins leave processors
// for everything else.
type hasher struct {
	cost    int
	dummy   string // takes the place of a hash that is missing
	slots   chan struct{}
	limits  hashLimits
	waiting atomic.Int64
	refused atomic.Int64
}

func newHasher(slots, cost int, limits hashLimits) (*hasher, error) {
	h := &hasher{
		cost:   cost,
		slots:  make(chan struct{}, slots),
		limits: limits,
	}
	dummy, err := h.hash(context.Background(), newUUID())
	if err != nil {
		return nil, err
	}
	h.dummy = dummy
	return h, nil
}

// acquire takes a slot. It returns errOverloaded if no slot becomes free in time, or if too many
// requests wait already, and errUnavailable if the stores have used up the time of the request.
func (h *hasher) acquire(ctx context.Context) error {
	wait := h.limits.wait
	if deadline, ok := ctx.Deadline(); ok {
		// A hash that ended after the deadline would be of no use.
		wait = min(wait, time.Until(deadline)-h.limits.takes)
	}
	if wait <= 0 {
		return fmt.Errorf("%w: no time is left to hash", errUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	waiting := h.waiting.Add(1)
	defer h.waiting.Add(-1)
	if waiting <= h.limits.queue {
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

// hash returns the bcrypt hash of a password.
func (h *hasher) hash(ctx context.Context, password string) (string, error) {
	if err := h.acquire(ctx); err != nil {
		return "", err
	}
	defer h.release()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), h.cost)
	if err != nil {
		return "", err
	}
	// x/crypto computes what other implementations call $2b$, but writes $2a$.
	return "$2b$" + strings.TrimPrefix(string(hash), "$2a$"), nil
}

// matches reports whether password matches hash. A refusal takes the same time if there is no hash,
// if the hash has a lower cost than the configured one, or if the password is not acceptable.
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
	// The comparison took 2^cost rounds. Hashing once at each cost from there to h.cost-1 makes the
	// sum 2^h.cost.
	for ; cost < h.cost; cost++ {
		_, _ = bcrypt.GenerateFromPassword(nil, cost)
	}
	return false, nil
}
