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
	"testing"
	"time"
)

var rounds = flag.Int("rounds", 40, "rounds of TestNothingLost; at most 5 in short mode")

const (
	// actors is how many users act at the same time.
	actors = 12

	// stepsPerAccount is what a user does with one account before signing up for the next.
	stepsPerAccount = 20

	// recoveryLimit bounds the time from a kill to the next good answer. What was killed starts
	// again at once, which takes below a second on an idle machine.
	recoveryLimit = 15 * time.Second
)

// A victim is what a round kills, and then starts again.
type victim struct {
	name     string
	process  *process
	replicas []*server     // those that the users ask
	away     time.Duration // between the kill and the start
	isStore  bool
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
	resender := startServer(t, env)

	victims := []victim{
		{"the only server", both[0].process, both[:1], 0, false},
		{"one of two servers", both[0].process, both, time.Second / 2, false},
		{"Redis", redis.process, both, 0, true},
		{"PostgreSQL", pg.process, both, 0, true},
	}
	tallies := make([][]*tally, len(victims))
	for i := range n {
		turn := i % len(victims)
		r := &round{t: t, victim: victims[turn], judge: both[1], resender: resender}
		tallies[turn] = append(tallies[turn], r.run())
		if t.Failed() {
			t.Fatalf("round %d, in which %s was killed, has lost something", i+1, r.victim.name)
		}
	}
	t.Log("\n" + lossTable(victims, tallies))
}

// A round is one kill.
type round struct {
	tally
	t        *testing.T
	victim   victim
	judge    *server // the server that is asked afterwards
	resender *server // a replica that sends a successor again, to find those that got lost
}

// A tally counts what the users of a round have met.
type tally struct {
	mu          sync.Mutex
	answered    int
	unavailable int // answers with status 503
	unanswered  int
	found       int // refresh tokens that did not arrive, but that the resender knew
	killed      time.Time
	recovery    time.Duration // from the kill to the first good signup after it
}

func (r *round) run() *tally {
	ctx, stop := context.WithCancel(r.t.Context())
	var users sync.WaitGroup
	defer users.Wait()
	defer stop()
	witnesses := make([][]*witness, actors)
	for i := range witnesses {
		users.Go(func() { witnesses[i] = r.act(ctx) })
	}

	time.Sleep(300*time.Millisecond + mathrand.N(time.Second)) // the moment is random
	r.mu.Lock()
	r.killed = time.Now()
	r.mu.Unlock()
	r.victim.process.kill()
	time.Sleep(r.victim.away)
	r.victim.process.restart()
	eventually(r.t, recoveryLimit, r.victim.name+" has recovered", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.recovery > 0
	})
	time.Sleep(300 * time.Millisecond) // life goes on
	stop()
	users.Wait()

	for _, met := range witnesses {
		users.Go(func() {
			for _, w := range met {
				r.verify(w)
			}
		})
	}
	users.Wait()
	return &r.tally
}

// act is one person's life: accounts, one after the other, until ctx ends.
func (r *round) act(ctx context.Context) (met []*witness) {
	for ctx.Err() == nil {
		s := r.victim.replicas[mathrand.IntN(len(r.victim.replicas))]
		w := &witness{user: newUser(s)}
		met = append(met, w)
		a := w.signup()
		r.count(w, a)
		if !a.ok() {
			time.Sleep(20 * time.Millisecond) // as a person would wait
			continue
		}
		r.recovered(time.Now().Add(-a.took))
		w.passwords = []string{w.password}
		w.begin()
		for range stepsPerAccount {
			if a := w.step(); !r.count(w, a) {
				break
			}
		}
	}
	return met
}

// count counts an answer, and reports whether it is a good one. Only a killed server may give none,
// and only without a store may an answer be 503.
func (r *round) count(w *witness, a answer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case a.ok():
		r.answered++
	case a.err != nil && w.server.process == r.victim.process:
		r.unanswered++
	case a.status == http.StatusServiceUnavailable && r.victim.isStore:
		r.unavailable++
	default:
		r.t.Errorf("while %s was killed: %v", r.victim.name, a)
	}
	return a.ok()
}

// recovered notes that a request that was sent at this time has succeeded.
func (r *round) recovered(sent time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.recovery == 0 && !r.killed.IsZero() && sent.After(r.killed) {
		r.recovery = time.Since(r.killed)
	}
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
	fate    fate
}

// A fate is what a user knows about a session.
type fate string

const (
	alive   fate = "alive"
	ended   fate = "ended"
	unknown fate = "unknown" // because an answer is missing
)

// begin remembers a new session, whose tokens have just arrived.
func (w *witness) begin() {
	w.chains = append(w.chains, &chain{
		access:  []string{w.access},
		refresh: []string{w.cookie},
		fate:    alive,
	})
}

// step does one thing at random and remembers what the answer says.
func (w *witness) step() answer {
	current := w.chains[len(w.chains)-1]
	switch n := mathrand.IntN(10); {
	case n == 0 || current.fate == ended:
		a := w.login()
		if a.ok() {
			w.begin()
		}
		return a
	case n == 1:
		a := w.logout()
		current.fate = fateAfter(a, ended)
		return a
	case n < 4:
		return w.replacePassword()
	default:
		a := w.refresh()
		current.fate = fateAfter(a, alive)
		if a.ok() {
			current.access = append(current.access, w.access)
			current.refresh = append(current.refresh, w.cookie)
		}
		return a
	}
}

func fateAfter(a answer, promised fate) fate {
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
		if c.fate == alive {
			c.fate = fateAfter(a, ended)
		}
	}
	return a
}

// verify holds the server to what it has told a witness.
func (r *round) verify(w *witness) {
	w.at(r.judge)
	if len(w.chains) == 0 {
		r.verifySignup(w)
		return
	}
	for _, c := range w.chains {
		r.verifyAccess(w, c)
		r.verifyRefresh(w, c)
	}
	right := 0
	for _, password := range w.passwords {
		if r.isRight(w, password) {
			right++
		}
	}
	if right != 1 {
		r.t.Errorf("%d of %d passwords log in", right, len(w.passwords))
	}
	for _, password := range w.replaced {
		if r.isRight(w, password) {
			r.t.Error("a password that was replaced logs in")
		}
	}
}

// verifySignup expects that a signup without an answer has happened as a whole or not at all.
func (r *round) verifySignup(w *witness) {
	if !r.isRight(w, w.password) {
		if a := w.signup(); !a.ok() {
			r.t.Errorf("a signup was not answered; now login is refused, and signup gives %v", a)
		}
	}
}

func (r *round) isRight(w *witness, password string) bool {
	u := w.copy()
	u.password = password
	a := u.login()
	if !a.ok() && a.status != http.StatusUnauthorized {
		r.t.Errorf("login: %v", a)
	}
	return a.ok()
}

// verifyAccess shows all access tokens of a session, which are good as long as it lives.
func (r *round) verifyAccess(w *witness, c *chain) {
	if c.fate == unknown {
		return
	}
	for _, token := range c.access {
		u := w.copy()
		u.access = token
		want := http.StatusOK
		if c.fate == ended {
			want = http.StatusUnauthorized
		}
		if a := u.me(); a.status != want {
			r.t.Errorf("an access token of a session that is %s: %v", c.fate, a)
		}
	}
}

// verifyRefresh shows all refresh tokens of a session, the oldest first. Only the newest may be
// good. An older one that is good would be exchanged here, and so be noticed.
func (r *round) verifyRefresh(w *witness, c *chain) {
	var good []int
	for i, token := range c.refresh {
		if r.refreshes(w, token) {
			good = append(good, i)
		}
	}
	newest := slices.Equal(good, []int{len(c.refresh) - 1})
	switch {
	case c.fate == alive && newest:
	case c.fate == ended && len(good) == 0:
	case c.fate == unknown && newest:
	case c.fate == unknown && len(good) == 0:
		r.findLost(w, c)
	default:
		r.t.Errorf("a session is %s, but of its %d refresh tokens these are good: %v",
			c.fate, len(c.refresh), good)
	}
}

// findLost looks for the refresh token that a session has but its user did not get. If there is
// one, it must be good, and the only one.
func (r *round) findLost(w *witness, c *chain) {
	u := w.copy().at(r.resender)
	u.cookie = c.refresh[len(c.refresh)-1]
	if a := u.refresh(); !a.ok() {
		return // the session has ended
	}
	if !r.refreshes(w, u.cookie) {
		r.t.Error("a session has a successor that does not refresh")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found++
}

func (r *round) refreshes(w *witness, token string) bool {
	u := w.copy()
	u.cookie = token
	a := u.refresh()
	if !a.ok() && a.status != http.StatusUnauthorized {
		r.t.Errorf("refresh: %v", a)
	}
	return a.ok()
}

// lossTable shows the rounds in Markdown.
func lossTable(victims []victim, tallies [][]*tally) string {
	var b strings.Builder
	b.WriteString("| killed | rounds | answered | 503 | unanswered | " +
		"lost tokens found | recovery, median | longest |\n|---|---|---|---|---|---|---|---|\n")
	for i, v := range victims {
		var sum tally
		var recoveries []time.Duration
		for _, y := range tallies[i] {
			sum.answered += y.answered
			sum.unavailable += y.unavailable
			sum.unanswered += y.unanswered
			sum.found += y.found
			recoveries = append(recoveries, y.recovery.Round(time.Millisecond))
		}
		if len(recoveries) == 0 {
			continue
		}
		slices.Sort(recoveries)
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %v | %v |\n",
			v.name, len(recoveries), sum.answered, sum.unavailable, sum.unanswered, sum.found,
			recoveries[len(recoveries)/2], recoveries[len(recoveries)-1])
	}
	return b.String()
}
