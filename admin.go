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
	out   printer
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
	rest, asJSON := splitJSON(args)
	name := "show"
	if len(rest) == 2 {
		name = rest[1]
	}
	action, known := userActions[name]
	if !known || len(rest) < 1 || len(rest) > 2 {
		return usageError(stderr, "user", strings.Join(args, " "))
	}
	a, err := newAdmin(ctx, env, action.needs, newPrinter(stdout, asJSON), stderr)
	if err != nil {
		return err
	}
	defer a.close()
	u, err := a.store.findUserByEmail(ctx, normalizeEmail(rest[0]))
	if err != nil {
		return err
	}
	// What has begun is not undone by Ctrl-C. The stores' timeouts bound it.
	return action.do(a, context.WithoutCancel(ctx), u)
}

// runUsers executes the subcommand users. args may have the beginning of the emails to list.
func runUsers(
	ctx context.Context,
	env *environment,
	args []string,
	stdout, stderr io.Writer,
) error {
	rest, asJSON := splitJSON(args)
	prefix := strings.Join(rest, " ")
	if len(rest) > 1 || strings.HasPrefix(prefix, "--") {
		return usageError(stderr, "users", strings.Join(args, " "))
	}
	a, err := newAdmin(ctx, env, adminNeeds{}, newPrinter(stdout, asJSON), stderr)
	if err != nil {
		return err
	}
	defer a.close()
	return a.listUsers(ctx, prefix)
}

// splitJSON returns the arguments without --json, and whether it is among them.
func splitJSON(args []string) (rest []string, asJSON bool) {
	for _, arg := range args {
		if arg == "--json" {
			asJSON = true
			continue
		}
		rest = append(rest, arg)
	}
	return rest, asJSON
}

// newAdmin reads the variables that a subcommand needs, and connects to the stores.
func newAdmin(
	ctx context.Context,
	env *environment,
	needs adminNeeds,
	out printer,
	stderr io.Writer,
) (*admin, error) {
	database := env.databaseURL()
	var redisOptions *redis.UniversalOptions
	if needs.redis {
		redisOptions = env.redis()
	}
	var resetLinks links
	if needs.links {
		resetLinks = env.resetLinks()
	}
	if err := env.err(); err != nil {
		return nil, err
	}

	db, err := pgxpool.NewWithConfig(ctx, database)
	if err != nil {
		return nil, err
	}
	var rdb redis.UniversalClient
	if needs.redis {
		rdb = newRedisClient(redisOptions)
	}
	return &admin{
		store: &store{
			db:              db,
			rdb:             rdb,
			postgresTimeout: operatorTimeout,
		},
		links: resetLinks,
		log:   newLogger(env.development, slog.LevelInfo, stderr),
		out:   out,
	}, nil
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
	disabled, err := a.store.disableUser(ctx, u.ID)
	if err != nil {
		return err
	}
	return a.done("disable", disabled)
}

// enableUser lets the user of an account log in again.
func (a *admin) enableUser(ctx context.Context, u user) error {
	enabled, err := a.store.enableUser(ctx, u.ID)
	if err != nil {
		return err
	}
	return a.done("enable", enabled)
}

// revokeSessions ends all sessions of an account.
func (a *admin) revokeSessions(ctx context.Context, u user) error {
	if err := a.store.revokeAll(ctx, u.ID, noSession); err != nil {
		return err
	}
	return a.done("revoke", u)
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
	if err != nil {
		return err
	}
	return a.done("delete", u)
}

// done logs what was done to an account, and prints the account.
func (a *admin) done(action string, u user) error {
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

func detailedReportOf(u user, sessions []session) detailedReport {
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
	return detailed
}

// The columns of the tables. The last one may be of any width.
const (
	accountColumns = "%-36s  %-20s  %-8s  %-8s  %s\n"
	sessionColumns = "%-36s  %-20s  %-20s  %-15s  %s\n"
	linkColumns    = "%-20s  %s\n"
)

// printer prints the answers of a subcommand: a table for people or, if asJSON is set, one JSON
// object per line. What it prints may be in w until that is flushed.
type printer struct {
	w      *bufio.Writer
	asJSON bool
}

func newPrinter(stdout io.Writer, asJSON bool) printer {
	return printer{
		w:      bufio.NewWriter(stdout),
		asJSON: asJSON,
	}
}

// account prints an account.
func (p printer) account(u user) error {
	p.accountHeader()
	p.accountRow(u)
	return p.w.Flush()
}

func (p printer) accountHeader() {
	if !p.asJSON {
		fmt.Fprintf(p.w, accountColumns, "ID", "CREATED", "VERIFIED", "DISABLED", "EMAIL")
	}
}

func (p printer) accountRow(u user) {
	if p.asJSON {
		p.json(reportOf(u))
		return
	}
	fmt.Fprintf(p.w, accountColumns,
		u.ID,
		tableTime(u.CreatedAt),
		yesOrNo(u.Verified),
		yesOrNo(u.Disabled),
		printable(u.Email),
	)
}

// accountWithSessions prints an account and its sessions.
func (p printer) accountWithSessions(u user, sessions []session) error {
	if p.asJSON {
		p.json(detailedReportOf(u, sessions))
		return p.w.Flush()
	}
	p.accountHeader()
	p.accountRow(u)
	fmt.Fprintf(p.w, "\n"+sessionColumns, "SESSION", "CREATED", "LAST USED", "IP", "USER AGENT")
	for _, s := range sessions {
		fmt.Fprintf(p.w, sessionColumns,
			s.ID,
			tableTime(s.CreatedAt),
			tableTime(s.LastUsedAt),
			s.Device.IP,
			printable(s.Device.UserAgent),
		)
	}
	return p.w.Flush()
}

// link prints a link.
func (p printer) link(url string, expiresAt time.Time) error {
	if p.asJSON {
		p.json(linkReport{url, timestamp(expiresAt)})
		return p.w.Flush()
	}
	fmt.Fprintf(p.w, linkColumns, "EXPIRES", "LINK")
	fmt.Fprintf(p.w, linkColumns, tableTime(expiresAt), url)
	return p.w.Flush()
}

// json prints a value as one line. If the line cannot be written, flushing w reports it.
func (p printer) json(value any) {
	var line strings.Builder
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false) // a link may have an & in it
	_ = encoder.Encode(value)    // reports always encode
	for _, c := range line.String() {
		if unicode.IsPrint(c) || c == '\n' {
			p.w.WriteRune(c)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, c) {
			fmt.Fprintf(p.w, `\u%04x`, unit) // as printable, but with the same value for a program
		}
	}
}

func tableTime(t time.Time) string {
	return t.UTC().Format(time.RFC3339)
}

func yesOrNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

// printable replaces the characters in a text that a terminal would not show but obey. A user agent
// is whatever the client has sent, and an adopted table may have any text for an email.
func printable(text string) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return unicode.ReplacementChar
	}, text)
}
