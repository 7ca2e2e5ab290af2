package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// A project is a docker compose project in a fresh clone.
type project struct {
	t    *testing.T
	dir  string
	name string
	port string
	env  []string
}

// docker runs a docker command in the clone, and returns what it writes to standard output.
func (p *project) docker(args ...string) string {
	p.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("docker", args...)
	cmd.Dir = p.dir
	cmd.Env = p.env
	cmd.Stdout = &stdout
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		p.t.Fatalf("docker %s: %v\n%s\n%s", strings.Join(args, " "), err,
			tail(stdout.String(), 40), tail(stderr.String(), 60))
	}
	return strings.TrimSpace(stdout.String())
}

func (p *project) compose(args ...string) string {
	p.t.Helper()
	return p.docker(append([]string{"compose", "--project-name", p.name}, args...)...)
}

// container returns the id of a service's container.
func (p *project) container(service string) string {
	p.t.Helper()
	return p.compose("ps", "--quiet", service)
}

// inspect returns what the engine says of a service's container, in a format of docker inspect.
func (p *project) inspect(service, format string) string {
	p.t.Helper()
	return p.docker("container", "inspect", "--format", format, p.container(service))
}

// dockerEnv is what docker needs of our environment. The developer's other settings must not reach a
// fresh clone.
func dockerEnv() (env []string) {
	for _, name := range []string{
		"PATH", "HOME", "TMPDIR", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT",
		"DOCKER_BUILDKIT", "XDG_RUNTIME_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
	} {
		if value, set := os.LookupEnv(name); set {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// TestCompose is "docker compose up on a fresh clone without .env gives a working server".
func TestCompose(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := &project{
		t:    t,
		dir:  t.TempDir(),
		name: "latchkey-integration-" + port,
		port: port,
		env:  append(dockerEnv(), "PORT="+port),
	}
	clone := exec.Command("git", "clone", "--quiet", "--no-local", "..", p.dir)
	if out, err := clone.CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	t.Cleanup(func() { p.compose("down", "--volumes", "--rmi", "local", "--timeout", "5") })
	p.compose("up", "--build", "--wait")

	// Every client here is the Docker host, which reaches the server by the published port.
	u := newUser(t, "http://127.0.0.1:"+port)
	u.must("POST", "/auth/signup", u.credentials)
	u.lives()

	p.assertContainers()
	p.assertImage()
	p.assertOperator()

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

// assertOperator is "the operator's subcommands work in the image".
func (p *project) assertOperator() {
	p.t.Helper()
	u := newUser(p.t, "http://127.0.0.1:"+p.port)
	u.must("POST", "/auth/signup", u.credentials)
	operate := func(args ...string) string {
		return p.compose(append([]string{"exec", "-T", "server", "/latchkey"}, args...)...)
	}
	email := strings.ToLower(u.credentials["email"])
	disabled := operate("user", email, "disable", "--json")
	refused := u.send("POST", "/auth/login", u.credentials)
	if !strings.Contains(disabled, `"disabled":true`) || refused.body.Code != "account_disabled" {
		p.t.Errorf("disabling prints %s, and a login is %d", disabled, refused.status)
	}
	operate("user", email, "enable")
	u.login().lives()
	if listed := operate("users"); !strings.Contains(listed, email) {
		p.t.Errorf("the accounts are\n%s", listed)
	}
}

// TestComposeVariables is "every variable of the server's configuration passes through".
func TestComposeVariables(t *testing.T) {
	example, err := os.ReadFile("../.env.example")
	if err != nil {
		t.Fatal(err)
	}
	p := &project{t: t, dir: "..", name: "latchkey-integration-variables", env: dockerEnv()}
	var passed []string
	for line := range strings.Lines(string(example)) {
		name, _, assigns := strings.Cut(line, "=")
		if !assigns || strings.HasPrefix(line, "#") || name == "POSTGRES_PASSWORD" {
			continue
		}
		value := fmt.Sprint(20000 + len(passed)) // PORT must be a number
		p.env = append(p.env, name+"="+value)
		passed = append(passed, fmt.Sprintf("%s: %q", name, value))
	}
	config := p.compose("--profile", "mail", "config")
	for _, variable := range passed {
		if !strings.Contains(config, variable) {
			t.Errorf("the server's container does not get %s", variable)
		}
	}
}

// assertContainers is "only the server's port is published, on 127.0.0.1, and it is locked in".
func (p *project) assertContainers() {
	p.t.Helper()
	for _, service := range strings.Fields(p.compose("config", "--services")) {
		want := ""
		if service == "server" {
			want = fmt.Sprintf(`%s/tcp [{"HostIp":"127.0.0.1","HostPort":"%[1]s"}]`, p.port)
		}
		got := p.inspect(service,
			"{{range $port, $to := .HostConfig.PortBindings}}{{$port}} {{json $to}}{{end}}")
		if got != want {
			p.t.Errorf("%s publishes %q, want %q", service, got, want)
		}
	}
	for format, want := range map[string]string{
		"{{.HostConfig.ReadonlyRootfs}}": "true",
		"{{.HostConfig.CapDrop}}":        "[ALL]",
		"{{.HostConfig.CapAdd}}":         "[]",
		"{{.HostConfig.Privileged}}":     "false",
		"{{.Config.User}}":               "65532:65532",
	} {
		if got := p.inspect("server", format); got != want {
			p.t.Errorf("the server's container has %s %s, want %s", format, got, want)
		}
	}
}

// assertImage is "FROM scratch, non-root, under 23 MB". A third of that are methods which the linker
// keeps because of text/template.
func (p *project) assertImage() {
	p.t.Helper()
	var size int
	var user string
	image := p.docker("image", "inspect", "--format", "{{.Size}} {{.Config.User}}",
		p.inspect("server", "{{.Image}}"))
	if _, err := fmt.Sscan(image, &size, &user); err != nil {
		p.t.Fatalf("%s: %v", image, err)
	}
	if size >= 23_000_000 || user != "65532:65532" {
		p.t.Errorf("the image has %d bytes and runs as %q", size, user)
	}
	p.t.Logf("the image has %.1f MB", float64(size)/1e6)

	var files []string // no shell among them
	exported := strings.NewReader(p.docker("export", p.container("server")))
	for archive := tar.NewReader(exported); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
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
