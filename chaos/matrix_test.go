package chaos

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var matrixFile = flag.String("matrix", "", "the file that TestMatrix writes its table to")

const (
	// answerMargin is what a busy machine with two cores may add to a limit of the contract.
	answerMargin = 500 * time.Millisecond

	// goodAgainLimit is how long after the mending a route may still fail. The contract says 2 s,
	// and a busy machine may add one.
	goodAgainLimit = 3 * time.Second

	// loginLimit is the server's LOGIN_LIMIT_MAX.
	loginLimit = 3

	// askers is how many users ask each route while the store is broken. One more asks it without
	// the rate limit, where the route's own steps are the first to meet the broken store.
	askers = 3

	// withoutLimit is added to the names of the routes that this one user asks.
	withoutLimit = " without the rate limit"
)

// A need is what a route needs of a store.
type need int

const (
	unused  need = iota
	limited      // of Redis, only for the rate limit
	reads        // of Redis, this includes counting and deleting, which work even if it is full
	writes       // of Redis, only what needs memory
)

// A route is one request of the contract. It stands for a method and a path; a path that answers
// two kinds of callers is two routes.
type route struct {
	name     string
	postgres need
	redis    need

	// prepare makes a user ready, while all is well, to send the one request that it returns.
	prepare func(t *testing.T, s *server) func() answer

	redisEmptied    []string // the outcomes after Redis has lost its data
	postgresEmptied []string // the outcomes after PostgreSQL has lost its users
}

var (
	revoked  = []string{"401 session_revoked"}
	noUser   = []string{"404 user_not_found"}
	badLogin = []string{"401 invalid_credentials"}
	badLink  = []string{"400 invalid_link"}
)

// routes are all routes of the contract.
var routes = []route{
	{"signup", writes, writes, asNewUser((*user).signup), good, good},
	{"login", writes, writes, asUser((*user).login), good, badLogin},
	{"refresh", reads, writes, asUser((*user).refresh), revoked, revoked},
	{"logout", unused, reads, asUser((*user).logout), revoked, good},
	{"logout by cookie", unused, reads, asCookie((*user).logout), revoked, good},
	{"me", reads, reads, asUser((*user).me), revoked, noUser},
	{"sessions", unused, reads, asUser((*user).sessions), revoked, good},
	{"revoke", unused, reads, prepareRevoke, revoked, good},
	{"revoke all", unused, reads, asUser((*user).revokeAll), revoked, good},
	{"password", writes, writes, asUser(changeToAnother), revoked, noUser},
	{"forgot", unused, limited, asUser((*user).forgot), good, good},
	{"reset", writes, reads, prepareReset, good, badLink},
	{"verification", reads, reads, asUser((*user).sendVerification), revoked, noUser},
	{"verify", writes, limited, prepareVerify, good, badLink},
	{"email", reads, reads, asUser(changeToAnotherEmail), revoked, noUser},
	{"verify new email", writes, limited, prepareVerifyNew, good, badLink},
	{"delete", writes, reads, asUser((*user).deleteAccount), revoked, noUser},
	{"healthz", unused, unused, asNewUser(health("/healthz")), good, good},
	{"readyz", writes, writes, asNewUser(health("/readyz")), good, good},
}

// withoutLimit is what the route needs of a server that has no rate limit.
func (r route) withoutLimit() route {
	if r.redis == limited {
		r.redis = unused
	}
	return r
}

type prepare = func(*testing.T, *server) func() answer

func asNewUser(ask func(*user) answer) prepare {
	return func(_ *testing.T, s *server) func() answer {
		u := newUser(s)
		return func() answer { return ask(u) }
	}
}

func asUser(ask func(*user) answer) prepare {
	return func(t *testing.T, s *server) func() answer {
		u := signedUp(t, s)
		return func() answer { return ask(u) }
	}
}

// asCookie is for a user who has only the refresh cookie.
func asCookie(ask func(*user) answer) prepare {
	return func(t *testing.T, s *server) func() answer {
		u := signedUp(t, s)
		u.access = ""
		return func() answer { return ask(u) }
	}
}

func changeToAnother(u *user) answer { return u.changePassword("another " + u.password) }

// prepareRevoke makes a user with two sessions, who then revokes the older one.
func prepareRevoke(t *testing.T, s *server) func() answer {
	u := signedUp(t, s)
	if a := u.login(); !a.ok() {
		t.Fatalf("login: %v", a)
	}
	list := u.sessions()
	older := otherSession(list)
	if older == "" {
		t.Fatalf("sessions: %v %s", list, list.body)
	}
	return func() answer { return u.revoke(older) }
}

func changeToAnotherEmail(u *user) answer { return u.changeEmail("another-" + u.email) }

// The following make a user ready to use a link that was mailed.

func prepareReset(t *testing.T, s *server) func() answer {
	u := signedUp(t, s)
	token := askForLink(t, u, "reset", u.email, (*user).forgot)
	return func() answer { return u.reset(token) }
}

func prepareVerify(t *testing.T, s *server) func() answer {
	u := signedUp(t, s)
	token := askForLink(t, u, "verify", u.email, (*user).sendVerification)
	return func() answer { return u.verify(token) }
}

func prepareVerifyNew(t *testing.T, s *server) func() answer {
	u := signedUp(t, s)
	token := askForLink(t, u, "change", "another-"+u.email, changeToAnotherEmail)
	return func() answer { return u.verify(token) }
}

// health asks one of the health routes. Their errors have a body of their own, with no code.
func health(path string) func(*user) answer {
	return func(u *user) answer {
		a := u.ask("GET", path, nil)
		if strings.HasPrefix(a.body, `{"status":"unavailable"`) {
			a.code = "unavailable"
		}
		return a
	}
}

// outcome describes an answer as the tables do.
func (a answer) outcome() string {
	switch {
	case a.err != nil:
		return "no answer"
	case a.ok():
		return "ok"
	default:
		return fmt.Sprintf("%d %s", a.status, a.code)
	}
}

// A probe is a request that must never succeed.
type probe struct {
	name    string
	ask     func() answer
	refused string // its outcome when all is well
	counted bool   // it is refused because of a counter in Redis
}

func prepareProbes(t *testing.T, l *lab) []probe {
	out := signedUp(t, l.unlimited)
	dead := out.copy()
	if a := out.logout(); !a.ok() {
		t.Fatalf("logout: %v", a)
	}
	wrong := signedUp(t, l.unlimited)
	wrong.password += " not"
	return []probe{
		{
			name:    "a dead access token",
			ask:     func() answer { return dead.copy().me() },
			refused: "401 session_revoked",
		},
		{
			name:    "a dead refresh token",
			ask:     func() answer { return dead.copy().refresh() },
			refused: "401 session_revoked",
		},
		{
			name:    "a wrong password",
			ask:     wrong.login,
			refused: "401 invalid_credentials",
		},
		{
			name:    "over the login limit",
			ask:     loginLimited(t, l.unlimited).login,
			refused: "429 too_many_attempts",
			counted: true,
		},
		{
			name:    "over the rate limit",
			ask:     rateLimited(t, l.server).sessions,
			refused: "429 rate_limited",
			counted: true,
		},
	}
}

// rateLimited is a user with good tokens, at an address that has made all the requests it may.
func rateLimited(t *testing.T, s *server) *user {
	u := signedUp(t, s)
	for range 100 {
		if u.sessions().code == "rate_limited" {
			return u
		}
	}
	t.Fatal("no request is over the rate limit")
	return nil
}

// loginLimited is a user with the right password, for whom a wrong one was tried too often.
func loginLimited(t *testing.T, s *server) *user {
	u := signedUp(t, s)
	guess := u.copy()
	guess.password += " not"
	for range 10 {
		if guess.login().code == "too_many_attempts" {
			return u
		}
	}
	t.Fatal("no login is over the limit")
	return nil
}

// A row is one row of the matrix.
type row struct {
	fault    string
	cells    []string
	recovery time.Duration // from the mending until every route was good again
}

// TestMatrix breaks each store in every way, and asks every route meanwhile. Every answer must be
// one that the contract allows, within its time, and none may let through what must be refused.
func TestMatrix(t *testing.T) {
	var rows []row
	for _, f := range slices.Concat(redisFaults, postgresFaults, bothFaults) {
		if testing.Short() && !f.short {
			continue
		}
		t.Run(f.String(), func(t *testing.T) { rows = append(rows, breakStore(t, f)) })
	}
	table := markdown(rows)
	t.Logf("\n%s", table)
	if *matrixFile != "" {
		if err := os.WriteFile(*matrixFile, []byte(table), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// breakStore makes one row of the matrix.
func breakStore(t *testing.T, f fault) row {
	l := startLab(t, f)
	quiet, quietUnlimited := l.quietMetrics(), l.unlimited.quietMetrics()
	probes := prepareProbes(t, l)
	requests := prepareRoutes(t, l.server, askers)
	for name, asks := range prepareRoutes(t, l.unlimited, 1) {
		requests[name+withoutLimit] = asks
	}
	for _, p := range probes {
		requests[p.name] = []func() answer{p.ask}
	}
	patient := signedUp(t, l.server)
	for range loginLimit {
		requests[patient.email] = append(requests[patient.email], patient.copy().login)
	}
	spares := prepareRoutes(t, l.server, 1)
	askAll(prepareRoutes(t, l.server, askers)) // so that the pools have grown
	askAll(prepareRoutes(t, l.unlimited, 1))

	f.breaks(l)
	answers := askAll(requests)
	for _, p := range probes {
		checkProbe(t, f, p, answers[p.name][0])
	}
	result := row{fault: f.String()}
	for _, r := range routes {
		checkRoute(t, f, r, answers[r.name])
		checkRoute(t, f, r.withoutLimit(), answers[r.name+withoutLimit])
		got := append(answers[r.name], answers[r.name+withoutLimit]...)
		result.cells = append(result.cells, cell(got))
	}

	f.mends(l)
	result.recovery = awaitRecovery(t, f, spares)
	for _, p := range probes {
		checkProbeAfter(t, f, p, p.ask())
	}
	if f.store == "PostgreSQL" && f.after == nil {
		checkNotUsedUp(t, append(requests["refresh"], requests["refresh"+withoutLimit]...), patient)
	}
	checkLinksWork(t, f, append(requests["reset"], requests["reset"+withoutLimit]...))
	l.awaitQuiet(quiet)
	l.unlimited.awaitQuiet(quietUnlimited)
	return result
}

// requests are what is to be asked at the same time, by the name of the route or probe.
type requests map[string][]func() answer

func prepareRoutes(t *testing.T, s *server, n int) requests {
	all := requests{}
	for _, r := range routes {
		for range n {
			all[r.name] = append(all[r.name], r.prepare(t, s))
		}
	}
	return all
}

func askAll(all requests) map[string][]answer {
	answers := map[string][]answer{}
	var asking sync.WaitGroup
	for name, asks := range all {
		got := make([]answer, len(asks))
		answers[name] = got
		for i, ask := range asks {
			asking.Go(func() { got[i] = ask() })
		}
	}
	asking.Wait()
	return answers
}

// checkRoute checks what a route answered while the store was broken.
func checkRoute(t *testing.T, f fault, r route, answers []answer) {
	for _, a := range answers {
		if !slices.Contains(f.want(r), a.outcome()) {
			t.Errorf("%s: %v, want %q", r.name, a, f.want(r))
		}
		if a.took > f.limit+answerMargin {
			t.Errorf("%s: %v, want an answer within %v", r.name, a, f.limit)
		}
		if a.ok() && f.concerns(r) && a.took < f.delay {
			t.Errorf("%s: %v, so the store was not slow", r.name, a)
		}
		if a.code == "unavailable" && a.header.Get("Retry-After") == "" {
			t.Errorf("%s: %v without Retry-After", r.name, a)
		}
		if a.code == "unavailable" && r.name == "readyz" {
			checkNamed(t, f, a)
		}
	}
}

// checkNamed checks that /readyz names the store that is broken. If both are, it may name either.
func checkNamed(t *testing.T, f fault, a answer) {
	want := map[string]string{
		"Redis":      `"postgres":"ok","redis":"unavailable"`,
		"PostgreSQL": `"postgres":"unavailable","redis":"ok"`,
	}[f.store]
	if !strings.Contains(a.body, want) {
		t.Errorf("/readyz: %s, want %s", strings.TrimSpace(a.body), want)
	}
}

// checkProbe checks that a broken store lets nothing through.
func checkProbe(t *testing.T, f fault, p probe, a answer) {
	forgotten := f.forgets && p.counted
	want := []string{p.refused, "503 unavailable", "503 overloaded"}
	if !forgotten && !slices.Contains(want, a.outcome()) {
		t.Errorf("%s: %v, want %q", p.name, a, want)
	}
	if a.took > f.limit+answerMargin {
		t.Errorf("%s: %v, want an answer within %v", p.name, a, f.limit)
	}
}

// checkProbeAfter checks that a store that has been mended still lets nothing through.
func checkProbeAfter(t *testing.T, f fault, p probe, a answer) {
	forgotten := f.forgets && p.counted
	if !forgotten && a.outcome() != p.refused {
		t.Errorf("after the mending, %s: %v, want %s", p.name, a, p.refused)
	}
}

// checkNotUsedUp checks that requests that PostgreSQL has failed cost nothing: refresh tokens are
// still good, and logins with the right password do not count as failures.
func checkNotUsedUp(t *testing.T, refreshes []func() answer, patient *user) {
	for _, refresh := range refreshes {
		if a := refresh(); !a.ok() {
			t.Errorf("after the mending, the same refresh token: %v", a)
		}
	}
	if a := patient.login(); !a.ok() {
		t.Errorf("after %d failed logins and the mending, one more: %v", loginLimit, a)
	}
}

// checkLinksWork checks that links to reset a password still work if all that used them while the
// store was broken had to be refused.
func checkLinksWork(t *testing.T, f fault, resets []func() answer) {
	reset := routes[slices.IndexFunc(routes, func(r route) bool { return r.name == "reset" })]
	if !slices.Equal(f.want(reset), unavailable) {
		return
	}
	for _, ask := range resets {
		if a := ask(); !a.ok() {
			t.Errorf("after the mending, the same link: %v", a)
		}
	}
}

// awaitRecovery asks every route until its outcome is that after the mending, and returns when the
// last of them was.
func awaitRecovery(t *testing.T, f fault, spares requests) time.Duration {
	mended := time.Now()
	var asking sync.WaitGroup
	for _, r := range routes {
		want := good
		if f.after != nil {
			want = f.after(r)
		}
		asking.Go(func() {
			for {
				a := spares[r.name][0]()
				if slices.Contains(want, a.outcome()) {
					return
				}
				if time.Since(mended) > goodAgainLimit {
					t.Errorf("%s, %v after the mending: %v, want %q",
						r.name, goodAgainLimit, a, want)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	asking.Wait()
	return time.Since(mended)
}

// cell shows answers: their different outcomes, and the longest time if it can be felt.
func cell(answers []answer) string {
	var outcomes []string
	var longest time.Duration
	for _, a := range answers {
		outcome := a.outcome()
		if a.err == nil {
			outcome = fmt.Sprint(a.status)
		}
		outcomes = append(outcomes, outcome)
		longest = max(longest, a.took)
	}
	slices.Sort(outcomes)
	text := strings.Join(slices.Compact(outcomes), ", ")
	if longest >= 100*time.Millisecond {
		text += fmt.Sprintf(" %.1f s", longest.Seconds())
	}
	return text
}

// markdown is the matrix as a table.
func markdown(rows []row) string {
	var b strings.Builder
	line := func(first string, cells []string, last string) {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", first, strings.Join(cells, " | "), last)
	}
	var names, rules []string
	for _, r := range routes {
		names = append(names, r.name)
		rules = append(rules, "---")
	}
	line("", names, "all good again after")
	line("---", rules, "---")
	for _, r := range rows {
		line(r.fault, r.cells, fmt.Sprintf("%.2f s", r.recovery.Seconds()))
	}
	return b.String()
}
