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
	manifest := example(t, "kubernetes.yaml")
	given := vars{}
	for _, line := range regexp.MustCompile(`(?m)^  ([A-Z_]+): (.*?)( #.*)?$`).
		FindAllStringSubmatch(manifest, -1) {
		given[line[1]] = strings.Trim(line[2], `"`)
	}
	server := exec.Command(home.binary)
	server.Env = given.list()
	out, err := server.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("with placeholders the server ends with %v", err)
	}
	replaced := vars{"PORT": freePort(t), "METRICS_ADDR": "127.0.0.1:0", "SHUTDOWN_DELAY": "0s"}
	for name, value := range given {
		if refused := strings.Contains(string(out), name+":"); refused != (value == "REPLACE-ME") {
			t.Errorf("%s: %s is refused: %v\n%s", name, value, refused, out)
		}
		if value != "REPLACE-ME" && replaced[name] == "" {
			replaced[name] = value
		}
	}
	u := newUser(t, serve(t, replaced))
	u.must("POST", "/auth/signup", u.credentials)
}
