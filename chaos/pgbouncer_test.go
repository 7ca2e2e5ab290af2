package chaos

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestPgBouncer runs the tests of the contract, and so the server and its migrations, through
// PgBouncer in transaction mode. There each transaction may have another connection, so the URL
// says not to prepare statements.
func TestPgBouncer(t *testing.T) {
	pooler := startPgBouncer(t, startPostgres(t))
	args := []string{"test", "-C", "../contract", "-count=1"}
	if testing.Short() {
		args = append(args, "-run", "TestContract/(Routes|Rotation|Database)")
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Env = append(os.Environ(),
		"LATCHKEY_BASE_URL=", // or the tests would ask a server that already runs
		"LATCHKEY_BINARY="+binary(t),
		"DATABASE_URL="+pooler.url,
		"REDIS_URL="+startRedis(t).url)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, lastLines(string(out), 100))
	}
}

// A pgBouncer is a pool of connections in front of a PostgreSQL.
type pgBouncer struct {
	*process
	url string
}

// startPgBouncer starts a PgBouncer that passes every database of a PostgreSQL on.
func startPgBouncer(t *testing.T, pg *postgres) *pgBouncer {
	t.Helper()
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		t.Skip("there is no pgbouncer here")
	}
	port := freePort(t)
	config := fmt.Sprintf("[databases]\n"+
		"* = host=127.0.0.1 port=%s user=postgres\n"+
		"[pgbouncer]\n"+
		"listen_addr = 127.0.0.1\n"+
		"listen_port = %s\n"+
		"unix_socket_dir =\n"+
		"auth_type = any\n"+
		"pool_mode = transaction\n"+
		"max_client_conn = 1000\n", pg.port, port)
	file := filepath.Join(newPostgresFolder(t), "pgbouncer.ini")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &pgBouncer{
		url: "postgres://postgres@127.0.0.1:" + port +
			"/postgres?sslmode=disable&default_query_exec_mode=exec",
	}
	p.process = startProcess(t, "pgbouncer", asPostgres(exec.Command(path, file)))
	p.isReady = func() bool { return connects(p.url) }
	p.awaitReady()
	return p
}
