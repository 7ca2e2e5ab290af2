package contract

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

const (
	mailSender = `"Lätchkey, die Anmeldung für alle, die keine eigene bauen mögen, und ` +
		`ihre Leute" <noreply@mail.promise.test>`
	smtpUser     = "mailer@promise.test"
	smtpPassword = "smtp-pass:/@?#%word"
)

// A mailServer is an SMTP server that keeps the mails it is sent. What it offers is set before it
// serves.
type mailServer struct {
	certificate *tls.Certificate // nil: no TLS
	implicitTLS bool             // TLS at once, not by STARTTLS
	mechanisms  []string         // of AUTH, without which it takes no mails if there are any
	ascii       bool             // no SMTPUTF8
	port        string           // of 127.0.0.1; at first empty for any

	// answer is asked at EHLO, AUTH, MAIL, RCPT and DATA, at the last two with the recipient. It
	// may refuse with an *smtp.SMTPError, return errCut at DATA, or wait.
	answer func(command, to string) error

	smtp     *smtp.Server
	mutex    sync.Mutex
	messages []*message    // that no test has taken yet
	refused  []*message    // see turnedAway
	changed  chan struct{} // closed when a message arrives
	commands []string      // all that it was told, as "RCPT ada@example.com"
}

// errCut lets the mail server close the connection in the middle of DATA.
var errCut = errors.New("the connection is cut")

// refusal is an answer of a mail server, in whose text are things that no log may show.
func refusal(code int) error {
	return &smtp.SMTPError{
		Code:         code,
		EnhancedCode: smtp.EnhancedCode{code / 100, 7, 1},
		Message:      "not for somebody" + emailMark,
	}
}

// sharedMailServer takes the mails of all servers that have no other. It ends with the process.
var sharedMailServer = sync.OnceValue(func() *mailServer {
	m := &mailServer{}
	if err := m.serve(); err != nil {
		panic(err)
	}
	return m
})

// startMailServer starts a mail server that ends with the test.
func (s *server) startMailServer(m *mailServer) *mailServer {
	if err := m.serve(); err != nil {
		s.Fatalf("%v", err)
	}
	s.Cleanup(func() { m.smtp.Close() })
	return m
}

func (m *mailServer) serve() error {
	m.changed = make(chan struct{})
	m.smtp = smtp.NewServer(m)
	m.smtp.Domain = "mail.promise.test"
	m.smtp.AllowInsecureAuth = true // a client must not use it, which is what is tested
	m.smtp.EnableSMTPUTF8 = !m.ascii
	m.smtp.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up are what is tested
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", m.port))
	if err != nil {
		return err
	}
	_, m.port, _ = net.SplitHostPort(listener.Addr().String())
	if m.certificate != nil {
		config := &tls.Config{Certificates: []tls.Certificate{*m.certificate}}
		if m.implicitTLS {
			listener = tls.NewListener(listener, config)
		} else {
			m.smtp.TLSConfig = config
		}
	}
	go m.smtp.Serve(listener)
	return nil
}

// url is an SMTP_URL of the server, with the scheme and the host given.
func (m *mailServer) url(scheme, host string) string {
	u := url.URL{Scheme: scheme, Host: net.JoinHostPort(host, m.port)}
	if len(m.mechanisms) > 0 {
		u.User = url.UserPassword(smtpUser, smtpPassword)
	}
	return u.String()
}

// meet notes a command, and asks what is to be answered.
func (m *mailServer) meet(command, to string) error {
	m.mutex.Lock()
	m.commands = append(m.commands, strings.TrimSpace(command+" "+to))
	answer := m.answer
	m.mutex.Unlock()
	if answer == nil {
		return nil
	}
	return answer(command, to)
}

// setAnswer changes how the mail server answers, while it serves.
func (m *mailServer) setAnswer(answer func(command, to string) error) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.answer = answer
}

// heard are the commands so far.
func (m *mailServer) heard() []string {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Clone(m.commands)
}

func (m *mailServer) keep(kept message, accepted bool) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if accepted {
		m.messages = append(m.messages, &kept)
	} else {
		m.refused = append(m.refused, &kept)
	}
	close(m.changed)
	m.changed = make(chan struct{})
}

// take removes the first message with this recipient and purpose. It also returns what is closed
// when another message arrives.
func (m *mailServer) take(to, purpose string) (*message, <-chan struct{}) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	i := slices.IndexFunc(m.messages, func(x *message) bool {
		return x.to == to && x.purpose() == purpose
	})
	if i < 0 {
		return nil, m.changed
	}
	taken := m.messages[i]
	m.messages = slices.Delete(m.messages, i, i+1)
	return taken, nil
}

// left are the messages that nobody has taken, to all recipients or to one.
func (m *mailServer) left(to ...string) []*message {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.DeleteFunc(slices.Clone(m.messages), func(x *message) bool {
		return len(to) > 0 && !slices.Contains(to, x.to)
	})
}

// turnedAway are the messages that were read and not accepted.
func (m *mailServer) turnedAway() []*message {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return slices.Clone(m.refused)
}

// NewSession makes the server a backend of go-smtp.
func (m *mailServer) NewSession(c *smtp.Conn) (smtp.Session, error) {
	return &mailSession{mailServer: m, conn: c}, m.meet("EHLO", "")
}

// A mailSession is a connection of a client.
type mailSession struct {
	*mailServer
	conn     *smtp.Conn
	loggedIn bool
	message  message // the one that is on its way
}

func (m *mailSession) AuthMechanisms() []string { return m.mechanisms }

func (m *mailSession) Auth(mechanism string) (sasl.Server, error) {
	if !slices.Contains(m.mechanisms, mechanism) {
		return nil, smtp.ErrAuthUnknownMechanism
	}
	check := func(user, password string) error {
		if err := m.meet("AUTH", mechanism); err != nil {
			return err
		}
		if user != smtpUser || password != smtpPassword {
			return smtp.ErrAuthFailed
		}
		m.loggedIn = true
		return nil
	}
	if mechanism == sasl.Login {
		return &saslLogin{check: check}, nil
	}
	return sasl.NewPlainServer(func(_, user, password string) error {
		return check(user, password)
	}), nil
}

func (m *mailSession) Mail(from string, options *smtp.MailOptions) error {
	if len(m.mechanisms) > 0 && !m.loggedIn {
		return smtp.ErrAuthRequired
	}
	_, secure := m.conn.TLSConnectionState()
	m.message = message{
		from:   from,
		helo:   m.conn.Hostname(),
		utf8:   options.UTF8,
		secure: secure,
	}
	return m.meet("MAIL", from)
}

func (m *mailSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	if m.message.to != "" {
		return errors.New("a second recipient")
	}
	m.message.to = to
	return m.meet("RCPT", to)
}

func (m *mailSession) Data(r io.Reader) error {
	answer := m.meet("DATA", m.message.to)
	if errors.Is(answer, errCut) {
		io.CopyN(io.Discard, r, 100)
		m.conn.Conn().Close()
		return errCut
	}
	raw, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	m.message.read(raw)
	m.keep(m.message, answer == nil)
	return answer
}

func (m *mailSession) Reset() { m.message = message{} }

func (m *mailSession) Logout() error { return nil }

// saslLogin is the server's side of AUTH LOGIN, which go-sasl does not have.
type saslLogin struct {
	check func(user, password string) error
	asked bool // for the password
	user  string
}

func (l *saslLogin) Next(response []byte) (challenge []byte, done bool, err error) {
	switch {
	case l.asked:
		return nil, true, l.check(l.user, string(response))
	case response == nil:
		return []byte("Username:"), false, nil
	}
	l.user = string(response)
	l.asked = true
	return []byte("Password:"), false, nil
}

// An authority is a certificate authority that only those trust who are told to.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

var testAuthority = sync.OnceValue(func() *authority {
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "the tests' authority"},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	a := &authority{}
	a.key, a.certificate = a.sign(template)
	return a
})

// sign makes a key and its certificate, which without a certificate of its own the authority's is.
func (a *authority) sign(template *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Hour)
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		panic(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return key, certificate
}

// certificateOf is a server's certificate for these names and addresses.
func (a *authority) certificateOf(hosts ...string) *tls.Certificate {
	return a.certificateUntil(time.Now().Add(time.Hour), hosts...)
}

func (a *authority) certificateUntil(until time.Time, hosts ...string) *tls.Certificate {
	template := &x509.Certificate{
		NotAfter:    until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	key, certificate := a.sign(template)
	return &tls.Certificate{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}
}

// trusted is the environment of a server that trusts the tests' authority and no other.
func trusted(t *testing.T) env {
	file := filepath.Join(t.TempDir(), "authority.pem")
	der := testAuthority().certificate.Raw
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return env{"SSL_CERT_FILE": file}
}
