package chaos

// mail_test.go gets at the links in mails, and takes the mail server away.

import (
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	// mailTail is how much of the end of a log is searched for a mail that was just asked for.
	mailTail = 256 << 10

	// mailLimit is how long a mail may take until it is in the log. If PostgreSQL is away at the
	// first try, the next one is 10 s later. A busy machine may add as much.
	mailLimit = 20 * time.Second

	// mailQueue is how many mails the server lets wait for the mail server.
	mailQueue = 1000

	// mailDropped is the series that counts the mails that the server has given up.
	mailDropped = `latchkey_mail_total{outcome="dropped"}`
)

// droppedAtOnce is the line about the mails for which there was no time at all.
var droppedAtOnce = regexp.MustCompile(
	`msg="mails dropped, because the server shuts down" count=(\d+)`)

// mailedToken is the token in the last mail of a kind to an address. The server has no SMTP_URL, so
// it writes its mails to its log. If there is no mail in time, the token is empty.
func (s *server) mailedToken(kind, to string) string {
	mail := regexp.MustCompile(
		`(?m) kind=` + kind + ` to=` + regexp.QuoteMeta(to) + ` .*#token=([\w.-]+)"$`)
	for deadline := time.Now().Add(mailLimit); time.Now().Before(deadline); {
		found := mail.FindAllStringSubmatch(s.outputTail(mailTail), -1)
		if len(found) > 0 {
			return found[len(found)-1][1]
		}
		time.Sleep(10 * time.Millisecond)
	}
	return ""
}

// outputTail is the end of what the process has written so far.
func (p *process) outputTail(size int64) string {
	file, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.Size() > size {
		file.Seek(-size, io.SeekEnd)
	}
	text, _ := io.ReadAll(file)
	return string(text)
}

// askForLink asks for a mail to an address and returns the token of its link. It asks the replica
// that logs its mails.
func askForLink(t *testing.T, u *user, kind, to string, ask func(*user) answer) string {
	t.Helper()
	asking := u.copy().at(u.server.mailLogger)
	if a := ask(asking); !a.ok() {
		t.Fatalf("asking for a mail: %v", a)
	}
	token := asking.server.mailedToken(kind, to)
	if token == "" {
		t.Fatalf("no mail of the kind %s within %v", kind, mailLimit)
	}
	return token
}

// mailFaults are the ways in which a mail server may be broken. Each gets the listener that the
// server sends its mails to.
var mailFaults = []struct {
	name   string
	short  bool // it is also tried with -short
	breaks func(net.Listener)
}{
	{"refused", true, func(l net.Listener) { l.Close() }},
	{"silent", true, func(l net.Listener) { acceptAll(l, func(net.Conn) {}) }},
	{"cut", false, func(l net.Listener) { acceptAll(l, func(conn net.Conn) { conn.Close() }) }},
	{"busy", false, func(l net.Listener) {
		acceptAll(l, func(conn net.Conn) { io.WriteString(conn, "421 4.3.2 Try again later\r\n") })
	}},
}

// acceptAll accepts connections until the listener is closed, and keeps them open.
func acceptAll(l net.Listener, serve func(net.Conn)) {
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close() // when the listener is closed
			serve(conn)
		}
	}()
}

// TestMailServer breaks the mail server in every way. No route's answer changes, not even when more
// mails wait than the queue takes. At SIGTERM the server ends in time, and tells what it drops.
func TestMailServer(t *testing.T) {
	for _, f := range mailFaults {
		if testing.Short() && !f.short {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			f.breaks(listener)
			env := vars{
				"DATABASE_URL": startPostgres(t).url,
				"REDIS_URL":    startRedis(t).url,
			}
			logger := startServer(t, env)
			env["SMTP_URL"] = fmt.Sprintf("smtp://%s", listener.Addr())
			env["MAIL_FROM"] = "latchkey@example.com"
			s := startServer(t, env)
			s.mailLogger = logger

			askWithoutMail(t, s, "with an empty queue")
			fillMailQueue(t, s)
			askWithoutMail(t, s, "with a full queue")
			checkMailsGivenUp(t, s)
		})
	}
}

// askWithoutMail asks every route of a server whose mail server is broken.
func askWithoutMail(t *testing.T, s *server, when string) {
	t.Helper()
	for name, answers := range askAll(prepareRoutes(t, s, 1)) {
		if a := answers[0]; !a.ok() || a.took > answerMargin {
			t.Errorf("%s, %s: %v, want a success within %v", when, name, a, answerMargin)
		}
	}
}

// fillMailQueue signs users up until the server drops the mail to one of them.
func fillMailQueue(t *testing.T, s *server) {
	t.Helper()
	for n := 0; s.metrics()[mailDropped] == 0; n++ {
		if n > 2*mailQueue {
			t.Fatalf("after %d signups no mail was dropped", n)
		}
		signedUp(t, s)
	}
}

// checkMailsGivenUp ends a server while mails wait. The log must tell of each: those that have had
// their last try meanwhile have failed, and the others are dropped.
func checkMailsGivenUp(t *testing.T, s *server) {
	t.Helper()
	before := s.quietMetrics()[mailDropped]
	s.http.CloseIdleConnections() // the server would wait for one that has sent no request yet
	began := time.Now()
	if err := s.terminate(); err != nil {
		t.Errorf("with a full queue, the server ends with %v", err)
	}
	const limit = 2*time.Second + endLimit // SHUTDOWN_TIMEOUT, and what comes at once
	if took := time.Since(began); took > limit {
		t.Errorf("with a full queue, the server ends after %v, want %v", took, limit)
	}
	log := s.output()
	givenUp := strings.Count(log, "outcome=dropped") - int(before)
	givenUp += strings.Count(log, "outcome=failed")
	if found := droppedAtOnce.FindStringSubmatch(log); found != nil {
		together, _ := strconv.Atoi(found[1])
		givenUp += together
	}
	if givenUp < mailQueue {
		t.Errorf("with a full queue, the log tells of %d mails that are not sent, of %d",
			givenUp, mailQueue)
	}
}

// TestMailAfterOutage asks for a reset while PostgreSQL is away. The mail comes when PostgreSQL is
// back, and its link works.
func TestMailAfterOutage(t *testing.T) {
	pg := startPostgres(t)
	s := startServer(t, vars{"DATABASE_URL": pg.url, "REDIS_URL": startRedis(t).url})
	u := signedUp(t, s)
	pg.kill()
	if a := u.forgot(); !a.ok() {
		t.Errorf("forgot without PostgreSQL: %v", a)
	}
	eventually(t, startLimit, "the first try has failed", func() bool {
		return s.metrics()[`latchkey_mail_total{outcome="retried"}`] == 1
	})
	pg.restart()
	if a := u.reset(s.mailedToken("reset", u.email)); !a.ok() {
		t.Fatalf("reset: %v", a)
	}
	if a := u.me(); a.code != "session_revoked" {
		t.Errorf("me after the reset: %v", a)
	}
	if a := u.login(); !a.ok() {
		t.Errorf("login with the new password: %v", a)
	}
}
