package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http/httptest"
	"runtime"
	"strings"
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

// countNames returns how many members an object has, those of the same name included. Each has a
// name, and a value that begins with one token.
func countNames(object []byte) int {
	decoder := json.NewDecoder(bytes.NewReader(object))
	tokens, depth := 0, 0
	for {
		switch token, err := decoder.Token(); {
		case err != nil:
			return tokens / 2
		case token == json.Delim('}') || token == json.Delim(']'):
			depth--
		default:
			if depth == 1 {
				tokens++
			}
			if _, opens := token.(json.Delim); opens {
				depth++
			}
		}
	}
}

// Hashing

func newTestHasher(t *testing.T) *hasher {
	t.Helper()
	h, err := newHasher(1, bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// costlyHash is a hash of "correct horse battery staple" whose cost is above maxBcryptCost.
const costlyHash = "$2b$17$iCdUyNFO/3JQZuZffSZoU.RAOHqzVRG9Dv.boYrcz5eNeMHQtBtg2"

// TestEveryRefusalHashes holds that there is no refusal without a hash: each waits for a slot.
func TestEveryRefusalHashes(t *testing.T) {
	h := newTestHasher(t)
	h.slots <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // it need not wait in vain
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
		if ok, err := h.matches(ctx, shown.hash, shown.password); ok || err != errOverloaded {
			t.Errorf("matches(%q, %q) = %v, %v", shown.hash, shown.password, ok, err)
		}
	}
}

// TestCostlyHash holds that a stored hash whose cost is too high counts as none. It may take days.
func TestCostlyHash(t *testing.T) {
	ok, err := newTestHasher(t).matches(t.Context(), costlyHash, "correct horse battery staple")
	if ok || err != nil {
		t.Errorf("matches = %v, %v", ok, err)
	}
}

// TestCheapHashIsNoFaster holds that a refusal takes no less time if the stored hash has a lower
// cost than configured. Otherwise it would take an eighth, which noise cannot hide.
func TestCheapHashIsNoFaster(t *testing.T) {
	h, err := newHasher(1, bcrypt.MinCost+3)
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

// TestRequestOutlivesItsClient holds that what a request has begun is carried to its end although
// the client has hung up.
func TestRequestOutlivesItsClient(t *testing.T) {
	s := startApp(t, listenLocally(t))
	c := signedUp(s)
	hungUp, cancel := context.WithCancel(t.Context())
	cancel()
	body := fmt.Sprintf(`{"currentPassword":%q,"newPassword":"another password"}`, c.password)
	r := httptest.NewRequestWithContext(hungUp, "PUT", "/auth/password", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+c.access)
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	if w.Code != 200 {
		t.Errorf("the request was given up: %d %s", w.Code, w.Body)
	}
	c.password = "another password"
	want(t, c.refresh(), 200, "")
	want(t, c.login(), 200, "")
}

// smallBuffers is a listener whose connections buffer next to nothing, so that a client that does
// not read keeps the server from writing.
type smallBuffers struct {
	*net.TCPListener
}

func (l smallBuffers) Accept() (net.Conn, error) {
	conn, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return conn, conn.SetWriteBuffer(4 << 10)
}

// TestMemoryOfClientsThatDoNotRead opens as many sessions as it can, lets 100 clients ask for the
// list, and reads only the first byte of each answer.
func TestMemoryOfClientsThatDoNotRead(t *testing.T) {
	const logins, clients, maxHeap = 200, 100, 28 << 20
	listener := listenLocally(t)
	s := startApp(t, smallBuffers{listener})
	c := signedUp(s)
	agent := strings.Repeat("<", 1000) // which takes six bytes each in JSON
	body := object{"email": c.email, "password": c.password}
	for range logins {
		want(t, c.device().do("POST", "/auth/login", body, "User-Agent", agent), 200, "")
	}
	c = c.loggedIn()
	if sessions := c.sessions().body["sessions"].([]any); len(sessions) != 100 {
		t.Errorf("%d sessions, want 100", len(sessions))
	}

	before := heap()
	for range clients {
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.(*net.TCPConn).SetReadBuffer(4 << 10)
		fmt.Fprintf(conn, "GET /auth/sessions HTTP/1.1\r\nHost: x\r\n"+
			"User-Agent: slow\r\nAuthorization: Bearer %s\r\n\r\n", c.access)
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	used := heap() - before
	t.Logf("%d clients that do not read take %d KB", clients, used>>10)
	if used > maxHeap {
		t.Errorf("that is more than %d KB", maxHeap>>10)
	}
	if answered := strings.Count(s.logged(), "GET /auth/sessions"); answered > 1 {
		t.Errorf("%d clients did not hold the server up", answered-1)
	}
}

// heap returns the bytes of the heap that are in use.
func heap() int64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}
