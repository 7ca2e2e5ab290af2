package chaos

// sentinel_test.go takes away the master of a Redis with Sentinel, and the sentinels.

import (
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A trio is a master Redis and its two replicas, which three sentinels watch. The master does not
// write without a replica, so an old master that does not know of the new one cannot write.
type trio struct {
	t         *testing.T
	nodes     []*redisNode // the first is the master at first
	sentinels []*redisNode
}

const (
	masterName       = "latchkey"
	redisPassword    = "a password of Redis"
	sentinelPassword = "a password of the sentinels"

	// The servers log in as these users. The others use what is above, without a name.
	redisUser     = "latchkey"
	redisLogin    = "a password of Latchkey in Redis"
	sentinelUser  = "watcher"
	sentinelLogin = "a password of the watcher"
)

func startTrio(t *testing.T) *trio {
	t.Helper()
	r := &trio{t: t}
	for i := range 3 {
		settings := []string{
			`save ""`,
			"repl-diskless-sync-delay 0",
			"min-replicas-to-write 1",
			`requirepass "` + redisPassword + `"`,
			`masterauth "` + redisPassword + `"`,
			`user ` + redisUser + ` on ">` + redisLogin + `" ~* &* +@all`,
		}
		if i > 0 {
			settings = append(settings, "replicaof 127.0.0.1 "+r.nodes[0].port)
		}
		node := newRedis(t, redisPassword, settings)
		node.awaitReady()
		r.nodes = append(r.nodes, node)
	}
	eventually(t, startLimit, "the replicas have a master", func() bool {
		return strings.Count(r.nodes[0].do("INFO", "replication"), "state=online") == 2
	})
	for range 3 {
		r.sentinels = append(r.sentinels, startSentinel(t, r.nodes[0], redisPassword))
	}
	for _, sentinel := range r.sentinels {
		eventually(t, startLimit, "the sentinel knows the others", func() bool {
			known := sentinel.do("SENTINEL", "MASTER", masterName)
			return strings.Contains(known, "num-slaves:2") &&
				strings.Contains(known, "num-other-sentinels:2")
		})
	}
	return r
}

// startSentinel starts a sentinel that watches a master. With a wrong password it learns nothing,
// neither of replicas nor of other sentinels.
func startSentinel(t *testing.T, master *redisNode, password string) *redisNode {
	t.Helper()
	sentinel := newRedis(t, sentinelPassword, []string{
		`requirepass "` + sentinelPassword + `"`,
		`user ` + sentinelUser + ` on ">` + sentinelLogin + `" &* +@all`,
		"sentinel monitor " + masterName + " 127.0.0.1 " + master.port + " 2",
		"sentinel auth-pass " + masterName + ` "` + password + `"`,
		"sentinel down-after-milliseconds " + masterName + " 1000",
		"sentinel failover-timeout " + masterName + " 2000",
	}, "--sentinel")
	sentinel.awaitReady()
	return sentinel
}

// sentinelURL is a REDIS_URL with these sentinels.
func sentinelURL(sentinels ...*redisNode) string {
	u := "redis://" + url.UserPassword(redisUser, redisLogin).String() +
		"@" + sentinels[0].address() + "/3" +
		"?master_name=" + masterName +
		"&sentinel_username=" + sentinelUser +
		"&sentinel_password=" + url.QueryEscape(sentinelLogin)
	for _, sentinel := range sentinels[1:] {
		u += "&addr=" + sentinel.address()
	}
	return u
}

// awaitSuccessor waits until one of the sentinels that are always there names another master.
func (r *trio) awaitSuccessor() {
	r.t.Helper()
	eventually(r.t, startLimit, "another master is named", func() bool {
		return slices.ContainsFunc(r.sentinels[1:], func(sentinel *redisNode) bool {
			address := sentinel.do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", masterName)
			return !strings.Contains(address, r.nodes[0].port)
		})
	})
}

// A succession is a way in which the master goes and comes back.
type succession struct {
	name   string
	limits vars
	lose   func(*trio)
	back   func(*trio)
}

// successions begins with the one for short mode.
var successions = []succession{
	{"killed", noLimits, killsMaster, restartsMaster},
	{"stopped", noLimits, stopsMaster, thawsMaster},
	{"stopped, and a sentinel with it", noLimits, stopsHost, thawsHost},
	{"killed, with limits", wideLimits, killsMaster, restartsMaster},
	{"stopped, with limits", wideLimits, stopsMaster, thawsMaster},
}

func killsMaster(r *trio)    { r.nodes[0].kill() }
func restartsMaster(r *trio) { r.nodes[0].restart() } // as a master without data, at first
func stopsMaster(r *trio)    { r.nodes[0].freeze() }
func thawsMaster(r *trio)    { r.nodes[0].thaw() } // still a master, in its own view
func stopsHost(r *trio)      { r.nodes[0].freeze(); r.sentinels[0].freeze() }
func thawsHost(r *trio)      { r.nodes[0].thaw(); r.sentinels[0].thaw() }

// TestSentinelMasterLost loses the master while users ask one of two servers and then the other.
func TestSentinelMasterLost(t *testing.T) {
	for i, s := range successions {
		t.Run(s.name, func(t *testing.T) {
			if i > 0 {
				skipIfShort(t)
			}
			s.test(t)
		})
	}
}

func (s succession) test(t *testing.T) {
	users, before := 12, 5*time.Second
	if testing.Short() {
		users, before = 4, time.Second
	}
	r := startTrio(t)
	env := vars{
		"DATABASE_URL": startPostgres(t).url,
		"REDIS_URL":    sentinelURL(r.sentinels...),
		// Within the leeway, a token that is shown again ends no session. So all can be tried.
		"REFRESH_REUSE_LEEWAY": "1h",
	}
	maps.Copy(env, s.limits)
	one, two := startServer(t, env), startServer(t, env)
	move := func(u *actor) {
		u.at(map[*server]*server{one: two, two: one}[u.server])
	}
	tr := newTraffic(t, one, users, func(*actor) bool { return true })
	tr.refreshMayApply = true
	tr.rewinds = true
	given := &givenTokens{}
	tr.start(
		move,
		(*actor).showEndedSession,
		(*actor).logInIfOut,
		given.remember,
		move,
		(*actor).rotate,
		given.remember,
		(*actor).read,
		(*actor).logOut,
	)
	time.Sleep(before)

	broken := tr.breaks("")
	s.lose(r)
	r.awaitSuccessor()
	named := time.Now()
	refused, last := tr.calmed(broken)
	late := max(0, last.Sub(named))
	t.Logf("| Master | Another named after | Last 503 after that | 503 |\n"+
		"| %s | %.1f s | %.1f s | %d |",
		s.name, named.Sub(broken).Seconds(), late.Seconds(), refused)
	if refused == 0 {
		t.Error("there was no 503, so the master was not lost")
	}
	if late > recoveryLimit+recoveryMargin {
		t.Errorf("the last 503 came %v after another master was named", late)
	}

	if !testing.Short() {
		back := time.Now()
		s.back(r)
		if refused, _ := tr.calmed(back); refused > 0 {
			t.Errorf("%d answers were 503 after the lost master was back", refused)
		}
	}
	tr.end()
	given.check(t)
}

// givenTokens are the refresh tokens that users have received, by session. The oldest comes first.
type givenTokens struct {
	mu       sync.Mutex
	sessions map[string][]*user
}

// remember remembers the token that a user has.
func (g *givenTokens) remember(u *actor) {
	var claims struct{ Sid string }
	_, payload, _ := strings.Cut(u.cookie, ".")
	payload, _, _ = strings.Cut(payload, ".")
	text, _ := base64.RawURLEncoding.DecodeString(payload)
	json.Unmarshal(text, &claims) // what is no token belongs to the session without an id
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sessions == nil {
		g.sessions = map[string][]*user{}
	}
	g.sessions[claims.Sid] = append(g.sessions[claims.Sid], u.copy())
}

// check shows all tokens. At most one of a session may be good.
func (g *givenTokens) check(t *testing.T) {
	t.Helper()
	for id, tokens := range g.sessions {
		good := 0
		for i, u := range tokens {
			if i > 0 && u.cookie == tokens[i-1].cookie {
				continue
			}
			a := u.refresh()
			if a.ok() {
				good++
			} else if a.status != http.StatusUnauthorized {
				t.Errorf("a token that was given before: %v", a)
			}
		}
		if good > 1 {
			t.Errorf("session %s has %d chains of refresh tokens", id, good)
		}
	}
	if len(g.sessions) == 0 {
		t.Error("no token has been given")
	}
}

// TestSentinelOldMasterWakes has an old master that is back and does not know yet that it is a
// replica, and a sentinel that still names it, because it is cut off from the others. Servers that
// reach the others must not take the old master for the master, also if they were idle all the
// time. A server that knows no other sentinel does take it for the master. But the old master
// refuses to write then, because no replica follows it (min-replicas-to-write).
func TestSentinelOldMasterWakes(t *testing.T) {
	r := startTrio(t)
	cutOff := startSentinel(t, r.nodes[0], "a wrong password")
	env := vars{
		"DATABASE_URL": startPostgres(t).url,
		"REDIS_URL":    sentinelURL(append([]*redisNode{cutOff}, r.sentinels...)...),
	}
	used, idle := startServer(t, env), startServer(t, env)
	env["REDIS_URL"] = sentinelURL(cutOff)
	misled := startServer(t, env)
	u := signedUp(t, used)
	r.nodes[0].freeze()
	r.awaitSuccessor()
	eventually(t, goodAgainLimit, "the server is ready", used.isReady)
	if a := u.refresh(); !a.ok() {
		t.Fatalf("refresh after the failover: %v", a)
	}
	exchanged := u.copy()
	time.Sleep(recoveryLimit) // in which an idle server must learn of the new master, too

	r.nodes[0].thaw()
	if role := r.nodes[0].do("INFO", "replication"); !strings.Contains(role, "role:master") {
		t.Fatalf("the old master knows already that it is a replica:\n%s", role)
	}
	if a := u.at(idle).refresh(); !a.ok() {
		t.Errorf("refresh on the server that was idle: %v", a)
	}
	if a := exchanged.copy().refresh(); a.code != "refresh_reused" {
		t.Errorf("the exchanged token on the server in use: %v", a)
	}
	a := exchanged.copy().at(misled).refresh()
	// Once the sentinels have made the old master a replica, it says READONLY instead.
	refuses := regexp.MustCompile(`NOREPLICAS|READONLY`)
	if a.code != "unavailable" || !refuses.MatchString(misled.output()) {
		t.Errorf("the exchanged token on the server that is misled: %v", a)
	}
}

func TestSentinels(t *testing.T) {
	r, pg := startTrio(t), startPostgres(t)
	t.Run("URL wrong", func(t *testing.T) { testSentinelURLWrong(t, r, pg.url) })
	t.Run("away", func(t *testing.T) { testSentinelsAway(t, r, pg.url) })
}

// testSentinelURLWrong starts servers with mistakes in REDIS_URL that show only when it is used.
// The server is not ready then, and the log says why. A sentinel that is taken for a Redis answers
// what no Redis would.
func testSentinelURLWrong(t *testing.T, r *trio, database string) {
	right := sentinelURL(r.sentinels...)
	port := "redis://:" + url.PathEscape(sentinelPassword) + "@" + r.sentinels[0].address()
	for _, mistake := range []struct {
		redisURL string
		status   int
		logged   string
	}{
		{strings.Replace(right, "="+masterName, "=other", 1), 503, "No such master with that name"},
		{strings.Replace(right, "+the+", "+", 1), 503, "WRONGPASS"},
		{strings.Replace(right, "%20of%20", "%20", 1), 503, "check user and password in REDIS_URL"},
		{port, 500, "unknown command"},
	} {
		s := launchServer(t, vars{"DATABASE_URL": database, "REDIS_URL": mistake.redisURL})
		eventually(t, startLimit, "the server is healthy", func() bool {
			return s.status("/healthz") == http.StatusOK
		})
		if status := s.status("/readyz"); status != http.StatusServiceUnavailable {
			t.Errorf("/readyz with %s: %d", mistake.redisURL, status)
		}
		if a := newUser(s).signup(); a.status != mistake.status || a.took > redisLimit {
			t.Errorf("signup with %s: %v", mistake.redisURL, a)
		}
		output := s.output()
		if !strings.Contains(output, mistake.logged) || strings.Contains(output, "password of") {
			t.Errorf("the log does not say %q, or shows a password:\n%s", mistake.logged, output)
		}
	}
}

// testSentinelsAway takes one sentinel after the other away.
func testSentinelsAway(t *testing.T, r *trio, database string) {
	env := vars{"DATABASE_URL": database, "REDIS_URL": sentinelURL(r.sentinels...)}
	r.sentinels[0].kill()
	s := startServer(t, env)
	u := signedUp(t, s)
	if keys := r.nodes[0].do("INFO", "keyspace"); !strings.Contains(keys, "db3:") {
		t.Errorf("the sessions are not in the database of the URL:\n%s", keys)
	}
	before := s.quietMetrics()

	r.sentinels[1].freeze()
	startServer(t, env)
	r.sentinels[2].freeze()
	var all sync.WaitGroup
	for range 30 { // more than there are connections yet
		all.Go(func() {
			if a := u.copy().me(); !a.ok() || a.took > redisLimit {
				t.Errorf("me without sentinels: %v", a)
			}
		})
	}
	all.Wait()

	late := launchServer(t, env)
	eventually(t, startLimit, "the server is healthy", func() bool {
		return late.status("/healthz") == http.StatusOK
	})
	stranger := newUser(late)
	if a := stranger.signup(); a.code != "unavailable" || a.took > redisLimit {
		t.Errorf("signup on a server that no sentinel has answered yet: %v", a)
	}
	r.sentinels[1].thaw()
	r.sentinels[2].thaw()
	eventually(t, goodAgainLimit, "the server is ready", late.isReady)
	if a := stranger.signup(); !a.ok() {
		t.Errorf("signup once the sentinels are back: %v", a)
	}
	s.awaitQuiet(before)
	if err := s.terminate(); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}
