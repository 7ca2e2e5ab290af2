package chaos

// lost_test.go kills the server and its stores with SIGKILL while a dozen users act. Whatever a
// user was told must still hold afterwards.

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var rounds = flag.Int("rounds", 40, "rounds of TestNothingLost; at most 5 in short mode")

const (
	// actors is how many users act at the same time.
	actors = 12

	// stepsPerAccount is what a user does with one account before signing up for the next.
	stepsPerAccount = 20

	// restartLimit bounds the time from a kill to the next good answer. What was killed starts
	// again at once, which takes below a second on an idle machine.
	restartLimit = 15 * time.Second
)

// A victim is what some of the rounds kill and start again.
type victim struct {
	name     string
	process  *process
	replicas []*server     // those that the users ask
	downtime time.Duration // between the kill and the start
	tally
}

// A tally is what users have met in all rounds with one victim.
type tally struct {
	mu          sync.Mutex
	answered    int
	unavailable int // answers with status 503
	unanswered  int
	killed      time.Time       // zero unless the victim has been killed and is not back yet
	recoveries  []time.Duration // from each kill to the answer to the first good signup after it
}

// losses looks for what was lost.
type losses struct {
	t        *testing.T
	judge    *server // the server that is asked after each round
	resender *server // a replica that sends the token that replaced another one again
	found    atomic.Int64
}

// TestNothingLost kills one part after the other at random moments, and then holds the server to
// every answer that it gave.
func TestNothingLost(t *testing.T) {
	n := *rounds
	if testing.Short() {
		n = min(n, 5)
	}
	pg := startPostgres(t, "fsync=on")
	redis := startRedis(t, "appendonly yes", "appendfsync always")
	env := vars{
		"DATABASE_URL":    pg.url,
		"REDIS_URL":       redis.url,
		"LOGIN_LIMIT_MAX": "0",
		// Within the leeway, a token that is shown again ends no session. So all can be tried.
		"REFRESH_REUSE_LEEWAY": "1h",
	}
	both := []*server{startServer(t, env), startServer(t, env)}
	env["REFRESH_REUSE_POLICY"] = "resend"
	l := &losses{t: t, judge: both[1], resender: startServer(t, env)}
	first := both[0].process
	victims := []*victim{
		{name: "the only server", process: first, replicas: both[:1]},
		{name: "one of two servers", process: first, replicas: both, downtime: time.Second / 2},
		{name: "Redis", process: redis.process, replicas: both},
		{name: "PostgreSQL", process: pg.process, replicas: both},
	}
	for i := range n {
		v := victims[i%len(victims)]
		l.round(v)
		if t.Failed() {
			t.Fatalf("round %d, in which %s was killed, has lost something", i+1, v.name)
		}
	}
	t.Logf("%d refresh tokens did not arrive but were good\n%s", l.found.Load(), table(victims))
}

// round kills v while users act, and then asks for all that they know.
func (l *losses) round(v *victim) {
	ctx, stop := context.WithCancel(l.t.Context())
	var users sync.WaitGroup
	defer users.Wait()
	defer stop()
	met := make([][]*witness, actors)
	for i := range met {
		users.Go(func() { met[i] = l.act(ctx, v) })
	}

	time.Sleep(300*time.Millisecond + mathrand.N(time.Second)) // the moment is random
	v.mu.Lock()
	v.killed = time.Now()
	v.mu.Unlock()
	v.process.kill()
	time.Sleep(v.downtime)
	v.process.restart()
	eventually(l.t, restartLimit, v.name+" is back", func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.killed.IsZero()
	})
	time.Sleep(300 * time.Millisecond) // life goes on
	stop()
	users.Wait()

	for _, witnesses := range met {
		users.Go(func() {
			for _, w := range witnesses {
				l.verify(w)
			}
		})
	}
}

// act uses one account after the other until ctx ends.
func (l *losses) act(ctx context.Context, v *victim) (met []*witness) {
	for ctx.Err() == nil {
		w := &witness{user: newUser(v.replicas[mathrand.IntN(len(v.replicas))])}
		if !l.count(v, w, w.signup()) {
			time.Sleep(20 * time.Millisecond) // as a person would wait
			continue
		}
		met = append(met, w)
		w.passwords = []string{w.password}
		w.begin()
		for range stepsPerAccount {
			if !l.count(v, w, w.step()) {
				break
			}
		}
	}
	return met
}

// count counts an answer and reports whether it is good. Only from the victim may there be none.
// A store that has too much to do may cause a 503 at any time.
func (l *losses) count(v *victim, w *witness, a answer) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	isSignup := len(w.chains) == 0
	switch {
	case a.ok():
		v.answered++
		if isSignup && !v.killed.IsZero() && time.Since(v.killed) > a.took {
			v.recoveries = append(v.recoveries, time.Since(v.killed).Round(time.Millisecond))
			v.killed = time.Time{}
		}
	case a.err != nil && w.server.process == v.process:
		v.unanswered++
	case a.status == http.StatusServiceUnavailable:
		v.unavailable++
	default:
		l.t.Errorf("while %s was killed: %v", v.name, a)
	}
	return a.ok()
}

// A witness is a user who remembers what the server has answered.
type witness struct {
	*user
	passwords []string // one of them is right; there are two if a change was not answered
	replaced  []string // wrong for good
	chains    []*chain // one per session, the current one last
}

// A chain is all tokens that one session has given out, the newest last.
type chain struct {
	access  []string
	refresh []string
	state   sessionState
}

// A sessionState is what a user knows about a session.
type sessionState string

const (
	alive   sessionState = "alive"
	ended   sessionState = "ended"
	unknown sessionState = "unknown" // because an answer is missing
)

// begin remembers a new session, whose tokens have just arrived.
func (w *witness) begin() {
	w.chains = append(w.chains, &chain{
		access:  []string{w.access},
		refresh: []string{w.cookie},
		state:   alive,
	})
}

// step does one thing at random and remembers what the answer says.
func (w *witness) step() answer {
	current := w.chains[len(w.chains)-1]
	switch n := mathrand.IntN(10); {
	case n == 0 || current.state == ended:
		a := w.login()
		if a.ok() {
			w.begin()
		}
		return a
	case n == 1:
		a := w.logout()
		current.state = stateAfter(a, ended)
		return a
	case n < 4:
		return w.replacePassword()
	default:
		a := w.refresh()
		current.state = stateAfter(a, alive)
		if a.ok() {
			current.access = append(current.access, w.access)
			current.refresh = append(current.refresh, w.cookie)
		}
		return a
	}
}

func stateAfter(a answer, promised sessionState) sessionState {
	if a.ok() {
		return promised
	}
	return unknown
}

// replacePassword changes the password. That ends all sessions but the current one.
func (w *witness) replacePassword() answer {
	old, next := w.password, "password "+rand.Text()
	a := w.changePassword(next)
	others := w.chains[:len(w.chains)-1]
	if a.ok() {
		w.passwords = []string{next}
		w.replaced = append(w.replaced, old)
	} else {
		w.passwords = []string{old, next}
		others = w.chains // a change that is not committed ends this one too, at its next refresh
	}
	for _, c := range others {
		if c.state == alive {
			c.state = stateAfter(a, ended)
		}
	}
	return a
}

// verify holds the server to what it has told a witness.
func (l *losses) verify(w *witness) {
	w.at(l.judge)
	for _, c := range w.chains {
		l.verifyAccess(w, c)
		l.verifyRefresh(w, c)
	}
	right := 0
	for _, password := range w.passwords {
		if l.isRight(w, password) {
			right++
		}
	}
	if right != 1 {
		l.t.Errorf("%d of %d passwords log in", right, len(w.passwords))
	}
	for _, password := range w.replaced {
		if l.isRight(w, password) {
			l.t.Error("a password that was replaced logs in")
		}
	}
}

func (l *losses) isRight(w *witness, password string) bool {
	u := w.copy()
	u.password = password
	return l.isGood(u.login)
}

func (l *losses) refreshes(w *witness, token string) bool {
	u := w.copy()
	u.cookie = token
	return l.isGood(u.refresh)
}

// isGood reports whether a request succeeds. If not, it must be refused with 401. It is sent again
// while a store has too much to do.
func (l *losses) isGood(ask func() answer) bool {
	a := ask()
	for tries := 1; tries < 10 && a.status == http.StatusServiceUnavailable; tries++ {
		a = ask()
	}
	if !a.ok() && a.status != http.StatusUnauthorized {
		l.t.Errorf("want a success or 401, got %v", a)
	}
	return a.ok()
}

// verifyAccess shows all access tokens of a session, which are good as long as it lives.
func (l *losses) verifyAccess(w *witness, c *chain) {
	if c.state == unknown {
		return
	}
	for _, token := range c.access {
		u := w.copy()
		u.access = token
		if l.isGood(u.me) != (c.state == alive) {
			l.t.Errorf("an access token says otherwise of a session that is %s", c.state)
		}
	}
}

// verifyRefresh shows all refresh tokens of a session, the oldest first. Only the newest may be
// good. An older one that is good would be exchanged here, and so be noticed.
func (l *losses) verifyRefresh(w *witness, c *chain) {
	var good []int
	for i, token := range c.refresh {
		if l.refreshes(w, token) {
			good = append(good, i)
		}
	}
	newest := slices.Equal(good, []int{len(c.refresh) - 1})
	switch {
	case c.state != ended && newest:
	case c.state == ended && len(good) == 0:
	case c.state == unknown && len(good) == 0:
		l.findLost(w, c)
	default:
		l.t.Errorf("a session is %s, but of its %d refresh tokens these are good: %v",
			c.state, len(c.refresh), good)
	}
}

// findLost looks for the refresh token that a session has but its user did not get. If there is
// one, it must be good, and the only one.
func (l *losses) findLost(w *witness, c *chain) {
	u := w.copy().at(l.resender)
	u.cookie = c.refresh[len(c.refresh)-1]
	if !l.isGood(u.refresh) {
		return // the session has ended
	}
	if !l.refreshes(w, u.cookie) {
		l.t.Error("a session has a successor that does not refresh")
	}
	l.found.Add(1)
}

// table shows the rounds in Markdown.
func table(victims []*victim) string {
	var b strings.Builder
	b.WriteString("| killed | rounds | answered | 503 | no answer | recovery, median | longest |\n")
	b.WriteString("|---|---|---|---|---|---|---|\n")
	for _, v := range victims {
		if n := len(v.recoveries); n > 0 {
			slices.Sort(v.recoveries)
			fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %v | %v |\n", v.name, n, v.answered,
				v.unavailable, v.unanswered, v.recoveries[n/2], v.recoveries[n-1])
		}
	}
	return b.String()
}
