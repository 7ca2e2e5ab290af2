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

// serverThreads is the GOMAXPROCS that the server gives itself. It does so once in a process, and
// the package testing undoes it before every -count.
var serverThreads = sync.OnceValue(func() int { return runtime.GOMAXPROCS(0) })

// BenchmarkRefreshWhileHashing measures what logins that keep every hashing slot busy, with as many
// more waiting, do to refreshes: with the threads that the server gives itself, and with half of
// them, as Go would. Client and server share the process. A good p99 takes some hundred requests:
// -benchtime 500x.
func BenchmarkRefreshWhileHashing(b *testing.B) {
	s := start(b, map[string]string{"BCRYPT_COST": "12"})
	threads := serverThreads()
	c := signedUp(s)
	for _, load := range []struct {
		name    string
		threads int
		logins  int
	}{
		{"idle", threads, 0},
		{"flooded", threads, threads}, // there are half as many slots as threads
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

// flood lets so many clients log in again and again. It returns when each has done so once, so from
// then on no slot is free. stop waits for the logins that are under way.
func flood(b *testing.B, s *server, clients int) (stop func()) {
	ctx, cancel := context.WithCancel(b.Context())
	var begun, done sync.WaitGroup
	begun.Add(clients)
	for range clients {
		done.Go(func() {
			first := sync.OnceFunc(begun.Done)
			defer first()
			for ctx.Err() == nil && !b.Failed() {
				body := `{"email":"nobody@example.test","password":"wrong password"}`
				resp := post(b, s, "/auth/login", body, "")
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

// post sends a request without the checks of client.do, which would be measured too.
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

// BenchmarkRefusal measures how long a login takes to be refused, by what the account is. All must
// take the same time, or it would tell which emails have an account. The figures of one run
// compare; a cost of 10 keeps it short.
func BenchmarkRefusal(b *testing.B) {
	h, err := newHasher(1, 10)
	if err != nil {
		b.Fatal(err)
	}
	for _, account := range []struct {
		name string
		cost int
	}{
		{"the configured cost", 10},
		{"a lower cost", 6},
		{"no account", 0},
	} {
		b.Run(account.name, func(b *testing.B) {
			var hash []byte
			if account.cost > 0 {
				hash, err = bcrypt.GenerateFromPassword([]byte("some password"), account.cost)
				if err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				ok, err := h.matches(b.Context(), string(hash), "another one")
				if ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
	}
}
