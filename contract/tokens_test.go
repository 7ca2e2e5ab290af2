package contract

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
)

func newUUID() string { return uuid.NewString() }

func base64url(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

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
	c := jwt.MapClaims{}
	_, _, err := jwt.NewParser().ParseUnverified(token, c)
	s.expect(err == nil, "token %q: %v", token, err)
	return claims(c)
}

// sign makes a token of any header and payload with a good signature, even what no library would.
func sign(secret, header, payload string) string {
	return signed(secret, base64url(header)+"."+base64url(payload))
}

// signed adds a signature to the first two parts of a token.
func signed(secret, parts string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(parts))
	return parts + "." + base64url(string(mac.Sum(nil)))
}

// changed is a token with other claims (nil removes one), signed anew by an independent library.
func (s *server) changed(secret, token string, other claims) string {
	c := s.claims(token)
	c["exp"], c["iat"] = c.number("exp"), c.number("iat") // no floats
	maps.Copy(c, other)
	maps.DeleteFunc(c, func(_ string, value any) bool { return value == nil })
	unsigned := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims(c))
	token, err := unsigned.SignedString([]byte(secret))
	if err != nil {
		s.Fatalf("%v", err)
	}
	return token
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
	{`tokens have the header {"alg":"HS256","typ":"JWT"} and seven claims`, aURL, func(s *server) {
		c := s.signup()
		other := c.login()
		ids := map[string]bool{}
		for _, token := range []string{c.access, c.refresh, other.access, other.refresh} {
			got := s.claims(token)
			names := strings.Join(slices.Sorted(maps.Keys(got)), " ")
			header := base64url(jwtHeader) + "."
			s.expect(strings.HasPrefix(token, header), "the header of %s is another", token)
			s.expect(names == "email exp iat jti sid sub userId" && got.text("email") == c.email &&
				got.text("userId") == c.id && got.text("sub") == c.id,
				"the claims are %v", got)
			s.isNow(time.Unix(got.number("iat"), 0).UTC().Format(time.RFC3339))
			ids[got.text("jti")] = true
		}
		s.expect(len(ids) == 4 && s.claims(c.refresh).text("sid") == c.sid() &&
			c.sid() != other.sid(),
			"jti does not name the token, or sid the session")
	}},
	{"ACCESS_TOKEN_TTL is 15 minutes, REFRESH_TOKEN_TTL 7 days", aURL, func(s *server) {
		c := s.signup()
		for token, name := range map[string]string{
			c.access: "ACCESS_TOKEN_TTL", c.refresh: "REFRESH_TOKEN_TTL",
		} {
			life := s.claims(token).number("exp") - s.claims(token).number("iat")
			s.expect(float64(life) == s.duration(name).Seconds(),
				"%s: a token lives %d s", name, life)
		}
	}},
	{"an access token is signed with JWT_SECRET, the other with JWT_REFRESH_SECRET", secrets,
		func(s *server) {
			c := s.signup()
			s.assertSigned(c.access, s.conf("JWT_SECRET"))
			s.assertSigned(c.refresh, s.conf("JWT_REFRESH_SECRET"))
		}},
	{"neither token passes for the other", aURL, func(s *server) {
		c := s.signup()
		c.me(c.refresh).refused("invalid_token")
		c.show(c.access).refused("invalid_token")
		c.lives()
	}},
	{"the scheme is Bearer, without regard to case, and no other", aURL, func(s *server) {
		c := s.signup()
		for authorization, code := range map[string]string{
			"bearer " + c.access: "", "BEARER " + c.access: "", "Bearer  " + c.access: "",
			"Basic " + c.access: "missing_token", c.access: "missing_token",
		} {
			a := c.send(get("/auth/me").with("Authorization", authorization))
			a.shouldBe(code, authorization)
		}
	}},
	{"an independent library's tokens pass, with claims of its own and iat in the future", secrets,
		func(s *server) {
			c := s.signup()
			c.me(c.accessWith(nil)).ok()
			c.me(c.accessWith(claims{"nbf": anHourAgo(), "aud": "x", "x": []any{1}})).ok()
			c.me(c.accessWith(claims{"iat": inAnHour()})).ok()
			c.me(s.sized(s.conf("JWT_SECRET"), c.access, 4096)).ok()
			c.refresh = c.refreshWith(claims{"iat": inAnHour()})
			c.rotate()
		}},
	{"no forged token passes: header, spelling, claims, signature, size", secrets, func(s *server) {
		c := s.signup()
		access, refresh := s.conf("JWT_SECRET"), s.conf("JWT_REFRESH_SECRET")
		for name, token := range s.forgeries(access, refresh, c.access) {
			c.elsewhere().me(token).shouldBe("invalid_token", name)
		}
		for name, token := range s.forgeries(refresh, access, c.refresh) {
			c.elsewhere().show(token).shouldBe("invalid_token", name)
		}
		c.lives()
	}},
	{"two refreshToken cookies with different values are 401 invalid_token", aURL, func(s *server) {
		c, stranger := s.signup(), s.signup()
		for _, other := range []string{"x", "", stranger.refresh, c.access} {
			for _, path := range []string{"/auth/refresh", "/auth/logout"} {
				mine, others := "refreshToken="+c.refresh, "refreshToken="+other
				s.send(post(path).with("Cookie", mine+"; "+others)).shouldBe("invalid_token", other)
				s.send(post(path).with("Cookie", others+"; "+mine)).shouldBe("invalid_token", other)
			}
		}
		stranger.lives()
		twice := "a=b; refreshToken=" + c.refresh + "; refreshToken=" + c.refresh
		c.take(s.send(post("/auth/refresh").with("Cookie", twice)).ok()) // the same is no guess
	}},
	{"token_expired is 401 for a token past exp, and each ends at its own", own, func(s *server) {
		c := s.signup()
		c.me(c.accessWith(expired())).refused("token_expired")
		c.show(c.refreshWith(expired())).refused("token_expired")
		c.lives()
		brief := s.start(env{"ACCESS_TOKEN_TTL": "1s", "REFRESH_TOKEN_TTL": "2s"}).signup()
		s.eventually(5*time.Second, "the access token runs out", func() bool {
			return brief.me(brief.access).code() == "token_expired"
		})
		logout := post("/auth/logout").cookie(brief.refresh)
		s.eventually(5*time.Second, "the refresh token runs out", func() bool {
			return brief.s.send(logout).code() == "token_expired"
		})
		brief.show(brief.refresh).refused("token_expired")
	}},
	{"a good token of no living session is session_revoked", secrets, func(s *server) {
		c := s.signup()
		c.me(c.accessWith(claims{"sid": newUUID()})).refused("session_revoked")
		c.show(c.refreshWith(claims{"sid": newUUID(), "jti": newUUID()})).refused("session_revoked")
	}},
	{"the previous secrets verify and never sign; older ones are refused", own, rotatesSecrets},
	{"the cookie is HttpOnly, SameSite as configured, Secure but in development", own,
		func(s *server) {
			// Every cookie is held to the configuration, see assertCookie; here are all of it.
			for _, more := range []env{
				production, production.with(env{"COOKIE_SAMESITE": "none"}),
				production.with(env{"NODE_ENV": "staging", "COOKIE_SAMESITE": "lax"}),
				{"COOKIE_SAMESITE": "lax", "REFRESH_TOKEN_TTL": "1h"},
			} {
				c := s.start(more).signup()
				c.rotate()
				c.logout().ok()
			}
			cookie := s.signup().last.Header.Get("Set-Cookie")
			_, attributes, _ := strings.Cut(cookie, "; ")
			s.expect(attributes == "Path=/auth; Max-Age=604800; HttpOnly; SameSite=Strict",
				"Set-Cookie is %s", cookie)
		}},
}

func (s *server) assertSigned(token, secret string) {
	key := func(*jwt.Token) (any, error) { return []byte(secret), nil }
	_, err := jwt.Parse(token, key, jwt.WithValidMethods([]string{"HS256"}))
	s.expect(err == nil, "%.30s…: %v", token, err)
}

func rotatesSecrets(s *server) {
	secret := func(kind string, generation int) string {
		return fmt.Sprintf("%s secret of generation %d, long enough", kind, generation)
	}
	generation := func(n int) *server {
		more := env{"JWT_SECRET": secret("access", n), "JWT_REFRESH_SECRET": secret("refresh", n)}
		if n > 1 {
			more["JWT_SECRET_PREVIOUS"] = secret("access", n-1)
			more["JWT_REFRESH_SECRET_PREVIOUS"] = secret("refresh", n-1)
		}
		return s.start(more)
	}
	first, second, third := generation(1), generation(2), generation(3)
	idle := first.signup()
	c := idle.login().on(second)
	c.lives()
	s.assertSigned(c.access, secret("access", 2))
	s.assertSigned(c.refresh, secret("refresh", 2))
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

// forgeries are tokens that must not pass, made from one that does. They are one or two of a kind:
// the root module's tests of verify have all that were thought of.
func (s *server) forgeries(secret, otherSecret, good string) map[string]string {
	parts := strings.Split(good, ".")
	decoded, _ := base64.RawURLEncoding.DecodeString(parts[1])
	payload := string(decoded)
	// exp is the claims with this exp.
	exp := func(value string) string {
		edited := strings.Replace(payload, `"exp":`, `"exp":`+value+`,"x":`, 1)
		return sign(secret, jwtHeader, edited)
	}
	unsigned := base64url(`{"alg":"none","typ":"JWT"}`) + "." + parts[1] + "."
	return map[string]string{
		"alg none, unsigned":         unsigned,
		"alg none, signed":           sign(secret, `{"alg":"none","typ":"JWT"}`, payload),
		"a header with kid":          sign(secret, `{"alg":"HS256","typ":"JWT","kid":""}`, payload),
		"a header in another order":  sign(secret, `{"typ":"JWT","alg":"HS256"}`, payload),
		"no signature":               parts[0] + "." + parts[1] + ".",
		"no token at all":            "nonsense",
		"another payload":            parts[0] + "." + base64url(payload+" ") + "." + parts[2],
		"the other secret":           s.changed(otherSecret, good, nil),
		"no secret":                  s.changed("\x00", good, nil), // as with an empty key
		"expired and wrongly signed": s.changed(otherSecret, good, expired()),
		"a signature with padding":   good + "=",
		"no exp":                     s.changed(secret, good, claims{"exp": nil}),
		"exp with a fraction":        exp("99999999999.5"),
		"exp as text":                exp(`"99999999999"`),
		"nbf in the future":          s.changed(secret, good, claims{"nbf": inAnHour()}),
		"no sid":                     s.changed(secret, good, claims{"sid": nil}),
		"sub of somebody else":       s.changed(secret, good, claims{"sub": newUUID()}),
		"4,097 characters":           s.sized(secret, good, 4097),
	}
}
