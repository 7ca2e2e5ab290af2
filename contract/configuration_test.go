package contract

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// faulty asserts that a configuration stops the start with a line for each of these variables and
// no other.
func (s *server) faulty(e env, names ...string) (output string) {
	maps.DeleteFunc(e, func(_, value string) bool { return value == "" })
	status, output := s.exits(e)
	s.expect(status == 1, "%q: exit status %d, want 1\n%s", names, status, output)
	lines := 0
	for _, name := range names {
		n := len(regexp.MustCompile(`(?m)^(latchkey: )?`+name+`\b`).FindAllString(output, -1))
		s.expect(n == 1, "%d lines are about %s:\n%s", n, name, output)
		lines += n
	}
	n := strings.Count(strings.TrimSpace(output), "\n") + 1
	s.expect(n == lines, "%d lines for %q:\n%s", n, names, output)
	return output
}

var configurationPromises = []promise{
	{"all faults are reported at once, a line each that names its variable, without a secret", own,
		func(s *server) {
			const long = "hunter2 of 32 characters and more"
			faults := env{
				"NODE_ENV": "prod", "PORT": "seventy", "DB_POOL_SIZE": "0", "FRONTEND_URL": "*",
				"DATABASE_URL": "mysql://user:hunter2@h/x", "REDIS_URL": "http://:hunter2@h",
				// Secrets are to be long, to differ, and to have no white space at an end.
				"JWT_SECRET": "hunter2-short", "JWT_REFRESH_SECRET": long + " ",
				"JWT_SECRET_PREVIOUS": long + "\n", "JWT_REFRESH_SECRET_PREVIOUS": "\u00a0" + long,
				"RATE_LIMIT_WINDOW": "0", "RATE_LIMIT_MAX": "-1", "LOGIN_LIMIT_WINDOW": "x",
				"LOGIN_LIMIT_MAX": "1.5", "ACCESS_TOKEN_TTL": "900", "REFRESH_TOKEN_TTL": "-1h",
				"SESSION_MAX_TTL": "a month", "REFRESH_REUSE_LEEWAY": "x",
				"REFRESH_REUSE_POLICY": "no", "COOKIE_SAMESITE": "maybe",
				"TRUSTED_PROXIES": "everyone", "BCRYPT_COST": "11",
				"SMTP_URL": "imap://user:hunter2@h", "MAIL_FROM": "hunter2",
				"PASSWORD_RESET_URL": "/reset", "EMAIL_VERIFY_URL": "https://h/#hunter2",
				"MAIL_TEMPLATES": "/nowhere", "METRICS_ADDR": "nowhere",
				"LOG_LEVEL": "loud", "SHUTDOWN_DELAY": "-1s",
				"SHUTDOWN_TIMEOUT": "soon",
			}
			output := s.faulty(faults, slices.Collect(maps.Keys(faults))...)
			s.expect(!strings.Contains(output, "hunter2"), "a secret is shown:\n%s", output)
		}},
	{"what is required must be given in production", own, func(s *server) {
		s.faulty(env{}, "PORT", "DATABASE_URL", "DB_POOL_SIZE", "FRONTEND_URL", "REDIS_URL",
			"JWT_SECRET", "JWT_REFRESH_SECRET")
	}},
	{"settings of DATABASE_URL that would break the server are faults", own, func(s *server) {
		for _, setting := range []string{
			"default_query_exec_mode=describe_exec", "statement_cache_capacity=0",
		} {
			database := "postgres://user:hunter2@h/x?" + setting
			output := s.faulty(s.stores.environment(env{"DATABASE_URL": database}), "DATABASE_URL")
			s.expect(!strings.Contains(output, "hunter2"), "a secret is shown:\n%s", output)
		}
	}},
	{"no part of a password is ever shown, whatever is wrong with its URL", own, showsNoPassword},
	{"in development all has a default; the secrets are random, which the log says", own,
		func(s *server) {
			defaults := env{
				"JWT_SECRET": "", "JWT_REFRESH_SECRET": "", "DB_POOL_SIZE": "", "FRONTEND_URL": "",
			}
			one, two := s.start(defaults), s.start(defaults)
			c := one.signup()
			c.lives()
			c.on(two).me(c.access).refused("invalid_token") // another start has other secrets
			log := one.log()
			s.expect(strings.Contains(log, "JWT_SECRET"),
				"the log does not say that the secrets are random:\n%s", log)
			one.send(post("/auth/refresh").from("http://localhost:5173")).refused("missing_token")
		}},
	{"DATABASE_URL may name several hosts (target_session_attrs)", own, func(s *server) {
		u, err := url.Parse(s.stores.databaseURL)
		if err != nil {
			s.Fatal(err)
		}
		u.Host = "127.0.0.1:1," + u.Host
		query := u.Query()
		query.Set("target_session_attrs", "read-write")
		u.RawQuery = query.Encode()
		s.start(env{"DATABASE_URL": u.String()}).signup().lives()
	}},
	{"on SIGTERM /readyz is 503 for SHUTDOWN_DELAY while all is served; then the listener closes, " +
		"and requests in flight end", own, shutsDown},
	{"a request that never ends does not keep the process beyond SHUTDOWN_TIMEOUT", own,
		func(s *server) {
			s = s.start(env{"SHUTDOWN_TIMEOUT": "500ms"})
			s.mayFail = true
			defer s.startLogin(s.signup()).Close()
			began := time.Now()
			s.stop()
			took := time.Since(began)
			s.expect(took <= 3*time.Second, "the process ended after %v", took)
		}},
}

func showsNoPassword(s *server) {
	urls := map[string]string{
		"postgres://127.0.0.1:1/x?user=u&password=top-secret":     "DATABASE_URL",
		"host=127.0.0.1 port=1 user=u password=top-secret":        "DATABASE_URL",
		"postgres://user:top-secret@127.0.0.1:1/x?sslmode=secret": "DATABASE_URL",
	}
	for mark := range strings.FieldsSeq(`@ / : ? # % - ; \ $`) {
		urls["postgres://user:top"+mark+"secret@127.0.0.1:1/x"] = "DATABASE_URL"
		urls["redis://user:top"+mark+"secret@127.0.0.1:1/x"] = "REDIS_URL"
		urls["redis://h:1/x?master_name=m&sentinel_password=top"+mark+"secret"] = "REDIS_URL"
	}
	for value, name := range urls {
		output := s.startFails(s.stores.environment(env{name: value}))
		s.expect(strings.Contains(output, name) && !strings.Contains(output, "secret") &&
			!strings.Contains(output, "top"),
			"%s=%s:\n%s", name, value, output)
	}
}

// startLogin begins a login and leaves the end of its body out.
func (s *server) startLogin(c *client) net.Conn {
	conn, err := net.Dial("tcp", s.host())
	if err != nil {
		s.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	body := c.loginText("")
	fmt.Fprintf(conn, "POST /auth/login HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: %s\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", c.ip, len(body), body[:9])
	return conn
}

func shutsDown(s *server) {
	s = s.start(env{"SHUTDOWN_DELAY": "2s", "SHUTDOWN_TIMEOUT": "10s"})
	c := s.signup()
	logins := []net.Conn{s.startLogin(c), s.startLogin(c), s.startLogin(c)}
	ended := make(chan error)
	go func() { ended <- s.stop() }()
	s.eventually(5*time.Second, "/readyz says that it will end", func() bool {
		a := s.send(get("/readyz"))
		return a.status() == 503 && a.json["status"] == "unavailable" && a.json["postgres"] == "ok"
	})
	c.lives() // a client that has not seen it yet is served
	logins = append(logins, s.startLogin(c))
	s.eventually(10*time.Second, "the listener closes", func() bool {
		conn, err := net.Dial("tcp", s.host())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	time.Sleep(500 * time.Millisecond) // these requests take long
	for _, conn := range logins {
		io.WriteString(conn, c.loginText("")[9:])
		buffer := make([]byte, 12)
		_, err := io.ReadFull(conn, buffer)
		s.expect(err == nil && string(buffer) == "HTTP/1.1 200",
			"a login in flight got %q (%v)", buffer, err)
		conn.Close()
	}
	err := <-ended
	s.expect(err == nil, "the process ended with %v", err)
}
