package clients

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// TestReact is a user of the React app in two tabs of a real Chromium. The app comes from one
// origin and calls the server at another, as in life.
func TestReact(t *testing.T) {
	needNPM(t)
	browser := chromium(t)
	built := t.TempDir()
	app := httptest.NewServer(http.FileServer(http.Dir(built)))
	t.Cleanup(app.Close)
	api := serve(t, "FRONTEND_URL="+app.URL, "RATE_LIMIT_MAX=0")
	run(t, "react", []string{"VITE_API_URL=" + api},
		"../node_modules/.bin/vite", "build", "--outDir", built, "--emptyOutDir")

	email, password := newEmail(), "correct horse battery"
	body := fmt.Sprintf(`{"email": %q, "password": %q}`, email, password)
	res, err := http.Post(api+"/auth/signup", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()

	first := open(t, browser, app.URL)
	first.see("h1", "Log in")
	first.fill("[type=password]", "a wrong guess")
	first.fill("[type=email]", email)
	first.click("button")
	first.see("[role=alert]", "Invalid credentials")
	first.see("[type=email]", email)
	first.fill("[type=password]", password)
	first.click("button")
	first.see("h1", email)
	first.do(chromedp.Reload())
	first.see("h1", email)

	second := open(t, browser, app.URL)
	second.see("h1", email)
	second.click("button")
	second.see("h1", "Log in")
	first.see("h1", "Log in")
	second.do(chromedp.Reload())
	second.see("h1", "Log in")
}

// TestReadme compares the lines for React in the README with those that the app is built from.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	lines, err := os.ReadFile("react/src/user.ts")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), "\n```ts\n"+string(lines)+"```\n") {
		t.Error("README.md does not show react/src/user.ts as it is")
	}
}

// chromium starts a browser with an empty profile.
func chromium(t *testing.T) context.Context {
	t.Helper()
	browser, _ := chromedp.NewContext(context.Background(), chromedp.WithAllocatorOptions(
		chromedp.DisableGPU, chromedp.Flag("disable-component-update", true)))
	err := chromedp.Do(browser)
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("THE REACT APP WAS NOT TRIED: no Chromium (Debian: apt-get install chromium)")
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

// A tab is one tab of a browser.
type tab struct {
	t   *testing.T
	ctx context.Context
}

// open opens a page in another tab. An exception in it fails the test.
func open(t *testing.T, browser context.Context, url string) *tab {
	t.Helper()
	x := &tab{t: t}
	x.ctx, _ = chromedp.NewContext(browser, chromedp.WithListener(func(event any) {
		if e, ok := event.(*runtime.EventExceptionThrown); ok {
			details := e.ExceptionDetails
			t.Errorf("an exception in the page: %s %s", details.Text, details.Exception.Description)
		}
	}))
	// The tab lives as long as the context of its first action.
	if err := chromedp.Do(x.ctx, chromedp.Navigate(url)); err != nil {
		t.Fatal(err)
	}
	return x
}

// do runs an action in the tab, which must succeed.
func (x *tab) do(action chromedp.Action[chromedp.Void]) {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.ctx, 20*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, action); err != nil {
		text, _ := chromedp.Run(x.ctx, chromedp.Evaluate[string](`document.body.innerText`))
		x.t.Fatalf("%v\nthe page: %s", err, text)
	}
}

// see waits until an element has the text in it, or the value.
func (x *tab) see(selector, text string) {
	x.t.Helper()
	x.do(chromedp.Poll[chromedp.Void](fmt.Sprintf(`(() => {
		const node = document.querySelector(%q);
		return node && (node.value ?? node.textContent).includes(%q);
	})()`, selector, text)))
}

// fill types into a field, in place of what is in it.
func (x *tab) fill(selector, text string) {
	x.t.Helper()
	x.do(chromedp.Clear(chromedp.CSS(selector)))
	x.do(chromedp.SendKeys(chromedp.CSS(selector), text))
}

func (x *tab) click(selector string) {
	x.t.Helper()
	x.do(chromedp.Click(chromedp.CSS(selector + ":not(:disabled)")))
}
