package integration

import (
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// scrape reads the metrics as Prometheus does.
func (s *server) scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	base, err := s.c.PortEndpoint(t.Context(), "9090/tcp", "http")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := httpClient.Get(base + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if kind := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || !strings.HasPrefix(kind, "text/plain; version=0.0.4") {
		t.Fatalf("GET /metrics: %d, %s", resp.StatusCode, kind)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		t.Fatalf("the metrics are no Prometheus text: %v", err)
	}
	return families
}

// value is the sum of a family's metrics that have these labels.
func value(families map[string]*dto.MetricFamily, name string, labels map[string]string) (sum float64) {
	for _, m := range families[name].GetMetric() {
		matches := 0
		for _, l := range m.GetLabel() {
			if labels[l.GetName()] == l.GetValue() {
				matches++
			}
		}
		if matches == len(labels) {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

func TestMetrics(t *testing.T) {
	if suite.c == nil {
		t.Skipf("needs %s", own)
	}
	t.Parallel()
	s := serve(t, home, shortLeeway.with(vars{"METRICS_ADDR": "0.0.0.0:9090", "RATE_LIMIT_MAX": "20", "LOGIN_LIMIT_MAX": "1"}))
	before := s.scrape(t)

	v := s.signup(t)
	v.send("GET", "/auth/me", nil).want(200)
	v.send("DELETE", "/auth/sessions/4a1bb9d1-8c8a-4b8c-9d55-6a8f3f3ea0c1", nil).want(404)
	s.send(t, request{method: "GET", path: "/somebody's/own/path"}).want(404)
	s.send(t, request{method: "BREW", path: "/auth/me"}).want(405)
	s.tryLogin(t, v.email, "wrong", v.ip).want(401)
	s.tryLogin(t, v.email, "wrong", v.ip).want(429)
	old := v.refresh
	v.rotate()
	v.show(old).refused(401, "refresh_reused").keepsCookie()
	afterLeeway()
	v.show(old).refused(401, "refresh_reused").clearsCookie()
	ip := newIP()
	for range 21 {
		s.send(t, request{method: "GET", path: "/auth/me", ip: ip})
	}
	after := s.scrape(t)

	for name, kind := range map[string]dto.MetricType{
		"latchkey_http_requests_total":           dto.MetricType_COUNTER,
		"latchkey_http_request_duration_seconds": dto.MetricType_HISTOGRAM,
		"latchkey_rate_limited_total":            dto.MetricType_COUNTER,
		"latchkey_login_limited_total":           dto.MetricType_COUNTER,
		"latchkey_refresh_total":                 dto.MetricType_COUNTER,
		"latchkey_hashing_slots":                 dto.MetricType_GAUGE,
		"latchkey_hashing_slots_in_use":          dto.MetricType_GAUGE,
		"latchkey_hashing_waiting":               dto.MetricType_GAUGE,
		"latchkey_hashing_refused_total":         dto.MetricType_COUNTER,
		"latchkey_postgres_connections":          dto.MetricType_GAUGE,
		"latchkey_redis_connections":             dto.MetricType_GAUGE,
		"go_goroutines":                          dto.MetricType_GAUGE,
	} {
		if family := after[name]; family == nil || family.GetType() != kind {
			t.Errorf("%s is %v, want a %v", name, family, kind)
		}
		if before[name] == nil {
			t.Errorf("%s is not there from the start", name)
		}
	}
	memory := false // whichever figure of it
	for name := range after {
		memory = memory || strings.HasPrefix(name, "go_mem") && strings.HasSuffix(name, "_bytes") && value(after, name, nil) > 0
	}
	if !memory {
		t.Error("there is no figure of the memory")
	}
	for _, x := range []struct {
		name   string
		labels map[string]string
		more   float64
	}{
		{"latchkey_http_requests_total", map[string]string{"route": "GET /auth/me", "method": "GET", "status": "200"}, 1},
		{"latchkey_http_requests_total", map[string]string{"route": "GET /auth/me", "method": "GET", "status": "401"}, 20},
		{"latchkey_http_requests_total", map[string]string{"route": "GET /auth/me", "method": "GET", "status": "429"}, 1},
		{"latchkey_http_requests_total", map[string]string{"route": "DELETE /auth/sessions/{id}", "method": "DELETE", "status": "404"}, 1},
		{"latchkey_http_requests_total", map[string]string{"route": "POST /auth/signup", "method": "POST", "status": "201"}, 1},
		{"latchkey_rate_limited_total", nil, 1},
		{"latchkey_login_limited_total", nil, 1},
		{"latchkey_refresh_total", map[string]string{"outcome": "rotated"}, 1},
		{"latchkey_refresh_total", map[string]string{"outcome": "reused"}, 1},
		{"latchkey_refresh_total", map[string]string{"outcome": "theft"}, 1},
		{"latchkey_http_request_duration_seconds", map[string]string{"route": "POST /auth/signup"}, 1},
		{"latchkey_http_request_duration_seconds", map[string]string{"route": "GET /auth/me"}, 22},
	} {
		if more := value(after, x.name, x.labels) - value(before, x.name, x.labels); more != x.more {
			t.Errorf("%s%v went up by %v, want %v", x.name, x.labels, more, x.more)
		}
	}
	if value(after, "latchkey_hashing_slots", nil) < 1 || value(after, "go_goroutines", nil) < 1 ||
		value(after, "latchkey_postgres_connections", nil) < 1 || value(after, "latchkey_redis_connections", nil) < 1 {
		t.Error("a figure that cannot be 0 is 0")
	}
	// Whoever asks for strange paths and methods must not fill the memory with their labels.
	for _, m := range after["latchkey_http_requests_total"].GetMetric() {
		for _, l := range m.GetLabel() {
			if strings.Contains(l.GetValue(), "somebody") || l.GetValue() == "BREW" || strings.Contains(l.GetValue(), "4a1bb9d1") {
				t.Errorf("a client's own text is a label: %v", m)
			}
			if !slices.Contains([]string{"route", "method", "status"}, l.GetName()) {
				t.Errorf("label %s", l.GetName())
			}
		}
	}
	s.send(t, request{method: "GET", path: "/metrics"}).refused(404, "not_found") // only on the listener of its own
}
