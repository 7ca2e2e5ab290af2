package main

// jwt.go signs and verifies HS256 tokens (RFC 7515, RFC 7519). Its functions are pure. The time is
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
	// jwtHeader is base64url({"alg":"HS256","typ":"JWT"}). No other header is written or accepted.
	// The algorithm is never read from a token (RFC 8725 section 3.1).
	jwtHeader = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"

	// maxTokenBytes bounds the work that a made-up token can cause. Ours are about 500 bytes long,
	// and at most 2,400 if JSON escapes every character of a long email.
	maxTokenBytes = 4096
)

var (
	errTokenInvalid = errors.New("token does not verify")
	errTokenExpired = errors.New("token has expired")
)

// base64url is the encoding of RFC 7515 section 2. It rejects unused bits in the last character,
// since a token could otherwise be written in several ways.
var base64url = base64.RawURLEncoding.Strict()

// claims is the payload of access and refresh tokens. Times are Unix seconds (NumericDate in RFC
// 7519 section 2).
type claims struct {
	UserID    string `json:"userId"`
	Email     string `json:"email"`
	IssuedAt  int64  `json:"iat"`
	ExpiresAt int64  `json:"exp"`
	Subject   string `json:"sub"` // the same as UserID
	SessionID string `json:"sid"`
	TokenID   string `json:"jti"`
	NotBefore int64  `json:"nbf,omitempty"` // we never write it, but respect it
}

// keys has the secrets for one kind of token.
type keys struct {
	current  []byte // signs and verifies
	previous []byte // only verifies; empty if there is none
}

// sign returns a token with these claims.
func (k keys) sign(c claims) string {
	payload, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and integers always encode
	}
	return k.seal(jwtHeader + "." + base64url.EncodeToString(payload))
}

// verify returns the claims of a token. It returns errTokenExpired if the token has expired and
// nothing else is wrong with it, and errTokenInvalid if anything else is wrong.
func (k keys) verify(token string, now time.Time) (claims, error) {
	// The signature is checked first, so nothing of a forged token is ever parsed.
	signed, err := k.open(token)
	if err != nil {
		return claims{}, err
	}
	c, err := parseClaims(signed)
	if err != nil {
		return claims{}, errTokenInvalid
	}

	complete := c.UserID != "" && c.Subject == c.UserID && c.SessionID != "" && c.TokenID != ""
	if !complete || c.ExpiresAt == 0 || c.NotBefore > now.Unix() {
		return claims{}, errTokenInvalid
	}
	if c.ExpiresAt <= now.Unix() { // exp itself is already too late: RFC 7519 section 4.1.4
		return claims{}, errTokenExpired
	}
	return c, nil
}

// seal returns text with its signature.
func (k keys) seal(text string) string {
	return text + "." + signature(k.current, text)
}

// open returns the text that seal has sealed with one of the keys. It returns errTokenInvalid if
// none of them has.
func (k keys) open(sealed string) (string, error) {
	dot := strings.LastIndexByte(sealed, '.')
	if dot < 0 || len(sealed) > maxTokenBytes {
		return "", errTokenInvalid
	}
	text, shown := sealed[:dot], sealed[dot+1:]
	if !k.haveSigned(text, shown) {
		return "", errTokenInvalid
	}
	return text, nil
}

// haveSigned reports whether shown is the signature of text with one of the keys.
func (k keys) haveSigned(text, shown string) bool {
	if hmac.Equal([]byte(shown), []byte(signature(k.current, text))) {
		return true
	}
	if len(k.previous) == 0 { // everybody can sign with an empty key
		return false
	}
	return hmac.Equal([]byte(shown), []byte(signature(k.previous, text)))
}

// signature returns the HMAC-SHA-256 of text in base64url (RFC 7518 section 3.2). Signatures are
// compared in this form, so that each can be written in one way only.
func signature(key []byte, text string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return base64url.EncodeToString(mac.Sum(nil))
}

// parseClaims reads the claims in "header.payload", whose signature must have been checked. It
// accepts only our own header, so it refuses "none", other algorithms, and "crit".
func parseClaims(signed string) (claims, error) {
	payload, ok := strings.CutPrefix(signed, jwtHeader+".")
	if !ok || strings.ContainsAny(payload, "\r\n") { // the decoder would skip line breaks
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
