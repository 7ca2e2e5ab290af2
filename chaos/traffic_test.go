package chaos

// traffic_test.go has users who go on all the time while a test takes a store away.

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	// recoveryLimit is how much longer than its stores the server may take until all is well again,
	// and recoveryMargin what a busy machine with two cores may add.
	recoveryLimit  = 2 * time.Second
	recoveryMargin = time.Second

	// replicationLag is how much of what was answered a failover may undo, since replication
	// between the nodes of a cluster is asynchronous.
	replicationLag = time.Second

	// pauseBetweenRequests is the time between two requests of a user. It keeps the traffic from
	// saturating the machine, because rates would then say nothing about the server.
	pauseBetweenRequests = 50 * time.Millisecond
)

// traffic is a group of users who repeat the same steps.
type traffic struct {
	t               *testing.T
	users           []*actor
	rewinds         bool // whether an outage may undo what was answered last
	refreshMayApply bool // whether a refresh that is answered with 503 may have been carried out
	stopped         atomic.Bool
	loops           sync.WaitGroup

	mu      sync.Mutex
	broken  time.Time // when the outage began
	lost    string    // the group whose master it takes away
	answers []observed
	faults  []string
	joined  []*user // who has signed up meanwhile
}

// observed is what is kept of an answer.
type observed struct {
	at     time.Time
	group  string
	status int
}

// An actor is one of these users, and what it knows about its session.
type actor struct {
	*user
	traffic        *traffic
	id             string
	group          string    // the master that has its sessions
	live           bool      // it has a session
	outcomeUnknown bool      // a change that was answered with 503 may have been carried out
	changed        time.Time // when a change was last answered with success
	ended          *user     // with the tokens of a session that has ended
	died           time.Time // when that session ended
}

// newTraffic signs up n users whom wanted, which may set their group, agrees to.
func newTraffic(t *testing.T, s *server, n int, wanted func(*actor) bool) *traffic {
	t.Helper()
	tr := &traffic{t: t}
	for len(tr.users) < n {
		u := &actor{user: signedUp(t, s), traffic: tr, live: true}
		var me struct{ User struct{ ID string } }
		if err := json.Unmarshal([]byte(u.me().body), &me); err != nil {
			t.Fatal(err)
		}
		u.id = me.User.ID
		if wanted(u) {
			tr.users = append(tr.users, u)
		}
	}
	return tr
}

// start lets the users repeat steps until the end of the test at the latest. They begin with
// different ones, so that an outage meets users at each.
func (tr *traffic) start(steps ...func(*actor)) {
	tr.t.Cleanup(tr.halt)
	for first, u := range tr.users {
		tr.loops.Go(func() {
			for i := first; !tr.stopped.Load(); i++ {
				time.Sleep(pauseBetweenRequests)
				steps[i%len(steps)](u)
			}
		})
	}
}

// halt stops the users and waits for them.
func (tr *traffic) halt() {
	tr.stopped.Store(true)
	tr.loops.Wait()
}

// end stops the users and reports the answers that were wrong.
func (tr *traffic) end() {
	tr.t.Helper()
	tr.halt()
	if n := len(tr.faults); n > 0 {
		first := strings.Join(tr.faults[:min(n, 10)], "\n")
		tr.t.Errorf("%d answers were wrong. The first are:\n%s", n, first)
	}
}

// breaks notes that an outage begins now, which takes the master of a group away.
func (tr *traffic) breaks(group string) time.Time {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.broken, tr.lost = time.Now(), group
	return tr.broken
}

// count counts the answers with a status in a period, except those to one group, and returns the
// time of the last of them.
func (tr *traffic) count(status int, except string, from, to time.Time) (n int, last time.Time) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, o := range tr.answers {
		counts := o.status == status && (except == "" || o.group != except)
		if counts && o.at.After(from) && o.at.Before(to) {
			n++
			last = o.at
		}
	}
	return n, last
}

// rate is the number of successful answers a second in a period, except those to one group.
func (tr *traffic) rate(except string, from, to time.Time) float64 {
	n, _ := tr.count(200, except, from, to)
	return float64(n) / to.Sub(from).Seconds()
}

// calmed waits until no answer has been 503 for longer than the server may need to heal, but no
// longer than a minute. It counts the 503 from a time on, and returns the time of the last.
func (tr *traffic) calmed(from time.Time) (refused int, last time.Time) {
	const quiet = recoveryLimit + recoveryMargin + time.Second
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		refused, last = tr.count(503, "", from, time.Now())
		if time.Since(from) > quiet && time.Since(last) > quiet {
			break
		}
		time.Sleep(pauseBetweenRequests)
	}
	return refused, last
}

func (tr *traffic) fault(what string, a answer) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	at := time.Now().UTC().Format("15:04:05.000")
	tr.faults = append(tr.faults, fmt.Sprintf("%s %s: %v", at, what, a))
}

// mayBeUndone tells whether the outage may have undone a change that was answered at a time.
func (u *actor) mayBeUndone(changed time.Time) bool {
	tr := u.traffic
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.rewinds && u.group == tr.lost && changed.Sub(tr.broken).Abs() < replicationLag
}

// send sends a request. The answer must be a success, 503 unavailable, or have one of the codes.
func (u *actor) send(what string, request func() answer, codes ...string) answer {
	a := request()
	if !a.ok() && a.code != "unavailable" && !slices.Contains(codes, a.code) {
		u.traffic.fault(what, a)
	}
	u.traffic.mu.Lock()
	defer u.traffic.mu.Unlock()
	u.traffic.answers = append(u.traffic.answers, observed{time.Now(), u.group, a.status})
	return a
}

// deadCodes are the codes with which a token is refused whose session or turn has ended.
var deadCodes = []string{"refresh_reused", "session_revoked"}

// use sends a request with a token that is good, as far as the user knows.
func (u *actor) use(what string, request func() answer) answer {
	if u.outcomeUnknown || u.mayBeUndone(u.changed) {
		return u.send(what, request, deadCodes...)
	}
	return u.send(what, request)
}

// mustBeDead sends a token that has been dead since a given time, and reports a success.
func (u *actor) mustBeDead(what string, since time.Time, request func() answer) {
	a := u.send(what, request, deadCodes...)
	if a.ok() && !u.mayBeUndone(since) {
		u.traffic.fault(what, a)
	}
}

// note records what the answer to a change says about the session. After a success, the session is
// live if live is true.
func (u *actor) note(a answer, live bool) {
	switch {
	case a.ok():
		u.live, u.outcomeUnknown, u.changed = live, false, time.Now()
	case a.status == 401:
		u.live = false
	default:
		u.outcomeUnknown = u.traffic.refreshMayApply
	}
}

// session is a user's usual round. The steps after the first two need a session.
var session = []func(*actor){
	(*actor).showEndedSession,
	(*actor).logInIfOut,
	(*actor).rotate,
	(*actor).read,
	(*actor).logOut,
}

// showEndedSession shows the tokens of a session that has ended.
func (u *actor) showEndedSession() {
	if u.ended != nil {
		u.mustBeDead("an access token after its logout", u.died, u.ended.copy().me)
		u.mustBeDead("a refresh token after its logout", u.died, u.ended.copy().refresh)
	}
}

func (u *actor) logInIfOut() {
	if !u.live {
		u.note(u.send("login", u.login), true)
	}
}

func (u *actor) rotate() {
	if !u.live {
		return
	}
	old := u.copy()
	a := u.use("refresh", u.refresh)
	u.note(a, true)
	if a.ok() {
		u.mustBeDead("an exchanged refresh token", u.changed, old.refresh)
	}
}

func (u *actor) read() {
	if u.live {
		a := u.use("me", u.me)
		u.live = a.status != 401
	}
}

func (u *actor) logOut() {
	if !u.live {
		return
	}
	last := u.copy()
	a := u.use("logout", u.logout)
	u.note(a, false)
	if a.ok() {
		u.mustBeDead("an access token just after its logout", u.changed, last.me)
	}
	if a.ok() && u.ended == nil { // the first one, because an outage may undo the last
		u.ended, u.died = last, u.changed
	}
}

// logInAgain logs in once more, and out again, since a user has no more than a hundred sessions.
func (u *actor) logInAgain() {
	if u.send("login", u.login).ok() {
		u.send("logout", u.logout)
	}
}
