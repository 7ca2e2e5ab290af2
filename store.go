package main

// store.go keeps users in PostgreSQL and sessions in Redis, and applies schema.sql. Every call is bounded in time:
// here for PostgreSQL, by its client's timeouts for Redis.

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

const (
	postgresTimeout = 1500 * time.Millisecond // of one operation
	redisTimeout    = 400 * time.Millisecond  // of each: connecting, sending, waiting for the answer
)

var (
	errUnavailable = errors.New("store unavailable") // wraps whatever a store did not answer
	errStale       = fmt.Errorf("%w: the password hash changed meanwhile", errUnavailable)
	errNoUser      = errors.New("no such user")
	errEmailExists = errors.New("email exists")
	errNoSession   = errors.New("no such session")
	errEnded       = errors.New("the token's session has ended")
	errReused      = errors.New("refresh token already exchanged")
	errTheft       = errors.New("refresh token already exchanged, before the leeway")
)

// timestamp is a time that is written as JavaScript writes it: RFC 3339 in UTC with milliseconds.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return []byte(t.UTC().Format(`"2006-01-02T15:04:05.000Z"`)), nil
}

// user is a row of the table users.
type user struct {
	ID, Email, PasswordHash string
	CreatedAt               timestamp
}

// device is where a session is used from.
type device struct{ IP, UserAgent string }

// grant is the refresh token that a session honours. Times are Unix seconds.
type grant struct {
	SessionID, TokenID  string
	IssuedAt, ExpiresAt int64
	Resent              bool // it was given before
}

// session is a living session as its owner sees it.
type session struct {
	ID         string    `json:"id"`
	CreatedAt  timestamp `json:"createdAt"`
	LastUsedAt timestamp `json:"lastUsedAt"`
	IP         string    `json:"ip"`
	UserAgent  string    `json:"userAgent"`
	Current    bool      `json:"current"`
}

// policy is how long sessions and their refresh tokens live, and how a token shown again is met.
type policy struct {
	refreshTTL, sessionTTL, leeway time.Duration
	resend                         bool
}

type store struct {
	db     *pgxpool.Pool
	rdb    once
	policy policy
}

// once is a Redis client that sends no script a second time: one that counts or rotates may have been carried out
// although its answer was lost. MaxRetries does not say that to a cluster client.
type once struct{ redis.UniversalClient }

type onceCmd struct{ *redis.Cmd }

func (onceCmd) NoRetry() bool { return true }

func (o once) EvalSha(ctx context.Context, sha1 string, keys []string, args ...any) *redis.Cmd {
	words := []any{"evalsha", sha1, len(keys)}
	for _, key := range keys {
		words = append(words, key)
	}
	cmd := redis.NewCmd(ctx, append(words, args...)...)
	_ = o.Process(ctx, onceCmd{cmd}) // the command keeps its error
	return cmd
}

// ready returns what keeps PostgreSQL and Redis from answering, nil for either that answers.
func (s *store) ready(ctx context.Context) (postgres, redis error) {
	pctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	return s.db.Ping(pctx), s.rdb.Ping(ctx).Err()
}

// postgresError names the operation and tells an outage from a fault: no answer, and the SQLSTATE classes of lost
// connections, exhausted resources, shutdown and a primary become a standby, are errUnavailable. This file's own
// errors stay as they are.
func postgresError(operation string, err error) error {
	var pg *pgconn.PgError
	switch {
	case err == nil, errors.Is(err, errUnavailable), errors.Is(err, errEmailExists):
		return err
	case errors.As(err, &pg) && !slices.Contains([]string{"08", "53", "57"}, pg.Code[:2]) && pg.Code != "25006":
		return fmt.Errorf("%s: %v", operation, err)
	}
	return fmt.Errorf("%w: postgres: %s: %v", errUnavailable, operation, err)
}

// redisError names the operation; whatever Redis fails at is errUnavailable.
func redisError(operation string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: redis: %s: %v", errUnavailable, operation, err)
}

// ---- users

// userByEmail returns the user with that address, in whatever case the row has it, or errNoUser. email is
// lower-cased in ASCII, as the index is.
func (s *store) userByEmail(ctx context.Context, email string) (user, error) {
	if strings.ContainsRune(email, 0) {
		return user{}, errNoUser // PostgreSQL has no such text
	}
	return s.findUser(ctx, `lower(email COLLATE "C") = $1`, email)
}

// userByID returns the user with that id, or errNoUser.
func (s *store) userByID(ctx context.Context, id string) (user, error) {
	return s.findUser(ctx, `id = $1::uuid`, id)
}

func (s *store) findUser(ctx context.Context, where, arg string) (u user, err error) {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	err = s.db.QueryRow(ctx, `SELECT id::text, email, password_hash, created_at FROM users WHERE `+where, arg).
		Scan(&u.ID, &u.Email, &u.PasswordHash, &u.CreatedAt.Time)
	if errors.Is(err, pgx.ErrNoRows) {
		return user{}, errNoUser
	}
	return u, postgresError("find user", err)
}

// inTx runs fn in a transaction.
func (s *store) inTx(ctx context.Context, operation string, fn func(context.Context, pgx.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	return postgresError(operation, pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error { return fn(ctx, tx) }))
}

// createUser inserts the user and opens its first session; without the session there is no user either.
// errEmailExists where the address is taken.
func (s *store) createUser(ctx context.Context, email, hash, sid, jti string, from device) (u user, g grant, err error) {
	err = s.inTx(ctx, "create user", func(ctx context.Context, tx pgx.Tx) error {
		u = user{PasswordHash: hash}
		err := tx.QueryRow(ctx, `INSERT INTO users (email, password_hash) VALUES ($1, $2) RETURNING id::text, email, created_at`,
			email, hash).Scan(&u.ID, &u.Email, &u.CreatedAt.Time)
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
	if revokeErr := s.revoke(ctx, u.ID, sid); revokeErr != nil && !errors.Is(revokeErr, errNoSession) {
		err = revokeErr
	}
	return grant{}, postgresError("read password hash", err)
}

// changePassword replaces the hash of u and revokes all its sessions but sid, which goes on under either hash,
// whichever PostgreSQL will have. If a store fails on the way, the password stays as it was.
func (s *store) changePassword(ctx context.Context, u user, hash, sid string) error {
	return s.replaceHash(ctx, u, hash, func(ctx context.Context) error {
		if _, err := s.runEach(ctx, sessionScripts["rebind"], []string{sid}, u.ID, "", digest(u.PasswordHash)+" "+digest(hash)); err != nil {
			return err
		}
		return s.revokeAll(ctx, u.ID, sid, sid)
	})
}

// rehash replaces the hash of u by another of the same password; the sessions bound to the old one go on.
func (s *store) rehash(ctx context.Context, u user, hash string) error {
	return s.replaceHash(ctx, u, hash, func(ctx context.Context) error {
		sids, err := s.rdb.ZRange(ctx, indexKey(u.ID), 0, -1).Result()
		if err == nil {
			_, err = s.runEach(ctx, sessionScripts["rebind"], sids, u.ID, digest(u.PasswordHash), digest(u.PasswordHash)+" "+digest(hash))
		}
		return redisError("rehash", err)
	})
}

func (s *store) replaceHash(ctx context.Context, u user, hash string, sessions func(context.Context) error) error {
	return s.alter(ctx, u, sessions,
		`UPDATE users SET password_hash = $3, updated_at = now() WHERE id = $1::uuid AND password_hash = $2`, hash)
}

// deleteUser deletes the row and revokes all sessions.
func (s *store) deleteUser(ctx context.Context, u user, sid string) error {
	return s.alter(ctx, u, func(ctx context.Context) error { return s.revokeAll(ctx, u.ID, sid, "") },
		`DELETE FROM users WHERE id = $1::uuid AND password_hash = $2`)
}

// alter runs sql on the row of u and then, with the row locked and the change not yet visible, sessions. errStale
// where the hash is no longer u.PasswordHash.
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

// ---- sessions

//go:embed session.lua
var sessionLua string

// sessionScripts is session.lua by script, each with what stands before the first.
var sessionScripts = func() map[string]*redis.Script {
	scripts, parts := map[string]*redis.Script{}, strings.Split(sessionLua, "\n-- script: ")
	for _, part := range parts[1:] {
		name, lua, _ := strings.Cut(part, "\n")
		scripts[name] = redis.NewScript(parts[0] + lua)
	}
	return scripts
}()

func sessionKey(sid string) string { return "session:{" + sid + "}" }
func indexKey(uid string) string   { return "user-sessions:{" + uid + "}" }

// digest is the short form of a password hash that a session is bound to: 16 hex digits of SHA-256.
func digest(hash string) string {
	sum := sha256.Sum256([]byte(hash))
	return hex.EncodeToString(sum[:8])
}

// startSession writes the session and returns its first refresh token. It is in the index before it lives, so who
// revokes all of a user's sessions misses none.
func (s *store) startSession(ctx context.Context, u user, sid, jti string, from device) (grant, error) {
	ttl := int64(min(s.policy.refreshTTL, s.policy.sessionTTL) / time.Second)
	now, err := sessionScripts["index"].Run(ctx, s.rdb, []string{indexKey(u.ID)}, sid, ttl).Int64()
	g := grant{SessionID: sid, TokenID: jti, IssuedAt: now / 1000, ExpiresAt: now/1000 + ttl}
	if err == nil {
		err = sessionScripts["start"].Run(ctx, s.rdb, []string{sessionKey(sid)}, u.ID, jti, now, g.IssuedAt, g.ExpiresAt,
			from.IP, from.UserAgent, digest(u.PasswordHash)).Err()
	}
	return g, redisError("start session", err)
}

// rotate exchanges the refresh token jti of session sid for one named next. It returns the token that the session
// honours now; errReused or, past the leeway, errTheft for one that was already exchanged; errEnded where there
// is no session, or none any more as u's password hash is not the one it is bound to.
func (s *store) rotate(ctx context.Context, u user, sid, jti, next string, from device) (grant, error) {
	reply, err := sessionScripts["rotate"].Run(ctx, s.rdb, []string{sessionKey(sid), "blacklist:{" + sid + "}:" + jti}, u.ID, jti, next,
		digest(u.PasswordHash), int64(s.policy.refreshTTL/time.Second), int64(s.policy.sessionTTL/time.Second),
		s.policy.leeway.Milliseconds(), s.policy.resend, from.IP, from.UserAgent).Slice()
	if err != nil {
		return grant{}, redisError("rotate", err)
	}
	switch reply[0] {
	case "gone":
		return grant{}, errEnded
	case "reused":
		return grant{}, errReused
	case "theft":
		return grant{}, errTheft
	}
	token, isText := reply[1].(string)
	iat, isTime := reply[2].(int64)
	exp, isTimeToo := reply[3].(int64)
	if !isText || !isTime || !isTimeToo {
		return grant{}, fmt.Errorf("rotate: unexpected reply %v", reply)
	}
	// The token is exchanged, come what may: an index that cannot be written now is written by the next refresh.
	_ = sessionScripts["index"].Run(ctx, s.rdb, []string{indexKey(u.ID)}, sid, exp-iat).Err()
	return grant{SessionID: sid, TokenID: token, IssuedAt: iat, ExpiresAt: exp, Resent: reply[0] == "resent"}, nil
}

// isLive returns errEnded if the session is not there or not the user's.
func (s *store) isLive(ctx context.Context, uid, sid string) error {
	owner, err := s.rdb.HGet(ctx, sessionKey(sid), "user").Result()
	if errors.Is(err, redis.Nil) || err == nil && owner != uid {
		return errEnded
	}
	return redisError("find session", err)
}

// sessions returns the user's living sessions, newest use first.
func (s *store) sessions(ctx context.Context, uid, current string) ([]session, error) {
	sids, err := s.rdb.ZRange(ctx, indexKey(uid), 0, -1).Result()
	if err != nil {
		return nil, redisError("list sessions", err)
	}
	replies, err := s.rdb.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for _, sid := range sids {
			pipe.HMGet(ctx, sessionKey(sid), "user", "created", "used", "ip", "agent")
		}
		return nil
	})
	living := []session{}
	for i, reply := range replies {
		var f [5]string
		for j, v := range reply.(*redis.SliceCmd).Val() {
			f[j], _ = v.(string) // nil where the session has ended
		}
		if f[0] == uid {
			living = append(living, session{sids[i], milliseconds(f[1]), milliseconds(f[2]), f[3], f[4], sids[i] == current})
		}
	}
	slices.SortStableFunc(living, func(a, b session) int { return b.LastUsedAt.Compare(a.LastUsedAt.Time) })
	return living, redisError("read sessions", err)
}

func milliseconds(s string) timestamp {
	ms, _ := strconv.ParseInt(s, 10, 64)
	return timestamp{time.UnixMilli(ms)}
}

// revoke ends those of the sessions that are there and the user's: for good, as nothing brings back a session that is
// not there. errNoSession where that is none of them.
func (s *store) revoke(ctx context.Context, uid string, sids ...string) error {
	replies, err := s.runEach(ctx, sessionScripts["revoke"], sids, uid)
	if err != nil {
		return err
	}
	var ended []any // an id without a session stays in the index until its time: that session may be about to start
	for i, reply := range replies {
		if n, _ := reply.(*redis.Cmd).Int(); n == 1 {
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
	sids, err := s.rdb.ZRange(ctx, indexKey(uid), 0, -1).Result()
	if err != nil {
		return redisError("list sessions", err)
	}
	err = s.revoke(ctx, uid, slices.DeleteFunc(append(sids, sid), func(id string) bool { return id == keep })...)
	if errors.Is(err, errNoSession) {
		return nil
	}
	return err
}

// runEach runs the script on each of the sessions, in one round trip.
func (s *store) runEach(ctx context.Context, script *redis.Script, sids []string, args ...any) ([]redis.Cmder, error) {
	replies, err := s.rdb.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for _, sid := range sids {
			script.Eval(ctx, pipe, []string{sessionKey(sid)}, args...)
		}
		return nil
	})
	return replies, redisError("run on sessions", err)
}

// ---- migrations

//go:embed schema.sql
var schemaSQL string

// migration is one step of schema.sql. AppliedAt is zero where it has not been applied.
type migration struct {
	Version, Name, SQL, Checksum string
	AppliedAt                    time.Time
}

// parseMigrations splits a schema at its "-- migration: 0001 name" lines.
func parseMigrations(schema string) (steps []migration) {
	for _, part := range strings.Split("\n"+schema, "\n-- migration: ")[1:] {
		title, sql, _ := strings.Cut(part, "\n")
		version, name, _ := strings.Cut(title, " ")
		sum := sha256.Sum256([]byte(sql))
		steps = append(steps, migration{Version: version, Name: name, SQL: sql, Checksum: hex.EncodeToString(sum[:])})
	}
	return steps
}

// migrate applies what of the schema has not been applied: all of it or, on an error, nothing. With apply false it
// changes nothing. It returns every step; one on record that is unknown or has another text is an error.
func migrate(ctx context.Context, db *pgx.Conn, schema string, apply bool) ([]migration, error) {
	tx, err := db.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	// One replica at a time, the others wait. The number is any that nobody else uses.
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(7236857230171);
		CREATE TABLE IF NOT EXISTS schema_migrations (version text PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
			applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
		return nil, err
	}
	rows, _ := tx.Query(ctx, `SELECT version, name, '' AS sql, checksum, applied_at FROM schema_migrations`)
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
			step.AppliedAt = applied[at].AppliedAt
			applied = slices.Delete(applied, at, at+1)
		case apply:
			if _, err := tx.Exec(ctx, step.SQL); err != nil {
				return nil, fmt.Errorf("migration %s %s: %v", step.Version, step.Name, err)
			}
			if err := tx.QueryRow(ctx, `INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)
				RETURNING applied_at`, step.Version, step.Name, step.Checksum).Scan(&step.AppliedAt); err != nil {
				return nil, err
			}
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
