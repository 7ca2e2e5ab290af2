package integration

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	redismodule "github.com/testcontainers/testcontainers-go/modules/redis"
	"github.com/testcontainers/testcontainers-go/network"
)

// cluster starts a Redis Cluster of three masters, the fewest that it takes.
func cluster(t *testing.T) (nodes []testcontainers.Container, redisURL string) {
	t.Helper()
	prefix := "redis-cluster-" + strings.ToLower(rand.Text()[:8])
	create := []string{"redis-cli", "--cluster", "create"}
	names := []string{}
	for i := range 3 {
		name := fmt.Sprintf("%s-%d", prefix, i)
		c, err := redismodule.Run(t.Context(), redisImage, testcontainers.WithCmd("redis-server", "--cluster-enabled", "yes", "--cluster-node-timeout", "2000"),
			published("6379/tcp"), network.WithNetwork([]string{name}, lan))
		testcontainers.CleanupContainer(t, c)
		if err != nil {
			t.Fatal(err)
		}
		ip, err := c.ContainerIP(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, c)
		names = append(names, name+":6379")
		create = append(create, ip+":6379") // nodes know each other by address only
	}
	redisCLI(t, nodes[0], append(create, "--cluster-yes"))
	eventually(t, 30*time.Second, "the cluster is whole", func() bool {
		for _, c := range nodes {
			if !strings.Contains(redisCLI(t, c, []string{"redis-cli", "cluster", "info"}), "cluster_state:ok") {
				return false
			}
		}
		return true
	})
	return nodes, "redis://" + names[0] + "?addr=" + names[1] + "&addr=" + names[2]
}

func redisCLI(t *testing.T, c testcontainers.Container, cmd []string) string {
	t.Helper()
	exit, out, err := c.Exec(context.Background(), cmd, tcexec.Multiplexed())
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(out)
	if err != nil || exit != 0 {
		t.Fatalf("%q: exit status %d, %v\n%s", cmd, exit, err, text)
	}
	return string(text)
}

// TestCluster is the whole flow where every script must stay on one slot.
func TestCluster(t *testing.T) {
	if suite.c == nil {
		t.Skipf("needs %s", own)
	}
	t.Parallel()
	nodes, redisURL := cluster(t)
	env := development.with(vars{"REDIS_URL": redisURL, "LOGIN_LIMIT_MAX": "3"})
	st := fresh(t)
	one, two := serve(t, st, env), serve(t, st, env)
	one.send(t, request{method: "GET", path: "/readyz"}).want(200)

	// Enough users that their keys are on every node.
	for range 10 {
		v := one.signup(t)
		other, third := v.login(), v.login().on(two)
		if n := len(third.sessions()); n != 3 {
			t.Errorf("%d sessions, want 3", n)
		}
		old := v.refresh
		v.rotate()
		v.show(old).refused(401, "refresh_reused").keepsCookie()
		v.takeTheOne(together(6, func(i int) *answer { return v.on([]*server{one, two}[i%2]).fromNewIP().show(v.refresh) }))
		v.send("DELETE", "/auth/sessions/"+other.sid(), nil).want(200)
		other.gone()
		changed := newPassword()
		v.send("PUT", "/auth/password", passwordChange{v.password, changed}).want(200)
		v.password = changed
		third.gone()
		v.lives()
		fourth := v.login()
		fourth.send("POST", "/auth/logout", nil).want(200)
		fourth.gone()
		fifth := v.login()
		v.send("DELETE", "/auth/sessions", nil).want(200)
		v.gone()
		fifth.gone()
		sixth := v.login()
		sixth.send("DELETE", "/auth/me", passwordOnly{v.password}).want(200)
		sixth.gone()
	}
	v := one.signup(t)
	for i := range 3 {
		[]*server{one, two}[i%2].tryLogin(t, v.email, newPassword(), v.ip).refused(401, "invalid_credentials")
	}
	two.tryLogin(t, v.email, v.password, v.ip).refused(429, "too_many_attempts")
	v.login()
	ip := newIP()
	answers := together(150, func(i int) *answer {
		return []*server{one, two}[i%2].send(t, request{method: "GET", path: "/auth/me", ip: ip})
	})
	if n := count(answers, 401); n != 100 {
		t.Errorf("%d requests passed the limit of 100", n)
	}
	for i, c := range nodes {
		size, err := strconv.Atoi(strings.TrimSpace(redisCLI(t, c, []string{"redis-cli", "dbsize"})))
		if err != nil || size == 0 {
			t.Errorf("node %d holds %d keys (%v): the cluster was not used as one", i, size, err)
		}
	}

	// One node hangs: what it holds is unavailable, and all is well once it is back.
	resume := pause(t, nodes[2])
	answers = together(40, func(int) *answer { return one.send(t, request{method: "GET", path: "/auth/me"}) })
	for _, a := range answers {
		if a.status() == 503 {
			a.refused(503, "unavailable")
		} else {
			a.refused(401, "missing_token")
		}
		if a.took > redisBound {
			t.Errorf("an answer took %v beside a hanging node", a.took)
		}
	}
	if count(answers, 503) == 0 {
		t.Error("no key was on the node that hangs")
	}
	resume()
	eventually(t, 30*time.Second, "the cluster is whole again", func() bool {
		return count(together(20, func(int) *answer { return one.send(t, request{method: "GET", path: "/auth/me"}) }), 401) == 20
	})
	v.lives()
}
