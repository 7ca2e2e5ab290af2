package main

// store.go keeps users in PostgreSQL and sessions in Redis, and applies the migrations in
// schema.sql. Every call is bounded in time. The rules for sessions are in session.lua.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

var (
	// errUnavailable means that a store did not answer, or that it cannot serve at the moment.
	errUnavailable = errors.New("store unavailable")

	// errReadOnly is an errUnavailable: PostgreSQL takes no writes. Perhaps it was the primary, and
	// has become a standby.
	errReadOnly = fmt.Errorf("%w: read-only", errUnavailable)

	// errFault means that a store answered with an error that no outage explains.
	errFault = errors.New("store fault")

	errNoUser      = errors.New("no such user")
	errEmailExists = errors.New("email exists")
	errNoSession   = errors.New("no such session")
	errDisabled    = errors.New("account is disabled")
	errEnded       = errors.New("session has ended")
	errReused      = errors.New("refresh token was exchanged before")

	// errTheft is an errReused whose token was exchanged longer ago than the leeway.
	errTheft = fmt.Errorf("%w, and longer ago than the leeway", errReused)

	// errStale means that the user's password hash or email was replaced, or the user deleted,
	// after they were read. A request tries again with the new ones. If that fails several times,
	// it is answered with 503.
	errStale = fmt.Errorf("%w: the user was changed meanwhile", errUnavailable)
)

// user is a row of the table users.
type user struct {
	ID           string
	Email        string
	PasswordHash string
	CreatedAt    time.Time
	UpdatedAt    time.Time // when the password or the email was changed last
	Verified     bool      // the user has shown that the email is theirs
	Disabled     bool      // an operator keeps the user from logging in
}

// device is the client that uses a session.
type device struct {
	IP        string
	UserAgent string
}

// session is what a user may see of a session.
type session struct {
	ID         string
	CreatedAt  time.Time
	LastUsedAt time.Time
	Device     device
}

// newSession describes a session that is to be opened.
type newSession struct {
	ID      string
	TokenID string // of its first refresh token
	Device  device
}

// exchange describes a refresh: a session's refresh token Shown is replaced by Next.
type exchange struct {
	UserID    string
	SessionID string
	Shown     string
	Next      string
	Device    device
}

// grant is the refresh token that a session accepts.
type grant struct {
	SessionID string
	TokenID   string
	IssuedAt  time.Time
	ExpiresAt time.Time
	Resent    bool // the client may have received this token before
}

// sessionPolicy says how long sessions live, and what happens if a token is used twice. The TTLs
// are in whole seconds.
type sessionPolicy struct {
	RefreshTTL time.Duration // of a refresh token
	SessionTTL time.Duration // of a session, no matter how often it is refreshed
	Leeway     time.Duration // how long after its exchange a reused token counts as a race
	Resend     bool          // answer the token exchanged last with its successor, within Leeway
}

// store keeps users and sessions.
type store struct {
	db              *pgxpool.Pool
	rdb             redis.UniversalClient
	policy          sessionPolicy
	postgresTimeout time.Duration // of one operation on PostgreSQL, a whole transaction included
	resetAt         atomic.Int64  // the Unix second in which db was last reset
}

// postgresReady returns an error unless PostgreSQL takes writes. A server that is read-only refuses
// FOR UPDATE, even where it locks no row.
func (s *store) postgresReady(ctx context.Context) error {
	return s.inTx(ctx, "ready", func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			SELECT
			FROM users
			WHERE false
			FOR UPDATE`)
		return postgresError("ready", err)
	})
}

// redisReady returns an error unless Redis takes writes. Redis refuses to begin a script of this
// kind if it could not carry out its writes, although this one has none. In a cluster it asks the
// node of a random slot.
func (s *store) redisReady(ctx context.Context) error {
	return redisError("ready", s.run(ctx, sessionScript, rand.Text(), "ready").Err())
}

// Users

// findUserByID returns the user with this id, or errNoUser.
func (s *store) findUserByID(ctx context.Context, id string) (user, error) {
	return s.findUser(ctx, `
		SELECT `+userColumns+`
		FROM users
		WHERE id = $1::uuid`, id)
}

// findUserByEmail returns the user with this normalized email, or errNoUser.
func (s *store) findUserByEmail(ctx context.Context, email string) (user, error) {
	if strings.ContainsRune(email, 0) {
		return user{}, errNoUser // PostgreSQL does not accept NUL in a text
	}
	return s.findUser(ctx, `
		SELECT `+userColumns+`
		FROM users
		WHERE lower(email COLLATE "C") = $1`, email)
}

// usersPage bounds how many users are in memory at the same time while all of them are listed.
const usersPage = 1000

// listUsers returns users whose email begins with prefix and comes after another email, in the
// order of the emails. Case does not count. It returns at most usersPage users. The first page
// comes after "".
func (s *store) listUsers(ctx context.Context, prefix, after string) ([]user, error) {
	ctx, cancel := context.WithTimeout(ctx, s.postgresTimeout)
	defer cancel()
	// U+10FFFF is the last code point and will never be a character. So all emails that begin with
	// a prefix come before the prefix with that code point behind it.
	rows, err := s.db.Query(ctx, `
		SELECT `+userColumns+`
		FROM users
		WHERE
			lower(email COLLATE "C") > lower($2::text COLLATE "C")
			AND lower(email COLLATE "C") >= lower($1::text COLLATE "C")
			AND lower(email COLLATE "C") < lower($1::text COLLATE "C") || chr(1114111)
		ORDER BY lower(email COLLATE "C")
		LIMIT $3`, prefix, after, usersPage)
	if err != nil {
		return nil, postgresError("list users", err)
	}
	users, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (user, error) {
		return scanUser(row)
	})
	return users, postgresError("list users", err)
}

func (s *store) findUser(ctx context.Context, query, key string) (user, error) {
	ctx, cancel := context.WithTimeout(ctx, s.postgresTimeout)
	defer cancel()
	u, err := scanUser(s.db.QueryRow(ctx, query, key))
	if errors.Is(err, pgx.ErrNoRows) {
		return user{}, errNoUser
	}
	return u, postgresError("find user", err)
}

// userColumns are what scanUser reads.
const userColumns = `id::text, email, password_hash, created_at, updated_at,
			email_verified_at IS NOT NULL, disabled_at IS NOT NULL`

func scanUser(row pgx.Row) (user, error) {
	var u user
	err := row.Scan(
		&u.ID,
		&u.Email,
		&u.PasswordHash,
		&u.CreatedAt,
		&u.UpdatedAt,
		&u.Verified,
		&u.Disabled,
	)
	return u, err
}

// normalizeEmail trims an email and lower-cases its ASCII letters, which is also all that
// PostgreSQL lower-cases under the collation "C".
func normalizeEmail(email string) string {
	return strings.Map(func(r rune) rune {
		if r <= unicode.MaxASCII {
			return unicode.ToLower(r)
		}
		return r
	}, strings.TrimSpace(email))
}

// newUser describes a user to be created. Its id is not left to PostgreSQL, because inUserTx needs
// it before the row is inserted.
type newUser struct {
	ID           string
	Email        string
	PasswordHash string
}

// createUser inserts a user and opens the first session. The user is committed only if the session
// was opened. createUser returns errEmailExists if the email is taken.
func (s *store) createUser(
	ctx context.Context,
	created newUser,
	first newSession,
) (user, grant, error) {
	var u user
	var g grant
	err := s.inUserTx(ctx, "create user", created.ID, func(ctx context.Context, tx pgx.Tx) error {
		var err error
		u, err = scanUser(tx.QueryRow(ctx, `
			INSERT INTO users (id, email, password_hash)
			VALUES ($1::uuid, $2, $3)
			RETURNING `+userColumns,
			created.ID, created.Email, created.PasswordHash))
		if isEmailTaken(err) {
			return errEmailExists
		}
		if err != nil {
			return postgresError("insert user", err)
		}
		g, err = s.startSession(ctx, u, first)
		return err
	})
	return u, g, err
}

// isEmailTaken reports whether err is a violation of a unique constraint on users.email. In an
// adopted table that constraint may have any name, so all but the primary key count.
func isEmailTaken(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) &&
		pg.Code == "23505" && // unique_violation
		pg.TableName == "users" &&
		pg.ConstraintName != "users_pkey"
}

// openSession opens a session for a user whose password has just matched u.PasswordHash. It returns
// errStale if the user has another hash by now or is gone, and errDisabled if the user is disabled.
// The session is opened under a share lock on the user's row. So a password change, or disabling
// the user, is either seen here, or it ends this session too.
func (s *store) openSession(ctx context.Context, u user, opened newSession) (grant, error) {
	var g grant
	err := s.inUserTx(ctx, "open session", u.ID, func(ctx context.Context, tx pgx.Tx) error {
		locked, err := lockUser(ctx, tx, u.ID)
		switch {
		case errors.Is(err, errNoUser):
			return errStale
		case err != nil:
			return err
		case locked.PasswordHash != u.PasswordHash:
			return errStale
		case locked.Disabled:
			return errDisabled
		}
		g, err = s.startSession(ctx, u, opened)
		return err
	})
	return g, err
}

// lockUser returns a user and locks the row, so that nobody changes it until tx ends. FOR KEY SHARE
// would not be enough: an UPDATE of the hash does not wait for it.
func lockUser(ctx context.Context, tx pgx.Tx, userID string) (user, error) {
	u, err := scanUser(tx.QueryRow(ctx, `
		SELECT `+userColumns+`
		FROM users
		WHERE id = $1::uuid
		FOR SHARE`, userID))
	if errors.Is(err, pgx.ErrNoRows) {
		return user{}, errNoUser
	}
	return u, postgresError("lock user", err)
}

// changePassword replaces the password hash of u and ends all sessions except keep. It returns
// errStale if the user has another hash than u.PasswordHash by now.
func (s *store) changePassword(ctx context.Context, u user, hash, keep string) error {
	return s.inUserTx(ctx, "change password", u.ID, func(ctx context.Context, tx pgx.Tx) error {
		if err := replaceHash(ctx, tx, u, hash); err != nil {
			return err
		}
		err := s.run(ctx, sessionScript, u.ID, "change_password", keep, digest(hash)).Err()
		return redisError("change password", err)
	})
}

// rehash replaces the password hash of u by another hash of the same password. All sessions go on.
// It returns errStale if the user has another hash than u.PasswordHash by now.
func (s *store) rehash(ctx context.Context, u user, hash string) error {
	return s.inUserTx(ctx, "rehash", u.ID, func(ctx context.Context, tx pgx.Tx) error {
		if err := replaceHash(ctx, tx, u, hash); err != nil {
			return err
		}
		from := digest(u.PasswordHash)
		err := s.run(ctx, sessionScript, u.ID, "rehash", from, digest(hash)).Err()
		return redisError("rehash", err)
	})
}

// replaceHash updates the user's row and so locks it until tx ends. Nobody sees the new hash before
// the commit.
func replaceHash(ctx context.Context, tx pgx.Tx, u user, hash string) error {
	tag, err := tx.Exec(ctx, `
		UPDATE users
		SET password_hash = $3, updated_at = now()
		WHERE id = $1::uuid AND password_hash = $2`, u.ID, u.PasswordHash, hash)
	return expectRow("update password hash", tag, err)
}

// resetPassword replaces the password hash of u and ends all sessions. If verifies is true, the
// user has also shown that the email is theirs. It returns errStale if the user has another hash or
// another email than u by now.
func (s *store) resetPassword(ctx context.Context, u user, hash string, verifies bool) error {
	return s.inUserTx(ctx, "reset password", u.ID, func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE users
			SET
				password_hash = $4,
				updated_at = now(),
				email_verified_at = CASE
					WHEN $5 THEN coalesce(email_verified_at, now())
					ELSE email_verified_at
				END
			WHERE id = $1::uuid AND password_hash = $2 AND email = $3`,
			u.ID, u.PasswordHash, u.Email, hash, verifies)
		if err := expectRow("reset password", tag, err); err != nil {
			return err
		}
		return s.revokeAll(ctx, u.ID, noSession)
	})
}

// verifyEmail marks the email of u as verified. It returns errStale if the user has another email
// by now.
func (s *store) verifyEmail(ctx context.Context, u user) (user, error) {
	return s.updateUser(ctx, "verify email", `
		UPDATE users
		SET email_verified_at = coalesce(email_verified_at, now())
		WHERE id = $1::uuid AND email = $2
		RETURNING `+userColumns, u.ID, u.Email)
}

// changeEmail replaces the email of u by one that the user has shown to be theirs. It returns
// errEmailExists if another user has it, and errStale if the user has another hash or another email
// than u by now.
func (s *store) changeEmail(ctx context.Context, u user, email string) (user, error) {
	return s.updateUser(ctx, "change email", `
		UPDATE users
		SET email = $4, email_verified_at = now(), updated_at = now()
		WHERE id = $1::uuid AND email = $2 AND password_hash = $3
		RETURNING `+userColumns, u.ID, u.Email, u.PasswordHash, email)
}

// updateUser executes a statement that changes one user and returns the new row. It returns
// errStale if the statement matches no row.
func (s *store) updateUser(ctx context.Context, operation, sql string, args ...any) (user, error) {
	var u user
	err := s.inTx(ctx, operation, func(ctx context.Context, tx pgx.Tx) error {
		var err error
		u, err = updateRow(ctx, tx, operation, sql, args...)
		return err
	})
	return u, err
}

// updateRow is updateUser in a transaction that does more.
func updateRow(
	ctx context.Context,
	tx pgx.Tx,
	operation, sql string,
	args ...any,
) (user, error) {
	u, err := scanUser(tx.QueryRow(ctx, sql, args...))
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return user{}, errStale
	case isEmailTaken(err):
		return user{}, errEmailExists
	}
	return u, postgresError(operation, err)
}

// deleteUser deletes u and ends all sessions, including the caller's. It returns errStale if the
// user has another hash than u.PasswordHash by now.
func (s *store) deleteUser(ctx context.Context, u user, caller string) error {
	return s.inUserTx(ctx, "delete user", u.ID, func(ctx context.Context, tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			DELETE FROM users
			WHERE id = $1::uuid AND password_hash = $2`, u.ID, u.PasswordHash)
		if err := expectRow("delete user", tag, err); err != nil {
			return err
		}
		return s.revokeAll(ctx, u.ID, caller)
	})
}

// disableUser keeps a user from logging in and ends all sessions. It returns the new row, or
// errStale if the user is gone. The row lock orders it against logins, as in changePassword.
func (s *store) disableUser(ctx context.Context, userID string) (user, error) {
	var u user
	err := s.inUserTx(ctx, "disable user", userID, func(ctx context.Context, tx pgx.Tx) error {
		var err error
		u, err = updateRow(ctx, tx, "disable user", `
			UPDATE users
			SET disabled_at = coalesce(disabled_at, now())
			WHERE id = $1::uuid
			RETURNING `+userColumns, userID)
		if err != nil {
			return err
		}
		return s.revokeAll(ctx, userID, noSession)
	})
	return u, err
}

// enableUser lets a user log in again. It returns the new row, or errStale if the user is gone.
func (s *store) enableUser(ctx context.Context, userID string) (user, error) {
	return s.updateUser(ctx, "enable user", `
		UPDATE users
		SET disabled_at = NULL
		WHERE id = $1::uuid
		RETURNING `+userColumns, userID)
}

// expectRow returns errStale if a statement matched no row, because the user was changed or
// deleted.
func expectRow(operation string, tag pgconn.CommandTag, err error) error {
	if err != nil {
		return postgresError(operation, err)
	}
	if tag.RowsAffected() == 0 {
		return errStale
	}
	return nil
}

// readCommitted is the isolation level of all transactions, whatever the database's default is. A
// statement that has waited for a lock must see what was committed meanwhile.
var readCommitted = pgx.TxOptions{IsoLevel: pgx.ReadCommitted}

// inUserTx is inTx for a transaction that also changes the sessions of a user. It first asks the
// node of Redis that has them for any answer. So if that node is silent, requests do not wait for
// it while they hold connections to PostgreSQL, which the users of other nodes need.
func (s *store) inUserTx(
	ctx context.Context,
	operation, userID string,
	fn func(ctx context.Context, tx pgx.Tx) error,
) error {
	if err := s.run(ctx, releaseScript, userID, "ready").Err(); err != nil {
		return redisError(operation, err)
	}
	return s.inTx(ctx, operation, fn)
}

// inTx runs fn in a transaction and commits it if fn returns no error. An error of fn is returned
// as it is.
func (s *store) inTx(
	ctx context.Context,
	operation string,
	fn func(ctx context.Context, tx pgx.Tx) error,
) error {
	ctx, cancel := context.WithTimeout(ctx, s.postgresTimeout)
	defer cancel()
	var fnErr error
	err := pgx.BeginTxFunc(ctx, s.db, readCommitted, func(tx pgx.Tx) error {
		fnErr = fn(ctx, tx)
		return fnErr
	})
	if errors.Is(fnErr, errReadOnly) {
		s.reconnect()
	}
	if fnErr != nil {
		return fnErr
	}
	return postgresError(operation, err)
}

// reconnect closes all connections to PostgreSQL, at most once a second. If the server at their end
// is no longer the primary, the next connections find the new one.
func (s *store) reconnect() {
	now := time.Now().Unix()
	if s.resetAt.Swap(now) != now {
		s.db.Reset()
	}
}

// postgresError turns an error of pgx into errUnavailable or errFault, and names the operation.
// It returns nil if err is nil.
func postgresError(operation string, err error) error {
	if err == nil {
		return nil
	}
	kind := errUnavailable
	var reported *pgconn.PgError
	var unreadable pgx.ScanArgError
	switch {
	case errors.As(err, &reported) && reported.Code == "25006": // read_only_sql_transaction
		kind = errReadOnly
	case errors.As(err, &reported) && !cannotServe(reported), errors.As(err, &unreadable):
		kind = errFault
	}
	cause := strings.ReplaceAll(err.Error(), "\n\t", " ") // pgx writes a line for each host
	return fmt.Errorf("%w: postgres: %s: %s", kind, operation, cause)
}

// cannotServe reports whether an error of PostgreSQL means that it cannot serve at the moment. The
// first two characters of an SQLSTATE are its class.
func cannotServe(reported *pgconn.PgError) bool {
	switch reported.Code[:2] {
	case "08", "53", "57": // connection lost; out of resources; shutting down or starting
		return true
	default:
		return false
	}
}

// Sessions

//go:embed session.lua
var sessionLua string

var (
	// sessionScript is for commands that need memory. A full Redis refuses to run it.
	sessionScript = redis.NewScript("#!lua\n" + sessionLua)

	// releaseScript is for commands that only read or delete. A full Redis runs it too.
	releaseScript = redis.NewScript("#!lua flags=allow-oom\n" + sessionLua)
)

// run executes a command of session.lua on the sessions of a user.
func (s *store) run(
	ctx context.Context,
	script *redis.Script,
	userID, command string,
	args ...any,
) *redis.Cmd {
	index := "user-sessions:{" + userID + "}"
	return script.Run(ctx, s.rdb, []string{index}, append([]any{command}, args...)...)
}

// digest shortens a text to 64 bits of its SHA-256, in hex. A session is bound to the digest of a
// password hash.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// startSession opens a session of u and binds it to u.PasswordHash.
func (s *store) startSession(ctx context.Context, u user, opened newSession) (grant, error) {
	reply, err := s.run(ctx, sessionScript, u.ID, "start",
		opened.ID,
		opened.TokenID,
		digest(u.PasswordHash),
		s.policy.RefreshTTL.Seconds(),
		s.policy.SessionTTL.Seconds(),
		opened.Device.IP,
		opened.Device.UserAgent,
	).StringSlice()
	if err != nil {
		return grant{}, redisError("start session", err)
	}
	return parseGrant(opened.ID, reply)
}

// refresh exchanges a refresh token. It returns the user and the token that replaces it. It returns
// errEnded if the session has ended or the user is gone or disabled, errReused if the token was
// exchanged within the leeway, and errTheft if it was exchanged longer ago, which also ends the
// session.
func (s *store) refresh(ctx context.Context, x exchange) (user, grant, error) {
	// PostgreSQL comes first, so that no token is used up while it is down.
	u, err := s.findUserByID(ctx, x.UserID)
	if errors.Is(err, errNoUser) || u.Disabled {
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

// refreshLocked repeats a refresh whose session is bound to another hash than the one just read. It
// takes the share lock, which waits for a change that is under way and keeps the next one out until
// the scripts have run. So a rehash under way ends no session, and if the hash still differs, the
// password has really changed and the session ends.
func (s *store) refreshLocked(ctx context.Context, x exchange) (grant, error) {
	var g grant
	err := s.inTx(ctx, "refresh", func(ctx context.Context, tx pgx.Tx) error {
		u, err := lockUser(ctx, tx, x.UserID)
		if errors.Is(err, errNoUser) || u.Disabled {
			return s.endSession(ctx, x)
		}
		if err != nil {
			return err
		}
		g, err = s.rotate(ctx, x, u.PasswordHash)
		if errors.Is(err, errStale) {
			return s.endSession(ctx, x)
		}
		return err
	})
	if g != (grant{}) {
		// The token was exchanged. A commit that fails changes nothing about that: it only had to
		// release the lock, and rotate opens no session.
		return g, nil
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

// rotate exchanges the token of a session that is bound to hash. If the session is bound to another
// hash, rotate changes nothing and returns errStale.
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

// parseGrant reads a reply of session.lua that grants a token: the outcome, jti, iat and exp.
func parseGrant(sessionID string, reply []string) (grant, error) {
	if len(reply) != 4 {
		return grant{}, fmt.Errorf("%w: session.lua: unexpected reply %q", errFault, reply)
	}
	issuedAt, iatErr := strconv.ParseInt(reply[2], 10, 64)
	expiresAt, expErr := strconv.ParseInt(reply[3], 10, 64)
	if err := errors.Join(iatErr, expErr); err != nil {
		return grant{}, fmt.Errorf("%w: session.lua: %v", errFault, err)
	}
	return grant{
		SessionID: sessionID,
		TokenID:   reply[1],
		IssuedAt:  time.Unix(issuedAt, 0),
		ExpiresAt: time.Unix(expiresAt, 0),
		Resent:    reply[0] == "resent",
	}, nil
}

// checkSession returns errEnded if the user has no such session. Its key is the session_key of
// session.lua.
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

// listSessions returns the user's sessions. The one that was used last comes first.
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
			return nil, fmt.Errorf("%w: session.lua: %v", errFault, err)
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

// noSession is the id of no session.
const noSession = ""

// revokeAll ends all sessions of the user, including the caller's.
func (s *store) revokeAll(ctx context.Context, userID, caller string) error {
	err := s.run(ctx, releaseScript, userID, "revoke_all", caller).Err()
	return redisError("revoke all sessions", err)
}

// reloadHook makes the client of a Redis Cluster load the map of slots again whenever a node does
// not answer, because another node may have taken over its slots. The client follows no redirects,
// so it does not learn of that otherwise.
type reloadHook struct {
	cluster *redis.ClusterClient
}

func (h reloadHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h reloadHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		var reported redis.Error
		if err != nil && !errors.As(err, &reported) {
			h.cluster.ReloadState(ctx) // in the background, one at a time
		}
		return err
	}
}

func (h reloadHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// sentinels know which Redis is the master.
type sentinels struct {
	clients []*redis.SentinelClient
	name    string        // of the master
	timeout time.Duration // of asking all of them
}

func newSentinels(options *redis.UniversalOptions, timeout time.Duration) *sentinels {
	s := &sentinels{
		name:    options.MasterName,
		timeout: timeout,
	}
	for _, addr := range options.Addrs {
		sentinel := options.Simple()
		sentinel.Addr = addr
		sentinel.DB = 0
		sentinel.Username = options.SentinelUsername
		sentinel.Password = options.SentinelPassword
		s.clients = append(s.clients, redis.NewSentinelClient(sentinel))
	}
	return s
}

// slots returns the map of a cluster whose only node is the master. It asks all sentinels at once.
// One that is cut off from the others, or was until now, may still name the master of before a
// failover. So the answer with the latest epoch counts.
func (s *sentinels) slots(ctx context.Context) ([]redis.ClusterSlot, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	answers := make([]namedMaster, len(s.clients))
	errs := make([]error, len(s.clients))
	var questions sync.WaitGroup
	for i, sentinel := range s.clients {
		questions.Go(func() {
			answers[i], errs[i] = s.ask(ctx, sentinel)
		})
	}
	questions.Wait()
	var latest namedMaster
	for _, master := range answers {
		if latest.addr == "" || master.epoch > latest.epoch {
			latest = master
		}
	}
	if latest.addr == "" {
		// Not %w: an error of a sentinel must not be taken for one of Redis.
		return nil, fmt.Errorf("none of %v names the master: %v", s.clients, errs)
	}
	nodes := []redis.ClusterNode{{Addr: latest.addr}}
	return []redis.ClusterSlot{{Start: 0, End: 16383, Nodes: nodes}}, nil
}

// namedMaster is the master as a sentinel knows it.
type namedMaster struct {
	addr  string
	epoch int // the number of the failover that made it the master
}

func (s *sentinels) ask(
	ctx context.Context,
	sentinel *redis.SentinelClient,
) (namedMaster, error) {
	// The epoch comes first. If a failover ends in between, the new master goes with the old epoch,
	// and the next answer is right. The other way round, the old master would go with the new one.
	info, err := sentinel.Master(ctx, s.name).Result()
	if err != nil {
		return namedMaster{}, err
	}
	// In the middle of a failover this is the new master, and info still has the old one.
	addr, err := sentinel.GetMasterAddrByName(ctx, s.name).Result()
	if err != nil {
		return namedMaster{}, err
	}
	if len(addr) != 2 {
		return namedMaster{}, fmt.Errorf("the answer is no address: %q", addr)
	}
	epoch, err := strconv.Atoi(info["config-epoch"])
	if err != nil {
		return namedMaster{}, fmt.Errorf("config-epoch: %v", err)
	}
	return namedMaster{addr: net.JoinHostPort(addr[0], addr[1]), epoch: epoch}, nil
}

// failoverClient is a client for the master that sentinels name. To go-redis it is a cluster of one
// node, whose map is loaded in the background. So requests do not wait for sentinels, and if all of
// them are away, the master is the one that they named last. go-redis has a failover client, too.
// But that asks a sentinel before each new connection, so there are none while sentinels are away.
type failoverClient struct {
	*redis.ClusterClient
	sentinels *sentinels
	stop      context.CancelFunc
}

// followMaster returns a client that asks the sentinels at an interval, although nobody may use it.
// Otherwise its first request after a failover would go to the old master, and that may be back and
// not know yet that it is a replica.
func followMaster(
	cluster *redis.ClusterClient,
	s *sentinels,
	interval time.Duration,
) *failoverClient {
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for ctx.Err() == nil {
			cluster.ReloadState(ctx) // in the background, one at a time
			select {
			case <-ticker.C:
			case <-ctx.Done():
			}
		}
	}()
	return &failoverClient{cluster, s, stop}
}

func (c *failoverClient) Close() error {
	c.stop()
	for _, sentinel := range c.sentinels.clients {
		_ = sentinel.Close()
	}
	return c.ClusterClient.Close()
}

var (
	// outOfService matches errors of Redis which mean that it cannot serve at the moment. A script
	// that needs a key while the key's slot moves to another node gets the error about a non local
	// key.
	outOfService = regexp.MustCompile(
		`^(LOADING|BUSY|OOM|MISCONF|READONLY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|` +
			`MOVED|ASK|ERR max number of clients)|attempted to access a non local key`)

	// loginRefused matches errors of Redis which mean that it does not accept our password.
	// Before that, Redis does not even read a command of more than ten words.
	loginRefused = regexp.MustCompile(`^(NOAUTH|WRONGPASS|ERR Protocol error: unauthenticated)`)
)

// redisError turns an error of go-redis into errUnavailable or errFault, and names the operation.
// It returns nil if err is nil.
func redisError(operation string, err error) error {
	var reported redis.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reported) && loginRefused.MatchString(reported.Error()):
		return fmt.Errorf("%w: redis: %s: check user and password in REDIS_URL: %v",
			errUnavailable, operation, err)
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

// migrate applies the steps of a schema that have not been applied yet. If one fails, none is
// applied. It returns all steps.
func migrate(ctx context.Context, database *pgx.ConnConfig, schema string) ([]migration, error) {
	return inMigration(ctx, database, schema, applyMigrations)
}

// migrationStatus returns the steps of a schema and leaves nothing changed.
func migrationStatus(
	ctx context.Context,
	database *pgx.ConnConfig,
	schema string,
) ([]migration, error) {
	return inMigration(ctx, database, schema, func(context.Context, pgx.Tx, []migration) error {
		return nil
	})
}

// inMigration compares a schema with the steps on record, calls fn in the same transaction, and
// returns the steps. Whatever fn does not commit is rolled back when the connection is closed. An
// advisory lock lets one replica at a time do this.
func inMigration(
	ctx context.Context,
	database *pgx.ConnConfig,
	schema string,
	fn func(ctx context.Context, tx pgx.Tx, steps []migration) error,
) ([]migration, error) {
	conn, err := pgx.ConnectConfig(ctx, database)
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: %w", postgresError("connect", err))
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := checkEncoding(ctx, conn); err != nil {
		return nil, err
	}

	tx, err := conn.BeginTx(ctx, readCommitted)
	if err != nil {
		return nil, postgresError("begin migration", err)
	}
	// The number has no meaning. It only has to be one that nobody else uses.
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(7236857230171)`); err != nil {
		return nil, postgresError("lock migrations", err)
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
		return fmt.Errorf("DATABASE_URL: %w", postgresError("read encoding", err))
	}
	if encoding != "UTF8" {
		return fmt.Errorf("DATABASE_URL: the encoding of the database is %s, not UTF8", encoding)
	}
	return nil
}

// compareMigrations returns the steps of a schema, with AppliedAt set for those on record. It is an
// error if the schema lacks a step that is on record, or has another text for it.
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

// recordedMigrations returns the steps in schema_migrations by version. It creates that table only
// if it is missing, so that afterwards a role without the right to create tables can serve.
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
		return nil, postgresError("create schema_migrations", err)
	}
	rows, err := tx.Query(ctx, `
		SELECT version, name, checksum, applied_at
		FROM schema_migrations`)
	if err != nil {
		return nil, postgresError("read schema_migrations", err)
	}
	recorded := map[string]migration{}
	var m migration
	columns := []any{&m.Version, &m.Name, &m.Checksum, &m.AppliedAt}
	_, err = pgx.ForEachRow(rows, columns, func() error {
		recorded[m.Version] = m
		return nil
	})
	return recorded, postgresError("read schema_migrations", err)
}

// applyMigrations runs the steps that are not on record, puts them on record, and commits.
func applyMigrations(ctx context.Context, tx pgx.Tx, steps []migration) error {
	for i := range steps {
		step := &steps[i]
		if !step.AppliedAt.IsZero() {
			continue
		}
		if _, err := tx.Exec(ctx, step.SQL); err != nil {
			operation := fmt.Sprintf("migration %s %s", step.Version, step.Name)
			return postgresError(operation, err)
		}
		_, err := tx.Exec(ctx, `
			INSERT INTO schema_migrations (version, name, checksum)
			VALUES ($1, $2, $3)`, step.Version, step.Name, step.Checksum)
		if err != nil {
			return postgresError("record migration", err)
		}
		step.AppliedAt = time.Now()
	}
	return postgresError("commit migrations", tx.Commit(ctx))
}
