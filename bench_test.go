package main

import (
	"context"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// serverThreads is the GOMAXPROCS that the server gave itself. It does so once in a process, and package testing undoes
// it before every -count.
var serverThreads = sync.OnceValue(func() int { return runtime.GOMAXPROCS(0) })

// BenchmarkRefreshWhileHashing measures what logins that keep every hashing slot busy, with as many more waiting, do to
// the rest: with the threads that the server gives itself, and with half of them, as Go would. Client and server share
// the process. A good p99 takes some hundred requests: -benchtime 500x.
func BenchmarkRefreshWhileHashing(b *testing.B) {
	s := start(b, map[string]string{"BCRYPT_COST": "12", "LOGIN_LIMIT_MAX": "0"})
	threads := serverThreads()
	c := signedUp(s)
	for _, load := range []struct {
		name            string
		threads, logins int
	}{
		{"idle", threads, 0},
		{"flooded", threads, threads}, // half of the threads is the slots
		{"flooded, half the threads", threads / 2, threads},
	} {
		b.Run(load.name, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(load.threads))
			defer flood(b, s, load.logins)()
			var took []time.Duration
			for b.Loop() {
				sent := time.Now()
				resp := post(b, s, "/auth/refresh", "", "refreshToken="+c.cookie)
				took = append(took, time.Since(sent))
				if resp.StatusCode != 200 {
					b.Fatalf("refresh: %s", resp.Status)
				}
				c.cookie = resp.Cookies()[0].Value
			}
			slices.Sort(took)
			b.ReportMetric(took[len(took)/2].Seconds()*1000, "p50-ms")
			b.ReportMetric(took[len(took)*99/100].Seconds()*1000, "p99-ms")
		})
	}
}

// flood lets that many clients log in, each at once again, and returns when all have done so once: from then on no slot
// is ever free. stop waits for those under way.
func flood(b *testing.B, s *server, clients int) (stop func()) {
	ctx, cancel := context.WithCancel(b.Context())
	var begun, done sync.WaitGroup
	begun.Add(clients)
	for range clients {
		done.Go(func() {
			first := sync.OnceFunc(begun.Done)
			defer first()
			for ctx.Err() == nil && !b.Failed() {
				resp := post(b, s, "/auth/login", `{"email":"nobody@example.test","password":"wrong password"}`, "")
				if resp.StatusCode != 401 {
					b.Errorf("login: %s", resp.Status)
				}
				first()
			}
		})
	}
	begun.Wait()
	return func() {
		cancel()
		done.Wait()
	}
}

// post is client.do without its checks, which would be measured too.
func post(b *testing.B, s *server, path, body, cookie string) *http.Response {
	req, err := http.NewRequest("POST", s.url+path, strings.NewReader(body))
	if err != nil {
		b.Error(err)
		return &http.Response{}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Cookie", cookie)
	resp, err := s.http.Do(req)
	if err != nil {
		b.Error(err)
		return &http.Response{}
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		b.Error(err)
	}
	return resp
}

// BenchmarkRefusal measures how long a login takes to be refused, by what the account is: all the same, or it would tell
// which addresses have one. The figures of one run compare; a cost of 10 keeps it short.
func BenchmarkRefusal(b *testing.B) {
	h, err := newHasher(1, 10)
	if err != nil {
		b.Fatal(err)
	}
	for name, cost := range map[string]int{"the configured cost": 10, "a lower cost": 6, "no account": 0} {
		hash, err := bcrypt.GenerateFromPassword([]byte("some password"), max(cost, bcrypt.MinCost))
		if err != nil {
			b.Fatal(err)
		}
		if cost == 0 {
			hash = nil
		}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if ok, err := h.matches(b.Context(), string(hash), "another one"); ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}
