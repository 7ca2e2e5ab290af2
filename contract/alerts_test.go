package contract

import (
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestAlertsAndDashboard lets a real Prometheus scrape a server by the configuration of
// examples/deploy. Whatever its alerts and its dashboard ask for must be there: a name that is
// misspelt in either of them would never be missed otherwise.
func TestAlertsAndDashboard(t *testing.T) {
	if os.Getenv("LATCHKEY_BASE_URL") != "" {
		t.Skipf("needs %s", own)
	}
	if _, err := exec.LookPath("prometheus"); err != nil {
		t.Skip("needs the program prometheus, which Debian's package prometheus has")
	}
	t.Parallel()
	s := newLab(t).start(env{"METRICS_ADDR": "127.0.0.1:" + freePort()})
	for _, route := range s.routes() {
		s.send(to(route))
	}
	s.signup().rotate()

	p := s.startPrometheus()
	s.eventually(30*time.Second, "the server has been scraped twice", func() bool {
		return p.has(`rate(latchkey_http_requests_total{job="latchkey"}[1m])`)
	})
	s.eventually(30*time.Second, "the alerts have been evaluated", p.alertsAreOK)
	for _, alert := range p.alerts() {
		p.checkNames(alert.Query)
	}
	for _, expr := range dashboardQueries(s) {
		p.checkNames(expr)
		p.expect(p.has(expr), "the dashboard has a panel that stays empty: %s", expr)
	}
}

// A prometheus is a running Prometheus.
type prometheus struct {
	*server // the test, and what it scrapes
	url     string
}

// startPrometheus runs a Prometheus until the test ends. It has the configuration of
// examples/deploy, but scrapes this server, and more often.
func (s *server) startPrometheus() *prometheus {
	dir := s.TempDir()
	example := func(name string) string {
		text, err := os.ReadFile(filepath.Join("..", "examples", "deploy", name))
		if err != nil {
			s.Fatalf("%v", err)
		}
		return string(text)
	}
	config := strings.NewReplacer(
		"'latchkey-1:9090', 'latchkey-2:9090'", s.env["METRICS_ADDR"],
		"interval: 15s", "interval: 1s",
		"'alertmanager:9093'", "",
	).Replace(example("prometheus.yml"))
	configFile := filepath.Join(dir, "prometheus.yml")
	for file, text := range map[string]string{
		configFile:                       config,
		filepath.Join(dir, "alerts.yml"): example("alerts.yml"),
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			s.Fatalf("%v", err)
		}
	}
	addr := "127.0.0.1:" + freePort()
	cmd := exec.CommandContext(s.Context(), "prometheus",
		"--config.file="+configFile,
		"--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+addr,
	)
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		s.Fatalf("%v", err)
	}
	s.Cleanup(func() {
		_ = cmd.Wait() // s.Context() has ended and killed it
		if s.Failed() {
			s.Logf("the end of Prometheus' log:\n%s", tail(log.String(), 10))
		}
	})
	return &prometheus{s, "http://" + addr}
}

// get asks the API of Prometheus, and decodes the data of its answer. It reports whether Prometheus
// has answered without an error.
func (p *prometheus) get(path string, data any) bool {
	resp, err := p.http.Get(p.url + "/api/v1/" + path)
	if err != nil {
		return false // it does not listen yet
	}
	defer resp.Body.Close()
	answer := struct{ Data any }{data}
	return json.NewDecoder(resp.Body).Decode(&answer) == nil && resp.StatusCode == 200
}

// has reports whether an expression is a valid one that yields something.
func (p *prometheus) has(expr string) bool {
	var data struct{ Result []any }
	return p.get("query?query="+url.QueryEscape(expr), &data) && len(data.Result) > 0
}

// values are the values that a label has anywhere.
func (p *prometheus) values(label string) (values []string) {
	p.get("label/"+label+"/values", &values)
	return values
}

// alert is an alert as Prometheus has read it.
type alert struct {
	Query     string
	Health    string
	LastError string
}

func (p *prometheus) alerts() (alerts []alert) {
	var data struct{ Groups []struct{ Rules []alert } }
	p.get("rules", &data)
	for _, group := range data.Groups {
		alerts = append(alerts, group.Rules...)
	}
	return alerts
}

// alertsAreOK reports whether all alerts have been evaluated, and fails the test if one cannot be.
func (p *prometheus) alertsAreOK() bool {
	alerts := p.alerts()
	for _, a := range alerts {
		p.expect(a.LastError == "", "%s: %s", a.Query, a.LastError)
	}
	isUnknown := func(a alert) bool { return a.Health == "unknown" }
	return len(alerts) > 0 && !slices.ContainsFunc(alerts, isUnknown)
}

var (
	metricName = regexp.MustCompile(`\b(latchkey|go)_\w+`)
	matcher    = regexp.MustCompile(`(\w+)(?:=|!=|=~|!~)"([^"]*)"`)
	labelList  = regexp.MustCompile(`\b(?:by|without|on|ignoring) \(([^)]*)\)`)
)

// checkNames looks for all metrics, labels and values of labels that an expression names. A status
// such as 500 need not have occurred, and no alert need have fired.
func (p *prometheus) checkNames(expr string) {
	labels := strings.FieldsFunc(
		strings.Join(submatches(labelList, expr), ","),
		func(r rune) bool { return strings.ContainsRune(", ", r) },
	)
	for _, found := range matcher.FindAllStringSubmatch(expr, -1) {
		label := found[1]
		labels = append(labels, label)
		if !slices.Contains([]string{"route", "outcome", "state"}, label) {
			continue
		}
		for value := range strings.SplitSeq(found[2], "|") {
			isThere := value == "" || slices.Contains(p.values(label), value)
			p.expect(isThere, "no %s is %q: %s", label, value, expr)
		}
	}
	for _, label := range labels {
		isThere := strings.HasPrefix(label, "alert") || len(p.values(label)) > 0
		p.expect(isThere, "there is no label %s: %s", label, expr)
	}
	for _, name := range metricName.FindAllString(expr, -1) {
		p.expect(p.has(name), "there is no metric %s: %s", name, expr)
	}
}

// submatches are the first groups of all matches.
func submatches(re *regexp.Regexp, text string) (groups []string) {
	for _, found := range re.FindAllStringSubmatch(text, -1) {
		groups = append(groups, found[1])
	}
	return groups
}

// dashboardQueries are the expressions of the dashboard, with its variables replaced. The server
// has answered nothing from 500 on, so the panel of these shows all answers.
func dashboardQueries(s *server) (exprs []string) {
	text, err := os.ReadFile(filepath.Join("..", "examples", "deploy", "dashboard.json"))
	if err != nil {
		s.Fatalf("%v", err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		s.Fatalf("%v", err)
	}
	variables := strings.NewReplacer(
		"$job", "latchkey",
		"$instance", ".*",
		"$__rate_interval", "1m",
		`status=~"5.."`, `status=~"..."`,
	)
	for _, panel := range dashboard.Panels {
		s.expect(len(panel.Targets) > 0, "panel %d asks for nothing", panel.ID)
		for _, target := range panel.Targets {
			exprs = append(exprs, variables.Replace(target.Expr))
		}
	}
	return exprs
}
