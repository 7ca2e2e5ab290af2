package main

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/mail"
	"net/textproto"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Links

// testLinks signs with a key that is derived here by hand (RFC 5869 sections 2.2 and 2.3), so it
// shares no code with what it tests.
func testLinks(secret string) links {
	mac := func(key, text string) string {
		h := hmac.New(sha256.New, []byte(key))
		io.WriteString(h, text)
		return string(h.Sum(nil))
	}
	extracted := mac(strings.Repeat("\x00", sha256.Size), secret)
	return links{
		keys:      keys{current: []byte(mac(extracted, "latchkey links\x01"))},
		resetURL:  "https://app.example/reset",
		verifyURL: "https://app.example/verify",
	}
}

var testUser = user{
	ID:           "u-1",
	Email:        "ada@example.com",
	PasswordHash: "$2b$12$hash",
	UpdatedAt:    testNow,
}

// tokenOf returns the token of a link, and the page that it is for.
func tokenOf(url string) (page, token string) {
	page, token, _ = strings.Cut(url, "#token=")
	return page, token
}

func TestLinks(t *testing.T) {
	all := []linkPurpose{linkReset, linkOperatorReset, linkVerify, linkChange}
	l := testLinks("the refresh secret")
	for _, purpose := range all {
		page, token := tokenOf(l.url(purpose, testUser, "new@example.com", testNow))
		lifetime, wantPage, state := 24*time.Hour, l.verifyURL, stateOf(testUser)
		switch purpose {
		case linkReset, linkOperatorReset:
			lifetime, wantPage = 30*time.Minute, l.resetURL
		case linkVerify:
			state = ""
		}
		want := link{purpose, "u-1", "new@example.com", testNow.Add(lifetime).Unix(), state}
		last := testNow.Add(lifetime - time.Second)
		if got, err := l.open(token, last, purpose); got != want || err != nil || page != wantPage {
			t.Errorf("%s: %+v, %v at %s, want %+v at %s", purpose, got, err, page, want, wantPage)
		}
		_, expired := l.open(token, last.Add(time.Second), all...)
		if expired != errLinkInvalid {
			t.Errorf("%s: it has not expired after %v", purpose, lifetime)
		}
		for _, other := range all {
			if _, err := l.open(token, testNow, other); err == nil != (other == purpose) {
				t.Errorf("%s passes for %s: %v", purpose, other, err == nil)
			}
		}
	}
}

// TestForgedLinks checks tokens that somebody else has signed, or that say something odd.
func TestForgedLinks(t *testing.T) {
	refresh := keys{current: []byte("the refresh secret"), previous: []byte("the former one")}
	l := links{keys: linkKeys(refresh)}
	open := func(token string) error {
		_, err := l.open(token, testNow, linkVerify)
		return err
	}
	made := func(secret string) string {
		_, token := tokenOf(testLinks(secret).url(linkVerify, testUser, "a@b.example", testNow))
		return token
	}
	if open(made("the refresh secret")) != nil || open(made("the former one")) != nil {
		t.Error("a link with the current or the previous secret does not verify")
	}
	payload, _ := json.Marshal(link{Purpose: linkVerify, ExpiresAt: testNow.Unix() + 1})
	good := made("the refresh secret")
	for name, token := range map[string]string{
		"another secret":             made("another secret"),
		"the secret itself":          refresh.seal(encode(string(payload))),
		"no previous secret":         keys{current: deriveKey(nil)}.seal(encode(string(payload))),
		"a refresh token":            refresh.sign(testClaims()),
		"a JWT with the derived key": l.keys.sign(testClaims()),
		"nothing":                    "",
		"no signature":               encode(string(payload)),
		"cut":                        good[:len(good)-1],
		"extended":                   good + "A",
		"no base64":                  l.keys.seal("%%%"),
		"no JSON":                    l.keys.seal(encode("verify")),
		"no expiry":                  l.keys.seal(encode(`{"purpose":"verify","userId":"u-1"}`)),
		"too long":                   l.keys.seal(strings.Repeat("A", maxTokenBytes)),
	} {
		if err := open(token); err != errLinkInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	withoutPrevious := links{keys: linkKeys(keys{current: refresh.current})}
	forged := keys{current: nil}.seal(encode(string(payload)))
	if _, err := withoutPrevious.open(forged, testNow, linkVerify); err != errLinkInvalid {
		t.Error("a link signed with the empty key verifies")
	}
}

func TestStateOf(t *testing.T) {
	changes := map[string]func(u *user){
		"hash":    func(u *user) { u.PasswordHash += "x" },
		"email":   func(u *user) { u.Email += "x" },
		"updated": func(u *user) { u.UpdatedAt = u.UpdatedAt.Add(time.Microsecond) },
	}
	for name, change := range changes {
		changed := testUser
		change(&changed)
		if stateOf(changed) == stateOf(testUser) {
			t.Errorf("the state is the same with another %s", name)
		}
	}
	verified := testUser
	verified.Verified = true
	if stateOf(verified) != stateOf(testUser) {
		t.Error("verifying an email voids links to reset the password")
	}
}

// Texts

func TestMailTexts(t *testing.T) {
	if _, err := parseMailTexts(mailTemplates); err != nil {
		t.Fatal(err)
	}
	for old, replacement := range map[string]string{
		`{{define "change.body" -}}`:              `{{define "chance.body" -}}`,
		`{{.Lifetime}}`:                           `{{.Lifespan}}`,
		"{{.Link}}":                               "the link",
		`Reset your password at {{.Site}}{{end}}`: `{{end}}`,
		"{{end}}":                                 "",
	} {
		spoilt := strings.Replace(mailTemplates, old, replacement, 1)
		if _, err := parseMailTexts(spoilt); err == nil || spoilt == mailTemplates {
			t.Errorf("%q in the place of %q is no fault", replacement, old)
		}
	}
	own := strings.Replace(mailTemplates, "Reset your", "Reset\r\nBcc: all@example.com\r\nyour", 1)
	texts, err := parseMailTexts(own)
	if err != nil {
		t.Fatal(err)
	}
	subject, _, err := texts.write(mailReset, mailValues{Site: "a\nb\u2028c", Link: "l"})
	if want := "Reset Bcc: all@example.com your password at a b c"; subject != want || err != nil {
		t.Errorf("the subject is %q, %v", subject, err)
	}
}

// The queue

// startMailer returns a mailer that sends mails through the mail server at an address, and its log.
func startMailer(t *testing.T, address string, limits mailLimits) (*mailer, *server) {
	t.Helper()
	texts, err := parseMailTexts(mailTemplates)
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(address)
	logged := &server{t: t}
	rdb := redisClient(t)
	m := newMailer(mailParts{
		transport: &smtpTransport{
			server: smtpServer{host: host, port: port},
			from:   mail.Address{Address: "auth@example.com"},
		},
		limiter: &mailLimiter{fixedWindow{rdb, mailWindow}},
		texts:   texts,
		log:     slog.New(slog.NewTextHandler(logged, nil)),
		limits:  limits,
	})
	t.Cleanup(m.cancel)
	return m, logged
}

// notice asks for a mail that needs no store.
func notice() mailRequest {
	u := testUser
	u.Verified = true
	return mailRequest{Kind: mailPasswordChanged, User: u, Address: u.Email}
}

// accept asks for a mail, which must find a place in the first queue.
func accept(t *testing.T, m *mailer, req mailRequest) {
	t.Helper()
	if err := m.enqueue(req); err != nil {
		t.Fatal(err)
	}
}

// wantOutcomes waits until the mailer has counted these.
func wantOutcomes(t *testing.T, m *mailer, want map[mailOutcome]uint64) {
	t.Helper()
	counted := func() bool {
		for _, outcome := range mailOutcomes {
			if m.outcomes[outcome].Load() != want[outcome] {
				return false
			}
		}
		return true
	}
	eventually(t, fmt.Sprint("the outcomes are ", want), counted)
}

// silentServer returns the address of a server that accepts connections and says nothing, and a
// channel that gets each connection.
func silentServer(t *testing.T) (string, <-chan net.Conn) {
	t.Helper()
	listener := listenLocally(t)
	accepted := make(chan net.Conn, 100)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	return listener.Addr().String(), accepted
}

// next waits for the next connection.
func next(t *testing.T, accepted <-chan net.Conn) net.Conn {
	t.Helper()
	select {
	case conn := <-accepted:
		return conn
	case <-time.After(time.Minute):
		t.Fatal("nobody connects for a minute")
		return nil
	}
}

var patient = mailLimits{
	queue:      2,
	senders:    1,
	timeout:    time.Minute,
	age:        time.Minute,
	sendPauses: []time.Duration{time.Hour, time.Hour},
}

// TestFullMailQueues checks that neither queue grows over its bound, and that it does not show
// whether the second one is full.
func TestFullMailQueues(t *testing.T) {
	address, accepted := silentServer(t)
	m, _ := startMailer(t, address, patient)
	for range 2 {
		accept(t, m, notice())
	}
	next(t, accepted) // one is being sent, and the other waits for it
	eventually(t, "both wait for the mail server", func() bool { return len(m.requests) == 0 })
	if err := m.enqueue(notice()); err != nil {
		t.Errorf("it shows that the second queue is full: %v", err)
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{mailDropped: 1})

	m.writers.tryTake() // so that nothing leaves the first queue
	for range 2 {
		accept(t, m, notice())
	}
	if err := m.enqueue(notice()); err != errMailQueueFull {
		t.Errorf("a third request: %v", err)
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{mailDropped: 2})
}

// TestMailTries checks that a mail is tried three times, and then given up.
func TestMailTries(t *testing.T) {
	limits := patient
	limits.sendPauses = []time.Duration{time.Millisecond, time.Millisecond}
	m, logged := startMailer(t, closedPort(t), limits)
	accept(t, m, notice())
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 2, mailFailed: 1})
	eventually(t, "its place is free", func() bool { return len(m.letters) == 0 })
	if strings.Count(logged.logged(), "connection refused") != 3 {
		t.Errorf("the log does not tell the cause:\n%s", logged.logged())
	}
}

// closedPort returns an address at which nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	listener := listenLocally(t)
	listener.Close()
	return listener.Addr().String()
}

// TestMailWaitsAlone checks that a mail which waits for its next try holds up no other.
func TestMailWaitsAlone(t *testing.T) {
	address, accepted := silentServer(t)
	m, _ := startMailer(t, address, patient)
	for range 2 {
		accept(t, m, notice())
		next(t, accepted).Close() // the first one waits an hour now
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 2})
}

// TestMailTimeout checks that a mail server that says nothing is given up.
func TestMailTimeout(t *testing.T) {
	address, _ := silentServer(t)
	limits := patient
	limits.timeout = 10 * time.Millisecond
	limits.sendPauses = nil
	m, logged := startMailer(t, address, limits)
	accept(t, m, notice())
	wantOutcomes(t, m, map[mailOutcome]uint64{mailFailed: 1})
	if !strings.Contains(logged.logged(), "i/o timeout") {
		t.Errorf("the log is\n%s", logged.logged())
	}
}

// TestLateMail checks that a mail is not sent any more if it has waited too long.
func TestLateMail(t *testing.T) {
	address, accepted := silentServer(t)
	limits := patient
	limits.age = time.Millisecond
	m, logged := startMailer(t, address, limits)
	m.senders.tryTake() // so that it waits
	accept(t, m, notice())
	eventually(t, "it waits for the mail server", func() bool { return len(m.letters) == 1 })
	time.Sleep(2 * limits.age)
	m.senders.release()
	wantOutcomes(t, m, map[mailOutcome]uint64{mailFailed: 1})
	if len(accepted) > 0 || !strings.Contains(logged.logged(), errMailLate.Error()) {
		t.Errorf("%d connections; the log is\n%s", len(accepted), logged.logged())
	}
}

// TestMailFlood checks that a mail server that never stops talking is cut off.
func TestMailFlood(t *testing.T) {
	address, accepted := silentServer(t)
	limits := patient
	limits.sendPauses = nil
	m, _ := startMailer(t, address, limits)
	accept(t, m, notice())
	conn := next(t, accepted)
	for said := 0; ; said += 64 << 10 {
		if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
			break
		}
		if said > 64<<20 { // far more than the buffers on the way hold
			t.Fatal("nobody stops it")
		}
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{mailFailed: 1})
}

// TestMailWithoutPostgres checks that a reset which cannot look for its user is tried three times,
// and counts once against the limit of its address.
func TestMailWithoutPostgres(t *testing.T) {
	limits := patient
	limits.queue = maxMails + 1
	limits.writePauses = []time.Duration{time.Millisecond, time.Millisecond}
	m, _ := startMailer(t, closedPort(t), limits)
	db, err := pgxpool.New(t.Context(), "postgres://"+closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	m.users = &store{db: db, postgresTimeout: postgresTimeout}
	reset := mailRequest{Kind: mailReset, Address: newClient(&server{t: t}).email}
	for range limits.queue {
		accept(t, m, reset)
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{
		mailRetried: 2 * maxMails,
		mailFailed:  maxMails,
		mailLimited: 1,
	})
}

// TestUnansweredQuit checks that a mail counts as sent even if nobody answers QUIT.
func TestUnansweredQuit(t *testing.T) {
	address, accepted := silentServer(t)
	limits := patient
	limits.timeout = time.Hour
	m, _ := startMailer(t, address, limits)
	accept(t, m, notice())
	conn := next(t, accepted)
	fmt.Fprint(conn, "220 ready\r\n")
	replies := map[string]string{
		"EHLO": "250",
		"MAIL": "250",
		"RCPT": "250",
		"DATA": "354",
		".":    "250",
	}
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		command, _, _ := strings.Cut(lines.Text(), " ")
		if code, known := replies[command]; known {
			fmt.Fprint(conn, code, " ok\r\n")
		}
		if command == "QUIT" {
			break
		}
	}
	wantOutcomes(t, m, map[mailOutcome]uint64{mailSent: 1})
}

// TestMailPanic checks that a panic loses one mail and nothing else.
func TestMailPanic(t *testing.T) {
	address, accepted := silentServer(t)
	m, logged := startMailer(t, address, patient)
	reset := mailRequest{Kind: mailReset, Address: testUser.Email}
	accept(t, m, reset) // there is no store to look for the user in
	wantOutcomes(t, m, map[mailOutcome]uint64{mailFailed: 1})
	if !strings.Contains(logged.logged(), "panic") {
		t.Errorf("the log is\n%s", logged.logged())
	}
	accept(t, m, notice())
	next(t, accepted)
}

// TestMailDrain checks that a shutdown tries once more what waits, and waits no longer than it may.
func TestMailDrain(t *testing.T) {
	address, accepted := silentServer(t)
	m, logged := startMailer(t, address, patient)
	for range 2 {
		accept(t, m, notice())
	}
	next(t, accepted).Close() // this one waits for its next try
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 1})
	next(t, accepted) // this one is being sent

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	m.drain(ctx)
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 1, mailDropped: 2})
	if !strings.Contains(logged.logged(), "count=2") {
		t.Errorf("the log is\n%s", logged.logged())
	}
	if err := m.enqueue(notice()); err != errMailQueueFull {
		t.Errorf("after the shutdown: %v", err)
	}
}

// TestMailDrainTries checks that at a shutdown a mail is tried at once, and then dropped.
func TestMailDrainTries(t *testing.T) {
	address, accepted := silentServer(t)
	m, _ := startMailer(t, address, patient)
	accept(t, m, notice())
	next(t, accepted).Close()
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 1})
	drained := make(chan struct{})
	go func() {
		m.drain(t.Context())
		close(drained)
	}()
	next(t, accepted).Close() // the second try
	<-drained
	wantOutcomes(t, m, map[mailOutcome]uint64{mailRetried: 1, mailDropped: 1})
}

// SMTP

// TestSMTPError checks that nothing of a reply but its codes gets into the log, since its text may
// contain the address, and which replies are for good.
func TestSMTPError(t *testing.T) {
	for _, test := range []struct {
		err   error
		text  string
		final bool
	}{
		{&textproto.Error{Code: 550, Msg: "5.1.1 <a@b.example>: no such user"},
			"not to be tried again: RCPT: 550 5.1.1", true},
		{&textproto.Error{Code: 421, Msg: "a@b.example is busy"}, "RCPT: 421", false},
		{&textproto.Error{Code: 451, Msg: "4.7.1 Greylisted\na@b.example"},
			"RCPT: 451 4.7.1", false},
		{textproto.ProtocolError("short response: a@b.example"),
			"RCPT: the reply is not SMTP", false},
		{io.ErrUnexpectedEOF, "RCPT: unexpected EOF", false},
	} {
		got := refusal("RCPT", test.err)
		if got.Error() != test.text || isFinal(got) != test.final {
			t.Errorf("%v becomes %v, final: %v", test.err, got, isFinal(got))
		}
	}
	if refusal("RCPT", nil) != nil {
		t.Error("no error becomes one")
	}
}

func TestSMTPLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost":             true,
		"127.0.0.1":             true,
		"127.8.8.8":             true,
		"::1":                   true,
		"0.0.0.0":               false,
		"localhost.example.com": false,
		"127.0.0.1.example.com": false,
		"mail.example.com":      false,
		"10.0.0.1":              false,
	} {
		if got := (smtpServer{host: host}).isLoopback(); got != want {
			t.Errorf("%s is loopback: %v", host, got)
		}
	}
}

// TestPlainAddress checks which addresses a mail can be sent to.
func TestPlainAddress(t *testing.T) {
	for address, want := range map[string]bool{
		"a@b.example":                     true,
		"o'neil+tag/x=y@b.example":        true,
		"jürgen@exämple.de":               true,
		"a@localhost":                     true,
		"":                                false,
		"a":                               false,
		"a@":                              false,
		"@b.example":                      false,
		"a@b@c.example":                   false,
		"a b@c.example":                   false,
		`"a b"@c.example`:                 false,
		`"a@x"@c.example`:                 false,
		"<a@b.example>":                   false,
		"A <a@b.example>":                 false,
		"a@b.example, c@d.example":        false,
		"a@[127.0.0.1]":                   false,
		"a@b.example\r\nBcc: c@d.example": false,
		"a\r\n@b.example":                 false,
		"a@b.example\n":                   false,
		"a\x00@b.example":                 false,
		"a\u200b@b.example":               false,
		"a\u3164@b.example":               false,
		"a\ufe0f@b.example":               false,
		"a\ufffd@b.example":               false,
		"a@b.example>":                    false,
		"a@b_c.example":                   true,
		"a@b/c.example":                   false,
		"a@%":                             false,
		"a@b..example":                    false,
	} {
		if got := isPlainAddress(address); got != want {
			t.Errorf("%q is plain: %v", address, got)
		}
	}
}

func TestSMTPAuth(t *testing.T) {
	a := &smtpAuth{answers: []string{"user", "password"}}
	for _, want := range []string{"user", "password"} {
		if got, err := a.Next(nil, true); string(got) != want || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	if _, err := a.Next(nil, true); err == nil || errors.Is(err, errMailFinal) {
		t.Errorf("a third question: %v", err)
	}
}

// Races

// TestLinkTwiceAtOnce opens a link to change an address several times at once. It works for all of
// them, as it does one after the other, and the old address is told once.
func TestLinkTwiceAtOnce(t *testing.T) {
	s := start(t, nil)
	for range rounds {
		c := signedUp(s)
		body := object{"newEmail": "new-" + c.email, "password": c.password}
		want(t, c.do("PUT", "/auth/email", body), 202, "")
		token := c.loggedToken(mailChange)
		answers := together(4, func(int) response {
			return c.do("POST", "/auth/email/verify", object{"token": token})
		})
		wantOnly(t, answers, "200")
		line := "kind=email_changed outcome=sent userId=" + c.claims().UserID
		eventually(t, "the old address is told", func() bool {
			return strings.Contains(s.logged(), line)
		})
		if n := strings.Count(s.logged(), line); n != 1 {
			t.Errorf("the old address is told %d times", n)
		}
	}
}

// loggedToken waits for a mail of this kind to the client, and returns the token of its link.
func (c *client) loggedToken(kind mailKind) string {
	c.t.Helper()
	form := regexp.MustCompile(
		`kind=` + string(kind) + ` to=\S*` + regexp.QuoteMeta(c.email) + ` .* link="\S+#token=(\S+)"`)
	var match []string
	eventually(c.t, "the mail is logged", func() bool {
		match = form.FindStringSubmatch(c.s.logged())
		return match != nil
	})
	return match[1]
}
