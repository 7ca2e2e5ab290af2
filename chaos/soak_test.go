package chaos

// soak_test.go uses a server for minutes, with lifetimes so short that everything expires many
// times over, and looks for what piles up.

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

var soak = flag.Duration("soak", 0, "how long TestSoak takes, such as 10m; without, it is skipped")

// soakers is how many users of each kind act at the same time.
const soakers = 20

// TestSoak samples a server under a mixed load of all routes. Nothing may grow from the second
// quarter of the time to the last one, and every key in Redis must have a TTL at any time.
func TestSoak(t *testing.T) {
	if *soak == 0 {
		t.Skip("-soak 10m runs it")
	}
	rdb := startRedis(t)
	k := &soaking{t: t, server: startServer(t, vars{
		"DATABASE_URL":         startPostgres(t).url,
		"REDIS_URL":            rdb.url,
		"ACCESS_TOKEN_TTL":     "5s",
		"REFRESH_TOKEN_TTL":    "20s",
		"SESSION_MAX_TTL":      "40s",
		"REFRESH_REUSE_LEEWAY": "1s",
		"RATE_LIMIT_MAX":       "10000",
		"RATE_LIMIT_WINDOW":    "5",
		"LOGIN_LIMIT_WINDOW":   "5",
	})}
	var users sync.WaitGroup
	defer users.Wait() // also if the test fails below
	ctx, stop := context.WithTimeout(t.Context(), *soak)
	defer stop()
	for range soakers {
		users.Go(func() { k.cycleAccounts(ctx) })
		users.Go(func() { k.keepSession(ctx) })
	}
	var samples []sample
	ticks := time.NewTicker(5 * time.Second)
	defer ticks.Stop()
	for n := 1; ctx.Err() == nil; n++ {
		<-ticks.C
		assertTTLs(t, rdb.client)
		if n%2 == 0 {
			samples = append(samples, k.sample(rdb.client))
		}
	}
	users.Wait()
	t.Log("\n" + sampleTable(samples))
	assertFlat(t, samples)
	if k.unavailable.Load() > k.answers.Load()/100 {
		t.Errorf("%d of %d answers were 503", k.unavailable.Load(), k.answers.Load())
	}
}

// soaking is the load of a soak.
type soaking struct {
	t           *testing.T
	server      *server
	answers     atomic.Int64
	unavailable atomic.Int64 // answers with status 503
}

// A step is one request and the status that its answer must have.
type step struct {
	what string
	want int
	ask  func() answer
}

// walk takes steps until one goes wrong. An answer of 503 is no error of its own, because a busy
// machine may stop a store for a second.
func (k *soaking) walk(steps ...step) bool {
	for _, next := range steps {
		a := next.ask()
		k.answers.Add(1)
		if a.status == http.StatusServiceUnavailable {
			k.unavailable.Add(1)
			return false
		}
		if a.status != next.want {
			k.t.Errorf("%s: %v, want %d", next.what, a, next.want)
			return false
		}
		time.Sleep(10 * time.Millisecond) // so that the load is far from what the server can do
	}
	return true
}

// cycleAccounts uses every route with one account after the other. It leaves half of the accounts,
// and some of their sessions, to themselves.
func (k *soaking) cycleAccounts(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		u := newUser(k.server)
		second, wrong := u.copy(), u.copy()
		wrong.password = "not the password"
		good := k.walk(
			step{"signup", 201, u.signup},
			step{"me", 200, u.me},
			step{"login with a wrong password", 401, wrong.login},
			step{"an unknown path", 404, func() answer { return u.ask("GET", "/auth/no", nil) }},
			step{"second login", 200, second.login},
			step{"revoke", 200, func() answer { return revokeOther(u) }},
			step{"me of a revoked session", 401, second.me},
			step{"third login", 200, second.login},
			step{"password", 200, func() answer { return u.changePassword("new " + u.password) }},
			step{"me of a session that this ended", 401, second.me},
		)
		exchanged := u.copy()
		good = good && k.walk(
			step{"refresh", 200, u.refresh},
			step{"race", 401, exchanged.copy().refresh},
			step{"healthz", 200, func() answer { return u.ask("GET", "/healthz", nil) }},
			step{"readyz", 200, func() answer { return u.ask("GET", "/readyz", nil) }},
		)
		time.Sleep(1200 * time.Millisecond) // the leeway is over
		good = good && k.walk(
			step{"theft", 401, exchanged.refresh},
			step{"me of a session that this ended", 401, u.me},
			step{"login", 200, u.login},
			step{"logout", 200, u.logout},
			step{"login", 200, u.login},
			step{"revoke all", 200, u.revokeAll},
			step{"login", 200, u.login},
			step{"forgot", 202, u.forgot},
			step{"reset", 200, func() answer {
				return u.reset(k.server.mailedToken("reset", u.email))
			}},
			step{"me of a session that this ended", 401, u.me},
			step{"login", 200, u.login},
		)
		if good && n%2 == 0 {
			k.walk(step{"delete", 200, u.deleteAccount})
		}
	}
}

// revokeOther lists the sessions and revokes one that is not the current one.
func revokeOther(u *user) answer {
	list := u.sessions()
	if !list.ok() {
		return list
	}
	return u.revoke(otherSession(list))
}

// keepSession keeps one session after the other until it has reached SESSION_MAX_TTL.
func (k *soaking) keepSession(ctx context.Context) {
	for ctx.Err() == nil {
		u := newUser(k.server)
		good := k.walk(step{"signup", 201, u.signup})
		for range 5 {
			if !good || !wait(ctx, 7*time.Second) {
				break
			}
			good = k.walk(step{"me, expired", 401, u.me}, step{"refresh", 200, u.refresh})
		}
		if good && wait(ctx, 7*time.Second) {
			k.walk(step{"refresh after SESSION_MAX_TTL", 401, u.refresh})
		}
	}
}

// wait reports whether ctx lives that long.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// assertTTLs looks at all keys in Redis.
func assertTTLs(t *testing.T, client *redis.Client) {
	t.Helper()
	ctx := context.Background()
	keys := client.Scan(ctx, 0, "", 1000).Iterator()
	for keys.Next(ctx) {
		if client.TTL(ctx, keys.Val()).Val() == -1 {
			t.Errorf("%s has no TTL", keys.Val())
		}
	}
	if err := keys.Err(); err != nil {
		t.Errorf("SCAN: %v", err)
	}
}

// sampled names what a sample holds.
var sampled = []string{"answers", "resident MB", "MB from the system", "goroutines", "Redis keys"}

// A sample holds the values measured at one time, in the order of sampled.
type sample []float64

func (k *soaking) sample(client *redis.Client) sample {
	metrics := k.server.metrics()
	return sample{
		float64(k.answers.Load()),
		float64(memory(k.t, k.server, "VmRSS")) / (1 << 20),
		metrics["go_memstats_sys_bytes"] / (1 << 20),
		metrics["go_goroutines"],
		float64(k.countKeys(client)),
	}
}

// countKeys counts the keys in Redis, without those that count the mails to an address. They live
// for an hour, so a soak sees none of them go.
func (k *soaking) countKeys(client *redis.Client) (n int) {
	ctx := context.Background()
	keys := client.Scan(ctx, 0, "", 1000).Iterator()
	for keys.Next(ctx) {
		if !strings.HasPrefix(keys.Val(), "mail-limit:") {
			n++
		}
	}
	if err := keys.Err(); err != nil {
		k.t.Errorf("SCAN: %v", err)
	}
	return n
}

// sampleTable shows the samples, which are 10 s apart, in Markdown.
func sampleTable(samples []sample) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| seconds | %s |\n|---|---|---|---|---|---|\n", strings.Join(sampled, " | "))
	for i, row := range samples {
		fmt.Fprintf(&b, "| %d |", 10*(i+1))
		for _, value := range row {
			fmt.Fprintf(&b, " %.0f |", value)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// assertFlat compares the medians of the second and the last quarter. A fifth more is noise, and so
// are a few more where there are few.
func assertFlat(t *testing.T, samples []sample) {
	t.Helper()
	const noise, few = 1.2, 10
	quarter := len(samples) / 4
	if quarter == 0 {
		t.Fatal("-soak must be at least 1m")
	}
	for i, name := range sampled[1:] { // the answers are meant to grow
		early := median(samples[quarter:2*quarter], i+1)
		late := median(samples[len(samples)-quarter:], i+1)
		if late > early*noise+few {
			t.Errorf("%s: from %.0f in the second quarter to %.0f in the last", name, early, late)
		}
	}
}

func median(samples []sample, column int) float64 {
	var values []float64
	for _, row := range samples {
		values = append(values, row[column])
	}
	slices.Sort(values)
	return values[len(values)/2]
}
