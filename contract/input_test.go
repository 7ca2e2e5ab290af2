package contract

import (
	"strings"
)

// sizedEmail fills an address up to a size, with labels that no other rule could refuse.
func sizedEmail(size int) string {
	email := newEmail()
	label := "." + strings.Repeat("d", 60)
	rest := size - len(email)
	return email + strings.Repeat(label, rest/len(label)) + "." + strings.Repeat("e", rest%len(label)-1)
}

var inputPromises = []promise{
	{"an email is trimmed and lower-cased, in ASCII only", aURL, func(s *server) {
		local, password := newEmail(), newPassword()
		kelvin := "\u212a" // its lower case is k
		for sent, kept := range map[string]string{
			" \ta" + local + "\r\n":                "a" + local,
			"B" + strings.ToUpper(local):           "b" + local,
			"ÉS" + kelvin + strings.ToUpper(local): "És" + kelvin + local,
			"d.d+tag_" + local:                     "d.d+tag_" + local,
			"o'" + local:                           "o'" + local,
		} {
			if got := s.trySignup(sent, password).ok().str("user", "email"); got != kept {
				s.Errorf("%q is kept as %q, want %q", sent, got, kept)
			}
			for _, spelling := range []string{sent, kept, "  " + kept + " ", asciiUpper(kept)} {
				s.tryLogin(spelling, password, newIP()).ok()
				s.trySignup(spelling, password).refused("email_exists")
			}
		}
		for _, other := range []string{"és" + kelvin + local, "ÉSk" + local} {
			s.tryLogin(other, password, newIP()).refused("invalid_credentials")
		}
	}},
	{"at signup an email has at most 254 bytes", aURL, func(s *server) {
		s.trySignup(sizedEmail(254), newPassword()).ok()
		for _, size := range []int{255, 300, 5000} {
			s.trySignup(sizedEmail(size), newPassword()).refused("validation_failed").names("email")
		}
	}},
	{"at signup an email has one @, no spaces or control characters, and is a plain address", aURL,
		func(s *server) {
			for _, email := range []string{
				"", "   ", "a", "a@", "@example.com", "@", "a@@example.com", "a@b@example.com",
				"a b@example.com", "a@exam ple.com", "a\tb@example.com", "a\nb@example.com",
				"a@example.com\r\nBcc: x", "a\x00b@example.com", "a\x7fb@example.com", "a\x01@example.com",
				"a\u0085b@example.com", "a\u00a0b@example.com", "a\u200bb@example.com",
				"Ada <ada@example.com>", "<ada@example.com>", "ada@example.com (Ada)",
				"ada@example.com, bob@example.com", `"a b"@example.com`, `"a@b"@example.com`,
				"mailto:<a@example.com>",
			} {
				a := s.trySignup(email, newPassword()).shouldBe("validation_failed", email)
				a.names("email")
			}
		}},
	{"a password has 8 to 72 bytes, not characters", aURL, func(s *server) {
		const eight = "k7#qZ!9w"
		for _, good := range []string{
			eight, "éüöß", "日本語", "🔑🔐", strings.Repeat(eight, 9), strings.Repeat("é", 36),
			strings.Repeat("日", 24),
		} {
			c := s.newUser()
			c.password = good
			s.trySignup(c.email, good).shouldBe("", good)
			c.login()
			for _, wrong := range []string{good + "!", good[:len(good)-1], " " + good, good + " "} {
				s.tryLogin(c.email, wrong, newIP()).shouldBe("invalid_credentials", wrong)
			}
		}
		for _, bad := range []string{
			"", "k7#qZ!9", "ééé", "日本", strings.Repeat(eight, 9) + "x", strings.Repeat("é", 36) + "x",
			strings.Repeat("é", 37), strings.Repeat("日", 25), strings.Repeat("x", 5000),
		} {
			s.trySignup(newEmail(), bad).shouldBe("validation_failed", bad).names("password")
		}
	}},
	{"a password is any characters but NUL, and is not trimmed", aURL, func(s *server) {
		for _, good := range []string{
			"        x", " k7#qZ!9wx ", "tab\tnewline\n\x01\x7f", `quotes"\'`, "\u202eabc\u0301def",
			"<script>alert(1)",
		} {
			c := s.newUser()
			c.password = good
			s.trySignup(c.email, good).shouldBe("", good)
			c.login()
			trimmed := strings.TrimSpace(good)
			if trimmed != good {
				s.tryLogin(c.email, trimmed, newIP()).shouldBe("invalid_credentials", trimmed)
			}
		}
		for _, bad := range []string{"\x00longenough", "long\x00enough", "longenough\x00"} {
			s.trySignup(newEmail(), bad).shouldBe("validation_failed", bad).names("password")
		}
	}},
	{"the most common passwords are refused, without regard to case, at signup and at a change", aURL,
		func(s *server) {
			c := s.signup()
			for _, common := range []string{
				"password", "PASSWORD", "12345678", "123456789", "iloveyou", "sunshine", "Superman",
				"trustNO1", "qwertyuiop",
			} {
				s.trySignup(newEmail(), common).shouldBe("validation_failed", common).names("password")
				a := c.changePassword(c.password, common).shouldBe("validation_failed", common)
				a.names("newPassword")
			}
			c.login()
		}},
	{"a common password is a whole one, and no part of one or of several", aURL, func(s *server) {
		for _, good := range []string{
			"trustno1 and more", "12345678\n123456789", "\n12345678", "12345678\n", "12345678\r\n",
			"password\npassword1",
		} {
			s.trySignup(newEmail(), good).shouldBe("", good)
		}
	}},
	{"a new password has the limits of signup", aURL, func(s *server) {
		c := s.signup()
		for _, bad := range []string{"k7#qZ!9", strings.Repeat("é", 36) + "x", "long\x00enough"} {
			c.changePassword(c.password, bad).refused("validation_failed").names("newPassword")
		}
		longest := strings.Repeat("é", 36)
		c.changePassword(c.password, longest).ok()
		c.password = longest
		c.login().lives()
	}},
	{"a password of more than 72 bytes is simply wrong, never cut; so is one with a NUL", aURL,
		func(s *server) {
			longest := strings.Repeat("k7#qZ!9w", 9)
			c := s.newUser()
			c.password = longest
			c.take(s.trySignup(c.email, longest).ok())
			for _, wrong := range []string{longest + "x", longest + longest, longest[:71], longest + "\x00"} {
				s.tryLogin(c.email, wrong, newIP()).refused("invalid_credentials")
				c.elsewhere().deleteAccount(wrong).refused("invalid_credentials")
				c.elsewhere().changePassword(wrong, newPassword()).refused("invalid_credentials")
			}
			// To x/crypto's bcrypt these are one and the same.
			short := newEmail()
			s.trySignup(short, "k7#qZ!9w").ok()
			s.tryLogin(short, "k7#qZ!9w\x00k7#qZ!9w", newIP()).refused("invalid_credentials")
			s.tryLogin(short, "k7#qZ!9w\x00", newIP()).refused("invalid_credentials")
		}},
	{"at login only presence is validated", aURL, func(s *server) {
		for body, fields := range map[string]string{
			`{}`: "email password", `{"email":"a@b"}`: "password", `{"password":"x"}`: "email",
			`{"email":"","password":""}`: "email password",
		} {
			s.posted(body).refused("validation_failed").names(strings.Fields(fields)...)
		}
		for _, email := range []string{
			"nonsense", "a@b@c", "Ada <ada@example.com>", "a\x00b@example.com", "\u0001",
			strings.Repeat("x", 5000) + "@example.com",
		} {
			s.tryLogin(email, "x", newIP()).shouldBe("invalid_credentials", email)
		}
		c := s.signup()
		for _, password := range []string{"x", strings.Repeat("x", 5000), "\x00", "password"} {
			s.tryLogin(c.email, password, newIP()).shouldBe("invalid_credentials", password)
		}
	}},
}

func asciiUpper(text string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' {
			r -= 'a' - 'A'
		}
		return r
	}, text)
}
