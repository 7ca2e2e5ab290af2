package contract

import (
	"strings"
)

// sizedEmail fills an address up to a size, with labels that no other rule could refuse.
func sizedEmail(size int) string {
	email := newEmail()
	label := "." + strings.Repeat("d", 60)
	rest := size - len(email)
	email += strings.Repeat(label, rest/len(label))
	return email + "." + strings.Repeat("e", rest%len(label)-1)
}

// notAddresses are what no account's email may be.
var notAddresses = []string{
	"", "   ", "a", "a@", "@a.example", "@", "a@@b.example", "a@b@c.example", "a b@c.example",
	"a@b c.example", "a\tb@c.example", "a\nb@c.example", "a@b.example\r\nBcc: x",
	"a\x00b@c.example", "a\x7fb@c.example", "a\x01@b.example", "a\u0085b@c.example",
	"a\u00a0b@c.example", "a\u200bb@c.example", "Ada <a@b.example>", "<a@b.example>",
	"a@b.example (A)", "a@b.example, c@d.example", "a@b.example,c@d.example",
	"a@b.example;c@d.example", `"a b"@c.example`, `"a@b"@c.example`, "a@[127.0.0.1]",
	"a@[IPv6:::1]", "a@b..example", "a@b.example.", "a@b!c.example", "a\u3164b@c.example",
	"a\ufe0fb@c.example", "a\ufffdb@c.example",
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
			got := s.trySignup(sent, password).ok().str("user", "email")
			s.expect(got == kept, "%q is kept as %q, want %q", sent, got, kept)
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
	{"at signup an email has one @, no spaces or control characters, and no name", aURL,
		func(s *server) {
			for _, bad := range notAddresses {
				s.trySignup(bad, newPassword()).shouldBe("validation_failed", bad).names("email")
			}
			s.trySignup("nonsense", "short").refused("validation_failed").names("email", "password")
		}},
	{"a password is 8 to 72 bytes of anything but NUL, and not trimmed", aURL, func(s *server) {
		const eight = "k7#qZ!9w"
		for _, good := range []string{
			eight, "éüöß", "日本語", "🔑🔐", strings.Repeat(eight, 9), strings.Repeat("é", 36),
			strings.Repeat("日", 24), "        x", " k7#qZ!9wx ", "tab\tnewline\n\x01\x7f",
			`quotes"\'`, "\u202eabc\u0301def", "<script>alert(1)",
		} {
			email := newEmail()
			s.trySignup(email, good).shouldBe("", good)
			s.tryLogin(email, good, newIP()).shouldBe("", good)
			trimmed := strings.TrimSpace(good)
			for _, wrong := range []string{good + "!", good[:len(good)-1], trimmed} {
				if wrong != good {
					s.tryLogin(email, wrong, newIP()).shouldBe("invalid_credentials", wrong)
				}
			}
		}
		for _, bad := range []string{
			"", "k7#qZ!9", "ééé", "日本", strings.Repeat(eight, 9) + "x",
			strings.Repeat("é", 36) + "x", strings.Repeat("日", 25), strings.Repeat("x", 5000),
			"\x00longenough", "long\x00enough", "longenough\x00",
		} {
			s.trySignup(newEmail(), bad).shouldBe("validation_failed", bad).names("password")
		}
	}},
	{"the most common passwords are refused, without regard to case", aURL, func(s *server) {
		for _, common := range []string{
			"password", "PASSWORD", "12345678", "iloveyou", "sunshine", "trustNO1", "qwertyuiop",
		} {
			s.trySignup(newEmail(), common).shouldBe("validation_failed", common).names("password")
		}
		for _, good := range []string{ // which are no whole line of the list
			"trustno1 and more", "12345678\n123456789", "\n12345678", "12345678\n", "12345678\r\n",
		} {
			s.trySignup(newEmail(), good).shouldBe("", good)
		}
	}},
	{"a new password has the limits of signup", aURL, func(s *server) {
		c := s.signup()
		both := c.changePassword("", "").refused("validation_failed")
		both.names("currentPassword", "newPassword")
		c.deleteAccount("").refused("validation_failed").names("password")
		longest := strings.Repeat("é", 36)
		for _, bad := range []string{"k7#qZ!9", longest + "x", "long\x00enough", "TrustNo1"} {
			c.changePassword(c.password, bad).refused("validation_failed").names("newPassword")
		}
		c.changePassword(c.password, longest).ok()
		c.password = longest
		c.login().lives()
	}},
	{"a password of more than 72 bytes is simply wrong, never cut; so is one with a NUL", aURL,
		func(s *server) {
			short := "k7#qZ!9w"
			longest := strings.Repeat(short, 9)
			for password, wrong := range map[string][]string{
				longest: {longest + "x", longest + longest, longest[:71], longest + "\x00"},
				short:   {short + "\x00" + short, short + "\x00"}, // the same to x/crypto's bcrypt
			} {
				c := s.newUser()
				c.take(s.trySignup(c.email, password).ok())
				for _, guess := range wrong {
					c = c.elsewhere()
					s.tryLogin(c.email, guess, c.ip).refused("invalid_credentials")
					c.deleteAccount(guess).refused("invalid_credentials")
					c.changePassword(guess, newPassword()).refused("invalid_credentials")
				}
			}
		}},
	{"at login only presence is validated", aURL, func(s *server) {
		for body, fields := range map[string]string{
			`{}`: "email password", `{"email":"a@b"}`: "password", `{"password":"x"}`: "email",
			`{"email":"","password":""}`: "email password",
		} {
			s.posted(body).refused("validation_failed").names(strings.Fields(fields)...)
		}
		for _, email := range []string{"nonsense", "a@b@c", "A <a@b.c>", "\x00", sizedEmail(5000)} {
			s.tryLogin(email, "x", newIP()).shouldBe("invalid_credentials", email)
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
