package contract

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
)

func newUUID() string { return uuid.NewString() }

var b64 = base64.RawURLEncoding

const jwtHeader = `{"alg":"HS256","typ":"JWT"}`

// claims are a token's.
type claims jwt.MapClaims

func (c claims) number(name string) int64 {
	n, _ := c[name].(float64)
	return int64(n)
}

func (c claims) text(name string) string {
	text, _ := c[name].(string)
	return text
}

// claims reads a token's claims, whoever has signed it.
func (s *server) claims(token string) claims {
	s.Helper()
	c := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(token, c); err != nil {
		s.Errorf("token %q: %v", token, err)
	}
	return claims(c)
}

// sign makes a token of any header and payload with a good signature, even what no library would.
func sign(secret, header, payload string) string {
	return signed(secret, b64.EncodeToString([]byte(header))+"."+b64.EncodeToString([]byte(payload)))
}

// signed adds a signature to the first two parts of a token.
func signed(secret, parts string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(parts))
	return parts + "." + b64.EncodeToString(mac.Sum(nil))
}

// changed is a token with other claims (nil removes one), signed anew by an independent library.
func (s *server) changed(secret, token string, other claims) string {
	s.Helper()
	c := s.claims(token)
	c["exp"], c["iat"] = c.number("exp"), c.number("iat") // no floats
	maps.Copy(c, other)
	maps.DeleteFunc(c, func(_ string, value any) bool { return value == nil })
	unsigned := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims(c))
	text, err := unsigned.SignedString([]byte(secret))
	if err != nil {
		s.Fatal(err)
	}
	return text
}

// accessWith is the client's access token with other claims.
func (c *client) accessWith(other claims) string {
	return c.s.changed(c.s.conf("JWT_SECRET"), c.access, other)
}

// refreshWith is the client's refresh token with other claims.
func (c *client) refreshWith(other claims) string {
	return c.s.changed(c.s.conf("JWT_REFRESH_SECRET"), c.refresh, other)
}

// expired is a token's exp that has just come.
func expired() claims { return claims{"exp": time.Now().Unix()} }

func inAnHour() int64  { return time.Now().Add(time.Hour).Unix() }
func anHourAgo() int64 { return time.Now().Add(-time.Hour).Unix() }

// sized is a token with a claim of padding, so that it has this many characters.
func (s *server) sized(secret, token string, size int) string {
	for n := range size {
		padded := s.changed(secret, token, claims{"padding": strings.Repeat("x", n)})
		if len(padded) == size {
			return padded
		}
	}
	s.Fatalf("no token of %d characters", size)
	return ""
}

var tokenPromises = []promise{
	{`the header is exactly {"alg":"HS256","typ":"JWT"}`, aURL, func(s *server) {
		c := s.signup()
		for _, token := range []string{c.access, c.refresh} {
			header, err := b64.DecodeString(strings.Split(token, ".")[0])
			if err != nil || string(header) != jwtHeader {
				s.Errorf("the header is %s (%v)", header, err)
			}
		}
	}},
	{"the claims are userId, email, iat, exp, sub, sid and jti", aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		ids := map[string]bool{}
		for _, token := range []string{c.access, c.refresh, other.access, other.refresh} {
			got := s.claims(token)
			names := strings.Join(slices.Sorted(maps.Keys(got)), " ")
			if names != "email exp iat jti sid sub userId" || got.text("email") != c.email ||
				got.text("userId") != c.id || got.text("sub") != c.id {
				s.Errorf("the claims are %v", got)
			}
			s.isNow(time.Unix(got.number("iat"), 0).UTC().Format(time.RFC3339))
			ids[got.text("jti")] = true
		}
		if len(ids) != 4 || s.claims(c.refresh).text("sid") != c.sid() || c.sid() == other.sid() {
			s.Error("jti does not name the token, or sid the session")
		}
	}},
	{"ACCESS_TOKEN_TTL is 15 minutes, REFRESH_TOKEN_TTL 7 days", aURL, func(s *server) {
		c := s.signup()
		for token, name := range map[string]string{
			c.access: "ACCESS_TOKEN_TTL", c.refresh: "REFRESH_TOKEN_TTL",
		} {
			got := s.claims(token)
			if life := got.number("exp") - got.number("iat"); life != int64(s.duration(name).Seconds()) {
				s.Errorf("%s: a token lives %d s", name, life)
			}
		}
	}},
	{"an access token is signed with JWT_SECRET, a refresh token with JWT_REFRESH_SECRET", secrets,
		func(s *server) {
			c := s.signup()
			s.assertSigned(c.access, s.conf("JWT_SECRET"))
			s.assertSigned(c.refresh, s.conf("JWT_REFRESH_SECRET"))
		}},
	{"neither token passes for the other", aURL, func(s *server) {
		c := s.signup()
		c.me(c.refresh).refused("invalid_token")
		c.show(c.access).refused("invalid_token")
		s.send(post("/auth/logout").bearer(c.refresh)).refused("invalid_token")
		s.send(post("/auth/logout").cookie(c.access)).refused("invalid_token")
		c.lives()
	}},
	{"the scheme Bearer is matched without regard to case, and there is no other", aURL,
		func(s *server) {
			c := s.signup()
			for authorization, code := range map[string]string{
				"bearer " + c.access: "", "BEARER " + c.access: "", "Bearer  " + c.access: "",
				"Basic " + c.access: "missing_token", c.access: "missing_token",
			} {
				a := c.send(get("/auth/me").with("Authorization", authorization))
				a.shouldBe(code, authorization)
			}
		}},
	{"an independent library's tokens pass, with claims of its own, nbf in the past, iat in the future",
		secrets, func(s *server) {
			c := s.signup()
			c.me(c.accessWith(nil)).ok()
			c.me(c.accessWith(claims{"nbf": anHourAgo(), "aud": "x", "x": []any{1}})).ok()
			c.me(c.accessWith(claims{"iat": inAnHour()})).ok()
			c.me(s.sized(s.conf("JWT_SECRET"), c.access, 4096)).ok()
			c.refresh = c.refreshWith(claims{"iat": inAnHour()})
			c.rotate()
		}},
	{"no forged access token passes: header, spelling, claims, signature, size", secrets,
		func(s *server) {
			c := s.signup()
			forged := s.forgeries(s.conf("JWT_SECRET"), s.conf("JWT_REFRESH_SECRET"), c.access)
			for name, token := range forged {
				c.elsewhere().me(token).shouldBe("invalid_token", name)
			}
			c.lives()
		}},
	{"no forged refresh token passes", secrets, func(s *server) {
		c := s.signup()
		forged := s.forgeries(s.conf("JWT_REFRESH_SECRET"), s.conf("JWT_SECRET"), c.refresh)
		for name, token := range forged {
			c.elsewhere().show(token).shouldBe("invalid_token", name)
		}
		c.lives()
	}},
	{"two refreshToken cookies with different values are 401 invalid_token, in any order", aURL,
		func(s *server) {
			c := s.signup()
			stranger := s.signup()
			for _, other := range []string{"x", "", stranger.refresh, c.access} {
				for _, pair := range [][2]string{{c.refresh, other}, {other, c.refresh}} {
					cookies := "refreshToken=" + pair[0] + "; refreshToken=" + pair[1]
					for _, path := range []string{"/auth/refresh", "/auth/logout"} {
						a := s.send(post(path).with("Cookie", cookies)).shouldBe("invalid_token", cookies)
						a.clearsCookie()
					}
				}
			}
			stranger.lives()
			twice := "a=b; refreshToken=" + c.refresh + "; refreshToken=" + c.refresh
			c.take(s.send(post("/auth/refresh").with("Cookie", twice)).ok()) // the same is no guess
		}},
	{"token_expired is 401 for a token past exp", secrets, func(s *server) {
		c := s.signup()
		c.me(c.accessWith(expired())).refused("token_expired")
		c.send(put("/auth/password").bearer(c.accessWith(expired()))).refused("token_expired")
		c.show(c.refreshWith(expired())).refused("token_expired")
		c.lives()
	}},
	{"a token ends at its own exp, and a session with its refresh token", own, func(s *server) {
		s = s.start(env{"ACCESS_TOKEN_TTL": "1s", "REFRESH_TOKEN_TTL": "2s"})
		c := s.signup()
		other := s.start(nil).signup() // whose tokens live longer, but not its own session's
		s.eventually(5*time.Second, "the access token runs out", func() bool {
			return c.me(c.access).code() == "token_expired"
		})
		s.eventually(5*time.Second, "the refresh token runs out", func() bool {
			return s.send(post("/auth/logout").cookie(c.refresh)).code() == "token_expired"
		})
		c.show(c.refresh).refused("token_expired")
		other.lives()
	}},
	{"a good token of no living session is session_revoked", secrets, func(s *server) {
		c := s.signup()
		c.me(c.accessWith(claims{"sid": newUUID()})).refused("session_revoked")
		c.show(c.refreshWith(claims{"sid": newUUID(), "jti": newUUID()})).refused("session_revoked")
	}},
	{"JWT_SECRET_PREVIOUS and JWT_REFRESH_SECRET_PREVIOUS verify and never sign; older is refused",
		own, rotatesSecrets},
	{"the cookie is Path=/auth; HttpOnly; SameSite=Strict with Max-Age, Secure but in development",
		own, func(s *server) {
			// Every cookie is held to the configuration, see assertCookie; here are all of it.
			for _, more := range []env{
				production, production.with(env{"COOKIE_SAMESITE": "none"}),
				production.with(env{"NODE_ENV": "staging", "COOKIE_SAMESITE": "lax"}),
				{"COOKIE_SAMESITE": "lax", "REFRESH_TOKEN_TTL": "1h"},
			} {
				c := s.start(more).signup()
				c.rotate()
				c.logout().ok().clearsCookie()
			}
			cookie := s.signup().last.Header.Get("Set-Cookie")
			_, attributes, _ := strings.Cut(cookie, "; ")
			if attributes != "Path=/auth; Max-Age=604800; HttpOnly; SameSite=Strict" {
				s.Errorf("Set-Cookie is %s", cookie)
			}
		}},
}

func (s *server) assertSigned(token, secret string) {
	s.Helper()
	key := func(*jwt.Token) (any, error) { return []byte(secret), nil }
	if _, err := jwt.Parse(token, key, jwt.WithValidMethods([]string{"HS256"})); err != nil {
		s.Errorf("%.30s…: %v", token, err)
	}
}

func rotatesSecrets(s *server) {
	secret := func(kind string, generation int) string {
		return fmt.Sprintf("%s secret of generation %d, long enough", kind, generation)
	}
	var servers []*server
	for generation := range 3 {
		more := env{
			"JWT_SECRET":         secret("access", generation),
			"JWT_REFRESH_SECRET": secret("refresh", generation),
		}
		if generation > 0 {
			more["JWT_SECRET_PREVIOUS"] = secret("access", generation-1)
			more["JWT_REFRESH_SECRET_PREVIOUS"] = secret("refresh", generation-1)
		}
		servers = append(servers, s.start(more))
	}
	first, second, third := servers[0], servers[1], servers[2]
	idle := first.signup()
	c := idle.login().on(second)
	c.lives()
	s.assertSigned(c.access, secret("access", 1))
	s.assertSigned(c.refresh, secret("refresh", 1))
	c.on(first).me(c.access).refused("invalid_token")
	c.on(first).show(c.refresh).refused("invalid_token")
	c.on(third).lives()
	idle.on(third).me(idle.access).refused("invalid_token")
	idle.on(third).show(idle.refresh).refused("invalid_token")
	// A previous secret makes neither kind of token pass for the other.
	idle.on(second).me(idle.refresh).refused("invalid_token")
	idle.on(second).show(idle.access).refused("invalid_token")
	idle.on(second).lives()
}

// respelled is base64url text with another last character that carries the same bytes, if its
// length leaves bits over: the low bit of that character is one of them.
func respelled(text string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, text[len(text)-1])
	return text[:len(text)-1] + string(alphabet[last^1])
}

// forgeries are tokens that must not pass, made from one that does. The root module's tests of
// verify have more of each kind.
func (s *server) forgeries(secret, otherSecret, good string) map[string]string {
	parts := strings.Split(good, ".")
	bare := s.claims(good)
	delete(bare, "exp")
	encoded, err := json.Marshal(bare)
	if err != nil {
		s.Fatal(err)
	}
	exp := fmt.Sprint(inAnHour())
	// payload is the claims with exp as it is given, and more.
	payload := func(exp, more string) string {
		return strings.Replace(string(encoded), "{", `{`+more+`"exp":`+exp+`,`, 1)
	}
	headed := func(header string) string { return sign(secret, header, payload(exp, "")) }
	claiming := func(payload string) string { return sign(secret, jwtHeader, payload) }
	with := func(other claims) string { return s.changed(secret, good, other) }
	otherAlg := func(method jwt.SigningMethod, key any) string {
		token, err := jwt.NewWithClaims(method, jwt.MapClaims(s.claims(good))).SignedString(key)
		if err != nil {
			s.Fatal(err)
		}
		return token
	}
	spare := payload(exp, "") // with a length that leaves bits over in its last character
	for len(spare)%3 == 0 {
		spare += " "
	}
	spareText := b64.EncodeToString([]byte(spare))
	return map[string]string{
		"alg none, unsigned":          otherAlg(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType),
		"alg none, signed":            headed(`{"alg":"none","typ":"JWT"}`),
		"alg HS512":                   otherAlg(jwt.SigningMethodHS512, []byte(secret)),
		"alg RS256":                   headed(`{"alg":"RS256","typ":"JWT"}`),
		"header with kid":             headed(`{"alg":"HS256","typ":"JWT","kid":"1"}`),
		"header in another order":     headed(`{"typ":"JWT","alg":"HS256"}`),
		"header with a space":         headed(`{"alg": "HS256","typ":"JWT"}`),
		"header without typ":          headed(`{"alg":"HS256"}`),
		"no signature":                parts[0] + "." + parts[1] + ".",
		"two parts":                   parts[0] + "." + parts[1],
		"four parts":                  good + "." + parts[2],
		"no token at all":             "nonsense",
		"dots":                        "..",
		"another payload":             parts[0] + "." + spareText + "." + parts[2],
		"a signature cut short":       good[:len(good)-2],
		"the other secret":            s.changed(otherSecret, good, nil),
		"no secret":                   s.changed("\x00", good, nil), // to HMAC the same as an empty key
		"a part of the secret":        s.changed(secret[:len(secret)-1], good, nil),
		"expired and wrongly signed":  s.changed(otherSecret, good, expired()),
		"signature spelled otherwise": respelled(good),
		"payload spelled otherwise":   signed(secret, parts[0]+"."+respelled(spareText)),
		"payload with padding":        signed(secret, parts[0]+"."+spareText+"="),
		"signature with padding":      good + "=",
		"no exp":                      with(claims{"exp": nil}),
		"exp with a fraction":         claiming(payload(exp+".5", "")),
		"exp as text":                 claiming(payload(`"`+exp+`"`, "")),
		"exp null":                    claiming(payload("null", "")),
		"exp beyond every integer":    claiming(payload("99999999999999999999999999", "")),
		"nbf in the future":           with(claims{"nbf": inAnHour()}),
		"nbf as text":                 with(claims{"nbf": "0"}),
		"sid of a wrong type":         with(claims{"sid": 7}),
		"no sid":                      with(claims{"sid": nil}),
		"sub of somebody else":        with(claims{"sub": newUUID()}),
		"claims in an array":          claiming("[" + payload(exp, "") + "]"),
		"claims with trailing data":   claiming(payload(exp, "") + "{}"),
		"no claims":                   claiming(""),
		"4,097 characters":            s.sized(secret, good, 4097),
		"8,000 characters":            with(claims{"x": strings.Repeat("x", 5500)}),
	}
}
