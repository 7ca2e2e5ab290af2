package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// These tests are a user of examples/frontend in a real Chromium: the page comes from one origin
// and calls the server at another, as in life. Each leaves screenshots in screenshots/.

const (
	ada      = "ada@example.com"
	password = "correct horse battery"
)

// site starts a server whose FRONTEND_URL is a free origin, and serves the page there.
func site(t *testing.T, more vars) (origin, api string) {
	t.Helper()
	l := listen(t)
	api = serve(t, vars{"FRONTEND_URL": originOf(l)}.with(more))
	api = strings.Replace(api, "127.0.0.1", "localhost", 1)
	servePage(t, l, api)
	return originOf(l), api
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// originOf names the host localhost, as people do: to a browser it is the same site on every port.
func originOf(l net.Listener) string {
	return fmt.Sprintf("http://localhost:%d", l.Addr().(*net.TCPAddr).Port)
}

// servePage serves the page as it is, but for the address of the API, which index.html names.
func servePage(t *testing.T, l net.Listener, api string) {
	t.Helper()
	const dir = "../examples/frontend"
	index, err := os.ReadFile(dir + "/index.html")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServer(http.Dir(dir)))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, strings.ReplaceAll(string(index), "http://localhost:3000", api))
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
}

// chromium starts a browser with an empty profile. Each tab is a child of the context, each device
// a child with cookies of its own.
func chromium(t *testing.T) context.Context {
	t.Helper()
	var program string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		t.Skip("THE BROWSER TESTS DID NOT RUN: no Chromium (Debian: apt-get install chromium)")
	}
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]),
		chromedp.ExecPath(program), chromedp.DisableGPU, chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true))
	if os.Getuid() == 0 {
		options = append(options, chromedp.NoSandbox) // which refuses to work for root
	}
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	browser, _ := chromedp.NewContext(allocator)
	if err := chromedp.Do(browser); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := chromedp.Cancel(browser); err != nil {
			t.Error(err)
		}
	})
	return browser
}

// A tab is one tab of a browser, and what went over its wire.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu      sync.Mutex
	sent    map[network.RequestID]string // "POST /auth/login"
	status  map[network.RequestID]int64
	answers []string // "POST /auth/login 200"
}

func newTab(t *testing.T, browser context.Context, options ...chromedp.ContextOption) *tab {
	t.Helper()
	x := &tab{t: t, sent: map[network.RequestID]string{}, status: map[network.RequestID]int64{}}
	x.ctx, _ = chromedp.NewContext(browser, append(options, chromedp.WithListener(x.hear))...)
	x.do(chromedp.Func(func(ctx context.Context, target *chromedp.Target) error { return nil }))
	return x
}

// device is the first tab of another browser, as far as cookies go.
func device(t *testing.T, browser context.Context) *tab {
	t.Helper()
	return newTab(t, browser, chromedp.WithNewBrowserContext())
}

// hear notes what the API answered. What goes wrong in the page unseen is an error.
func (x *tab) hear(event any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch e := event.(type) {
	case *network.EventRequestWillBeSent:
		if u, err := url.Parse(e.Request.URL); err == nil && strings.HasPrefix(u.Path, "/auth/") {
			x.sent[e.RequestID] = e.Request.Method + " " + u.Path
			x.note(e.RequestID)
		}
	case *network.EventResponseReceivedExtraInfo: // which also tells of answers that CORS withholds
		x.status[e.RequestID] = e.StatusCode
		x.note(e.RequestID)
	case *runtime.EventExceptionThrown:
		details := e.ExceptionDetails
		x.t.Errorf("an exception in the page: %s %s", details.Text, details.Exception.Description)
	case *log.EventEntryAdded:
		if strings.Contains(e.Entry.Text, "Content Security Policy") {
			x.t.Errorf("the page breaks its own policy: %s", e.Entry.Text)
		}
	}
}

// note takes down an answer once both halves are known: the browser tells of them in any order.
func (x *tab) note(id network.RequestID) {
	if x.sent[id] != "" && x.status[id] != 0 {
		x.answers = append(x.answers, fmt.Sprintf("%s %d", x.sent[id], x.status[id]))
	}
}

// heard is what the API answered to this tab.
func (x *tab) heard() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.answers)
}

// count says how often the API gave this answer ("POST /auth/refresh 200").
func (x *tab) count(answer string) (n int) {
	for _, a := range x.heard() {
		if a == answer {
			n++
		}
	}
	return n
}

// hears waits until the API has given this answer so many times.
func (x *tab) hears(answer string, times int) {
	x.t.Helper()
	eventually(x.t, 20*time.Second, answer, func() bool { return x.count(answer) >= times })
}

func (x *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	x.t.Helper()
	ctx := x.ctx
	// The first step opens the tab, which ends with its context.
	if chromedp.FromContext(ctx).Target != nil {
		limited, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		ctx = limited
	}
	if err := chromedp.Do(ctx, steps...); err != nil {
		x.t.Fatalf("%v\nanswers of the API: %q", err, x.heard())
	}
}

// js evaluates an expression in the page, and waits for it if it is a promise.
func js[T any](x *tab, expression string) T {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.ctx, 30*time.Second)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		x.t.Fatalf("%s: %v", expression, err)
	}
	return value
}

// until waits for the page to change until the condition holds.
func (x *tab) until(condition string) {
	x.t.Helper()
	if !js[bool](x, `new Promise((resolve) => {
		const visible = (selector, text) => {
			const node = document.querySelector(selector);
			return Boolean(node?.checkVisibility() && node.textContent.includes(text));
		};
		const look = () => { if (`+condition+`) { observer.disconnect(); resolve(true); } };
		const observer = new MutationObserver(look);
		observer.observe(document,
			{ subtree: true, childList: true, characterData: true, attributes: true });
		// Some test has taken setTimeout away.
		AbortSignal.timeout(20_000).addEventListener("abort", () => resolve(false));
		look();
	})`) {
		x.shot("failed")
		x.t.Fatalf("never: %s\nthe page: %s\nanswers of the API: %q",
			condition, js[string](x, `document.body.innerText`), x.heard())
	}
}

// see waits until an element is visible and has the text in it.
func (x *tab) see(selector, text string) {
	x.t.Helper()
	quoted, _ := json.Marshal([]string{selector, text})
	x.until(fmt.Sprintf("visible(...%s)", quoted))
}

func (x *tab) open(address string) {
	x.t.Helper()
	x.do(chromedp.Navigate(address))
}

// fill types into the fields of a form, given as selector and text in turn, and submits it by the
// Enter key.
func (x *tab) fill(fields ...string) {
	x.t.Helper()
	for i := 0; i < len(fields); i += 2 {
		js[string](x, fmt.Sprintf("document.querySelector(%q).value = ''", fields[i]))
		x.do(chromedp.SendKeys(chromedp.CSS(fields[i]), fields[i+1]))
	}
	x.do(chromedp.KeyEvent("\r"))
}

func (x *tab) click(selector string) {
	x.t.Helper()
	x.do(chromedp.Click(chromedp.CSS(selector), chromedp.NodeEnabled))
}

// signup goes all the way from the empty page.
func (x *tab) signup(origin, email string) {
	x.t.Helper()
	x.open(origin)
	x.see("#view-login h1", "Log in")
	x.click("#view-login .aside a")
	x.fill("#signup-email", email, "#signup-password", password)
	x.signedIn(email)
}

func (x *tab) login(origin, email, password string) {
	x.t.Helper()
	x.open(origin)
	x.see("#view-login h1", "Log in")
	x.fill("#login-email", email, "#login-password", password)
	x.signedIn(email)
}

// signedIn waits for the account and the list of sessions, the last that the page asks for.
func (x *tab) signedIn(email string) {
	x.t.Helper()
	x.see("#email", email)
	x.see("#sessions", "This browser")
}

// shot leaves screenshots of this state: a wide light one and a narrow dark one.
func (x *tab) shot(name string) {
	x.t.Helper()
	if err := os.MkdirAll("screenshots", 0o755); err != nil {
		x.t.Fatal(err)
	}
	for _, look := range []struct {
		name, scheme string
		width        int64
	}{{"light", "light", 1000}, {"dark", "dark", 360}} {
		media := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: look.scheme},
		}}
		if _, err := chromedp.Call(x.ctx, emulation.SetEmulatedMedia, media); err != nil {
			x.t.Fatal(err)
		}
		x.do(chromedp.EmulateViewport(look.width, 640))
		png, err := chromedp.Run(x.ctx, chromedp.FullScreenshot(100))
		if err != nil {
			x.t.Fatal(err)
		}
		file := filepath.Join("screenshots", name+"-"+look.name+".png")
		if err := os.WriteFile(file, png, 0o644); err != nil {
			x.t.Fatal(err)
		}
	}
	none := emulation.SetEmulatedMediaParams{}
	if _, err := chromedp.Call(x.ctx, emulation.SetEmulatedMedia, none); err != nil {
		x.t.Fatal(err)
	}
	x.do(chromedp.ResetViewport())
}

// cookie is the refresh cookie as the browser keeps it, or nil.
func (x *tab) cookie(api string) *network.Cookie {
	x.t.Helper()
	of := network.GetCookiesParams{URLs: []string{api + "/auth/refresh"}}
	kept, err := chromedp.Call(x.ctx, network.GetCookies, of)
	if err != nil {
		x.t.Fatal(err)
	}
	for _, c := range kept.Cookies {
		if c.Name == "refreshToken" {
			return c
		}
	}
	return nil
}

func TestBrowserSession(t *testing.T) {
	t.Parallel()
	browser := chromium(t)
	origin, api := site(t, vars{})
	x := newTab(t, browser)

	x.open(origin)
	x.see("#view-login h1", "Log in")
	x.shot("login")
	if focus := js[string](x, `document.activeElement.textContent`); focus != "Log in" {
		t.Errorf("the focus is on %q, not on the heading", focus)
	}

	x.click("#view-login .aside a")
	x.see("#view-signup h1", "Sign up")
	x.fill("#signup-email", "no address", "#signup-password", "short")
	x.until(`visible('#signup-email-error', '') && visible('#signup-password-error', '')`)
	for _, field := range []string{"#signup-email", "#signup-password"} {
		if !js[bool](x, fmt.Sprintf(`(() => { const input = document.querySelector(%q);
			const id = input.getAttribute('aria-describedby').split(' ').at(-1);
			return input.getAttribute('aria-invalid') === 'true' &&
				document.getElementById(id).textContent !== '' })()`, field)) {
			t.Errorf("%s is not marked as wrong, with its error as its description", field)
		}
	}
	if focus := js[string](x, `document.activeElement.id`); focus != "signup-email" {
		t.Errorf("the focus is on %q, not on the first wrong field", focus)
	}
	x.shot("signup-errors")

	x.fill("#signup-email", ada, "#signup-password", password)
	x.signedIn(ada)
	x.shot("account")

	t.Run("the refresh token is out of reach of scripts", func(t *testing.T) {
		kept := js[string](x, `(async () => JSON.stringify([
			document.cookie, { ...localStorage }, { ...sessionStorage },
			await indexedDB.databases(), await cookieStore.getAll(), await caches.keys()]))()`)
		if kept != `["",{},{},[],[],[]]` {
			t.Errorf("scripts find %s", kept)
		}
		c := x.cookie(api)
		if c == nil {
			t.Fatal("there is no refresh cookie")
		}
		if !c.HTTPOnly || !c.Secure || c.SameSite != network.CookieSameSiteStrict ||
			c.Path != "/auth" {
			t.Errorf("the cookie is kept as %+v", c)
		}
	})
	t.Run("every field has a name", func(t *testing.T) {
		bare := js[string](x, `[...document.querySelectorAll('input')].filter((input) =>
			!input.labels.length && !input.ariaLabel).map((input) => input.outerHTML).join()`)
		if bare != "" {
			t.Errorf("no label: %s", bare)
		}
	})

	before := x.cookie(api).Value
	x.do(chromedp.Reload())
	x.signedIn(ada)
	if after := x.cookie(api).Value; after == before {
		t.Error("a reload did not exchange the refresh token")
	}

	other := device(t, browser)
	other.open(origin)
	other.see("#view-login h1", "Log in")
	other.fill("#login-email", ada, "#login-password", "a wrong guess")
	other.see("#login .problem", "Invalid")
	other.shot("login-wrong")
	other.click("#view-login .aside a")
	other.fill("#signup-email", "ADA@example.com", "#signup-password", password)
	other.see("#signup-email-error", "Email already exists")
	other.shot("signup-taken")
	if other.cookie(api) != nil {
		t.Error("a failed login or signup set a cookie")
	}

	x.click("#logout button")
	x.see("#status", "You are logged out.")
	x.shot("logged-out")
	if x.cookie(api) != nil {
		t.Error("the cookie outlives the logout")
	}
	x.do(chromedp.Reload())
	x.see("#view-login h1", "Log in")
}

func TestBrowserTabs(t *testing.T) {
	t.Parallel()
	const life = 2 * time.Second
	browser := chromium(t)
	origin, _ := site(t, vars{"ACCESS_TOKEN_TTL": life.String(), "RATE_LIMIT_MAX": "10000"})
	tabs := []*tab{newTab(t, browser), newTab(t, browser)}
	tabs[0].signup(origin, ada)
	tabs[1].open(origin)
	tabs[1].signedIn(ada)

	refreshes := func(status int) int {
		answer := fmt.Sprintf("POST /auth/refresh %d", status)
		return tabs[0].count(answer) + tabs[1].count(answer)
	}
	both := func(work func(x *tab)) {
		var wg sync.WaitGroup
		for _, x := range tabs {
			wg.Go(func() { work(x) })
		}
		wg.Wait()
	}
	lost := refreshes(401) // by the first page, before there was a cookie
	const rounds = 5
	good := refreshes(200)
	for range rounds {
		time.Sleep(life + 100*time.Millisecond) // for the access tokens of both tabs to expire
		both(func(x *tab) {
			lists := x.count("GET /auth/sessions 200")
			x.click("#refresh button")
			x.hears("GET /auth/sessions 200", lists+1)
		})
	}
	t.Logf("two tabs with expired tokens, %d times: %d refreshes", rounds, refreshes(200)-good)
	if n := refreshes(200) - good; n < rounds {
		t.Errorf("%d refreshes in %d rounds: the tokens had not expired", n, rounds)
	}
	for range rounds {
		both(func(x *tab) {
			x.do(chromedp.Reload())
			x.signedIn(ada)
		})
	}
	if n := refreshes(401) - lost; n > 0 {
		t.Errorf("%d refreshes lost a race, in spite of the lock", n)
	}

	tabs[0].click("#logout button")
	tabs[0].see("#status", "You are logged out.")
	tabs[1].see("#status", "You have been logged out.")
	tabs[1].shot("logged-out-elsewhere")

	tabs[1].fill("#login-email", ada, "#login-password", password)
	both(func(x *tab) { x.signedIn(ada) })
}

// gate stands before the API and, while it is shut, holds the good answers to refreshes back.
type gate struct {
	origin string
	shut   atomic.Bool
	held   chan struct{} // gets one for each answer that is held
	open   func()
}

func newGate(t *testing.T, l net.Listener, api string) *gate {
	t.Helper()
	target, err := url.Parse(api)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan struct{})
	g := &gate{
		origin: originOf(l),
		held:   make(chan struct{}, 10),
		open:   sync.OnceFunc(func() { close(opened) }),
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ModifyResponse = func(res *http.Response) error {
		if g.shut.Load() && res.Request.URL.Path == "/auth/refresh" && res.StatusCode == 200 {
			g.held <- struct{}{}
			<-opened
		}
		return nil
	}
	srv := &http.Server{Handler: proxy}
	go srv.Serve(l)
	t.Cleanup(func() {
		g.open()
		srv.Close()
	})
	return g
}

// stopTimers keeps setTimeout in the pages that the tab loads from now on: what is due by it waits
// in window.timer.
func (x *tab) stopTimers() {
	x.t.Helper()
	script := page.AddScriptToEvaluateOnNewDocumentParams{
		Source: `window.setTimeout = (work) => { window.timer = work; };`,
	}
	if _, err := chromedp.Call(x.ctx, page.AddScriptToEvaluateOnNewDocument, script); err != nil {
		x.t.Fatal(err)
	}
}

// waits waits until something in the page is due by a timer, which the test sets off by timer().
func (x *tab) waits() {
	x.t.Helper()
	eventually(x.t, 20*time.Second, "a page that waits", func() bool {
		return js[bool](x, `"timer" in window`)
	})
}

// Two pages of different origins share the cookie but neither Web Locks nor a channel. The refresh
// of one comes while the answer to the other's, with the new cookie, is under way.
func TestBrowserLostRace(t *testing.T) {
	t.Parallel()
	browser := chromium(t)
	front, l := []net.Listener{listen(t), listen(t)}, listen(t)
	_, api := site(t, vars{
		"FRONTEND_URL":         originOf(front[0]) + "," + originOf(front[1]),
		"REFRESH_REUSE_LEEWAY": "60s",
	})
	g := newGate(t, l, api)
	won, lost := newTab(t, browser), newTab(t, browser)
	lost.stopTimers()
	servePage(t, front[0], g.origin)
	servePage(t, front[1], g.origin)
	won.signup(originOf(front[0]), ada)
	lost.open(originOf(front[1]))
	lost.signedIn(ada)

	g.shut.Store(true)
	won.do(chromedp.Reload())
	<-g.held
	lost.do(chromedp.Reload())
	lost.waits()
	g.open()
	won.signedIn(ada)
	js[chromedp.Void](lost, `timer()`)
	lost.signedIn(ada)
	if n := lost.count("POST /auth/refresh 401"); n != 1 {
		t.Errorf("%d refreshes were refused, want one", n)
	}
}

// A page is left while the answer to its refresh, with the new cookie, is under way: by a reload, a
// link, a closed tab.
func TestBrowserLeftPage(t *testing.T) {
	t.Parallel()
	browser := chromium(t)
	front, l := listen(t), listen(t)
	_, api := site(t, vars{"FRONTEND_URL": originOf(front), "REFRESH_REUSE_LEEWAY": "60s"})
	g := newGate(t, l, api)
	servePage(t, front, g.origin)
	x := newTab(t, browser)
	x.stopTimers()
	x.signup(originOf(front), ada)
	before := x.cookie(api).Value

	g.shut.Store(true)
	x.do(chromedp.Reload())
	<-g.held
	x.see("#view-start", "One moment")
	// It appears after a while.
	js[bool](x, `Promise.all(document.getAnimations().map((each) => each.finished))
		.then(() => true)`)
	x.shot("start")
	x.do(chromedp.Reload())
	x.waits()
	g.open()
	eventually(t, 20*time.Second, "the cookie of the page that was left", func() bool {
		return x.cookie(api).Value != before
	})
	js[chromedp.Void](x, `timer()`)
	x.signedIn(ada)
}

// What a page does when the session it shows is no longer the one of the cookie.
func TestBrowserOtherUser(t *testing.T) {
	t.Parallel()
	const bob = "bob@example.com"
	t.Run("of another user", func(t *testing.T) {
		t.Parallel()
		browser := chromium(t)
		front := []net.Listener{listen(t), listen(t)}
		_, api := site(t, vars{"FRONTEND_URL": originOf(front[0]) + "," + originOf(front[1])})
		servePage(t, front[0], api)
		servePage(t, front[1], api)
		x, other := newTab(t, browser), newTab(t, browser)
		x.signup(originOf(front[0]), ada)
		other.open(originOf(front[1])) // which shares the cookie, but no news
		other.signedIn(ada)
		other.click("#logout button")
		other.see("#status", "You are logged out.")
		left := js[string](other, `['#who', '#view-account']
			.map((id) => document.querySelector(id).innerHTML).join()`)
		if strings.Contains(left, ada) || strings.Contains(left, "This browser") {
			t.Errorf("the page keeps what it knew of the last user: %s", left)
		}
		other.signup(originOf(front[1]), bob)

		x.click("#revoke-all button") // for Ada, and not for Bob
		x.see("#revoke-all .problem", "Somebody else is logged in now")
		x.signedIn(bob)
		other.do(chromedp.Reload())
		other.signedIn(bob)
	})
	t.Run("revoked by another device", func(t *testing.T) {
		t.Parallel()
		browser := chromium(t)
		origin, _ := site(t, vars{})
		tabs, phone := []*tab{newTab(t, browser), newTab(t, browser)}, device(t, browser)
		tabs[0].signup(origin, ada)
		tabs[1].open(origin)
		tabs[1].signedIn(ada)
		phone.login(origin, ada, password)
		phone.click("#revoke-all button")
		phone.see("#status", "You are logged out everywhere.")

		tabs[0].fill("#delete-password", password)
		for _, x := range tabs {
			x.see("#status", "You have been logged out.")
		}
		said := js[string](tabs[0], `document.querySelector('#status').textContent`)
		if strings.Contains(said, "deleted") {
			t.Errorf("of an account that is still there the page says: %s", said)
		}
		tabs[0].login(origin, ada, password)
	})
	t.Run("revoked while the page was in the history", func(t *testing.T) {
		t.Parallel()
		browser := chromium(t)
		origin, _ := site(t, vars{})
		x, phone := newTab(t, browser), device(t, browser)
		x.signup(origin, ada)
		js[bool](x, `window.kept = true`)
		x.open(origin + "/style.css")
		phone.login(origin, ada, password)
		phone.click("#revoke-all button")
		phone.see("#status", "You are logged out everywhere.")
		// There is no load event to wait for where the page comes back as it was left.
		js[bool](x, `history.back(), true`)
		x.hears("POST /auth/refresh 401", 2)
		x.see("#view-login h1", "Log in")
		t.Logf("the page came back as it was left: %v", js[bool](x, `window.kept === true`))
	})
}

func TestBrowserOddAnswers(t *testing.T) {
	t.Parallel()
	x := newTab(t, chromium(t))
	origin, api := site(t, vars{})
	x.signup(origin, ada)
	x.until(`!document.querySelector('#refresh button').disabled`)

	for answer, problem := range map[string]string{
		`'{"sessions": [', { status: 200 }`:             "The server cannot be reached", // cut off
		`'<h1>Bad gateway</h1>', { status: 502 }`:       "HTTP 502",
		`'{"message": "no upstream"}', { status: 502 }`: "HTTP 502",
		`'null', { status: 500 }`:                       "HTTP 500",
	} {
		js[bool](x, `window.real ??= window.fetch,
			window.fetch = async () => new Response(`+answer+`), true`)
		x.do(chromedp.Focus(chromedp.CSS("#refresh button")), chromedp.KeyEvent("\r"))
		x.see("#refresh .problem", problem)
		x.until(`!document.querySelector('#refresh button').disabled`)
	}
	js[bool](x, `window.fetch = window.real, true`)
	x.do(chromedp.Focus(chromedp.CSS("#refresh button")), chromedp.KeyEvent("\r"))
	x.see("#status", "The list is up to date.")
	if !js[bool](x, `document.activeElement === document.querySelector('#refresh button')`) {
		t.Error("the button that was pressed has lost the focus")
	}

	if got := js[string](x, fmt.Sprintf(`(async () => {
		addEventListener('error', (event) => event.preventDefault()); // not for the console
		const auth = (await import('./auth.js')).createAuth({ baseURL: %q });
		const heard = [];
		auth.onchange(() => { throw new Error('of a listener'); });
		auth.onchange((user) => heard.push(user?.email));
		const { email } = await auth.resume();
		return [email, ...heard].join();
	})()`, api)); got != ada+","+ada {
		t.Errorf("with a listener that throws: %s", got)
	}
}

func TestBrowserDevices(t *testing.T) {
	t.Parallel()
	browser := chromium(t)
	origin, api := site(t, vars{})
	laptop, phone := device(t, browser), device(t, browser)
	const agent = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_3 like Mac OS X) AppleWebKit/605.1.15 " +
		"(KHTML, like Gecko) Version/18.3 Mobile/15E148 Safari/604.1"
	override := emulation.SetUserAgentOverrideParams{UserAgent: agent}
	if _, err := chromedp.Call(phone.ctx, emulation.SetUserAgentOverride, override); err != nil {
		t.Fatal(err)
	}
	laptop.signup(origin, ada)

	phone.login(origin, ada, password)
	laptop.click("#refresh button")
	laptop.see("#sessions", "Safari on iPhone")
	laptop.shot("sessions")
	laptop.click("#sessions button")
	laptop.see("#status", "Safari on iPhone has been logged out.")
	laptop.shot("session-revoked")
	phone.click("#refresh button")
	phone.see("#status", "You have been logged out.")
	if phone.cookie(api) != nil {
		t.Error("the cookie outlives its session")
	}

	phone.login(origin, ada, password)
	laptop.fill("#current-password", "a wrong guess", "#new-password", "short")
	laptop.see("#new-password-error", "")
	laptop.shot("password-errors")
	const changed = "staple of the house"
	laptop.fill("#current-password", "a wrong guess", "#new-password", changed)
	laptop.see("#current-password-error", "This is not your password")
	laptop.fill("#current-password", password, "#new-password", changed)
	laptop.see("#status", "Your password is changed")
	laptop.shot("password-changed")
	phone.do(chromedp.Reload())
	phone.see("#view-login h1", "Log in")
	phone.fill("#login-email", ada, "#login-password", password)
	phone.see("#login .problem", "Invalid")
	phone.login(origin, ada, changed)
	laptop.do(chromedp.Reload())
	laptop.signedIn(ada)

	phone.click("#revoke-all button")
	phone.see("#status", "You are logged out everywhere.")
	laptop.click("#refresh button")
	laptop.see("#status", "You have been logged out.")

	laptop.login(origin, ada, changed)
	laptop.fill("#delete-password", "a wrong guess")
	laptop.see("#delete-password-error", "This is not your password")
	laptop.shot("delete-wrong")
	laptop.fill("#delete-password", changed)
	laptop.see("#status", "Your account is deleted.")
	laptop.shot("deleted")
	laptop.fill("#login-email", ada, "#login-password", changed)
	laptop.see("#login .problem", "Invalid")
}

// The same page from a third origin, in the browser of a user who is logged in. To the browser it
// is the same site, so that it sends the cookie along, and only the server can refuse.
func TestBrowserOtherOrigin(t *testing.T) {
	t.Parallel()
	browser := chromium(t)
	origin, api := site(t, vars{})
	foreign := listen(t)
	servePage(t, foreign, api)
	x := newTab(t, browser)
	x.signup(origin, ada)
	before := x.cookie(api).Value

	evil := newTab(t, browser)
	evil.open(originOf(foreign))
	evil.see("#resume .problem", "The server cannot be reached")
	evil.shot("other-origin")
	evil.hears("POST /auth/refresh 403", 1)

	// What needs no preflight leaves the browser; the script may not see the answer.
	if kind := js[string](evil, fmt.Sprintf(
		`fetch(%q, { method: 'POST', mode: 'no-cors', credentials: 'include' })
			.then((r) => r.type)`, api+"/auth/logout")); kind != "opaque" {
		t.Errorf("the answer to another origin is %s", kind)
	}
	evil.hears("POST /auth/logout 403", 1)

	// What needs one does not.
	for _, request := range []string{
		`'/auth/login',
			{ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: '{}' }`,
		`'/auth/sessions', { method: 'DELETE' }`,
		`'/auth/me', { headers: { Authorization: 'Bearer x' } }`,
	} {
		got := js[string](evil, fmt.Sprintf(`((path, init) =>
			fetch(%q + path, { ...init, credentials: 'include' })
				.then((r) => 'status ' + r.status, (e) => e.name))(%s)`, api, request))
		if got != "TypeError" {
			t.Errorf("%s from another origin: %s", request, got)
		}
	}
	for _, answer := range evil.heard() {
		if !strings.HasPrefix(answer, "OPTIONS ") && !strings.HasSuffix(answer, " 403") {
			t.Errorf("another origin got through: %s", answer)
		}
	}

	if x.cookie(api).Value != before {
		t.Error("another origin changed the cookie")
	}
	x.do(chromedp.Reload())
	x.signedIn(ada)
}

func TestBrowserLimits(t *testing.T) {
	t.Parallel()
	t.Run("too many requests", func(t *testing.T) {
		t.Parallel()
		x := newTab(t, chromium(t))
		origin, _ := site(t, vars{"RATE_LIMIT_MAX": "8", "RATE_LIMIT_WINDOW": "15"})
		x.signup(origin, ada) // refresh, signup, me, sessions
		for range 20 {
			x.until(`!document.querySelector('#refresh button').disabled`)
			x.click("#refresh button")
			x.until(`visible('#refresh .problem', 'Try again in ') ||
				!document.querySelector('#refresh button').disabled`)
			if js[string](x, `document.querySelector('#refresh .problem').textContent`) != "" {
				break
			}
		}
		x.see("#refresh .problem", "Try again in ")
		x.see("#refresh button", "(in ")
		if !js[bool](x, `document.querySelector('#refresh button').disabled`) {
			t.Error("the button does not wait")
		}
		wait := js[int](x, `Number(document.querySelector('#refresh .problem').textContent
			.match(/Try again in ([0-9]+) s/)[1])`)
		if wait < 1 || wait > 15 {
			t.Errorf("the page read Retry-After as %d", wait)
		}
		x.shot("too-many-requests")
		x.until(`!document.querySelector('#refresh button').disabled`)
		lists := x.count("GET /auth/sessions 200")
		x.click("#refresh button")
		x.hears("GET /auth/sessions 200", lists+1)
	})
	t.Run("too many wrong passwords", func(t *testing.T) {
		t.Parallel()
		x := newTab(t, chromium(t))
		origin, _ := site(t, vars{"LOGIN_LIMIT_MAX": "2"})
		x.open(origin)
		x.see("#view-login h1", "Log in")
		for range 2 {
			x.fill("#login-email", ada, "#login-password", "a wrong guess")
			x.see("#login .problem", "Invalid")
		}
		x.fill("#login-email", ada, "#login-password", "a wrong guess")
		x.see("#login .problem", "Try again in 15 min")
		x.shot("too-many-attempts")
		x.fill("#login-email", "grace@example.com", "#login-password", "a wrong guess")
		x.see("#login .problem", "Invalid") // another account has a limit of its own
	})
}
