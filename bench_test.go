package main

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkRefreshWhileHashing measures what logins that keep every hashing slot busy, with as many
// more waiting, do to refreshes: with the threads that the server gives itself, and with half of
// them, as Go would. Client and server share the process. A good p99 takes some hundred requests:
// -benchtime 500x.
func BenchmarkRefreshWhileHashing(b *testing.B) {
	s := start(b, map[string]string{"BCRYPT_COST": "12"})
	s.expects = 503 // on a busy machine some logins wait in vain

	// The server has doubled the threads.
	threads := runtime.GOMAXPROCS(0)
	c := signedUp(s)
	for _, load := range []struct {
		name            string
		threads, logins int
	}{
		{"idle", threads, 0},
		{"flooded", threads, threads}, // there are half as many slots as threads
		{"flooded, half the threads", threads / 2, threads},
	} {
		b.Run(load.name, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(load.threads))
			defer flood(s, load.logins)()
			var took []time.Duration
			for b.Loop() {
				r := c.refresh()
				want(b, r, 200, "")
				took = append(took, r.took)
			}
			b.ReportMetric(median(took), "p50-ms")
			b.ReportMetric(took[len(took)*99/100].Seconds()*1000, "p99-ms")
		})
	}
}

// flood lets so many clients log in again and again. It returns when each has done so once, so from
// then on no slot is free. stop waits for the logins that are under way.
func flood(s *server, clients int) (stop func()) {
	var stopped atomic.Bool
	var begun, done sync.WaitGroup
	begun.Add(clients)
	for range clients {
		done.Go(func() {
			newClient(s).login()
			begun.Done()
			for !stopped.Load() {
				newClient(s).login()
			}
		})
	}
	begun.Wait()
	return func() {
		stopped.Store(true)
		done.Wait()
	}
}

// BenchmarkForgot asks for resets for an address with an account, which is sent a mail, and for one
// without, in turns. It reports how long each takes in the middle, and the ratio of the two.
func BenchmarkForgot(b *testing.B) {
	s := start(b, nil)
	var known, unknown []time.Duration
	for i := 0; b.Loop(); i++ {
		user, stranger := signedUp(s), newClient(s)
		turns := []*client{user, stranger, stranger, user}
		for _, c := range turns[2*(i%2):][:2] { // neither is always the first
			r := c.do("POST", "/auth/password/forgot", object{"email": c.email})
			want(b, r, 202, "")
			if c == user {
				known = append(known, r.took)
			} else {
				unknown = append(unknown, r.took)
			}
		}
	}
	b.ReportMetric(median(known), "known-ms")
	b.ReportMetric(median(unknown), "unknown-ms")
	b.ReportMetric(median(known)/median(unknown), "known/unknown")
}

// median returns the median in milliseconds. It sorts the times.
func median(took []time.Duration) float64 {
	slices.Sort(took)
	return took[len(took)/2].Seconds() * 1000
}
