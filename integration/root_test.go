package integration

import (
	"os"
	"os/exec"
	"testing"
)

// TestRootModule runs the server's own tests, whole, against the stores in containers.
func TestRootModule(t *testing.T) {
	if suite.c == nil {
		t.Skipf("needs %s", own)
	}
	st := ownStores(t) // which it may break
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "./...")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "DATABASE_URL="+st.databaseURL, "REDIS_URL="+st.redisURL)
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go test ./... in the root module: %v\n%s", err, output)
	}
	t.Logf("%s", output)
}
