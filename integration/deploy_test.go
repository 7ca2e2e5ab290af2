package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// example returns a file of examples/deploy, with each old text replaced by the new one that
// follows it. The old ones must be in the file.
func example(t *testing.T, name string, oldNew ...string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("../examples/deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			t.Fatalf("there is no %q in %s", oldNew[i], name)
		}
		text = strings.ReplaceAll(text, oldNew[i], oldNew[i+1])
	}
	return text
}

// A front is an nginx with the configuration of examples/deploy.
type front struct {
	dir   string
	plain string // the address of the port for http
	tls   string // the address of the port for https
	url   string // the origin to which the certificate belongs
	files map[string][]byte
}

// nginxConf does what the main configuration of a distribution does, and includes the example.
const nginxConf = `
daemon off;
master_process off;
pid DIR/pid;
error_log DIR/error.log info;
events {}
http {
	access_log off;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	upstream replicas { SERVERS }
	include DIR/latchkey.conf;
}
`

// startNginx starts an nginx with these certificates in front of servers, each given as a host
// with a port, and stops it when the test ends.
func startNginx(t *testing.T, files map[string][]byte, servers ...string) *front {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		program, err = exec.LookPath("/usr/sbin/nginx")
	}
	if err != nil {
		t.Skip("there is no nginx here: scripts/install-service nginx installs it")
	}
	plain, tls := freePort(t), freePort(t)
	f := &front{
		dir:   t.TempDir(),
		plain: "127.0.0.1:" + plain,
		tls:   "127.0.0.1:" + tls,
		url:   "https://localhost:" + tls,
		files: files,
	}
	replicas := ""
	for _, server := range servers {
		replicas += "server " + server + " max_fails=0; "
	}
	for name, content := range map[string]string{
		"fullchain.pem": string(f.files["cert.pem"]),
		"privkey.pem":   string(f.files["key.pem"]),
		"nginx.conf":    strings.NewReplacer("DIR", f.dir, "SERVERS", replicas).Replace(nginxConf),
		"latchkey.conf": example(t, "nginx.conf",
			"listen 80;", "listen "+f.plain+";",
			"listen [::]:80;", "",
			"listen 443 ssl", "listen "+f.tls+" ssl",
			"listen [::]:443 ssl http2;", "",
			"server:3000", "replicas",
			"/etc/nginx/tls", f.dir,
			"/var/log/nginx", f.dir,
			"/var/www/acme", f.dir+"/acme"),
	} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.run(t, program)
	return f
}

func (f *front) run(t *testing.T, program string) {
	t.Helper()
	var output bytes.Buffer
	nginx := exec.Command(program, "-c", filepath.Join(f.dir, "nginx.conf"))
	nginx.Env = append(os.Environ(), "TZ=UTC") // as the configuration wants it
	nginx.Stdout = &output
	nginx.Stderr = &output
	if err := nginx.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nginx.Process.Signal(syscall.SIGTERM)
		if err := nginx.Wait(); err != nil || t.Failed() {
			t.Errorf("nginx ended with %v\n%s\n%s", err, output.String(), f.log("error.log"))
		}
	})
	eventually(t, 10*time.Second, "nginx listens", func() bool {
		conn, err := net.Dial("tcp", f.tls)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func (f *front) log(name string) string {
	content, _ := os.ReadFile(filepath.Join(f.dir, name))
	return string(content)
}

// trust is a TLS configuration that trusts the CA of this front and no other.
func (f *front) trust() *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(f.files["ca.pem"])
	return &tls.Config{RootCAs: roots, ServerName: "localhost"}
}

// A visitor is a client with an address of its own, who keeps cookies as a browser does.
type visitor struct {
	t    *testing.T
	http *http.Client
}

func (f *front) visitor(t *testing.T, ip string) *visitor {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		TLSClientConfig:   f.trust(),
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp4", addr)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &visitor{t: t, http: &http.Client{
		Jar:       jar,
		Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
	}}
}

// An answer is what nginx or the server behind it has answered.
type answer struct {
	*http.Response
	text string
}

// ask sends a request whose headers are given as name and value in turn.
func (v *visitor) ask(method, url, body string, headers ...string) answer {
	v.t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		v.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := v.http.Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return answer{resp, string(text)}
}

var uuid = regexp.MustCompile(
	`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// problem asserts that an answer is an error in the form of the contract.
func (a answer) problem(t *testing.T, status int, code string) {
	t.Helper()
	var body struct {
		Error      string `json:"error"`
		StatusCode int    `json:"statusCode"`
		RequestID  string `json:"requestId"`
		Timestamp  string `json:"timestamp"`
		Code       string `json:"code"`
	}
	decoder := json.NewDecoder(strings.NewReader(a.text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&body)
	_, notUTC := time.Parse("2006-01-02T15:04:05Z", body.Timestamp)
	if err != nil || a.StatusCode != status || body.StatusCode != status || body.Code != code ||
		body.Error == "" || !uuid.MatchString(body.RequestID) || notUTC != nil {
		t.Errorf("%d %s, want %d %s in the form of an error", a.StatusCode, a.text, status, code)
	}
	if a.Header.Get("X-Request-Id") != body.RequestID ||
		a.Header.Get("Content-Type") != "application/json; charset=utf-8" ||
		a.Header.Get("Cache-Control") != "no-store" ||
		a.Header.Get("Strict-Transport-Security") == "" ||
		(a.Header.Get("Retry-After") != "") != (status == 429 || status == 503) {
		t.Errorf("%d %s has the headers %v", status, code, a.Header)
	}
}

// TestDeployNginx is the nginx of examples/deploy in front of the image.
func TestDeployNginx(t *testing.T) {
	t.Parallel()
	server := serve(t, vars{"TRUSTED_PROXIES": "127.0.0.1/32", "RATE_LIMIT_MAX": "20"})
	f := startNginx(t, certificates(t), strings.TrimPrefix(server, "http://"))
	t.Run("session", f.testSession)
	t.Run("rate limit", f.testRateLimit)
	t.Run("plain http", f.testPlainHTTP)
	t.Run("private routes", f.testPrivateRoutes)
	t.Run("sizes", f.testSizes)
	t.Run("connections", f.testConnections)
}

// testSession is a user over https. The cookie is secure, and the user's address is that of the
// connection, whatever the user claims.
func (f *front) testSession(t *testing.T) {
	ada := f.visitor(t, "127.0.0.2")
	const id = "4f0f6a3e-7f3b-4c55-9d0c-0f4c5a3f2b11"
	signup := ada.ask("POST", f.url+"/auth/signup",
		`{"email":"ada@example.com","password":"correct horse"}`,
		"X-Forwarded-For", "198.51.100.7", "X-Request-Id", id)
	if signup.StatusCode != 201 || signup.ProtoMajor != 2 {
		t.Fatalf("%s %d %s", signup.Proto, signup.StatusCode, signup.text)
	}
	if got := signup.Header.Get("Strict-Transport-Security"); got != "max-age=31536000" {
		t.Errorf("Strict-Transport-Security is %q", got)
	}
	if got := signup.Header.Get("X-Request-Id"); got != id {
		t.Errorf("X-Request-Id %s became %s", id, got)
	}
	line := " " + id + ` "POST /auth/signup HTTP/2.0" 201`
	eventually(t, 5*time.Second, "the log of nginx has "+line, func() bool {
		return strings.Contains(f.log("access.log"), line)
	})
	cookies := signup.Cookies()
	if len(cookies) != 1 || !cookies[0].Secure || !cookies[0].HttpOnly {
		t.Errorf("the cookie is %v", cookies)
	}

	refresh := ada.ask("POST", f.url+"/auth/refresh", "")
	var tokens struct{ AccessToken string }
	err := json.Unmarshal([]byte(refresh.text), &tokens)
	if err != nil || refresh.StatusCode != 200 {
		t.Fatalf("the cookie gets %d %s", refresh.StatusCode, refresh.text)
	}
	sessions := ada.ask("GET", f.url+"/auth/sessions", "",
		"Authorization", "Bearer "+tokens.AccessToken, "X-Forwarded-For", "198.51.100.7")
	if !strings.Contains(sessions.text, `"ip":"127.0.0.2"`) {
		t.Errorf("the address of 127.0.0.2 is not in %s", sessions.text)
	}
}

// testRateLimit is "the limit follows the client's address, which nobody can forge".
func (f *front) testRateLimit(t *testing.T) {
	flood := f.visitor(t, "127.0.0.3")
	limited := false
	for i := range 30 {
		forged := fmt.Sprint("198.51.100.", i)
		a := flood.ask("GET", f.url+"/auth/me", "", "X-Forwarded-For", forged)
		if a.StatusCode == 429 {
			a.problem(t, 429, "rate_limited")
			limited = true
			break
		}
	}
	if !limited {
		t.Error("a client gets past the limit if it claims another address for each request")
	}
	other := f.visitor(t, "127.0.0.4").ask("GET", f.url+"/auth/me", "")
	other.problem(t, 401, "missing_token")
}

// testPlainHTTP is "http leads to https, but for the files that prove whose name it is".
func (f *front) testPlainHTTP(t *testing.T) {
	v := f.visitor(t, "127.0.0.5")
	a := v.ask("POST", "http://"+f.plain+"/auth/login?x=1", "{}")
	want := "https://127.0.0.1/auth/login?x=1"
	if a.StatusCode != 301 || a.Header.Get("Location") != want {
		t.Errorf("http gets %d to %q, want 301 to %q", a.StatusCode, a.Header.Get("Location"), want)
	}
	const file = "/.well-known/acme-challenge/proof"
	path := filepath.Join(f.dir, "acme", file)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("it is ours"), 0o600); err != nil {
		t.Fatal(err)
	}
	if a := v.ask("GET", "http://"+f.plain+file, ""); a.text != "it is ours" {
		t.Errorf("%s is %d %s", file, a.StatusCode, a.text)
	}
	v.ask("GET", "http://"+f.tls+"/auth/me", "").problem(t, 400, "bad_request")
}

// testPrivateRoutes is "what is not below /auth/ is not public, however it is spelt".
func (f *front) testPrivateRoutes(t *testing.T) {
	v := f.visitor(t, "127.0.0.6")
	for _, path := range []string{
		"/", "/healthz", "/readyz", "/metrics", "//readyz", "/readyz/", "/auth/../readyz",
		"/auth/%2e%2e/readyz", "/auth%2f..%2freadyz", "/auth", "/error",
	} {
		v.ask("GET", f.url+path, "").problem(t, 404, "not_found")
	}
	v.ask("GET", f.url+"/readyz/../auth/x", "").problem(t, 404, "not_found")
	v.ask("TRACE", f.url+"/auth/me", "").problem(t, 405, "method_not_allowed")
}

// testSizes is "what is too large gets an error in the usual form, and what is not is passed on".
func (f *front) testSizes(t *testing.T) {
	const most = 100 * 1024
	v := f.visitor(t, "127.0.0.7")
	body := `{"email":"ada@example.com","password":"wrong"}`
	body += strings.Repeat(" ", most-len(body))
	v.ask("POST", f.url+"/auth/login", body).problem(t, 401, "invalid_credentials")
	if log := f.log("error.log"); strings.Contains(log, "temporary file") {
		t.Errorf("nginx has written a body to the disk: %s", log)
	}
	v.ask("POST", f.url+"/auth/login", body+" ").problem(t, 413, "body_too_large")

	v.ask("GET", f.url+"/auth/me", "", "X-Long", strings.Repeat("x", 7<<10)).
		problem(t, 401, "missing_token")
	long := strings.Repeat("x", 9<<10)
	// By HTTP/2 nginx ends the connection.
	old := &visitor{t, &http.Client{Transport: &http.Transport{TLSClientConfig: f.trust()}}}
	old.ask("GET", f.url+"/auth/me", "", "X-Long", long).problem(t, 431, "headers_too_large")
	old.ask("GET", f.url+"/auth/"+long, "").problem(t, 431, "headers_too_large")
}

// testConnections is "one address can hold 50 requests open and no more".
func (f *front) testConnections(t *testing.T) {
	dialer := tls.Dialer{
		NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 8)}},
		Config:    f.trust(),
	}
	for range 50 {
		conn, err := dialer.DialContext(t.Context(), "tcp4", f.tls)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, "POST /auth/login HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n")
		// Now nginx has read the headers, and waits for the body.
		line, err := bufio.NewReader(conn).ReadString('\n')
		if !strings.HasPrefix(line, "HTTP/1.1 100 ") {
			t.Fatalf("%q %v", line, err)
		}
	}
	f.visitor(t, "127.0.0.8").ask("GET", f.url+"/auth/me", "").problem(t, 429, "rate_limited")
	f.visitor(t, "127.0.0.9").ask("GET", f.url+"/auth/me", "").problem(t, 401, "missing_token")
}

// TestDeployNginxAlone is "nginx without a server answers as a server without its stores does, and a
// frontend on another origin can read that".
func TestDeployNginxAlone(t *testing.T) {
	t.Parallel()
	const origin = "https://app.example.com"
	f := startNginx(t, certificates(t), "127.0.0.1:"+freePort(t))
	a := f.visitor(t, "127.0.0.2").ask("POST", f.url+"/auth/login", "{}", "Origin", origin)
	a.problem(t, 503, "unavailable")
	if a.Header.Get("Access-Control-Allow-Origin") != origin ||
		a.Header.Get("Access-Control-Allow-Credentials") != "true" ||
		a.Header.Get("Access-Control-Expose-Headers") != "X-Request-Id, Retry-After" ||
		a.Header.Get("Vary") != "Origin" {
		t.Errorf("another origin cannot read an answer with the headers %v", a.Header)
	}
}

// TestDeployNginxOnce is "of the requests whose answers are lost, only a GET is sent again".
func TestDeployNginxOnce(t *testing.T) {
	t.Parallel()
	var sent atomic.Int64
	mute := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		sent.Add(1)
		panic(http.ErrAbortHandler) // It closes the connection.
	}))
	t.Cleanup(mute.Close)
	replica := mute.Listener.Addr().String()
	f := startNginx(t, certificates(t), replica, replica)
	v := f.visitor(t, "127.0.0.2")
	for method, want := range map[string]int64{"GET": 2, "POST": 1, "PUT": 1, "DELETE": 1} {
		sent.Store(0)
		v.ask(method, f.url+"/auth/me", "").problem(t, 503, "unavailable")
		if got := sent.Load(); got != want {
			t.Errorf("%s is sent %d times, want %d", method, got, want)
		}
	}
}

// TestDeployBrowser is the browser tests once more, with pages that are served over https and call
// the server through nginx. It is not parallel, since a test that starts a container changes the
// network, and Chromium then drops its HTTP/2 connections.
func TestDeployBrowser(t *testing.T) {
	tests, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), tests, "-nginx",
		"-test.run=^TestBrowser", "-test.v", "-test.timeout=10m").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, missing := range []string{"THE BROWSER TESTS DID NOT RUN", "there is no nginx"} {
		if strings.Contains(string(out), missing) {
			t.Skipf("%s", out)
		}
	}
	if !strings.Contains(string(out), "--- PASS: TestBrowserSession") {
		t.Errorf("the browser tests did not run: %s", out)
	}
}
