package contract

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/quotedprintable"
	"net/mail"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// A message is a mail as it has arrived.
type message struct {
	from   string // of the envelope, as is to
	to     string
	helo   string // what the client has called itself
	utf8   bool   // SMTPUTF8 was asked for
	secure bool   // it came over TLS
	raw    string
	header mail.Header
	text   string // the decoded body
	err    error  // what made it unreadable
}

func (m *message) read(raw []byte) {
	m.raw = string(raw)
	parsed, err := mail.ReadMessage(bytes.NewReader(raw))
	if err != nil {
		m.err = err
		return
	}
	m.header = parsed.Header
	text, err := io.ReadAll(quotedprintable.NewReader(parsed.Body))
	m.text = strings.ReplaceAll(string(text), "\r\n", "\n")
	m.err = err
}

var linkForm = regexp.MustCompile(`(\S+)#token=(\S+)`)

// link is the one link of the message, and the token in it. A notice has none.
func (m *message) link() (page, token string) {
	links := linkForm.FindAllStringSubmatch(m.text, -1)
	if len(links) != 1 {
		return "", ""
	}
	return links[0][1], links[0][2]
}

func (m *message) token() string {
	_, token := m.link()
	return token
}

// The purposes of messages, as their links have them.
const (
	toReset  = "reset"
	toVerify = "verify"
	toChange = "change"
	aNotice  = "" // of a changed password or address
)

func (m *message) purpose() string {
	token := m.token()
	if token == "" {
		return aNotice
	}
	purpose, _ := statementOf(token)["purpose"].(string)
	return purpose
}

// A statement is what a link's token says.
type statement map[string]any

func statementOf(token string) statement {
	first, _, _ := strings.Cut(token, ".")
	text, _ := base64.RawURLEncoding.DecodeString(first)
	said := statement{}
	json.Unmarshal(text, &said)
	return said
}

// with is the statement with other members; nil removes one.
func (st statement) with(other statement) statement {
	changed := maps.Clone(st)
	maps.Copy(changed, other)
	maps.DeleteFunc(changed, func(_ string, value any) bool { return value == nil })
	return changed
}

// token is the statement as a token whose links are signed under this JWT_REFRESH_SECRET.
func (st statement) token(secret string) string {
	if exp, ok := st["exp"].(float64); ok {
		st = st.with(statement{"exp": int64(exp)})
	}
	text, _ := json.Marshal(st)
	return signed(linkKey(secret), base64url(string(text)))
}

// linkKey is the key of links that is derived from a secret.
func linkKey(secret string) string {
	key, err := hkdf.Key(sha256.New, []byte(secret), nil, "latchkey links", 32)
	if err != nil {
		panic(err)
	}
	return string(key)
}

// relinked is a genuine link token that says something else, signed by who holds the secret.
func (s *server) relinked(token string, other statement) string {
	return statementOf(token).with(other).token(s.conf("JWT_REFRESH_SECRET"))
}

// mailTo waits for the next message of this purpose to an address, and takes it. Whatever the test
// is about, the message is held to what the contract says of all messages.
func (s *server) mailTo(to, purpose string) *message {
	timeout := time.After(20 * time.Second) // a second try comes after 5 s
	for {
		m, changed := s.mails.take(to, purpose)
		if m != nil {
			s.assertMessage(m)
			return m
		}
		select {
		case <-changed:
		case <-timeout:
			s.Fatalf("no message %q has come to %s", purpose, to)
		}
	}
}

// assertNoMail ends the server, which first sends what waits, and asserts that there is nothing
// more for these recipients.
func (s *server) assertNoMail(to ...string) {
	if err := s.stop(); err != nil {
		s.Errorf("the server ended with %v", err)
	}
	for _, m := range s.mails.left(to...) {
		s.Errorf("a message %q has come to %s", m.purpose(), m.to)
	}
}

// The fields of every message, each once.
const headerFields = "Auto-Submitted Content-Transfer-Encoding Content-Type Date From " +
	"Message-Id Mime-Version Subject To"

var messageIDs sync.Map // that were seen

func (s *server) assertMessage(m *message) {
	expect := func(holds bool, format string, args ...any) {
		s.expect(holds, "the message to %s: %s\n%s", m.to, fmt.Sprintf(format, args...), m.raw)
	}
	expect(m.err == nil, "%v", m.err)
	fields := slices.Sorted(maps.Keys(m.header))
	expect(strings.Join(fields, " ") == headerFields, "its fields are %q", fields)
	for name, values := range m.header {
		expect(len(values) == 1, "%s is %q", name, values)
	}
	want, err := mail.ParseAddress(s.conf("MAIL_FROM"))
	if err != nil {
		s.Fatalf("MAIL_FROM: %v", err)
	}
	from, err := m.header.AddressList("From")
	expect(err == nil && len(from) == 1 && *from[0] == *want && m.from == want.Address,
		"it comes from %v (%v) and %s, not %v", from, err, m.from, want)
	to, err := m.header.AddressList("To")
	expect(err == nil && len(to) == 1 && *to[0] == mail.Address{Address: m.to},
		"it goes to %v (%v)", to, err)
	date, err := m.header.Date()
	expect(err == nil && time.Since(date).Abs() <= 2*time.Minute, "Date is %v (%v)", date, err)
	_, domain, _ := strings.Cut(want.Address, "@")
	id := m.header.Get("Message-Id")
	_, seen := messageIDs.LoadOrStore(id, true)
	form := regexp.MustCompile(`^<[^@<>\s]{16,}@` + regexp.QuoteMeta(domain) + `>$`)
	expect(form.MatchString(id) && !seen, "Message-ID is %q, seen before: %v", id, seen)
	expect(m.header.Get("Auto-Submitted") == "auto-generated", "it is not auto-generated")
	s.assertText(m, expect)
}

// assertText asserts that the message is plain text in UTF-8, and that its lines are as SMTP has
// them: they end with CRLF and are short, unless an address is longer than that.
func (s *server) assertText(m *message, expect func(holds bool, format string, args ...any)) {
	kind, parameters, err := mime.ParseMediaType(m.header.Get("Content-Type"))
	expect(err == nil && kind == "text/plain" && strings.EqualFold(parameters["charset"], "utf-8"),
		"Content-Type is %s %v (%v)", kind, parameters, err)
	expect(m.header.Get("Content-Transfer-Encoding") == "quoted-printable" &&
		m.header.Get("Mime-Version") == "1.0", "it is not MIME 1.0 in quoted-printable")
	subject, err := new(mime.WordDecoder).DecodeHeader(m.header.Get("Subject"))
	expect(err == nil && subject != "", "Subject is %q (%v)", subject, err)
	expect(utf8.ValidString(m.text) && strings.TrimSpace(m.text) != "", "its text is %q", m.text)
	for _, template := range []string{"{{", "}}", "<no value>", "%!"} {
		expect(!strings.Contains(subject+m.text, template), "it shows %q", template)
	}
	for line := range strings.SplitSeq(m.raw, "\r\n") {
		expect(!strings.ContainsAny(line, "\r\n"), "a line ends without CRLF: %q", line)
		most := 78
		switch {
		case strings.Contains(line, "=?"): // RFC 2047
			most = 76
		case strings.Contains(line, m.to):
			most = 998
		}
		expect(len(line) <= most, "a line has %d bytes, at most %d", len(line), most)
		for _, r := range line {
			expect(r < 0x7f || m.utf8 && strings.Contains(line, m.to), "a line has %q", r)
		}
	}
}
