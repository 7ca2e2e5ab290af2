package main

// middleware.go has the steps that every request passes on its way to a handler. Errors become
// responses here and nowhere else. The metrics are here too.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Errors and responses

var (
	errInvalidJSON          = errors.New("body is not one JSON object of the right types")
	errValidation           = errors.New("body has fields that are not acceptable")
	errInvalidCredentials   = errors.New("wrong password or unknown email")
	errMissingToken         = errors.New("no token was shown")
	errCrossOrigin          = errors.New("request of a foreign origin")
	errNotFound             = errors.New("no such route")
	errMethodNotAllowed     = errors.New("the route has other methods")
	errRequestTimeout       = errors.New("body did not arrive in time")
	errBodyTooLarge         = errors.New("body is too large")
	errUnsupportedMediaType = errors.New("body is not declared as JSON")
	errRateLimited          = errors.New("too many requests from this address")
	errTooManyAttempts      = errors.New("too many failed logins")
	errInternal             = errors.New("internal error")
	errOverloaded           = errors.New("no hashing slot in time, or too many requests wait")
)

// errorResponse is the response to an error.
type errorResponse struct {
	err     error
	status  int
	code    string
	message string
}

// errorResponses lists the responses to errors. responseTo picks the first row whose err matches.
// An error without a row, such as errFault, is answered like errInternal.
var errorResponses = []errorResponse{
	{errInvalidJSON, 400, "invalid_json", "Request body is not a valid JSON object"},
	{errValidation, 400, "validation_failed", "Validation failed"},
	{errEmailExists, 400, "email_exists", "Email already exists"},
	{errLinkInvalid, 400, "invalid_link", "Link is invalid or has expired"},
	{errInvalidCredentials, 401, "invalid_credentials", "Invalid credentials"},
	{errMissingToken, 401, "missing_token", "Authentication required"},
	{errTokenExpired, 401, "token_expired", "Token has expired"},
	{errTokenInvalid, 401, "invalid_token", "Invalid token"},
	{errEnded, 401, "session_revoked", "Session has ended"},
	{errReused, 401, "refresh_reused", "Refresh token has already been used"},
	{errCrossOrigin, 403, "cross_origin", "Cross-origin request refused"},
	{errDisabled, 403, "account_disabled", "Account is disabled"},
	{errNotFound, 404, "not_found", "Not found"},
	{errNoUser, 404, "user_not_found", "User not found"},
	{errNoSession, 404, "session_not_found", "Session not found"},
	{errMethodNotAllowed, 405, "method_not_allowed", "Method not allowed"},
	{errRequestTimeout, 408, "request_timeout", "Request body did not arrive in time"},
	{errBodyTooLarge, 413, "body_too_large", "Request body is too large"},
	{errUnsupportedMediaType, 415, "unsupported_media_type",
		"Content-Type must be application/json"},
	{errRateLimited, 429, "rate_limited", "Too many requests"},
	{errTooManyAttempts, 429, "too_many_attempts", "Too many failed attempts"},
	{errInternal, 500, "internal", "Internal server error"},
	{errUnavailable, 503, "unavailable", "Service temporarily unavailable"},
	{errOverloaded, 503, "overloaded", "Server is busy"},
	{errMailQueueFull, 503, "overloaded", "Server is busy"},
}

// responseTo returns the response to err.
func responseTo(err error) errorResponse {
	for _, response := range errorResponses {
		if errors.Is(err, response.err) {
			return response
		}
	}
	return responseTo(errInternal)
}

// validationError is an errValidation that maps the names of fields to their faults.
type validationError map[string]string

func (e validationError) Error() string { return errValidation.Error() }
func (e validationError) Unwrap() error { return errValidation }

// limitError is an errRateLimited or errTooManyAttempts that says how long to wait.
type limitError struct {
	limit      error
	retryAfter time.Duration
}

func (e *limitError) Error() string { return e.limit.Error() }
func (e *limitError) Unwrap() error { return e.limit }

// errorAnswer is the body of every error.
type errorAnswer struct {
	Error      string            `json:"error"`
	StatusCode int               `json:"statusCode"`
	RequestID  string            `json:"requestId"`
	Timestamp  string            `json:"timestamp"`
	Code       string            `json:"code"`
	Details    map[string]string `json:"details,omitempty"`
}

// writeError answers err and notes it for the log. The client never learns the cause.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	info := infoOf(r)
	info.err = err
	response := responseTo(err)

	switch response.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", challenge(info, err))
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", wholeSeconds(retryAfter(err)))
	}
	var validation validationError
	_ = errors.As(err, &validation)
	answer := errorAnswer{
		Error:      response.message,
		StatusCode: response.status,
		RequestID:  info.id,
		Timestamp:  time.Now().UTC().Format(time.RFC3339),
		Code:       response.code,
		Details:    validation,
	}
	_ = writeJSON(w, response.status, answer)
}

// challenge returns the WWW-Authenticate header of a 401 (RFC 6750 section 3). If the password was
// wrong, there is nothing wrong with the token.
func challenge(info *requestInfo, err error) string {
	if info.bearer && !errors.Is(err, errInvalidCredentials) {
		return `Bearer error="invalid_token"`
	}
	return "Bearer"
}

// retryAfter returns how long a client should wait after err. After an outage it is one second.
func retryAfter(err error) time.Duration {
	var limited *limitError
	if errors.As(err, &limited) {
		return limited.retryAfter
	}
	return time.Second
}

// wholeSeconds rounds up, so that a client that waits this long is not refused again.
func wholeSeconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

// writeJSON sends an answer. It encodes the whole answer before it sends anything.
func writeJSON(w http.ResponseWriter, status int, answer any) error {
	encoded, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(encoded, '\n')) // it is not our error if the client has hung up
	return nil
}

// timestamp is a time that is encoded as JavaScript encodes a Date: RFC 3339 in UTC, with
// milliseconds.
type timestamp time.Time

func (t timestamp) MarshalText() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(nil, "2006-01-02T15:04:05.000Z"), nil
}

// Requests

// handlerFunc is like http.HandlerFunc, but returns its error instead of writing it.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

// handle calls h and writes the error that h returns.
func handle(h handlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeError(w, r, err)
		}
	})
}

// middleware wraps a handler in a step that a request passes first.
type middleware func(http.Handler) http.Handler

// chain combines middleware. A request passes it in the order given.
func chain(all ...middleware) middleware {
	return func(h http.Handler) http.Handler {
		for _, m := range slices.Backward(all) {
			h = m(h)
		}
		return h
	}
}

// requestInfo is what middleware and handlers note about a request, for each other and for the log.
type requestInfo struct {
	id        string
	ip        netip.Addr
	userID    string // the user of the token, or the account that a login names
	sessionID string
	bearer    bool  // whether there is a Bearer token
	err       error // the error that was answered, if any
}

type requestInfoKey struct{}

// infoOf returns the requestInfo that observe has put into the context of r.
func infoOf(r *http.Request) *requestInfo {
	return r.Context().Value(requestInfoKey{}).(*requestInfo)
}

// newUUID returns a random UUID (RFC 9562 section 5.4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])         // never fails
	b[6] = b[6]&0x0f | 0x40 // version 4
	b[8] = b[8]&0x3f | 0x80 // variant 10
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

var uuidForm = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)

// requestID returns the client's X-Request-Id if that is a UUID in its usual form, else a new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if uuidForm.MatchString(id) {
		return id
	}
	return newUUID()
}

// clientIP returns the client's address. That is the address of peer ("ip:port"), unless peer is
// trusted. Each trusted hop vouches for the one that it has appended to X-Forwarded-For, so the
// header is read from the right. Anything left of an untrusted or unreadable hop may be invented.
func clientIP(peer string, forwarded []string, trusted []netip.Prefix) netip.Addr {
	addrPort, _ := netip.ParseAddrPort(peer)
	ip := addrPort.Addr().Unmap().WithZone("")
	hops := strings.Split(strings.Join(forwarded, ","), ",")
	for _, hop := range slices.Backward(hops) {
		before, err := netip.ParseAddr(strings.Trim(hop, " \t"))
		if err != nil || !containsAddr(trusted, ip) {
			break
		}
		ip = before.Unmap().WithZone("")
	}
	return ip
}

// containsAddr reports whether ip is in one of the prefixes.
func containsAddr(prefixes []netip.Prefix, ip netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool {
		return p.Contains(ip)
	})
}

// statusRecorder remembers the status of a response.
type statusRecorder struct {
	http.ResponseWriter
	status int
}

func (rec *statusRecorder) WriteHeader(status int) {
	rec.status = status
	rec.ResponseWriter.WriteHeader(status)
}

// observe finds a request's id and client IP, sets the headers that every answer has, turns a panic
// into an error, and finally logs and counts the request. From here on nothing is canceled if the
// client hangs up: the server finishes what it has begun, but does not wait for it longer than the
// timeout.
func observe(
	log *slog.Logger,
	m *metrics,
	trusted []netip.Prefix,
	timeout time.Duration,
) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			info := &requestInfo{
				id: requestID(r),
				ip: clientIP(r.RemoteAddr, r.Header.Values("X-Forwarded-For"), trusted),
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), timeout)
			defer cancel()
			r = r.WithContext(context.WithValue(ctx, requestInfoKey{}, info))
			rec := &statusRecorder{w, http.StatusOK}

			w.Header().Set("X-Request-Id", info.id)
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			defer func() {
				if p := recover(); p != nil {
					writeError(rec, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
				}
				took := time.Since(start)
				m.countRequest(r.Method, r.Pattern, rec.status, took)
				logRequest(log, r, rec.status, took)
			}()
			next.ServeHTTP(rec, r)
		})
	}
}

// logRequest writes the request's line in the log.
func logRequest(log *slog.Logger, r *http.Request, status int, took time.Duration) {
	info := infoOf(r)
	attrs := []slog.Attr{
		slog.String("requestId", info.id),
		slog.String("method", cut(r.Method)),
		slog.String("path", cut(r.URL.Path)),
		slog.String("route", r.Pattern),
		slog.Int("status", status),
		slog.Float64("durationMs", float64(took.Microseconds())/1000),
		slog.String("ip", info.ip.String()),
	}
	if info.userID != "" {
		attrs = append(attrs, slog.String("userId", info.userID))
	}
	if info.sessionID != "" {
		attrs = append(attrs, slog.String("sessionId", info.sessionID))
	}
	level := slog.LevelInfo
	if info.err != nil {
		attrs = append(attrs, slog.String("code", responseTo(info.err).code))
	}
	if errors.Is(info.err, errTheft) {
		level = slog.LevelWarn
	}
	if info.err != nil && status >= http.StatusInternalServerError {
		level = slog.LevelError
		attrs = append(attrs, slog.String("error", info.err.Error()))
	}
	log.LogAttrs(r.Context(), level, "request", attrs...)
}

// cut shortens a text that the client has chosen, so that one request cannot fill the log.
func cut(text string) string {
	const maxLogged = 256
	return strings.ToValidUTF8(text[:min(len(text), maxLogged)], "")
}

// closeWhenDraining lets clients and proxies send no further request on their connections once the
// process is about to stop. One that was sent just when the server closes an idle connection would
// be lost.
func closeWhenDraining(draining *atomic.Bool) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if draining.Load() {
				w.Header().Set("Connection", "close")
			}
			next.ServeHTTP(w, r)
		})
	}
}

// matchRoute sets r.Pattern before the request reaches the mux, so that the log and the metrics
// name the route of requests that are refused on the way. A path that the mux would redirect has no
// route. No later step may copy the request, because observe reads the pattern at the end.
func matchRoute(mux *http.ServeMux) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if isCanonical(r.URL) {
				_, r.Pattern = mux.Handler(r)
			}
			next.ServeHTTP(w, r)
		})
	}
}

// cors lets scripts of the listed origins read the answers, and answers preflights ("CORS protocol"
// in the Fetch standard).
func cors(origins []string) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h.Set("Vary", "Origin")
			origin := r.Header.Get("Origin")
			listed := slices.Contains(origins, origin)
			if listed {
				h.Set("Access-Control-Allow-Origin", origin)
				h.Set("Access-Control-Allow-Credentials", "true")
				h.Set("Access-Control-Expose-Headers",
					"X-Request-Id, Retry-After, RateLimit, RateLimit-Policy")
			}
			if !isPreflight(r) {
				next.ServeHTTP(w, r)
				return
			}
			if listed {
				h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
				h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id")
				h.Set("Access-Control-Max-Age", "600")
			}
			w.WriteHeader(http.StatusNoContent)
		})
	}
}

// isPreflight reports whether a browser asks for permission before it sends the real request.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions &&
		r.Header.Get("Origin") != "" &&
		r.Header.Get("Access-Control-Request-Method") != ""
}

// rateLimit counts requests, except those of the health routes, and refuses those over the limit.
// Its headers are those of draft-ietf-httpapi-ratelimit-headers.
func rateLimit(l *requestLimiter, m *metrics) middleware {
	return func(next http.Handler) http.Handler {
		return handle(func(w http.ResponseWriter, r *http.Request) error {
			path := r.URL.EscapedPath()
			if l.max == 0 || path == "/healthz" || path == "/readyz" {
				next.ServeHTTP(w, r)
				return nil
			}
			left, reset, err := l.take(r.Context(), infoOf(r).ip)
			if err != nil {
				return redisError("rate limit", err)
			}
			h := w.Header()
			h.Set("RateLimit-Policy", fmt.Sprintf(`"ip";q=%d;w=%d`, l.max, l.window.seconds))
			h.Set("RateLimit", fmt.Sprintf(`"ip";r=%d;t=%s`, max(0, left), wholeSeconds(reset)))
			if left < 0 {
				m.rateLimited.Add(1)
				return &limitError{errRateLimited, reset}
			}
			next.ServeHTTP(w, r)
			return nil
		})
	}
}

// refuseCrossOrigin keeps pages of other sites from acting with a user's cookie. The check in the
// standard library trusts Sec-Fetch-Site if there is one. Here the Origin must also be listed, or
// be the server's own.
func refuseCrossOrigin(origins []string) middleware {
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		_ = protection.AddTrustedOrigin(origin) // an origin that it rejects is not trusted
	}
	return func(next http.Handler) http.Handler {
		return handle(func(w http.ResponseWriter, r *http.Request) error {
			safe := r.Method == http.MethodGet || r.Method == http.MethodHead
			if !safe && (isForeign(r, origins) || protection.Check(r) != nil) {
				return errCrossOrigin
			}
			next.ServeHTTP(w, r)
			return nil
		})
	}
}

// isForeign reports whether a request has an Origin that is neither listed nor the server's own.
func isForeign(r *http.Request, origins []string) bool {
	origin := r.Header.Get("Origin")
	if origin == "" || slices.Contains(origins, origin) {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || u.Host == "" || u.Host != r.Host
}

// isCanonical reports whether a path is written in the only way that can have a route: without
// double slashes, a trailing slash, dot segments, or escapes.
func isCanonical(u *url.URL) bool {
	return u.Path == path.Clean("/"+u.Path) && u.Path == u.EscapedPath()
}

// Metrics

// refreshOutcome is the outcome of a refresh.
type refreshOutcome string

const (
	refreshRotated refreshOutcome = "rotated"
	refreshResent  refreshOutcome = "resent"
	refreshReused  refreshOutcome = "reused"
	refreshTheft   refreshOutcome = "theft"
	refreshEnded   refreshOutcome = "ended"
	refreshFailed  refreshOutcome = "failed"
)

var refreshOutcomes = []refreshOutcome{
	refreshRotated, refreshResent, refreshReused, refreshTheft, refreshEnded, refreshFailed,
}

// requestLabels are the labels of the request counter.
type requestLabels struct {
	route  string
	method string
	status int
}

// durationBuckets are upper bounds in seconds. Requests that hash no password stay below 10 ms.
var durationBuckets = [...]float64{
	.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1),
}

// histogram counts durations. buckets[i] counts those up to durationBuckets[i] that are above the
// bound before it.
type histogram struct {
	buckets [len(durationBuckets)]uint64
	sum     float64 // in seconds
}

// sample is the current value of a series.
type sample struct {
	series string // with its labels; it is a counter if its name ends in _total, else a gauge
	help   string // only for the first series of a metric
	value  float64
}

// metrics counts in memory, and writes the Prometheus text format only when it is scraped.
type metrics struct {
	readSamples  func() []sample
	rateLimited  atomic.Uint64
	loginLimited atomic.Uint64

	mu        sync.Mutex
	requests  map[requestLabels]uint64
	durations map[string]*histogram // by route
	refreshes map[refreshOutcome]uint64
}

// newMetrics returns metrics that start at zero. readSamples is called at every scrape.
func newMetrics(readSamples func() []sample) *metrics {
	return &metrics{
		readSamples: readSamples,
		requests:    map[requestLabels]uint64{},
		durations:   map[string]*histogram{},
		refreshes:   map[refreshOutcome]uint64{},
	}
}

// countRequest counts a request. A client can invent methods, so all unknown ones share one series.
func (m *metrics) countRequest(method, route string, status int, took time.Duration) {
	if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}, method) {
		method = "other"
	}
	inBucket := slices.IndexFunc(durationBuckets[:], func(bound float64) bool {
		return took.Seconds() <= bound
	})

	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[requestLabels{route, method, status}]++
	h := m.durations[route]
	if h == nil {
		h = &histogram{}
		m.durations[route] = h
	}
	h.buckets[inBucket]++
	h.sum += took.Seconds()
}

func (m *metrics) countRefresh(outcome refreshOutcome) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refreshes[outcome]++
}

// ServeHTTP answers a scrape.
func (m *metrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var b bytes.Buffer
	m.mu.Lock()
	m.writeRequests(&b)
	m.writeDurations(&b)
	m.writeCounters(&b)
	m.mu.Unlock()
	m.writeSamples(&b)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(b.Bytes())
}

// writeFamily writes the two lines before the series of a metric.
func writeFamily(b *bytes.Buffer, name, kind, help string) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

func (m *metrics) writeRequests(b *bytes.Buffer) {
	const name = "latchkey_http_requests_total"
	writeFamily(b, name, "counter", "Requests answered, by route, method and status.")
	var lines []string
	for labels, count := range m.requests {
		lines = append(lines, fmt.Sprintf("%s{route=%q,method=%q,status=\"%d\"} %d\n",
			name, labels.route, labels.method, labels.status, count))
	}
	slices.Sort(lines)
	b.WriteString(strings.Join(lines, ""))
}

func (m *metrics) writeDurations(b *bytes.Buffer) {
	const name = "latchkey_http_request_duration_seconds"
	writeFamily(b, name, "histogram", "Time from a request's headers to its answer, by route.")
	for _, route := range slices.Sorted(maps.Keys(m.durations)) {
		h := m.durations[route]
		var count uint64
		for i, bound := range durationBuckets {
			count += h.buckets[i]
			fmt.Fprintf(b, "%s_bucket{route=%q,le=\"%v\"} %d\n", name, route, bound, count)
		}
		fmt.Fprintf(b, "%s_sum{route=%q} %v\n", name, route, h.sum)
		fmt.Fprintf(b, "%s_count{route=%q} %d\n", name, route, count)
	}
}

func (m *metrics) writeCounters(b *bytes.Buffer) {
	writeFamily(b, "latchkey_refresh_total", "counter", "Refreshes, by outcome.")
	for _, outcome := range refreshOutcomes {
		fmt.Fprintf(b, "latchkey_refresh_total{outcome=%q} %d\n", outcome, m.refreshes[outcome])
	}
	writeFamily(b, "latchkey_rate_limited_total", "counter", "Requests over the limit per IP.")
	fmt.Fprintf(b, "latchkey_rate_limited_total %d\n", m.rateLimited.Load())
	writeFamily(b, "latchkey_login_limited_total", "counter", "Logins over a limit.")
	fmt.Fprintf(b, "latchkey_login_limited_total %d\n", m.loginLimited.Load())
}

// writeSamples writes the metrics that are read at scrape time.
func (m *metrics) writeSamples(b *bytes.Buffer) {
	for _, s := range m.readSamples() {
		name, _, _ := strings.Cut(s.series, "{")
		kind := "gauge"
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		if s.help != "" {
			writeFamily(b, name, kind, s.help)
		}
		fmt.Fprintf(b, "%s %v\n", s.series, s.value)
	}
}
