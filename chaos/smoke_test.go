package chaos

import (
	"testing"
	"time"
)

func TestSmoke(t *testing.T) {
	pg := startPostgres(t)
	r := startRedis(t)
	p := startProxy(t, r.url)
	s := startServer(t, vars{"DATABASE_URL": pg.url, "REDIS_URL": p.through(r.url)})
	u := signedUp(t, s)
	t.Log(u.refresh(), u.me(), u.login(), u.sessions(), u.changePassword("another 99 pw"), u.login())
	pg.freeze()
	t.Log("frozen", u.me())
	pg.thaw()
	t.Log("thawed", u.me())
	pg.kill()
	t.Log("killed", u.me())
	pg.restart()
	t.Log("restarted", u.me())
	r.freeze()
	t.Log("frozen", u.me())
	r.thaw()
	t.Log("thawed", u.me())
	p.slow(100 * time.Millisecond)
	t.Log("slow", u.me())
	p.mend()
	p.cut(3)
	t.Log("cut", u.me())
	p.mend()
	t.Log("mended", u.me())
	t.Log(u.deleteAccount(), s.metrics()["go_goroutines"], s.terminate())
}
