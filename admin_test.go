package main

import (
	"context"
	"io"
	"testing"
)

// TestCtrlC checks that a subcommand finishes what it has begun. It is interrupted while it waits
// for the user's row.
func TestCtrlC(t *testing.T) {
	c := signedUp(start(t, nil))
	db := newStore(t).db
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	_, err = tx.Exec(t.Context(), `SELECT FROM users WHERE email = $1 FOR UPDATE`, c.email)
	if err != nil {
		t.Fatal(err)
	}

	ctx, interrupt := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		args := []string{"user", c.email, "disable"}
		ended <- run(ctx, args, lookup(testEnvironment(nil)), io.Discard, io.Discard)
	}()
	eventually(t, "the subcommand waits for the row", func() bool {
		var waits bool
		err := db.QueryRow(t.Context(), `
			SELECT EXISTS (
				SELECT FROM pg_stat_activity
				WHERE $1 = ANY (pg_blocking_pids(pid))
			)`, int(tx.Conn().PgConn().PID())).Scan(&waits)
		return err == nil && waits
	})
	interrupt()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the subcommand ended with %v", err)
	}
	want(t, c.login(), 403, "account_disabled")
}
