package contract

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// logLine is the one line of a request in a log of JSON lines.
func (s *server) logLine(a *answer) map[string]any {
	id := a.Header.Get("X-Request-Id")
	var found []map[string]any
	s.eventually(5*time.Second, "a log line of "+a.String(), func() bool {
		found = nil
		for text := range strings.Lines(s.log()) {
			line := map[string]any{}
			err := json.Unmarshal([]byte(text), &line)
			if err != nil && strings.HasSuffix(text, "\n") {
				s.Fatalf("the log line %q is no JSON: %v", text, err)
			}
			if line["requestId"] == id && line["status"] != nil {
				found = append(found, line)
			}
		}
		return len(found) > 0
	})
	s.expect(len(found) == 1, "%d lines of one request: %v", len(found), found)
	return found[0]
}

// loggedMail is a line of the log in development that stands for a mail.
var loggedMail = regexp.MustCompile(`(?m)^.*mail is logged, because SMTP_URL is not set.*$`)

// assertFreeOfSecrets searches for what no log may show. All tokens begin with eyJ, which is {" in
// base64url; all emails and passwords that the tests make up have their mark.
func (s *server) assertFreeOfSecrets(log string) {
	if s.conf("NODE_ENV") == "development" && s.conf("SMTP_URL") == "" {
		log = loggedMail.ReplaceAllString(log, "")
	}
	secrets := []string{"eyJ", "refreshToken", "$2a$", "$2b$", emailMark, passwordMark}
	for name, value := range s.env {
		if strings.HasPrefix(name, "JWT_") {
			secrets = append(secrets, value)
		}
		if u, err := url.Parse(value); err == nil && u.User != nil {
			if password, given := u.User.Password(); given {
				secrets = append(secrets, password, u.User.String())
			}
		}
	}
	for _, secret := range secrets {
		if secret != "" && strings.Contains(log, secret) {
			before, _, _ := strings.Cut(log, secret)
			s.Errorf("the log of %s shows %q, after …%s", s.URL, secret, tail(before, 1))
		}
	}
}

var logPromises = []promise{
	{"one JSON line per request, with user and session where known, and an error's code", own,
		logsRequests},
	{"LOG_LEVEL leaves out the lines below it", own, logsFromLevel},
	{"never a password, a token, a cookie, a secret or an email address", own, func(s *server) {
		// Every server's log is searched at its end; here is what has the best chance to be in it.
		s = s.start(production.with(env{"LOG_LEVEL": "debug"}))
		c := s.signup()
		c.send(get("/auth/me?token=" + c.access))
		c.send(post("/auth/login").text(c.loginText("") + "x")).refused("invalid_json")
		s.trySignup(c.email, c.password).refused("email_exists")
		c.show(c.refresh + "x").refused("invalid_token")
		c.sweep(func(r request) request { return evil(r) })
		lines := strings.Count(s.log(), "\n")
		s.expect(lines >= 10, "the log has only %d lines", lines)
	}},
	{"theft of a refresh token is a line at level WARN, with user and session", own,
		func(s *server) {
			s = s.start(production.with(someLeeway))
			c := s.signup()
			old := c.refresh
			c.rotate()
			raced := c.show(old)
			s.afterLeeway()
			theft := c.show(old).refused("refresh_reused").clearsCookie()
			line := s.logLine(raced)
			s.expect(line["level"] == "INFO", "a lost race is logged as %v", line)
			id := s.logLine(theft)["requestId"].(string)
			warning := regexp.MustCompile(`(?m)^.*"level":"WARN".*$`).FindString(s.log())
			for _, part := range []string{id, c.id, c.sid()} {
				s.expect(strings.Contains(warning, part),
					"the warning of the theft has no %s: %s", part, warning)
			}
		}},
	{"path and method are cut to 256 bytes, also on a 429", own, func(s *server) {
		s = s.start(production.with(env{"RATE_LIMIT_MAX": "1"}))
		ip := newIP()
		long := to(strings.Repeat("M", 900) + " /" + strings.Repeat("%C3%A9", 900))
		for _, code := range []string{"not_found", "rate_limited"} {
			line := s.logLine(s.send(long.ip(ip)).refused(code))
			method, path := fmt.Sprint(line["method"]), fmt.Sprint(line["path"])
			s.expect(len(method) <= 256 && len(path) <= 256 && len(method) >= 200 &&
				len(path) >= 200 && !strings.Contains(path, "\ufffd") && line["code"] == code,
				"%s is logged with %d bytes of method, %d of path: %.300v", code, len(method),
				len(path), line)
		}
		n := len(s.log())
		s.expect(n <= 4096, "the log has %d bytes after two requests", n)
		line := s.logLine(s.send(get("/auth/me").ip(ip)).refused("rate_limited"))
		s.expect(line["route"] == "GET /auth/me", "it never got there, and is logged as %v", line)
	}},
	{"no user can write a line of the log", own, func(s *server) {
		s = s.start(production)
		forged := get("/nowhere/%0a%7B%22level%22:%22FORGED%22%7D").agent(`{"level":"FORGED"}`)
		s.logLine(s.send(forged).refused("not_found"))
		for line := range strings.Lines(s.log()) {
			entry := struct{ Level string }{}
			err := json.Unmarshal([]byte(line), &entry)
			s.expect(err == nil && entry.Level != "FORGED",
				"a line of the log is %s (%v)", line, err)
		}
	}},
}

func logsFromLevel(s *server) {
	s = s.start(production.with(env{"LOG_LEVEL": "warn"}))
	s.send(get("/auth/me")).refused("missing_token")
	s.expect(!strings.Contains(s.log(), "request"), "LOG_LEVEL=warn logs\n%s", s.log())
}

func logsRequests(s *server) {
	s = s.start(production)
	c := s.signup()
	refresh := post("/auth/refresh").cookie(c.refresh)
	login := post("/auth/login")
	for _, x := range []struct {
		r      request
		route  string
		status int
		code   any
		user   bool // known, with the session
	}{
		{get("/auth/me?token=x").bearer(c.access), "GET /auth/me", 200, nil, true},
		{del("/auth/sessions/x").bearer(c.access), "DELETE /auth/sessions/{id}", 404,
			"session_not_found", true},
		{refresh, "POST /auth/refresh", 200, nil, true},
		{refresh, "POST /auth/refresh", 401, "refresh_reused", true},
		{login.text(c.loginText("")), "POST /auth/login", 200, nil, true},
		{login.text("{"), "POST /auth/login", 400, "invalid_json", false},
		{loginOf(newEmail(), "x"), "POST /auth/login", 401, "invalid_credentials", false},
		{get("/auth/me"), "GET /auth/me", 401, "missing_token", false},
		{get("/nowhere"), "", 404, "not_found", false},
		{get("/healthz"), "GET /healthz", 200, nil, false},
	} {
		x.r = x.r.ip(newIP())
		a := s.send(x.r).want(x.status)
		line := s.logLine(a)
		path, _, _ := strings.Cut(x.r.path, "?")
		route, _ := line["route"].(string) // or there is none
		sid, _ := line["sessionId"].(string)
		s.expect(line["method"] == x.r.method && line["path"] == path && route == x.route &&
			line["status"] == float64(x.status) && line["ip"] == x.r.header["X-Forwarded-For"] &&
			line["code"] == x.code && line["level"] == "INFO" && line["msg"] != "" &&
			(line["userId"] == c.id) == x.user && uuidForm.MatchString(sid) == x.user,
			"%s, %d %v is logged as %v", a, x.status, x.code, line)
		s.expect(x.r.path == "/auth/login" || !x.user || sid == c.sid(),
			"%s: sessionId is %q, want %q", a, sid, c.sid())
		ms, ok := line["durationMs"].(float64)
		s.expect(ok && ms > 0 && ms <= 60_000, "%s: durationMs is %v", a, line["durationMs"])
		s.isNow(fmt.Sprint(line["time"]))
	}
	line := s.logLine(s.guess(c.email, newIP()))
	s.expect(line["userId"] == c.id && line["sessionId"] == nil,
		"a failed login on an account is logged as %v", line)
	for purpose, token := range c.links() {
		line := s.logLine(s.send(c.using(purpose)(token)))
		s.expect(line["userId"] == c.id && line["sessionId"] == nil,
			"a link to %s is logged as %v", purpose, line)
	}
}
