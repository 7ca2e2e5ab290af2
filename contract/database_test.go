package contract

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/crypto/bcrypt"
)

// drizzle is the table that the Hono backend's ORM has made.
const drizzle = `CREATE TABLE users (
	id            uuid PRIMARY KEY DEFAULT gen_random_uuid() NOT NULL,
	email         text NOT NULL,
	password_hash text NOT NULL,
	created_at    timestamp DEFAULT now() NOT NULL,
	updated_at    timestamp DEFAULT now() NOT NULL,
	CONSTRAINT users_email_unique UNIQUE (email))`

// tables is all that a database has, to see that nothing was changed.
func (s *server) tables() string {
	return s.query(`SELECT coalesce(string_agg(line, ', ' ORDER BY line), '') FROM (
		SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable) AS line
		FROM information_schema.columns WHERE table_schema = 'public'
		UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public') AS lines`)
}

// inDatabase is the server's test on an empty database, before any server has migrated it.
func (s *server) inDatabase(options ...string) *server {
	alone := *s
	alone.stores = newStores(s.T, options...)
	return &alone
}

var databasePromises = []promise{
	{"the table users is as the mission has it, schema_migrations beside it", own,
		func(s *server) {
			s = s.startOn(newStores(s.T), nil)
			columns := s.query(`SELECT string_agg(
				concat_ws(' ', column_name, data_type, is_nullable), ', ' ORDER BY ordinal_position)
				FROM information_schema.columns WHERE table_name = 'users'`)
			s.expect(columns == "id uuid NO, email text NO, password_hash text NO, "+
				"created_at timestamp with time zone NO, updated_at timestamp with time zone NO, "+
				"email_verified_at timestamp with time zone YES, "+
				"disabled_at timestamp with time zone YES",
				"the columns are %s", columns)
			names := s.query(`SELECT string_agg(table_name, ' ' ORDER BY table_name)
				FROM information_schema.tables WHERE table_schema = 'public'`)
			s.expect(names == "schema_migrations users", "the tables are %s", names)
			const insert = "INSERT INTO users (email, password_hash) VALUES ('a@example.com', 'x')"
			s.exec(insert)
			_, err := s.stores.sql.Exec(s.Context(), insert)
			s.expect(err != nil, "email is not unique")
		}},
	{"an adopted table's users log in, in any case; its timestamps are read as UTC", own, adopts},
	{"adopted rows that differ only by case stop the start; a query lists them", own,
		stopsAtDuplicates},
	{"another's table of the same name stops the start, and stays as it is", own, func(s *server) {
		s = s.inDatabase()
		s.exec("CREATE TABLE users (id serial PRIMARY KEY, name text, email text)")
		before := s.tables()
		status, output := s.exits(s.stores.environment(nil))
		s.expect(status == 1 && output != "",
			"exit status %d, want 1 and a word why: %q", status, output)
		after := s.tables()
		s.expect(after == before, "the tables were\n%s\nand are\n%s", before, after)
	}},
	{"a database in another encoding than UTF-8 is refused at the start", own, func(s *server) {
		s = s.inDatabase("ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
		status, output := s.exits(s.stores.environment(nil))
		s.expect(status == 1 && strings.Contains(output, "LATIN1"),
			"exit status %d, want 1 and a word why:\n%s", status, output)
		tables := s.tables()
		s.expect(tables == "", "the server made %s", tables)
	}},
	{"any number of replicas may start at once", own, func(s *server) {
		st := newStores(s.T)
		servers := make(chan *server)
		for range 4 {
			go func() { servers <- s.startOn(st, nil) }()
		}
		for range 4 {
			(<-servers).signup().lives()
		}
	}},
	{"a password is kept as its bcrypt hash of BCRYPT_COST (12)", own, func(s *server) {
		for want, server := range map[int]*server{12: s.start(production), 4: s} {
			c := server.signup()
			hash := []byte(c.passwordHash())
			cost, err := bcrypt.Cost(hash)
			s.expect(cost == want && bcrypt.CompareHashAndPassword(hash, []byte(c.password)) == nil,
				"the hash is %s (%v), want one of the cost %d", hash, err, want)
		}
	}},
	{`users are looked up by an index, by lower(email COLLATE "C")`, stored, func(s *server) {
		tx, err := s.stores.sql.Begin(s.Context())
		if err != nil {
			s.Fatal(err)
		}
		defer tx.Rollback(context.Background())
		if _, err := tx.Exec(s.Context(), "SET LOCAL enable_seqscan = off"); err != nil {
			s.Fatal(err)
		}
		rows, err := tx.Query(s.Context(),
			`EXPLAIN SELECT id FROM users WHERE lower(email COLLATE "C") = 'x'`)
		if err != nil {
			s.Fatal(err)
		}
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		s.expect(err == nil && strings.Contains(fmt.Sprint(plan), "Index Cond"),
			"the plan is %q (%v)", plan, err)
	}},
	{"a row that cannot be read is 500, and no outage that a client should wait for", own,
		func(s *server) {
			s = s.inDatabase()
			s.exec(strings.Replace(drizzle, "timestamp DEFAULT now() NOT NULL", "timestamp", 1))
			s = s.startOn(s.stores, nil)
			email := newEmail()
			s.exec("INSERT INTO users (email, password_hash) VALUES ($1, '')", email)
			s.guess(email, newIP()).refused("internal")
		}},
}

func adopts(s *server) {
	s = s.inDatabase()
	s.exec(drizzle)
	name := s.query("SELECT current_database()")
	s.exec("ALTER DATABASE " + name + " SET timezone TO 'America/New_York'")
	password := newPassword()
	hash := strings.Replace(bcryptHash(password, 10), "$2a$", "$2b$", 1) // as Node calls the same
	s.exec(`INSERT INTO users (email, password_hash, created_at) VALUES
		('Ada.Lovelace`+strings.ToUpper(emailMark)+`', $1, '2024-03-10 02:30:00.123')`, hash)
	s = s.startOn(s.stores, env{
		"DATABASE_URL":    s.stores.databaseURL + "&TimeZone=Asia/Tokyo",
		"LOGIN_LIMIT_MAX": "1",
	})

	c := s.newUser()
	c.email, c.password = " ada.lovelace"+strings.ToUpper(emailMark), password
	c = c.login()
	c.lives()
	created := s.isTime(c.me(c.access).ok().str("user", "createdAt"))
	s.expect(created.Equal(time.Date(2024, 3, 10, 2, 30, 0, 123_000_000, time.UTC)),
		"createdAt is %v, want the row's in UTC", created)
	s.trySignup(c.email, newPassword()).refused("email_exists")
	next := newPassword()
	c.changePassword(password, next).ok()
	c.lives()
	// A new row's default now() is in the database's time zone, but its createdAt is not.
	fresh := s.signup()
	s.isNow(fresh.me(fresh.access).ok().str("user", "createdAt"))
	row := s.query(`SELECT (created_at - now() AT TIME ZONE 'UTC' > '-1 min')::text || ' ' ||
		pg_typeof(created_at) FROM users WHERE id = $1`, fresh.id)
	s.expect(row == "true timestamp without time zone",
		"the new row's created_at is now in UTC: %s", row)
	c.deleteAccount(password).refused("invalid_credentials")
	c.tryLogin().refused("too_many_attempts") // it is one account, in whatever case it is written
	c = c.elsewhere()
	c.deleteAccount(next).ok()
}

func stopsAtDuplicates(s *server) {
	s = s.inDatabase()
	s.exec(drizzle)
	s.exec(`INSERT INTO users (email, password_hash) VALUES
		('Two@example.com', 'x'), ('two@example.com', 'y'), ('one@example.com', 'z')`)
	before := s.tables()
	status, output := s.exits(s.stores.environment(nil))
	s.expect(status == 1 && !strings.Contains(strings.ToLower(output), "two@example.com"),
		"exit status %d, want 1 and no address:\n%s", status, output)
	after := s.tables()
	s.expect(after == before, "the tables were\n%s\nand are\n%s", before, after)
	_, query, _ := strings.Cut(output, "SELECT")
	query, _, _ = strings.Cut(query, ";")
	rows, err := s.stores.sql.Query(s.Context(), "SELECT"+query)
	if err != nil {
		s.Fatalf("the query is %q: %v", query, err)
	}
	listed, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
		values, err := row.Values()
		return fmt.Sprint(values), err
	})
	text := fmt.Sprint(listed)
	s.expect(err == nil && strings.Contains(text, "Two@example.com") &&
		strings.Contains(text, "two@example.com") && !strings.Contains(text, "one@example.com"),
		"the query lists %q (%v): %s", listed, err, query)
	s.exec("DELETE FROM users WHERE email = 'Two@example.com'")
	s.startOn(s.stores, nil).signup().lives() // mended, it starts
}
