package contract

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// A finished is a subcommand that has ended.
type finished struct {
	*server
	args   []string
	status int
	stdout string
	stderr string
}

// operate runs a subcommand with the environment of the server.
func (s *server) operate(args ...string) *finished { return s.operateIn(s.env, args...) }

// operateIn runs a subcommand with exactly this environment.
func (s *server) operateIn(e env, args ...string) *finished {
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	cmd := s.lab.command(ctx, e, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout = &stdout
	cmd.Stderr = &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		s.Fatalf("%v", err)
	}
	return &finished{
		server: s,
		args:   args,
		status: cmd.ProcessState.ExitCode(),
		stdout: stdout.String(),
		stderr: stderr.String(),
	}
}

// done asserts that the subcommand has succeeded, and that its log shows no secret.
func (f *finished) done() *finished {
	f.assertFreeOfSecrets(f.stderr)
	if f.status != 0 {
		f.Fatalf("%q: exit status %d\n%s%s", f.args, f.status, f.stdout, f.stderr)
	}
	return f
}

// table is what was printed for people: the cells of each line. Two spaces or more separate them.
func (f *finished) table() (rows [][]string) {
	cells := regexp.MustCompile(` {2,}`)
	for line := range strings.Lines(f.done().stdout) {
		rows = append(rows, cells.Split(strings.TrimSpace(line), -1))
	}
	return rows
}

// A printedAccount is an account as JSON lines have it.
type printedAccount struct {
	ID            string
	Email         string
	CreatedAt     string
	EmailVerified bool
	Disabled      bool
	Sessions      []listed
	members       string
}

// accounts are the JSON lines that were printed.
func (f *finished) accounts() (accounts []printedAccount) {
	for line := range strings.Lines(f.done().stdout) {
		var a printedAccount
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			f.Fatalf("%q: %v: %s", f.args, err, line)
		}
		a.members = shape(json.NewDecoder(strings.NewReader(line)))
		accounts = append(accounts, a)
	}
	return accounts
}

// account is the one JSON line that was printed.
func (f *finished) account() printedAccount {
	accounts := f.accounts()
	if len(accounts) != 1 {
		f.Fatalf("%q: %d lines:\n%s", f.args, len(accounts), f.stdout)
	}
	return accounts[0]
}

var operatorPromises = []promise{
	{"user shows an account with its sessions, as a table and as a JSON line", own, showsAccounts},
	{"user: disabling ends every session at once, and login is 403 until the account is enabled",
		own, disables},
	{"an account that plain SQL has disabled is refused at login and at the next refresh", own,
		func(s *server) {
			c := s.signup()
			s.exec("UPDATE users SET disabled_at = now() WHERE id = $1", c.id)
			c.tryLogin().refused("account_disabled")
			c.show(c.refresh).refused("session_revoked")
			c.gone()
		}},
	{"login to a disabled account counts as no failure, and a wrong password stays a wrong one",
		own, func(s *server) {
			s = s.loginLimit(2)
			c := s.signup()
			s.operate("user", c.email, "disable").done()
			for range 3 {
				c.tryLogin().refused("account_disabled").keepsCookie()
			}
			s.guess(c.email, c.ip).refused("invalid_credentials")
		}},
	{"user: revoke ends every session, and the user may log in again", own, func(s *server) {
		c := s.signup()
		other := c.login()
		s.operate("user", c.email, "revoke").done()
		c.gone()
		other.gone()
		c.login().lives()
	}},
	{"user: delete ends every session and frees the address", own, func(s *server) {
		c := s.signup()
		s.operate("user", c.email, "delete").done()
		c.gone()
		c.tryLogin().refused("invalid_credentials")
		s.trySignup(c.email, c.password).ok()
	}},
	{"user: reset-link prints a link that works once, without mail, and verifies no address", own,
		linksWithoutMail},
	{"users lists the accounts whose address begins with PREFIX, in order, however many", own,
		listsAccounts},
	{"user, users: the address is found and listed in whatever case it is written", own,
		func(s *server) {
			s = s.startOn(newStores(s.T), nil)
			s.exec("INSERT INTO users (email, password_hash) VALUES ('Ada@example.com', 'x')")
			for _, args := range [][]string{
				{"user", " aDA@example.com"}, {"users", "aDA"}, {"users"},
			} {
				got := s.operate(append(args, "--json")...).account().Email
				s.expect(got == "Ada@example.com", "%q prints %q", args, got)
			}
		}},
	{"where there is no such account, exit status 1 and one line on standard error", own,
		func(s *server) {
			for _, action := range actions {
				f := s.operate("user", newEmail(), action)
				s.expect(f.status == 1 && f.stdout == "" && strings.Count(f.stderr, "\n") == 1,
					"%s: exit status %d\n%s%s", action, f.status, f.stdout, f.stderr)
			}
		}},
	{"each subcommand needs only the variables that it uses", own, needsOnly},
	{"each action is one line of the log, on standard error, without the address", own,
		func(s *server) {
			for _, action := range actions {
				c := s.signup()
				lines := strings.TrimSpace(s.operateIn(s.env.with(production),
					"user", c.email, action).done().stderr)
				if action == "show" {
					s.expect(lines == "", "show logs %s", lines)
					continue
				}
				var line struct{ Level, Action, UserID string }
				err := json.Unmarshal([]byte(lines), &line)
				s.expect(err == nil && line.Level == "INFO" && line.Action == action &&
					line.UserID == c.id, "%s logs %s (%v)", action, lines, err)
			}
		}},
	{"what a client has named itself, or an adopted table has, cannot command the terminal", own,
		func(s *server) {
			c := s.newUser()
			c.agent = "\u009b31m réd\u202e"
			c.send(signupOf(c.email, c.password)).ok()
			email := "\u009b31m ïd\u202e" + c.email
			s.exec("UPDATE users SET email = $1 WHERE email = $2", email, c.email)
			table := s.operate("user", email).done().stdout
			line := s.operate("user", email, "--json")
			got := line.account()
			s.expect(strings.Contains(table, "31m réd") && strings.Contains(table, "31m ïd") &&
				got.Sessions[0].UserAgent == c.agent && got.Email == email &&
				!strings.ContainsAny(table+line.stdout, "\u009b\u202e"),
				"it prints %q and %q", table, line.stdout)
		}},
	{"without Redis no session can be ended, so disable, revoke and delete fail as a whole", own,
		func(s *server) {
			c := s.signup()
			for _, action := range []string{"disable", "revoke", "delete"} {
				f := s.operateIn(s.env.with(env{"REDIS_URL": "redis://127.0.0.1:1"}),
					"user", c.email, action)
				s.expect(f.status == 1 && f.stdout == "" && strings.Count(f.stderr, "\n") == 1,
					"%s: exit status %d\n%s%s", action, f.status, f.stdout, f.stderr)
				c.lives()
			}
			c.login()
		}},
	{"an answer that cannot be written is exit status 1", own, func(s *server) {
		c := s.signup()
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			s.Skipf("%v", err)
		}
		defer full.Close()
		for _, args := range [][]string{
			{"users"}, {"user", c.email}, {"user", c.email, "enable"},
			{"user", c.email, "reset-link"}, {"user", c.email, "--json"},
		} {
			cmd := s.lab.command(s.Context(), s.env, args...)
			cmd.Stdout = full
			s.expect(cmd.Run() != nil, "%q succeeds", args)
		}
	}},
	{"a subcommand that is not understood prints the usage, and does nothing", own,
		func(s *server) {
			c := s.signup()
			for _, args := range [][]string{
				{"user"}, {"user", c.email, "destroy"}, {"user", c.email, "delete", "now"},
				{"users", "a", "b"}, {"users", "--jsno"},
			} {
				f := s.operate(args...)
				says := strings.Contains(f.stderr, "usage") &&
					strings.Contains(f.stderr, "latchkey "+strings.Join(args, " "))
				s.expect(f.status == 1 && f.stdout == "" && says,
					"%q: exit status %d\n%s%s", args, f.status, f.stdout, f.stderr)
			}
			c.lives()
		}},
}

// actions are what user does to an account.
var actions = []string{"show", "disable", "enable", "revoke", "reset-link", "delete"}

func showsAccounts(s *server) {
	c := s.signup()
	other := c.login()
	time.Sleep(time.Second) // the table has seconds
	other.rotate()
	s.exec(`UPDATE users
		SET created_at = '2026-01-02T03:04:05Z', email_verified_at = now()
		WHERE id = $1`, c.id)
	got := s.operate("user", c.email, "show", "--json").account()
	s.expect(got.members ==
		"{id email createdAt emailVerified disabled "+
			"sessions[{id createdAt lastUsedAt ip userAgent}]}", "the members are %s", got.members)
	s.expect(got.ID == c.id && got.Email == c.email && got.CreatedAt == "2026-01-02T03:04:05.000Z" &&
		got.EmailVerified && !got.Disabled, "it shows %+v", got)
	sessions := other.sessions()
	sessions[0].Current = false // an operator has no session
	s.expect(slices.Equal(got.Sessions, sessions), "the sessions are %v, not %v",
		got.Sessions, sessions)

	elsewhere := s.env.with(env{"TZ": "America/New_York"})
	rows := s.operateIn(elsewhere, "user", c.email).table() // show is what it does by itself
	s.expect(len(rows) == 6, "the table has %d lines: %q", len(rows), rows)
	seconds := func(text string) string { return s.isTime(text).Format(time.RFC3339) }
	used := sessions[0]
	for i, want := range map[int][]string{
		0: {"ID", "CREATED", "VERIFIED", "DISABLED", "EMAIL"},
		1: {c.id, "2026-01-02T03:04:05Z", "yes", "no", c.email},
		3: {"SESSION", "CREATED", "LAST USED", "IP", "USER AGENT"},
		4: {used.ID, seconds(used.CreatedAt), seconds(used.LastUsedAt), other.ip, other.agent},
	} {
		s.expect(slices.Equal(rows[i], want), "the table has %q, not %q", rows[i], want)
	}
	s.expect(rows[5][0] == c.sid(), "the table has %q", rows[5])
}

func disables(s *server) {
	c := s.signup()
	other := c.login()
	disabled := s.operate("user", c.email, "disable", "--json").account()
	s.expect(disabled.ID == c.id && disabled.Disabled, "it shows %+v", disabled)
	c.gone()
	other.gone()
	c.tryLogin().refused("account_disabled").want(403).keepsCookie()
	since := s.query("SELECT disabled_at::text FROM users WHERE id = $1", c.id)
	s.operate("user", c.email, "disable").done() // it is disabled already
	s.expect(since == s.query("SELECT disabled_at::text FROM users WHERE id = $1", c.id),
		"disabling again changes since when the account is disabled")

	enabled := s.operate("user", c.email, "enable", "--json").account()
	s.expect(enabled.ID == c.id && !enabled.Disabled, "it shows %+v", enabled)
	c.gone()
	c.login().lives()
}

func linksWithoutMail(s *server) {
	s = s.start(env{"SMTP_URL": "", "MAIL_FROM": "", "NODE_ENV": "production", "BCRYPT_COST": ""})
	c := s.signup()
	var printed struct{ Link, ExpiresAt string }
	text := s.operate("user", c.email, "reset-link", "--json").done().stdout
	if err := json.Unmarshal([]byte(text), &printed); err != nil {
		s.Fatalf("%v: %s", err, text)
	}
	left := time.Until(s.isTime(printed.ExpiresAt))
	s.expect(left > 28*time.Minute && left <= 30*time.Minute, "the link works for %v", left)
	page, token, _ := strings.Cut(printed.Link, "#token=")
	s.expect(page == frontend+"/reset-password", "the link leads to %s", page)
	next := newPassword()
	s.send(resetOf(token, next)).ok()
	s.send(resetOf(token, newPassword())).refused("invalid_link")
	c.gone()
	c.password = next
	c.login().verified(false)

	rows := s.operate("user", c.email, "reset-link").table()
	left = time.Until(s.isTime(rows[1][0]))
	s.expect(left > 28*time.Minute && left <= 30*time.Minute, "the table says %q", rows)
	_, token, _ = strings.Cut(rows[1][1], "#token=")
	s.send(resetOf(token, newPassword())).ok()
}

func listsAccounts(s *server) {
	s = s.startOn(newStores(s.T), nil)
	// Some rows have spaces at an end, as an adopted table may. Case does not count
	// in the order, which is that of the bytes.
	s.exec(`INSERT INTO users (email, password_hash, disabled_at)
		SELECT 'b-' || n || '@Example.com' || repeat(' ', n % 2), 'x', now()
		FROM generate_series(1, 2500) AS n`)
	s.exec(`INSERT INTO users (email, password_hash) VALUES
		('a_b@example.com', 'x'), ('a%b@example.com', 'x'), ('aab@example.com', 'x'),
		('é@example.com', 'x'), ('C@example.com', 'x')`)
	emails := func(args ...string) (emails []string) {
		for _, a := range s.operate(append(args, "--json")...).accounts() {
			s.expect(a.members == "{id email createdAt emailVerified disabled}" &&
				a.Disabled == strings.HasPrefix(a.Email, "b-"), "it prints %s %+v", a.members, a)
			emails = append(emails, strings.ToLower(a.Email))
		}
		return emails
	}
	all := emails("users")
	s.expect(len(all) == 2505 && slices.IsSorted(all), "%d are listed", len(all))
	s.expect(len(emails("users", "b-")) == 2500, "not all that begin with b- are listed")
	for prefix, want := range map[string]string{
		"a_": "[a_b@example.com]", "a%": "[a%b@example.com]", "é": "[é@example.com]",
		"B-1001": "[b-1001@example.com ]", "nobody": "[]",
	} {
		got := fmt.Sprint(emails("users", prefix))
		s.expect(got == want, "%s lists %s", prefix, got)
	}
	rows := s.operate("users", "a").table()
	s.expect(len(rows) == 4 && rows[0][0] == "ID" && rows[1][4] == "a%b@example.com",
		"the table is %q", rows)
}

func needsOnly(s *server) {
	database := env{"DATABASE_URL": s.env["DATABASE_URL"]}
	stores := database.with(env{"REDIS_URL": s.env["REDIS_URL"]})
	link := database.with(env{
		"JWT_REFRESH_SECRET": s.env["JWT_REFRESH_SECRET"],
		"FRONTEND_URL":       frontend,
	})
	c := s.signup()
	for subcommand, needed := range map[string]env{
		"users":                           database,
		"user " + c.email:                 stores,
		"user " + c.email + " disable":    stores,
		"user " + c.email + " enable":     database,
		"user " + c.email + " revoke":     stores,
		"user " + c.email + " reset-link": link,
		"user " + newEmail() + " delete":  stores,
	} {
		args := strings.Fields(subcommand)
		f := s.operateIn(needed, args...)
		known := f.status == 0 || strings.Contains(f.stderr, "no such user")
		s.expect(known, "%q: exit status %d\n%s", args, f.status, f.stderr)
		for name := range needed {
			f := s.operateIn(needed.with(env{name: ""}), args...)
			s.expect(f.status == 1 && strings.HasPrefix(f.stderr, name+": ") &&
				strings.Count(f.stderr, "\n") == 1 && f.stdout == "",
				"%q without %s: exit status %d\n%s%s", args, name, f.status, f.stdout, f.stderr)
		}
	}
	delete(link, "FRONTEND_URL")
	link["PASSWORD_RESET_URL"] = "https://app.example.com/reset"
	got := s.operateIn(link, "user", c.email, "reset-link").done().stdout
	s.expect(strings.Contains(got, "https://app.example.com/reset#token="), "it prints %s", got)
}
