package main

// jwt.go signs and verifies HS256 tokens (RFC 7515, RFC 7519). Its functions are pure: the clock is
// a parameter, and nothing here knows HTTP or the stores.

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

const (
	// jwtHeader is base64url({"alg":"HS256","typ":"JWT"}), the only header that is written or
	// accepted. The algorithm is never read from a token (RFC 8725 section 3.1).
	jwtHeader = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"

	// maxTokenBytes bounds the work that a made-up token causes. Ours have about 500 bytes, and up
	// to 2,400 with an email of which JSON escapes every character.
	maxTokenBytes = 4096
)

var (
	errTokenInvalid = errors.New("token does not verify")
	errTokenExpired = errors.New("token has expired")
)

// base64url is the encoding of RFC 7515 section 2. It is strict about unused bits in the last
// character, which would otherwise give a token several spellings.
var base64url = base64.RawURLEncoding.Strict()

// claims is the payload of access and refresh tokens. Times are in Unix seconds, which RFC 7519
// section 2 calls NumericDate.
type claims struct {
	UserID    string `json:"userId"`
	Email     string `json:"email"`
	IssuedAt  int64  `json:"iat"`
	ExpiresAt int64  `json:"exp"`
	Subject   string `json:"sub"` // the same as UserID
	SessionID string `json:"sid"`
	TokenID   string `json:"jti"`
	NotBefore int64  `json:"nbf,omitempty"` // never written, but respected
}

// keys are the secrets of one kind of token.
type keys struct {
	current  []byte // signs and verifies
	previous []byte // only verifies; empty if there is none
}

// sign returns a token that carries c.
func (k keys) sign(c claims) string {
	payload, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and integers always encode
	}
	signed := jwtHeader + "." + base64url.EncodeToString(payload)
	return signed + "." + signature(k.current, signed)
}

// verify returns the claims of a token. It returns errTokenExpired if the time is all that is wrong
// with the token, and errTokenInvalid if anything else is.
func (k keys) verify(token string, now time.Time) (claims, error) {
	if len(token) > maxTokenBytes {
		return claims{}, errTokenInvalid
	}
	dot := strings.LastIndexByte(token, '.')
	if dot < 0 {
		return claims{}, errTokenInvalid
	}

	// The signature comes first, so nothing of a forged token is ever parsed.
	signed := token[:dot]
	if !k.signed(signed, token[dot+1:]) {
		return claims{}, errTokenInvalid
	}
	c, err := parseClaims(signed)
	if err != nil {
		return claims{}, errTokenInvalid
	}

	complete := c.UserID != "" && c.Subject == c.UserID && c.SessionID != "" && c.TokenID != ""
	if !complete || c.ExpiresAt == 0 || c.NotBefore > now.Unix() {
		return claims{}, errTokenInvalid
	}
	if c.ExpiresAt <= now.Unix() { // "on or after which", RFC 7519 section 4.1.4
		return claims{}, errTokenExpired
	}
	return c, nil
}

// signed reports whether shown is the signature of text by one of the keys.
func (k keys) signed(text, shown string) bool {
	if hmac.Equal([]byte(shown), []byte(signature(k.current, text))) {
		return true
	}
	if len(k.previous) == 0 { // an empty secret is no key: everybody could sign with it
		return false
	}
	return hmac.Equal([]byte(shown), []byte(signature(k.previous, text)))
}

// signature returns the HMAC-SHA-256 of text in base64url (RFC 7518 section 3.2). Signatures are
// compared in this form, so that each has a single spelling.
func signature(key []byte, text string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return base64url.EncodeToString(mac.Sum(nil))
}

// parseClaims reads the claims of "header.payload", whose signature has been checked. It refuses
// every header but our own: "none", other algorithms, "crit", and other spellings.
func parseClaims(signed string) (claims, error) {
	payload, ok := strings.CutPrefix(signed, jwtHeader+".")
	if !ok || strings.ContainsAny(payload, "\r\n") { // line breaks are skipped by the decoder
		return claims{}, errTokenInvalid
	}
	data, err := base64url.DecodeString(payload)
	if err != nil {
		return claims{}, err
	}
	var c claims
	err = json.Unmarshal(data, &c)
	return c, err
}
