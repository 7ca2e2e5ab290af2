package chaos

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	restarts = flag.Int("restarts", 3, "rounds of TestRollingRestart; at most 1 in short mode")

	// By default, delay is more than HAProxy takes to notice that a server is about to stop: three
	// checks, two seconds apart. With less, requests fail.
	delay = flag.Duration("delay", 8*time.Second, "SHUTDOWN_DELAY in TestRollingRestart")
)

// restartTime is how long a restarting server is away. It is longer than HAProxy tries to reach a
// server that it still counts as up: three more times, a second apart.
const restartTime = 4 * time.Second

// TestRollingRestart restarts two servers in turn behind a proxy while users act. No request fails,
// and no session is lost.
func TestRollingRestart(t *testing.T) {
	t.Run("HAProxy", func(t *testing.T) {
		testRollingRestart(t, startHAProxy)
	})
	t.Run("nginx", func(t *testing.T) {
		skipIfShort(t)
		testRollingRestart(t, startNginx)
	})
}

func testRollingRestart(t *testing.T, startBalancer func(*testing.T, ...*server) *balancer) {
	n := *restarts
	if testing.Short() {
		n = min(n, 1)
	}
	env := vars{
		"DATABASE_URL":   startPostgres(t).url,
		"REDIS_URL":      startRedis(t).url,
		"SHUTDOWN_DELAY": delay.String(),
	}
	servers := []*server{startServer(t, env), startServer(t, env)}
	front := startBalancer(t, servers...)
	users := startCrowd(t, front.server)
	for range n {
		for _, s := range servers {
			if err := s.terminate(); err != nil {
				t.Errorf("a server ended with %v", err)
			}
			front.awaitDown(s)
			time.Sleep(restartTime)
			s.restart()
			front.awaitUp(s)
		}
	}
	users.stop()
}

// A crowd is users who act until they are stopped. Each makes the next request when the last one is
// answered.
type crowd struct {
	t       *testing.T
	users   []*user
	done    atomic.Int64 // requests that succeeded
	busy    atomic.Int64 // requests that waited in vain for a store
	stopped atomic.Bool
	wg      sync.WaitGroup
}

// startCrowd starts users of a proxy. Every other one opens a connection for each request.
func startCrowd(t *testing.T, front *server) *crowd {
	t.Helper()
	hasty := *front
	hasty.http = newHTTPClient()
	hasty.http.Transport.(*http.Transport).DisableKeepAlives = true
	c := &crowd{t: t}
	t.Cleanup(c.halt)
	for range 4 {
		c.users = append(c.users, signedUp(t, front), signedUp(t, &hasty))
	}
	for _, u := range c.users {
		c.wg.Go(func() { c.act(u) })
	}
	return c
}

// act makes requests until the crowd is stopped. Each must succeed, with one exception that has
// nothing to do with restarts: on a very busy machine a server may wait in vain for a store.
func (c *crowd) act(u *user) {
	for !c.stopped.Load() {
		for _, request := range []func() answer{u.refresh, u.me, u.refresh, u.login, u.sessions} {
			switch a := request(); {
			case a.ok():
				c.done.Add(1)
			case a.code == "unavailable" && a.took > time.Second/2:
				c.busy.Add(1)
			default:
				c.t.Errorf("%v %s", a, a.body)
			}
			time.Sleep(5 * time.Millisecond) // so that the proxy also keeps idle connections
		}
	}
}

// halt stops the users and waits for them.
func (c *crowd) halt() {
	c.stopped.Store(true)
	c.wg.Wait()
}

// stop ends the requests. Every user must still have a session.
func (c *crowd) stop() {
	c.halt()
	c.t.Logf("%d requests succeeded, %d waited in vain for a store", c.done.Load(), c.busy.Load())
	if c.busy.Load() > c.done.Load()/1000 {
		c.t.Error("too many requests waited in vain for a store")
	}
	for _, u := range c.users {
		if a := u.refresh(); !a.ok() {
			c.t.Errorf("a session is lost: %v", a)
		}
	}
}

// A balancer is a proxy in front of two servers.
type balancer struct {
	*server // the proxy, as clients see it

	// awaitDown and awaitUp wait until the proxy has noticed that a server is gone or back.
	awaitDown func(s *server)
	awaitUp   func(s *server)
}

// startHAProxy starts HAProxy with the checks that it makes by default: one every two seconds, of
// which three in a row must fail before a server counts as down, and two succeed before it is up.
func startHAProxy(t *testing.T, servers ...*server) *balancer {
	t.Helper()
	config := `
defaults
	mode http
	timeout connect 5s
	timeout client 50s
	timeout server 50s
listen latchkey
	bind 127.0.0.1:PORT
	stats enable
	stats uri /stats
	option httpchk GET /readyz
`
	for _, s := range servers {
		config += fmt.Sprintf("\tserver %[1]s 127.0.0.1:%[1]s check\n", s.env["PORT"])
	}
	b := runBalancer(t, "haproxy", config, "-db", "-f")
	sees := func(s *server, status string) {
		eventually(t, 30*time.Second, "HAProxy sees a server "+status, func() bool {
			a := newUser(b.server).ask("GET", "/stats;csv", nil)
			_, row, _ := strings.Cut(a.body, "\nlatchkey,"+s.env["PORT"]+",")
			row, _, _ = strings.Cut(row, "\n")
			return strings.Contains(row, ","+status+",")
		})
	}
	b.awaitDown = func(s *server) { sees(s, "DOWN") }
	b.awaitUp = func(s *server) { sees(s, "UP") }
	return b
}

// startNginx starts nginx. It makes no checks: it learns from requests that a server is gone, and
// leaves it out for ten seconds then. So some requests are sent just when a server closes its
// listener. With non_idempotent, nginx sends them to the other server even if they are POST.
func startNginx(t *testing.T, servers ...*server) *balancer {
	t.Helper()
	upstream := ""
	for _, s := range servers {
		upstream += "server 127.0.0.1:" + s.env["PORT"] + "; "
	}
	b := runBalancer(t, "nginx", `
daemon off;
master_process off;
pid FOLDER/pid;
error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path FOLDER/body;
	proxy_temp_path FOLDER/proxy;
	fastcgi_temp_path FOLDER/fastcgi;
	uwsgi_temp_path FOLDER/uwsgi;
	scgi_temp_path FOLDER/scgi;
	upstream latchkey { `+upstream+`}
	server {
		listen 127.0.0.1:PORT;
		location / {
			proxy_pass http://latchkey;
			proxy_next_upstream error timeout non_idempotent;
		}
	}
}
`, "-c")
	b.awaitDown = func(*server) {}
	b.awaitUp = func(s *server) {
		before := len(s.output())
		eventually(t, 30*time.Second, "nginx uses a server again", func() bool {
			return strings.Contains(s.output()[before:], "/auth/refresh")
		})
	}
	return b
}

// runBalancer runs a program until the test ends. The name of its configuration file follows args.
func runBalancer(t *testing.T, program, config string, args ...string) *balancer {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skip("there is no " + program + " here")
	}
	port := freePort(t)
	folder := t.TempDir()
	config = strings.NewReplacer("PORT", port, "FOLDER", folder).Replace(config)
	file := filepath.Join(folder, program+".conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &server{
		t:    t,
		url:  "http://127.0.0.1:" + port,
		http: newHTTPClient(),
	}
	s.process = startProcess(t, program, exec.Command(path, append(args, file)...))
	s.isReady = func() bool { return s.status("/readyz") == http.StatusOK }
	s.awaitReady()
	return &balancer{server: s}
}
