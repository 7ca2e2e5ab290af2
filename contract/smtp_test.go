package contract

import (
	"fmt"
	"net"
	"net/textproto"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/emersion/go-sasl"
)

// startWith runs a server that sends its mails by this mail server, reached at scheme://host.
func (s *server) startWith(m *mailServer, scheme, host string, more env) *server {
	sender := *s
	sender.mails = m
	return sender.start(env{"SMTP_URL": m.url(scheme, host)}.with(more))
}

// outcome waits for a line of the log that tells this outcome of a mail, and returns it.
func (s *server) outcome(outcome string) (line string) {
	form := regexp.MustCompile(`(?m)^.*outcome"?[=:]"?` + outcome + `\b.*$`)
	s.eventually(20*time.Second, "a mail is "+outcome, func() bool {
		line = form.FindString(s.log())
		return line != ""
	})
	return line
}

// hangs is how a mail server answers that is stuck at a command until the test ends.
func (s *server) hangs(at string) func(command, to string) error {
	return func(command, _ string) error {
		if command == at {
			<-s.Context().Done()
		}
		return nil
	}
}

// once refuses a command with this error, and lets the next ones pass.
func once(at string, err error) func(command, to string) error {
	var refused atomic.Bool
	return func(command, _ string) error {
		if command == at && !refused.Swap(true) {
			return err
		}
		return nil
	}
}

var smtpPromises = []promise{
	{"smtps:// is TLS at once and smtp:// is STARTTLS, where the certificate verifies", own,
		sendsOverTLS},
	{"the ports are 465 for smtps:// and 587 for smtp://, unless SMTP_URL has another", own,
		func(s *server) {
			for scheme, port := range map[string]string{"smtps": "465", "smtp": "587"} {
				// Nobody listens on this address.
				sender := s.start(env{"SMTP_URL": scheme + "://127.86.53.9"})
				sender.signup()
				line := sender.outcome("retried")
				s.expect(strings.Contains(line, "127.86.53.9:"+port), "%s: %s", scheme, line)
			}
		}},
	{"nothing is told to a mail server without TLS on another host, or without a good certificate",
		own, tellsNobodyElse},
	{"nothing is told to a mail server that offers STARTTLS and then refuses it", own,
		refusesTLS},
	{"AUTH is PLAIN, or LOGIN where only that is offered, with what SMTP_URL has", own,
		authenticates},
	{"EHLO tells a name or an address, as RFC 5321 wants it", own, func(s *server) {
		c := s.signup()
		helo := s.mailTo(c.email, toVerify).helo
		address := strings.HasPrefix(helo, "[127.0.0.1]") || strings.HasPrefix(helo, "[IPv6:")
		domain := strings.Contains(helo, ".") && !strings.Contains(helo, "[")
		s.expect(address || domain, "EHLO %s", helo)
	}},
	{"what is refused for now or cut off is sent again, unchanged, after 5 s", own, sendsOnceMore},
	{"what is refused for good has failed at once", own, func(s *server) {
		for _, at := range []string{"MAIL", "RCPT", "DATA"} {
			m := s.startMailServer(&mailServer{answer: once(at, refusal(554))})
			sender := s.startWith(m, "smtp", "127.0.0.1", nil)
			sender.signup()
			line := sender.outcome("failed")
			told := strings.Contains(line, "554 5.7.1")
			s.expect(told, "at %s: the log does not say why: %s", at, line)
			s.expect(len(m.left()) == 0, "at %s: it was sent all the same", at)
			c := sender.signup() // The next mail has nothing to do with it.
			sender.mailTo(c.email, toVerify)
			s.expect(!strings.Contains(sender.log(), "retried"), "at %s: it was retried", at)
		}
	}},
	{"what is refused to the server itself is tried again: its password may be mended", own,
		func(s *server) {
			m := s.startMailServer(&mailServer{
				mechanisms: []string{sasl.Plain},
				answer: func(command, _ string) error {
					if command == "AUTH" {
						return refusal(535)
					}
					return nil
				},
			})
			s = s.startWith(m, "smtp", "127.0.0.1", nil)
			c := s.signup()
			line := s.outcome("retried")
			told := strings.Contains(line, "AUTH: 535 5.7.1")
			s.expect(told, "the log does not say why: %s", line)
			m.setAnswer(nil)
			s.mailTo(c.email, toVerify)
		}},
	{"a mail server that is down changes no answer, and gets the mails when it is up", own,
		changesNoAnswer},
	{"a mail server that hangs holds up no answer and no start", own, func(s *server) {
		m := s.startMailServer(&mailServer{answer: s.hangs("EHLO")})
		began := time.Now()
		s = s.startWith(m, "smtp", "127.0.0.1", env{"SHUTDOWN_TIMEOUT": "100ms"})
		s.mayFail = true
		took := time.Since(began)
		s.expect(took <= 4*time.Second, "the start took %v", took)
		s.answersAll()
	}},
	{"an internationalised address gets its mails by SMTPUTF8, and no other address does", own,
		func(s *server) {
			for _, email := range []string{"jörg." + newEmail(), newEmail() + ".bücher.example"} {
				c := s.newUser()
				c.email = email
				c.take(s.trySignup(email, c.password).ok())
				m := s.mailTo(email, toVerify)
				s.expect(m.utf8, "%s: SMTPUTF8 was not asked for", email)
				s.send(verifyOf(m.token())).ok()
				c.resetToken()
			}
			c := s.signup()
			m := s.mailTo(c.email, toVerify)
			s.expect(!m.utf8, "SMTPUTF8 was asked for %s", c.email)
		}},
	{"where the mail server has no SMTPUTF8, such an address is refused with a clear message", own,
		refusesInternational},
	{"mails that were accepted before SIGTERM are delivered before the end", own, deliversAtTheEnd},
	{"if the mail server hangs, the end is within SHUTDOWN_TIMEOUT, and the log says what it lost",
		own, dropsAtTheEnd},
	{"a full queue is overloaded for what asks for a mail, and changes nothing else", own,
		fillsTheQueue},
}

func sendsOverTLS(s *server) {
	certificate := testAuthority().certificateOf("127.0.0.1", "localhost", "0.0.0.0")
	for _, x := range []struct {
		scheme   string
		host     string
		implicit bool
		secure   bool
	}{
		{"smtps", "127.0.0.1", true, true},
		{"smtps", "localhost", true, true},
		{"smtp", "127.0.0.1", false, true}, // where it is offered, it is used on this host, too
		{"smtp", "0.0.0.0", false, true},   // which leads to this host, and does not say so
		{"smtp", "127.0.0.1", false, false},
		{"smtp", "localhost", false, false},
	} {
		m := &mailServer{implicitTLS: x.implicit}
		if x.secure {
			m.certificate = certificate
		}
		sender := s.startWith(s.startMailServer(m), x.scheme, x.host, trusted(s.T))
		got := sender.mailTo(sender.signup().email, toVerify).secure
		s.expect(got == x.secure, "%s://%s: TLS is %v, want %v", x.scheme, x.host, got, x.secure)
	}
}

func tellsNobodyElse(s *server) {
	authority := testAuthority()
	good := authority.certificateOf("127.0.0.1", "0.0.0.0")
	expired := authority.certificateUntil(time.Now().Add(-time.Minute), "127.0.0.1")
	both := []string{sasl.Plain, sasl.Login}
	for name, x := range map[string]struct {
		mailServer *mailServer
		scheme     string
		host       string
		trust      env
		mechanisms []string
	}{
		"no STARTTLS":            {&mailServer{}, "smtp", "0.0.0.0", trusted(s.T), nil},
		"no STARTTLS, and PLAIN": {&mailServer{}, "smtp", "0.0.0.0", trusted(s.T), both[:1]},
		"no STARTTLS, and LOGIN": {&mailServer{}, "smtp", "0.0.0.0", trusted(s.T), both[1:]},
		"an unknown authority": {
			&mailServer{certificate: good, implicitTLS: true}, "smtps", "127.0.0.1", nil, both,
		},
		"an unknown authority, by STARTTLS": {
			&mailServer{certificate: good}, "smtp", "127.0.0.1", nil, both,
		},
		"a certificate of another host": {
			&mailServer{certificate: authority.certificateOf("other.example"), implicitTLS: true},
			"smtps", "127.0.0.1", trusted(s.T), both,
		},
		"a certificate that has expired": {
			&mailServer{certificate: expired, implicitTLS: true},
			"smtps", "127.0.0.1", trusted(s.T), both,
		},
		"no TLS where it is due at once": {&mailServer{}, "smtps", "127.0.0.1", trusted(s.T), both},
	} {
		x.mailServer.mechanisms = x.mechanisms
		m := s.startMailServer(x.mailServer)
		sender := s.startWith(m, x.scheme, x.host, x.trust)
		sender.signup()
		sender.outcome("retried")
		for _, command := range m.heard() {
			s.expect(command == "EHLO", "%s: it was told %s", name, command)
		}
	}
}

// refusesTLS is about somebody on the way to the mail server, who would like to read the password.
func refusesTLS(s *server) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	told := make(chan []string, 100)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			told <- refuseTLS(textproto.NewConn(conn))
		}
	}()
	s = s.start(env{"SMTP_URL": "smtp://user:pass-phrase@0.0.0.0:" + port})
	s.signup()
	s.outcome("retried")
	for range 2 { // at the start, and for the mail
		lines := <-told
		s.expect(slices.Contains(lines, "QUIT"), "it was not told QUIT: %q", lines)
		for _, line := range lines {
			command, _, _ := strings.Cut(line, " ")
			good := slices.Contains([]string{"EHLO", "STARTTLS", "QUIT"}, command)
			s.expect(good, "it was told %s", line)
		}
	}
}

// refuseTLS is a mail server that offers STARTTLS and refuses it. It returns what it was told.
func refuseTLS(conn *textproto.Conn) (told []string) {
	defer conn.Close()
	conn.PrintfLine("220 mail.promise.test")
	for {
		line, err := conn.ReadLine()
		if err != nil {
			return told
		}
		told = append(told, line)
		switch command, _, _ := strings.Cut(line, " "); command {
		case "EHLO":
			conn.PrintfLine("250-mail.promise.test\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN")
		case "STARTTLS":
			conn.PrintfLine("454 4.7.0 not now")
		case "QUIT":
			conn.PrintfLine("221 2.0.0 bye")
			return told
		default:
			conn.PrintfLine("250 2.0.0 very well")
		}
	}
}

func authenticates(s *server) {
	for _, x := range []struct {
		offered []string
		used    string
	}{
		{[]string{sasl.Plain}, sasl.Plain},
		{[]string{sasl.Login}, sasl.Login},
		{[]string{sasl.Login, "CRAM-MD5", sasl.Plain}, sasl.Plain},
		{nil, ""}, // SMTP_URL has no user
	} {
		m := s.startMailServer(&mailServer{
			certificate: testAuthority().certificateOf("0.0.0.0"),
			mechanisms:  x.offered,
		})
		sender := s.startWith(m, "smtp", "0.0.0.0", trusted(s.T))
		sender.mailTo(sender.signup().email, toVerify)
		used := slices.Contains(m.heard(), "AUTH "+x.used)
		s.expect(used == (x.used != ""), "%q: it was told %q", x.offered, m.heard())
		for _, command := range m.heard() {
			other := strings.HasPrefix(command, "AUTH") && command != "AUTH "+x.used
			s.expect(!other, "%q: it was told %s", x.offered, command)
		}
	}
}

func sendsOnceMore(s *server) {
	type try struct {
		*client
		mails *mailServer
		began time.Time
	}
	tries := map[string]try{}
	for name, answer := range map[string]func(command, to string) error{
		"refused at RCPT": once("RCPT", refusal(450)),
		"refused at DATA": once("DATA", refusal(451)),
		"cut in DATA":     once("DATA", errCut),
	} {
		m := s.startMailServer(&mailServer{answer: answer})
		sender := s.startWith(m, "smtp", "127.0.0.1", nil)
		tries[name] = try{sender.signup(), m, time.Now()}
	}
	for name, x := range tries {
		line := x.s.outcome("retried")
		told := strings.Contains(line, "RCPT: 450 4.7.1") || name != "refused at RCPT"
		s.expect(told, "%s: the log does not say why: %s", name, line)
		sent := x.s.mailTo(x.email, toVerify)
		took := time.Since(x.began)
		s.expect(took >= 4900*time.Millisecond && took <= 10*time.Second, "%s: %v", name, took)
		x.s.outcome("sent")
		for _, before := range x.mails.turnedAway() {
			s.expect(before.raw == sent.raw, "%s: first\n%s\nthen\n%s", name, before.raw, sent.raw)
		}
		s.expect(len(x.mails.left()) == 0, "%s: it has come twice", name)
	}
	refused := len(tries["refused at DATA"].mails.turnedAway())
	s.expect(refused == 1, "%d messages were refused, want 1", refused)
}

// answersAll asks for all mails there are, and wants the answers that are due, at once.
func (s *server) answersAll() *client {
	c := s.signup()
	for _, a := range []*answer{
		c.last,
		c.elsewhere().send(forgotOf(c.email)),
		c.elsewhere().send(forgotOf(newEmail())),
		c.verification(),
		c.move(newEmail(), c.password),
		c.changePassword(c.password, c.password),
	} {
		a.ok()
		s.expect(a.took <= 2*time.Second, "%s took %v", a, a.took)
	}
	return c
}

func changesNoAnswer(s *server) {
	m := &mailServer{port: freePort()} // which does not serve yet
	s = s.startWith(m, "smtp", "127.0.0.1", nil)
	s.eventually(5*time.Second, "the log warns at the start", func() bool {
		return strings.Contains(s.log(), "WARN")
	})
	c := s.answersAll()
	s.outcome("retried")
	s.startMailServer(m)
	for _, purpose := range []string{toVerify, toReset, toVerify, aNotice} {
		s.mailTo(c.email, purpose)
	}
}

func refusesInternational(s *server) {
	m := s.startMailServer(&mailServer{ascii: true})
	s = s.startWith(m, "smtp", "127.0.0.1", nil)
	c := s.signup()
	s.mailTo(c.email, toVerify) // It has met its mail server by now.
	email := "jörg." + newEmail()
	for field, a := range map[string]*answer{
		"email":    s.trySignup(email, newPassword()),
		"newEmail": c.move(email, c.password),
	} {
		a.refused("validation_failed").names(field)
		details, _ := a.json["details"].(map[string]any)
		s.expect(strings.Contains(fmt.Sprint(details[field]), "ASCII"), "%s: %s", a, a.body)
	}
	// Who has such an address from before is no reason to stop.
	s.exec("UPDATE users SET email = $1 WHERE id = $2", email, c.id)
	s.send(forgotOf(email)).want(202)
	s.outcome("failed")
	c = s.signup()
	s.mailTo(c.email, toVerify)
}

func deliversAtTheEnd(s *server) {
	slow := func(command, _ string) error {
		if command == "DATA" {
			time.Sleep(200 * time.Millisecond)
		}
		return nil
	}
	m := s.startMailServer(&mailServer{answer: slow})
	s = s.startWith(m, "smtp", "127.0.0.1", env{"SHUTDOWN_TIMEOUT": "10s"})
	var users []*client
	for range 8 {
		users = append(users, s.signup())
	}
	// One waits for its second try. It gets it at the end, and not 5 s later.
	refuse := once("RCPT", refusal(450))
	m.setAnswer(func(command, to string) error {
		if strings.HasPrefix(to, "late.") {
			return refuse(command, to)
		}
		return slow(command, to)
	})
	late := s.newUser()
	late.email = "late." + late.email
	s.trySignup(late.email, late.password).ok()
	s.outcome("retried")
	for _, c := range users {
		c.send(forgotOf(c.email)).want(202)
	}
	began := time.Now()
	err := s.stop()
	took := time.Since(began)
	s.expect(err == nil && took <= 4*time.Second, "the end came after %v, with %v", took, err)
	for _, c := range append(users, late) {
		n := len(m.left(c.email))
		want := 2
		if c == late {
			want = 1
		}
		s.expect(n == want, "%d messages have come to %s, want %d", n, c.email, want)
	}
}

func dropsAtTheEnd(s *server) {
	m := s.startMailServer(&mailServer{answer: s.hangs("DATA")})
	s = s.startWith(m, "smtp", "127.0.0.1", env{"SHUTDOWN_TIMEOUT": "500ms"})
	s.mayFail = true
	for range 7 {
		s.signup()
	}
	began := time.Now()
	s.stop()
	took := time.Since(began)
	s.expect(took <= 2*time.Second, "the end came after %v", took)
	s.expect(regexp.MustCompile(`(?m)^.*dropped.*\b7\b.*$`).MatchString(s.log()),
		"the log does not say that 7 mails were dropped:\n%s", tail(s.log(), 3))
	n := strings.Count(s.log(), "outcome=dropped")
	s.expect(n == 7, "%d of them have a line of their own", n)
}

func fillsTheQueue(s *server) {
	s = s.start(noRateLimit.with(env{"METRICS_ADDR": "127.0.0.1:" + freePort()}))
	c := s.signup()
	// What is asked for at this address waits for a second try, because it cannot be counted.
	email := newEmail()
	key := s.mailKey(email)
	s.stores.redis.RPush(s.Context(), key, "nonsense")
	defer s.evict(key)
	accepted, refused := 0, 0
	for n := 0; refused == 0 && n < 1100; n += 20 {
		answers := together(20, func(int) *answer { return s.send(forgotOf(email)) })
		refused = count(answers, 503)
		accepted += count(answers, 202)
		s.expect(refused+count(answers, 202) == len(answers), "some got neither 202 nor 503")
	}
	s.expect(refused > 0, "the queue has no end")
	s.expect(accepted >= 1000, "the queue ends after %d mails", accepted)
	for _, a := range []*answer{
		s.send(forgotOf(c.email)), c.verification(), c.move(newEmail(), c.password),
	} {
		a.refused("overloaded")
		s.expect(a.number("Retry-After") > 0, "%s: %v", a, a.Header)
	}
	c.changePassword(c.password, c.password).ok()
	s.signup().lives()
	dropped := fmt.Sprintf("latchkey_mail_total{outcome=%q} %d\n", "dropped", refused+5)
	s.expect(strings.Contains(s.scrape(), dropped), "there is no %s in\n%s", dropped, s.scrape())
}
