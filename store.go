package main

// store.go keeps users in PostgreSQL and sessions in Redis, and applies the migrations of
// schema.sql. Every call is bounded in time. session.lua decides what becomes of a session.

import (
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

const (
	// postgresTimeout bounds one operation on PostgreSQL, a whole transaction included.
	postgresTimeout = 1500 * time.Millisecond

	// redisTimeout bounds each dial, write and read.
	redisTimeout = 700 * time.Millisecond

	// migrationTimeout bounds all migrations together. Building an index on an adopted table of
	// some hundred million rows takes minutes.
	migrationTimeout = 10 * time.Minute
)

var (
	// errUnavailable wraps every error of a store that did not answer, or cannot serve just now.
	errUnavailable = errors.New("store unavailable")

	// errFault wraps every error that a store reports otherwise.
	errFault = errors.New("store fault")

	errNoUser      = errors.New("no such user")
	errEmailExists = errors.New("email exists")
	errNoSession   = errors.New("no such session")
	errEnded       = errors.New("session has ended")
	errReused      = errors.New("refresh token was exchanged before")

	// errTheft is errReused of a token that was exchanged longer ago than the leeway.
	errTheft = fmt.Errorf("%w, and longer ago than the leeway", errReused)

	// errStale says that the password hash was replaced after it was read. The caller starts over,
	// and after several such tries in a row the answer is that of an unavailable store.
	errStale = fmt.Errorf("%w: the password hash was replaced meanwhile", errUnavailable)
)

// user is a row of the table users.
type user struct {
	ID           string
	Email        string
	PasswordHash string
	CreatedAt    time.Time
}

// device is where a session is used from.
type device struct {
	IP        string
	UserAgent string
}

// session is a living session as its user may see it.
type session struct {
	ID         string
	CreatedAt  time.Time
	LastUsedAt time.Time
	Device     device
}

// grant is the refresh token that a session honours.
type grant struct {
	SessionID string
	TokenID   string
	IssuedAt  time.Time
	ExpiresAt time.Time
	Resent    bool // it had been given out before
}

// exchange asks for a refresh: that the token Shown of a session be exchanged for the token Next.
type exchange struct {
	UserID    string
	SessionID string
	Shown     string
	Next      string
	Device    device
}

// sessionPolicy says how long sessions live and what happens to a token that is shown again.
type sessionPolicy struct {
	RefreshTTL time.Duration // of a refresh token, in whole seconds
	SessionTTL time.Duration // of a session, however often it is refreshed, in whole seconds
	Leeway     time.Duration // for how long showing an exchanged token is a race and not a theft
	Resend     bool          // within the leeway, the token exchanged last gets its successor again
}

type store struct {
	db     *pgxpool.Pool
	rdb    redis.UniversalClient
	policy sessionPolicy
}

// postgresReady returns what keeps PostgreSQL from answering, nil if it answers.
func (s *store) postgresReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	return s.db.Ping(ctx)
}

// redisReady returns what keeps Redis from answering, nil if it answers.
func (s *store) redisReady(ctx context.Context) error {
	return s.rdb.Ping(ctx).Err()
}

// Users

// findUserByID returns the user with this id, or errNoUser.
func (s *store) findUserByID(ctx context.Context, id string) (user, error) {
	return s.findUser(ctx, `
		SELECT id::text, email, password_hash, created_at
		FROM users
		WHERE id = $1::uuid`, id)
}

// findUserByEmail returns the user with this email, given in lower case, or errNoUser.
func (s *store) findUserByEmail(ctx context.Context, email string) (user, error) {
	if strings.ContainsRune(email, 0) {
		return user{}, errNoUser // PostgreSQL would refuse the text
	}
	return s.findUser(ctx, `
		SELECT id::text, email, password_hash, created_at
		FROM users
		WHERE lower(email COLLATE "C") = $1`, email)
}

func (s *store) findUser(ctx context.Context, query, key string) (user, error) {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	u, err := scanUser(s.db.QueryRow(ctx, query, key))
	if errors.Is(err, pgx.ErrNoRows) {
		return user{}, errNoUser
	}
	return u, postgresError("find user", err)
}

func scanUser(row pgx.Row) (user, error) {
	var u user
	err := row.Scan(&u.ID, &u.Email, &u.PasswordHash, &u.CreatedAt)
	return u, err
}

// createUser inserts a user and opens the first session, both or neither. It returns errEmailExists
// if the email is taken.
func (s *store) createUser(
	ctx context.Context,
	email, hash, sessionID, tokenID string,
	from device,
) (user, grant, error) {
	var u user
	var g grant
	err := s.inTx(ctx, "create user", func(ctx context.Context, tx pgx.Tx) error {
		var err error
		u, err = scanUser(tx.QueryRow(ctx, `
			INSERT INTO users (email, password_hash)
			VALUES ($1, $2)
			RETURNING id::text, email, password_hash, created_at`, email, hash))
		if isEmailTaken(err) {
			return errEmailExists
		}
		if err != nil {
			return err
		}
		g, err = s.startSession(ctx, u, sessionID, tokenID, from)
		return err
	})
	return u, g, err
}

// isEmailTaken reports whether err is a violation of one of the unique constraints on users.email.
// An adopted table may have any name for its own, so every one counts but the primary key.
func isEmailTaken(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) &&
		pg.Code == "23505" && // unique_violation
		pg.TableName == "users" &&
		pg.ConstraintName != "users_pkey"
}

// openSession opens a session for a user whose password was just found to match u.PasswordHash. It
// returns errStale if that is no longer the user's hash. The session starts under the row's share
// lock, so a change of the password is either seen here or ends this session too.
func (s *store) openSession(
	ctx context.Context,
	u user,
	sessionID, tokenID string,
	from device,
) (grant, error) {
	var g grant
	err := s.inTx(ctx, "open session", func(ctx context.Context, tx pgx.Tx) error {
		hash, err := lockHash(ctx, tx, u.ID)
		if errors.Is(err, errNoUser) || err == nil && hash != u.PasswordHash {
			return errStale
		}
		if err != nil {
			return err
		}
		g, err = s.startSession(ctx, u, sessionID, tokenID, from)
		return err
	})
	return g, err
}

// lockHash returns the password hash of a user and keeps it from being replaced until tx ends.
func lockHash(ctx context.Context, tx pgx.Tx, userID string) (string, error) {
	var hash string
	err := tx.QueryRow(ctx, `
		SELECT password_hash
		FROM users
		WHERE id = $1::uuid
		FOR SHARE`, userID).Scan(&hash)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", errNoUser
	}
	return hash, err
}

// changePassword replaces the password hash of u and ends every session but keep. It returns
// errStale if u.PasswordHash is no longer the user's hash.
func (s *store) changePassword(ctx context.Context, u user, hash, keep string) error {
	return s.inTx(ctx, "change password", func(ctx context.Context, tx pgx.Tx) error {
		if err := replaceHash(ctx, tx, u, hash); err != nil {
			return err
		}
		err := s.run(ctx, sessionScript, u.ID, "change_password", keep, digest(hash)).Err()
		return redisError("change password", err)
	})
}

// rehash replaces the password hash of u by another hash of the same password, and ends no session.
// It returns errStale if u.PasswordHash is no longer the user's hash.
func (s *store) rehash(ctx context.Context, u user, hash string) error {
	return s.inTx(ctx, "rehash", func(ctx context.Context, tx pgx.Tx) error {
		if err := replaceHash(ctx, tx, u, hash); err != nil {
			return err
		}
		from, to := digest(u.PasswordHash), digest(hash)
		return redisError("rehash", s.run(ctx, sessionScript, u.ID, "rehash", from, to).Err())
	})
}

// replaceHash updates the row, which stays locked until tx ends. Nobody sees the new hash before.
func replaceHash(ctx context.Context, tx pgx.Tx, u user, hash string) error {
	tag, err := tx.Exec(ctx, `
		UPDATE users
		SET password_hash = $3, updated_at = now()
		WHERE id = $1::uuid AND password_hash = $2`, u.ID, u.PasswordHash, hash)
	return expectRow(tag, err)
}

// deleteUser deletes u and ends every session, that of the caller among them. It returns errStale
// if u.PasswordHash is no longer the user's hash.
func (s *store) deleteUser(ctx context.Context, u user, caller string) error {
	return s.inTx(ctx, "delete user", func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			DELETE FROM users
			WHERE id = $1::uuid AND password_hash = $2`, u.ID, u.PasswordHash)
		if err := expectRow(tag, err); err != nil {
			return err
		}
		return s.revokeAll(ctx, u.ID, caller)
	})
}

// expectRow returns err, or errStale if a statement that names the hash has found no row.
func expectRow(tag pgconn.CommandTag, err error) error {
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 {
		return errStale
	}
	return nil
}

// inTx runs fn in a transaction, and commits if fn returns no error. The isolation level is READ
// COMMITTED whatever the database's default is: a statement that has waited for a row lock must see
// the new row.
func (s *store) inTx(
	ctx context.Context,
	operation string,
	fn func(ctx context.Context, tx pgx.Tx) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, postgresTimeout)
	defer cancel()
	options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted}
	err := pgx.BeginTxFunc(ctx, s.db, options, func(tx pgx.Tx) error {
		return fn(ctx, tx)
	})
	return postgresError(operation, err)
}

// postgresError names the operation that failed. A PostgreSQL that did not answer, or that cannot
// serve just now, is errUnavailable; an error that it reports otherwise is errFault. The errors of
// this file, those of redisError among them, pass as they are.
func postgresError(operation string, err error) error {
	own := []error{errUnavailable, errFault, errEmailExists, errNoUser, errEnded, errReused}
	for _, ours := range own {
		if errors.Is(err, ours) {
			return err
		}
	}
	var reported *pgconn.PgError
	var unreadable pgx.ScanArgError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reported) && !cannotServe(reported), errors.As(err, &unreadable):
		return fmt.Errorf("%w: postgres: %s: %v", errFault, operation, err)
	default:
		return fmt.Errorf("%w: postgres: %s: %v", errUnavailable, operation, err)
	}
}

// cannotServe reports whether an error of PostgreSQL says that it is there, but of no use just now.
// The first two characters of an SQLSTATE are its class.
func cannotServe(reported *pgconn.PgError) bool {
	switch reported.Code[:2] {
	case "08", "53", "57": // connection lost; resources exhausted; shutting down or starting
		return true
	}
	return reported.Code == "25006" // read-only: a primary that has become a standby
}

// Sessions

//go:embed session.lua
var sessionLua string

var (
	// sessionScript runs commands that need memory. A full Redis refuses it as a whole.
	sessionScript = redis.NewScript("#!lua\n" + sessionLua)

	// releaseScript runs commands that only read or delete. A full Redis runs it.
	releaseScript = redis.NewScript("#!lua flags=allow-oom\n" + sessionLua)
)

// run runs a command of session.lua on the sessions of a user.
func (s *store) run(
	ctx context.Context,
	script *redis.Script,
	userID, command string,
	args ...any,
) *redis.Cmd {
	index := "user-sessions:{" + userID + "}"
	return script.Run(ctx, s.rdb, []string{index}, append([]any{command}, args...)...)
}

// digest returns what binds a session to a password hash: 64 bits of its SHA-256 in hex.
func digest(hash string) string {
	sum := sha256.Sum256([]byte(hash))
	return hex.EncodeToString(sum[:8])
}

// startSession opens a session of u that is bound to u.PasswordHash.
func (s *store) startSession(
	ctx context.Context,
	u user,
	sessionID, tokenID string,
	from device,
) (grant, error) {
	reply, err := s.run(ctx, sessionScript, u.ID, "start",
		sessionID,
		tokenID,
		digest(u.PasswordHash),
		s.policy.RefreshTTL.Seconds(),
		s.policy.SessionTTL.Seconds(),
		from.IP,
		from.UserAgent,
	).StringSlice()
	if err != nil {
		return grant{}, redisError("start session", err)
	}
	return parseGrant(sessionID, reply)
}

// refresh exchanges a refresh token and returns its user and its successor. It returns errEnded if
// the session is over, errReused for a token that was exchanged within the leeway, and errTheft for
// one that was exchanged before that, whose session is over now.
func (s *store) refresh(ctx context.Context, x exchange) (user, grant, error) {
	// PostgreSQL is asked first, so that no token is used up while it is down.
	u, err := s.findUserByID(ctx, x.UserID)
	if errors.Is(err, errNoUser) {
		return user{}, grant{}, s.endSession(ctx, x)
	}
	if err != nil {
		return user{}, grant{}, err
	}
	g, err := s.rotate(ctx, x, u.PasswordHash)
	if errors.Is(err, errStale) {
		g, err = s.refreshLocked(ctx, x)
	}
	return u, g, err
}

// refreshLocked looks again at a session that is bound to another hash than the one just read. The
// share lock waits for a change under way and keeps the next one out until the scripts have run. So
// a rehash under way ends nothing, and a session of another password ends.
func (s *store) refreshLocked(ctx context.Context, x exchange) (grant, error) {
	var g grant
	err := s.inTx(ctx, "refresh", func(ctx context.Context, tx pgx.Tx) error {
		hash, err := lockHash(ctx, tx, x.UserID)
		if errors.Is(err, errNoUser) {
			return s.endSession(ctx, x)
		}
		if err != nil {
			return err
		}
		g, err = s.rotate(ctx, x, hash)
		if errors.Is(err, errStale) {
			return s.endSession(ctx, x)
		}
		return err
	})
	if g != (grant{}) {
		return g, nil // the token is exchanged, and a commit that fails only loses the lock
	}
	return g, err
}

// endSession ends the session of x and returns errEnded.
func (s *store) endSession(ctx context.Context, x exchange) error {
	err := s.revoke(ctx, x.UserID, x.SessionID)
	if err != nil && !errors.Is(err, errNoSession) {
		return err
	}
	return errEnded
}

// rotate runs the exchange on a session that must be bound to hash. If it is bound to another one,
// rotate changes nothing and returns errStale.
func (s *store) rotate(ctx context.Context, x exchange, hash string) (grant, error) {
	reply, err := s.run(ctx, sessionScript, x.UserID, "rotate",
		x.SessionID,
		x.Next,
		digest(hash),
		s.policy.RefreshTTL.Seconds(),
		s.policy.SessionTTL.Seconds(),
		x.Device.IP,
		x.Device.UserAgent,
		x.Shown,
		s.policy.Leeway.Milliseconds(),
		s.policy.Resend,
	).StringSlice()
	if err != nil {
		return grant{}, redisError("rotate session", err)
	}
	switch reply[0] {
	case "reused":
		return grant{}, errReused
	case "theft":
		return grant{}, errTheft
	case "ended":
		return grant{}, errEnded
	case "stale":
		return grant{}, errStale
	default: // rotated or resent
		return parseGrant(x.SessionID, reply)
	}
}

// parseGrant reads what session.lua says of a token that is honoured: an outcome, jti, iat and exp.
func parseGrant(sessionID string, reply []string) (grant, error) {
	if len(reply) != 4 {
		return grant{}, fmt.Errorf("session.lua: unexpected reply %q", reply)
	}
	issuedAt, iatErr := strconv.ParseInt(reply[2], 10, 64)
	expiresAt, expErr := strconv.ParseInt(reply[3], 10, 64)
	if err := errors.Join(iatErr, expErr); err != nil {
		return grant{}, fmt.Errorf("session.lua: %v", err)
	}
	return grant{
		SessionID: sessionID,
		TokenID:   reply[1],
		IssuedAt:  time.Unix(issuedAt, 0),
		ExpiresAt: time.Unix(expiresAt, 0),
		Resent:    reply[0] == "resent",
	}, nil
}

// checkSession returns errEnded if the user has no such session any more.
func (s *store) checkSession(ctx context.Context, userID, sessionID string) error {
	living, err := s.rdb.Exists(ctx, "session:{"+userID+"}:"+sessionID).Result()
	if err != nil {
		return redisError("check session", err)
	}
	if living == 0 {
		return errEnded
	}
	return nil
}

// listSessions returns the user's sessions, the one used last first.
func (s *store) listSessions(ctx context.Context, userID string) ([]session, error) {
	fields, err := s.run(ctx, releaseScript, userID, "list").StringSlice()
	if err != nil {
		return nil, redisError("list sessions", err)
	}
	var sessions []session
	for f := range slices.Chunk(fields, 5) {
		created, createdErr := strconv.ParseInt(f[1], 10, 64)
		used, usedErr := strconv.ParseInt(f[2], 10, 64)
		if err := errors.Join(createdErr, usedErr); err != nil {
			return nil, fmt.Errorf("session.lua: %v", err)
		}
		sessions = append(sessions, session{
			ID:         f[0],
			CreatedAt:  time.UnixMilli(created),
			LastUsedAt: time.UnixMilli(used),
			Device:     device{IP: f[3], UserAgent: f[4]},
		})
	}
	slices.SortStableFunc(sessions, func(a, b session) int {
		return b.LastUsedAt.Compare(a.LastUsedAt)
	})
	return sessions, nil
}

// revoke ends one of the user's sessions. It returns errNoSession if there is no such session.
func (s *store) revoke(ctx context.Context, userID, sessionID string) error {
	ended, err := s.run(ctx, releaseScript, userID, "revoke", sessionID).Int()
	if err != nil {
		return redisError("revoke session", err)
	}
	if ended == 0 {
		return errNoSession
	}
	return nil
}

// revokeAll ends every session of the user, the one of the caller among them.
func (s *store) revokeAll(ctx context.Context, userID, caller string) error {
	err := s.run(ctx, releaseScript, userID, "revoke_all", caller).Err()
	return redisError("revoke all sessions", err)
}

// outOfService matches what Redis reports when it is there, but of no use just now. A script that
// meets a slot on its way to another node of a cluster gets the error about a non local key.
var outOfService = regexp.MustCompile(`^(LOADING|BUSY|OOM|MISCONF|READONLY|MASTERDOWN|NOREPLICAS|` +
	`CLUSTERDOWN|TRYAGAIN|MOVED|ASK|ERR max number of clients)|attempted to access a non local key`)

// redisError names the operation that failed. A Redis that did not answer, or that is out of
// service, is errUnavailable; an error that it reports otherwise is errFault.
func redisError(operation string, err error) error {
	var reported redis.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reported) && !outOfService.MatchString(reported.Error()):
		return fmt.Errorf("%w: redis: %s: %v", errFault, operation, err)
	default:
		return fmt.Errorf("%w: redis: %s: %v", errUnavailable, operation, err)
	}
}

// Migrations

//go:embed schema.sql
var schemaSQL string

// migration is one step of schema.sql.
type migration struct {
	Version   string
	Name      string
	SQL       string
	Checksum  string
	AppliedAt time.Time // zero if it has not been applied
}

// parseMigrations splits a schema at its lines "-- migration: 0001 name".
func parseMigrations(schema string) []migration {
	var steps []migration
	for _, part := range strings.Split("\n"+schema, "\n-- migration: ")[1:] {
		title, sql, _ := strings.Cut(part, "\n")
		version, name, _ := strings.Cut(title, " ")
		sum := sha256.Sum256([]byte(sql))
		steps = append(steps, migration{
			Version:  version,
			Name:     name,
			SQL:      sql,
			Checksum: hex.EncodeToString(sum[:]),
		})
	}
	return steps
}

// migrate applies the steps of a schema that have not been applied, all of them or, on an error,
// none. It returns all steps.
func migrate(ctx context.Context, database *pgx.ConnConfig, schema string) ([]migration, error) {
	return inMigration(ctx, database, schema, applyMigrations)
}

// migrationStatus returns the steps of a schema and changes nothing.
func migrationStatus(
	ctx context.Context,
	database *pgx.ConnConfig,
	schema string,
) ([]migration, error) {
	return inMigration(ctx, database, schema, func(context.Context, pgx.Tx, []migration) error {
		return nil
	})
}

// inMigration compares a schema with what is on record, calls fn in the same transaction, and
// returns the steps. Closing the connection rolls back what fn has not committed. One replica at a
// time gets here, the others wait.
func inMigration(
	ctx context.Context,
	database *pgx.ConnConfig,
	schema string,
	fn func(ctx context.Context, tx pgx.Tx, steps []migration) error,
) ([]migration, error) {
	ctx, cancel := context.WithTimeout(ctx, migrationTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, database)
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: PostgreSQL cannot be reached: %v", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := checkEncoding(ctx, conn); err != nil {
		return nil, err
	}

	tx, err := conn.Begin(ctx)
	if err != nil {
		return nil, err
	}
	// The number is any that nobody else uses.
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(7236857230171)`); err != nil {
		return nil, err
	}
	steps, err := compareMigrations(ctx, tx, schema)
	if err != nil {
		return nil, err
	}
	if err := fn(ctx, tx, steps); err != nil {
		return nil, err
	}
	return steps, nil
}

// checkEncoding refuses a database that cannot hold every email address.
func checkEncoding(ctx context.Context, conn *pgx.Conn) error {
	var encoding string
	if err := conn.QueryRow(ctx, `SHOW server_encoding`).Scan(&encoding); err != nil {
		return err
	}
	if encoding != "UTF8" {
		return fmt.Errorf("DATABASE_URL: the encoding of the database is %s, not UTF8", encoding)
	}
	return nil
}

// compareMigrations returns the steps of a schema, those that are on record with their time. A step
// on record that the schema does not have, or has with another text, is an error.
func compareMigrations(ctx context.Context, tx pgx.Tx, schema string) ([]migration, error) {
	recorded, err := recordedMigrations(ctx, tx)
	if err != nil {
		return nil, err
	}
	steps := parseMigrations(schema)
	for i := range steps {
		step := &steps[i]
		record, applied := recorded[step.Version]
		if !applied {
			continue
		}
		if record.Checksum != step.Checksum {
			return nil, fmt.Errorf("migration %s %s: its text has changed since it was applied",
				step.Version, step.Name)
		}
		step.AppliedAt = record.AppliedAt
		delete(recorded, step.Version)
	}
	for _, unknown := range recorded {
		return nil, fmt.Errorf("migration %s %s was applied, but this version does not know it",
			unknown.Version, unknown.Name)
	}
	return steps, nil
}

// recordedMigrations returns what schema_migrations has on record, by version. It makes the table
// if it is not there; a role without the right to make one can still serve.
func recordedMigrations(ctx context.Context, tx pgx.Tx) (map[string]migration, error) {
	_, err := tx.Exec(ctx, `
		DO $$
		BEGIN
			IF to_regclass('schema_migrations') IS NULL THEN
				CREATE TABLE schema_migrations (
					version    text        PRIMARY KEY,
					name       text        NOT NULL,
					checksum   text        NOT NULL,
					applied_at timestamptz NOT NULL DEFAULT now()
				);
			END IF;
		END $$`)
	if err != nil {
		return nil, fmt.Errorf("create schema_migrations: %v", err)
	}
	rows, err := tx.Query(ctx, `
		SELECT version, name, checksum, applied_at
		FROM schema_migrations`)
	if err != nil {
		return nil, err
	}
	recorded := map[string]migration{}
	var m migration
	columns := []any{&m.Version, &m.Name, &m.Checksum, &m.AppliedAt}
	_, err = pgx.ForEachRow(rows, columns, func() error {
		recorded[m.Version] = m
		return nil
	})
	return recorded, err
}

// applyMigrations runs the steps that are not on record, puts them on record, and commits.
func applyMigrations(ctx context.Context, tx pgx.Tx, steps []migration) error {
	for i := range steps {
		step := &steps[i]
		if !step.AppliedAt.IsZero() {
			continue
		}
		if _, err := tx.Exec(ctx, step.SQL); err != nil {
			return fmt.Errorf("migration %s %s: %v", step.Version, step.Name, err)
		}
		_, err := tx.Exec(ctx, `
			INSERT INTO schema_migrations (version, name, checksum)
			VALUES ($1, $2, $3)`, step.Version, step.Name, step.Checksum)
		if err != nil {
			return err
		}
		step.AppliedAt = time.Now()
	}
	return tx.Commit(ctx)
}
