package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A project is a docker compose project in a fresh clone.
type project struct {
	t    *testing.T
	dir  string
	name string
	env  []string
}

func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	cmd.Env = env
	cmd.Stdout = &stdout
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err,
			tail(stdout.String(), 40), tail(stderr.String(), 60))
	}
	return stdout.String()
}

func (p *project) compose(args ...string) string {
	p.t.Helper()
	args = append([]string{"compose", "--project-name", p.name}, args...)
	return run(p.t, p.dir, p.env, "docker", args...)
}

// TestCompose is "docker compose up on a fresh clone without .env gives a working server".
func TestCompose(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	p := &project{
		t:    t,
		dir:  filepath.Join(t.TempDir(), "latchkey"),
		name: "latchkey-integration-" + port,
	}
	// Nothing of the developer's own settings reaches the fresh clone.
	for _, line := range os.Environ() {
		switch name, _, _ := strings.Cut(line, "="); name {
		case "PATH", "HOME", "TMPDIR", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT",
			"DOCKER_BUILDKIT", "XDG_RUNTIME_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY":
			p.env = append(p.env, line)
		}
	}
	p.env = append(p.env, "PORT="+port)
	run(t, "", os.Environ(), "git", "clone", "--quiet", "--no-local", root, p.dir)
	t.Cleanup(func() {
		// The test's own context is over by now.
		cmd := exec.Command("docker", "compose", "--project-name", p.name,
			"down", "--volumes", "--rmi", "local", "--timeout", "5")
		cmd.Dir = p.dir
		cmd.Env = p.env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("docker compose down: %v\n%s", err, out)
		}
	})
	p.compose("up", "--build", "--wait")

	// The flow, through the published port. Every client here is the Docker host.
	u := newUser(t, "http://127.0.0.1:"+port)
	u.must("POST", "/auth/signup", u.credentials())
	other := u.login()
	u.lives()
	other.must("POST", "/auth/logout", nil)
	if r := other.send("GET", "/auth/me", nil); r.body.Code != "session_revoked" {
		t.Errorf("after the logout: %d %s", r.status, r.body.Code)
	}

	p.assertContainers(port)
	p.assertImage()

	p.compose("restart")
	p.compose("up", "--wait")
	// PostgreSQL kept the user, and Redis the session, whose tokens another start does not know.
	sessions := u.login().must("GET", "/auth/sessions", nil).body.Sessions
	if len(sessions) != 2 {
		t.Errorf("the sessions after a restart are %v, want that of before and a new one", sessions)
	}
	p.compose("down")
	p.compose("up", "--wait")
	u.login().lives()
}

// inspect is what the engine says of a service's container.
type inspect struct {
	Image  string
	Config struct {
		User string
	}
	HostConfig struct {
		ReadonlyRootfs bool
		CapDrop        []string
		CapAdd         []string
		Privileged     bool
		PortBindings   map[string][]struct{ HostIP, HostPort string }
	}
}

func (p *project) inspect(service string) inspect {
	p.t.Helper()
	id := strings.TrimSpace(p.compose("ps", "--quiet", service))
	var found []inspect
	out := run(p.t, p.dir, p.env, "docker", "container", "inspect", id)
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		p.t.Fatal(err)
	}
	return found[0]
}

// assertContainers is "only the server's port is published, on 127.0.0.1, and it is locked in".
func (p *project) assertContainers(port string) {
	p.t.Helper()
	for _, service := range strings.Fields(p.compose("config", "--services")) {
		published := fmt.Sprint(p.inspect(service).HostConfig.PortBindings)
		want := "map[]"
		if service == "server" {
			want = fmt.Sprintf("map[%s/tcp:[{127.0.0.1 %s}]]", port, port)
		}
		if published != want {
			p.t.Errorf("%s publishes %s, want %s", service, published, want)
		}
	}
	c := p.inspect("server")
	host := c.HostConfig
	if !host.ReadonlyRootfs || !slices.Equal(host.CapDrop, []string{"ALL"}) ||
		len(host.CapAdd) != 0 || host.Privileged {
		p.t.Errorf("the server's container is not locked in: %+v", host)
	}
	if user, _, _ := strings.Cut(c.Config.User, ":"); user == "" || user == "0" || user == "root" {
		p.t.Errorf("the server runs as %q", c.Config.User)
	}
}

// assertImage is "FROM scratch, non-root, under 15 MB".
func (p *project) assertImage() {
	p.t.Helper()
	id := p.inspect("server").Image
	var found []struct {
		Size   int64
		Config struct{ User string }
	}
	out := run(p.t, p.dir, p.env, "docker", "image", "inspect", id)
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		p.t.Fatal(err)
	}
	user := found[0].Config.User
	if found[0].Size >= 15_000_000 || user == "" || strings.HasPrefix(user, "0") {
		p.t.Errorf("the image has %d bytes and runs as %q", found[0].Size, user)
	}
	p.t.Logf("the image has %.1f MB", float64(found[0].Size)/1e6)
	for _, shell := range []string{"/bin/sh", "sh", "/bin/busybox", "/usr/bin/env"} {
		cmd := exec.Command("docker", "run", "--rm", "--entrypoint", shell, id)
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 127 {
			p.t.Errorf("docker run --entrypoint %s: %v, want exit status 127", shell, err)
		}
	}
	container := strings.TrimSpace(run(p.t, p.dir, p.env, "docker", "create", id))
	defer run(p.t, p.dir, p.env, "docker", "rm", "--volumes", container)
	files := []string{}
	exported := run(p.t, p.dir, p.env, "docker", "export", container)
	for archive := tar.NewReader(strings.NewReader(exported)); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			p.t.Fatal(err)
		}
		if header.Typeflag == tar.TypeReg && header.Size > 0 {
			files = append(files, header.Name)
		}
	}
	slices.Sort(files)
	want := []string{"etc/ssl/certs/ca-certificates.crt", "latchkey"}
	if !slices.Equal(files, want) {
		p.t.Errorf("the image holds %q, want %q", files, want)
	}
}
