package integration

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"mime/quotedprintable"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/mail"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/device"
	"github.com/emersion/go-smtp"
)

// These tests are a user of examples/frontend in a real Chromium: the page comes from one origin
// and calls the server at another, as in life. Each leaves screenshots in screenshots/.

var throughNginx = flag.Bool("nginx", false,
	"run the browser tests with https, and through the nginx of examples/deploy")

const (
	ada      = "ada@example.com"
	bob      = "bob@example.com"
	password = "correct horse battery"
	changed  = "staple of the house"

	signupLink = `#view-login a[href="#signup"]`
)

// A site is a server behind a proxy, its mails, the page at three origins, and a browser.
type site struct {
	t       *testing.T
	files   map[string][]byte // of certificates, or nil for http
	mails   *mailbox
	browser context.Context
	api     string // the origin of the proxy
	origin  string // an origin of the page, which FRONTEND_URL names
	twin    string // another one that it names
	foreign string // one that it does not name

	mu      sync.Mutex
	answers []string // what the API has answered, like "POST /auth/login 200"

	holding atomic.Bool   // whether good answers to refreshes wait at the proxy for release
	held    chan struct{} // gets one for each answer that waits
	release func()
}

func newSite(t *testing.T, env vars) *site {
	t.Helper()
	released := make(chan struct{})
	s := &site{
		t:       t,
		mails:   newMailbox(t),
		held:    make(chan struct{}, 10),
		release: sync.OnceFunc(func() { close(released) }),
	}
	if *throughNginx {
		s.files = certificates(t)
	}
	s.browser = chromium(t, s.files)
	s.origin, s.twin, s.foreign = s.host(s.page()), s.host(s.page()), s.host(s.page())
	server := serve(t, vars{
		"FRONTEND_URL": s.origin + "," + s.twin,
		"SMTP_URL":     s.mails.url,
		"MAIL_FROM":    "Latchkey <latchkey@example.com>",
	}.with(env))
	target, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ModifyResponse = func(res *http.Response) error {
		answer := fmt.Sprint(res.Request.Method, " ", res.Request.URL.Path, " ", res.StatusCode)
		s.mu.Lock()
		s.answers = append(s.answers, answer)
		s.mu.Unlock()
		if answer == "POST /auth/refresh 200" && s.holding.Load() {
			s.held <- struct{}{}
			<-released
		}
		return nil
	}
	if *throughNginx {
		behind := httptest.NewServer(proxy)
		t.Cleanup(behind.Close)
		s.api = startNginx(t, s.files, behind.Listener.Addr().String()).url
	} else {
		s.api = s.host(proxy)
	}
	t.Cleanup(s.release)
	return s
}

// host serves at an origin of localhost. To a browser all of these are the same site.
func (s *site) host(handler http.Handler) (origin string) {
	server := httptest.NewUnstartedServer(handler)
	if s.files == nil {
		server.Start()
	} else {
		certificate, err := tls.X509KeyPair(s.files["cert.pem"], s.files["key.pem"])
		if err != nil {
			s.t.Fatal(err)
		}
		server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
		server.StartTLS()
	}
	s.t.Cleanup(server.Close)
	return strings.Replace(server.URL, "127.0.0.1", "localhost", 1)
}

// page is the example as it is, but for the address of the API, which each index.html names.
func (s *site) page() http.Handler {
	const dir = "../examples/frontend"
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServer(http.Dir(dir)))
	for _, folder := range []string{"/", "/reset-password/", "/verify-email/"} {
		mux.HandleFunc("GET "+folder+"{$}", func(w http.ResponseWriter, _ *http.Request) {
			index, err := os.ReadFile(dir + folder + "index.html")
			if err != nil {
				s.t.Error(err)
			}
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, strings.ReplaceAll(string(index), "http://localhost:3000", s.api))
		})
	}
	return mux
}

// heard returns those answers of the API so far that begin like this.
func (s *site) heard(beginning string) (answers []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, answer := range s.answers {
		if strings.HasPrefix(answer, beginning) {
			answers = append(answers, answer)
		}
	}
	return answers
}

// refreshes says how many refreshes the API has answered with a status.
func (s *site) refreshes(status int) int {
	return len(s.heard(fmt.Sprint("POST /auth/refresh ", status)))
}

// link waits for a mail to an address with a link to a page of the example, and returns the link.
func (s *site) link(to, page string) string {
	s.t.Helper()
	return s.mails.take(to, regexp.QuoteMeta(s.origin+page+"#token=")+`\S+`)
}

// A mailbox is an SMTP server that keeps the mails that it gets until they are taken.
type mailbox struct {
	t     *testing.T
	url   string
	mu    sync.Mutex
	mails []delivery
}

func newMailbox(t *testing.T) *mailbox {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &mailbox{t: t, url: "smtp://" + listener.Addr().String()}
	server := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
		return &delivery{box: m}, nil
	}))
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return m
}

// take waits for a mail to an address whose text matches a pattern. It takes the mail out of the
// box, and returns what matches.
func (m *mailbox) take(to, pattern string) (match string) {
	m.t.Helper()
	eventually(m.t, 20*time.Second, "a mail to "+to+" with "+pattern, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		for i, mail := range m.mails {
			match = regexp.MustCompile(pattern).FindString(mail.text)
			if mail.to == to && match != "" {
				m.mails = slices.Delete(m.mails, i, i+1)
				return true
			}
		}
		return false
	})
	return match
}

// A delivery is one mail on its way into a mailbox, or in it.
type delivery struct {
	box  *mailbox
	to   string
	text string
}

func (d *delivery) Mail(string, *smtp.MailOptions) error { return nil }

func (d *delivery) Rcpt(to string, _ *smtp.RcptOptions) error {
	d.to = to
	return nil
}

func (d *delivery) Data(r io.Reader) error {
	message, err := mail.ReadMessage(r)
	if err != nil {
		d.box.t.Error(err)
		return err
	}
	text, err := io.ReadAll(quotedprintable.NewReader(message.Body))
	if err != nil {
		d.box.t.Error(err)
		return err
	}
	d.box.mu.Lock()
	defer d.box.mu.Unlock()
	d.box.mails = append(d.box.mails, delivery{to: d.to, text: string(text)})
	return nil
}

func (d *delivery) Reset() {}

func (d *delivery) Logout() error { return nil }

// chromium starts a browser with an empty profile, which accepts the certificate of files, if any.
func chromium(t *testing.T, files map[string][]byte) context.Context {
	t.Helper()
	options := []chromedp.ExecAllocatorOption{
		chromedp.DisableGPU,
		chromedp.Flag("disable-component-update", true),
	}
	if files != nil {
		accepted := fingerprint(t, files["cert.pem"])
		options = append(options, chromedp.Flag("ignore-certificate-errors-spki-list", accepted))
	}
	browser, _ := chromedp.NewContext(context.Background(),
		chromedp.WithAllocatorOptions(options...))
	err := chromedp.Do(browser)
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("THE BROWSER TESTS DID NOT RUN: no Chromium (Debian: apt-get install chromium)")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := chromedp.Cancel(browser); err != nil {
			t.Error(err)
		}
	})
	return browser
}

// fingerprint names the key of a certificate as Chromium does.
func fingerprint(t *testing.T, certificate []byte) string {
	t.Helper()
	block, _ := pem.Decode(certificate)
	parsed, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(parsed.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(hash[:])
}

// A tab is one tab of a browser.
type tab struct {
	*site
	ctx context.Context
}

// open opens a page, for example by a link from a mail, in another tab.
func (s *site) open(url string, options ...chromedp.ContextOption) *tab {
	s.t.Helper()
	x := &tab{site: s}
	x.ctx, _ = chromedp.NewContext(s.browser, append(options, chromedp.WithListener(s.hear))...)
	if err := chromedp.Do(x.ctx, chromedp.Navigate(url)); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if s.t.Failed() {
			text := js[string](x, `document.body.innerText`)
			s.t.Logf("the page: %s\nanswers of the API: %q", text, s.heard(""))
			x.shot("failed")
		}
	})
	return x
}

// device opens the page on another device, which has cookies of its own.
func (s *site) device() *tab {
	s.t.Helper()
	return s.open(s.origin, chromedp.WithNewBrowserContext())
}

// openLink opens a link from a mail in another tab. The token must leave the address bar at once.
func (s *site) openLink(link string, options ...chromedp.ContextOption) *tab {
	s.t.Helper()
	x := s.open(link, options...)
	x.see("h1:focus", "")
	x.named()
	page, _, _ := strings.Cut(link, "#")
	if at := js[string](x, `location.href`); at != page+"/" {
		s.t.Errorf("the link leads to %s", at)
	}
	return x
}

// hear reports what goes wrong in a page unseen.
func (s *site) hear(event any) {
	switch e := event.(type) {
	case *runtime.EventExceptionThrown:
		details := e.ExceptionDetails
		s.t.Errorf("an exception in the page: %s %s", details.Text, details.Exception.Description)
	case *log.EventEntryAdded:
		if strings.Contains(e.Entry.Text, "Content Security Policy") {
			s.t.Errorf("the page breaks its own policy: %s", e.Entry.Text)
		}
	}
}

// try runs an action in the tab.
func try[T any](x *tab, action chromedp.Action[T]) (T, error) {
	ctx, cancel := context.WithTimeout(x.ctx, 30*time.Second)
	defer cancel()
	return chromedp.Run(ctx, action)
}

// do runs an action in the tab, which must succeed.
func do[T any](x *tab, action chromedp.Action[T]) T {
	x.t.Helper()
	value, err := try(x, action)
	if err != nil {
		x.t.Fatal(err)
	}
	return value
}

// js evaluates an expression in the page, and waits for it if it is a promise.
func js[T any](x *tab, expression string) T {
	x.t.Helper()
	return do(x, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
}

// call sends a command of the DevTools protocol.
func call[P, R any](x *tab, command cdp.Command[P, R], params P) R {
	x.t.Helper()
	return do(x, func(ctx context.Context, target *chromedp.Target) (R, error) {
		return cdp.Call(ctx, target, command, params)
	})
}

// until waits for a condition to hold in the page.
func (x *tab) until(condition string) {
	x.t.Helper()
	eventually(x.t, 20*time.Second, condition, func() bool {
		holds, err := try(x, chromedp.Evaluate[bool](condition))
		return err == nil && holds // There is an error while one page follows another.
	})
}

// see waits until an element is visible and has the text in it.
func (x *tab) see(selector, text string) {
	x.t.Helper()
	x.until(fmt.Sprintf(`(() => {
		const node = document.querySelector(%q);
		return node.checkVisibility() && node.textContent.includes(%q);
	})()`, selector, text))
}

// named asserts that every field has a name, which a screen reader reads out.
func (x *tab) named() {
	x.t.Helper()
	x.until(`[...document.querySelectorAll('input')].every(
		(input) => input.labels.length > 0 || Boolean(input.ariaLabel))`)
}

func (x *tab) reload() {
	x.t.Helper()
	do(x, chromedp.Reload())
}

func (x *tab) click(selector string) {
	x.t.Helper()
	x.see(selector+":not(:disabled)", "")
	do(x, chromedp.Click(chromedp.CSS(selector)))
}

// fill types into the fields of a form, given as selector and text in turn, and submits it by the
// Enter key.
func (x *tab) fill(fields ...string) {
	x.t.Helper()
	for i := 0; i < len(fields); i += 2 {
		js[string](x, fmt.Sprintf("document.querySelector(%q).value = ''", fields[i]))
		do(x, chromedp.SendKeys(chromedp.CSS(fields[i]), fields[i+1]))
	}
	do(x, chromedp.KeyEvent("\r"))
}

// signup goes from the form for logins to an account.
func (x *tab) signup(email string) {
	x.t.Helper()
	x.see("#view-login h1", "Log in")
	x.click(signupLink)
	x.fill("#signup-email", email, "#signup-password", password)
	x.signedIn(email)
}

func (x *tab) login(email, password string) {
	x.t.Helper()
	x.see("#view-login h1", "Log in")
	x.fill("#login-email", email, "#login-password", password)
	x.signedIn(email)
}

// signedIn waits for the account and the list of sessions, the last that the page asks for. If this
// machine was too busy to answer the page, it tries again, as a user would.
func (x *tab) signedIn(email string) {
	x.t.Helper()
	x.until(`(() => {
		const again = document.querySelector('#view-offline button');
		if (again.checkVisibility() && !again.disabled) {
			again.click();
		}
		return document.querySelector('#email').checkVisibility();
	})()`)
	x.see("#email", email)
	x.see("#sessions", "This browser")
}

// shot leaves screenshots of this state: a narrow dark one and a wide light one.
func (x *tab) shot(name string) {
	x.t.Helper()
	if err := os.MkdirAll("screenshots", 0o755); err != nil {
		x.t.Fatal(err)
	}
	// The light one is the last, so that the test goes on with it.
	for _, look := range []struct {
		scheme string
		width  int64
	}{{"dark", 360}, {"light", 1000}} {
		call(x, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: look.scheme}},
		})
		do(x, chromedp.EmulateViewport(look.width, 640))
		png := do(x, chromedp.FullScreenshot(100))
		file := fmt.Sprintf("screenshots/%s-%s.png", name, look.scheme)
		if err := os.WriteFile(file, png, 0o644); err != nil {
			x.t.Fatal(err)
		}
	}
}

// cookie is the refresh cookie as the browser keeps it, or nil.
func (x *tab) cookie() *network.Cookie {
	x.t.Helper()
	of := network.GetCookiesParams{URLs: []string{x.api + "/auth/refresh"}}
	for _, c := range call(x, network.GetCookies, of).Cookies {
		if c.Name == "refreshToken" {
			return c
		}
	}
	return nil
}

func TestBrowserSession(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.see("h1:focus", "Log in")
	x.shot("login")

	x.click(signupLink)
	x.see("h1:focus", "Sign up")
	x.fill("#signup-email", "no address", "#signup-password", "short")
	for _, id := range []string{"signup-email", "signup-password"} {
		x.see("#"+id+"-error", "")
		x.see(fmt.Sprintf("#%[1]s[aria-invalid=true][aria-describedby$=%[1]s-error]", id), "")
	}
	x.see("#signup-email:focus", "")
	x.shot("signup-errors")

	x.fill("#signup-email", ada, "#signup-password", password)
	x.signedIn(ada)
	x.named()
	x.shot("account")

	// No script reaches the refresh token.
	kept := js[string](x, `(async () => JSON.stringify([
		document.cookie, { ...localStorage }, { ...sessionStorage },
		await indexedDB.databases(), await cookieStore.getAll(), await caches.keys()]))()`)
	if kept != `["",{},{},[],[],[]]` {
		t.Errorf("scripts find %s", kept)
	}
	before := x.cookie()
	if !before.HTTPOnly || !before.Secure || before.Path != "/auth" ||
		before.SameSite != network.CookieSameSiteStrict {
		t.Errorf("the cookie is kept as %+v", before)
	}

	x.reload()
	x.signedIn(ada)
	if x.cookie().Value == before.Value {
		t.Error("a reload did not exchange the refresh token")
	}

	other := s.device()
	other.see("#view-login h1", "Log in")
	other.fill("#login-email", ada, "#login-password", "a wrong guess")
	other.see("#login .problem", "Invalid")
	other.shot("login-wrong")
	other.click(signupLink)
	other.fill("#signup-email", "ADA@example.com", "#signup-password", password)
	other.see("#signup-email-error", "Email already exists")
	other.shot("signup-taken")

	x.click("#logout button")
	x.see("#status", "You are logged out.")
	x.shot("logged-out")
	if x.cookie() != nil {
		t.Error("the cookie outlives the logout")
	}
	x.reload()
	x.see("#view-login h1", "Log in")
}

func TestBrowserTabs(t *testing.T) {
	t.Parallel()
	const life = 2 * time.Second
	s := newSite(t, vars{"ACCESS_TOKEN_TTL": life.String(), "RATE_LIMIT_MAX": "10000"})
	tabs := []*tab{s.open(s.origin), s.open(s.origin)}
	both := func(work func(x *tab)) {
		var wg sync.WaitGroup
		for _, x := range tabs {
			wg.Go(func() { work(x) })
		}
		wg.Wait()
	}
	signedIn := func(x *tab) { x.signedIn(ada) }
	tabs[0].signup(ada)
	both(signedIn)

	refused := s.refreshes(401) // which the pages were before there was a cookie
	good := s.refreshes(200)
	const rounds = 5
	for range rounds {
		time.Sleep(life + 100*time.Millisecond) // for the access tokens of both tabs to expire
		both(func(x *tab) {
			x.click("#refresh button")
			x.see("#status", "The list is up to date.")
		})
	}
	if n := s.refreshes(200) - good; n < rounds {
		t.Errorf("%d refreshes in %d rounds: the tokens had not expired", n, rounds)
	}
	for range rounds {
		both((*tab).reload)
		both(signedIn)
	}
	if n := s.refreshes(401) - refused; n > 0 {
		t.Errorf("%d refreshes lost a race, in spite of the lock", n)
	}

	tabs[0].click("#logout button")
	tabs[0].see("#status", "You are logged out.")
	tabs[1].see("#status", "You have been logged out.")
	tabs[1].shot("logged-out-elsewhere")
	tabs[1].login(ada, password)
	tabs[0].signedIn(ada)
}

// stopTimers keeps setTimeout in the pages that the tab loads from now on: what is due by it waits
// in window.timer.
func (x *tab) stopTimers() {
	x.t.Helper()
	script := `window.setTimeout = (work) => { window.timer = work; };`
	call(x, page.AddScriptToEvaluateOnNewDocument,
		page.AddScriptToEvaluateOnNewDocumentParams{Source: script})
}

// Two pages of different origins share the cookie but neither Web Locks nor a channel. The refresh
// of one comes while the answer to the other's, with the new cookie, is under way.
func TestBrowserLostRace(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{"REFRESH_REUSE_LEEWAY": "60s"})
	won := s.open(s.origin)
	won.signup(ada)
	lost := s.open(s.twin)
	lost.signedIn(ada)
	lost.stopTimers()

	refused := s.refreshes(401)
	s.holding.Store(true)
	won.reload()
	<-s.held
	lost.reload()
	lost.until(`"timer" in window`)
	s.release()
	won.signedIn(ada)
	js[chromedp.Void](lost, `timer()`)
	lost.signedIn(ada)
	if n := s.refreshes(401) - refused; n != 1 {
		t.Errorf("%d refreshes were refused, want one", n)
	}
}

// A page is left while the answer to its refresh, with the new cookie, is under way: by a reload, a
// link, a closed tab.
func TestBrowserLeftPage(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{"REFRESH_REUSE_LEEWAY": "60s"})
	x := s.open(s.origin)
	x.signup(ada)
	x.stopTimers()
	before := x.cookie().Value

	s.holding.Store(true)
	x.reload()
	<-s.held
	x.see("#view-start", "One moment")
	// It appears after a while.
	js[chromedp.Void](x, `Promise.all(document.getAnimations().map((each) => each.finished))`)
	x.shot("start")
	x.reload()
	x.until(`"timer" in window`)
	s.release()
	eventually(t, 20*time.Second, "the page that was left has given its cookie", func() bool {
		return x.cookie().Value != before
	})
	js[chromedp.Void](x, `timer()`)
	x.signedIn(ada)
}

// While a page shows one user, another one logs in on a page with the same cookie.
func TestBrowserOtherUser(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.signup(ada)
	other := s.open(s.twin) // which shares the cookie, but no news
	other.signedIn(ada)
	other.click("#logout button")
	other.see("#status", "You are logged out.")
	left := js[string](other, `['#who', '#view-account']
		.map((id) => document.querySelector(id).innerHTML).join()`)
	if strings.Contains(left, ada) || strings.Contains(left, "This browser") {
		t.Errorf("the page keeps what it knew of the last user: %s", left)
	}
	other.signup(bob)

	x.click("#revoke-all button") // for Ada, and not for Bob
	x.see("#revoke-all .problem", "Somebody else is logged in now")
	x.signedIn(bob)
	other.reload()
	other.signedIn(bob)
}

// The sessions of a user are revoked on another device, first while two pages show one of them,
// then while a page that shows one is in the history of its tab.
func TestBrowserRevoked(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x, twin, phone := s.open(s.origin), s.open(s.origin), s.device()
	revokeAll := func() {
		phone.login(ada, password)
		phone.click("#revoke-all button")
		phone.see("#status", "You are logged out everywhere.")
	}
	x.signup(ada)
	twin.signedIn(ada)
	revokeAll()
	x.fill("#delete-password", password) // which deletes nothing any more
	x.see("#status", "You have been logged out.")
	twin.see("#status", "You have been logged out.")

	x.login(ada, password)
	js[chromedp.Void](x, `window.kept = true`)
	do(x, chromedp.Navigate(s.origin+"/style.css"))
	revokeAll()
	// There is no load event to wait for where the page comes back as it was left.
	js[chromedp.Void](x, `history.back()`)
	x.see("#view-login h1", "Log in")
	t.Logf("the page came back as it was left: %v", js[bool](x, `window.kept === true`))
}

func TestBrowserOddAnswers(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.signup(ada)
	js[chromedp.Void](x, `window.real = window.fetch`)
	for answer, problem := range map[string]string{
		`'{"sessions": [', { status: 200 }`:             "The server cannot be reached", // cut off
		`'<h1>Bad gateway</h1>', { status: 502 }`:       "HTTP 502",
		`'{"message": "no upstream"}', { status: 502 }`: "HTTP 502",
		`'null', { status: 500 }`:                       "HTTP 500",
	} {
		js[chromedp.Void](x, `window.fetch = async () => new Response(`+answer+`)`)
		x.click("#refresh button")
		x.see("#refresh .problem", problem)
	}
	js[chromedp.Void](x, `window.fetch = window.real`)
	x.click("#refresh button")
	x.see("#status", "The list is up to date.")
	x.see("#refresh button:focus", "")

	// A listener that throws harms nobody else.
	got := js[string](x, fmt.Sprintf(`(async () => {
		addEventListener('error', (event) => event.preventDefault()); // not for the console
		const auth = (await import('./auth.js')).createAuth({ baseURL: %q });
		const heard = [];
		auth.onchange(() => { throw new Error('of a listener'); });
		auth.onchange((user) => heard.push(user?.email));
		const { email } = await auth.resume();
		return [email, ...heard].join();
	})()`, s.api))
	if got != ada+","+ada {
		t.Errorf("with a listener that throws: %s", got)
	}
}

func TestBrowserDevices(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	laptop, phone := s.device(), s.device()
	do(phone, chromedp.Emulate(device.IPhone13))
	laptop.signup(ada)
	phone.login(ada, password)

	laptop.click("#refresh button")
	laptop.see("#sessions", "Safari on iPhone")
	laptop.shot("sessions")
	laptop.click("#sessions button")
	laptop.see("#status", "Safari on iPhone has been logged out.")
	laptop.shot("session-revoked")
	phone.click("#refresh button")
	phone.see("#status", "You have been logged out.")

	phone.login(ada, password)
	laptop.fill("#current-password", "a wrong guess", "#new-password", "short")
	laptop.see("#new-password-error", "")
	laptop.shot("password-errors")
	laptop.fill("#current-password", "a wrong guess", "#new-password", changed)
	laptop.see("#current-password-error", "This is not your password")
	laptop.fill("#current-password", password, "#new-password", changed)
	laptop.see("#status", "Your password is changed")
	laptop.shot("password-changed")
	phone.reload()
	phone.login(ada, changed)
	laptop.reload()
	laptop.signedIn(ada)

	laptop.fill("#delete-password", "a wrong guess")
	laptop.see("#delete-password-error", "This is not your password")
	laptop.shot("delete-wrong")
	laptop.fill("#delete-password", changed)
	laptop.see("#status", "Your account is deleted.")
	laptop.shot("deleted")
}

// A new address is verified by a link, which is opened in another tab.
func TestBrowserVerification(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.signup(ada)
	x.see("#verification", "not verified yet")
	first := s.link(ada, "/verify-email")
	x.click("#verification button")
	x.see("#status", "A mail is on its way.")
	x.shot("verification-sent")

	opened := s.openLink(s.link(ada, "/verify-email"))
	opened.see("h1:focus", "Confirm your email")
	opened.see("#address", ada)
	opened.shot("verify")
	// Opening the link has done nothing yet.
	x.reload()
	x.signedIn(ada)
	x.see("#verification", "not verified yet")
	if early := s.heard("POST /auth/email/verify"); len(early) > 0 {
		t.Errorf("before the click: %q", early)
	}

	opened.click("#verify button")
	opened.see("#view-done h1:focus", "Your email is verified")
	opened.see("#verified", ada)
	opened.shot("verified")
	// The user comes back to the first tab. In a headless browser no tab ever loses the focus.
	js[chromedp.Void](x, `dispatchEvent(new Event('focus'))`)
	x.see("#status", "Your email is verified.")
	x.until(`!document.querySelector('#verification').checkVisibility()`)
	opened.click("#view-done a")
	opened.signedIn(ada)
	opened.until(`!document.querySelector('#verification').checkVisibility()`)

	// The first link is still good. It logs nobody in on another device.
	again := s.openLink(first, chromedp.WithNewBrowserContext())
	again.click("#verify button")
	again.see("#verified", ada)
	if again.cookie() != nil {
		t.Error("a link has logged somebody in")
	}
}

// A page for links is opened without a link, and then with one that is not genuine.
func TestBrowserBadLinks(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin + "/verify-email")
	x.see("h1:focus", "Open the link again")
	x.shot("verify-missing")
	// As if it were typed into the address bar.
	js[chromedp.Void](x, `location.hash = 'token=forged'`)
	x.click("#verify button")
	x.see("h1:focus", "This link does not work")
	x.shot("verify-invalid")

	x = s.openLink(s.origin + "/reset-password#token=forged")
	x.fill("#reset-password", changed)
	x.see("#forgot .problem", "This link does not work")
}

// A forgotten password is reset on a device where two tabs show the user's account.
func TestBrowserReset(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x, twin, phone := s.open(s.origin), s.open(s.origin), s.device()
	x.signup(ada)
	twin.signedIn(ada)

	phone.click(`#view-login a[href="reset-password/"]`)
	phone.see("h1:focus", "Forgot your password?")
	phone.fill("#forgot-email", "no address")
	phone.see("#forgot-email-error", "")
	for _, email := range []string{"nobody@example.com", ada} {
		phone.fill("#forgot-email", email)
		phone.see("#status", "If "+email+" has an account, a mail is on its way.")
	}
	phone.shot("forgot")

	link := s.link(ada, "/reset-password")
	opened := s.openLink(link)
	opened.see("h1:focus", "Choose a new password")
	opened.until(fmt.Sprintf(`document.querySelector('#reset-email').value === %q`, ada))
	opened.shot("reset")
	x.click("#refresh button")
	x.see("#status", "The list is up to date.")
	opened.fill("#reset-password", "short")
	opened.see("#reset-password-error", "")
	opened.shot("reset-errors")
	if early := s.heard("POST /auth/password/reset 200"); len(early) > 0 {
		t.Errorf("before the new password: %q", early)
	}

	opened.fill("#reset-password", changed)
	opened.see("#view-done h1:focus", "Your password is changed")
	opened.shot("reset-done")
	for _, old := range []*tab{x, twin} {
		old.see("#status", "You have been logged out.")
	}
	if x.cookie() != nil {
		t.Error("the cookie outlives the reset")
	}
	s.mails.take(ada, "has just been changed")
	opened.click("#done a")
	opened.login(ada, changed)
	x.signedIn(ada)

	used := s.openLink(link)
	used.fill("#reset-password", password)
	used.see("#forgot .problem", "This link does not work")
	used.shot("reset-used")
	used.click("#forgot button") // for the address of the link
	used.see("#status", "If "+ada+" has an account, a mail is on its way.")
	if s.link(ada, "/reset-password") == link {
		t.Error("the new link is the old one")
	}
	x.click("#refresh button")
	x.see("#status", "The list is up to date.")
}

// A password is reset in a browser where somebody else is logged in.
func TestBrowserResetOfAnother(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x, phone := s.open(s.origin), s.device()
	x.signup(bob)
	phone.signup(ada)
	forgot := s.open(s.origin + "/reset-password")
	forgot.fill("#forgot-email", ada)

	opened := s.openLink(s.link(ada, "/reset-password"))
	opened.fill("#reset-password", changed)
	opened.see("#done-other", "logged in as "+bob)
	opened.shot("reset-other")
	phone.click("#refresh button")
	phone.see("#status", "You have been logged out.")
	x.click("#refresh button")
	x.see("#status", "The list is up to date.")
	opened.click("#done-other a")
	opened.signedIn(bob)
}

func TestBrowserChangeEmail(t *testing.T) {
	t.Parallel()
	const grace = "grace@example.com"
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.signup(ada)
	x.fill("#new-email", "no address", "#email-password", password)
	x.see("#new-email-error", "")
	x.fill("#new-email", grace, "#email-password", "a wrong guess")
	x.see("#email-password-error", "This is not your password")
	x.shot("change-email-wrong")
	x.fill("#new-email", grace, "#email-password", password)
	x.see("#status", "A mail is on its way to "+grace)
	x.shot("change-email")

	opened := s.openLink(s.link(grace, "/verify-email"))
	opened.see("#address", grace)
	x.reload()
	x.signedIn(ada) // still
	do(x, chromedp.SendKeys(chromedp.CSS("#current-password"), "half of it"))
	opened.click("#verify button")
	opened.see("#verified", grace)
	x.see("#status", "Your email is "+grace+" now.")
	x.see("#email", grace)
	x.see("#who", grace)
	x.until(`!document.querySelector('#verification').checkVisibility()`)
	x.until(`document.querySelector('#current-password').value === 'half of it'`)
	x.shot("email-changed")
	s.mails.take(ada, "has a new email address")

	old := s.openLink(s.link(ada, "/verify-email"))
	old.click("#verify button")
	old.see("h1:focus", "This link does not work")
	x.click("#logout button")
	x.login(grace, password)
}

// The same page from a third origin, in the browser of a user who is logged in. To the browser it
// is the same site, so that it sends the cookie along, and only the server can refuse.
func TestBrowserOtherOrigin(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{})
	x := s.open(s.origin)
	x.signup(ada)
	own := len(s.heard(""))

	evil := s.open(s.foreign)
	evil.see("#resume .problem", "The server cannot be reached")
	evil.shot("other-origin")
	// The first of these needs no preflight: it leaves the browser, and the script may not see the
	// answer. The others do not leave it.
	got := js[string](evil, fmt.Sprintf(`(async (api) => {
		const results = [];
		for (const [path, init] of [
			['/auth/logout', { method: 'POST', mode: 'no-cors' }],
			['/auth/login', { method: 'POST', headers: { 'Content-Type': 'application/json' } }],
			['/auth/sessions', { method: 'DELETE' }],
			['/auth/me', { headers: { Authorization: 'Bearer x' } }],
		]) {
			results.push(await fetch(api + path, { ...init, credentials: 'include' })
				.then((answer) => answer.type, (error) => error.name));
		}
		return results.join();
	})(%q)`, s.api))
	if got != "opaque,TypeError,TypeError,TypeError" {
		t.Errorf("requests of another origin: %s", got)
	}
	heard := slices.DeleteFunc(s.heard("")[own:], func(answer string) bool {
		return strings.HasPrefix(answer, "OPTIONS ")
	})
	if !slices.Equal(heard, []string{"POST /auth/refresh 403", "POST /auth/logout 403"}) {
		t.Errorf("answers to another origin: %q", heard)
	}

	x.reload()
	x.signedIn(ada)
}

func TestBrowserRateLimit(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{"RATE_LIMIT_MAX": "8", "RATE_LIMIT_WINDOW": "15"})
	x := s.open(s.origin)
	x.signup(ada)
	eventually(t, 30*time.Second, "a request too many", func() bool {
		x.click("#refresh button")
		x.until(`document.querySelectorAll('#status:not(:empty), #refresh .problem:not(:empty)')
			.length > 0`)
		return js[string](x, `document.querySelector('#refresh .problem').textContent`) != ""
	})
	x.see("#refresh .problem", "Try again in ") // so the script can read Retry-After
	x.see("#refresh button:disabled", "(in ")
	x.shot("too-many-requests")
	x.click("#refresh button") // once it is enabled
	x.see("#status", "The list is up to date.")
}

func TestBrowserLoginLimit(t *testing.T) {
	t.Parallel()
	s := newSite(t, vars{"LOGIN_LIMIT_MAX": "1"})
	x := s.open(s.origin)
	for _, guess := range []struct{ email, problem string }{
		{ada, "Invalid"},
		{ada, "Try again in 15 min"},
		{"grace@example.com", "Invalid"}, // who has a limit of her own
	} {
		x.fill("#login-email", guess.email, "#login-password", "a wrong guess")
		x.see("#login .problem", guess.problem)
	}
}
