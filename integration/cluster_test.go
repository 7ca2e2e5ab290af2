package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/modules/redis"
)

// A node is one master of a Redis Cluster.
type node struct {
	t         *testing.T
	container testcontainers.Container
	ip        string
	id        string
}

// cli sends a command to the node.
func (n *node) cli(args ...string) string {
	n.t.Helper()
	out, err := execute(n.t.Context(), n.container, append([]string{"redis-cli"}, args...)...)
	if err != nil {
		n.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// cluster starts a Redis Cluster of three masters, the fewest that it takes.
func cluster(t *testing.T) (nodes []*node, redisURL string) {
	t.Helper()
	create := []string{"--cluster", "create"}
	for range 3 {
		c, err := redis.Run(t.Context(), redisImage, testcontainers.WithCmd(
			"redis-server", "--cluster-enabled", "yes", "--cluster-node-timeout", "2000"))
		testcontainers.CleanupContainer(t, c)
		if err != nil {
			t.Fatal(err)
		}
		n := &node{t: t, container: c}
		if n.ip, err = c.ContainerIP(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.id = n.cli("CLUSTER", "MYID")
		nodes = append(nodes, n)
		create = append(create, n.ip+":6379")
	}
	nodes[0].cli(append(create, "--cluster-yes")...)
	for _, n := range nodes {
		eventually(t, 30*time.Second, "the cluster is whole", func() bool {
			return strings.Contains(n.cli("CLUSTER", "INFO"), "cluster_state:ok")
		})
	}
	return nodes, fmt.Sprintf("redis://%s:6379?addr=%s:6379&addr=%s:6379",
		nodes[0].ip, nodes[1].ip, nodes[2].ip)
}

// The contract holds where every script must stay on one slot, for users in all of them.
func TestClusterContract(t *testing.T) {
	nodes, redisURL := cluster(t)
	api := serve(t, vars{"NODE_ENV": "development", "BCRYPT_COST": "4", "REDIS_URL": redisURL})
	runSuite(t, secrets.with(vars{
		"LATCHKEY_BASE_URL": api,
		"NODE_ENV":          "development",
		"DATABASE_URL":      "",
		"REDIS_URL":         "",
	}), "-run", "TestContract", ".")
	for _, n := range nodes {
		if n.cli("DBSIZE") == "0" {
			t.Errorf("%s holds no key: the cluster was not used as one", n.ip)
		}
	}
}

// A slot moves to another node, key by key, while its user goes on. What cannot be done meanwhile
// is 503, whatever Redis says about it, and afterwards nothing is lost.
func TestClusterSlotMoves(t *testing.T) {
	t.Parallel()
	nodes, redisURL := cluster(t)
	api := serve(t, vars{"REDIS_URL": redisURL, "NODE_ENV": "development", "BCRYPT_COST": "4"})
	u := newUser(t, api)
	id := u.must("POST", "/auth/signup", u.credentials).body.User.ID
	other := u.login()
	other.must("POST", "/auth/refresh", nil) // so that there is a blacklist entry too

	slot := nodes[0].cli("CLUSTER", "KEYSLOT", "user-sessions:{"+id+"}")
	owner := slices.IndexFunc(nodes, func(n *node) bool {
		return n.cli("CLUSTER", "COUNTKEYSINSLOT", slot) != "0"
	})
	from, to := nodes[owner], nodes[(owner+1)%3]
	keys := func() []string {
		return strings.Fields(from.cli("CLUSTER", "GETKEYSINSLOT", slot, "100"))
	}
	if n := len(keys()); n < 4 {
		t.Fatalf("%d keys are in the slot, want the index, two sessions and more", n)
	}
	refused := 0
	// stir does all that a user does with sessions. It is done, or it is unavailable.
	stir := func(what string) {
		for _, request := range []string{
			"GET /auth/sessions", "POST /auth/refresh", "GET /auth/me", "POST /auth/login",
			"DELETE /auth/sessions/" + id, // of no session
		} {
			method, path, _ := strings.Cut(request, " ")
			device := u
			if path == "/auth/login" {
				copied := *u // which keeps its own tokens
				device = &copied
			}
			r := device.send(method, path, u.credentials)
			if r.body.Code == "unavailable" {
				refused++
			} else if r.status != 200 && r.body.Code != "session_not_found" {
				t.Errorf("%s: %s: %d %s", what, request, r.status, r.body.Code)
			}
		}
	}
	to.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", from.id)
	from.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
	stir("before the first key")
	migrate := func(key string) { from.cli("MIGRATE", to.ip, "6379", key, "0", "5000", "REPLACE") }
	for _, key := range keys() {
		migrate(key)
		stir("without " + key)
	}
	for left := keys(); len(left) > 0; left = keys() { // what has come meanwhile
		migrate(left[0])
	}
	to.cli("CLUSTER", "SETSLOT", slot, "NODE", to.id) // first, so that one of them owns it
	for _, n := range nodes {
		n.cli("CLUSTER", "SETSLOT", slot, "NODE", to.id)
	}
	stir("just after the move")
	if refused == 0 {
		t.Error("nothing was unavailable: the slot has not moved under the requests")
	}
	eventually(t, 10*time.Second, "all is well", func() bool {
		return u.send("GET", "/auth/sessions", nil).status == 200
	})
	other.lives()
	u.lives()
	u.must("DELETE", "/auth/sessions", nil)
	if r := other.send("GET", "/auth/me", nil); r.body.Code != "session_revoked" {
		t.Errorf("another session after the revocation: %d %s", r.status, r.body.Code)
	}
}
