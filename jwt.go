package main

// jwt.go signs and verifies JSON Web Tokens (RFC 7519) as HS256 JWS compact serializations (RFC 7515,
// RFC 7518 section 3.2), and reads JSON strictly (RFC 8259 with the choices of RFC 7493). Pure functions:
// the clock is a parameter, and nothing here knows of HTTP or of the rest of the server.

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
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
	return signed + "." + string(signature(k.current, signed))
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
	if !hmac.Equal(given, signature(k.current, signed)) &&
		(len(k.previous) == 0 || !hmac.Equal(given, signature(k.previous, signed))) {
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
	members, err := readObject(data)
	c := claims{ // members that are not asked for are ignored (RFC 7519 section 4)
		UserID: members.text("userId", &err), Email: members.text("email", &err), Subject: members.text("sub", &err),
		SessionID: members.text("sid", &err), TokenID: members.text("jti", &err),
		IssuedAt: members.integer("iat", 0, &err), ExpiresAt: members.integer("exp", math.MinInt64, &err),
	}
	notBefore := members.integer("nbf", math.MinInt64, &err)
	switch {
	case err != nil, c.UserID == "", c.SessionID == "", c.TokenID == "", c.Subject != c.UserID,
		c.ExpiresAt == math.MinInt64, notBefore > now.Unix(): // RFC 7519 section 4.1.5
		return claims{}, errTokenInvalid
	case c.ExpiresAt <= now.Unix(): // "on or after which": RFC 7519 section 4.1.4
		return claims{}, errTokenExpired
	}
	return c, nil
}

// signature returns the base64url HMAC-SHA-256 of signed (RFC 7518 section 3.2).
func signature(key []byte, signed string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(signed))
	return base64url.AppendEncode(nil, mac.Sum(nil))
}

// readObject returns the raw values of the members of the JSON object that data is. What encoding/json lets
// through, and two readers may read in two ways, is errJSON: a member given twice, at any depth (RFC 7493
// section 2.3), and text that is no UTF-8, also by way of an unpaired surrogate escape (section 2.1). Names keep
// their case.
func readObject(data []byte) (object, error) {
	text := skipSpace(string(data))
	if !json.Valid(data) || !utf8.Valid(data) || text[0] != '{' {
		return nil, errJSON
	}
	members := make(object, 8)
	_, err := readMembers(text, members)
	return members, err
}

// object is the raw values of members, by name.
type object map[string]string

// text returns a member that is a string, "" if there is none; a member of another type sets err.
func (o object) text(name string, err *error) string {
	value, given := o[name]
	if given && value[0] != '"' {
		*err = errJSON
	}
	if *err != nil || !given {
		return ""
	}
	return unquote(value)
}

// integer returns a member that is a whole number without an exponent, fallback if there is none; any other
// value sets err.
func (o object) integer(name string, fallback int64, err *error) int64 {
	value, given := o[name]
	if !given {
		return fallback
	}
	n, bad := strconv.ParseInt(value, 10, 64)
	if bad != nil {
		*err = errJSON
	}
	return n
}

// readMembers reads the object that valid JSON data begins with into members and returns what is behind it.
func readMembers(data string, members object) (rest string, err error) {
	for data = skipSpace(data[1:]); data[0] != '}'; data = skipSpace(data) {
		if data[0] == ',' {
			data = skipSpace(data[1:])
		}
		if rest, err = readText(data); err != nil {
			return "", err
		}
		name := unquote(data[:len(data)-len(rest)])
		data = skipSpace(skipSpace(rest)[1:]) // the colon
		if rest, err = readValue(data); err != nil {
			return "", err
		}
		if _, twice := members[name]; twice {
			return "", errJSON
		}
		members[name], data = data[:len(data)-len(rest)], rest
	}
	return data[1:], nil
}

// readValue reads the value that valid JSON data begins with and returns what is behind it.
func readValue(data string) (rest string, err error) {
	switch data[0] {
	case '"':
		return readText(data)
	case '{':
		return readMembers(data, object{})
	case '[':
		for data = skipSpace(data[1:]); data[0] != ']'; data = skipSpace(data) {
			if data[0] == ',' {
				data = skipSpace(data[1:])
			}
			if data, err = readValue(data); err != nil {
				return "", err
			}
		}
		return data[1:], nil
	}
	for i, c := range []byte(data) { // a number, true, false or null
		if c == ',' || c == ']' || c == '}' || c <= ' ' {
			return data[i:], nil
		}
	}
	return "", errJSON
}

// readText reads the string that valid JSON data begins with and returns what is behind it.
func readText(data string) (rest string, err error) {
	unit := func(at int) rune { // the UTF-16 unit escaped at data[at:], 0 where there is none
		if data[at] != '\\' || data[at+1] != 'u' {
			return 0
		}
		n, _ := strconv.ParseUint(data[at+2:at+6], 16, 16)
		return rune(n)
	}
	for i := 1; ; i++ {
		switch data[i] {
		case '"':
			return data[i+1:], nil
		case '\\':
			if high := unit(i); utf16.IsSurrogate(high) {
				if utf16.DecodeRune(high, unit(i+6)) == utf8.RuneError {
					return "", errJSON
				}
				i += 6
			}
			i++ // whatever is escaped, a quote among it
		}
	}
}

// unquote returns the string that a valid JSON string is.
func unquote(quoted string) (s string) {
	if !strings.Contains(quoted, "\\") {
		return quoted[1 : len(quoted)-1]
	}
	_ = json.Unmarshal([]byte(quoted), &s)
	return s
}

// skipSpace returns data from its first byte that is no JSON white space.
func skipSpace(data string) string {
	for len(data) > 0 && (data[0] == ' ' || data[0] == '\t' || data[0] == '\r' || data[0] == '\n') {
		data = data[1:]
	}
	return data
}
