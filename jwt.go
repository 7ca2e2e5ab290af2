package main

// jwt.go signs and verifies JSON Web Tokens (RFC 7519) as HS256 JWS compact serializations (RFC 7515,
// RFC 7518 section 3.2), and reads JSON strictly (RFC 8259 with the choices of RFC 7493). Pure functions:
// the clock is a parameter, and nothing here knows of HTTP or of the rest of the server.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// jwtHeader is base64url({"alg":"HS256","typ":"JWT"}) and the dot behind it: the one header that is
	// written or accepted. The algorithm is pinned here and never read from a token (RFC 8725 section 3.1).
	jwtHeader = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."

	maxTokenBytes = 4096
)

var (
	errTokenInvalid = errors.New("token does not verify")
	errTokenExpired = errors.New("token has expired")
	errJSON         = errors.New("not one strict JSON object")
)

// base64url is RFC 7515's encoding; Strict refuses set bits behind the last character, so that a token
// has one spelling only.
var base64url = base64.RawURLEncoding.Strict()

// claims is the payload of both token types. Times are NumericDates, whole seconds (RFC 7519 section 2).
type claims struct {
	UserID    string `json:"userId"`
	Email     string `json:"email"`
	IssuedAt  int64  `json:"iat"`
	ExpiresAt int64  `json:"exp"`
	Subject   string `json:"sub"` // = UserID
	SessionID string `json:"sid"`
	TokenID   string `json:"jti"`
}

// keys is the secret that signs one token type and the one it replaced, if any, which still verifies.
type keys struct{ current, previous []byte }

// sign returns the token that carries c.
func (k keys) sign(c claims) string {
	payload, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and integers always encode
	}
	signed := jwtHeader + base64url.EncodeToString(payload)
	return signed + "." + signature(k.current, signed)
}

// verify returns the claims of token if it is well formed, signed with one of k and not expired at now;
// else errTokenExpired where the expiry is all that is wrong, or errTokenInvalid.
func (k keys) verify(token string, now time.Time) (claims, error) {
	dot := strings.LastIndexByte(token, '.')
	if len(token) > maxTokenBytes || dot < 0 {
		return claims{}, errTokenInvalid
	}
	// The signature before all else: nothing of a forged token is ever parsed (RFC 8725 section 3.3).
	// Comparing its encoding also refuses every other spelling of it.
	signed, given := token[:dot], []byte(token[dot+1:])
	if !hmac.Equal(given, []byte(signature(k.current, signed))) &&
		(k.previous == nil || !hmac.Equal(given, []byte(signature(k.previous, signed)))) {
		return claims{}, errTokenInvalid
	}
	payload, ok := strings.CutPrefix(signed, jwtHeader) // "none", other algorithms, "crit", other spellings
	if !ok || strings.ContainsAny(payload, "\r\n") {    // the decoder skips line breaks
		return claims{}, errTokenInvalid
	}
	data, err := base64url.DecodeString(payload)
	if err != nil {
		return claims{}, errTokenInvalid
	}
	c, notBefore, err := readClaims(data)
	switch {
	case err != nil, c.UserID == "", c.SessionID == "", c.TokenID == "", c.Subject != c.UserID,
		notBefore > now.Unix(): // RFC 7519 section 4.1.5
		return claims{}, errTokenInvalid
	case c.ExpiresAt <= now.Unix(): // "on or after which": RFC 7519 section 4.1.4
		return claims{}, errTokenExpired
	}
	return c, nil
}

// signature returns the base64url HMAC-SHA-256 of signed (RFC 7518 section 3.2).
func signature(key []byte, signed string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(signed))
	return base64url.EncodeToString(mac.Sum(nil))
}

// readClaims reads a payload, and its nbf apart. Members it does not know are ignored (RFC 7519
// section 4); a known one of another type, a time that is no integer and a missing exp are errors.
func readClaims(data []byte) (c claims, notBefore int64, err error) {
	expires := false
	err = readObject(data, func(name string, value []byte) (err error) {
		switch name {
		case "userId":
			c.UserID, err = readString(value)
		case "email":
			c.Email, err = readString(value)
		case "sub":
			c.Subject, err = readString(value)
		case "sid":
			c.SessionID, err = readString(value)
		case "jti":
			c.TokenID, err = readString(value)
		case "iat":
			c.IssuedAt, err = readInt(value)
		case "nbf":
			notBefore, err = readInt(value)
		case "exp":
			c.ExpiresAt, err = readInt(value)
			expires = true
		}
		return err
	})
	if err == nil && !expires {
		err = errJSON
	}
	return c, notBefore, err
}

// readObject calls member with the name and the raw value of each member of the JSON object that data
// is. What encoding/json lets through, and two readers may read in two ways, is errJSON: a member given
// twice, at any depth (RFC 7493 section 2.3), and text that is no UTF-8, also by way of an unpaired
// surrogate escape (section 2.1). Names are matched by the caller, with their exact case.
func readObject(data []byte, member func(name string, value []byte) error) error {
	data = skipSpace(data)
	if !json.Valid(data) || !utf8.Valid(data) || data[0] != '{' {
		return errJSON
	}
	_, err := object(data, member)
	return err
}

// object reads the object that valid JSON data begins with and returns what is behind it.
func object(data []byte, member func(name string, value []byte) error) (rest []byte, err error) {
	seen := make(map[string]struct{}, 8)
	for data = skipSpace(data[1:]); data[0] != '}'; data = skipSpace(data) {
		if data[0] == ',' {
			data = skipSpace(data[1:])
		}
		if rest, err = text(data); err != nil {
			return nil, err
		}
		name, err := readString(data[:len(data)-len(rest)])
		if err != nil {
			return nil, err
		}
		if _, twice := seen[name]; twice {
			return nil, errJSON
		}
		seen[name] = struct{}{}
		data = skipSpace(skipSpace(rest)[1:]) // the colon
		if rest, err = value(data); err != nil {
			return nil, err
		}
		if err = member(name, data[:len(data)-len(rest)]); err != nil {
			return nil, err
		}
		data = rest
	}
	return data[1:], nil
}

// value reads the value that valid JSON data begins with and returns what is behind it.
func value(data []byte) (rest []byte, err error) {
	switch data[0] {
	case '"':
		return text(data)
	case '{':
		return object(data, func(string, []byte) error { return nil })
	case '[':
		for data = skipSpace(data[1:]); data[0] != ']'; data = skipSpace(data) {
			if data[0] == ',' {
				data = skipSpace(data[1:])
			}
			if data, err = value(data); err != nil {
				return nil, err
			}
		}
		return data[1:], nil
	}
	end := bytes.IndexAny(data, ",]} \t\r\n") // a number, true, false or null
	return data[end:], nil
}

// text reads the string that valid JSON data begins with and returns what is behind it.
func text(data []byte) (rest []byte, err error) {
	unit := func(at int) rune { // the UTF-16 unit escaped at data[at:], 0 where there is none
		if data[at] != '\\' || data[at+1] != 'u' {
			return 0
		}
		n, _ := strconv.ParseUint(string(data[at+2:at+6]), 16, 16)
		return rune(n)
	}
	for i := 1; ; i++ {
		switch data[i] {
		case '"':
			return data[i+1:], nil
		case '\\':
			if high := unit(i); utf16.IsSurrogate(high) {
				if utf16.DecodeRune(high, unit(i+6)) == utf8.RuneError {
					return nil, errJSON
				}
				i += 6
			}
			i++ // whatever is escaped, a quote among it
		}
	}
}

// skipSpace returns data from its first byte that is no JSON white space.
func skipSpace(data []byte) []byte {
	for len(data) > 0 && (data[0] == ' ' || data[0] == '\t' || data[0] == '\r' || data[0] == '\n') {
		data = data[1:]
	}
	return data
}

// readString returns the string that the JSON value is; another type is errJSON.
func readString(value []byte) (s string, err error) {
	if value[0] != '"' {
		return "", errJSON
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return string(value[1 : len(value)-1]), nil
	}
	return s, json.Unmarshal(value, &s)
}

// readInt returns the integer that the JSON value is; a fraction, an exponent or another type is an error.
func readInt(value []byte) (int64, error) {
	return strconv.ParseInt(string(value), 10, 64)
}
