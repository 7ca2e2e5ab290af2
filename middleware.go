package main

// middleware.go holds what every request passes on its way to a handler. Errors become responses
// here and nowhere else, and requests are counted here.

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
	errBodyTooLarge         = errors.New("body is too large")
	errUnsupportedMediaType = errors.New("body is not declared as JSON")
	errRateLimited          = errors.New("too many requests from this address")
	errTooManyAttempts      = errors.New("too many failed logins")
	errInternal             = errors.New("internal error")
	errOverloaded           = errors.New("no hashing slot came free in time")
)

// errorResponse is what an error is answered with.
type errorResponse struct {
	err     error
	status  int
	code    string
	message string
}

// errorResponses lists every answer that is an error. The first one whose err an error wraps is its
// answer. An error that is not listed is answered as errInternal.
var errorResponses = []errorResponse{
	{errInvalidJSON, 400, "invalid_json", "Request body is not a valid JSON object"},
	{errValidation, 400, "validation_failed", "Validation failed"},
	{errEmailExists, 400, "email_exists", "Email already exists"},
	{errInvalidCredentials, 401, "invalid_credentials", "Invalid credentials"},
	{errMissingToken, 401, "missing_token", "Authentication required"},
	{errTokenExpired, 401, "token_expired", "Token has expired"},
	{errTokenInvalid, 401, "invalid_token", "Invalid token"},
	{errEnded, 401, "session_revoked", "Session has ended"},
	{errReused, 401, "refresh_reused", "Refresh token has already been used"},
	{errCrossOrigin, 403, "cross_origin", "Cross-origin request refused"},
	{errNotFound, 404, "not_found", "Not found"},
	{errNoUser, 404, "user_not_found", "User not found"},
	{errNoSession, 404, "session_not_found", "Session not found"},
	{errMethodNotAllowed, 405, "method_not_allowed", "Method not allowed"},
	{errBodyTooLarge, 413, "body_too_large", "Request body is too large"},
	{errUnsupportedMediaType, 415, "unsupported_media_type",
		"Content-Type must be application/json"},
	{errRateLimited, 429, "rate_limited", "Too many requests"},
	{errTooManyAttempts, 429, "too_many_attempts", "Too many failed attempts"},
	{errInternal, 500, "internal", "Internal server error"},
	{errUnavailable, 503, "unavailable", "Service temporarily unavailable"},
	{errOverloaded, 503, "overloaded", "Server is busy"},
}

// responseTo returns the answer to err.
func responseTo(err error) errorResponse {
	for _, response := range errorResponses {
		if errors.Is(err, response.err) {
			return response
		}
	}
	return responseTo(errInternal)
}

// validationError maps each field that is not acceptable to what is wrong with it.
type validationError map[string]string

func (e validationError) Error() string { return errValidation.Error() }
func (e validationError) Unwrap() error { return errValidation }

// limitError is errRateLimited or errTooManyAttempts with the time to wait.
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

// writeError answers err and notes it for the log. The caller learns what the contract says and
// nothing else.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	info := infoOf(r)
	info.err = err
	response := responseTo(err)

	switch response.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", challenge(info, err))
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", seconds(retryAfter(err)))
	}
	answer := errorAnswer{
		Error:      response.message,
		StatusCode: response.status,
		RequestID:  info.id,
		Timestamp:  time.Now().UTC().Format(time.RFC3339),
		Code:       response.code,
	}
	var validation validationError
	if errors.As(err, &validation) {
		answer.Details = validation
	}
	_ = writeJSON(w, response.status, answer)
}

// challenge returns the WWW-Authenticate header of a 401 (RFC 6750 section 3).
func challenge(info *requestInfo, err error) string {
	if info.bearer && !errors.Is(err, errInvalidCredentials) {
		return `Bearer error="invalid_token"`
	}
	return "Bearer"
}

// retryAfter returns how long a caller should wait after err. An outage asks for one second.
func retryAfter(err error) time.Duration {
	var limited *limitError
	if errors.As(err, &limited) {
		return limited.retryAfter
	}
	return time.Second
}

// seconds rounds up to whole seconds, at least one, so a client that waits this long is not refused
// again.
func seconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

// writeJSON sends an answer. It encodes the answer before it writes anything, so what is sent is
// either whole or an error.
func writeJSON(w http.ResponseWriter, status int, answer any) error {
	encoded, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(encoded, '\n')) // a client that has hung up is no error of ours
	return nil
}

// timestamp is a time that is written as JavaScript writes a Date: RFC 3339 in UTC, to the
// millisecond.
type timestamp time.Time

func (t timestamp) MarshalText() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(nil, "2006-01-02T15:04:05.000Z"), nil
}

// Requests

// handlerFunc is an http.HandlerFunc that returns its error instead of writing it.
type handlerFunc func(w http.ResponseWriter, r *http.Request) error

// handle writes the error that h returns.
func handle(h handlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeError(w, r, err)
		}
	})
}

// middleware wraps a handler in something that a request passes first.
type middleware func(http.Handler) http.Handler

// chain returns the middleware that a request passes in the order given.
func chain(all ...middleware) middleware {
	return func(h http.Handler) http.Handler {
		for _, m := range slices.Backward(all) {
			h = m(h)
		}
		return h
	}
}

// requestInfo is what middleware and handlers note of a request, for each other and for the log.
type requestInfo struct {
	id        string
	ip        netip.Addr
	userID    string // the user of the shown token, or whose login was tried
	sessionID string
	bearer    bool  // a Bearer token was shown
	err       error // what was answered, if it was an error
}

type requestInfoKey struct{}

// infoOf returns the notes that observe has put into the context of r.
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

// requestID returns the caller's X-Request-Id if it is a UUID in its usual form, else a fresh one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if uuidForm.MatchString(id) {
		return id
	}
	return newUUID()
}

// clientIP returns the address of the client behind peer ("ip:port"). X-Forwarded-For counts only
// from a trusted peer. It is read from the right, since each trusted hop vouches for the one before
// it. What stands left of an untrusted or unreadable hop may be invented.
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

// statusRecorder remembers the status that is written through it.
type statusRecorder struct {
	http.ResponseWriter
	status int
}

func (rec *statusRecorder) WriteHeader(status int) {
	rec.status = status
	rec.ResponseWriter.WriteHeader(status)
}

// observe gives a request its id and its client IP, sets the headers of every answer, answers a
// panic as an error, and logs and counts the request when it is done. From here on a client that
// hangs up cancels nothing: what has begun is carried to its end, in bounded time.
func observe(log *slog.Logger, m *metrics, trusted []netip.Prefix) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			info := &requestInfo{
				id: requestID(r),
				ip: clientIP(r.RemoteAddr, r.Header.Values("X-Forwarded-For"), trusted),
			}
			ctx := context.WithoutCancel(r.Context())
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

// logRequest writes the one line that the log has for each request.
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

// cut shortens what a client has chosen, so that it cannot fill the log with one request.
func cut(text string) string {
	const maxLogged = 256
	return text[:min(len(text), maxLogged)]
}

// matchRoute notes the route of a request, for the log and the metrics of requests that are refused
// before they reach the mux. A path that the mux would redirect has no route.
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

// cors lets scripts of the listed origins read answers (Fetch standard, "CORS protocol"), and
// answers preflights.
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

// isPreflight reports whether a browser asks for permission before the request proper.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions &&
		r.Header.Get("Origin") != "" &&
		r.Header.Get("Access-Control-Request-Method") != ""
}

// rateLimit counts every request but those of the health routes. The headers are those of
// draft-ietf-httpapi-ratelimit-headers.
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
			h.Set("RateLimit", fmt.Sprintf(`"ip";r=%d;t=%s`, max(0, left), seconds(reset)))
			if left < 0 {
				m.rateLimited.Add(1)
				return &limitError{errRateLimited, reset}
			}
			next.ServeHTTP(w, r)
			return nil
		})
	}
}

// refuseCrossOrigin keeps the pages of other sites from acting with a user's cookie. The check of
// the standard library trusts Sec-Fetch-Site if there is one. Here an Origin must also be listed or
// be the server's own.
func refuseCrossOrigin(origins []string) middleware {
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		_ = protection.AddTrustedOrigin(origin) // an origin that it does not take is not trusted
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

// isCanonical reports whether the path is written in the one way that has a route: without a double
// slash, a dot segment, or an escape that is not needed.
func isCanonical(u *url.URL) bool {
	return u.Path == path.Clean("/"+u.Path) && u.Path == u.EscapedPath()
}

// Metrics

// refreshOutcome is what became of a refresh.
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

// histogram counts durations. buckets[i] counts those that are at most durationBuckets[i] but above
// the bound before it.
type histogram struct {
	buckets [len(durationBuckets)]uint64
	sum     float64 // in seconds
}

// sample is the present value of a series.
type sample struct {
	series string // a counter if its name ends in _total, else a gauge; labels included
	help   string // only of the first series of a name
	value  float64
}

// metrics counts in memory and writes the Prometheus text format when it is scraped.
type metrics struct {
	readSamples  func() []sample
	rateLimited  atomic.Uint64
	loginLimited atomic.Uint64

	mu        sync.Mutex
	requests  map[requestLabels]uint64
	durations map[string]*histogram // by route
	refreshes map[refreshOutcome]uint64
}

// newMetrics returns metrics that have counted nothing. readSamples is called at every scrape.
func newMetrics(readSamples func() []sample) *metrics {
	return &metrics{
		readSamples: readSamples,
		requests:    map[requestLabels]uint64{},
		durations:   map[string]*histogram{},
		refreshes:   map[refreshOutcome]uint64{},
	}
}

// countRequest counts a request that is done. Clients can make up methods, but no series of them.
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

// writeFamily writes the lines that precede the series of a metric.
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

// writeSamples writes what is read only now.
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
