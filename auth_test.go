package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

// Bodies

// FuzzParseObject compares parseObject with what encoding/json makes of the same text, plus the
// rules that encoding/json does not have.
func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{
		`{}`, " \t\r\n{ } \t\r\n", ``, ` `, `null`, `"email"`, `[{"email":"a"}]`,
		`{"email":"a","password":"b"}`, `{"Email":"a","PASSWORD":"b"}`, `{"Email":1,"email":"a"}`,
		`{"\u0065mail":"\ud83d\ude00"}`, `{"email":"\ud800"}`, `{"\ud800":1,"\ud801":2}`,
		`{"email":"a","email":"a"}`, `{"email":"a","\u0065mail":"b"}`, `{"x":1,"x":2}`,
		`{"x":[{"a":1,"a":2}],"email":"a"}`, `{"x":{"y":[1,2.5e3,null,true,"s"]},"email":"a"}`,
		`{"email":1}`, `{"email":null}`, `{"email":["a"]}`, `{"email":{}}`, `{"email":true}`,
		`{"email":"a"`, `{"email":"a",}`, `{"email":"a"}}`, `{"email":"a"}{}`, `{"x":01}`,
		`/**/{"email":"a"}`, `{'email':'a'}`, "\ufeff{}", "{\"email\":\"a\nb\"}",
		"{\"email\":\"\xff\"}", "{\"x\":\"\xc3\"}", "{\"x\":\"\xed\xa0\x80\"}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var got credentials
		err := parseObject(data, members{"email": &got.Email, "password": &got.Password})
		want, ok := readCredentials(data)
		if (err == nil) != ok || ok && got != want {
			t.Fatalf("parseObject(%q) = %q, %v, want %q, %v", data, got, err, want, ok)
		}
	})
}

// readCredentials is another way to read what parseObject reads.
func readCredentials(data []byte) (credentials, bool) {
	var members map[string]json.RawMessage
	err := json.Unmarshal(data, &members)
	if err != nil || members == nil || !utf8.Valid(data) || countNames(data) != len(members) {
		return credentials{}, false
	}
	var c credentials
	for name, field := range map[string]*string{"email": &c.Email, "password": &c.Password} {
		value, present := members[name]
		if present && (string(value) == "null" || json.Unmarshal(value, field) != nil) {
			return credentials{}, false
		}
	}
	return c, true
}

// countNames returns how many members an object has, those of the same name included.
func countNames(object []byte) int {
	decoder := json.NewDecoder(bytes.NewReader(object))
	_, _ = decoder.Token() // the brace
	n := 0
	for ; decoder.More(); n++ {
		var value json.RawMessage
		_, _ = decoder.Token() // the name
		_ = decoder.Decode(&value)
	}
	return n
}

// Hashing

// testHashLimits are those of the server, but for hashes that are cheap.
var testHashLimits = hashLimits{
	queue: hashQueue,
	wait:  hashWait,
	takes: 10 * time.Millisecond,
}

func newTestHasher(t *testing.T) *hasher {
	t.Helper()
	h, err := newHasher(1, bcrypt.MinCost, testHashLimits)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// costlyHash is a hash of "correct horse battery staple" whose cost is above maxBcryptCost.
const costlyHash = "$2b$17$iCdUyNFO/3JQZuZffSZoU.RAOHqzVRG9Dv.boYrcz5eNeMHQtBtg2"

// TestEveryRefusalHashes checks that no password is refused without a hash: each needs a slot.
func TestEveryRefusalHashes(t *testing.T) {
	h := newTestHasher(t)
	h.waiting.Store(hashQueue) // so that nothing is hashed, and each is refused at once
	for _, shown := range []struct {
		hash     string
		password string
	}{
		{h.dummy, "wrong password"},
		{h.dummy, ""},
		{h.dummy, strings.Repeat("a", 73)},
		{h.dummy, "some\x00password"},
		{"", "some password"},
		{"no bcrypt hash", "some password"},
		{costlyHash, "correct horse battery staple"},
	} {
		if ok, err := h.matches(t.Context(), shown.hash, shown.password); ok || err != errOverloaded {
			t.Errorf("matches(%q, %q) = %v, %v", shown.hash, shown.password, ok, err)
		}
	}
}

// TestCostlyHash checks that a stored hash whose cost is too high counts as none. It may take days.
func TestCostlyHash(t *testing.T) {
	ok, err := newTestHasher(t).matches(t.Context(), costlyHash, "correct horse battery staple")
	if ok || err != nil {
		t.Errorf("matches = %v, %v", ok, err)
	}
}

// TestCheapHashIsNoFaster checks that a refusal takes no less time if the stored hash has a lower
// cost than configured. Otherwise it would take an eighth, which noise cannot hide.
func TestCheapHashIsNoFaster(t *testing.T) {
	h, err := newHasher(1, bcrypt.MinCost+3, testHashLimits)
	if err != nil {
		t.Fatal(err)
	}
	cheap, err := bcrypt.GenerateFromPassword([]byte("some password"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	hashes := [...]string{h.dummy, string(cheap)}
	fastest := [...]time.Duration{time.Hour, time.Hour}
	for range 3 {
		for i, hash := range hashes {
			began := time.Now()
			if ok, err := h.matches(t.Context(), hash, "wrong password"); ok || err != nil {
				t.Fatal(ok, err)
			}
			fastest[i] = min(fastest[i], time.Since(began))
		}
	}
	if fastest[1] < fastest[0]/3 {
		t.Errorf("a cheap hash takes %v, another one %v", fastest[1], fastest[0])
	}
}

func TestHashingSlots(t *testing.T) {
	h := newTestHasher(t)
	acquire := func(want error) {
		t.Helper()
		if err := h.acquire(t.Context()); err != want {
			t.Errorf("acquire = %v, want %v", err, want)
		}
	}
	h.waiting.Store(hashQueue) // the queue is full: refused at once, although a slot is free
	acquire(errOverloaded)
	h.waiting.Store(0)
	acquire(nil)
	acquire(errOverloaded) // the slot is waited for, but not for ever
	if refused, waiting := h.refused.Load(), h.waiting.Load(); refused != 2 || waiting != 0 {
		t.Errorf("%d were refused and %d wait, want 2 and 0", refused, waiting)
	}
	go func() {
		for h.waiting.Load() == 0 {
			runtime.Gosched()
		}
		h.release()
	}()
	acquire(nil) // whoever waits gets it
}

// Requests

// TestRequestOutlivesItsClient checks that what a request has begun is carried to its end although
// the client has hung up.
func TestRequestOutlivesItsClient(t *testing.T) {
	c := signedUp(start(t, nil))
	hungUp, cancel := context.WithCancel(t.Context())
	cancel()
	body := fmt.Sprintf(`{"currentPassword":%q,"newPassword":"another password"}`, c.password)
	r := httptest.NewRequestWithContext(hungUp, "PUT", "/auth/password", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+c.access)
	w := httptest.NewRecorder()
	newHandler(t).ServeHTTP(w, r)
	if w.Code != 200 {
		t.Errorf("the request was given up: %d %s", w.Code, w.Body)
	}
	c.password = "another password"
	want(t, c.refresh(), 200, "")
	want(t, c.login(), 200, "")
}

// stuckWriter answers a client that does not read: nothing can be written before release is closed.
type stuckWriter struct {
	*httptest.ResponseRecorder
	stuck   func()
	release chan struct{}
}

func (w stuckWriter) Write(p []byte) (int, error) {
	w.stuck()
	<-w.release
	return len(p), nil
}

// TestMemoryOfClientsThatDoNotRead opens as many sessions as it can, and lets 100 clients ask for
// the list that read nothing of the answer.
func TestMemoryOfClientsThatDoNotRead(t *testing.T) {
	const logins, clients, maxHeap = 200, 100, 28 << 20
	c := signedUp(start(t, nil))
	agent := strings.Repeat("<", 1000) // which takes six bytes each in JSON
	for range logins {
		r := c.device().do("POST", "/auth/login", c.credentials(), "User-Agent", agent)
		want(t, r, 200, "")
	}
	c = c.loggedIn()
	if sessions := c.sessions().body["sessions"].([]any); len(sessions) != 100 {
		t.Errorf("%d sessions, want 100", len(sessions))
	}

	handler := newHandler(t)
	release := make(chan struct{})
	var answered sync.WaitGroup
	before := heap()
	for range clients {
		stuck := make(chan struct{})
		w := stuckWriter{
			httptest.NewRecorder(),
			sync.OnceFunc(func() { close(stuck) }),
			release,
		}
		r := httptest.NewRequest("GET", "/auth/sessions", nil)
		r.Header.Set("Authorization", "Bearer "+c.access)
		answered.Go(func() { handler.ServeHTTP(w, r) })
		<-stuck
	}
	used := heap() - before
	close(release)
	answered.Wait()
	t.Logf("%d clients that do not read take %d KB", clients, used>>10)
	if used > maxHeap {
		t.Errorf("that is more than %d KB", maxHeap>>10)
	}
}

// heap returns the bytes of the heap that are in use.
func heap() int64 {
	runtime.GC()
	runtime.GC() // empties the pools, too
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}
