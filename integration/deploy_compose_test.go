package integration

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	nginxImage = "nginx:1.28-alpine"
	// nginxStandIn takes its place where no registry can be reached, and where Redis' image is a
	// stand-in made of Debian. It is Debian's nginx with the folders of the official image.
	nginxStandIn = `
FROM ` + redisImage + `
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends nginx >/dev/null && \
    rm -r /var/lib/nginx /etc/nginx/sites-enabled/default && \
    ln -s /var/cache/nginx /var/lib/nginx && \
    ln -sf /dev/stdout /var/log/nginx/access.log && ln -sf /dev/stderr /var/log/nginx/error.log
STOPSIGNAL SIGQUIT
ENTRYPOINT []
CMD ["nginx", "-g", "daemon off;"]
`
)

// overrideYAML is what differs from an operator's host: the ports, and where the images come from.
const overrideYAML = `
services:
  nginx:
    image: %s
    ports: !override ["127.0.0.1:%s:443"]
  server:
    image: ` + image + `
    build: !reset null
`

// nginxFor returns the name of an image for nginx.
func nginxFor(t *testing.T) string {
	t.Helper()
	if exec.Command("docker", "image", "inspect", nginxImage).Run() == nil ||
		exec.Command("docker", "pull", "--quiet", nginxImage).Run() == nil {
		return nginxImage
	}
	const standIn = "latchkey-integration-nginx:latest"
	build := exec.Command("docker", "build", "--quiet", "--network", "host", "--tag", standIn, "-")
	build.Stdin = strings.NewReader(nginxStandIn)
	if out, err := build.CombinedOutput(); err != nil {
		t.Skipf("there is no %s, and no stand-in for it: %v\n%s", nginxImage, err, out)
	}
	t.Log("Debian's nginx stands in for " + nginxImage)
	return standIn
}

// production is the project of examples/deploy in a folder of its own.
func production(t *testing.T, files map[string][]byte) *project {
	t.Helper()
	port := freePort(t)
	p := &project{
		t:    t,
		dir:  t.TempDir(),
		name: "latchkey-integration-" + port,
		port: port,
		env:  dockerEnv(),
	}
	for _, name := range []string{
		"POSTGRES_PASSWORD", "REDIS_PASSWORD", "JWT_SECRET", "JWT_REFRESH_SECRET",
	} {
		p.env = append(p.env, name+"="+rand.Text()+rand.Text())
	}
	p.env = append(p.env, "FRONTEND_URL=https://app.example.com")
	for name, content := range map[string]string{
		"compose.yaml":      example(t, "compose.yaml"),
		"nginx.conf":        example(t, "nginx.conf"),
		"tls/fullchain.pem": string(files["cert.pem"]),
		"tls/privkey.pem":   string(files["key.pem"]),
	} {
		p.write(name, content)
	}
	return p
}

func (p *project) write(name, content string) {
	p.t.Helper()
	file := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// TestDeployComposeVariables is "a variable that is missing is a fault, which names it".
func TestDeployComposeVariables(t *testing.T) {
	p := production(t, nil)
	p.compose("config")
	all := p.env
	for i, variable := range all {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.Contains(example(t, "compose.yaml"), "${"+name) {
			continue // it is one of docker's own
		}
		cmd := exec.Command("docker", "compose", "config")
		cmd.Dir = p.dir
		cmd.Env = append(append([]string{}, all[:i]...), all[i+1:]...)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), name+" is missing a value") {
			t.Errorf("without %s: %v %s", name, err, out)
		}
	}
}

// TestDeployCompose is "two replicas behind nginx, with stores that nobody else reaches".
func TestDeployCompose(t *testing.T) {
	t.Parallel()
	files := certificates(t)
	p := production(t, files)
	p.write("compose.override.yaml", fmt.Sprintf(overrideYAML, nginxFor(t), p.port))
	t.Cleanup(func() { p.compose("down", "--volumes", "--timeout", "5") })
	p.compose("up", "--wait")

	f := &front{files: files, url: "https://localhost:" + p.port}
	ada := f.visitor(t, "127.0.0.1")
	signup := ada.ask("POST", f.url+"/auth/signup",
		`{"email":"ada@example.com","password":"correct horse"}`,
		"X-Forwarded-For", "198.51.100.7")
	if signup.StatusCode != 201 {
		t.Fatalf("signup: %d %s", signup.StatusCode, signup.text)
	}
	p.assertStores()
	published := p.docker("ps", "--filter", "label=com.docker.compose.project="+p.name,
		"--filter", "publish=1-65535", "--format", "{{.Names}}")
	if published != p.name+"-nginx-1" {
		t.Errorf("ports are published by %q", published)
	}

	// The session outlives all restarts, and the end of a replica.
	p.compose("restart")
	p.compose("up", "--wait")
	servers := strings.Fields(p.compose("ps", "--quiet", "server"))
	if len(servers) != 2 {
		t.Fatalf("the replicas are %q", servers)
	}
	p.docker("stop", servers[0])
	var tokens struct{ AccessToken string }
	refresh := ada.ask("POST", f.url+"/auth/refresh", "")
	err := json.Unmarshal([]byte(refresh.text), &tokens)
	if err != nil || refresh.StatusCode != 200 {
		t.Fatalf("refresh: %d %s", refresh.StatusCode, refresh.text)
	}
	// This host can speak to a replica without nginx. Its address is then not believed, either.
	direct := newUser(t, "http://"+p.docker("container", "inspect", "--format",
		`{{(index .NetworkSettings.Networks "latchkey-front").IPAddress}}`, servers[1])+":3000")
	direct.credentials = map[string]string{
		"email": "ada@example.com", "password": "correct horse",
	}
	direct.login()
	sessions := ada.ask("GET", f.url+"/auth/sessions", "",
		"Authorization", "Bearer "+tokens.AccessToken)
	// All that comes from this host has the address of Docker's gateway.
	if strings.Count(sessions.text, `"ip":"10.213.7.1"`) != 2 {
		t.Errorf("the addresses are wrong: %s", sessions.text)
	}
}

// assertStores is "the stores want a password, and are set up as README.md says".
func (p *project) assertStores() {
	p.t.Helper()
	for setting, want := range map[string]string{
		"appendonly": "yes", "maxmemory-policy": "noeviction", "hash-max-listpack-value": "256",
	} {
		got := p.compose("exec", "-T", "redis", "redis-cli", "config", "get", setting)
		if got != setting+"\n"+want {
			p.t.Errorf("Redis has %q, want %s %s", got, setting, want)
		}
	}
	got := p.compose("exec", "-T", "redis", "sh", "-c", "unset REDISCLI_AUTH; redis-cli ping")
	if !strings.HasPrefix(got, "NOAUTH ") {
		p.t.Errorf("Redis without a password: %s", got)
	}
	psql := []string{"exec", "-T", "postgres", "psql", "-U", "postgres", "-d", "latchkey", "-Atc"}
	got = p.compose(append(psql, "SELECT rolname, rolsuper, rolpassword LIKE 'SCRAM%' "+
		"FROM pg_authid WHERE rolcanlogin ORDER BY rolname")...)
	if got != "latchkey|f|t\npostgres|t|" {
		p.t.Errorf("the roles of PostgreSQL are %q", got)
	}
}
