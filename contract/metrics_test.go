package contract

import (
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// metricKinds are the families, of which the README tells.
var metricKinds = map[string]dto.MetricType{
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
	"go_memstats_sys_bytes":                  dto.MetricType_GAUGE,
}

// scrape reads the metrics as Prometheus does.
func (s *server) scrape() map[string]*dto.MetricFamily {
	resp, err := s.http.Get("http://" + s.env["METRICS_ADDR"] + "/metrics")
	if err != nil {
		s.Fatal(err)
	}
	defer resp.Body.Close()
	kind := resp.Header.Get("Content-Type")
	if resp.StatusCode != 200 || !strings.HasPrefix(kind, "text/plain; version=0.0.4") {
		s.Fatalf("GET /metrics: %d, %s", resp.StatusCode, kind)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		s.Fatalf("the metrics are no Prometheus text: %v", err)
	}
	return families
}

// value is the sum of a family's metrics that have these labels, as in route=/x&status=200.
func value(families map[string]*dto.MetricFamily, name, labels string) (sum float64) {
	for _, m := range families[name].GetMetric() {
		var has []string
		for _, l := range m.GetLabel() {
			has = append(has, l.GetName()+"="+l.GetValue())
		}
		lacks := func(label string) bool { return label != "" && !slices.Contains(has, label) }
		if !slices.ContainsFunc(strings.Split(labels, "&"), lacks) {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() +
				float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

var metricsPromises = []promise{
	{"every family has HELP and TYPE, from the start", own, func(s *server) {
		families := s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()}).scrape()
		for name, kind := range metricKinds {
			s.expect(families[name] != nil && families[name].GetType() == kind,
				"%s is %v, want a %v", name, families[name], kind)
			s.expect(families[name].GetHelp() != "", "%s has no HELP", name)
		}
		for _, gauge := range []string{
			"latchkey_hashing_slots", "go_goroutines", "latchkey_postgres_connections",
			"latchkey_redis_connections", "go_memstats_sys_bytes",
		} {
			s.expect(value(families, gauge, "") >= 1, "%s cannot be 0", gauge)
		}
	}},
	{"requests, limits and refreshes are counted, and no client's text is a label", own, counts},
	{"the metrics are on a listener of their own only", own, func(s *server) {
		s = s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
		s.send(get("/metrics")).refused("not_found")
		if resp, err := s.http.Get("http://" + s.env["METRICS_ADDR"] + "/auth/me"); err != nil ||
			resp.StatusCode != 404 {
			s.Errorf("GET /auth/me there: %v, %v, want 404", resp, err)
		}
	}},
}

func counts(s *server) {
	s = s.start(shortLeeway.with(env{
		"METRICS_ADDR": "127.0.0.1:" + freePort(), "RATE_LIMIT_MAX": "20", "LOGIN_LIMIT_MAX": "1",
	}))
	before := s.scrape()
	c := s.signup()
	c.me(c.access).ok()
	c.revoke("4a1bb9d1-8c8a-4b8c-9d55-6a8f3f3ea0c1").want(404)
	s.send(get("/somebody's/own/path")).want(404)
	s.send(to("BREW /auth/me")).want(405)
	s.guess(c.email, c.ip).refused("invalid_credentials")
	s.guess(c.email, c.ip).refused("too_many_attempts")
	old := c.refresh
	c.rotate()
	c.show(old).raced()
	afterLeeway()
	c.show(old).isTheft(c)
	ip := newIP()
	for range 21 {
		s.send(get("/auth/me").ip(ip))
	}
	after := s.scrape()

	for labels, more := range map[string]float64{
		"latchkey_http_requests_total?route=GET /auth/me&method=GET&status=200":    1,
		"latchkey_http_requests_total?route=GET /auth/me&method=GET&status=401":    21,
		"latchkey_http_requests_total?route=GET /auth/me&method=GET&status=429":    1,
		"latchkey_http_requests_total?route=DELETE /auth/sessions/{id}&status=404": 1,
		"latchkey_http_requests_total?route=POST /auth/signup&status=201":          1,
		"latchkey_rate_limited_total?":                                             1,
		"latchkey_login_limited_total?":                                            1,
		"latchkey_refresh_total?outcome=rotated":                                   1,
		"latchkey_refresh_total?outcome=reused":                                    1,
		"latchkey_refresh_total?outcome=theft":                                     1,
		"latchkey_http_request_duration_seconds?route=POST /auth/signup":           1,
		"latchkey_http_request_duration_seconds?route=GET /auth/me":                23,
	} {
		name, labels, _ := strings.Cut(labels, "?")
		if got := value(after, name, labels) - value(before, name, labels); got != more {
			s.Errorf("%s of %s went up by %v, want %v", name, labels, got, more)
		}
	}
	// Who asks for strange paths and methods must not fill the memory with their labels.
	for name, family := range after {
		for _, m := range family.GetMetric() {
			text := m.String()
			for _, own := range []string{"somebody", "BREW", "4a1bb9d1", c.id, c.ip, emailMark} {
				s.expect(!strings.Contains(text, own),
					"a client's own text is a label of %s: %s", name, text)
			}
		}
	}
}
