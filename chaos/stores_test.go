package chaos

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// A postgres is a PostgreSQL server that belongs to one test.
type postgres struct {
	*process
	t    *testing.T
	port string
	data string // its data folder
	url  string // with the superuser postgres, whom the server trusts
}

// startPostgres starts a PostgreSQL with a data folder of its own. Each of settings is a line of
// postgresql.conf. Without one that says otherwise, nothing is synced to the disk: a kill -9 loses
// nothing all the same, because the operating system lives on.
func startPostgres(t *testing.T, settings ...string) *postgres {
	t.Helper()
	bin := postgresBin(t)
	data := filepath.Join(newPostgresFolder(t), "data")
	out, err := asPostgres(exec.Command("cp", "-r", postgresTemplate(t), data)).CombinedOutput()
	if err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	return startPostgresOn(t, bin, data, settings...)
}

// startPostgresOn starts a PostgreSQL on a data folder that is already there.
func startPostgresOn(t *testing.T, bin, data string, settings ...string) *postgres {
	t.Helper()
	return runPostgres(t, data, []string{filepath.Join(bin, "postgres"), "-D", data}, settings)
}

// startPostgresOnSmallDisk starts a PostgreSQL whose data folder is a file system of 128 MB, in
// memory. It skips the test where an ordinary user may not mount one in a namespace of their own.
func startPostgresOnSmallDisk(t *testing.T, settings ...string) *postgres {
	t.Helper()
	namespace := []string{"unshare", "--user", "--map-root-user", "--mount"}
	try := append(namespace, "mount", "-t", "tmpfs", "none", "/tmp")
	if out, err := asPostgres(exec.Command(try[0], try[1:]...)).CombinedOutput(); err != nil {
		t.Skipf("no disk of its own for PostgreSQL: %v\n%s", err, out)
	}
	const script = `
		mount -t tmpfs -o size=128m none "$1"
		cp -r "$2" "$1/data"
		exec unshare --user --map-user=1000 setpriv --pdeathsig KILL "$3" -D "$1/data" "${@:4}"`
	folder := newPostgresFolder(t)
	program := filepath.Join(postgresBin(t), "postgres")
	command := append(namespace, "bash", "-ec", script, "bash",
		folder, postgresTemplate(t), program)
	return runPostgres(t, filepath.Join(folder, "data"), command, settings)
}

// runPostgres runs a command that becomes a PostgreSQL and takes its options as arguments.
func runPostgres(t *testing.T, data string, command, settings []string) *postgres {
	t.Helper()
	port := freePort(t)
	for _, setting := range append([]string{
		"port=" + port,
		"listen_addresses=127.0.0.1",
		"unix_socket_directories=",
		"max_connections=300",
		"fsync=off",
	}, settings...) {
		command = append(command, "-c", setting)
	}
	pg := &postgres{
		t:    t,
		port: port,
		data: data,
		url:  "postgres://postgres@127.0.0.1:" + port + "/postgres?sslmode=disable",
	}
	cmd := asPostgres(exec.Command(command[0], command[1:]...))
	pg.process = startProcess(t, "postgres-"+port, cmd)
	pg.isReady = func() bool { return connects(pg.url) }
	pg.awaitReady()
	return pg
}

// connects tells whether a URL of PostgreSQL can be connected to.
func connects(url string) bool {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return false
	}
	conn.Close(ctx)
	return true
}

// connect opens a connection, which must succeed. The caller closes it.
func (pg *postgres) connect() *pgx.Conn {
	pg.t.Helper()
	conn, err := pgx.Connect(context.Background(), pg.url)
	if err != nil {
		pg.t.Fatal(err)
	}
	return conn
}

// exec executes statements, each in a transaction of its own, on one connection.
func (pg *postgres) exec(statements ...string) {
	pg.t.Helper()
	ctx := context.Background()
	conn := pg.connect()
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			pg.t.Fatalf("%s: %v", statement, err)
		}
	}
}

// query returns the one value that a query yields, as text.
func (pg *postgres) query(sql string, args ...any) (text string) {
	pg.t.Helper()
	ctx := context.Background()
	conn := pg.connect()
	defer conn.Close(ctx)
	row := conn.QueryRow(ctx, "SELECT ("+sql+")::text", args...)
	if err := row.Scan(&text); err != nil {
		pg.t.Fatalf("%s: %v", sql, err)
	}
	return text
}

// template is a data folder that every PostgreSQL of a run is copied from, since initdb is slow.
var template struct {
	once sync.Once
	data string
	err  error
}

func postgresTemplate(t *testing.T) string {
	t.Helper()
	bin := postgresBin(t)
	template.once.Do(func() { template.data, template.err = initdb(bin) })
	if template.err != nil {
		t.Fatal(template.err)
	}
	return template.data
}

func initdb(bin string) (data string, err error) {
	folder, err := makePostgresFolder()
	if err != nil {
		return "", err
	}
	data = filepath.Join(folder, "data")
	cmd := exec.Command(
		filepath.Join(bin, "initdb"),
		"--pgdata="+data,
		"--username=postgres",
		"--auth=trust",
		"--encoding=UTF8",
		"--locale=C",
		"--no-sync",
	)
	if out, err := asPostgres(cmd).CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb: %v\n%s", err, out)
	}
	return data, nil
}

// newPostgresFolder makes a folder for PostgreSQL that is removed when the test ends.
func newPostgresFolder(t *testing.T) string {
	t.Helper()
	folder, err := makePostgresFolder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// makePostgresFolder makes a folder that belongs to PostgreSQL's user. It is not in t.TempDir,
// which is closed to that user.
func makePostgresFolder() (string, error) {
	folder, err := os.MkdirTemp(shared, "postgres-")
	if err != nil {
		return "", err
	}
	if credential := postgresCredential(); credential != nil {
		err = os.Chown(folder, int(credential.Uid), int(credential.Gid))
	}
	return folder, err
}

// asPostgres makes cmd run as an ordinary user if we are root, because PostgreSQL refuses to run
// as root.
func asPostgres(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = "/" // every user may be in this folder
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: postgresCredential()}
	return cmd
}

// postgresCredential is the user postgres, or nobody where there is none. It is nil unless we are
// root.
func postgresCredential() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	account, err := osuser.Lookup("postgres")
	if err != nil {
		account, err = osuser.Lookup("nobody")
	}
	if err != nil {
		panic(err)
	}
	uid, _ := strconv.Atoi(account.Uid)
	gid, _ := strconv.Atoi(account.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// postgresBin is the folder of the programs of the newest PostgreSQL here.
func postgresBin(t *testing.T) string {
	t.Helper()
	folders, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	others, _ := filepath.Glob("/usr/pgsql-*/bin")
	folders = append(folders, others...)
	if path, err := exec.LookPath("postgres"); err == nil {
		folders = append(folders, filepath.Dir(path))
	}
	newest, best := "", 12
	for _, folder := range folders {
		if version := postgresVersion(folder); version > best {
			newest, best = folder, version
		}
	}
	if newest == "" {
		t.Fatal("there is no PostgreSQL from version 13 on here")
	}
	return newest
}

var majorVersion = regexp.MustCompile(`\d+`)

// postgresVersion is the major version of the PostgreSQL in a folder, and 0 if there is none.
func postgresVersion(bin string) int {
	out, err := exec.Command(filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return 0
	}
	version, _ := strconv.Atoi(majorVersion.FindString(string(out)))
	return version
}

// A redisNode is a Redis server that belongs to one test.
type redisNode struct {
	*process
	t      *testing.T
	port   string
	url    string
	client *redis.Client // the test's own connections
}

// startRedis starts a Redis with a folder of its own. Each of settings is a line of redis.conf.
// Without one that says otherwise, it keeps nothing on the disk.
func startRedis(t *testing.T, settings ...string) *redisNode {
	t.Helper()
	r := newRedis(t, "", append([]string{`save ""`}, settings...))
	r.awaitReady()
	return r
}

// newRedis starts a redis-server with more arguments than its file of settings. The tests log in
// with the password.
func newRedis(t *testing.T, password string, settings []string, args ...string) *redisNode {
	t.Helper()
	port := freePort(t)
	folder := t.TempDir()
	lines := append([]string{
		"bind 127.0.0.1",
		"port " + port,
		"dir " + folder,
	}, settings...)
	file := filepath.Join(folder, "redis.conf")
	if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &redisNode{
		t:    t,
		port: port,
		url:  "redis://127.0.0.1:" + port + "/0",
		client: redis.NewClient(&redis.Options{
			Addr:       net.JoinHostPort("127.0.0.1", port),
			Password:   password,
			MaxRetries: -1,
		}),
	}
	t.Cleanup(func() { r.client.Close() })
	cmd := exec.Command("redis-server", append([]string{file}, args...)...)
	r.process = startProcess(t, "redis-"+port, cmd)
	r.isReady = func() bool {
		return r.client.Ping(context.Background()).Err() == nil
	}
	return r
}

// do sends one command to Redis, which must accept it.
func (r *redisNode) do(words ...any) string {
	r.t.Helper()
	reply, err := r.client.Do(context.Background(), words...).Result()
	if err != nil {
		r.t.Fatalf("%v: %v", words, err)
	}
	return fmt.Sprint(reply)
}
