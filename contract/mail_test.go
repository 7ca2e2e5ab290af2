package contract

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// noMail configures a server in production that sends no mails.
var noMail = production.with(env{"SMTP_URL": "", "MAIL_FROM": ""})

// mailKey is the key of the mails asked for at an address.
func (s *server) mailKey(email string) string {
	ip := newIP()
	s.guess(email, ip)
	_, hash, _ := strings.Cut(s.accountKey(ip), ":")
	return "mail-limit:" + hash
}

// isCounted waits until so many mails at an address were asked for.
func (s *server) isCounted(email string, want int) {
	key := s.mailKey(email)
	s.eventually(5*time.Second, fmt.Sprintf("%d mails to %s are counted", want, email),
		func() bool { return s.stores.redis.Get(s.Context(), key).Val() == fmt.Sprint(want) })
}

// The form of a message is held on every one, see assertMessage.
var mailPromises = []promise{
	{"without SMTP_URL in production the routes of mail are 404, and reset is there", own,
		hasNoMail},
	{"in development without SMTP_URL each mail is in the log, and its link works", own, logsMails},
	{"with SMTP_URL no link and no address is in the log, whatever becomes of the mail", own,
		func(s *server) {
			// Every server's log is searched at its end; here is all that could be in it.
			m := s.startMailServer(&mailServer{})
			s = s.startWith(m, "smtp", "127.0.0.1", production.with(env{"LOG_LEVEL": "debug"}))
			c := s.signup()
			c.links()
			m.setAnswer(once("RCPT", refusal(554)))
			asked := c.verification().want(202)
			line := s.outcome("failed")
			for _, part := range []string{
				`"kind":"verify"`, `"userId":"` + c.id + `"`, `"level":"WARN"`, "554 5.7.1",
				`"requestId":"` + asked.Header.Get("X-Request-Id") + `"`,
			} {
				s.expect(strings.Contains(line, part), "there is no %s in %s", part, line)
			}
			asked = s.send(forgotOf(c.email)).want(202)
			s.mailTo(c.email, toReset)
			s.eventually(5*time.Second, "the mail is logged with its request", func() bool {
				return strings.Count(s.log(), asked.Header.Get("X-Request-Id")) == 2
			})
		}},
	{"links start with the first FRONTEND_URL, whatever the request says", own, linksToFrontend},
	{"PASSWORD_RESET_URL and EMAIL_VERIFY_URL are what the links start with", own,
		func(s *server) {
			pages := env{
				"PASSWORD_RESET_URL": "https://app.promise.test/account/reset?lang=de&x=1",
				"EMAIL_VERIFY_URL":   "https://verify.promise.test",
			}
			c := s.start(pages).signup()
			for purpose, page := range map[string]string{
				toVerify: pages["EMAIL_VERIFY_URL"],
				toReset:  pages["PASSWORD_RESET_URL"],
				toChange: pages["EMAIL_VERIFY_URL"],
			} {
				to := c.email
				switch purpose {
				case toReset:
					c.send(forgotOf(to)).want(202)
				case toChange:
					to = newEmail()
					c.move(to, c.password).want(202)
				}
				got, _ := c.s.mailTo(to, purpose).link()
				s.expect(got == page, "%s: the link is to %s, want %s", purpose, got, page)
			}
		}},
	{"a changed or reset password is told to the address, a changed address to the old one", own,
		func(s *server) {
			c := s.signup()
			old := c.email
			c.changePassword(c.password, c.password).ok()
			changed := s.mailTo(old, aNotice)
			s.send(resetOf(c.resetToken(), c.password)).ok()
			reset := s.mailTo(old, aNotice)
			c = c.login()
			c.email = newEmail()
			s.send(verifyOf(c.moveToken(c.email))).ok()
			moved := s.mailTo(old, aNotice)
			subject := "Subject"
			s.expect(changed.header.Get(subject) == reset.header.Get(subject) &&
				changed.header.Get(subject) != moved.header.Get(subject),
				"the subjects are %q, %q and %q", changed.header.Get(subject),
				reset.header.Get(subject), moved.header.Get(subject))
			for _, m := range []*message{changed, reset, moved} {
				told := strings.Contains(m.text, c.email)
				s.expect(!told, "a notice tells the new address:\n%s", m.text)
			}
		}},
	{"mail-limit:{<email hash>} counts what is asked for at an address for an hour", own,
		func(s *server) {
			c := s.signup()
			unknown := newEmail()
			s.isCounted(c.email, 1)
			c.verification().want(202)
			s.send(forgotOf(strings.ToUpper(c.email))).want(202) // which is the same address
			s.isCounted(c.email, 3)
			s.exec("UPDATE users SET email = upper(email) WHERE id = $1", c.id)
			c.verification().want(202) // nor is it another as an adopted table may have it
			s.isCounted(c.email, 4)
			for n := range 2 {
				s.send(forgotOf(unknown)).want(202) // whether or not it has an account
				s.isCounted(unknown, n+1)
			}
			c.move(unknown, c.password).want(202)
			s.isCounted(unknown, 3)
			for email, n := range map[string]int{c.email: 5, unknown: 4} {
				key := s.mailKey(email)
				s.lasts(key, time.Hour)
				s.stores.redis.Persist(s.Context(), key)
				s.send(forgotOf(email)).want(202)
				s.isCounted(email, n)
				s.lasts(key, time.Hour)
			}
		}},
	{"the sixth mail to an address in an hour is not sent; notices are, and other addresses'", own,
		limitsMails},
	{"an address that nobody has verified gets ten mails in an hour, notices among them", own,
		func(s *server) {
			s = s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
			c := s.signup()
			for range 12 {
				c.elsewhere().changePassword(c.password, c.password).ok()
			}
			s.eventually(5*time.Second, "three are over the limit", func() bool {
				return strings.Contains(s.scrape(), `latchkey_mail_total{outcome="limited"} 3`)
			})
			for range 9 {
				s.mailTo(c.email, aNotice)
			}
			s.mailTo(c.email, toVerify)
			s.assertNoMail(c.email)
		}},
	{"a reset by a mailed link verifies the address, so it is told, however many mails there were",
		own, func(s *server) {
			c := s.signup()
			token := c.resetToken()
			s.stores.redis.Set(s.Context(), s.mailKey(c.email), 10, time.Minute)
			s.send(resetOf(token, newPassword())).ok()
			s.mailTo(c.email, aNotice)
		}},
	{"who asks for changes to an address leaves its owner a mail about a reset", own,
		func(s *server) {
			s = s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
			c, stranger := s.signup(), s.signup()
			for range 4 {
				stranger.elsewhere().move(c.email, stranger.password).want(202)
			}
			s.eventually(5*time.Second, "one is over the limit", func() bool {
				return strings.Contains(s.scrape(), `latchkey_mail_total{outcome="limited"} 1`)
			})
			s.send(resetOf(c.resetToken(), newPassword())).ok()
			s.mailTo(c.email, aNotice)
		}},
	{"an address that is none is validation_failed for forgot and for a change, too", own,
		func(s *server) {
			c := s.signup()
			for _, bad := range notAddresses {
				if strings.TrimSpace(bad) == "" {
					continue
				}
				s.send(forgotOf(bad)).shouldBe("validation_failed", bad).names("email")
				a := c.elsewhere().move(bad, c.password).shouldBe("validation_failed", bad)
				a.names("newEmail")
			}
			s.send(forgotOf("")).refused("validation_failed").names("email")
			s.send(forgotOf(sizedEmail(254))).want(202)
			s.send(forgotOf(sizedEmail(255))).refused("validation_failed").names("email")
			c.move(sizedEmail(255), c.password).refused("validation_failed").names("newEmail")
		}},
	{"no header and no recipient can be injected, not even by a row behind the server's back", own,
		injectsNothing},
	{"the longest address gets its mail, and its link works", own, func(s *server) {
		c := s.newUser()
		c.email = strings.Repeat("l", 60) + "." + sizedEmail(193)
		c.take(s.trySignup(c.email, c.password).ok())
		s.send(verifyOf(s.mailTo(c.email, toVerify).token())).ok()
	}},
	{"MAIL_TEMPLATES is a file of one's own texts", own, usesTemplates},
	{"faults of the mail's configuration stop the start, each in a line of its own", own,
		hasFaults},
	{"mails are counted by what became of them", own, countsMails},
}

func hasNoMail(s *server) {
	c := s.signup()
	token := c.resetToken()
	verify := c.verifyToken()
	s = s.start(noMail)
	c = c.on(s)
	for _, route := range mailRoutes {
		for method := range strings.FieldsSeq("GET HEAD POST PUT DELETE OPTIONS") {
			_, path, _ := strings.Cut(route, " ")
			a := c.elsewhere().send(to(method + " " + path)).want(404)
			s.expect(a.code() == "not_found" || method == "HEAD", "%s: %s", a, a.body)
		}
	}
	for _, r := range []request{
		forgotOf(c.email), post("/auth/email/verification"), verifyOf(verify),
		moveOf(newEmail(), c.password),
	} {
		c.send(r).refused("not_found")
	}
	s.send(resetOf("x", newPassword())).refused("invalid_link")
	c.verified(false)
	next := newPassword()
	s.send(resetOf(token, next)).ok()
	s.tryLogin(c.email, next, newIP()).ok()
	s.signup().lives()
}

// loggedLink waits for a mail in the log, and returns the token of its link.
func (s *server) loggedLink(kind, email, page string) (token string) {
	form := regexp.MustCompile(`(?m)^.*mail is logged, because SMTP_URL is not set.* kind=` + kind +
		` to=` + regexp.QuoteMeta(email) + ` .* link="?` + regexp.QuoteMeta(page) +
		`#token=([\w.-]+)"?.*$`)
	s.eventually(5*time.Second, "the log has the mail "+kind, func() bool {
		line := form.FindStringSubmatch(s.log())
		if line != nil {
			token = line[1]
			s.expect(strings.Count(line[0], token) == 2, "the text has no link: %s", line[0])
		}
		return line != nil
	})
	return token
}

func logsMails(s *server) {
	s = s.start(env{"SMTP_URL": "", "MAIL_FROM": "", "LOG_LEVEL": "error"})
	c := s.signup()
	s.send(verifyOf(s.loggedLink("verify", c.email, frontend+"/verify-email"))).ok()
	c.verified(true)
	email := newEmail()
	c.move(email, c.password).want(202)
	s.send(verifyOf(s.loggedLink("change", email, frontend+"/verify-email"))).ok()
	s.send(forgotOf(email)).want(202)
	c.email, c.password = email, newPassword()
	token := s.loggedLink("reset", email, frontend+"/reset-password")
	s.send(resetOf(token, c.password)).ok()
	c.gone()
	c.login().lives()
}

func linksToFrontend(s *server) {
	s = s.start(env{"FRONTEND_URL": " https://first.promise.test/ , " + frontend})
	c := s.signup()
	s.mailTo(c.email, toVerify)
	texts := map[string]bool{}
	for _, r := range []request{
		forgotOf(c.email),
		forgotOf(c.email).from(frontend).with("Referer", frontend+"/x"),
		forgotOf(c.email).with("Host", "evil.example").with("X-Forwarded-Host", "evil.example").
			with("X-Forwarded-Proto", "ftp").with("Forwarded", "host=evil.example;proto=ftp"),
	} {
		s.send(r).want(202)
		m := s.mailTo(c.email, toReset)
		page, token := m.link()
		s.expect(page == "https://first.promise.test/reset-password", "the link is to %s", page)
		texts[strings.ReplaceAll(m.text, token, "")] = true
		subject := m.header.Get("Subject")
		s.expect(strings.HasSuffix(subject, " first.promise.test"), "Subject is %q", subject)
	}
	s.expect(len(texts) == 1, "the texts differ: %v", texts)
	c.verification().want(202)
	m := s.mailTo(c.email, toVerify)
	s.expect(strings.Contains(m.text, "24 hours"), "the text is\n%s", m.text)
	page, _ := m.link()
	s.expect(page == "https://first.promise.test/verify-email", "the link is to %s", page)
}

func limitsMails(s *server) {
	s = s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
	c, other := s.signup(), s.signup()
	c.verification().want(202)
	s.send(verifyOf(c.verifyToken())).ok()
	first := s.send(forgotOf(c.email)).want(202)
	for range 2 {
		s.send(forgotOf(c.email)).want(202)
	}
	s.isCounted(c.email, 5)
	for range 2 {
		sixth := s.send(forgotOf(strings.ToUpper(c.email))).want(202)
		s.expect(string(first.body) == string(sixth.body), "first %s, then %s", first.body,
			sixth.body)
	}
	other.move(c.email, other.password).want(202)
	s.eventually(5*time.Second, "three mails are over the limit", func() bool {
		return strings.Contains(s.scrape(), `latchkey_mail_total{outcome="limited"} 3`)
	})
	for range 7 {
		c.elsewhere().changePassword(c.password, c.password).ok()
		s.mailTo(c.email, aNotice)
	}
	s.mailTo(other.email, toVerify)
	for _, purpose := range []string{toVerify, toReset, toReset, toReset} {
		s.mailTo(c.email, purpose)
	}
	s.assertNoMail(c.email)
}

func injectsNothing(s *server) {
	m := s.startMailServer(&mailServer{})
	s = s.startWith(m, "smtp", "127.0.0.1", nil)
	const evil = "evil@victim.example"
	for _, email := range []string{
		newEmail() + "\r\nBcc: " + evil + "\r\n\r\nBuy",
		newEmail() + "\nBcc: " + evil,
		newEmail() + "\rBcc: " + evil,
		newEmail() + ">\r\nRCPT TO:<" + evil,
		newEmail() + "," + evil,
		newEmail() + "> ORCPT=rfc822;" + evil + " <x",
		"Ada <" + evil + ">",
		evil + "\x7f",
		`"a\r\nb"@victim.example`,
		"<" + evil + ">",
		"@relay.example:" + evil,
		"a\u2028b@victim.example",
		"",
	} {
		c := s.signup()
		s.mailTo(c.email, toVerify)
		s.exec("UPDATE users SET email = $1 WHERE id = $2", email, c.id)
		c.verification().want(202)
		c.changePassword(c.password, c.password).ok()
		s.exec("UPDATE users SET email = $1 WHERE id = $2", c.email, c.id)
		token := c.moveToken(newEmail())
		s.exec("UPDATE users SET email = $1 WHERE id = $2", email, c.id)
		s.send(verifyOf(token)).shouldBe("invalid_link", email)
	}
	c := s.signup() // Other mails go on.
	s.mailTo(c.email, toVerify)
	s.assertNoMail()
	for _, command := range m.heard() {
		s.expect(!strings.Contains(command, "victim"), "the mail server was told %q", command)
	}
}

// templates are one's own texts for all mails.
func templates(reset string) string {
	text := `{{define "reset.subject"}}Grüße, und so viele Worte mehr, daß es für eine Zeile zu ` +
		`viele werden: {{.Email}}{{end}}{{define "reset.body"}}` + reset + `{{end}}`
	for _, kind := range []string{"verify", "change", "password_changed", "email_changed"} {
		text += fmt.Sprintf("{{define %q}}%s{{end}}", kind+".subject", kind)
		text += fmt.Sprintf("{{define %q}}Ihr Link: {{.Link}}{{end}}", kind+".body")
	}
	return text
}

// file is the name of a file with this text.
func (s *server) file(text string) string {
	name := filepath.Join(s.TempDir(), "templates")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		s.Fatal(err)
	}
	return name
}

func usesTemplates(s *server) {
	long := strings.Repeat("Ein langer Satz ohne Umbruch, für {{.Email}}. ", 30)
	text := "Grüß Gott!\r\n.\r\n..\r\nFrom here\n" + long + "\nÄ=3D\ttab \n" +
		"{{.Link}}\n{{.Lifetime}}\n"
	s = s.start(env{"MAIL_TEMPLATES": s.file(templates(text))})
	c := s.signup()
	m := s.mailTo(c.email, toVerify)
	s.expect(strings.HasPrefix(m.text, "Ihr Link: http"), "the text is %q", m.text)
	c.send(forgotOf(c.email)).want(202)
	m = s.mailTo(c.email, toReset)
	for _, part := range []string{
		"Grüß Gott!\n.\n..\nFrom here\n", ", für " + c.email + ". Ein langer", "Ä=3D\ttab \n",
		"30 min",
	} {
		s.expect(strings.Contains(m.text, part), "there is no %q in\n%s", part, m.text)
	}
	s.send(resetOf(m.token(), newPassword())).ok()
}

func hasFaults(s *server) {
	const password = "hunter2"
	good := templates("{{.Link}}")
	for name, values := range map[string][]string{
		"SMTP_URL": {
			"mail.example", "http://mail.example", "smtp://", "smtps://:465", "smtp:mail.example",
			"smtp://user:hunter2@mail.example/path", "smtp://user:hunter2@mail.example?x=hunter2",
			"smtp://user:hunter2@mail.example#hunter2", "smtp://user:hunter2@mail.example:port",
			"smtp://user:hunter2@mail.example:0", "smtp://user:hunter2@mail.example:70000",
			"smtp://user:hunter2%zz@mail.example", "smtp://user:hunter2 @mail.example",
			"smtp://user:hunter2%0d%0aQUIT@mail.example",
		},
		"MAIL_FROM": {
			"", "nobody", "hunter2 <nobody>", "a@b.example, c@d.example", "a@b.example\r\nBcc: c@d",
			"A <a@b.example> B",
		},
		"PASSWORD_RESET_URL": {
			"/reset", "ftp://app.example/reset", "https://", "javascript:alert(1)",
			"https://app.example/reset#hunter2", "https://app.example/reset#",
			"https://app.example/re set", "https://app.example/<reset>",
		},
		"EMAIL_VERIFY_URL": {"verify", "https:///verify", "https://app.example/#/verify"},
		"MAIL_TEMPLATES": {
			"/nowhere/at/all", s.TempDir(), s.file(""), s.file("{{define}}"),
			s.file(strings.Replace(good, "{{.Link}}", "{{.Password}}", 1)),
			s.file(strings.Replace(good, "{{.Link}}", "no link", 1)),
			s.file(strings.Replace(good, "email_changed.body", "email_changed.text", 1)),
			s.file(strings.Replace(good, "}}verify{{", "}} {{", 1)),
		},
	} {
		for _, value := range values {
			output := s.faulty(s.stores.environment(env{name: value}), name)
			shown := strings.Contains(output, password)
			s.expect(!shown, "%s=%s shows it:\n%s", name, value, output)
		}
	}
	for mark := range strings.FieldsSeq(`@ / : ? # % - ; \ $`) {
		value := "smtp://user:top" + mark + "secret@127.0.0.1:1"
		if u, err := url.Parse(value); err == nil && u.Hostname() == "127.0.0.1" {
			continue // which is no fault
		}
		output := s.faulty(s.stores.environment(env{"SMTP_URL": value}), "SMTP_URL")
		s.expect(!strings.Contains(output, "top") && !strings.Contains(output, "secret"),
			"SMTP_URL=%s:\n%s", value, output)
	}
}

func countsMails(s *server) {
	refuse := map[string]func(command, to string) error{
		"later": once("RCPT", refusal(450)),
		"never": func(string, string) error { return refusal(550) },
	}
	m := s.startMailServer(&mailServer{answer: func(command, to string) error {
		kind, _, _ := strings.Cut(to, ".")
		if command == "RCPT" && refuse[kind] != nil {
			return refuse[kind](command, to)
		}
		return nil
	}})
	s = s.startWith(m, "smtp", "127.0.0.1", env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
	for _, outcome := range strings.Fields("sent retried failed limited dropped") {
		zero := fmt.Sprintf("latchkey_mail_total{outcome=%q} 0\n", outcome)
		s.expect(strings.Contains(s.scrape(), zero), "there is no %s", zero)
	}
	c := s.signup()
	for _, kind := range []string{"later.", "never."} {
		s.trySignup(kind+newEmail(), newPassword()).ok()
	}
	s.send(forgotOf(newEmail())).want(202) // for which there is no mail
	for range 6 {
		s.send(forgotOf(c.email)).want(202)
	}
	want := map[string]int{"sent": 6, "retried": 1, "failed": 1, "limited": 2, "dropped": 0}
	s.eventually(20*time.Second, "the mails are counted", func() bool {
		text := s.scrape()
		for outcome, n := range want {
			sample := fmt.Sprintf("latchkey_mail_total{outcome=%q} %d\n", outcome, n)
			if !strings.Contains(text, sample) {
				return false
			}
		}
		return true
	})
}
