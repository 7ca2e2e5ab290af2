package chaos

// cluster_test.go takes masters of a Redis Cluster away from under the server. The traffic is also
// that of standby_test.go.

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// healing is how much longer than its stores the server may take until all is well again, and
	// healingMargin what a busy machine with two cores may add.
	healing       = 2 * time.Second
	healingMargin = time.Second

	// undone is how much of what was answered a failover may undo, since replication between the
	// nodes of a cluster is asynchronous.
	undone = time.Second

	// thinking is the time between two requests of a user. It keeps the traffic from saturating the
	// machine, because rates would then say nothing about the server.
	thinking = 50 * time.Millisecond

	// leastShare is the share of their rate that users of other slots must keep in an outage. They
	// keep all of it, unless the machine is busy with something else meanwhile.
	leastShare = 0.25
)

// Traffic is users who do the same steps again and again.
type traffic struct {
	t       *testing.T
	users   []*looper
	rewinds bool // whether an outage may undo what was answered last
	unclear bool // whether a refresh that is answered with 503 may have been carried out
	stop    chan struct{}
	loops   sync.WaitGroup

	mu      sync.Mutex
	broken  time.Time // when the outage began
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

// A looper is one of these users, and what it knows about its session.
type looper struct {
	*user
	traffic *traffic
	id      string
	group   string    // the master that has its sessions
	live    bool      // it has a session
	unsure  bool      // a change that was answered with 503 may have been carried out
	changed time.Time // when a change was last answered with success
	ghost   *user     // with the tokens of a session that has ended
	died    time.Time // when that session ended
}

// newTraffic signs up n users whom wanted, which may set their group, agrees to.
func newTraffic(t *testing.T, s *server, n int, wanted func(*looper) bool) *traffic {
	t.Helper()
	tr := &traffic{t: t, stop: make(chan struct{})}
	for len(tr.users) < n {
		u := &looper{user: signedUp(t, s), traffic: tr, live: true}
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

func (tr *traffic) start(steps ...func(*looper)) {
	for _, u := range tr.users {
		tr.loops.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-tr.stop:
					return
				case <-time.After(thinking):
					steps[i%len(steps)](u)
				}
			}
		})
	}
}

// end ends the loops and reports the answers that were wrong.
func (tr *traffic) end() {
	tr.t.Helper()
	close(tr.stop)
	tr.loops.Wait()
	if n := len(tr.faults); n > 0 {
		first := strings.Join(tr.faults[:min(n, 10)], "\n")
		tr.t.Errorf("%d answers were wrong. The first are:\n%s", n, first)
	}
}

// breaks notes that an outage begins now.
func (tr *traffic) breaks() time.Time {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.broken = time.Now()
	return tr.broken
}

// mayBeUndone tells whether the outage may have undone a change that was answered at a time.
func (tr *traffic) mayBeUndone(changed time.Time) bool {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.rewinds && changed.Sub(tr.broken).Abs() < undone
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
	const quiet = healing + healingMargin + time.Second
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(thinking) {
		refused, last = tr.count(503, "", from, time.Now())
		if time.Since(from) > quiet && time.Since(last) > quiet {
			break
		}
	}
	return refused, last
}

func (tr *traffic) fault(what string, a answer) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	at := time.Now().UTC().Format("15:04:05.000")
	tr.faults = append(tr.faults, fmt.Sprintf("%s %s: %v", at, what, a))
}

// send sends a request. The answer must be a success, 503 unavailable, or have one of the codes.
func (u *looper) send(what string, request func() answer, codes ...string) answer {
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
func (u *looper) use(what string, request func() answer) answer {
	if u.unsure || u.traffic.mayBeUndone(u.changed) {
		return u.send(what, request, deadCodes...)
	}
	return u.send(what, request)
}

// mustBeDead shows a token that must be refused since a time.
func (u *looper) mustBeDead(what string, since time.Time, request func() answer) {
	a := u.send(what, request, deadCodes...)
	if a.ok() && !u.traffic.mayBeUndone(since) {
		u.traffic.fault(what, a)
	}
}

// learn notes what the answer to a change tells about the session. live is what it is after a
// success.
func (u *looper) learn(a answer, live bool) {
	switch {
	case a.ok():
		u.live, u.unsure, u.changed = live, false, time.Now()
	case a.status == 401:
		u.live = false
	default:
		u.unsure = u.traffic.unclear
	}
}

// session is a user's usual round. The steps after the first two need a session.
var session = []func(*looper){
	(*looper).haunt,
	(*looper).enter,
	(*looper).rotate,
	(*looper).read,
	(*looper).leave,
}

// haunt shows the tokens of a session that has ended.
func (u *looper) haunt() {
	if u.ghost != nil {
		u.mustBeDead("an access token after its logout", u.died, u.ghost.copy().me)
		u.mustBeDead("a refresh token after its logout", u.died, u.ghost.copy().refresh)
	}
}

func (u *looper) enter() {
	if !u.live {
		u.learn(u.send("login", u.login), true)
	}
}

func (u *looper) rotate() {
	if !u.live {
		return
	}
	old := u.copy()
	a := u.use("refresh", u.refresh)
	u.learn(a, true)
	if a.ok() {
		u.mustBeDead("an exchanged refresh token", u.changed, old.refresh)
	}
}

func (u *looper) read() {
	if u.live {
		a := u.use("me", u.me)
		u.live = a.status != 401
	}
}

func (u *looper) leave() {
	if !u.live {
		return
	}
	last := u.copy()
	a := u.use("logout", u.logout)
	u.learn(a, false)
	if a.ok() {
		u.mustBeDead("an access token just after its logout", u.changed, last.me)
	}
	if a.ok() && u.ghost == nil { // the first one, because an outage may undo the last
		u.ghost, u.died = last, u.changed
	}
}

// knock logs in once more, and out again, since a user has no more than a hundred sessions.
func (u *looper) knock() {
	if u.send("login", u.login).ok() {
		u.send("logout", u.logout)
	}
}

// A cluster is a Redis Cluster.
type cluster struct {
	t     *testing.T
	nodes []*redisNode
}

// startCluster starts three masters with a replica each. With cluster-require-full-coverage, which
// is Redis' default, no slot would be served while some have no master.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t}
	create := []string{"--cluster", "create"}
	for range 6 {
		n := startRedis(t,
			"cluster-enabled yes",
			"cluster-port "+freePort(t),
			"cluster-node-timeout 2000",
			"cluster-require-full-coverage no",
			"repl-diskless-sync-delay 0",
		)
		c.nodes = append(c.nodes, n)
		create = append(create, n.address())
	}
	c.cli(append(create, "--cluster-replicas", "1", "--cluster-yes")...)
	eventually(t, startLimit, "every node knows three masters and three replicas", func() bool {
		_, whole := c.masters(c.nodes)
		return whole && !slices.ContainsFunc(c.nodes, func(n *redisNode) bool {
			return strings.Count(n.do("CLUSTER", "NODES"), "slave ") != 3 ||
				strings.Contains(n.do("INFO", "replication"), "master_link_status:down")
		})
	})
	return c
}

func (r *redisNode) address() string { return "127.0.0.1:" + r.port }

// url is the REDIS_URL of the cluster.
func (c *cluster) url() string {
	var rest []string
	for _, n := range c.nodes[1:] {
		rest = append(rest, "addr="+n.address())
	}
	return "redis://" + c.nodes[0].address() + "?" + strings.Join(rest, "&")
}

// cli runs redis-cli.
func (c *cluster) cli(args ...string) {
	c.t.Helper()
	if out, err := exec.Command("redis-cli", args...).CombinedOutput(); err != nil {
		c.t.Fatalf("redis-cli %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// masters returns the address of the master of each slot. It also tells whether all of these nodes
// say the same, and say that all slots are served.
func (c *cluster) masters(nodes []*redisNode) (masters [16384]string, whole bool) {
	whole = true
	for i, n := range nodes {
		known := mastersKnownTo(n)
		if i == 0 {
			masters = known
		}
		info := n.do("CLUSTER", "INFO")
		whole = whole && known == masters && !slices.Contains(known[:], "") &&
			strings.Contains(info, "cluster_state:ok") &&
			strings.Contains(info, "cluster_slots_ok:16384")
	}
	return masters, whole
}

func mastersKnownTo(n *redisNode) (masters [16384]string) {
	shards, err := n.client.ClusterShards(n.t.Context()).Result()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, shard := range shards {
		i := slices.IndexFunc(shard.Nodes, func(node redis.Node) bool {
			return node.Role == "master" && node.Health == "online"
		})
		for _, r := range shard.Slots {
			for slot := r.Start; slot <= r.End && i >= 0; slot++ {
				masters[slot] = fmt.Sprintf("127.0.0.1:%d", shard.Nodes[i].Port)
			}
		}
	}
	return masters
}

// find returns the node with an address, its replica, and all nodes but the first of the two.
func (c *cluster) find(address string) (master, replica *redisNode, others []*redisNode) {
	i := slices.IndexFunc(c.nodes, func(n *redisNode) bool { return n.address() == address })
	master = c.nodes[i]
	others = slices.Delete(slices.Clone(c.nodes), i, i+1)
	i = slices.IndexFunc(others, func(n *redisNode) bool {
		return strings.Contains(n.do("INFO", "replication"), "master_port:"+master.port+"\r")
	})
	return master, others[i], others
}

// A scene is a server on a cluster under traffic, and the master that is to be lost.
type scene struct {
	t       *testing.T
	cluster *cluster
	traffic *traffic
	began   time.Time
	master  *redisNode
	replica *redisNode
	others  []*redisNode // all nodes but master
}

var (
	// noLimits keeps the counters of the limits out, whose slots are not the ones of the sessions.
	noLimits = vars{"RATE_LIMIT_MAX": "0", "LOGIN_LIMIT_MAX": "0"}

	// wideLimits counts all requests and refuses none.
	wideLimits = vars{"RATE_LIMIT_MAX": "1000000", "LOGIN_LIMIT_MAX": "1000000"}
)

// setScene starts all that a scene needs, with as many users on each master.
func setScene(t *testing.T, limits vars) *scene {
	t.Helper()
	users, before := 12, 5*time.Second
	if testing.Short() {
		users, before = 4, 2*time.Second
	}
	c := startCluster(t)
	env := vars{"DATABASE_URL": startPostgres(t).url, "REDIS_URL": c.url()}
	maps.Copy(env, limits)
	masters, _ := c.masters(c.nodes)
	members := map[string]int{}
	tr := newTraffic(t, startServer(t, env), 3*users, func(u *looper) bool {
		key := "{" + u.id + "}"
		u.group = masters[c.nodes[0].client.ClusterKeySlot(t.Context(), key).Val()]
		members[u.group]++
		return members[u.group] <= users
	})
	tr.unclear = true
	s := &scene{t: t, cluster: c, traffic: tr, began: time.Now()}
	s.master, s.replica, s.others = c.find(tr.users[0].group)
	tr.start(session...)
	time.Sleep(before)
	return s
}

// lose loses the master, whose slots another node must take over. Soon after the cluster is whole,
// all must be well, and the users of other slots must have kept a share of their rate meanwhile.
func (s *scene) lose(how string, share float64, begin func()) {
	s.t.Helper()
	lost := s.master.address()
	broken := s.traffic.breaks()
	begin()
	eventually(s.t, startLimit, "the cluster is whole again", func() bool {
		masters, whole := s.cluster.masters(s.others)
		return whole && !slices.Contains(masters[:], lost)
	})
	whole := time.Now()
	refused, last := s.traffic.calmed(broken)
	late := max(0, last.Sub(whole))
	others, _ := s.traffic.count(503, lost, broken, whole)
	before, during := s.traffic.rate(lost, s.began, broken), s.traffic.rate(lost, broken, whole)
	s.t.Logf("| Master | Cluster whole after | Last 503 after that | 503 | 503 of other slots | "+
		"Their rate before | And during |\n| %s | %.1f s | %.1f s | %d | %d | %.0f/s | %.0f/s |",
		how, whole.Sub(broken).Seconds(), late.Seconds(), refused, others, before, during)
	if late > healing+healingMargin {
		s.t.Errorf("the last 503 came %v after the cluster was whole", late)
	}
	if during < share*before {
		s.t.Errorf("users of other slots kept only %.0f %% of their rate", 100*during/before)
	}
}

// regain brings the lost master back, which is a replica now. Nobody may notice for long.
func (s *scene) regain(begin func()) {
	s.t.Helper()
	back := time.Now()
	begin()
	if _, last := s.traffic.calmed(back); last.Sub(back) > healing+healingMargin {
		s.t.Errorf("503 until %v after the lost master was back", last.Sub(back))
	}
	s.traffic.end()
}

func TestClusterMasterKilled(t *testing.T) {
	s := setScene(t, noLimits)
	s.traffic.rewinds = true
	s.lose("killed", leastShare, s.master.kill)
	s.regain(s.master.restart)
}

// While a master is silent, its users wait for it, and many of them log in again. The others must
// not wait with them.
func TestClusterMasterSilent(t *testing.T) {
	s := setScene(t, noLimits)
	s.traffic.rewinds = true
	crowd := &traffic{t: t, stop: make(chan struct{})}
	for len(crowd.users) < 30 { // far more than DB_POOL_SIZE
		for _, u := range s.traffic.users {
			if u.group == s.master.address() {
				crowd.users = append(crowd.users, &looper{user: u.copy(), traffic: crowd})
			}
		}
	}
	s.lose("stopped, and a crowd logs in", leastShare, func() {
		s.master.freeze()
		crowd.start((*looper).knock)
	})
	crowd.end()
	s.regain(s.master.thaw)
}

// With limits, a request also needs the slots of its counters, and so meets an outage more often.
func TestClusterMasterLostWithLimits(t *testing.T) {
	skipIfShort(t)
	t.Run("killed", func(t *testing.T) {
		s := setScene(t, wideLimits)
		s.traffic.rewinds = true
		s.lose("killed, with limits", 0, s.master.kill)
		s.regain(s.master.restart)
	})
	t.Run("stopped", func(t *testing.T) {
		s := setScene(t, wideLimits)
		s.traffic.rewinds = true
		s.lose("stopped, with limits", 0, func() { s.master.freeze() })
		s.regain(s.master.thaw)
	})
}

// If a replica takes over in order, or slots move to another master, nothing is undone.
func TestClusterChanges(t *testing.T) {
	skipIfShort(t)
	t.Run("failover", func(t *testing.T) {
		s := setScene(t, noLimits)
		s.lose("replaced in order", 0, func() { s.replica.do("CLUSTER", "FAILOVER") })
		s.traffic.end()
	})
	t.Run("slots", func(t *testing.T) {
		s := setScene(t, noLimits)
		target := s.others[slices.IndexFunc(s.others, func(n *redisNode) bool {
			return strings.Contains(n.do("INFO", "replication"), "role:master")
		})]
		s.lose("its slots moved away", 0, func() {
			s.cluster.cli("--cluster", "reshard", target.address(),
				"--cluster-from", s.master.do("CLUSTER", "MYID"),
				"--cluster-to", target.do("CLUSTER", "MYID"),
				"--cluster-slots", "16384", "--cluster-yes")
		})
		s.traffic.end()
	})
}

func skipIfShort(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes too long for short mode")
	}
}
