package chaos

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// shared is a folder for what all tests of a run share. PostgreSQL's user may pass through it.
var shared string

func TestMain(m *testing.M) {
	var err error
	shared, err = os.MkdirTemp("/tmp", "latchkey-chaos-") // TMPDIR may be closed to others
	if err == nil {
		err = os.Chmod(shared, 0o711)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(shared)
	os.Exit(status)
}

// startLimit bounds how long a process may take until it is ready. They take less than a second
// each on an idle machine.
const startLimit = 60 * time.Second

// A process is one child process, with the processes that it has started itself.
type process struct {
	t       *testing.T
	name    string
	cmd     *exec.Cmd
	log     string        // the file with its output
	ended   chan struct{} // closed when the process has ended
	result  error         // how it ended; set before ended is closed
	isReady func() bool   // nil if nobody has to wait for it
}

// startProcess starts cmd and kills it when the test ends. If the test has failed, it logs the end
// of the output of the process. The process has a process group of its own. If the tests themselves
// die, the kernel kills the process, but not its children: those that are frozen then stay.
func startProcess(t *testing.T, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{
		t:    t,
		name: name,
		cmd:  cmd,
		log:  filepath.Join(t.TempDir(), name+".log"),
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p.start()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the end of the output of %s:\n%s", name, lastLines(p.output(), 30))
		}
	})
	return p
}

func (p *process) start() {
	p.t.Helper()
	output, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer output.Close()
	p.cmd.Stdout = output
	p.cmd.Stderr = output
	if err := p.cmd.Start(); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	ended := make(chan struct{})
	p.ended = ended
	cmd := p.cmd
	go func() {
		p.result = cmd.Wait()
		close(ended)
	}()
}

// restart kills the process if it still runs, and starts the same command once more. It returns
// when the process is ready.
func (p *process) restart() {
	p.t.Helper()
	p.kill()
	p.cmd = &exec.Cmd{
		Path:        p.cmd.Path,
		Args:        p.cmd.Args,
		Env:         p.cmd.Env,
		Dir:         p.cmd.Dir,
		SysProcAttr: p.cmd.SysProcAttr,
	}
	p.start()
	p.awaitReady()
}

// awaitReady waits until the process is ready. The test fails if it ends before.
func (p *process) awaitReady() {
	p.t.Helper()
	deadline := time.Now().Add(startLimit)
	for p.isReady != nil && !p.isReady() {
		select {
		case <-p.ended:
			p.t.Fatalf("%s has ended: %v\n%s", p.name, p.result, lastLines(p.output(), 30))
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s is not ready after %v", p.name, startLimit)
		}
	}
}

// kill sends SIGKILL to the process and to all that it has started, and waits until they are gone.
func (p *process) kill() {
	if p.hasEnded() {
		return
	}
	pids := p.freeze()
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-p.ended
	for slices.ContainsFunc(pids, isAlive) {
		time.Sleep(time.Millisecond)
	}
}

// freeze sends SIGSTOP to the process and to all that it has started, and returns their ids. A
// frozen process keeps its connections, and the kernel still accepts new ones for it.
func (p *process) freeze() []int {
	pids := []int{p.pid()}
	for i := 0; i < len(pids); i++ { // pids grows: a process that is stopped starts no more
		syscall.Kill(pids[i], syscall.SIGSTOP)
		pids = append(pids, children(pids[i])...)
	}
	return pids
}

// thaw sends SIGCONT to all that freeze has stopped.
func (p *process) thaw() {
	pids := []int{p.pid()}
	for i := 0; i < len(pids); i++ {
		pids = append(pids, children(pids[i])...)
	}
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGCONT)
	}
}

// signal sends a signal to the process alone.
func (p *process) signal(sig os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Errorf("%s to %s: %v", sig, p.name, err)
	}
}

// terminate sends SIGTERM, waits until the process has ended, and returns how it did.
func (p *process) terminate() error {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return p.result
	case <-time.After(startLimit):
		return fmt.Errorf("%s has not ended %v after SIGTERM", p.name, startLimit)
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// output is all that the process has written so far.
func (p *process) output() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// children are the ids of the processes that a process has started. A group signal would not do:
// each process of PostgreSQL has a session of its own.
func children(pid int) (pids []int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range files {
		text, _ := os.ReadFile(file) // it is empty if the process is gone
		for _, field := range strings.Fields(string(text)) {
			child, _ := strconv.Atoi(field)
			pids = append(pids, child)
		}
	}
	return pids
}

// isAlive tells whether a process exists and is no zombie.
func isAlive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // the name of the program is in parentheses
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// portsTaken are the ports that freePort has given out. A process takes a while until it listens.
var portsTaken sync.Map

// freePort finds a port that nobody listens on. It is below those that systems give to outgoing
// connections, and no port is given out twice.
func freePort(t *testing.T) string {
	t.Helper()
	for range 1000 {
		port := strconv.Itoa(10_000 + rand.IntN(20_000))
		if _, taken := portsTaken.LoadOrStore(port, true); taken {
			continue
		}
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err == nil {
			listener.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return ""
}

// eventually polls until ok holds. The test fails if that takes longer than within.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not so within %v", what, within)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func skipIfShort(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes too long for short mode")
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
