// Package clients uses Latchkey as the frontends of other people do: by what tools generate from
// openapi.yaml, and by the JavaScript module of the examples. It needs PostgreSQL, Redis and npm:
//
//	scripts/with-services go test -C clients -count=1 ./...
package clients

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

var (
	binary string // the server
	noNPM  string // why the programs of package.json cannot run here
)

func TestMain(m *testing.M) {
	os.Exit(prepareAndRun(m))
}

func prepareAndRun(m *testing.M) int {
	if os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == "" {
		fmt.Fprintln(os.Stderr, "DATABASE_URL or REDIS_URL is missing: run `make clients`")
		return 1
	}
	dir, err := os.MkdirTemp("", "latchkey-clients-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "latchkey")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	install := exec.Command("./install")
	out, err := install.CombinedOutput()
	if install.ProcessState != nil && install.ProcessState.ExitCode() == 77 {
		noNPM = strings.TrimSpace(string(out))
		return m.Run()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "clients/install: %v\n%s", err, out)
		return 1
	}
	generate := exec.Command("node_modules/.bin/openapi-typescript",
		"../openapi.yaml", "--output", "typescript/latchkey.ts")
	if out, err := generate.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "openapi-typescript: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// needNPM skips a test where npm cannot be used.
func needNPM(t *testing.T) {
	t.Helper()
	if noNPM != "" {
		t.Skip(noNPM)
	}
}

// run runs a program in a folder below clients/, with more variables, and returns its output.
func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

var listening = regexp.MustCompile(`msg=listening addr=\S*:(\d+) for=PORT`)

// serve runs a server, as in development, until the test ends, and returns its URL.
func serve(t *testing.T, env ...string) string {
	t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append([]string{
		"NODE_ENV=development",
		"PORT=0",
		"BCRYPT_COST=4",
		"DATABASE_URL=" + os.Getenv("DATABASE_URL"),
		"REDIS_URL=" + os.Getenv("REDIS_URL"),
	}, env...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	port, ended := make(chan string, 1), make(chan string)
	go func() {
		var log strings.Builder
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			fmt.Fprintln(&log, lines.Text())
			if found := listening.FindStringSubmatch(lines.Text()); found != nil {
				port <- found[1]
			}
		}
		close(port)
		ended <- log.String()
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		log := <-ended
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the server ended with %v\n%s%s", err, log, &stderr)
		}
	})
	found, ok := <-port
	if !ok {
		t.Fatal("the server has not started")
	}
	return "http://127.0.0.1:" + found
}
