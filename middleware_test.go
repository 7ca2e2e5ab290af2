package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/token"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func prefixes(t testing.TB, cidrs ...string) (list []netip.Prefix) {
	t.Helper()
	for _, cidr := range cidrs {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, prefix)
	}
	return list
}

func TestClientIPOfHeader(t *testing.T) {
	trusted := prefixes(t, "10.0.0.0/8", "192.0.2.7/32", "fd00::/8", "fe80::/10")
	const proxy = "10.0.0.1:4711"
	for _, test := range []struct {
		name, peer string
		forwarded  []string
		want       string
	}{
		{"no header", "203.0.113.9:80", nil, "203.0.113.9"},
		{"no header from a proxy", proxy, nil, "10.0.0.1"},
		{"untrusted peer", "203.0.113.9:80", []string{"198.51.100.1"}, "203.0.113.9"},
		{"untrusted peer that names a proxy", "203.0.113.9:80", []string{"198.51.100.1, 10.0.0.1"}, "203.0.113.9"},
		{"trusted peer", proxy, []string{"198.51.100.1"}, "198.51.100.1"},
		{"single trusted address", "192.0.2.7:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"its neighbour", "192.0.2.8:1", []string{"198.51.100.1"}, "192.0.2.8"},
		{"from the right", proxy, []string{"198.51.100.1, 198.51.100.2"}, "198.51.100.2"},
		{"past trusted hops", proxy, []string{"198.51.100.1, 198.51.100.2, 10.9.9.9,10.8.8.8"}, "198.51.100.2"},
		{"all trusted", proxy, []string{"10.3.3.3, 10.2.2.2"}, "10.3.3.3"},
		{"several lines", proxy, []string{"198.51.100.1, 198.51.100.2", "10.2.2.2"}, "198.51.100.2"},
		{"untrusted last line", proxy, []string{"198.51.100.1", "198.51.100.2"}, "198.51.100.2"},
		{"no spaces, tabs", proxy, []string{"198.51.100.1,\t198.51.100.2\t , 10.2.2.2 "}, "198.51.100.2"},

		{"garbage last", proxy, []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		{"garbage in between", proxy, []string{"198.51.100.1, unknown, 10.2.2.2"}, "10.2.2.2"},
		{"garbage left of the client", proxy, []string{"unknown, 198.51.100.1"}, "198.51.100.1"},
		{"empty header", proxy, []string{""}, "10.0.0.1"},
		{"empty entry last", proxy, []string{"198.51.100.1,"}, "10.0.0.1"},
		{"empty entry in between", proxy, []string{"198.51.100.1,,10.2.2.2"}, "10.2.2.2"},
		{"empty last line", proxy, []string{"198.51.100.1", ""}, "10.0.0.1"},
		{"a port", proxy, []string{"198.51.100.1, 198.51.100.2:80"}, "10.0.0.1"},
		{"a port, IPv6", proxy, []string{"198.51.100.1, [2001:db8::1]:80"}, "10.0.0.1"},
		{"brackets", proxy, []string{"[2001:db8::1]"}, "10.0.0.1"},
		{"CIDR", proxy, []string{"198.51.100.0/24"}, "10.0.0.1"},
		{"octal", proxy, []string{"198.51.100.010"}, "10.0.0.1"},
		{"short", proxy, []string{"198.51.100"}, "10.0.0.1"},
		{"quoted", proxy, []string{`"198.51.100.1"`}, "10.0.0.1"},
		{"no-break space", proxy, []string{"\u00a0198.51.100.1"}, "10.0.0.1"},

		{"IPv6", proxy, []string{"2001:DB8::1"}, "2001:db8::1"},
		{"trusted IPv6 peer", "[fd00::1]:80", []string{"198.51.100.1, fd12::3"}, "198.51.100.1"},
		{"trusted peer, IPv4 in IPv6", "[::ffff:10.0.0.1]:80", []string{"198.51.100.1"}, "198.51.100.1"},
		{"untrusted peer, IPv4 in IPv6", "[::ffff:203.0.113.9]:80", []string{"198.51.100.1"}, "203.0.113.9"},
		{"client, IPv4 in IPv6", proxy, []string{"::ffff:198.51.100.1"}, "198.51.100.1"},
		{"client, IPv4 in IPv6, as hexadecimal", proxy, []string{"::ffff:c633:6401"}, "198.51.100.1"},
		{"hop, IPv4 in IPv6", proxy, []string{"198.51.100.1, ::ffff:10.2.2.2"}, "198.51.100.1"},
		{"zone of the peer", "[fe80::1%eth0]:80", []string{"198.51.100.1"}, "198.51.100.1"},
		{"zone of the peer, no header", "[fe80::1%eth0]:80", nil, "fe80::1"},
		{"zone of the client", proxy, []string{"2001:db8::1%25"}, "2001:db8::1"}, // or one host had any number of addresses
		{"zone of a hop", proxy, []string{"198.51.100.1, fe80::2%eth1"}, "198.51.100.1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := clientIP(test.peer, test.forwarded, trusted); got.String() != test.want {
				t.Errorf("clientIP = %v, want %s", got, test.want)
			}
			if got := clientIP(test.peer, test.forwarded, nil); got != clientIP(test.peer, nil, nil) {
				t.Errorf("nobody is trusted, and clientIP = %v", got)
			}
		})
	}
}

// Whatever the header says, the client is the peer or an address that stands in it, and the peer if that is not trusted.
func FuzzClientIP(f *testing.F) {
	f.Add("10.0.0.1:80", "198.51.100.1, 10.0.0.2", "10.0.0.0/8")
	f.Add("[::ffff:10.0.0.1]:80", "::ffff:198.51.100.1,\n10.0.0.2", "10.0.0.0/8")
	f.Add("[fe80::1%eth0]:80", "2001:db8::1%x\n,", "fe80::/10")
	f.Add("198.51.100.1:80", "unknown, 198.51.100.2:80", "0.0.0.0/0")
	f.Add("", "1.2.3.4", "::/0")
	f.Fuzz(func(t *testing.T, peer, header, cidr string) {
		var trusted []netip.Prefix
		if prefix, err := netip.ParsePrefix(cidr); err == nil {
			trusted = append(trusted, prefix)
		}
		got := clientIP(peer, strings.Split(header, "\n"), trusted)

		addrPort, _ := netip.ParseAddrPort(peer)
		self := addrPort.Addr().Unmap().WithZone("")
		if got == self {
			return
		}
		if len(trusted) == 0 || !trusted[0].Contains(self) {
			t.Fatalf("clientIP(%q, %q) = %v, and only %v is trusted", peer, header, got, trusted)
		}
		for _, hop := range strings.FieldsFunc(header, func(r rune) bool { return r == ',' || r == '\n' }) {
			if ip, err := netip.ParseAddr(strings.Trim(hop, " \t")); err == nil && ip.Unmap().WithZone("") == got {
				return
			}
		}
		t.Fatalf("clientIP(%q, %q) = %v, which is nowhere in them", peer, header, got)
	})
}

func TestUUID(t *testing.T) {
	for s, want := range map[string]bool{
		"00000000-0000-0000-0000-000000000000":     true,
		"ffffffff-ffff-ffff-ffff-ffffffffffff":     true,
		"0a1b2c3d-4E5F-6789-abCD-ef0123456789":     true,
		"":                                         false,
		"0a1b2c3d4e5f6789abcdef0123456789":         false,
		"0a1b2c3d-4e5f-6789-abcd-ef012345678":      false,
		"0a1b2c3d-4e5f-6789-abcd-ef01234567890":    false,
		"0a1b2c3d-4e5f-6789-abcd-ef012345678g":     false,
		"0a1b2c3d-4e5f-6789-abcd-ef012345678\n":    false,
		"0a1b2c3d-4e5f-6789abcd--ef0123456789":     false,
		"0a1b2c3d04e5f-6789-abcd-ef0123456789":     false,
		"-a1b2c3d-4e5f-6789-abcd-ef0123456789":     false,
		"{0a1b2c3d-4e5f-6789-abcd-ef0123456789}":   false,
		"{a1b2c3d-4e5f-6789-abcd-ef012345678}":     false,
		"urn:uuid:0a1b2c3d-4e5f-6789-abcd-ef01234": false,
		"０a1b2c3d-4e5f-6789-abcd-ef0123456":        false, // 36 bytes with a full-width zero
	} {
		if isUUID(s) != want {
			t.Errorf("isUUID(%q) = %v", s, !want)
		}
	}
	seen := map[string]bool{}
	for range 1000 {
		id := newUUID()
		if !isUUID(id) || id[14] != '4' || !strings.Contains("89ab", id[19:20]) || seen[id] {
			t.Fatalf("newUUID = %s, want a new one of version 4 (RFC 9562)", id)
		}
		seen[id] = true
	}
}

// observed gives requests to h what observe knows of them.
func observed(h http.Handler) http.Handler {
	return observe(slog.New(slog.DiscardHandler), newMetrics(nil), nil)(h)
}

func TestObserveRequestID(t *testing.T) {
	const own = "0A1B2C3D-4e5f-6789-abcd-ef0123456789"
	h := observed(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, aboutRequest(r).id) }))
	for _, given := range []string{own, "", "1", own + "0", own[:35] + "\x00", "<script>"} {
		r, w := httptest.NewRequest("GET", "/", nil), httptest.NewRecorder()
		r.Header.Set("X-Request-Id", given)
		h.ServeHTTP(w, r)
		id := w.Header().Get("X-Request-Id")
		if id != w.Body.String() || !isUUID(id) || (id == given) != (given == own) {
			t.Errorf("X-Request-Id %q became %q, and %q for the handlers", given, id, w.Body)
		}
	}
}

// A panic is a 500 like any other. What it was, and where, is in the log, under the id that the client was told.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	panics := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("the secret cause") })
	h := observe(slog.New(slog.NewJSONHandler(&log, nil)), newMetrics(nil), nil)(panics)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/auth/me", nil))

	var body map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatal(err)
	}
	id := w.Header().Get("X-Request-Id")
	at, err := time.Parse(time.RFC3339, fmt.Sprint(body["timestamp"]))
	if err != nil || at.Location() != time.UTC {
		t.Errorf("timestamp %v is not RFC 3339 in UTC", body["timestamp"])
	}
	delete(body, "timestamp")
	want := map[string]any{"error": "Internal server error", "statusCode": 500.0, "requestId": id, "code": "internal"}
	if w.Code != 500 || fmt.Sprint(body) != fmt.Sprint(want) {
		t.Errorf("answer %d %v, want 500 %v", w.Code, body, want)
	}
	if header := fmt.Sprint(w.Header()); strings.Contains(header, "secret") {
		t.Errorf("the cause is in the header: %s", header)
	}

	var line map[string]any
	if err := json.Unmarshal(log.Bytes(), &line); err != nil {
		t.Fatalf("not one line of JSON: %v\n%s", err, &log)
	}
	if line["level"] != "ERROR" || line["status"] != 500.0 || line["requestId"] != id {
		t.Errorf("log: %v", line)
	}
	for _, part := range []string{"the secret cause", "TestPanic", "middleware_test.go:"} { // the last two from the stack
		if !strings.Contains(fmt.Sprint(line["error"]), part) {
			t.Errorf("%q is not in the log: %v", part, line["error"])
		}
	}
}

// contractErrors is the table of errors that the frontend switches on.
var contractErrors = map[string]int{
	"invalid_json": 400, "validation_failed": 400, "email_exists": 400,
	"invalid_credentials": 401, "missing_token": 401, "token_expired": 401, "invalid_token": 401, "session_revoked": 401, "refresh_reused": 401,
	"cross_origin": 403, "not_found": 404, "user_not_found": 404, "session_not_found": 404, "method_not_allowed": 405,
	"body_too_large": 413, "unsupported_media_type": 415, "rate_limited": 429, "too_many_attempts": 429,
	"internal": 500, "unavailable": 503, "overloaded": 503,
}

func TestErrorTable(t *testing.T) {
	for code, status := range contractErrors {
		if got := responses[code]; got.status != status || got.message == "" {
			t.Errorf("%s is answered with %d %q, want %d and a message", code, got.status, got.message, status)
		}
	}
	for code := range responses {
		if contractErrors[code] == 0 {
			t.Errorf("%s is not in the contract", code)
		}
	}

	// Each error that stands for a code stands for one only.
	unnamed := maps.Clone(responses)
	for code, response := range responses {
		for other, answer := range responses {
			if response.err != nil && other != code && errors.Is(response.err, answer.err) {
				t.Errorf("%q may be told as %s or as %s", response.err, code, other)
			}
		}
		if response.err != nil {
			delete(unnamed, code)
		}
	}

	// Every code that the source names, as fail("…") or apiError{code: "…"}, has an answer, and every answer is named.
	fset, files := productionFiles(t)
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "fail" {
					checkCode(t, fset, n.Args[0])
				}
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "code" {
					checkCode(t, fset, n.Value)
				}
				ast.Inspect(n.Value, func(n ast.Node) bool { delete(unnamed, literal(n)); return true })
				return literal(n.Key) == "" // the table itself names nothing
			case *ast.BasicLit:
				delete(unnamed, literal(n))
			}
			return true
		})
	}
	for code := range unnamed {
		t.Errorf("nothing answers with %s", code)
	}
}

func checkCode(t *testing.T, fset *token.FileSet, code ast.Expr) {
	t.Helper()
	if s := literal(code); s != "" && responses[s].status == 0 {
		t.Errorf("%v: %q has no answer", fset.Position(code.Pos()), s)
	}
}

// literal returns the string that n is in the source, "" if it is anything else.
func literal(n ast.Node) string {
	if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
		s, _ := strconv.Unquote(l.Value)
		return s
	}
	return ""
}

func TestErrorHeaders(t *testing.T) {
	for _, test := range []struct {
		err                   error
		bearer                bool // the request showed one
		status                int
		challenge, retryAfter string
	}{
		{fail("missing_token"), false, 401, "Bearer", ""},
		{fail("invalid_token"), false, 401, "Bearer", ""},
		{fail("invalid_token"), true, 401, `Bearer error="invalid_token"`, ""},
		{&apiError{code: "rate_limited", retryAfter: time.Nanosecond}, false, 429, "", "1"},
		{&apiError{code: "too_many_attempts", retryAfter: 1001 * time.Millisecond}, false, 429, "", "2"},
		{fail("overloaded"), false, 503, "", "1"},
		{fmt.Errorf("%w: the secret cause", errUnavailable), false, 503, "", "1"},
		{io.ErrUnexpectedEOF, true, 500, "", ""},
		{fail("not_found"), true, 404, "", ""},
	} {
		w := httptest.NewRecorder()
		h := observed(handle(func(_ http.ResponseWriter, r *http.Request) error {
			aboutRequest(r).bearer = test.bearer
			return test.err
		}))
		h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		header, body := w.Header(), w.Body.String()
		if w.Code != test.status || header.Get("WWW-Authenticate") != test.challenge || header.Get("Retry-After") != test.retryAfter {
			t.Errorf("%v: %d %v", test.err, w.Code, header)
		}
		if header.Get("Cache-Control") != "no-store" || header.Get("X-Content-Type-Options") != "nosniff" ||
			strings.Contains(body, "secret") || strings.Contains(body, "EOF") || strings.Contains(body, "details") {
			t.Errorf("%v: %v\n%s", test.err, header, body)
		}
	}
}

// Every combination of what a browser may say of a request's origin.
func TestOrigins(t *testing.T) {
	listed := []string{"https://app.example.com", "http://localhost:5173"}
	h := observed(cors(listed)(refuseCrossOrigin(listed)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(299) }))))

	own := []string{"https://api.example.com", "http://api.example.com"} // of the Host below; TLS may end at a proxy
	foreign := []string{"null", "https://evil.example", "https://app.example.com.evil.example", "https://evil-app.example.com", "http://app.example.com",
		"https://app.example.com:8443", "https://app.example.com/", "https://APP.example.com", "app.example.com", "*", "https://", "https:///",
		"https://a b", "://", "%", "https://app.example.com, https://evil.example", "https://api.example.com:8443", "https://api.example.com.evil.example",
		"https://api.example.com@evil.example", "file://", "http://localhost:51730", "http://localhost", "\x7f"}
	for _, origin := range slices.Concat([]string{""}, listed, own, foreign) {
		for _, site := range []string{"", "none", "same-origin", "same-site", "cross-site", "odd"} {
			for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PURGE", "get", "OPTIONS", "preflight"} {
				r, w := httptest.NewRequest(strings.Replace(method, "preflight", "OPTIONS", 1), "http://api.example.com/auth/login", nil), httptest.NewRecorder()
				if origin != "" {
					r.Header.Set("Origin", origin)
				}
				if site != "" {
					r.Header.Set("Sec-Fetch-Site", site)
				}
				if method == "preflight" {
					r.Header.Set("Access-Control-Request-Method", "POST")
				}
				h.ServeHTTP(w, r)

				wantStatus := 299
				fromHere := site == "" || site == "none" || site == "same-origin"
				switch {
				case method == "preflight" && origin != "":
					wantStatus = 204
				case method == "GET", method == "HEAD", slices.Contains(listed, origin):
				case method == "OPTIONS" || method == "preflight":
					wantStatus = w.Code // no route takes it
				case slices.Contains(foreign, origin), !fromHere: // our own host from another site is it under another scheme
					wantStatus = 403
				}
				name := fmt.Sprintf("%s, Origin %q, Sec-Fetch-Site %q", method, origin, site)
				if w.Code != wantStatus {
					t.Errorf("%s: status %d, want %d", name, w.Code, wantStatus)
				}
				checkCORS(t, name, w.Header(), slices.Contains(listed, origin), origin, wantStatus == 204)
			}
		}
	}
}

// checkCORS compares an answer's header with what a listed origin gets, or that another gets nothing.
func checkCORS(t *testing.T, name string, h http.Header, listed bool, origin string, preflight bool) {
	t.Helper()
	want := map[string]string{"Vary": "Origin"}
	if listed {
		want["Access-Control-Allow-Origin"], want["Access-Control-Allow-Credentials"] = origin, "true"
		want["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After, RateLimit, RateLimit-Policy"
	}
	if listed && preflight {
		want["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-Id"
		want["Access-Control-Expose-Headers"] = h.Get("Access-Control-Expose-Headers") // means nothing there
	}
	for _, key := range []string{"Vary", "Access-Control-Allow-Origin", "Access-Control-Allow-Credentials", "Access-Control-Allow-Headers", "Access-Control-Expose-Headers"} {
		if got := strings.Join(h.Values(key), "; "); got != want[key] {
			t.Errorf("%s: %s is %q, want %q", name, key, got, want[key])
		}
	}
	methods, age := h.Get("Access-Control-Allow-Methods"), h.Get("Access-Control-Max-Age")
	if given := listed && preflight; (age != "") != given || (methods != "") != given {
		t.Errorf("%s: methods %q, max age %q", name, methods, age)
	}
	for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
		if listed && preflight && !slices.Contains(strings.Split(methods, ", "), method) {
			t.Errorf("%s: %s is not allowed", name, method)
		}
	}
}
