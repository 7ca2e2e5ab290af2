package main

// mail.go makes the links that users get by mail, and sends the mails: the links' tokens, the texts
// (mail.tmpl), the queue, and SMTP. A server that sends no mails needs only the links.

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"net/netip"
	"net/smtp"
	"net/textproto"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"text/template"
	"time"
	"unicode"
)

// Links

// linkPurpose says what a link is for. It is good for nothing else.
type linkPurpose string

const (
	linkReset         linkPurpose = "reset"          // was mailed to whoever forgot the password
	linkOperatorReset linkPurpose = "operator_reset" // is made by an operator
	linkVerify        linkPurpose = "verify"         // shows that the account's address is right
	linkChange        linkPurpose = "change"         // shows it of the address to change to
)

const (
	// resetLifetime is how long a link to reset a password works. Whoever finds it in a mailbox
	// takes over the account, so it is short.
	resetLifetime = 30 * time.Minute

	// verifyLifetime is how long the other links work.
	verifyLifetime = 24 * time.Hour
)

// errLinkInvalid means that the token of a link does not verify, has expired, or was used.
var errLinkInvalid = errors.New("link is invalid or has expired")

// link is what the token of a link says. It is signed, and stored nowhere. State is that of the
// user (see stateOf), and empty for linkVerify.
type link struct {
	Purpose   linkPurpose `json:"purpose"`
	UserID    string      `json:"userId"`
	Email     string      `json:"email"`
	ExpiresAt int64       `json:"exp"` // Unix seconds
	State     string      `json:"state,omitempty"`
}

// links makes and opens links.
type links struct {
	keys      keys
	resetURL  string // the frontend's pages, which read the token from the fragment
	verifyURL string
}

// linkKeys derives the keys for links from those for refresh tokens (HKDF, RFC 5869), so that no
// token of one kind passes for one of the other.
func linkKeys(refresh keys) keys {
	derived := keys{current: deriveKey(refresh.current)}
	if len(refresh.previous) > 0 {
		derived.previous = deriveKey(refresh.previous)
	}
	return derived
}

func deriveKey(secret []byte) []byte {
	key, err := hkdf.Key(sha256.New, secret, nil, "latchkey links", sha256.Size)
	if err != nil {
		panic(err) // it fails only for keys much longer than this
	}
	return key
}

// stateOf returns a digest of what changes with a user's password and address. A link that is bound
// to it works once, because using it changes the state. The time of the last change is a part of
// it, so a link does not work again after an address was changed there and back.
func stateOf(u user) string {
	return digest(fmt.Sprintf("%s\n%s\n%d", u.PasswordHash, u.Email, u.UpdatedAt.UnixMicro()))
}

// resets reports whether a link with this purpose resets a password.
func (p linkPurpose) resets() bool {
	return p == linkReset || p == linkOperatorReset
}

// lifetime returns how long a link with this purpose works.
func (p linkPurpose) lifetime() time.Duration {
	if p.resets() {
		return resetLifetime
	}
	return verifyLifetime
}

// url returns a link for u, about an address. The token is in the fragment, which browsers send to
// no server, not even as a Referer.
func (l links) url(purpose linkPurpose, u user, email string, now time.Time) string {
	made := link{
		Purpose:   purpose,
		UserID:    u.ID,
		Email:     email,
		ExpiresAt: now.Add(purpose.lifetime()).Unix(),
	}
	if purpose != linkVerify {
		made.State = stateOf(u)
	}
	payload, err := json.Marshal(made)
	if err != nil {
		panic(err) // strings and integers always encode
	}
	page := l.verifyURL
	if purpose.resets() {
		page = l.resetURL
	}
	return page + "#token=" + l.keys.seal(base64url.EncodeToString(payload))
}

// open returns what a token says, if it has one of the purposes. Otherwise it returns
// errLinkInvalid. Whether the state is still the user's is for the caller to check.
func (l links) open(token string, now time.Time, purposes ...linkPurpose) (link, error) {
	payload, err := l.keys.open(token)
	if err != nil {
		return link{}, errLinkInvalid
	}
	data, err := base64url.DecodeString(payload)
	if err != nil {
		return link{}, errLinkInvalid
	}
	var opened link
	if err := json.Unmarshal(data, &opened); err != nil {
		return link{}, errLinkInvalid
	}
	if !slices.Contains(purposes, opened.Purpose) || opened.ExpiresAt <= now.Unix() {
		return link{}, errLinkInvalid
	}
	return opened, nil
}

// Texts

// mailKind is what a mail is about.
type mailKind string

const (
	mailReset           mailKind = "reset"            // a link to choose a new password
	mailVerify          mailKind = "verify"           // a link to verify the address
	mailChange          mailKind = "change"           // the same, to the address to change to
	mailPasswordChanged mailKind = "password_changed" // a notice
	mailEmailChanged    mailKind = "email_changed"    // a notice to the old address
)

var mailKinds = []mailKind{
	mailReset, mailVerify, mailChange, mailPasswordChanged, mailEmailChanged,
}

// linkPurposes has the purposes of the links in mails. Notices have no link.
var linkPurposes = map[mailKind]linkPurpose{
	mailReset:  linkReset,
	mailVerify: linkVerify,
	mailChange: linkChange,
}

// isAsked reports whether such a mail is sent because somebody has asked for it. Notices are not.
func (k mailKind) isAsked() bool {
	return linkPurposes[k] != ""
}

//go:embed mail.tmpl
var mailTemplates string

// mailValues are the values in a mail's text. Somebody who asks for a mail to another address
// cannot add a word to it.
type mailValues struct {
	Site     string // the host of the frontend
	Email    string // the address that the mail goes to
	Link     string // empty in a notice
	Lifetime string // how long the link works, for example "30 minutes"
}

// maxSubjectBytes leaves room for longer values than those of the sample. A line of a mail has at
// most 998 bytes (RFC 5322 section 2.1.1).
const maxSubjectBytes = 500

// mailTexts writes the texts of mails.
type mailTexts struct {
	templates *template.Template
}

// parseMailTexts reads templates such as those of mail.tmpl, and tries each of them.
func parseMailTexts(text string) (mailTexts, error) {
	templates, err := template.New("").Parse(text)
	if err != nil {
		return mailTexts{}, err
	}
	texts := mailTexts{templates}
	for _, kind := range mailKinds {
		sample := mailValues{
			Site:     "app.example.com",
			Email:    "ada@example.com",
			Lifetime: "30 minutes",
		}
		if kind.isAsked() {
			sample.Link = "https://app.example.com/page#token=sample"
		}
		subject, body, err := texts.write(kind, sample)
		switch {
		case err != nil:
			return mailTexts{}, err
		case subject == "" || len(subject) > maxSubjectBytes:
			return mailTexts{}, fmt.Errorf("%s: the subject must have 1 to %d bytes",
				kind, maxSubjectBytes)
		case strings.TrimSpace(body) == "" || !strings.Contains(body, sample.Link):
			return mailTexts{}, fmt.Errorf("%s: the text is empty, or shows no link", kind)
		}
	}
	return texts, nil
}

// write returns the subject and the body of a mail. The subject is one line, whatever is in the
// template and in the values.
func (t mailTexts) write(kind mailKind, values mailValues) (subject, body string, err error) {
	var line, text strings.Builder
	if err := t.templates.ExecuteTemplate(&line, string(kind)+".subject", values); err != nil {
		return "", "", err
	}
	if err := t.templates.ExecuteTemplate(&text, string(kind)+".body", values); err != nil {
		return "", "", err
	}
	return strings.Join(strings.Fields(line.String()), " "), text.String(), nil
}

// lifetimeText returns a lifetime in words.
func lifetimeText(d time.Duration) string {
	if d < time.Hour {
		return strconv.Itoa(int(d.Minutes())) + " minutes"
	}
	return strconv.Itoa(int(d.Hours())) + " hours"
}

// letter is a mail that is ready to be sent. If it is sent again, it has the same id, so a mail
// system that compares ids delivers it once.
type letter struct {
	ID        string
	Date      time.Time
	RequestID string // of the request that caused it
	Kind      mailKind
	To        string
	Subject   string
	Body      string
	Link      string
}

// encode returns the letter as a message in the format of RFC 5322.
func (l letter) encode(from mail.Address) []byte {
	_, domain, _ := strings.Cut(from.Address, "@")
	to := mail.Address{Address: l.To}
	var b bytes.Buffer
	header := func(name, value string) {
		if strings.Contains(value, "=?") {
			// A line with an encoded word has at most 76 characters (RFC 2047 section 2).
			fold := strings.NewReplacer("?= =?", "?=\r\n =?", "?= <", "?=\r\n <")
			value = "\r\n " + fold.Replace(value)
		}
		fmt.Fprintf(&b, "%s: %s\r\n", name, value)
	}
	header("From", from.String())
	header("To", to.String())
	header("Subject", mime.QEncoding.Encode("utf-8", l.Subject))
	header("Date", l.Date.UTC().Format(time.RFC1123Z))
	header("Message-ID", "<"+l.ID+"@"+domain+">")
	header("Auto-Submitted", "auto-generated") // so no vacation responder answers (RFC 3834)
	header("MIME-Version", "1.0")
	header("Content-Type", "text/plain; charset=utf-8")
	header("Content-Transfer-Encoding", "quoted-printable")
	b.WriteString("\r\n")
	body := quotedprintable.NewWriter(&b)
	_, _ = io.WriteString(body, l.Body) // a bytes.Buffer takes everything
	_ = body.Close()
	return b.Bytes()
}

// Addresses

// domainForm matches the domain of an address, in any script. It is no IP address in brackets.
var domainForm = regexp.MustCompile(`^[\pL\pM\pN_-]+(\.[\pL\pM\pN_-]+)*$`)

// isPlainAddress reports whether an email is an address and nothing else: no display name, no
// quotes, no spaces, and nothing invisible. Nothing in such an address can end a header or a
// command.
func isPlainAddress(email string) bool {
	parsed, err := mail.ParseAddress(email)
	_, domain, _ := strings.Cut(email, "@")
	return err == nil &&
		parsed.Address == email &&
		domainForm.MatchString(domain) &&
		!strings.ContainsFunc(email, isUnprintable)
}

// isUnprintable reports whether r is a space, a control character, invisible, or the sign for a
// character that was not valid.
func isUnprintable(r rune) bool {
	return unicode.IsSpace(r) ||
		!unicode.IsGraphic(r) ||
		unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) ||
		r == unicode.ReplacementChar
}

func isASCII(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r > unicode.MaxASCII })
}

// The queue

var (
	// errMailQueueFull means that too many mails wait already.
	errMailQueueFull = errors.New("too many mails wait")

	// errMailLimited means that too many mails to this address were asked for.
	errMailLimited = errors.New("too many mails to this address")

	// errMailLate means that a mail has waited so long that it should not be sent any more.
	errMailLate = errors.New("it has waited too long")

	// errMailAborted means that there is no time for another try, because the server shuts down.
	errMailAborted = errors.New("the server shuts down")

	// errMailFinal means that no other try would succeed either.
	errMailFinal = errors.New("not to be tried again")
)

// mailOutcome is what became of a mail, or of a try to send it.
type mailOutcome string

const (
	mailSent    mailOutcome = "sent"    // the mail server has accepted it
	mailRetried mailOutcome = "retried" // a try has failed, and there will be another
	mailFailed  mailOutcome = "failed"  // it will not be sent
	mailLimited mailOutcome = "limited" // it is over the limit of its address
	mailDropped mailOutcome = "dropped" // too many mails wait, or the server shuts down
)

var mailOutcomes = []mailOutcome{mailSent, mailRetried, mailFailed, mailLimited, mailDropped}

// mailRequest asks for a mail.
type mailRequest struct {
	RequestID string
	Kind      mailKind
	User      user   // as it was when it had Address; not known yet for mailReset
	Address   string // where the mail goes; for mailReset the address that somebody has typed
}

// mailUsers is all that this file may do with users.
type mailUsers interface {
	findUserByEmail(ctx context.Context, email string) (user, error)
}

// slots is a number of places. A place is taken by sending to the channel.
type slots chan struct{}

// tryTake takes a place. It reports whether there was one.
func (s slots) tryTake() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

// release gives a place back.
func (s slots) release() {
	<-s
}

// takeAll takes all places for good, as they are given back.
func (s slots) takeAll() {
	for range cap(s) {
		s <- struct{}{}
	}
}

// mailLimits are the bounds of the queues.
type mailLimits struct {
	queue       int             // how many requests may wait, and apart from them how many letters
	senders     int             // how many letters are sent at the same time
	timeout     time.Duration   // of one try
	age         time.Duration   // how old a letter may get
	writePauses []time.Duration // before the second try to write a letter, the third, and so on
	sendPauses  []time.Duration // the same for sending it
}

// mailParts are what a mailer consists of. transport is nil if no mails are sent.
type mailParts struct {
	transport mailTransport
	users     mailUsers
	limiter   *mailLimiter
	links     links
	texts     mailTexts
	site      string // the host of the frontend
	log       *slog.Logger
	limits    mailLimits
}

// mailer sends mails in the background. Each mail has a goroutine, which waits for its turn, so one
// that waits for its next try holds up no other. There are two queues. At first a mail waits with
// other requests for its text, which may take a look at the stores. Then it waits with other
// letters for the mail server. If the mail server is slow, only the second queue fills up.
// Otherwise a full queue would tell which addresses have accounts, since the others are sent
// nothing.
type mailer struct {
	mailParts
	requests slots // places in the first queue
	letters  slots // places in the second queue
	writers  slots // the request whose turn it is
	senders  slots // the letters whose turn it is
	outcomes map[mailOutcome]*atomic.Uint64
	aborted  atomic.Int64    // how many mails a shutdown has cost
	draining chan struct{}   // closed when the server shuts down
	ctx      context.Context // ends when the shutdown waits no longer
	cancel   context.CancelFunc
}

func newMailer(parts mailParts) *mailer {
	ctx, cancel := context.WithCancel(context.Background())
	m := &mailer{
		mailParts: parts,
		requests:  make(slots, parts.limits.queue),
		letters:   make(slots, parts.limits.queue),
		writers:   make(slots, 1),
		senders:   make(slots, parts.limits.senders),
		outcomes:  map[mailOutcome]*atomic.Uint64{},
		draining:  make(chan struct{}),
		ctx:       ctx,
		cancel:    cancel,
	}
	for _, outcome := range mailOutcomes {
		m.outcomes[outcome] = &atomic.Uint64{}
	}
	return m
}

// isOn reports whether mails are sent, or at least logged.
func (m *mailer) isOn() bool {
	return m.transport != nil
}

// check logs a warning if the mail server cannot be used.
func (m *mailer) check() {
	if !m.isOn() {
		return
	}
	ctx, cancel := context.WithTimeout(m.ctx, m.limits.timeout)
	defer cancel()
	if err := m.transport.check(ctx); err != nil && m.ctx.Err() == nil {
		m.log.Warn("no mail can be sent at the moment", "error", err.Error())
	}
}

// canReach reports whether mails to this address can be sent, as far as is known.
func (m *mailer) canReach(address string) bool {
	return !m.isOn() || m.transport.canReach(address)
}

// enqueue accepts a request, and does nothing else before it returns. If no mails are sent, it
// ignores the request. It returns errMailQueueFull if too many wait in the first queue. Whether the
// second one is full must not show, because resets take places there, too.
func (m *mailer) enqueue(req mailRequest) error {
	if !m.isOn() {
		return nil
	}
	if !m.requests.tryTake() {
		m.settle(req, errMailQueueFull)
		return errMailQueueFull
	}
	go m.process(req)
	return nil
}

// process writes and sends the mail that was asked for. It passes both queues.
func (m *mailer) process(req mailRequest) {
	req, l, err := m.write(req)
	if err == nil && !m.letters.tryTake() {
		err = errMailQueueFull
	}
	m.requests.release()
	if err != nil {
		m.settle(req, err)
		return
	}
	defer m.letters.release()
	err = m.try(req, m.senders, m.limits.sendPauses, func(ctx context.Context) error {
		if time.Since(l.Date) > m.limits.age {
			return errMailLate
		}
		return m.transport.send(ctx, l)
	})
	m.settle(req, err)
}

// write returns the letter for a request, and the request with its user. It returns errMailLimited
// if there were too many mails to the address, and errNoUser if nobody has the address for which a
// reset was asked.
func (m *mailer) write(req mailRequest) (mailRequest, letter, error) {
	err := m.try(req, m.writers, m.limits.writePauses, func(ctx context.Context) error {
		return m.limit(ctx, req)
	})
	if err != nil {
		return req, letter{}, err
	}
	var l letter
	err = m.try(req, m.writers, m.limits.writePauses, func(ctx context.Context) error {
		if req.Kind == mailReset {
			u, err := m.users.findUserByEmail(ctx, req.Address)
			if err != nil {
				return err
			}
			req.User = u
			req.Address = u.Email // as it was signed up, not as somebody has typed it
		}
		var err error
		l, err = m.compose(req)
		return err
	})
	return req, l, err
}

// limit counts a request. It returns errMailLimited if it is one too many.
func (m *mailer) limit(ctx context.Context, req mailRequest) error {
	most := maxMails
	switch {
	case req.Kind == mailChange:
		most = maxChangeMails
	case req.Kind.isAsked():
	case req.User.Verified:
		return nil
	default:
		// The owner of an address that is not verified may not know of the account, whose password
		// a stranger could change again and again.
		most = maxNotices
	}
	allowed, err := m.limiter.take(ctx, normalizeEmail(req.Address), most)
	if err != nil {
		return redisError("mail limit", err)
	}
	if !allowed {
		return errMailLimited
	}
	return nil
}

// compose returns the letter for a request whose user is known.
func (m *mailer) compose(req mailRequest) (letter, error) {
	if !isPlainAddress(req.Address) {
		return letter{}, fmt.Errorf("%w: the address cannot receive mail", errMailFinal)
	}
	now := time.Now()
	values := mailValues{
		Site:  m.site,
		Email: req.Address,
	}
	if req.Kind.isAsked() {
		purpose := linkPurposes[req.Kind]
		values.Link = m.links.url(purpose, req.User, req.Address, now)
		values.Lifetime = lifetimeText(purpose.lifetime())
	}
	subject, body, err := m.texts.write(req.Kind, values)
	if err != nil {
		return letter{}, fmt.Errorf("%w: %v", errMailFinal, err)
	}
	return letter{
		ID:        rand.Text(),
		Date:      now,
		RequestID: req.RequestID,
		Kind:      req.Kind,
		To:        req.Address,
		Subject:   subject,
		Body:      body,
		Link:      values.Link,
	}, nil
}

// try calls do when it is the mail's turn. If do fails, and might not fail later, try calls it
// again after each of the pauses. A shutdown ends a pause, and one more call follows.
func (m *mailer) try(
	req mailRequest,
	turn slots,
	pauses []time.Duration,
	do func(ctx context.Context) error,
) error {
	for _, pause := range pauses {
		err := m.tryOnce(turn, do)
		if err == nil || isFinal(err) {
			return err
		}
		select {
		case <-m.draining:
			return fmt.Errorf("%w: %v", errMailAborted, err)
		default:
		}
		m.note(req, mailRetried, err)
		select {
		case <-m.draining:
		case <-time.After(pause):
		}
	}
	return m.tryOnce(turn, do)
}

// tryOnce calls do when it is the mail's turn. It turns a panic into an error.
func (m *mailer) tryOnce(turn slots, do func(ctx context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: panic: %v\n%s", errMailFinal, p, debug.Stack())
		}
	}()
	ctx := m.ctx
	select {
	case turn <- struct{}{}:
		defer turn.release()
	case <-ctx.Done():
		return errMailAborted
	}
	ctx, cancel := context.WithTimeout(ctx, m.limits.timeout)
	defer cancel()
	err = do(ctx)
	if err != nil && m.ctx.Err() != nil {
		return fmt.Errorf("%w: %v", errMailAborted, err)
	}
	return err
}

// isFinal reports whether another try would fail like the one that returned err.
func isFinal(err error) bool {
	for _, final := range []error{
		errMailFinal, errMailLimited, errMailLate, errMailAborted, errNoUser,
	} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}

// settle notes what became of a mail in the end. err is nil if it was sent.
func (m *mailer) settle(req mailRequest, err error) {
	switch {
	case err == nil:
		m.note(req, mailSent, nil)
	case errors.Is(err, errNoUser):
		// There was never a mail.
	case errors.Is(err, errMailLimited):
		m.note(req, mailLimited, err)
	case errors.Is(err, errMailQueueFull):
		m.note(req, mailDropped, err)
	case errors.Is(err, errMailAborted):
		m.aborted.Add(1)
		m.note(req, mailDropped, err)
	default:
		m.note(req, mailFailed, err)
	}
}

// note counts an outcome and writes a line in the log, which never has an address or a link in it.
func (m *mailer) note(req mailRequest, outcome mailOutcome, err error) {
	m.outcomes[outcome].Add(1)
	attrs := []slog.Attr{
		slog.String("requestId", req.RequestID),
		slog.String("kind", string(req.Kind)),
		slog.String("outcome", string(outcome)),
	}
	if req.User.ID != "" {
		attrs = append(attrs, slog.String("userId", req.User.ID))
	}
	level := slog.LevelInfo
	if outcome == mailRetried || outcome == mailFailed || outcome == mailDropped {
		level = slog.LevelWarn
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	m.log.LogAttrs(m.ctx, level, "mail", attrs...)
}

// drain accepts no more requests, and waits for the mails that are there. When ctx ends, those that
// are left are dropped.
func (m *mailer) drain(ctx context.Context) {
	close(m.draining)
	stop := context.AfterFunc(ctx, m.cancel)
	defer stop()
	// Each mail gives its place back, at the latest when m.ctx has ended.
	m.requests.takeAll()
	m.letters.takeAll()
	m.cancel()
	if n := m.aborted.Load(); n > 0 {
		m.log.Warn("mails dropped, because the server shuts down", "count", n)
	}
}

// Transports

// mailTransport sends letters.
type mailTransport interface {
	send(ctx context.Context, l letter) error

	// check returns an error if no letter could be sent at the moment.
	check(ctx context.Context) error

	// canReach reports whether letters to this address can be sent, as far as is known.
	canReach(address string) bool
}

// logTransport writes letters to the log instead of sending them. It is for development, and the
// only thing that ever logs a link.
type logTransport struct {
	log *slog.Logger
}

// send writes a letter past the level of the log, since it is lost otherwise.
func (t logTransport) send(ctx context.Context, l letter) error {
	const text = "mail is logged, because SMTP_URL is not set"
	record := slog.NewRecord(time.Now(), slog.LevelInfo, text, 0)
	record.Add(
		"requestId", l.RequestID,
		"kind", string(l.Kind),
		"to", l.To,
		"subject", l.Subject,
		"text", l.Body,
		"link", l.Link,
	)
	return t.log.Handler().Handle(ctx, record)
}

func (logTransport) check(context.Context) error { return nil }

func (logTransport) canReach(string) bool { return true }

// smtpServer is the mail server that takes our mails (RFC 6409).
type smtpServer struct {
	host     string
	port     string
	tls      bool   // from the first byte on; otherwise by STARTTLS
	user     string // empty: no authentication
	password string
}

// isLoopback reports whether the host is this machine.
func (s smtpServer) isLoopback() bool {
	ip, err := netip.ParseAddr(s.host)
	return s.host == "localhost" || err == nil && ip.IsLoopback()
}

// tlsConfig has the certificate of the mail server verified for its host.
func (s smtpServer) tlsConfig() *tls.Config {
	return &tls.Config{ServerName: s.host}
}

// smtpTransport sends letters through a mail server, each on a connection of its own.
type smtpTransport struct {
	server    smtpServer
	from      mail.Address
	asciiOnly atomic.Bool // the mail server has not offered SMTPUTF8
}

// canReach reports whether the mail server takes letters to this address. Addresses that are not in
// ASCII need SMTPUTF8 (RFC 6531).
func (t *smtpTransport) canReach(address string) bool {
	return isASCII(address) || !t.asciiOnly.Load()
}

// send hands a letter to the mail server.
func (t *smtpTransport) send(ctx context.Context, l letter) error {
	client, hangUp, err := t.connect(ctx)
	if err != nil {
		return err
	}
	defer hangUp()
	if takesUTF8, _ := client.Extension("SMTPUTF8"); !takesUTF8 && !isASCII(l.To) {
		return fmt.Errorf("%w: the address is not in ASCII, and the mail server takes no other",
			errMailFinal)
	}
	if err := t.mailFrom(client, l.To); err != nil {
		return refusal("MAIL", err)
	}
	if err := client.Rcpt(l.To); err != nil {
		return refusal("RCPT", err)
	}
	body, err := client.Data()
	if err != nil {
		return refusal("DATA", err)
	}
	if _, err := body.Write(l.encode(t.from)); err != nil {
		return refusal("message", err)
	}
	return refusal("message", body.Close())
}

// check connects to the mail server. From then on it is known which addresses can be reached.
func (t *smtpTransport) check(ctx context.Context) error {
	_, hangUp, err := t.connect(ctx)
	if err != nil {
		return err
	}
	hangUp()
	return nil
}

// connect returns a client that has greeted the mail server, over TLS, and has authenticated. When
// ctx ends, whatever waits for the mail server fails. The caller must call hangUp in the end, which
// says QUIT, as a client has to (RFC 5321 section 4.1.1.10), and waits briefly for the answer.
func (t *smtpTransport) connect(ctx context.Context) (_ *smtp.Client, hangUp func(), _ error) {
	address := net.JoinHostPort(t.server.host, t.server.port)
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = raw.SetDeadline(time.Unix(1, 0))
	})
	var conn net.Conn = &boundedConn{raw, maxReplyBytes}
	if t.server.tls {
		conn = tls.Client(conn, t.server.tlsConfig())
	}
	client, err := smtp.NewClient(conn, t.server.host)
	if err != nil {
		stop()
		_ = raw.Close()
		return nil, nil, smtpError("greeting", err)
	}
	hangUp = func() {
		if ctx.Err() == nil {
			_ = raw.SetDeadline(time.Now().Add(quitTimeout))
		}
		_ = client.Quit()
		stop()
		_ = raw.Close()
	}
	if err := t.greet(client, helloName(raw)); err != nil {
		hangUp()
		return nil, nil, err
	}
	return client, hangUp, nil
}

// greet says EHLO, and begins TLS and authenticates if that is due. Only a server on this machine
// may do without TLS, so the password goes over no network in the clear.
func (t *smtpTransport) greet(client *smtp.Client, hello string) error {
	if err := client.Hello(hello); err != nil {
		return smtpError("EHLO", err)
	}
	offered, _ := client.Extension("STARTTLS")
	switch {
	case t.server.tls:
	case offered:
		if err := client.StartTLS(t.server.tlsConfig()); err != nil {
			return smtpError("STARTTLS", err)
		}
	case !t.server.isLoopback():
		return errors.New("STARTTLS: the mail server does not offer it")
	}
	takesUTF8, _ := client.Extension("SMTPUTF8")
	t.asciiOnly.Store(!takesUTF8)
	if t.server.user == "" {
		return nil
	}
	return t.authenticate(client)
}

// authenticate logs in by PLAIN (RFC 4616), or by LOGIN if that is all that the server offers.
func (t *smtpTransport) authenticate(client *smtp.Client) error {
	_, offered := client.Extension("AUTH")
	mechanisms := strings.Fields(strings.ToUpper(offered))
	user, password := t.server.user, t.server.password
	auth := &smtpAuth{}
	switch {
	case slices.Contains(mechanisms, "PLAIN"):
		auth.mechanism = "PLAIN"
		auth.initial = []byte("\x00" + user + "\x00" + password)
	case slices.Contains(mechanisms, "LOGIN"):
		auth.mechanism = "LOGIN"
		auth.answers = []string{user, password}
	default:
		return errors.New("AUTH: the mail server offers neither PLAIN nor LOGIN")
	}
	return smtpError("AUTH", client.Auth(auth))
}

// smtpAuth is a mechanism of authentication: what it sends at first, and what it answers to the
// questions of the mail server. It does not ask for TLS, as those of net/smtp do, because greet has
// done so.
type smtpAuth struct {
	mechanism string
	initial   []byte
	answers   []string
}

func (a *smtpAuth) Start(*smtp.ServerInfo) (string, []byte, error) {
	return a.mechanism, a.initial, nil
}

func (a *smtpAuth) Next(_ []byte, more bool) ([]byte, error) {
	if !more {
		return nil, nil
	}
	if len(a.answers) == 0 {
		return nil, errors.New("the mail server asks for more than user and password")
	}
	answer := a.answers[0]
	a.answers = a.answers[1:]
	return []byte(answer), nil
}

// mailFrom sends the command MAIL. The method of the client would ask for SMTPUTF8 whenever the
// server offers it, even if nothing needs it. Some servers can then pass the mail on only to others
// that offer it, too.
func (t *smtpTransport) mailFrom(client *smtp.Client, to string) error {
	command := "MAIL FROM:<" + t.from.Address + ">"
	if !isASCII(to) {
		command += " SMTPUTF8"
	}
	id, err := client.Text.Cmd("%s", command)
	if err != nil {
		return err
	}
	client.Text.StartResponse(id)
	defer client.Text.EndResponse(id)
	_, _, err = client.Text.ReadResponse(250)
	return err
}

const (
	// maxReplyBytes bounds what a mail server, or whoever poses as one before TLS, can make us read
	// of one conversation. Usual replies have 2 KB, and a chain of certificates less than 20 KB.
	maxReplyBytes = 256 << 10

	// quitTimeout bounds the wait for the answer to QUIT. A mail counts as sent only after it.
	quitTimeout = time.Second
)

// boundedConn is a connection that fails once left bytes have been read from it.
type boundedConn struct {
	net.Conn
	left int
}

func (c *boundedConn) Read(b []byte) (int, error) {
	if c.left == 0 {
		return 0, errors.New("the mail server has sent too much")
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// hostForm matches a host's name with its domain (RFC 5321 section 2.3.5), and no IP address.
var hostForm = regexp.MustCompile(`^([A-Za-z0-9-]+\.)+[A-Za-z][A-Za-z0-9-]*$`)

// helloName returns what this host calls itself to the mail server: its name if that has a domain,
// else its address (RFC 5321 section 4.1.3).
func helloName(conn net.Conn) string {
	if name, err := os.Hostname(); err == nil && hostForm.MatchString(name) {
		return name
	}
	local, _ := netip.ParseAddrPort(conn.LocalAddr().String())
	ip := local.Addr().Unmap().WithZone("")
	if ip.Is6() {
		return "[IPv6:" + ip.String() + "]"
	}
	return "[" + ip.String() + "]"
}

// enhancedCode matches the code that many replies have after the first one (RFC 3463).
var enhancedCode = regexp.MustCompile(`^[245]\.[0-9]{1,3}\.[0-9]{1,3}\b`)

// smtpError names the step that has failed. It keeps only the codes of a reply, because its text
// may contain the address. It returns nil if err is nil.
func smtpError(step string, err error) error {
	var reply *textproto.Error
	var malformed textproto.ProtocolError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reply):
		enhanced := enhancedCode.FindString(reply.Msg)
		return fmt.Errorf("%s: %s", step, strings.TrimSpace(fmt.Sprint(reply.Code, " ", enhanced)))
	case errors.As(err, &malformed):
		return fmt.Errorf("%s: the reply is not SMTP", step)
	default:
		return fmt.Errorf("%s: %v", step, err)
	}
}

// refusal is smtpError for a step that is about a letter. If the reply means that the mail server
// will never take it, the error is errMailFinal.
func refusal(step string, err error) error {
	var reply *textproto.Error
	if errors.As(err, &reply) && reply.Code >= 500 {
		return fmt.Errorf("%w: %v", errMailFinal, smtpError(step, err))
	}
	return smtpError(step, err)
}
