package main

// middleware.go is what every request passes on its way to a handler, and the one place where an error
// becomes a response.

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
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ---- errors and responses

// apiError is an error that the caller is told of. Its code decides status and message; cause is for the log.
type apiError struct {
	code       string
	details    map[string]string // field name to message, with validation_failed
	retryAfter time.Duration     // with 429
	refused    bool              // with 401: a Bearer token was shown
	cause      error
}

func (e *apiError) Error() string { return fmt.Sprintf("%s: %v", e.code, e.cause) }

// fail is the apiError that has nothing but a code.
func fail(code string) error { return &apiError{code: code} }

// responses says what a code is answered with.
var responses = map[string]struct {
	status  int
	message string
}{
	"invalid_json":           {400, "Request body is not a valid JSON object"},
	"validation_failed":      {400, "Validation failed"},
	"email_exists":           {400, "Email already exists"},
	"invalid_credentials":    {401, "Invalid credentials"},
	"missing_token":          {401, "Authentication required"},
	"token_expired":          {401, "Token has expired"},
	"invalid_token":          {401, "Invalid token"},
	"session_revoked":        {401, "Session has ended"},
	"refresh_reused":         {401, "Refresh token has already been used"},
	"cross_origin":           {403, "Cross-origin request refused"},
	"not_found":              {404, "Not found"},
	"user_not_found":         {404, "User not found"},
	"session_not_found":      {404, "Session not found"},
	"method_not_allowed":     {405, "Method not allowed"},
	"body_too_large":         {413, "Request body is too large"},
	"unsupported_media_type": {415, "Content-Type must be application/json"},
	"rate_limited":           {429, "Too many requests"},
	"too_many_attempts":      {429, "Too many failed attempts"},
	"internal":               {500, "Internal server error"},
	"unavailable":            {503, "Service temporarily unavailable"},
	"overloaded":             {503, "Server is busy"},
}

// writeError answers err. What is no apiError is told as 503 where a store did not answer, else as 500.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	var e *apiError
	switch {
	case errors.As(err, &e):
	case errors.Is(err, errUnavailable):
		e = &apiError{code: "unavailable", cause: err}
	default:
		e = &apiError{code: "internal", cause: err}
	}
	about, response := aboutRequest(r), responses[e.code]
	about.err = e
	switch response.status {
	case http.StatusUnauthorized: // RFC 6750 section 3
		challenge := "Bearer"
		if e.refused {
			challenge = `Bearer error="invalid_token"`
		}
		w.Header().Set("WWW-Authenticate", challenge)
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", seconds(e.retryAfter))
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, response.status, struct {
		Error      string            `json:"error"`
		StatusCode int               `json:"statusCode"`
		RequestID  string            `json:"requestId"`
		Timestamp  string            `json:"timestamp"`
		Code       string            `json:"code"`
		Details    map[string]string `json:"details,omitempty"`
	}{response.message, response.status, about.id, time.Now().UTC().Format(time.RFC3339), e.code, e.details})
}

// writeJSON encodes v before it writes the status, so that an answer is whole or a 500.
func writeJSON(w http.ResponseWriter, status int, v any) {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		panic(err) // only a type that cannot be encoded
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body.Bytes())
}

// seconds rounds up to whole seconds, at least one: a client that comes back then is not early.
func seconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

// handle makes a handler of one that returns its error.
func handle(h func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeError(w, r, err)
		}
	})
}

// ---- what is known of a request

// about is what the middleware and the handlers note of a request, for each other and for the log.
type about struct {
	id     string
	ip     netip.Addr
	route  string // the pattern it matched
	userID string
	err    *apiError
}

type aboutKey struct{}

func aboutRequest(r *http.Request) *about { return r.Context().Value(aboutKey{}).(*about) }

// identify gives the request its id and its client IP, and the response the headers that all have.
func identify(trusted []netip.Prefix) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id := r.Header.Get("X-Request-Id")
			if !isUUID(id) {
				id = newUUID()
			}
			h := w.Header()
			h.Set("X-Request-Id", id)
			h.Set("Cache-Control", "no-store")
			h.Set("X-Content-Type-Options", "nosniff")
			a := &about{id: id, ip: clientIP(r.RemoteAddr, r.Header.Values("X-Forwarded-For"), trusted)}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), aboutKey{}, a)))
		})
	}
}

// newUUID returns a random UUID (RFC 9562 section 5.4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// isUUID reports whether s is a UUID in its 36-character form, in either case.
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') ||
			!dash && !strings.ContainsRune("0123456789abcdefABCDEF", rune(c)) {
			return false
		}
	}
	return true
}

// clientIP returns the address of the client behind peer ("ip:port"). Only a trusted peer's X-Forwarded-For
// counts. It is read from the right, where the proxies nearest to us wrote: each trusted hop vouches for the one
// before it, and what stands left of an untrusted or unreadable one is the client's own invention.
func clientIP(peer string, forwarded []string, trusted []netip.Prefix) netip.Addr {
	addrPort, _ := netip.ParseAddrPort(peer)
	ip := addrPort.Addr().Unmap().WithZone("")
	hops := strings.Split(strings.Join(forwarded, ","), ",")
	for i := len(hops) - 1; i >= 0; i-- {
		if !slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			break
		}
		hop, err := netip.ParseAddr(strings.Trim(hops[i], " \t"))
		if err != nil {
			break
		}
		ip = hop.Unmap().WithZone("")
	}
	return ip
}

// ---- log, recover and metrics

// recorder remembers the status of a response.
type recorder struct {
	http.ResponseWriter
	status int
}

func (rec *recorder) WriteHeader(status int) {
	rec.status = status
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

// observe logs the request, counts it, and answers a panic in what follows with a 500.
func observe(log *slog.Logger, m *metrics) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			start, rec, a := time.Now(), &recorder{w, http.StatusOK}, aboutRequest(r)
			defer func() {
				if p := recover(); p != nil {
					writeError(rec, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
				}
				took := time.Since(start)
				attrs := []slog.Attr{slog.String("requestId", a.id), slog.String("method", r.Method),
					slog.String("path", r.URL.Path), slog.String("route", a.route), slog.Int("status", rec.status),
					slog.Float64("durationMs", float64(took.Microseconds())/1000), slog.String("ip", a.ip.String())}
				if a.userID != "" {
					attrs = append(attrs, slog.String("userId", a.userID))
				}
				level := slog.LevelInfo
				if rec.status >= 500 && a.err != nil {
					level = slog.LevelError
					attrs = append(attrs, slog.String("error", a.err.Error()))
				}
				log.LogAttrs(r.Context(), level, "request", attrs...)
				m.observe(r.Method, a.route, rec.status, took)
			}()
			next.ServeHTTP(rec, r)
		})
	}
}

// ---- browsers

// isListed reports whether the Origin header is one of the frontend's origins.
func isListed(origins []string, origin string) bool {
	return origin != "" && slices.Contains(origins, origin)
}

// cors lets scripts of the listed origins read responses (Fetch standard, "CORS protocol"), and answers preflights.
func cors(origins []string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h, origin := w.Header(), r.Header.Get("Origin")
			h.Add("Vary", "Origin")
			preflight := r.Method == http.MethodOptions && origin != "" && r.Header.Get("Access-Control-Request-Method") != ""
			if isListed(origins, origin) {
				h.Set("Access-Control-Allow-Origin", origin)
				h.Set("Access-Control-Allow-Credentials", "true")
				if preflight {
					h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
					h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id")
					h.Set("Access-Control-Max-Age", "600")
				} else {
					h.Set("Access-Control-Expose-Headers", "X-Request-Id, Retry-After, RateLimit, RateLimit-Policy")
				}
			}
			if preflight {
				w.WriteHeader(http.StatusNoContent)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// refuseCrossOrigin keeps the pages of other sites from acting with the user's cookie. The standard library
// trusts Sec-Fetch-Site where there is one; here an Origin, too, has to be listed or the server's own.
func refuseCrossOrigin(origins []string) (func(http.Handler) http.Handler, error) {
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		if err := protection.AddTrustedOrigin(origin); err != nil {
			return nil, err
		}
	}
	foreign := func(r *http.Request) bool {
		origin := r.Header.Get("Origin")
		if origin == "" || isListed(origins, origin) {
			return false
		}
		u, err := url.Parse(origin)
		return err != nil || u.Host == "" || u.Host != r.Host
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			safe := r.Method == http.MethodGet || r.Method == http.MethodHead
			if !safe && (foreign(r) || protection.Check(r) != nil) {
				writeError(w, r, fail("cross_origin"))
				return
			}
			next.ServeHTTP(w, r)
		})
	}, nil
}

// ---- rate limit

// rateLimit counts every request but those of the health routes (draft-ietf-httpapi-ratelimit-headers).
func rateLimit(l *limiter, m *metrics) func(http.Handler) http.Handler {
	quota := fmt.Sprintf(`"ip";q=%d;w=%d`, l.max, l.window)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if l.max == 0 || r.URL.Path == "/healthz" || r.URL.Path == "/readyz" {
				next.ServeHTTP(w, r)
				return
			}
			left, reset, err := l.request(r.Context(), aboutRequest(r).ip)
			if err != nil {
				writeError(w, r, fmt.Errorf("%w: rate limit: %v", errUnavailable, err))
				return
			}
			w.Header().Set("RateLimit-Policy", quota)
			w.Header().Set("RateLimit", fmt.Sprintf(`"ip";r=%d;t=%s`, max(0, left), seconds(reset)))
			if left < 0 {
				m.count("latchkey_rate_limited_total")
				writeError(w, r, &apiError{code: "rate_limited", retryAfter: reset})
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// ---- metrics

// metrics counts in memory and writes the Prometheus text format. A series is named as it is written there, with
// its labels.
type metrics struct {
	mu       sync.Mutex
	counters map[string]float64
	gauges   map[string]func() float64
}

// durationBuckets are upper bounds in seconds: below 10 ms nothing was hashed.
var durationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1)}

func newMetrics(gauges map[string]func() float64) *metrics {
	m := &metrics{counters: map[string]float64{"latchkey_rate_limited_total": 0, "latchkey_login_limited_total": 0}, gauges: gauges}
	for _, outcome := range []string{"rotated", "resent", "reused", "theft"} {
		m.counters[`latchkey_refresh_total{outcome="`+outcome+`"}`] = 0
	}
	return m
}

func (m *metrics) count(series string) { m.add(series, 1) }

func (m *metrics) add(series string, n float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counters[series] += n
}

// observe counts a request. Clients can make up methods; a series for each is not theirs to make.
func (m *metrics) observe(method, route string, status int, took time.Duration) {
	if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}, method) {
		method = "other"
	}
	m.count(fmt.Sprintf(`latchkey_http_requests_total{route=%q,method=%q,status="%d"}`, route, method, status))
	const duration = "latchkey_http_request_duration_seconds"
	for _, bound := range durationBuckets { // all of them, each under its own name: a histogram is cumulative
		n := 0.0
		if took.Seconds() <= bound {
			n = 1
		}
		m.add(fmt.Sprintf(`%s_bucket{route=%q,le="%v"}`, duration, route, bound), n)
	}
	m.add(fmt.Sprintf("%s_sum{route=%q}", duration, route), took.Seconds())
	m.add(fmt.Sprintf("%s_count{route=%q}", duration, route), 1)
}

// ServeHTTP writes all series, sorted, so that those of a family stand together under one TYPE line.
func (m *metrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(m.counters)
	for series, read := range m.gauges {
		all[series] = read()
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	families := map[string]bool{}
	for _, series := range slices.Sorted(maps.Keys(all)) {
		family, _, _ := strings.Cut(series, "{")
		kind := "gauge"
		if strings.HasSuffix(family, "_total") {
			kind = "counter"
		}
		if name, _, ok := strings.Cut(family, "_seconds_"); ok {
			family, kind = name+"_seconds", "histogram"
		}
		if !families[family] {
			families[family] = true
			fmt.Fprintf(w, "# TYPE %s %s\n", family, kind)
		}
		fmt.Fprintf(w, "%s %v\n", series, all[series])
	}
}
