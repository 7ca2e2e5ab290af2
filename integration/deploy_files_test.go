package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDeploySystemd is "systemd has nothing to say about the unit, and rates it as safe".
func TestDeploySystemd(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("there is no systemd-analyze here (Debian: apt-get install systemd)")
	}
	// systemd wants to see the program.
	unit := example(t, "latchkey.service", "/usr/local/bin/latchkey", home.binary)
	file := filepath.Join(t.TempDir(), "latchkey.service")
	if err := os.WriteFile(file, []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"verify", "--man=no", file},
		{"security", "--offline=true", "--threshold=10", "--no-pager", file}, // 10 means 1.0
	} {
		out, err := exec.Command(analyze, args...).CombinedOutput()
		// An unknown key is a line of output, and no error.
		if err != nil || args[0] == "verify" && len(out) > 0 {
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
}

// kubectlValidate validates as the API server does, with the schemas of Kubernetes that it brings.
const kubectlValidate = "sigs.k8s.io/kubectl-validate@v0.0.4"

// TestDeployKubernetes is "the manifest has only fields that Kubernetes knows, and of its types".
func TestDeployKubernetes(t *testing.T) {
	t.Parallel()
	validate := exec.Command("go", "run", kubectlValidate,
		"--version", "1.30", "../examples/deploy/kubernetes.yaml")
	if out, err := validate.CombinedOutput(); err != nil {
		t.Errorf("kubectl-validate: %v\n%s", err, out)
	}
}

// TestDeployKubernetesPlaceholders is "the server refuses each REPLACE-ME by the name of its
// variable, and serves once they are replaced".
func TestDeployKubernetesPlaceholders(t *testing.T) {
	t.Parallel()
	documented, err := os.ReadFile("../.env.example")
	if err != nil {
		t.Fatal(err)
	}
	given := vars{}
	for _, line := range regexp.MustCompile(`(?m)^  ([A-Z_]+): (.*?)( #.*)?$`).
		FindAllStringSubmatch(example(t, "kubernetes.yaml"), -1) {
		given[line[1]] = strings.Trim(line[2], `"`)
		if !strings.Contains(string(documented), "\n"+line[1]+"=") {
			t.Errorf("the server has no variable %s", line[1])
		}
	}
	server := exec.Command(home.binary)
	server.Env = given.list()
	out, err := server.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("with placeholders the server ends with %v", err)
	}
	for _, name := range []string{
		"DATABASE_URL", "REDIS_URL", "JWT_SECRET", "JWT_REFRESH_SECRET", "FRONTEND_URL",
		"TRUSTED_PROXIES",
	} {
		if !strings.Contains(string(out), name+":") {
			t.Errorf("%s=%s is not refused: %s", name, given[name], out)
		}
		delete(given, name)
	}
	u := newUser(t, serve(t, given.with(vars{
		"PORT": freePort(t), "METRICS_ADDR": "127.0.0.1:0", "SHUTDOWN_DELAY": "0s",
	})))
	u.must("POST", "/auth/signup", u.credentials)
}
