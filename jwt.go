package main

// jwt.go signs and verifies HS256 tokens (RFC 7519, RFC 7515) and reads JSON strictly: pure functions, time is given.

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// jwtHeader is base64url({"alg":"HS256","typ":"JWT"}) and a dot: the one header that is written or accepted. The
	// algorithm is pinned here and never read from a token (RFC 8725 section 3.1).
	jwtHeader     = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."
	maxTokenBytes = 4096
)

var (
	errTokenInvalid = errors.New("token does not verify")
	errTokenExpired = errors.New("token has expired")
	errJSON         = errors.New("not one strict JSON object")

	// base64url is RFC 7515's encoding; Strict refuses set bits behind the last character: one spelling a token.
	base64url = base64.RawURLEncoding.Strict()
)

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
	payload, _ := json.Marshal(c) // strings and integers always encode
	signed := jwtHeader + base64url.EncodeToString(payload)
	return signed + "." + string(signature(k.current, signed))
}

// verify returns the token's claims; errTokenExpired if its time is all that is wrong with it, else errTokenInvalid.
func (k keys) verify(token string, now time.Time) (claims, error) {
	dot := strings.LastIndexByte(token, '.')
	if len(token) > maxTokenBytes || dot < 0 {
		return claims{}, errTokenInvalid
	}
	// The signature before all else: nothing of a forged token is ever parsed (RFC 8725 section 3.3). Comparing its
	// encoding refuses every other spelling of it. No secret is no key: anybody could sign with that.
	signed, given := token[:dot], []byte(token[dot+1:])
	if !hmac.Equal(given, signature(k.current, signed)) &&
		(len(k.previous) == 0 || !hmac.Equal(given, signature(k.previous, signed))) {
		return claims{}, errTokenInvalid
	}
	payload, ok := strings.CutPrefix(signed, jwtHeader) // "none", other algorithms, "crit", other spellings
	data, err := base64url.DecodeString(payload)
	if !ok || err != nil || strings.Contains(payload, "\r") || strings.Contains(payload, "\n") { // which it skips
		return claims{}, errTokenInvalid
	}
	members, err := readObject(data)
	c := claims{ // other members are ignored (RFC 7519 section 4)
		UserID: members.text("userId", &err), Email: members.text("email", &err), Subject: members.text("sub", &err),
		SessionID: members.text("sid", &err), TokenID: members.text("jti", &err),
		IssuedAt: members.integer("iat", &err), ExpiresAt: members.integer("exp", &err),
	}
	notBefore := members.integer("nbf", &err)
	switch {
	case err != nil, c.UserID == "", c.SessionID == "", c.TokenID == "", c.Subject != c.UserID,
		members["exp"] == "", notBefore > now.Unix(): // RFC 7519 section 4.1.5
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

// object is the raw values of an object's members, by name.
type object map[string]string

// text returns a member that is a string, "" if there is none; one of another type sets err.
func (o object) text(name string, err *error) string {
	value := cmp.Or(o[name], `""`)
	if value[0] != '"' {
		*err, value = errJSON, `""`
	}
	return unquote(value)
}

// integer returns a member that is a whole number in plain digits, 0 if there is none; any other sets err.
func (o object) integer(name string, err *error) int64 {
	n, bad := strconv.ParseInt(cmp.Or(o[name], "0"), 10, 64)
	if bad != nil {
		*err = errJSON
	}
	return n
}

var (
	// escapes are those of a JSON string that say nothing wrong; what is left of surrogates then has no partner.
	escapes       = regexp.MustCompile(`\\[^u]|\\u[dD][89abAB]..\\u[dD][c-fC-F]..`)
	loneSurrogate = regexp.MustCompile(`\\u[dD][89a-fA-F]`)
)

// readObject reads the JSON object that data is. What encoding/json lets through and others read otherwise is errJSON: a
// member given twice, at any depth, and text that is no UTF-8 or has unpaired surrogates (RFC 7493 sections 2.3, 2.1).
func readObject(data []byte) (object, error) {
	text := strings.TrimSpace(string(data))
	if !json.Valid(data) || !utf8.Valid(data) || text[0] != '{' ||
		strings.Contains(text, `\u`) && loneSurrogate.MatchString(escapes.ReplaceAllString(text, "")) {
		return nil, errJSON
	}
	members := make(object, 8)
	open := []object{members}                  // what encloses the place that is read; nil is an array
	isName, name, start := true, "", len(text) // of the outermost member that is read: name, begin of the value
	for i := 1; i < len(text); i++ {
		inner := open[len(open)-1]
		switch text[i] {
		case '"':
			begin := i
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			if isName {
				key := unquote(text[begin : i+1])
				if _, twice := inner[key]; twice {
					return nil, errJSON
				}
				if isName = false; len(open) == 1 {
					name, start = key, i+2+strings.IndexByte(text[i+1:], ':')
				} else {
					inner[key] = "" // its value is of no interest
				}
			}
		case '{':
			open, isName = append(open, object{}), true
		case '[':
			open, isName = append(open, nil), false
		case ',', '}', ']':
			if len(open) == 1 && start < i {
				members[name] = strings.TrimSpace(text[start:i])
			}
			if text[i] == ',' {
				isName = inner != nil
			} else {
				open, isName = open[:len(open)-1], false
			}
		}
	}
	return members, nil
}

// unquote returns what a valid JSON string says.
func unquote(quoted string) string {
	if !strings.Contains(quoted, `\`) {
		return quoted[1 : len(quoted)-1]
	}
	var s string
	_ = json.Unmarshal([]byte(quoted), &s)
	return s
}
