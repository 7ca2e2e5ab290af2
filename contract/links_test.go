package contract

import (
	"context"
	"encoding/base64"
	"fmt"
	"strings"
	"time"
)

// What forgotten passwords, verified addresses and changed addresses do, and what their links'
// tokens are good for.
var linkPromises = []promise{
	{"forgot answers the same whether or not there is an account, and decides nothing before", own,
		forgets},
	{"forgot sends to the address as it is stored, however it was typed", own, func(s *server) {
		typed := newEmail()
		stored := "Ada." + strings.Replace(typed, emailMark, strings.ToUpper(emailMark), 1)
		s.exec("INSERT INTO users (email, password_hash) VALUES ($1, $2)", stored,
			bcryptHash(newPassword(), 4))
		s.send(forgotOf(" aDA." + typed + "\t")).want(202)
		next := newPassword()
		s.send(resetOf(s.mailTo(stored, toReset).token(), next)).ok()
		s.tryLogin("ada."+typed, next, newIP()).ok()
	}},
	{"reset works once, ends every session, opens none, and verifies the address", own, resets},
	{"reset: of simultaneous ones with one link exactly one is 200", own, func(s *server) {
		servers := []*server{s, s.start(nil)}
		for range rounds {
			c := s.signup()
			token := c.resetToken()
			passwords := []string{newPassword(), newPassword(), newPassword(), newPassword()}
			answers := together(len(passwords), func(i int) *answer {
				return servers[i%2].send(resetOf(token, passwords[i]))
			})
			for i, a := range answers {
				login := s.tryLogin(c.email, passwords[i], newIP())
				if a.status() == 200 {
					login.ok()
				} else {
					a.refused("invalid_link")
					login.refused("invalid_credentials")
				}
			}
			n := count(answers, 200)
			s.expect(n == 1, "%d resets with one link succeeded", n)
		}
	}},
	{"reset: a login or refresh beside it with the old password leaves no session", own,
		func(s *server) {
			servers := []*server{s, s.start(nil)}
			for name, attempt := range map[string]func(c *client) *answer{
				"login":   (*client).tryLogin,
				"refresh": func(c *client) *answer { return c.show(c.refresh) },
			} {
				won := 0
				for range rounds {
					c := s.signup()
					reset := resetOf(c.resetToken(), newPassword())
					won += c.against(servers, attempt, func(on *server) *answer {
						return on.send(reset)
					})
				}
				s.Logf("%d of %d beat the reset: %s", won, 3*rounds, name)
			}
		}},
	{"reset: a link is void once the password or the address has changed, however", own,
		voidsResets},
	{"reset: an operator's link resets, and does not verify the address", own, func(s *server) {
		c := s.signup()
		token := s.relinked(c.resetToken(), statement{"purpose": "operator_reset"})
		next := newPassword()
		s.send(resetOf(token, next)).ok()
		c.gone()
		c.password = next
		c.login().verified(false)
		s.send(resetOf(token, newPassword())).refused("invalid_link")
	}},
	{"reset: a disabled account stays disabled", own, func(s *server) {
		c := s.signup()
		token := c.resetToken()
		s.exec("UPDATE users SET disabled_at = now(), email_verified_at = $1 WHERE id = $2",
			time.Unix(0, 0), c.id)
		s.send(resetOf(token, newPassword())).ok()
		since := s.query("SELECT extract(epoch FROM email_verified_at)::int::text "+
			"FROM users WHERE id = $1", c.id)
		s.expect(since == "0", "the address is verified anew")
		still := s.query("SELECT (disabled_at IS NOT NULL)::text FROM users WHERE id = $1", c.id)
		s.expect(still == "true", "the reset has enabled the account")
	}},
	{"reset: a new password has the limits of signup, and one refused leaves the link good", own,
		func(s *server) {
			c := s.signup()
			token := c.resetToken()
			longest := strings.Repeat("é", 36)
			for _, bad := range []string{
				"", "k7#qZ!9", longest + "x", "long\x00enough", "TrustNo1",
			} {
				s.send(resetOf(token, bad)).shouldBe("validation_failed", bad).names("newPassword")
			}
			s.send(resetOf("", "")).refused("validation_failed").names("token", "newPassword")
			c.lives()
			s.send(resetOf(token, longest)).ok()
			s.tryLogin(c.email, longest, newIP()).ok()
		}},
	{"reset forgives the failed logins from its own IP, and no others", own, func(s *server) {
		s = s.loginLimit(2)
		c := s.signup()
		other := newIP()
		s.fails(2, c.email, c.ip)
		s.fails(2, c.email, other)
		c.tryLogin().refused("too_many_attempts")
		reset := resetOf(c.resetToken(), c.password)
		guesses := func() string {
			return s.stores.redis.Get(s.Context(), s.accountKey(other)).Val()
		}
		before := guesses()
		s.send(reset.ip(c.ip)).ok()
		s.expect(guesses() == before, "of %s guesses from all IPs %s are left", before, guesses())
		c.tryLogin().ok()
		s.tryLogin(c.email, c.password, other).refused("too_many_attempts")
	}},
	{"verify: signup's link verifies the address; opened twice it answers the same", own, verifies},
	{"verification sends again, and nothing to a verified address, with the same answer", own,
		sendsAgain},
	{"change: the address changes when the link at the new one is verified, not before", own,
		moves},
	{"change: the address of a disabled account stays until it is enabled", own, func(s *server) {
		c := s.signup()
		next := newEmail()
		token := c.moveToken(next)
		s.exec("UPDATE users SET disabled_at = now() WHERE id = $1", c.id)
		s.send(verifyOf(token)).refused("invalid_link")
		s.exec("UPDATE users SET disabled_at = NULL WHERE id = $1", c.id)
		s.send(verifyOf(token)).ok()
		s.tryLogin(next, c.password, newIP()).ok()
	}},
	{"change: a taken address is told at the click only, and then nothing changes", own,
		movesToTaken},
	{"change: an address that changes only its case is told nothing", own, func(s *server) {
		s = s.start(nil)
		c := s.signup()
		c.verifyToken()
		s.exec("UPDATE users SET email = upper(email) WHERE id = $1", c.id)
		s.send(verifyOf(c.moveToken(c.email))).ok()
		row := s.query("SELECT email FROM users WHERE id = $1", c.id)
		s.expect(row == c.email, "the address is %s, want %s", row, c.email)
		s.assertNoMail(c.email, strings.ToUpper(c.email))
	}},
	{"verify: an address that is stored in upper case is told of no change", own, func(s *server) {
		s = s.start(nil)
		c := s.signup()
		c.verifyToken()
		stored := strings.ToUpper(c.email)
		s.exec("UPDATE users SET email = $1 WHERE id = $2", stored, c.id)
		c.verification().want(202)
		s.send(verifyOf(s.mailTo(stored, toVerify).token())).ok()
		s.assertNoMail(c.email, stored)
	}},
	{"change: of a change to an address and a signup with it exactly one succeeds", own,
		func(s *server) {
			for range rounds {
				c := s.signup()
				email := newEmail()
				token := c.moveToken(email)
				answers := together(2, func(i int) *answer {
					if i == 0 {
						return s.send(verifyOf(token))
					}
					return s.trySignup(email, newPassword())
				})
				moved, signed := answers[0].status() == 200, answers[1].status() == 201
				s.expect(moved != signed, "change: %v %s, signup: %v %s", answers[0],
					answers[0].body, answers[1], answers[1].body)
			}
		}},
	{"change: a wrong password is invalid_credentials and counts as a failed login", own,
		func(s *server) {
			s = s.loginLimit(2)
			c := s.signup()
			for range 2 {
				c.move(newEmail(), newPassword()).refused("invalid_credentials")
			}
			c.move(newEmail(), c.password).refused("too_many_attempts")
			c.tryLogin().refused("too_many_attempts")
			c.lives()
		}},
	{"change: an address changed there and back revives no link", own, movesBack},
	{"verify: a link that is opened several times at once is 200 each time", own, func(s *server) {
		servers := []*server{s, s.start(nil)}
		for range rounds {
			c := s.signup()
			old, email := c.email, newEmail()
			for _, token := range []string{c.verifyToken(), c.moveToken(email)} {
				for _, a := range together(4, func(i int) *answer {
					return servers[i%2].send(verifyOf(token))
				}) {
					a.ok()
				}
			}
			s.mailTo(old, aNotice)
			n := len(s.mails.left(old))
			s.expect(n == 0, "%d notices too many have come to the old address", n)
		}
	}},
	{"links work on an adopted table, too", own, func(s *server) {
		s = s.inDatabase()
		s.exec(drizzle)
		s = s.startOn(s.stores, env{"DATABASE_URL": s.stores.databaseURL + "&TimeZone=Asia/Tokyo"})
		c := s.signup()
		links := c.links()
		s.send(verifyOf(links[toVerify])).ok()
		c.verified(true)
		s.send(verifyOf(links[toChange])).ok()
		s.send(resetOf(links[toReset], newPassword())).refused("invalid_link")
		c.email = s.query("SELECT email FROM users WHERE id = $1", c.id)
		c.password = newPassword()
		s.send(resetOf(c.resetToken(), c.password)).ok()
		c.login().lives()
	}},
	{"a link works for 30 minutes to reset and for 24 hours else, bound to the user's state", own,
		func(s *server) {
			c := s.signup()
			email := newEmail()
			for purpose, x := range map[string]struct {
				token string
				email string
				life  time.Duration
			}{
				toReset:  {c.resetToken(), c.email, 30 * time.Minute},
				toVerify: {c.verifyToken(), c.email, 24 * time.Hour},
				toChange: {c.moveToken(email), email, 24 * time.Hour},
			} {
				said := statementOf(x.token)
				exp, _ := said["exp"].(float64)
				left := time.Until(time.Unix(int64(exp), 0))
				s.expect(left <= x.life && left > x.life-time.Minute, "%s: %v left", purpose, left)
				s.expect(said["userId"] == c.id && said["email"] == x.email &&
					said["purpose"] == purpose, "%s says %v", purpose, said)
				s.expect((said["state"] != nil) == (purpose != toVerify),
					"%s: the state is %v", purpose, said["state"])
				for _, secret := range []string{c.passwordHash(), c.password} {
					s.expect(!strings.Contains(fmt.Sprint(said), secret),
						"the link to %s tells the secret %s", purpose, secret)
				}
			}
		}},
	{"no link is good for another purpose, and no other token is one", own, confusesNoPurposes},
	{"a link that has expired, or was forged or cut, is invalid_link and changes nothing", own,
		func(s *server) {
			c := s.signup()
			links := c.links()
			before := c.row()
			for purpose, token := range links {
				r := c.using(purpose)
				for name, bad := range s.brokenLinks(token) {
					s.send(r(bad)).shouldBe("invalid_link", purpose+", "+name)
				}
			}
			after := c.row()
			s.expect(after == before, "the user was %s and is %s", before, after)
			c.lives()
			for _, purpose := range []string{toVerify, toChange} { // which are good all the same
				s.send(verifyOf(links[purpose])).shouldBe("", purpose)
			}
		}},
	{"a link of a user who is gone is invalid_link", own, func(s *server) {
		c := s.signup()
		links := c.links()
		c.deleteAccount(c.password).ok()
		s.trySignup(c.email, c.password).ok() // which is another user of the same address
		for purpose, token := range links {
			s.send(c.using(purpose)(token)).shouldBe("invalid_link", purpose)
		}
	}},
	{"JWT_REFRESH_SECRET_PREVIOUS verifies links and signs none", own, func(s *server) {
		secret := func(n int) string {
			return fmt.Sprintf("refresh secret %d, which is long enough", n)
		}
		first := s.start(env{"JWT_REFRESH_SECRET": secret(1)})
		second := s.start(env{
			"JWT_REFRESH_SECRET": secret(2), "JWT_REFRESH_SECRET_PREVIOUS": secret(1),
		})
		third := s.start(env{
			"JWT_REFRESH_SECRET": secret(3), "JWT_REFRESH_SECRET_PREVIOUS": secret(2),
		})
		c := first.signup()
		verify, reset := c.verifyToken(), c.resetToken()
		third.send(verifyOf(verify)).refused("invalid_link")
		third.send(resetOf(reset, newPassword())).refused("invalid_link")
		second.send(verifyOf(verify)).ok()
		second.send(resetOf(reset, newPassword())).ok()
		signedAnew := second.signup().verifyToken()
		first.send(verifyOf(signedAnew)).refused("invalid_link")
		third.send(verifyOf(signedAnew)).ok()
	}},
	{"a cause that only the log tells is 500 for a link and for its mail, too", own,
		func(s *server) {
			st := newStores(s.T)
			c := s.startOn(st, nil).signup() // which takes less time than in production
			links := c.links()
			s = s.startOn(st, production)
			c = c.on(s)
			s.exec("ALTER TABLE users RENAME TO people")
			for purpose, token := range links {
				s.send(c.using(purpose)(token)).hidesItsCause()
			}
			c.verification().hidesItsCause()
			c.move(newEmail(), c.password).hidesItsCause()
			s.exec("ALTER TABLE people RENAME TO users")
			for _, purpose := range []string{toVerify, toChange} { // which are good all the same
				s.send(verifyOf(links[purpose])).shouldBe("", purpose)
			}
		}},
}

// verified asserts what GET /auth/me tells of the address.
func (c *client) verified(want bool) {
	a := c.me(c.access).ok()
	user, _ := a.json["user"].(map[string]any)
	c.s.expect(user["emailVerified"] == want, "emailVerified is not %v: %s", want, a.body)
}

// links are a link token of each purpose that mails have.
func (c *client) links() map[string]string {
	return map[string]string{
		toReset:  c.resetToken(),
		toVerify: c.verifyToken(),
		toChange: c.moveToken(newEmail()),
	}
}

// using makes requests of the route for links of a purpose.
func (c *client) using(purpose string) func(token string) request {
	if purpose == toReset {
		next := newPassword()
		return func(token string) request { return resetOf(token, next) }
	}
	return verifyOf
}

func forgets(s *server) {
	s = s.startOn(newStores(s.T), nil)
	c := s.signup()
	unknown := newEmail()
	tx, err := s.stores.sql.Begin(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	// Whoever asks for the user now must wait.
	if _, err := tx.Exec(s.Context(), "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"); err != nil {
		s.Fatal(err)
	}
	known, other := s.send(forgotOf(c.email)).want(202), s.send(forgotOf(unknown)).want(202)
	s.expect(max(known.took, other.took) <= time.Second,
		"the answers took %v and %v", known.took, other.took)
	tx.Rollback(s.Context())
	s.expect(string(known.body) == string(other.body), "%s and %s", known.body, other.body)
	headers := func(a *answer) string {
		all := a.Header.Clone()
		for _, name := range []string{"X-Request-Id", "Date"} {
			all.Del(name)
		}
		return fmt.Sprint(all)
	}
	s.expect(headers(known) == headers(other), "%v and %v", known.Header, other.Header)
	s.mailTo(c.email, toReset)
	s.assertNoMail(unknown)
}

func resets(s *server) {
	c, stranger := s.signup(), s.signup()
	other := c.login()
	c.verified(false)
	token := c.resetToken()
	next := newPassword()
	s.send(resetOf(token, next).ip(c.ip)).ok().keepsCookie()
	c.gone()
	other.gone()
	stranger.lives()
	s.mailTo(c.email, aNotice)
	s.send(resetOf(token, newPassword())).refused("invalid_link")
	c.tryLogin().refused("invalid_credentials")
	c.password = next
	c = c.login()
	c.verified(true)
	c.lives()
}

// changes are all that voids the links of a user that are bound to the user's state.
var changes = map[string]func(c *client){
	"a change of the password": func(c *client) {
		next := newPassword()
		c.changePassword(c.password, next).ok()
		c.password = next
	},
	"a change to the same password": func(c *client) {
		c.changePassword(c.password, c.password).ok()
	},
	"another reset": func(c *client) {
		c.s.send(resetOf(c.resetToken(), c.password)).ok()
	},
	"a change of the address": func(c *client) {
		email := newEmail()
		c.s.send(verifyOf(c.moveToken(email))).ok()
		c.email = email
	},
	"another password in PostgreSQL": func(c *client) {
		c.password = newPassword()
		c.setPassword(c.password)
	},
	"another address in PostgreSQL": func(c *client) {
		email := newEmail()
		c.s.exec("UPDATE users SET email = $1 WHERE id = $2", email, c.id)
		c.email = email
	},
	"a rehash at login": func(c *client) {
		c.on(c.s.start(env{"BCRYPT_COST": "5"})).login()
	},
}

func voidsResets(s *server) {
	for name, change := range changes {
		c := s.signup()
		bound := map[string]string{toReset: c.resetToken(), toChange: c.moveToken(newEmail())}
		change(c)
		before := c.row()
		for purpose, token := range bound {
			s.send(c.using(purpose)(token)).shouldBe("invalid_link", purpose+" after "+name)
		}
		after := c.row()
		s.expect(after == before, "%s: the user was %s and is %s", name, before, after)
		c.login().lives()
		s.send(resetOf(c.resetToken(), c.password)).shouldBe("", "a new link after "+name)
	}
}

func verifies(s *server) {
	c := s.signup()
	token := c.verifyToken()
	c.verified(false)
	first := s.send(verifyOf(token)).ok().keepsCookie()
	user, _ := first.json["user"].(map[string]any)
	s.expect(user["id"] == c.id && user["email"] == c.email && user["emailVerified"] == true,
		"body %s", first.body)
	c.verified(true)
	row := c.row()
	again := s.send(verifyOf(token)).ok()
	s.expect(string(again.body) == string(first.body) && c.row() == row,
		"first %s, then %s; the user was %s and is %s", first.body, again.body, row, c.row())
	c.lives()
	s.send(verifyOf("")).refused("validation_failed").names("token")

	late := s.signup()
	token = late.verifyToken()
	late.changePassword(late.password, newPassword()).ok() // It has nothing to do with the address.
	s.send(verifyOf(token)).ok()
	late.verified(true)

	moved := s.signup()
	token = moved.verifyToken()
	s.exec("UPDATE users SET email = $1 WHERE id = $2", newEmail(), moved.id)
	s.send(verifyOf(token)).refused("invalid_link")
	moved.verified(false)
}

func sendsAgain(s *server) {
	s = s.start(nil)
	c := s.signup()
	c.verifyToken()
	sent := c.verification().want(202)
	s.send(verifyOf(c.verifyToken())).ok()
	none := c.verification().want(202)
	s.expect(string(sent.body) == string(none.body), "%s and %s", sent.body, none.body)
	c.send(post("/auth/email/verification").text("{{ no JSON").typed("text/plain")).want(202)
	s.send(post("/auth/email/verification")).refused("missing_token")
	s.assertNoMail(c.email)
}

func moves(s *server) {
	s = s.start(nil)
	c := s.signup()
	c.verifyToken()
	old, email := c.email, "New."+newEmail()
	row := c.row()
	c.move("", "").refused("validation_failed").names("newEmail", "password")
	c.move(email, newPassword()).refused("invalid_credentials")
	c.move(email, c.password).want(202)
	token := s.mailTo(strings.ToLower(email), toChange).token()
	s.expect(c.row() == row, "before the click the user was %s and is %s", row, c.row())
	c.login()
	s.tryLogin(email, c.password, newIP()).refused("invalid_credentials")

	access := c.access
	first := s.send(verifyOf(token)).ok().keepsCookie()
	c.email = strings.ToLower(email)
	s.expect(first.str("user", "email") == c.email, "body %s", first.body)
	again := s.send(verifyOf(token)).ok()
	s.expect(string(again.body) == string(first.body), "%s and %s", first.body, again.body)
	c.verified(true)
	s.tryLogin(old, c.password, newIP()).refused("invalid_credentials")
	c.login()
	c.me(access).ok() // Sessions go on, and the next access token has the new address.
	c.lives()
	s.expect(s.claims(c.access).text("email") == c.email, "the claims are %v", s.claims(c.access))
	s.mailTo(old, aNotice)
	s.assertNoMail(old, c.email)
}

func movesToTaken(s *server) {
	c, other := s.signup(), s.signup()
	s.exec("UPDATE users SET email = upper(email) WHERE id = $1", other.id)
	before := c.row() + other.row()
	free := c.move(newEmail(), c.password).want(202)
	taken := c.move(other.email, c.password).want(202)
	s.expect(string(free.body) == string(taken.body), "%s and %s", free.body, taken.body)
	token := s.mailTo(other.email, toChange).token()
	s.send(verifyOf(token)).refused("email_exists")
	after := c.row() + other.row()
	s.expect(after == before, "the users were %s and are %s", before, after)
	c.lives()
	other.login()
	// If it has become free, the link is as good as it was.
	other.deleteAccount(other.password).ok()
	s.send(verifyOf(token)).ok()
}

func movesBack(s *server) {
	c := s.signup()
	first := c.email
	s.send(verifyOf(c.verifyToken())).ok()
	reset, bound := c.resetToken(), c.moveToken(newEmail())
	second := newEmail()
	there := c.moveToken(second)
	s.send(verifyOf(there)).ok()
	c.email = second
	back := c.moveToken(first)
	s.send(verifyOf(back)).ok()
	c.email = first
	before := c.row()
	s.send(resetOf(reset, newPassword())).refused("invalid_link")
	s.send(verifyOf(bound)).refused("invalid_link")
	s.send(verifyOf(there)).refused("invalid_link")
	s.send(verifyOf(back)).ok() // which says what is so already
	s.expect(c.row() == before, "the user was %s and is %s", before, c.row())
	c.login().lives()
}

func confusesNoPurposes(s *server) {
	c := s.signup()
	tokens := c.links()
	tokens["operator_reset"] = s.relinked(tokens[toReset], statement{"purpose": "operator_reset"})
	tokens["access token"] = c.access
	tokens["refresh token"] = c.refresh
	// They say the same, but are signed with the keys of other tokens.
	access, refresh := s.conf("JWT_SECRET"), s.conf("JWT_REFRESH_SECRET")
	first, _, _ := strings.Cut(tokens[toReset], ".")
	tokens["signed as an access token"] = signed(access, first)
	tokens["signed as a refresh token"] = signed(refresh, first)
	payload := strings.Split(c.refresh, ".")[1]
	decoded, _ := base64.RawURLEncoding.DecodeString(payload)
	before := c.row()
	for name, token := range tokens {
		if name != toReset && name != "operator_reset" {
			s.send(resetOf(token, newPassword())).shouldBe("invalid_link", name)
		}
		if name != toVerify && name != toChange {
			s.send(verifyOf(token)).shouldBe("invalid_link", name)
		}
		if !strings.HasSuffix(name, "access token") {
			c.elsewhere().me(token).shouldBe("invalid_token", name)
		}
		if !strings.HasSuffix(name, "refresh token") {
			c.elsewhere().show(token).shouldBe("invalid_token", name)
		}
	}
	// Neither do the keys of links sign access and refresh tokens.
	jwt := sign(linkKey(refresh), jwtHeader, string(decoded))
	c.elsewhere().show(jwt).refused("invalid_token")
	c.elsewhere().me(jwt).refused("invalid_token")
	s.expect(c.row() == before, "the user was %s and is %s", before, c.row())
	c.lives()
}

// brokenLinks are tokens that must not pass, made from a link's that does.
func (s *server) brokenLinks(good string) map[string]string {
	said := statementOf(good)
	secret := s.conf("JWT_REFRESH_SECRET")
	key := linkKey(secret)
	first, mac, _ := strings.Cut(good, ".")
	text, _ := base64.RawURLEncoding.DecodeString(first)
	payload := string(text)
	with := func(name string, value any) string {
		return said.with(statement{name: value}).token(secret)
	}
	broken := map[string]string{
		"nonsense":                 "nonsense",
		"dots":                     "..",
		"expired":                  with("exp", time.Now().Unix()),
		"expired long ago":         with("exp", anHourAgo()),
		"no exp":                   with("exp", nil),
		"exp as text":              with("exp", fmt.Sprint(inAnHour())),
		"no purpose":               with("purpose", nil),
		"an unknown purpose":       with("purpose", "everything"),
		"nobody's id":              with("userId", newUUID()),
		"more than 4 KB":           with("padding", strings.Repeat("x", 4096)),
		"another secret":           said.token(s.conf("JWT_SECRET")),
		"a secret that is no key":  signed(secret, first),
		"no secret":                signed("", first),
		"no signature":             first + ".",
		"no dot":                   first + mac,
		"without its last letter":  good[:len(good)-1],
		"without its first letter": good[1:],
		"another payload":          base64url(payload+" ") + "." + mac,
		"padded":                   good + "=",
		"a signature spelt anew":   good[:len(good)-1] + string(good[len(good)-1]+1),
		"a line break at the end":  good + "\n",
		"no JSON":                  signed(key, base64url("x"+payload)),
		"more after the JSON":      signed(key, base64url(payload+"{}")),
		"a JWT with its key":       sign(key, jwtHeader, payload),
	}
	if said["purpose"] == toVerify { // the others are bound to the user's state
		capitals := strings.ToUpper(fmt.Sprint(said["email"]))
		broken["another address"] = with("email", newEmail())
		broken["the address in capitals"] = with("email", capitals)
	} else {
		broken["another state"] = with("state", "x")
		broken["no state"] = with("state", nil)
	}
	return broken
}
