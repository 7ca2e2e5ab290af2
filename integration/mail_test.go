package integration

// mail_test.go sends mails through Debian's Postfix, which runs on a port of 127.0.0.1 for the time
// of a test, with a configuration, a queue and a mailbox of its own.

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

// mainCf is Postfix's configuration. It takes mail over TLS only, and delivers what is for
// example.com to one Maildir, whoever it is for.
const mainCf = `compatibility_level = 3.6
queue_directory = DIR/queue
data_directory = DIR/data
maillog_file_prefixes = DIR
maillog_file = DIR/log
myhostname = localhost
mydestination =
alias_maps =
inet_interfaces = 127.0.0.1
strict_smtputf8 = yes
smtpd_tls_security_level = encrypt
smtpd_tls_cert_file = DIR/cert.pem
smtpd_tls_key_file = DIR/key.pem
smtpd_relay_restrictions = reject_unauth_destination
virtual_mailbox_domains = example.com
virtual_mailbox_base = DIR/mail
virtual_mailbox_maps = static:inbox/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
`

// masterCf are the parts of Postfix that this takes.
const masterCf = `127.0.0.1:PORT inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
proxymap unix - - n - - proxymap
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
`

// A postfix is a running Postfix, and what was read from its mailbox.
type postfix struct {
	dir  string
	port string
	ca   string // the file with the certificate of whoever has signed its own
	read map[string]bool
}

// startPostfix starts a Postfix and stops it when the test ends.
func startPostfix(t *testing.T) *postfix {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("Postfix can be started by root only")
	}
	program, err := exec.LookPath("postfix")
	if errors.Is(err, exec.ErrNotFound) {
		program, err = exec.LookPath("/usr/sbin/postfix")
	}
	if err != nil {
		t.Skip("there is no Postfix here: scripts/install-service postfix installs it")
	}
	p := &postfix{port: freePort(t), read: map[string]bool{}}
	p.prepare(t)
	t.Cleanup(func() {
		if log, err := os.ReadFile(p.file("log")); err == nil && t.Failed() {
			t.Logf("Postfix: %s", tail(string(log), 30))
		}
	})

	// This makes the folders in the queue.
	if out, err := exec.Command(program, "-c", p.file("conf"), "check").CombinedOutput(); err != nil {
		t.Fatalf("postfix check: %v\n%s", err, out)
	}
	daemons, err := exec.Command(filepath.Join(filepath.Dir(program), "postconf"),
		"-d", "-h", "daemon_directory").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The group is what it stops when it is stopped itself.
	master := exec.Command(filepath.Join(strings.TrimSpace(string(daemons)), "master"),
		"-c", p.file("conf"), "-d")
	master.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		master.Process.Signal(syscall.SIGTERM)
		master.Wait() // it ends by the signal
	})
	eventually(t, 30*time.Second, "Postfix listens", func() bool {
		conn, err := net.Dial("tcp", "127.0.0.1:"+p.port)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return p
}

// prepare makes the folder with all that Postfix needs. It is not in t.TempDir, which is closed to
// Postfix's own users.
func (p *postfix) prepare(t *testing.T) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	p.dir, err = os.MkdirTemp("/tmp", "latchkey-postfix-")
	must(err)
	t.Cleanup(func() { os.RemoveAll(p.dir) })
	must(os.Chmod(p.dir, 0o711))
	must(os.Mkdir(p.file("conf"), 0o755))
	must(os.Mkdir(p.file("queue"), 0o755))
	must(os.Mkdir(p.file("mail"), 0o700))
	must(os.Chown(p.file("mail"), 65534, 65534)) // as mainCf says

	p.ca = p.file("ca.pem")
	values := strings.NewReplacer("DIR", p.dir, "PORT", p.port)
	files := certificates(t)
	files["conf/main.cf"] = []byte(values.Replace(mainCf))
	files["conf/master.cf"] = []byte(values.Replace(masterCf))
	for name, content := range files {
		must(os.WriteFile(p.file(name), content, 0o644))
	}
}

func (p *postfix) file(name string) string { return filepath.Join(p.dir, name) }

// certificates makes a CA and a certificate for localhost that it has signed, by their file names.
func certificates(t *testing.T) map[string][]byte {
	t.Helper()
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "a CA of the tests"},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	localhost := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		DNSNames:     []string{"localhost"},
		NotAfter:     ca.NotAfter,
	}
	caKey, caErr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, keyErr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(caErr, keyErr); err != nil {
		t.Fatal(err)
	}
	caDER, caErr := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	certDER, certErr := x509.CreateCertificate(rand.Reader, localhost, ca, key.Public(), caKey)
	keyDER, keyErr := x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(caErr, certErr, keyErr); err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	return map[string][]byte{
		"ca.pem":   encode("CERTIFICATE", caDER),
		"cert.pem": encode("CERTIFICATE", certDER),
		"key.pem":  encode("PRIVATE KEY", keyDER),
	}
}

// await waits for a mail to an address that was not read yet.
func (p *postfix) await(t *testing.T, to string) *mail.Message {
	t.Helper()
	var found *mail.Message
	eventually(t, 30*time.Second, "a mail to "+to, func() bool {
		files, _ := filepath.Glob(p.file("mail/inbox/new/*"))
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			message, err := mail.ReadMessage(bytes.NewReader(text))
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if !p.read[file] && message.Header.Get("Delivered-To") == to {
				p.read[file] = true
				found = message
			}
		}
		return found != nil
	})
	return found
}

// TestPostfix verifies an address and resets a password by links that have gone through Postfix.
// The second address takes a mail server that offers SMTPUTF8.
func TestPostfix(t *testing.T) {
	t.Parallel()
	p := startPostfix(t)
	api := serve(t, vars{
		"SMTP_URL":      "smtp://localhost:" + p.port,
		"MAIL_FROM":     sender.String(),
		"SSL_CERT_FILE": p.ca,
	})
	for _, email := range []string{"ada@example.com", "jörg@example.com"} {
		u := newUser(t, api)
		u.credentials["email"] = email
		u.must("POST", "/auth/signup", u.credentials)
		verify := map[string]string{"token": tokenIn(t, p.await(t, email), email, "/verify-email")}
		u.must("POST", "/auth/email/verify", verify)

		u.must("POST", "/auth/password/forgot", map[string]string{"email": email})
		u.credentials["password"] = rand.Text()
		reset := map[string]string{
			"token":       tokenIn(t, p.await(t, email), email, "/reset-password"),
			"newPassword": u.credentials["password"],
		}
		u.must("POST", "/auth/password/reset", reset)
		if r := u.send("GET", "/auth/me", nil); r.body.Code != "session_revoked" {
			t.Errorf("%s: the session after the reset: %d %s", email, r.status, r.body.Code)
		}
		u.login().lives()
		if r := u.send("POST", "/auth/password/reset", reset); r.body.Code != "invalid_link" {
			t.Errorf("%s: the same link again: %d %s", email, r.status, r.body.Code)
		}
		notice := bodyOf(t, p.await(t, email), email)
		if !strings.Contains(notice, "password") || strings.Contains(notice, "token=") {
			t.Errorf("%s: the notice is\n%s", email, notice)
		}
	}
}

// sender is the MAIL_FROM, with a name that is not in ASCII.
var sender = mail.Address{Name: "Die Bücher", Address: "auth@example.com"}

// tokenIn returns the token of the only link in a mail.
func tokenIn(t *testing.T, m *mail.Message, to, page string) string {
	t.Helper()
	body := bodyOf(t, m, to)
	links := regexp.MustCompile(`(\S+)#token=(\S+)`).FindAllStringSubmatch(body, -1)
	if len(links) != 1 || links[0][1] != "http://localhost:5173"+page {
		t.Fatalf("%s: the links are %q", to, links)
	}
	return links[0][2]
}

// bodyOf checks the header of a mail and returns its text.
func bodyOf(t *testing.T, m *mail.Message, to string) string {
	t.Helper()
	protocol := "ESMTPS"
	if strings.ContainsFunc(to, func(r rune) bool { return r > unicode.MaxASCII }) {
		protocol = "UTF8SMTPS" // only where an address needs it
	}
	for name, want := range map[string]string{
		"From":                      `^=\?utf-8\?q\?Die_B=C3=BCcher\?= <auth@example\.com>$`,
		"To":                        `^<` + regexp.QuoteMeta(to) + `>$`,
		"Subject":                   `^[A-Z][a-z ]+ at localhost:5173( was changed)?$`,
		"Message-Id":                `^<\w+@example\.com>$`,
		"Auto-Submitted":            `^auto-generated$`,
		"Mime-Version":              `^1\.0$`,
		"Content-Type":              `^text/plain; charset=utf-8$`,
		"Content-Transfer-Encoding": `^quoted-printable$`,
		"Return-Path":               `^<auth@example\.com>$`,
		"Received":                  ` with ` + protocol + ` id `,
	} {
		got := m.Header[name]
		if len(got) != 1 || !regexp.MustCompile(want).MatchString(got[0]) {
			t.Errorf("%s: the header has %s %q, want %s", to, name, got, want)
		}
	}
	sent, err := m.Header.Date()
	if err != nil || time.Since(sent).Abs() > time.Minute {
		t.Errorf("%s: the header has Date %v (%v)", to, sent, err)
	}
	text, err := io.ReadAll(quotedprintable.NewReader(m.Body))
	if err != nil {
		t.Fatalf("%s: %v", to, err)
	}
	return string(text)
}
