package chaos

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// slowSenderLimit is the time in which the headers and the body of a request must arrive.
	slowSenderLimit = 4 * time.Second

	// slowReaderLimit is how long the server waits for a client that reads nothing.
	slowReaderLimit = 20 * time.Second

	// slowMargin is added to both for a busy machine. A client that never reads is also answered
	// until its buffers are full, which takes a second or two.
	slowMargin = 5 * time.Second

	// slowEarly is how much sooner than after these times a client may be cut off.
	slowEarly = 500 * time.Millisecond
)

// TestSlowClients lets clients be slow in each way that could hold a connection for long. The
// server cuts them off in time, serves others meanwhile, and has nothing left of them in the end.
func TestSlowClients(t *testing.T) {
	s := startServer(t, vars{
		"DATABASE_URL": startPostgres(t).url,
		"REDIS_URL":    startRedis(t).url,
	})
	u := signedUp(t, s)
	before := s.quietMetrics()
	var slow sync.WaitGroup
	for range 10 {
		slow.Go(func() { onConnection(t, s, sendSlowHeaders) })
		slow.Go(func() { onConnection(t, s, sendNoBody) })
		slow.Go(func() { onConnection(t, s, sendSlowBody) })
	}
	for range 50 {
		slow.Go(func() { onConnection(t, s, neverRead) })
	}
	useMeanwhile(t, u, &slow)
	s.awaitQuiet(before)
}

// onConnection calls a client with a connection of its own.
func onConnection(t *testing.T, s *server, client func(*testing.T, net.Conn)) {
	conn, err := dial(s)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	client(t, conn)
}

// useMeanwhile makes requests until others are done. Each must succeed.
func useMeanwhile(t *testing.T, u *user, others *sync.WaitGroup) {
	done := make(chan struct{})
	go func() {
		others.Wait()
		close(done)
	}()
	requests := 0
	slowest := time.Duration(0)
	for {
		select {
		case <-done:
			t.Logf("%d requests meanwhile, the slowest took %v", requests, slowest)
			return
		case <-time.After(50 * time.Millisecond):
		}
		for _, a := range []answer{u.refresh(), u.me()} {
			requests++
			slowest = max(slowest, a.took)
			if !a.ok() {
				t.Errorf("meanwhile: %v", a)
			}
		}
	}
}

// sendSlowHeaders sends headers at one byte a second. The connection is cut.
func sendSlowHeaders(t *testing.T, conn net.Conn) {
	began := time.Now()
	go dribble(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
	conn.SetReadDeadline(began.Add(slowSenderLimit + slowMargin))
	if _, err := io.ReadAll(conn); isTimeout(err) {
		t.Errorf("slow headers: the connection is still open after %v", time.Since(began))
	}
	if took := time.Since(began); took < slowSenderLimit-slowEarly {
		t.Errorf("slow headers: the connection is closed after %v", took)
	}
}

// sendNoBody sends headers, and nothing of the body that they announce.
func sendNoBody(t *testing.T, conn net.Conn) { sendBody(t, conn, "") }

// sendSlowBody sends headers, and one byte of the body a second.
func sendSlowBody(t *testing.T, conn net.Conn) {
	sendBody(t, conn, `{"email": "somebody@example.com"`)
}

// sendBody sends headers, and the beginning of the body they announce at one byte a second. The
// answer is 408, and the connection is closed.
func sendBody(t *testing.T, conn net.Conn, body string) {
	began := time.Now()
	io.WriteString(conn, "POST /auth/login HTTP/1.1\r\n"+
		"Host: localhost\r\n"+
		"Content-Type: application/json\r\n"+
		"Content-Length: 100\r\n"+
		"\r\n")
	go dribble(conn, body)
	conn.SetReadDeadline(began.Add(slowSenderLimit + slowMargin))
	buffered := bufio.NewReader(conn)
	resp, err := http.ReadResponse(buffered, nil)
	if err != nil {
		t.Errorf("slow body %q: %v after %v", body, err, time.Since(began))
		return
	}
	defer resp.Body.Close()
	var problem struct {
		StatusCode int
		Code       string
		RequestID  string
	}
	if err := json.NewDecoder(resp.Body).Decode(&problem); err != nil ||
		resp.StatusCode != http.StatusRequestTimeout ||
		problem.StatusCode != http.StatusRequestTimeout ||
		problem.Code != "request_timeout" ||
		problem.RequestID != resp.Header.Get("X-Request-Id") {
		t.Errorf("slow body %q: %s %+v %v", body, resp.Status, problem, err)
	}
	if took := time.Since(began); took < slowSenderLimit-slowEarly {
		t.Errorf("slow body %q: the answer came after %v", body, took)
	}
	if _, err := io.Copy(io.Discard, buffered); isTimeout(err) {
		t.Errorf("slow body %q: the connection is still open", body)
	}
}

// neverRead sends requests without a pause and never reads an answer. The connection is cut, so
// that a write fails.
func neverRead(t *testing.T, conn net.Conn) {
	began := time.Now()
	requests := strings.Repeat("GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 100)
	conn.SetWriteDeadline(began.Add(slowReaderLimit + slowMargin))
	for {
		_, err := io.WriteString(conn, requests)
		took := time.Since(began)
		switch {
		case isTimeout(err):
			t.Errorf("a client that never reads is still there after %v", took)
		case err != nil && took < slowReaderLimit-slowEarly:
			t.Errorf("a client that never reads: %v after %v", err, took)
		}
		if err != nil {
			return
		}
	}
}

// dribble sends one byte of a text a second, for as long as the connection is open.
func dribble(conn net.Conn, text string) {
	for i := range len(text) {
		if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
			return
		}
		time.Sleep(time.Second)
	}
}

// dial opens a connection to a server.
func dial(s *server) (net.Conn, error) {
	return net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
}

func isTimeout(err error) bool {
	netErr, ok := err.(net.Error)
	return ok && netErr.Timeout()
}
