package main

// middleware.go is what every request passes on its way to a handler, and where errors become responses.

import (
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
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// apiError is an error that the caller is told of. Its code decides status and message; cause is for the log.
type apiError struct {
	code       string
	details    map[string]string // field name to message, with validation_failed
	retryAfter time.Duration     // with 429; a 503 says one second
	cause      error
}

func (e *apiError) Error() string { return fmt.Sprintf("%s: %v", e.code, e.cause) }

func fail(code string) error { return &apiError{code: code} }

// responses says what a code is answered with, and which error of store.go or jwt.go it stands for.
var responses = map[string]struct {
	status  int
	message string
	err     error
}{
	"invalid_json":           {400, "Request body is not a valid JSON object", nil},
	"validation_failed":      {400, "Validation failed", nil},
	"email_exists":           {400, "Email already exists", errEmailExists},
	"invalid_credentials":    {401, "Invalid credentials", nil},
	"missing_token":          {401, "Authentication required", nil},
	"token_expired":          {401, "Token has expired", errTokenExpired},
	"invalid_token":          {401, "Invalid token", errTokenInvalid},
	"session_revoked":        {401, "Session has ended", errEnded},
	"refresh_reused":         {401, "Refresh token has already been used", errReused},
	"cross_origin":           {403, "Cross-origin request refused", nil},
	"not_found":              {404, "Not found", nil},
	"user_not_found":         {404, "User not found", errNoUser},
	"session_not_found":      {404, "Session not found", errNoSession},
	"method_not_allowed":     {405, "Method not allowed", nil},
	"body_too_large":         {413, "Request body is too large", nil},
	"unsupported_media_type": {415, "Content-Type must be application/json", nil},
	"rate_limited":           {429, "Too many requests", nil},
	"too_many_attempts":      {429, "Too many failed attempts", nil},
	"internal":               {500, "Internal server error", nil},
	"unavailable":            {503, "Service temporarily unavailable", errUnavailable},
	"overloaded":             {503, "Server is busy", nil},
}

// writeError answers err: as its code says or, where it has none, as internal. Nothing else of it reaches the caller.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	var e *apiError
	if !errors.As(err, &e) {
		e = &apiError{code: "internal", cause: err}
		for code, response := range responses {
			if response.err != nil && errors.Is(err, response.err) {
				e.code = code
			}
		}
	}
	about, response := aboutRequest(r), responses[e.code]
	about.err = e
	switch response.status {
	case http.StatusUnauthorized: // RFC 6750 section 3
		w.Header().Set("WWW-Authenticate", "Bearer")
		if about.bearer && e.code != "invalid_credentials" {
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", seconds(e.retryAfter))
	}
	told := body{"error": response.message, "statusCode": response.status, "requestId": about.id,
		"timestamp": time.Now().UTC().Format(time.RFC3339), "code": e.code}
	if e.details != nil {
		told["details"] = e.details
	}
	_ = writeJSON(w, response.status, told)
}

type body map[string]any

// writeJSON encodes v before it writes the status: an answer is whole, or none and an error.
func writeJSON(w http.ResponseWriter, status int, v body) error {
	encoded, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(encoded, '\n')) // a client that hung up is no error of ours
	return nil
}

// reply answers 200 with v, or returns err if there is one.
func reply(w http.ResponseWriter, err error, v body) error {
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}

// seconds rounds up to whole seconds, at least one: who comes back then is not early.
func seconds(d time.Duration) string {
	return strconv.Itoa(max(1, int(math.Ceil(d.Seconds()))))
}

func handle(h func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeError(w, r, err)
		}
	})
}

// about is what middleware and handlers note of a request, for each other and for the log.
type about struct {
	id     string
	ip     netip.Addr
	userID string
	bearer bool // a Bearer token was shown
	err    *apiError
}

type aboutKey struct{}

func aboutRequest(r *http.Request) *about { return r.Context().Value(aboutKey{}).(*about) }

// newUUID returns a random UUID (RFC 9562 section 5.4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// isUUID reports whether s is a UUID in its 36-character form, in either case.
var isUUID = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`).MatchString

// clientIP returns the client's address behind peer ("ip:port"). Only a trusted peer's X-Forwarded-For counts, from the
// right: each trusted hop vouches for the one before it; left of an untrusted or unreadable one all may be invented.
func clientIP(peer string, forwarded []string, trusted []netip.Prefix) netip.Addr {
	addrPort, _ := netip.ParseAddrPort(peer)
	ip := addrPort.Addr().Unmap().WithZone("")
	hops := strings.Split(strings.Join(forwarded, ","), ",")
	for _, hop := range slices.Backward(hops) {
		addr, err := netip.ParseAddr(strings.Trim(hop, " \t"))
		if err != nil || !slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			break
		}
		ip = addr.Unmap().WithZone("")
	}
	return ip
}

type recorder struct {
	http.ResponseWriter
	status int
}

func (rec *recorder) WriteHeader(status int) {
	rec.status = status
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

// observe gives the request its id and its client IP, logs and counts it, and answers a panic in what follows with a
// 500. From here on a client that hangs up cancels nothing: what has begun is carried to its end, in bounded time.
func observe(log *slog.Logger, m *metrics, trusted []netip.Prefix) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			start, rec := time.Now(), &recorder{w, http.StatusOK}
			a := &about{id: r.Header.Get("X-Request-Id"), ip: clientIP(r.RemoteAddr, r.Header.Values("X-Forwarded-For"), trusted)}
			if !isUUID(a.id) {
				a.id = newUUID()
			}
			r = r.WithContext(context.WithValue(context.WithoutCancel(r.Context()), aboutKey{}, a))
			w.Header().Set("X-Request-Id", a.id)
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			defer func() {
				if p := recover(); p != nil {
					writeError(rec, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
				}
				took := time.Since(start)
				m.observe(r.Method, r.Pattern, rec.status, took)
				level, attrs := slog.LevelInfo, []slog.Attr{slog.String("requestId", a.id), slog.String("method", r.Method),
					slog.String("path", r.URL.Path), slog.String("route", r.Pattern), slog.Int("status", rec.status),
					slog.Float64("durationMs", float64(took.Microseconds())/1000), slog.String("ip", a.ip.String())}
				if a.userID != "" {
					attrs = append(attrs, slog.String("userId", a.userID))
				}
				if a.err != nil && rec.status >= 500 {
					level, attrs = slog.LevelError, append(attrs, slog.String("error", a.err.Error()))
				}
				log.LogAttrs(r.Context(), level, "request", attrs...)
			}()
			next.ServeHTTP(rec, r)
		})
	}
}

// cors lets scripts of the listed origins read responses (Fetch standard, "CORS protocol"), and answers preflights.
func cors(origins []string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h, origin := w.Header(), r.Header.Get("Origin")
			preflight := r.Method == http.MethodOptions && origin != "" && r.Header.Get("Access-Control-Request-Method") != ""
			h.Set("Vary", "Origin")
			if slices.Contains(origins, origin) {
				h.Set("Access-Control-Allow-Origin", origin)
				h.Set("Access-Control-Allow-Credentials", "true")
				h.Set("Access-Control-Expose-Headers", "X-Request-Id, Retry-After, RateLimit, RateLimit-Policy")
				if preflight {
					h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE")
					h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id")
					h.Set("Access-Control-Max-Age", "600")
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

// refuseCrossOrigin keeps the pages of other sites from acting with the user's cookie. The standard library's check
// takes Sec-Fetch-Site's word where there is one; here an Origin has to be listed or the server's own as well.
func refuseCrossOrigin(origins []string) func(http.Handler) http.Handler {
	protection := http.NewCrossOriginProtection()
	for _, origin := range origins {
		_ = protection.AddTrustedOrigin(origin) // one that it does not take is not trusted
	}
	return func(next http.Handler) http.Handler {
		return handle(func(w http.ResponseWriter, r *http.Request) error {
			origin := r.Header.Get("Origin")
			u, err := url.Parse(origin)
			foreign := origin != "" && !slices.Contains(origins, origin) && (err != nil || u.Host == "" || u.Host != r.Host)
			if r.Method != http.MethodGet && r.Method != http.MethodHead && (foreign || protection.Check(r) != nil) {
				return fail("cross_origin")
			}
			next.ServeHTTP(w, r)
			return nil
		})
	}
}

// rateLimit counts every request but those of the health routes (draft-ietf-httpapi-ratelimit-headers).
func rateLimit(l *limiter, m *metrics) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return handle(func(w http.ResponseWriter, r *http.Request) error {
			if l.max > 0 && r.URL.Path != "/healthz" && r.URL.Path != "/readyz" {
				left, reset, err := l.request(r.Context(), aboutRequest(r).ip)
				if err != nil {
					return redisError("rate limit", err)
				}
				w.Header().Set("RateLimit-Policy", fmt.Sprintf(`"ip";q=%d;w=%d`, l.max, l.window))
				w.Header().Set("RateLimit", fmt.Sprintf(`"ip";r=%d;t=%s`, max(0, left), seconds(reset)))
				if left < 0 {
					m.add("latchkey_rate_limited_total", 1)
					return &apiError{code: "rate_limited", retryAfter: reset}
				}
			}
			next.ServeHTTP(w, r)
			return nil
		})
	}
}

// metrics counts in memory and writes the Prometheus text format. Series are named as they are written there.
type metrics struct {
	mu       sync.Mutex
	counters map[string]float64
	gauges   map[string]func() float64
}

// durationBuckets are upper bounds in seconds: below 10 ms nothing was hashed.
var durationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1)}

func newMetrics(gauges map[string]func() float64) *metrics {
	return &metrics{gauges: gauges, counters: map[string]float64{"latchkey_rate_limited_total": 0, "latchkey_login_limited_total": 0,
		`latchkey_refresh_total{outcome="rotated"}`: 0, `latchkey_refresh_total{outcome="resent"}`: 0,
		`latchkey_refresh_total{outcome="reused"}`: 0, `latchkey_refresh_total{outcome="theft"}`: 0, `latchkey_refresh_total{outcome="ended"}`: 0}}
}

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
	m.add(fmt.Sprintf(`latchkey_http_requests_total{route=%q,method=%q,status="%d"}`, route, method, status), 1)
	const duration = "latchkey_http_request_duration_seconds"
	for _, bound := range durationBuckets { // each counts all that is up to its bound
		m.add(fmt.Sprintf(`%s_bucket{route=%q,le="%v"}`, duration, route, bound), map[bool]float64{true: 1}[took.Seconds() <= bound])
	}
	m.add(fmt.Sprintf("%s_sum{route=%q}", duration, route), took.Seconds())
	m.add(fmt.Sprintf("%s_count{route=%q}", duration, route), 1)
}

// ServeHTTP writes all series, sorted, those of a family under one TYPE line.
func (m *metrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	m.mu.Lock()
	all := maps.Clone(m.counters)
	m.mu.Unlock()
	for series, read := range m.gauges {
		all[series] = read()
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	family := ""
	for _, series := range slices.Sorted(maps.Keys(all)) {
		name, _, _ := strings.Cut(series, "{")
		base, _, histogram := strings.Cut(name, "_seconds_")
		kind := "gauge"
		if histogram {
			name, kind = base+"_seconds", "histogram"
		} else if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		if name != family {
			family = name
			fmt.Fprintf(w, "# TYPE %s %s\n", name, kind)
		}
		fmt.Fprintf(w, "%s %v\n", series, all[series])
	}
}
