package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

// Bodies

func TestParseObject(t *testing.T) {
	for _, test := range []struct {
		data string
		want credentials
		ok   bool
	}{
		{`{}`, credentials{}, true},
		{" \t\r\n{ } \t\r\n", credentials{}, true},
		{`{"email":"a","password":"b"}`, credentials{"a", "b"}, true},
		{`{"\u0065mail":"\ud83d\ude00"}`, credentials{"😀", ""}, true},
		{`{"Email":"a","PASSWORD":"b"}`, credentials{}, true}, // other names, and unknown
		{`{"Email":1,"email":"a"}`, credentials{"a", ""}, true},
		{`{"x":{"y":[1,2.5e3,null,true,"s"]},"email":"a"}`, credentials{"a", ""}, true},
		{`{"x":[{"a":1,"a":2}],"email":"a"}`, credentials{"a", ""}, true}, // nobody asked for x
		{`{"email":"a","email":"a"}`, credentials{}, false},
		{`{"email":"a","\u0065mail":"b"}`, credentials{}, false},
		{`{"x":1,"x":2}`, credentials{}, false},
		{`{"email":1}`, credentials{}, false},
		{`{"email":null}`, credentials{}, false},
		{`{"email":["a"]}`, credentials{}, false},
		{`{"email":{}}`, credentials{}, false},
		{`{"email":true}`, credentials{}, false},
		{``, credentials{}, false},
		{` `, credentials{}, false},
		{`null`, credentials{}, false},
		{`"email"`, credentials{}, false},
		{`[{"email":"a"}]`, credentials{}, false},
		{`{"email":"a"`, credentials{}, false},
		{`{"email":"a",}`, credentials{}, false},
		{`{"email":"a"}}`, credentials{}, false},
		{`{"email":"a"}{}`, credentials{}, false},
		{`/**/{"email":"a"}`, credentials{}, false},
		{`{'email':'a'}`, credentials{}, false},
		{`{"x":01}`, credentials{}, false},
		{"\ufeff{}", credentials{}, false},
		{"{\"email\":\"a\nb\"}", credentials{}, false},
		{"{\"email\":\"\xff\"}", credentials{}, false},
		{"{\"x\":\"\xc3\"}", credentials{}, false},
		{"{\"x\":\"\xed\xa0\x80\"}", credentials{}, false}, // half a surrogate pair in UTF-8
	} {
		var got credentials
		err := parseObject([]byte(test.data), &got)
		if (err == nil) != test.ok || err != nil && !errors.Is(err, errInvalidJSON) {
			t.Errorf("parseObject(%q) = %v", test.data, err)
		}
		if err == nil && got != test.want {
			t.Errorf("parseObject(%q) gives %q, want %q", test.data, got, test.want)
		}
	}
}

// FuzzParseObject compares parseObject with what encoding/json makes of the same text, plus the
// rules that encoding/json does not have.
func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{
		`{"email":"a","password":"b"}`,
		` {"a" : [1,{"b":"A😀"}], "email":"x@y", "\u0065mail":null}`,
		`{"a":{"b":1,"b":2},"email":"\ud800"}`,
		`{"\ud800":1,"\ud801":2}`,
		"{\"a\":\"\xff\"}",
		`{"\\":"\"\\"}`,
		"\ufeff{}",
		`{"a":1}x`,
		`[]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var got credentials
		err := parseObject(data, &got)
		want, ok := readCredentials(data)
		if (err == nil) != ok || ok && got != want {
			t.Fatalf("parseObject(%q) = %q, %v, want %q, %v", data, got, err, want, ok)
		}
	})
}

// readCredentials is another way to read what parseObject reads.
func readCredentials(data []byte) (credentials, bool) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil || members == nil || !utf8.Valid(data) {
		return credentials{}, false
	}
	if countNames(data) != len(members) {
		return credentials{}, false
	}
	var c credentials
	for name, field := range map[string]*string{"email": &c.Email, "password": &c.Password} {
		value, present := members[name]
		if !present {
			continue
		}
		if string(value) == "null" || json.Unmarshal(value, field) != nil {
			return credentials{}, false
		}
	}
	return c, true
}

// countNames returns how many members an object has, those of the same name included.
func countNames(data []byte) int {
	decoder := json.NewDecoder(bytes.NewReader(data))
	tokens, depth := 0, 0
	for {
		token, err := decoder.Token()
		if err == io.EOF {
			return tokens / 2 // each member has a name, and a value that begins with one token
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			depth--
			continue
		}
		if depth == 1 {
			tokens++
		}
		if token == json.Delim('{') || token == json.Delim('[') {
			depth++
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

// costlyHash would take days to compute.
const costlyHash = "$2b$31$MeMND/z2k0ryfi5Wj2dMquCHgKc3.odEL4BfBAEltIRyxhHzG/LZ."

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
		{costlyHash, "some password"},
	} {
		if ok, err := h.matches(ctx, shown.hash, shown.password); ok || err != errOverloaded {
			t.Errorf("matches(%q, %q) = %v, %v", shown.hash, shown.password, ok, err)
		}
	}
}

// TestPasswordsThatCannotBeRight holds that bcrypt is not asked about passwords that it would cut,
// and not about hashes that would take it too long.
func TestPasswordsThatCannotBeRight(t *testing.T) {
	h := newTestHasher(t)
	long := strings.Repeat("a", 72)
	hash, err := h.hash(t.Context(), long)
	if err != nil {
		t.Fatal(err)
	}
	nul, err := bcrypt.GenerateFromPassword([]byte("P\x00P"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []struct {
		hash     string
		password string
		want     bool
	}{
		{hash, long, true},
		{hash, long + "a", false},
		{string(nul), "P\x00P", false},
		{costlyHash, "correct horse battery staple", false},
	} {
		ok, err := h.matches(t.Context(), shown.hash, shown.password)
		if ok != shown.want || err != nil {
			t.Errorf("matches(%q, %q) = %v, %v", shown.hash, shown.password, ok, err)
		}
	}
}

// TestRefusalsTakeTheSameTime compares how long a login takes that is refused. Without a hash it
// would take a twentieth, so noise cannot hide that.
func TestRefusalsTakeTheSameTime(t *testing.T) {
	s := start(t, map[string]string{"BCRYPT_COST": "9"})
	cheap := start(t, nil)
	known := signedUp(s)
	unknown := newClient(s)
	tooLong := known.tab()
	tooLong.password = strings.Repeat("a", 73)
	lowerCost := signedUp(cheap).at(s)
	for _, c := range []*client{known, lowerCost} {
		c.password = "wrong password"
	}
	refused := []*client{known, unknown, tooLong, lowerCost}
	fastest := slices.Repeat([]time.Duration{time.Hour}, len(refused))
	for range 5 {
		for i, c := range refused {
			r := c.device().login()
			want(t, r, 401, "invalid_credentials")
			fastest[i] = min(fastest[i], r.took)
		}
	}
	if slices.Min(fastest) < fastest[0]/3 {
		t.Errorf("wrong password, unknown email, long password, cheap hash took %v", fastest)
	}
}

func TestHashingSlots(t *testing.T) {
	h := newTestHasher(t)
	t.Run("a full queue refuses at once", func(t *testing.T) {
		h.waiting.Store(hashQueue)
		defer h.waiting.Store(0)
		if err := h.acquire(t.Context()); err != errOverloaded { // although a slot is free
			t.Errorf("acquire = %v", err)
		}
	})
	t.Run("a slot is waited for, but not for ever", func(t *testing.T) {
		h.slots <- struct{}{}
		if err := h.acquire(t.Context()); err != errOverloaded {
			t.Errorf("acquire = %v", err)
		}
		if got := h.refused.Load(); got != 2 {
			t.Errorf("%d refusals are counted, want 2", got)
		}
	})
	t.Run("whoever waits gets the slot", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		acquired := make(chan error)
		go func() { acquired <- h.acquire(ctx) }()
		eventually(t, "it waits", func() bool { return h.waiting.Load() == 1 })
		h.release()
		if err := <-acquired; err != nil {
			t.Errorf("acquire = %v", err)
		}
	})
}

// Requests

// TestRequestOutlivesItsClient holds that what a request has begun is carried to its end although
// the client has hung up.
func TestRequestOutlivesItsClient(t *testing.T) {
	s := startApp(t, nil, nil, nil)
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
	const logins, clients, maxHeap = 600, 100, 64 << 20
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s := startApp(t, nil, smallBuffers{listener}, nil)
	c := signedUp(s)
	agent := strings.Repeat("<", 1000) // which takes six bytes each in JSON
	body := object{"email": c.email, "password": c.password}
	together(8, func(int) any {
		for range logins / 8 {
			c.device().do("POST", "/auth/login", body, "User-Agent", agent)
		}
		return nil
	})
	c = c.loggedIn()
	if r := c.sessions(); len(r.body["sessions"].([]any)) != 100 {
		t.Errorf("%d sessions, want 100", len(r.body["sessions"].([]any)))
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
		t.Errorf("%d clients that do not read take %d MB", clients, used>>20)
	}
	lists := 0
	for _, line := range s.log.all() {
		if line["route"] == "GET /auth/sessions" {
			lists++
		}
	}
	if lists > 1 {
		t.Errorf("%d answers were sent, so the clients did not hold the server up", lists-1)
	}
}

// heap returns the bytes of the heap that are in use.
func heap() int64 {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}
