package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Errors

// serveError returns the answer to a handler's error, and the log line of the request.
func serveError(t *testing.T, h handlerFunc) (*httptest.ResponseRecorder, map[string]any) {
	t.Helper()
	var log bytes.Buffer
	observed := observe(slog.New(slog.NewJSONHandler(&log, nil)), newMetrics(nil), nil, time.Minute)
	w := httptest.NewRecorder()
	observed(handle(h)).ServeHTTP(w, httptest.NewRequest("GET", "/auth/me", nil))
	var line map[string]any
	if err := json.Unmarshal(log.Bytes(), &line); err != nil {
		t.Fatalf("the log is not one line of JSON: %v\n%s", err, &log)
	}
	return w, line
}

// TestErrorResponses checks that each error has its answer, also if it is wrapped, and that the
// cause is told to the log and to nobody else.
func TestErrorResponses(t *testing.T) {
	seen := map[string]bool{}
	for _, test := range []struct {
		err    error
		status int
		code   string
	}{
		{errInvalidJSON, 400, "invalid_json"},
		{errValidation, 400, "validation_failed"},
		{validationError{"email": "Email is wrong"}, 400, "validation_failed"},
		{errEmailExists, 400, "email_exists"},
		{errLinkInvalid, 400, "invalid_link"},
		{errInvalidCredentials, 401, "invalid_credentials"},
		{errMissingToken, 401, "missing_token"},
		{errTokenExpired, 401, "token_expired"},
		{errTokenInvalid, 401, "invalid_token"},
		{errEnded, 401, "session_revoked"},
		{errReused, 401, "refresh_reused"},
		{errTheft, 401, "refresh_reused"},
		{errCrossOrigin, 403, "cross_origin"},
		{errDisabled, 403, "account_disabled"},
		{errNotFound, 404, "not_found"},
		{errNoUser, 404, "user_not_found"},
		{errNoSession, 404, "session_not_found"},
		{errMethodNotAllowed, 405, "method_not_allowed"},
		{errRequestTimeout, 408, "request_timeout"},
		{errBodyTooLarge, 413, "body_too_large"},
		{errUnsupportedMediaType, 415, "unsupported_media_type"},
		{errRateLimited, 429, "rate_limited"},
		{errTooManyAttempts, 429, "too_many_attempts"},
		{&limitError{errTooManyAttempts, time.Minute}, 429, "too_many_attempts"},
		{errInternal, 500, "internal"},
		{io.ErrUnexpectedEOF, 500, "internal"}, // an error that nobody has thought of
		{errUnavailable, 503, "unavailable"},
		{errStale, 503, "unavailable"},
		{errOverloaded, 503, "overloaded"},
		{errMailQueueFull, 503, "overloaded"},
	} {
		seen[test.code] = true
		for _, err := range []error{test.err, fmt.Errorf("the cause: %w", test.err)} {
			w, line := serveError(t, func(http.ResponseWriter, *http.Request) error { return err })
			var answer errorAnswer
			_ = json.Unmarshal(w.Body.Bytes(), &answer)
			if w.Code != test.status || answer.Code != test.code || answer.Error == "" ||
				strings.Contains(w.Body.String(), "the cause") {
				t.Errorf("%v is answered %d %s", err, w.Code, w.Body)
			}
			if got, _ := line["error"].(string); (got == err.Error()) != (test.status >= 500) {
				t.Errorf("%v is logged as %v", err, line)
			}
		}
	}
	for _, response := range errorResponses {
		if !seen[response.code] {
			t.Errorf("%s is not in the contract", response.code)
		}
	}
}

// TestRetryAfter checks that a client that waits as long as it is told is not refused again.
func TestRetryAfter(t *testing.T) {
	for wait, want := range map[time.Duration]string{0: "1", 1e9: "1", 1e9 + 1: "2"} {
		if got := wholeSeconds(wait); got != want {
			t.Errorf("wholeSeconds(%v) = %s, want %s", wait, got, want)
		}
	}
}

// TestPanic checks that a panic is an internal error. The log has the cause and the stack.
func TestPanic(t *testing.T) {
	w, line := serveError(t, func(http.ResponseWriter, *http.Request) error { panic("the cause") })
	body := w.Body.String()
	if w.Code != 500 || !strings.Contains(body, `"internal"`) || strings.Contains(body, "cause") {
		t.Errorf("a panic is answered %d %s", w.Code, body)
	}
	logged, _ := line["error"].(string)
	if !strings.Contains(logged, "the cause") || !strings.Contains(logged, "middleware_test.go:") {
		t.Errorf("the cause or its place is not in the log: %v", line)
	}
}

// Requests

// TestClientIP has the edges. The usual cases are tested in contract/.
func TestClientIP(t *testing.T) {
	trusted := []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("192.0.2.7/32"),
		netip.MustParsePrefix("fd00::/8"),
		netip.MustParsePrefix("fe80::/10"),
	}
	const proxy = "10.0.0.1:4711"
	for _, test := range []struct {
		peer      string
		forwarded string // lines of the header, with "|" between them
		want      string
	}{
		// The header is read from the right, past hops that are trusted.
		{proxy, "", "10.0.0.1"},
		{"192.0.2.7:1", "198.51.100.1", "198.51.100.1"},
		{"192.0.2.8:1", "198.51.100.1", "192.0.2.8"},
		{proxy, "10.3.3.3, 10.2.2.2", "10.3.3.3"},
		{proxy, "198.51.100.1,\t198.51.100.2\t ,10.3.3.3|10.2.2.2 ", "198.51.100.2"},

		// What cannot be read ends the search.
		{proxy, "198.51.100.1,", "10.0.0.1"},
		{proxy, "198.51.100.1,,10.2.2.2", "10.2.2.2"},
		{proxy, "198.51.100.1|", "10.0.0.1"},
		{proxy, "198.51.100.1, 198.51.100.2:80", "10.0.0.1"},
		{proxy, "[2001:db8::1]:80", "10.0.0.1"},
		{proxy, "198.51.100.010", "10.0.0.1"},
		{proxy, "\u00a0198.51.100.1", "10.0.0.1"},

		// One host has one spelling.
		{"[::ffff:10.0.0.1]:80", "198.51.100.1", "198.51.100.1"},
		{"[::ffff:203.0.113.9]:80", "198.51.100.1", "203.0.113.9"},
		{proxy, "::ffff:198.51.100.1, ::ffff:10.2.2.2", "198.51.100.1"},
		{"[fe80::1%eth0]:80", "", "fe80::1"},
		{proxy, "2001:db8::1%25", "2001:db8::1"},
		{proxy, "198.51.100.1, fe80::2%eth1", "198.51.100.1"},
	} {
		forwarded := strings.Split(test.forwarded, "|")
		if got := clientIP(test.peer, forwarded, trusted); got.String() != test.want {
			t.Errorf("clientIP(%q, %q) = %v, want %s", test.peer, forwarded, got, test.want)
		}
	}
}

// FuzzClientIP checks that the client is the peer or, if the peer is trusted, an address that the
// header names.
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
			t.Fatalf("clientIP(%q, %q) = %v, but %v is trusted", peer, header, got, trusted)
		}
		for hop := range strings.SplitSeq(strings.ReplaceAll(header, "\n", ","), ",") {
			ip, err := netip.ParseAddr(strings.Trim(hop, " \t"))
			if err == nil && ip.Unmap().WithZone("") == got {
				return
			}
		}
		t.Fatalf("clientIP(%q, %q) = %v, which neither names", peer, header, got)
	})
}

// Metrics

// TestHistogram checks that each bucket counts all durations up to its bound, those of the smaller
// buckets included.
func TestHistogram(t *testing.T) {
	m := newMetrics(func() []sample { return nil })
	m.countRequest("GET", "GET /x", 200, time.Millisecond) // on a bound
	m.countRequest("GET", "GET /x", 200, 2*time.Millisecond)
	m.countRequest("GET", "GET /x", 200, 30*time.Millisecond)
	m.countRequest("GET", "GET /x", 200, time.Minute)
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, line := range []string{
		`bucket{route="GET /x",le="0.001"} 1`,
		`bucket{route="GET /x",le="0.0025"} 2`,
		`bucket{route="GET /x",le="0.05"} 3`,
		`bucket{route="GET /x",le="+Inf"} 4`,
	} {
		if !strings.Contains(w.Body.String(), line+"\n") {
			t.Errorf("no line %s in\n%s", line, w.Body)
		}
	}
}
