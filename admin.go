package main

// admin.go has the operator's subcommands: user shows or changes one account, and users lists
// accounts. They read only those variables that they use. Answers go to standard output. What
// changes an account, or makes a link to it, is one line of the log, on standard error.

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// admin executes the operator's subcommands.
type admin struct {
	store *store
	links links
	log   *slog.Logger
	out   report
}

// adminNeeds says what a subcommand needs beside PostgreSQL.
type adminNeeds struct {
	redis bool
	links bool
}

// userAction is something that an operator does with an account.
type userAction struct {
	needs adminNeeds
	do    func(a *admin, ctx context.Context, u user) error
}

// userActions has the actions of the subcommand user by their names.
var userActions = map[string]userAction{
	"show":       {adminNeeds{redis: true}, (*admin).showUser},
	"disable":    {adminNeeds{redis: true}, (*admin).disableUser},
	"enable":     {adminNeeds{}, (*admin).enableUser},
	"revoke":     {adminNeeds{redis: true}, (*admin).revokeSessions},
	"delete":     {adminNeeds{redis: true}, (*admin).deleteUser},
	"reset-link": {adminNeeds{links: true}, (*admin).makeResetLink},
}

// runUser executes the subcommand user. args are an email and, unless it is show, an action.
func runUser(ctx context.Context, env *environment, args []string, stdout, stderr io.Writer) error {
	args, out := newReport(args, stdout)
	name := "show"
	if len(args) == 2 {
		name = args[1]
	}
	action, known := userActions[name]
	if !known || len(args) < 1 || len(args) > 2 {
		return usageError(stderr, "user")
	}
	a, err := newAdmin(ctx, env, action.needs, out, stderr)
	if err != nil {
		return err
	}
	defer a.close()
	u, err := a.store.findUserByEmail(ctx, normalizeEmail(args[0]))
	if err != nil {
		return err
	}
	return action.do(a, ctx, u)
}

// runUsers executes the subcommand users. args may have the beginning of the emails to list.
func runUsers(
	ctx context.Context,
	env *environment,
	args []string,
	stdout, stderr io.Writer,
) error {
	args, out := newReport(args, stdout)
	if len(args) > 1 {
		return usageError(stderr, "users")
	}
	a, err := newAdmin(ctx, env, adminNeeds{}, out, stderr)
	if err != nil {
		return err
	}
	defer a.close()
	return a.listUsers(ctx, strings.Join(args, ""))
}

// newAdmin reads the variables that a subcommand needs, and connects to the stores.
func newAdmin(
	ctx context.Context,
	env *environment,
	needs adminNeeds,
	out report,
	stderr io.Writer,
) (*admin, error) {
	database := env.database()
	var redisOptions *redis.UniversalOptions
	if needs.redis {
		redisOptions = env.redis()
	}
	var l links
	if needs.links {
		l = env.resetLinks()
	}
	if err := env.err(); err != nil {
		return nil, err
	}

	db, err := pgxpool.NewWithConfig(ctx, database)
	if err != nil {
		return nil, err
	}
	a := &admin{
		store: &store{
			db:              db,
			postgresTimeout: postgresTimeout,
		},
		links: l,
		log:   newLogger(config{development: env.development}, stderr),
		out:   out,
	}
	if needs.redis {
		a.store.rdb = newRedisClient(redisOptions)
	}
	return a, nil
}

func (a *admin) close() {
	a.store.db.Close()
	if a.store.rdb != nil {
		_ = a.store.rdb.Close()
	}
}

// showUser prints an account and its sessions.
func (a *admin) showUser(ctx context.Context, u user) error {
	sessions, err := a.store.listSessions(ctx, u.ID)
	if err != nil {
		return err
	}
	return a.out.accountWithSessions(u, sessions)
}

// disableUser ends all sessions of an account and keeps the user from logging in.
func (a *admin) disableUser(ctx context.Context, u user) error {
	u, err := a.store.disableUser(ctx, u.ID)
	return a.done("disable", u, err)
}

// enableUser lets the user of an account log in again.
func (a *admin) enableUser(ctx context.Context, u user) error {
	u, err := a.store.enableUser(ctx, u.ID)
	return a.done("enable", u, err)
}

// revokeSessions ends all sessions of an account.
func (a *admin) revokeSessions(ctx context.Context, u user) error {
	err := a.store.revokeAll(ctx, u.ID, noSession)
	return a.done("revoke", u, err)
}

// deleteUser deletes an account and ends all of its sessions.
func (a *admin) deleteUser(ctx context.Context, u user) error {
	err := retryStale(func() error {
		latest, err := a.store.findUserByID(ctx, u.ID)
		if err != nil {
			return err
		}
		return a.store.deleteUser(ctx, latest, noSession)
	})
	return a.done("delete", u, err)
}

// done logs what was done to an account, and prints the account. If err is not nil, nothing was
// done, and done returns err.
func (a *admin) done(action string, u user, err error) error {
	if err != nil {
		return err
	}
	a.logAction(action, u)
	return a.out.account(u)
}

func (a *admin) logAction(action string, u user) {
	a.log.Info("operator", "action", action, "userId", u.ID)
}

// makeResetLink prints a link with which the user of an account chooses a new password.
func (a *admin) makeResetLink(_ context.Context, u user) error {
	now := time.Now()
	url := a.links.url(linkOperatorReset, u, u.Email, now)
	a.logAction("reset-link", u)
	return a.out.link(url, now.Add(resetLifetime).Truncate(time.Second)) // as the token says it
}

// listUsers prints the accounts whose emails begin with prefix.
func (a *admin) listUsers(ctx context.Context, prefix string) error {
	after := ""
	a.out.accountHeader()
	for {
		users, err := a.store.listUsers(ctx, prefix, after)
		if err != nil {
			return err
		}
		for _, u := range users {
			a.out.accountRow(u)
		}
		if err := a.out.w.Flush(); err != nil {
			return err
		}
		if len(users) < usersPage {
			return nil
		}
		after = users[len(users)-1].Email
	}
}

// Answers

// accountReport is an account as the subcommands print it.
type accountReport struct {
	ID            string    `json:"id"`
	Email         string    `json:"email"`
	CreatedAt     timestamp `json:"createdAt"`
	EmailVerified bool      `json:"emailVerified"`
	Disabled      bool      `json:"disabled"`
}

// sessionReport is a session as the subcommands print it.
type sessionReport struct {
	ID         string    `json:"id"`
	CreatedAt  timestamp `json:"createdAt"`
	LastUsedAt timestamp `json:"lastUsedAt"`
	IP         string    `json:"ip"`
	UserAgent  string    `json:"userAgent"`
}

// detailedReport is an account with its sessions.
type detailedReport struct {
	accountReport
	Sessions []sessionReport `json:"sessions"`
}

// linkReport is a link and how long it works.
type linkReport struct {
	Link      string    `json:"link"`
	ExpiresAt timestamp `json:"expiresAt"`
}

func reportOf(u user) accountReport {
	return accountReport{
		ID:            u.ID,
		Email:         u.Email,
		CreatedAt:     timestamp(u.CreatedAt),
		EmailVerified: u.Verified,
		Disabled:      u.Disabled,
	}
}

// The columns of the tables. The last one may be of any width.
const (
	accountColumns = "%-36s  %-20s  %-8s  %-8s  %s\n"
	sessionColumns = "%-36s  %-20s  %-20s  %-15s  %s\n"
	linkColumns    = "%-20s  %s\n"
)

// report prints the answers of a subcommand: a table for people or, if asJSON is set, one JSON
// object per line. What it prints may be in w until that is flushed.
type report struct {
	w      *bufio.Writer
	asJSON bool
}

// newReport returns the arguments without --json, and a report that obeys it.
func newReport(args []string, stdout io.Writer) ([]string, report) {
	isJSON := func(arg string) bool { return arg == "--json" }
	return slices.DeleteFunc(slices.Clone(args), isJSON), report{
		w:      bufio.NewWriter(stdout),
		asJSON: slices.ContainsFunc(args, isJSON),
	}
}

// account prints an account.
func (r report) account(u user) error {
	r.accountHeader()
	r.accountRow(u)
	return r.w.Flush()
}

func (r report) accountHeader() {
	if !r.asJSON {
		fmt.Fprintf(r.w, accountColumns, "ID", "CREATED", "VERIFIED", "DISABLED", "EMAIL")
	}
}

func (r report) accountRow(u user) {
	if r.asJSON {
		r.json(reportOf(u))
		return
	}
	fmt.Fprintf(r.w, accountColumns,
		u.ID,
		tableTime(u.CreatedAt),
		yesOrNo(u.Verified),
		yesOrNo(u.Disabled),
		printable(u.Email),
	)
}

// accountWithSessions prints an account and its sessions.
func (r report) accountWithSessions(u user, sessions []session) error {
	if r.asJSON {
		detailed := detailedReport{
			accountReport: reportOf(u),
			Sessions:      []sessionReport{},
		}
		for _, s := range sessions {
			detailed.Sessions = append(detailed.Sessions, sessionReport{
				ID:         s.ID,
				CreatedAt:  timestamp(s.CreatedAt),
				LastUsedAt: timestamp(s.LastUsedAt),
				IP:         s.Device.IP,
				UserAgent:  s.Device.UserAgent,
			})
		}
		r.json(detailed)
		return r.w.Flush()
	}
	r.accountHeader()
	r.accountRow(u)
	fmt.Fprintf(r.w, "\n"+sessionColumns, "SESSION", "CREATED", "LAST USED", "IP", "USER AGENT")
	for _, s := range sessions {
		fmt.Fprintf(r.w, sessionColumns,
			s.ID,
			tableTime(s.CreatedAt),
			tableTime(s.LastUsedAt),
			s.Device.IP,
			printable(s.Device.UserAgent),
		)
	}
	return r.w.Flush()
}

// link prints a link.
func (r report) link(url string, expiresAt time.Time) error {
	if r.asJSON {
		r.json(linkReport{url, timestamp(expiresAt)})
		return r.w.Flush()
	}
	fmt.Fprintf(r.w, linkColumns, "EXPIRES", "LINK")
	fmt.Fprintf(r.w, linkColumns, tableTime(expiresAt), url)
	return r.w.Flush()
}

// json prints a value as one line. If the line cannot be written, flushing w reports it.
func (r report) json(value any) {
	var line strings.Builder
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false) // a link may have an & in it
	_ = encoder.Encode(value)    // reports always encode
	for _, c := range line.String() {
		if unicode.IsPrint(c) || c == '\n' {
			r.w.WriteRune(c)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, c) {
			fmt.Fprintf(r.w, `\u%04x`, unit) // as printable, but with the same value for a program
		}
	}
}

func tableTime(t time.Time) string {
	return t.UTC().Format(time.RFC3339)
}

func yesOrNo(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// printable replaces the characters in a text that a terminal would not show but obey. A user agent
// is whatever the client has sent, and an adopted table may have any text for an email.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}
