package contract

import (
	"bytes"
	"io"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// metricFamilies are those of which the README tells, and their types.
var metricFamilies = map[string]string{
	"latchkey_http_requests_total":           "counter",
	"latchkey_http_request_duration_seconds": "histogram",
	"latchkey_rate_limited_total":            "counter",
	"latchkey_login_limited_total":           "counter",
	"latchkey_refresh_total":                 "counter",
	"latchkey_hashing_slots":                 "gauge",
	"latchkey_hashing_slots_in_use":          "gauge",
	"latchkey_hashing_waiting":               "gauge",
	"latchkey_hashing_refused_total":         "counter",
	"latchkey_mail_total":                    "counter",
	"latchkey_postgres_connections":          "gauge",
	"latchkey_postgres_connections_max":      "gauge",
	"latchkey_postgres_waits_total":          "counter",
	"latchkey_redis_connections":             "gauge",
	"latchkey_redis_timeouts_total":          "counter",
	"go_goroutines":                          "gauge",
	"go_memstats_sys_bytes":                  "gauge",
}

// scrape reads the metrics, and holds them to the format of Prometheus by its own parser.
func (s *server) scrape() string {
	resp, err := s.http.Get("http://" + s.env["METRICS_ADDR"] + "/metrics")
	if err != nil {
		s.Fatalf("%v", err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	parser := expfmt.NewTextParser(model.LegacyValidation)
	_, err = parser.TextToMetricFamilies(bytes.NewReader(text))
	kind := resp.Header.Get("Content-Type")
	good := err == nil && strings.HasPrefix(kind, "text/plain; version=0.0.4")
	s.expect(good, "%s: %v", kind, err)
	return string(text)
}

var metricsPromises = []promise{
	{"METRICS_ADDR is a listener of its own, with HELP and TYPE of all", own, func(s *server) {
		s = s.start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
		text := s.scrape()
		for name, kind := range metricFamilies {
			s.expect(strings.Contains(text, "# HELP "+name+" "), "%s has no HELP", name)
			typed := "# TYPE " + name + " " + kind + "\n"
			s.expect(strings.Contains(text, typed), "%s is no %s", name, kind)
		}
		s.send(get("/metrics")).refused("not_found")
	}},
	{"requests, limits and refreshes are counted, and no client's text is a label", own, counts},
}

func counts(s *server) {
	s = s.start(someLeeway.with(env{
		"METRICS_ADDR": "127.0.0.1:" + freePort(), "RATE_LIMIT_MAX": "20", "LOGIN_LIMIT_MAX": "1",
	}))
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
	s.afterLeeway()
	c.show(old).isTheft(c)
	ip := newIP()
	for range 21 {
		s.send(get("/auth/me").ip(ip))
	}
	text := s.scrape()
	for _, sample := range []string{
		`latchkey_http_requests_total{route="GET /auth/me",method="GET",status="200"} 1`,
		`latchkey_http_requests_total{route="GET /auth/me",method="GET",status="401"} 21`,
		`latchkey_http_requests_total{route="GET /auth/me",method="GET",status="429"} 1`,
		`latchkey_http_requests_total{route="DELETE /auth/sessions/{id}",` +
			`method="DELETE",status="404"} 1`,
		`latchkey_http_request_duration_seconds_count{route="GET /auth/me"} 23`,
		`latchkey_rate_limited_total 1`,
		`latchkey_login_limited_total 1`,
		`latchkey_refresh_total{outcome="rotated"} 1`,
		`latchkey_refresh_total{outcome="reused"} 1`,
		`latchkey_refresh_total{outcome="theft"} 1`,
		`latchkey_postgres_connections_max ` + s.env["DB_POOL_SIZE"],
		`latchkey_redis_timeouts_total 0`,
	} {
		s.expect(strings.Contains(text, "\n"+sample+"\n"), "there is no %s in\n%s", sample, text)
	}
	// The first connection was not there yet.
	s.expect(!strings.Contains(text, "\nlatchkey_postgres_waits_total 0\n"), "nobody has waited")
	// Who asks for strange paths and methods must not fill the memory with their labels.
	for _, ours := range []string{"somebody", "BREW", "4a1bb9d1", c.id, c.ip, emailMark} {
		s.expect(!strings.Contains(text, ours), "a client's own text is a label: %s", ours)
	}
}
