package chaos

// cluster_test.go takes masters of a Redis Cluster away from under the server.

import (
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

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

// A clusterTest is a server on a cluster under traffic, and the master that is to be lost.
type clusterTest struct {
	t       *testing.T
	cluster *cluster
	traffic *traffic
	began   time.Time
	broken  time.Time // when the outage began
	whole   time.Time // when the cluster was whole again
	master  *redisNode
	replica *redisNode
	others  []*redisNode // all nodes but master
}

var (
	// noLimits turns the limits off, so that a request needs only the slot of its session.
	noLimits = vars{"RATE_LIMIT_MAX": "0", "LOGIN_LIMIT_MAX": "0"}

	// wideLimits counts all requests and refuses none.
	wideLimits = vars{"RATE_LIMIT_MAX": "1000000", "LOGIN_LIMIT_MAX": "1000000"}
)

// newClusterTest starts all that such a test needs, with as many users on each master.
func newClusterTest(t *testing.T, limits vars) *clusterTest {
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
	tr := newTraffic(t, startServer(t, env), 3*users, func(u *actor) bool {
		key := "{" + u.id + "}"
		u.group = masters[c.nodes[0].client.ClusterKeySlot(t.Context(), key).Val()]
		members[u.group]++
		return members[u.group] <= users
	})
	tr.refreshMayApply = true
	s := &clusterTest{t: t, cluster: c, traffic: tr, began: time.Now()}
	s.master, s.replica, s.others = c.find(tr.users[0].group)
	tr.start(session...)
	time.Sleep(before)
	return s
}

// lose loses the master, whose slots another node must take over. Soon after the cluster is whole,
// all must be well.
func (s *clusterTest) lose(how string, begin func()) {
	s.t.Helper()
	lost := s.master.address()
	s.broken = s.traffic.breaks(lost)
	begin()
	eventually(s.t, startLimit, "the cluster is whole again", func() bool {
		masters, whole := s.cluster.masters(s.others)
		return whole && !slices.Contains(masters[:], lost)
	})
	s.whole = time.Now()
	refused, last := s.traffic.calmed(s.broken)
	late := max(0, last.Sub(s.whole))
	others, before, during := s.otherSlots()
	s.t.Logf("| Master | Cluster whole after | Last 503 after that | 503 | 503 of other slots | "+
		"Their rate before | And during |\n| %s | %.1f s | %.1f s | %d | %d | %.0f/s | %.0f/s |",
		how, s.whole.Sub(s.broken).Seconds(), late.Seconds(), refused, others, before, during)
	if late > recoveryLimit+recoveryMargin {
		s.t.Errorf("the last 503 came %v after the cluster was whole", late)
	}
}

// otherSlots is what the users of other slots met in the outage, and their rate before it.
func (s *clusterTest) otherSlots() (refused int, before, during float64) {
	lost := s.master.address()
	refused, _ = s.traffic.count(503, lost, s.broken, s.whole)
	before = s.traffic.rate(lost, s.began, s.broken)
	during = s.traffic.rate(lost, s.broken, s.whole)
	return refused, before, during
}

// checkOtherSlots checks that the outage did no harm to the users of other slots. They keep all of
// their rate, unless the machine is busy with something else. In short mode, which may share the
// machine with other tests, and whose few users make few requests, they may lose more of it.
func (s *clusterTest) checkOtherSlots() {
	s.t.Helper()
	minShare := 0.7
	if testing.Short() {
		minShare = 0.25
	}
	refused, before, during := s.otherSlots()
	if during < minShare*before {
		s.t.Errorf("users of other slots kept only %.0f %% of their rate", 100*during/before)
	}
	good, _ := s.traffic.count(200, s.master.address(), s.broken, s.whole)
	if refused > good/100 {
		s.t.Errorf("%d answers to users of other slots were 503, and %d were good", refused, good)
	}
}

// bringBack brings the lost master back, which is a replica now. Nobody may notice for long.
func (s *clusterTest) bringBack(begin func()) {
	s.t.Helper()
	back := time.Now()
	begin()
	if _, last := s.traffic.calmed(back); last.Sub(back) > recoveryLimit+recoveryMargin {
		s.t.Errorf("503 until %v after the lost master was back", last.Sub(back))
	}
	s.traffic.end()
}

func TestClusterMasterKilled(t *testing.T) {
	s := newClusterTest(t, noLimits)
	s.traffic.rewinds = true
	s.lose("killed", s.master.kill)
	s.checkOtherSlots()
	s.bringBack(s.master.restart)
}

// While a master is silent, its users wait for it, and many of them log in again. The others must
// not wait with them.
func TestClusterMasterSilent(t *testing.T) {
	s := newClusterTest(t, noLimits)
	s.traffic.rewinds = true
	extra := &traffic{t: t}
	for len(extra.users) < 30 { // far more than DB_POOL_SIZE
		for _, u := range s.traffic.users {
			if u.group == s.master.address() {
				extra.users = append(extra.users, &actor{user: u.copy(), traffic: extra})
			}
		}
	}
	s.lose("stopped, and many log in", func() {
		s.master.freeze()
		extra.start((*actor).logInAgain)
	})
	extra.end()
	s.checkOtherSlots()
	s.bringBack(s.master.thaw)
}

// With limits, a request also needs the slots of its counters, and so meets an outage more often.
func TestClusterMasterLostWithLimits(t *testing.T) {
	skipIfShort(t)
	t.Run("killed", func(t *testing.T) {
		s := newClusterTest(t, wideLimits)
		s.traffic.rewinds = true
		s.lose("killed, with limits", s.master.kill)
		s.bringBack(s.master.restart)
	})
	t.Run("stopped", func(t *testing.T) {
		s := newClusterTest(t, wideLimits)
		s.traffic.rewinds = true
		s.lose("stopped, with limits", func() { s.master.freeze() })
		s.bringBack(s.master.thaw)
	})
}

// After an ordered failover, or after slots have moved, no answered change is lost.
func TestClusterChanges(t *testing.T) {
	skipIfShort(t)
	t.Run("failover", func(t *testing.T) {
		s := newClusterTest(t, noLimits)
		s.lose("replaced in order", func() { s.replica.do("CLUSTER", "FAILOVER") })
		s.traffic.end()
	})
	t.Run("slots", func(t *testing.T) {
		s := newClusterTest(t, noLimits)
		target := s.others[slices.IndexFunc(s.others, func(n *redisNode) bool {
			return strings.Contains(n.do("INFO", "replication"), "role:master")
		})]
		s.lose("its slots moved away", func() {
			s.cluster.cli("--cluster", "reshard", target.address(),
				"--cluster-from", s.master.do("CLUSTER", "MYID"),
				"--cluster-to", target.do("CLUSTER", "MYID"),
				"--cluster-slots", "16384", "--cluster-yes")
		})
		s.traffic.end()
	})
}
