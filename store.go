package main

// store.go keeps users in PostgreSQL and sessions in Redis, with every call bounded in time, and applies schema.sql.

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// Of an operation on PostgreSQL; of connecting to Redis, of sending, of waiting for the answer.
const postgresTimeout, redisTimeout = 1500 * time.Millisecond, 700 * time.Millisecond

var (
	errUnavailable = errors.New("store unavailable") // wraps whatever a store did not answer
	errStale       = fmt.Errorf("%w: the password hash changed meanwhile", errUnavailable)
	errNoUser      = errors.New("no such user")
	errEmailExists = errors.New("email exists")
	errNoSession   = errors.New("no such session")
	errEnded       = errors.New("the token's session has ended")
	errReused      = errors.New("refresh token already exchanged")
	errTheft       = fmt.Errorf("%w, and longer ago than the leeway", errReused)
)

// user is a row of the table users.
type user struct{ ID, Email, PasswordHash, CreatedAt string }

// device is where a session is used from.
type device struct{ IP, UserAgent string }

// grant is the refresh token that a session honours. Times are Unix seconds.
type grant struct {
	SessionID, TokenID  string
	IssuedAt, ExpiresAt int64
	Outcome             string // started, or of a rotation: rotated, resent, reused, theft, ended
}

// session is a living session as its owner sees it.
type session struct {
	ID         string `json:"id"`
	CreatedAt  string `json:"createdAt"`
	LastUsedAt string `json:"lastUsedAt"`
	IP         string `json:"ip"`
	UserAgent  string `json:"userAgent"`
	Current    bool   `json:"current"`
}

// store keeps both; refreshTTL and sessionTTL are in whole seconds.
type store struct {
	db                             *pgxpool.Pool
	rdb                            redis.UniversalClient
	refreshTTL, sessionTTL, leeway time.Duration
	resend                         bool // the successor of a token shown again within the leeway
}

// ready returns what keeps PostgreSQL and Redis from answering, nil for either that answers.
func (s *store) ready(ctx context.Context) (postgres, redis error) {
	pctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	return s.db.Ping(pctx), s.rdb.Ping(ctx).Err()
}

// postgresError names the operation. No answer is errUnavailable, and so are the SQLSTATEs of lost connections, exhausted
// resources, shutdown and a primary become a standby; any other is a fault. This file's own errors pass.
func postgresError(operation string, err error) error {
	var pg *pgconn.PgError
	var scan pgx.ScanArgError
	switch {
	case err == nil, errors.Is(err, errUnavailable), errors.Is(err, errEmailExists):
		return err
	case errors.As(err, &scan), errors.As(err, &pg) && !slices.Contains([]string{"08", "53", "57"}, pg.Code[:2]) && pg.Code != "25006":
		return fmt.Errorf("%s: %v", operation, err)
	}
	return fmt.Errorf("%w: postgres: %s: %v", errUnavailable, operation, err)
}

// cannotServe is what Redis replies when it is there but of no use just now.
var cannotServe = regexp.MustCompile(`^(LOADING|BUSY|OOM|MISCONF|READONLY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|MOVED|ASK|ERR max number of clients)`)

// redisError names the operation. No answer, or one that is cannotServe, is errUnavailable; any other is a fault.
func redisError(operation string, err error) error {
	var reply redis.Error
	switch {
	case err == nil, errors.Is(err, errUnavailable):
		return err
	case errors.As(err, &reply) && !cannotServe.MatchString(reply.Error()):
		return fmt.Errorf("redis: %s: %v", operation, err)
	}
	return fmt.Errorf("%w: redis: %s: %v", errUnavailable, operation, err)
}

// What is read of a user, the time as JavaScript writes it; and how one is found, the address in lower case.
const (
	userColumns = `id::text, email, password_hash, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')`
	byID        = `id = $1::uuid`
	byEmail     = `lower(email COLLATE "C") = $1`
)

func (s *store) findUser(ctx context.Context, by, key string) (u user, err error) {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	if strings.ContainsRune(key, 0) {
		return user{}, errNoUser // PostgreSQL has no such text
	}
	err = s.db.QueryRow(ctx, `SELECT `+userColumns+` FROM users WHERE `+by, key).Scan(&u.ID, &u.Email, &u.PasswordHash, &u.CreatedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return user{}, errNoUser
	}
	return u, postgresError("find user", err)
}

func (s *store) inTx(ctx context.Context, operation string, fn func(context.Context, pgx.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	return postgresError(operation, pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error { return fn(ctx, tx) }))
}

// createUser inserts the user and opens its first session: both or neither. errEmailExists if the address is taken.
func (s *store) createUser(ctx context.Context, email, hash, sid, jti string, from device) (u user, g grant, err error) {
	err = s.inTx(ctx, "create user", func(ctx context.Context, tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `INSERT INTO users (email, password_hash) VALUES ($1, $2) RETURNING `+userColumns, email, hash).
			Scan(&u.ID, &u.Email, &u.PasswordHash, &u.CreatedAt)
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == "23505" && pg.TableName == "users" && pg.ConstraintName != "users_pkey" {
			return errEmailExists // whatever an adopted table calls its constraint
		}
		if err == nil {
			g, err = s.startSession(ctx, u, sid, jti, from)
		}
		return err
	})
	return u, g, err
}

// openSession opens a session for a user whose password was just found to be the one of u.PasswordHash. errStale,
// and no session, where that is no longer the user's hash. It is read again once the session can be found and
// revoked, and FOR SHARE waits for a change under way: a later change revokes this session too.
func (s *store) openSession(ctx context.Context, u user, sid, jti string, from device) (grant, error) {
	g, err := s.startSession(ctx, u, sid, jti, from)
	if err != nil {
		return grant{}, err
	}
	pctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	var hash string
	err = s.db.QueryRow(pctx, `SELECT password_hash FROM users WHERE id = $1::uuid FOR SHARE`, u.ID).Scan(&hash)
	if err == nil && hash == u.PasswordHash {
		return g, nil
	}
	if err == nil || errors.Is(err, pgx.ErrNoRows) {
		err = errStale
	}
	_ = s.revoke(ctx, u.ID, sid) // nobody was given its tokens
	return grant{}, postgresError("read password hash", err)
}

// replaceHash replaces the password hash of u. Session sid goes on and all others are revoked; without sid those that
// were bound to the old hash go on. What fails on the way may have ended sessions, but leaves none that should end.
func (s *store) replaceHash(ctx context.Context, u user, hash, sid string) error {
	return s.alter(ctx, u, func(ctx context.Context) error {
		old := digest(u.PasswordHash)
		bound, sids, err := "", []string{sid}, error(nil)
		if sid == "" {
			bound = old
			sids, err = s.sessionIDs(ctx, u.ID)
		}
		if err == nil {
			_, err = s.runEach(ctx, "rebind", sids, u.ID, bound, old+" "+digest(hash))
		}
		if err == nil && sid != "" {
			err = s.revokeAll(ctx, u.ID, sid, sid)
		}
		return err
	}, `UPDATE users SET password_hash = $3, updated_at = now() WHERE id = $1::uuid AND password_hash = $2`, hash)
}

func (s *store) deleteUser(ctx context.Context, u user, sid string) error {
	return s.alter(ctx, u, func(ctx context.Context) error { return s.revokeAll(ctx, u.ID, sid, "") },
		`DELETE FROM users WHERE id = $1::uuid AND password_hash = $2`)
}

// alter runs sql on u's row, errStale if its hash has changed; then, with the row locked and nothing visible, sessions.
func (s *store) alter(ctx context.Context, u user, sessions func(context.Context) error, sql string, args ...any) error {
	return s.inTx(ctx, "alter user", func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, sql, append([]any{u.ID, u.PasswordHash}, args...)...)
		if err == nil && tag.RowsAffected() == 0 {
			err = errStale
		}
		if err == nil {
			err = sessions(ctx)
		}
		return err
	})
}

//go:embed session.lua
var sessionLua string
var sessionScript = redis.NewScript(sessionLua)

func sessionKey(sid string) string { return "session:{" + sid + "}" }
func indexKey(uid string) string   { return "user-sessions:{" + uid + "}" }

// digest is the short form of a password hash that a session is bound to: 16 hex digits of SHA-256.
func digest(hash string) string {
	sum := sha256.Sum256([]byte(hash))
	return hex.EncodeToString(sum[:8])
}

// startSession writes the session and returns its first refresh token.
func (s *store) startSession(ctx context.Context, u user, sid, jti string, from device) (grant, error) {
	return s.advance(ctx, u, sid, "start", from.IP, from.UserAgent, jti)
}

// rotate exchanges the refresh token jti of session sid for one named next. It returns the token that the session now
// honours; errReused or, past the leeway, errTheft for one that was exchanged before; errEnded if the session is over.
func (s *store) rotate(ctx context.Context, u user, sid, jti, next string, from device) (grant, error) {
	return s.advance(ctx, u, sid, "rotate", from.IP, from.UserAgent, next, jti, s.leeway.Milliseconds(), s.resend)
}

// advance starts or rotates session sid. Whatever makes or prolongs a session enters it in its user's index first, for as
// long as a refresh token can last: so who revokes all of a user's sessions misses none.
func (s *store) advance(ctx context.Context, u user, sid, operation string, args ...any) (grant, error) {
	refresh, whole := int64(s.refreshTTL/time.Second), int64(s.sessionTTL/time.Second)
	if err := sessionScript.Run(ctx, s.rdb, []string{indexKey(u.ID)}, "index", sid, min(refresh, whole)).Err(); err != nil {
		return grant{}, redisError("index session", err)
	}
	reply, err := sessionScript.Run(ctx, s.rdb, []string{sessionKey(sid)},
		append([]any{operation, u.ID, digest(u.PasswordHash), refresh, whole}, args...)...).StringSlice()
	if err != nil {
		return grant{}, redisError(operation+" session", err)
	}
	g := grant{SessionID: sid, Outcome: reply[0]}
	switch g.Outcome {
	case "ended":
		return g, errEnded
	case "reused":
		return g, errReused
	case "theft":
		return g, errTheft
	}
	if _, err := fmt.Sscan(strings.Join(reply[1:], " "), &g.TokenID, &g.IssuedAt, &g.ExpiresAt); err != nil {
		return grant{}, fmt.Errorf("%s session: unexpected reply %q", operation, reply)
	}
	return g, nil
}

// isLive returns errEnded if the session is not there or not the user's.
func (s *store) isLive(ctx context.Context, uid, sid string) error {
	owner, err := s.rdb.HGet(ctx, sessionKey(sid), "user").Result()
	if errors.Is(err, redis.Nil) || err == nil && owner != uid {
		return errEnded
	}
	return redisError("find session", err)
}

// sessionIDs returns the ids in the user's index; some may have ended.
func (s *store) sessionIDs(ctx context.Context, uid string) ([]string, error) {
	sids, err := s.rdb.ZRange(ctx, indexKey(uid), 0, -1).Result()
	return sids, redisError("list sessions", err)
}

// sessions returns the user's living sessions, newest use first.
func (s *store) sessions(ctx context.Context, uid, current string) ([]session, error) {
	sids, err := s.sessionIDs(ctx, uid)
	replies, readErr := s.runEach(ctx, "read", sids, uid)
	living := []session{}
	for i, f := range replies {
		if len(f) == 4 { // created, used, ip, agent
			living = append(living, session{sids[i], timestamp(f[0]), timestamp(f[1]), f[2], f[3], sids[i] == current})
		}
	}
	slices.SortStableFunc(living, func(a, b session) int { return strings.Compare(b.LastUsedAt, a.LastUsedAt) })
	return living, cmp.Or(err, readErr)
}

func timestamp(milliseconds string) string {
	ms, _ := strconv.ParseInt(milliseconds, 10, 64)
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z")
}

// revoke ends those of the sessions that are there and the user's, for good; errNoSession if none is.
func (s *store) revoke(ctx context.Context, uid string, sids ...string) error {
	replies, err := s.runEach(ctx, "revoke", sids, uid)
	if err != nil {
		return err
	}
	var ended []any // an id without a session stays in the index until its time: that session may be about to start
	for i, reply := range replies {
		if len(reply) == 1 && reply[0] == "revoked" {
			ended = append(ended, sids[i])
		}
	}
	if len(ended) == 0 {
		return errNoSession
	}
	return redisError("revoke", s.rdb.ZRem(ctx, indexKey(uid), ended...).Err())
}

// revokeAll ends the user's sessions but keep, if given, and sid among them even if the index has lost it.
func (s *store) revokeAll(ctx context.Context, uid, sid, keep string) error {
	sids, err := s.sessionIDs(ctx, uid)
	if err == nil {
		err = s.revoke(ctx, uid, slices.DeleteFunc(append(sids, sid), func(id string) bool { return id == keep })...)
	}
	if errors.Is(err, errNoSession) {
		return nil
	}
	return err
}

// runEach runs the script on each of the sessions, 500 in a round trip, and returns what each answered.
func (s *store) runEach(ctx context.Context, operation string, sids []string, args ...any) (replies [][]string, err error) {
	for some := range slices.Chunk(sids, 500) {
		cmds, err := s.rdb.Pipelined(ctx, func(pipe redis.Pipeliner) error {
			for _, sid := range some {
				sessionScript.Eval(ctx, pipe, []string{sessionKey(sid)}, append([]any{operation}, args...)...)
			}
			return nil
		})
		if err != nil {
			return nil, redisError(operation, err)
		}
		for _, cmd := range cmds {
			reply, _ := cmd.(*redis.Cmd).StringSlice() // its error was among err
			replies = append(replies, reply)
		}
	}
	return replies, nil
}

//go:embed schema.sql
var schemaSQL string

// migration is one step of schema.sql; Applied says when, RFC 3339 in UTC, or that it is pending.
type migration struct{ Version, Name, SQL, Checksum, Applied string }

// parseMigrations splits a schema at its "-- migration: 0001 name" lines.
func parseMigrations(schema string) (steps []migration) {
	for _, part := range strings.Split("\n"+schema, "\n-- migration: ")[1:] {
		title, sql, _ := strings.Cut(part, "\n")
		version, name, _ := strings.Cut(title, " ")
		sum := sha256.Sum256([]byte(sql))
		steps = append(steps, migration{version, name, sql, hex.EncodeToString(sum[:]), "pending"})
	}
	return steps
}

// migrate applies what of the schema has not been applied: all of it or, on an error, nothing. With apply false it
// changes nothing. It returns every step; one on record that is unknown or has another text is an error.
func migrate(ctx context.Context, database *pgx.ConnConfig, schema string, apply bool) ([]migration, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, database)
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: PostgreSQL cannot be reached: %v", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) // which rolls back what is not committed
	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, err
	}
	// One replica at a time, the others wait. The number is any that nobody else uses.
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(7236857230171);
		DO $$ BEGIN IF to_regclass('schema_migrations') IS NULL THEN CREATE TABLE schema_migrations (version text PRIMARY KEY,
			name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now()); END IF; END $$`); err != nil {
		return nil, err
	}
	rows, _ := tx.Query(ctx, `SELECT version, name, '', checksum, to_char(applied_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
		FROM schema_migrations`)
	applied, err := pgx.CollectRows(rows, pgx.RowToStructByPos[migration])
	if err != nil {
		return nil, err
	}
	steps := parseMigrations(schema)
	for i := range steps {
		step := &steps[i]
		at := slices.IndexFunc(applied, func(m migration) bool { return m.Version == step.Version })
		switch {
		case at >= 0 && applied[at].Checksum != step.Checksum:
			return nil, fmt.Errorf("migration %s %s is not the one that was applied: its text has changed", step.Version, step.Name)
		case at >= 0:
			step.Applied = applied[at].Applied
			applied = slices.Delete(applied, at, at+1)
		case apply:
			if _, err := tx.Exec(ctx, step.SQL); err != nil {
				return nil, fmt.Errorf("migration %s %s: %v", step.Version, step.Name, err)
			}
			if _, err := tx.Exec(ctx, `INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)`,
				step.Version, step.Name, step.Checksum); err != nil {
				return nil, err
			}
			step.Applied = time.Now().UTC().Format(time.RFC3339)
		}
	}
	if len(applied) > 0 {
		return nil, fmt.Errorf("migration %s %s was applied, but this version does not know it", applied[0].Version, applied[0].Name)
	}
	if !apply {
		return steps, nil
	}
	return steps, tx.Commit(ctx)
}
