package integration

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
)

var b64 = base64.RawURLEncoding

const jwtHeader = `{"alg":"HS256","typ":"JWT"}`

// claimsOf reads a token's claims, whoever signed it.
func claimsOf(t testing.TB, token string) jwt.MapClaims {
	t.Helper()
	claims := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(token, claims); err != nil {
		t.Fatalf("token %q: %v", token, err)
	}
	return claims
}

// sign makes a token of any header and any payload, with a good signature: even what no library would make.
func sign(secret, header, payload string) string {
	input := b64.EncodeToString([]byte(header)) + "." + b64.EncodeToString([]byte(payload))
	return input + "." + signature(secret, input)
}

func signature(secret, input string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(input))
	return b64.EncodeToString(mac.Sum(nil))
}

// issue makes a token as an independent peer does.
func issue(t testing.TB, secret string, claims jwt.MapClaims) string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// changed is a token with other claims (nil removes one), signed by the secret given.
func changed(t testing.TB, secret, token string, other jwt.MapClaims) string {
	t.Helper()
	claims := claimsOf(t, token)
	claims["exp"], claims["iat"] = int64(claims["exp"].(float64)), int64(claims["iat"].(float64))
	maps.Copy(claims, other)
	maps.DeleteFunc(claims, func(_ string, v any) bool { return v == nil })
	return issue(t, secret, claims)
}

var pastClaims = jwt.MapClaims{"iat": time.Now().Add(-2 * time.Hour).Unix(), "exp": time.Now().Add(-time.Hour).Unix()}

// expired is an access token of the same session that has run out.
func (s *server) expired(access string) string {
	claims := jwt.MapClaims{}
	jwt.NewParser().ParseUnverified(access, claims)
	maps.Copy(claims, pastClaims)
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte(s.conf("JWT_SECRET")))
	if err != nil {
		panic(err)
	}
	return token
}

// me asks with an access token.
func (v *visitor) me(access string) *answer {
	v.t.Helper()
	return v.s.send(v.t, request{method: "GET", path: "/auth/me", bearer: access, ip: v.ip})
}

// forgeries are the tokens that must not pass, made from one that does.
func forgeries(t *testing.T, secret, otherSecret, good string) map[string]string {
	t.Helper()
	parts := strings.Split(good, ".")
	payload, err := b64.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	claims := string(payload)
	with := func(claims jwt.MapClaims) string { return changed(t, secret, good, claims) }
	// edited signs claims that are edited as text.
	edited := func(edit func(claims string) string) string { return sign(secret, jwtHeader, edit(claims)) }
	other := func(method jwt.SigningMethod, key any) string {
		token, err := jwt.NewWithClaims(method, claimsOf(t, good)).SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	// The last of a signature's 43 characters carries 4 bits in 6: with one of the other two set it is another spelling of
	// the same bytes.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	respelled := func(s string) string {
		i := strings.IndexByte(alphabet, s[len(s)-1])
		return s[:len(s)-1] + string(alphabet[i^1])
	}
	// A payload whose length leaves spare bits, spelled with one of them set, and signed like that.
	spare := claims
	for len(spare)%3 == 0 {
		spare = strings.Replace(spare, "{", "{ ", 1)
	}
	respelledInput := parts[0] + "." + respelled(b64.EncodeToString([]byte(spare)))
	padded := base64.URLEncoding.EncodeToString([]byte(spare))

	exp := fmt.Sprint(time.Now().Add(time.Hour).Unix())
	expTwice := func(name string) string {
		return edited(func(c string) string { return strings.Replace(c, "{", "{"+name+":"+exp+",", 1) })
	}
	bare := claimsOf(t, good)
	delete(bare, "exp")
	withoutExp, err := json.Marshal(bare)
	if err != nil {
		t.Fatal(err)
	}
	expAs := func(value string) string {
		return sign(secret, jwtHeader, strings.Replace(string(withoutExp), "{", `{"exp":`+value+`,`, 1))
	}
	return map[string]string{
		"alg none without signature":       other(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType),
		"alg none with the good signature": b64.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1] + "." + parts[2],
		"alg none, signed":                 sign(secret, `{"alg":"none","typ":"JWT"}`, claims),
		"alg HS384":                        other(jwt.SigningMethodHS384, []byte(secret)),
		"alg HS512":                        other(jwt.SigningMethodHS512, []byte(secret)),
		"alg hs256":                        sign(secret, `{"alg":"hs256","typ":"JWT"}`, claims),
		"alg RS256 over HS256's signature": sign(secret, `{"alg":"RS256","typ":"JWT"}`, claims),
		"header with kid":                  sign(secret, `{"alg":"HS256","typ":"JWT","kid":"1"}`, claims),
		"header in another order":          sign(secret, `{"typ":"JWT","alg":"HS256"}`, claims),
		"header with a space":              sign(secret, `{"alg": "HS256","typ":"JWT"}`, claims),
		"header without typ":               sign(secret, `{"alg":"HS256"}`, claims),
		"header with another typ":          sign(secret, `{"alg":"HS256","typ":"at+jwt"}`, claims),
		"header with b64":                  sign(secret, `{"alg":"HS256","typ":"JWT","b64":false,"crit":["b64"]}`, claims),
		"header twice alg":                 sign(secret, `{"alg":"HS256","typ":"JWT","alg":"HS256"}`, claims),
		"no signature":                     parts[0] + "." + parts[1] + ".",
		"two parts":                        parts[0] + "." + parts[1],
		"four parts":                       good + "." + parts[2],
		"a part in front":                  "." + good,
		"empty payload":                    sign(secret, jwtHeader, ""),
		"another's signature":              parts[0] + "." + parts[1] + "." + strings.Split(with(jwt.MapClaims{"x": 1}), ".")[2],
		"another payload":                  parts[0] + "." + strings.Split(with(jwt.MapClaims{"x": 1}), ".")[1] + "." + parts[2],
		"the signature cut short":          good[:len(good)-2],
		"signed with the other secret":     changed(t, otherSecret, good, nil),
		"signed with no secret":            changed(t, "\x00", good, nil), // to HMAC the same as the empty key
		"signed with a prefix of it":       changed(t, secret[:len(secret)-1], good, nil),
		"signature in another spelling":    parts[0] + "." + parts[1] + "." + respelled(parts[2]),
		"payload in another spelling":      respelledInput + "." + signature(secret, respelledInput),
		"payload with padding":             parts[0] + "." + padded + "." + signature(secret, parts[0]+"."+padded),
		"signature with padding":           good + "=",
		"signature in hex":                 parts[0] + "." + parts[1] + "." + fmt.Sprintf("%x", parts[2]),
		"no exp":                           with(jwt.MapClaims{"exp": nil}),
		"Exp instead of exp":               with(jwt.MapClaims{"exp": nil, "Exp": time.Now().Add(time.Hour).Unix()}),
		"exp with a fraction":              expAs(exp + ".5"),
		"exp as text":                      expAs(`"` + exp + `"`),
		"exp null":                         expAs("null"),
		"exp true":                         expAs("true"),
		"exp beyond every integer":         expAs("99999999999999999999999999"),
		"exp an array":                     expAs("[" + exp + "]"),
		"exp twice":                        expTwice(`"exp"`),
		"exp twice, once in escapes":       expTwice(`"\u0065xp"`),
		"sid twice":                        edited(func(c string) string { return strings.Replace(c, "{", `{"sid":"`+uuid.NewString()+`",`, 1) }),
		"nbf in the future":                with(jwt.MapClaims{"nbf": time.Now().Add(time.Hour).Unix()}),
		"claims with trailing data":        edited(func(c string) string { return c + "{}" }),
		"claims with invalid UTF-8":        edited(func(c string) string { return strings.Replace(c, "{", "{\"x\":\"\xff\",", 1) }),
		"claims in an array":               edited(func(c string) string { return "[" + c + "]" }),
		"claims with a wrong type":         with(jwt.MapClaims{"sid": 7}),
		"claims without sid":               with(jwt.MapClaims{"sid": nil}),
		"expired and wrongly signed":       changed(t, otherSecret, good, pastClaims),
		"a token of 4,097 characters":      sized(t, secret, good, 4097),
		"a token of 8,000 characters":      sized(t, secret, good, 8000),
		"no token at all":                  "nonsense",
		"dots":                             "..",
		"spaces before the signature":      parts[0] + "." + parts[1] + ". " + parts[2],
		"the token twice, comma between":   good + "," + good,
	}
}

// sized is the same token with a claim of padding, so that it has exactly this many characters.
func sized(t *testing.T, secret, good string, size int) string {
	t.Helper()
	payload, _ := b64.DecodeString(strings.Split(good, ".")[1])
	for n := range size {
		grown := strings.Replace(string(payload), "{", `{"padding":"`+strings.Repeat("x", n)+`",`, 1)
		if token := sign(secret, jwtHeader, grown); len(token) == size {
			return token
		} else if len(token) > size {
			break
		}
	}
	t.Fatalf("no token of %d characters", size)
	return ""
}

var tokens = []promise{
	{"the header is exactly {\"alg\":\"HS256\",\"typ\":\"JWT\"}", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for _, token := range []string{v.access, v.refresh} {
			header, err := b64.DecodeString(strings.Split(token, ".")[0])
			if err != nil || string(header) != jwtHeader {
				t.Errorf("header %s (%v)", header, err)
			}
		}
	}},
	{"the claims are userId, email, iat, exp, sub, sid and jti", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		other := v.login()
		jtis := map[any]bool{}
		for _, token := range []string{v.access, v.refresh, other.access, other.refresh} {
			claims := claimsOf(t, token)
			members(t, claims, "userId", "email", "iat", "exp", "sub", "sid", "jti")
			if claims["userId"] != v.id || claims["sub"] != v.id || claims["email"] != v.email {
				t.Errorf("claims %v", claims)
			}
			isNow(t, time.Unix(int64(claims["iat"].(float64)), 0).UTC().Format(time.RFC3339))
			jtis[claims["jti"]] = true
		}
		if len(jtis) != 4 {
			t.Errorf("%d different jti in 4 tokens", len(jtis))
		}
		if claimsOf(t, v.access)["sid"] != claimsOf(t, v.refresh)["sid"] || v.sid() == other.sid() {
			t.Error("sid does not name the session")
		}
		sid := v.sid()
		v.rotate()
		if v.sid() != sid {
			t.Error("a refresh changed the session's id")
		}
	}},
	{"an access token lives ACCESS_TOKEN_TTL (15 minutes), a refresh token REFRESH_TOKEN_TTL (7 days)", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		for token, ttl := range map[string]time.Duration{v.access: s.duration("ACCESS_TOKEN_TTL"), v.refresh: s.duration("REFRESH_TOKEN_TTL")} {
			claims := claimsOf(t, token)
			if life := claims["exp"].(float64) - claims["iat"].(float64); life != ttl.Seconds() {
				t.Errorf("a token lives %v seconds, want %v", life, ttl)
			}
		}
	}},
	{"an access token is signed with JWT_SECRET, a refresh token with JWT_REFRESH_SECRET", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		for token, secret := range map[string]string{v.access: s.conf("JWT_SECRET"), v.refresh: s.conf("JWT_REFRESH_SECRET")} {
			_, err := jwt.Parse(token, func(*jwt.Token) (any, error) { return []byte(secret), nil }, jwt.WithValidMethods([]string{"HS256"}))
			if err != nil {
				t.Error(err)
			}
		}
	}},
	{"neither token passes for the other", aURL, func(t *testing.T, s *server) {
		v := s.signup(t)
		v.me(v.refresh).refused(401, "invalid_token")
		v.show(v.access).refused(401, "invalid_token")
		s.send(t, request{method: "POST", path: "/auth/logout", bearer: v.refresh}).refused(401, "invalid_token")
		s.send(t, request{method: "POST", path: "/auth/logout", cookie: v.access}).refused(401, "invalid_token")
		v.lives()
	}},
	{"an independent library's tokens pass, with claims of its own, an nbf in the past and an iat in the future", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		secret := s.conf("JWT_SECRET")
		v.me(changed(t, secret, v.access, nil)).want(200)
		v.me(changed(t, secret, v.access, jwt.MapClaims{"nbf": time.Now().Add(-time.Hour).Unix(), "aud": "x"})).want(200)
		v.me(changed(t, secret, v.access, jwt.MapClaims{"iat": time.Now().Add(time.Hour).Unix()})).want(200)
		v.me(sized(t, secret, v.access, 4096)).want(200)
		v.refresh = changed(t, s.conf("JWT_REFRESH_SECRET"), v.refresh, jwt.MapClaims{"iat": time.Now().Add(time.Hour).Unix()})
		v.rotate()
	}},
	{"no forged access token passes: other headers, spellings, exp, nbf, signatures, sizes", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		for name, token := range forgeries(t, s.conf("JWT_SECRET"), s.conf("JWT_REFRESH_SECRET"), v.access) {
			if a := v.fromNewIP().me(token); a.status() != 401 || a.code() != "invalid_token" {
				t.Errorf("%s: %d %s", name, a.status(), a.body)
			}
		}
		v.lives()
	}},
	{"no forged refresh token passes", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		for name, token := range forgeries(t, s.conf("JWT_REFRESH_SECRET"), s.conf("JWT_SECRET"), v.refresh) {
			if strings.ContainsAny(token, " ,") {
				continue // no cookie value
			}
			a := v.fromNewIP().show(token)
			if a.status() != 401 || a.code() != "invalid_token" {
				t.Errorf("%s: %d %s", name, a.status(), a.body)
			}
			a.clearsCookie()
		}
		v.lives()
	}},
	{"token_expired is 401 for a token past exp", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		v.me(s.expired(v.access)).refused(401, "token_expired")
		s.send(t, request{method: "PUT", path: "/auth/password", bearer: s.expired(v.access)}).refused(401, "token_expired")
		v.show(changed(t, s.conf("JWT_REFRESH_SECRET"), v.refresh, pastClaims)).refused(401, "token_expired").clearsCookie()
		v.lives()
	}},
	{"a token ends at its own exp", own, func(t *testing.T, _ *server) {
		s := serve(t, home, development.with(vars{"ACCESS_TOKEN_TTL": "2s", "REFRESH_TOKEN_TTL": "3s"}))
		v := s.signup(t)
		v.me(v.access).want(200)
		eventually(t, 10*time.Second, "the access token runs out", func() bool { return v.me(v.access).code() == "token_expired" })
		eventually(t, 10*time.Second, "the refresh token runs out", func() bool {
			// Its session has run out with it, so this or that may be seen first.
			a := s.send(t, request{method: "POST", path: "/auth/logout", cookie: v.refresh, bearer: v.access})
			return a.status() == 401 && time.Now().Unix() > int64(claimsOf(t, v.refresh)["exp"].(float64))
		})
		v.show(v.refresh).refused(401, "token_expired").clearsCookie()
	}},
	{"JWT_SECRET_PREVIOUS and JWT_REFRESH_SECRET_PREVIOUS still verify, never sign; two rotations old is refused", own, func(t *testing.T, _ *server) {
		generation := func(n int) (access, refresh string) {
			return fmt.Sprintf("access-secret-of-generation-%d-long-enough", n), fmt.Sprintf("refresh-secret-of-generation-%d-long-enough", n)
		}
		start := func(n int) *server {
			env := vars{}
			env["JWT_SECRET"], env["JWT_REFRESH_SECRET"] = generation(n)
			if n > 1 {
				env["JWT_SECRET_PREVIOUS"], env["JWT_REFRESH_SECRET_PREVIOUS"] = generation(n - 1)
			}
			return serve(t, home, development.with(env))
		}
		first, second, third := start(1), start(2), start(3)
		v := first.signup(t)
		idle := v.login()
		moved := v.on(second)
		moved.me(moved.access).want(200)
		moved.rotate()
		access, refresh := generation(2)
		for token, secret := range map[string]string{moved.access: access, moved.refresh: refresh} {
			if _, err := jwt.Parse(token, func(*jwt.Token) (any, error) { return []byte(secret), nil }); err != nil {
				t.Errorf("a token of the second generation: %v", err)
			}
		}
		moved = moved.on(third)
		moved.lives()
		idle = idle.on(third)
		idle.me(idle.access).refused(401, "invalid_token")
		idle.show(idle.refresh).refused(401, "invalid_token")
		moved.on(first).me(moved.access).refused(401, "invalid_token")
	}},
	{"the cookie is refreshToken; Path=/auth; HttpOnly; SameSite=Strict with Max-Age, and Secure unless NODE_ENV=development", own, func(t *testing.T, _ *server) {
		for _, env := range []vars{nil, {"NODE_ENV": "staging"}, development} {
			s := serve(t, home, env)
			v := s.signup(t)
			a := v.rotate()
			attributes := strings.Split(a.Header.Get("Set-Cookie"), "; ")[1:]
			slices.Sort(attributes)
			want := []string{"HttpOnly", "Max-Age=604800", "Path=/auth", "SameSite=Strict"}
			if s.conf("NODE_ENV") != "development" {
				want = append(want, "Secure")
			}
			if !slices.Equal(attributes, want) {
				t.Errorf("%s: attributes %q, want %q", s.conf("NODE_ENV"), attributes, want)
			}
			cleared := v.send("POST", "/auth/logout", nil).want(200).clearsCookie().refreshCookie()
			if !cleared.HttpOnly || cleared.Secure != (s.conf("NODE_ENV") != "development") {
				t.Errorf("%s: cleared with %q", s.conf("NODE_ENV"), cleared.Raw)
			}
		}
	}},
	{"COOKIE_SAMESITE is strict, lax or none", own, func(t *testing.T, _ *server) {
		for _, value := range []string{"strict", "lax", "none"} {
			s := serve(t, home, vars{"COOKIE_SAMESITE": value})
			v := s.signup(t) // a success asserts nothing of the cookie yet
			s.assertRefreshCookie(v.rotate())
		}
	}},
	{"a good access token of no living session is 401 session_revoked", secrets, func(t *testing.T, s *server) {
		v := s.signup(t)
		v.me(changed(t, s.conf("JWT_SECRET"), v.access, jwt.MapClaims{"sid": uuid.NewString()})).refused(401, "session_revoked")
		v.show(changed(t, s.conf("JWT_REFRESH_SECRET"), v.refresh, jwt.MapClaims{"sid": uuid.NewString()})).refused(401, "session_revoked")
	}},
}

// fromNewIP is the same session from another address, for tests with more requests than one address has.
func (v *visitor) fromNewIP() *visitor {
	other := *v
	other.ip = newIP()
	return &other
}
