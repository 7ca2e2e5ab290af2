package contract

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// nowhere is production's environment without a fault, but with stores that cannot be reached.
func (s *server) nowhere() env {
	return s.stores.environment(production).with(env{
		"DATABASE_URL": "postgres://u:p@127.0.0.1:1/x?sslmode=disable",
		"REDIS_URL":    "redis://127.0.0.1:1",
	})
}

// faulty asserts that a configuration stops the start with one line for each of the variables named,
// and none for another.
func (s *server) faulty(e env, names ...string) (output string) {
	s.Helper()
	maps.DeleteFunc(e, func(_, value string) bool { return value == "" })
	status, output := s.exits(e)
	if status != 1 {
		s.Errorf("%q: exit status %d, want 1\n%s", names, status, output)
	}
	lines := 0
	for _, name := range names {
		n := len(regexp.MustCompile(`(?m)^(latchkey: )?`+name+`\b`).FindAllString(output, -1))
		if n != 1 {
			s.Errorf("%d lines are about %s:\n%s", n, name, output)
		}
		lines += n
	}
	if n := strings.Count(strings.TrimSpace(output), "\n") + 1; n != lines {
		s.Errorf("%d lines for %q:\n%s", n, names, output)
	}
	return output
}

var configurationPromises = []promise{
	{"all faults are reported at once, one line each that names its variable; no line shows a secret",
		own, func(s *server) {
			faults := env{
				"NODE_ENV": "prod", "PORT": "seventy", "DB_POOL_SIZE": "0", "FRONTEND_URL": "*",
				"DATABASE_URL": "mysql://user:hunter2@h/x", "REDIS_URL": "http://:hunter2@h",
				"JWT_SECRET": "hunter2-short", "JWT_REFRESH_SECRET": "hunter2-brief",
				"JWT_SECRET_PREVIOUS": "hunter2-old", "JWT_REFRESH_SECRET_PREVIOUS": "hunter2-older",
				"RATE_LIMIT_WINDOW": "0", "RATE_LIMIT_MAX": "-1", "LOGIN_LIMIT_WINDOW": "x",
				"LOGIN_LIMIT_MAX": "1.5", "ACCESS_TOKEN_TTL": "900", "REFRESH_TOKEN_TTL": "-1h",
				"SESSION_MAX_TTL": "a month", "REFRESH_REUSE_LEEWAY": "x", "REFRESH_REUSE_POLICY": "forgive",
				"COOKIE_SAMESITE": "maybe", "TRUSTED_PROXIES": "everyone", "BCRYPT_COST": "11",
				"METRICS_ADDR": "nowhere", "LOG_LEVEL": "loud", "SHUTDOWN_TIMEOUT": "soon",
			}
			var names []string
			for name := range faults {
				names = append(names, name)
			}
			if output := s.faulty(faults, names...); strings.Contains(output, "hunter2") {
				s.Errorf("a secret is shown:\n%s", output)
			}
		}},
	{"what is required must be given in production", own, func(s *server) {
		s.faulty(env{}, "PORT", "DATABASE_URL", "DB_POOL_SIZE", "FRONTEND_URL", "REDIS_URL",
			"JWT_SECRET", "JWT_REFRESH_SECRET")
	}},
	{"each fault alone stops the start, and no good value does", own, eachFault},
	{"secrets have no white space at either end, and all of them differ", own, func(s *server) {
		secret := labSecrets["JWT_SECRET"]
		for _, bad := range []string{secret + " ", "\t" + secret, secret + "\n", secret + "\r", "\u00a0" + secret} {
			for _, name := range []string{
				"JWT_SECRET", "JWT_REFRESH_SECRET", "JWT_SECRET_PREVIOUS", "JWT_REFRESH_SECRET_PREVIOUS",
			} {
				output := s.faulty(s.nowhere().with(env{name: bad}), name)
				if strings.Contains(output, secret) {
					s.Errorf("%s is shown:\n%s", name, output)
				}
			}
		}
		for _, name := range []string{
			"JWT_REFRESH_SECRET", "JWT_SECRET_PREVIOUS", "JWT_REFRESH_SECRET_PREVIOUS",
		} {
			s.faulty(s.nowhere().with(env{name: secret}), name)
		}
	}},
	{"no part of a password is ever shown, also of a URL that cannot be read as it was meant", own,
		showsNoPassword},
	{"in development all has a default, and the secrets are random; the log says so, not what they are",
		own, func(s *server) {
			defaults := env{
				"JWT_SECRET": "", "JWT_REFRESH_SECRET": "", "DB_POOL_SIZE": "", "FRONTEND_URL": "",
			}
			one, two := s.start(defaults), s.start(defaults)
			c := one.signup()
			c.lives()
			c.on(two).me(c.access).refused("invalid_token") // another start has other secrets
			if log := one.log.String(); !strings.Contains(log, "JWT_SECRET") {
				s.Errorf("the log does not say that the secrets are random:\n%s", log)
			}
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
	{"on SIGTERM requests in flight end, /readyz is 503 first, then the listener closes; status 0", own,
		shutsDown},
	{"a request that never ends does not keep the process longer than SHUTDOWN_TIMEOUT", own,
		func(s *server) {
			s = s.start(env{"SHUTDOWN_TIMEOUT": "500ms"})
			defer s.startLogin(s.signup()).Close()
			began := time.Now()
			s.stop()
			if took := time.Since(began); took > 5*time.Second {
				s.Errorf("the process ended after %v", took)
			}
		}},
}

func eachFault(s *server) {
	short := strings.Repeat("s", 31)
	// Each row starts the server once, with another fault of each variable.
	for _, bad := range []env{
		{"NODE_ENV": "test", "JWT_SECRET": short, "FRONTEND_URL": "https://app.example.com/login",
			"BCRYPT_COST": "17", "PORT": "65536", "TRUSTED_PROXIES": "10.0.0.0/8, 1.2.3.4/33",
			"ACCESS_TOKEN_TTL": "0s", "REFRESH_REUSE_LEEWAY": "-1s"},
		{"JWT_REFRESH_SECRET": short, "FRONTEND_URL": "null", "BCRYPT_COST": "4"},
		{"JWT_SECRET_PREVIOUS": short, "FRONTEND_URL": "https://app.example.com,*"},
		{"JWT_REFRESH_SECRET_PREVIOUS": short, "FRONTEND_URL": "https://user@app.example.com"},
		{"FRONTEND_URL": "app.example.com", "TRUSTED_PROXIES": "10.0.0.1", "REFRESH_TOKEN_TTL": "7d"},
		{"FRONTEND_URL": "https://app.example.com?x=1", "DB_POOL_SIZE": "many", "PORT": ":3000"},
	} {
		var names []string
		for name := range bad {
			names = append(names, name)
		}
		output := s.faulty(s.nowhere().with(bad), names...)
		if strings.Contains(output, labSecrets["JWT_SECRET"]) || strings.Contains(output, short) {
			s.Errorf("%v: a secret is shown:\n%s", bad, output)
		}
	}
	s.faulty(s.nowhere().with(env{"NODE_ENV": "staging", "BCRYPT_COST": "11"}), "BCRYPT_COST")
	development := s.nowhere().with(env{"NODE_ENV": "development", "BCRYPT_COST": "3"})
	s.faulty(development, "BCRYPT_COST")
	development = development.with(env{"BCRYPT_COST": "", "COOKIE_SAMESITE": "none"})
	s.faulty(development, "COOKIE_SAMESITE")
	// Without a fault it is the stores that stop it.
	status, output := s.exits(s.nowhere())
	if status != 1 || !strings.Contains(output, "DATABASE_URL") {
		s.Errorf("a good configuration without its stores: exit status %d\n%s", status, output)
	}
}

func showsNoPassword(s *server) {
	for _, x := range []struct{ name, value string }{
		{"DATABASE_URL", "postgres://user:top@secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top/secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top:secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top?secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top#secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top%secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://user:top-secret@127.0.0.1:1/x"},
		{"DATABASE_URL", "postgres://127.0.0.1:1/x?user=u&password=top-secret"},
		{"DATABASE_URL", "host=127.0.0.1 port=1 user=u password=top-secret"},
		{"REDIS_URL", "redis://user:top@secret@127.0.0.1:1"},
		{"REDIS_URL", "redis://user:top/secret@127.0.0.1:1"},
		{"REDIS_URL", "redis://user:top?secret@127.0.0.1:1"},
		{"REDIS_URL", "redis://user:top#secret@127.0.0.1:1"},
		{"REDIS_URL", "redis://user:top%secret@127.0.0.1:1"},
		{"REDIS_URL", "redis://:top-secret@127.0.0.1:1/x"},
	} {
		e := s.stores.environment(env{"SHUTDOWN_TIMEOUT": "1s"}).with(env{x.name: x.value})
		status, output := s.exits(e)
		if status != 1 || strings.Contains(output, "secret") || strings.Contains(output, "top") {
			s.Errorf("%s=%s: exit status %d\n%s", x.name, x.value, status, output)
		}
	}
}

// startLogin begins a login and leaves the end of its body out.
func (s *server) startLogin(c *client) net.Conn {
	s.Helper()
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
	s = s.start(env{"SHUTDOWN_TIMEOUT": "10s"})
	c := s.signup()
	logins := []net.Conn{s.startLogin(c), s.startLogin(c), s.startLogin(c)}
	ended := make(chan error)
	go func() { ended <- s.stop() }()
	s.eventually(5*time.Second, "/readyz says that it will end", func() bool {
		a := s.send(get("/readyz"))
		return a.status() == 503 && a.json["status"] == "unavailable" && a.json["postgres"] == "ok"
	})
	c.lives() // who has not seen it yet is served
	logins = append(logins, s.startLogin(c))
	s.eventually(10*time.Second, "the listener closes", func() bool {
		conn, err := net.Dial("tcp", s.host())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	for _, conn := range logins {
		io.WriteString(conn, c.loginText("")[9:])
		buffer := make([]byte, 12)
		if _, err := io.ReadFull(conn, buffer); err != nil || string(buffer) != "HTTP/1.1 200" {
			s.Errorf("a login in flight got %q (%v)", buffer, err)
		}
		conn.Close()
	}
	if err := <-ended; err != nil {
		s.Errorf("the process ended with %v", err)
	}
}
