package contract

import (
	"context"
	"crypto/rand"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// stores are a PostgreSQL database and a Redis.
type stores struct {
	databaseURL string
	redisURL    string
	sql         *pgxpool.Pool
	redis       *redis.Client
}

func openStores(t *testing.T, databaseURL, redisURL string) *stores {
	t.Helper()
	st := &stores{databaseURL: databaseURL, redisURL: redisURL}
	options, err := redis.ParseURL(redisURL)
	if err != nil {
		t.Fatal("REDIS_URL is no URL of a single Redis")
	}
	st.redis = redis.NewClient(options)
	t.Cleanup(func() { st.redis.Close() })
	if st.sql, err = pgxpool.New(t.Context(), databaseURL); err != nil {
		t.Fatal("DATABASE_URL cannot be read")
	}
	t.Cleanup(st.sql.Close)
	return st
}

// newStores makes an empty database, which is dropped when the test ends. The Redis is the one of
// REDIS_URL, which may be in use by others: a test touches no keys but those of its own users and
// addresses.
func newStores(t *testing.T, options ...string) *stores {
	t.Helper()
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil || u.Host == "" && u.RawQuery == "" {
		t.Fatal("DATABASE_URL is no URL")
	}
	name := "latchkey_contract_" + strings.ToLower(rand.Text())
	onServer(t, "CREATE DATABASE "+name+" "+strings.Join(options, " "))
	t.Cleanup(func() { onServer(t, "DROP DATABASE "+name+" WITH (FORCE)") })
	u.Path = "/" + name
	return openStores(t, u.String(), os.Getenv("REDIS_URL"))
}

// onServer executes SQL in the database of DATABASE_URL.
func onServer(t *testing.T, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatalf("DATABASE_URL: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// exec executes SQL behind the server's back.
func (s *server) exec(sql string, args ...any) {
	s.Helper()
	if _, err := s.stores.sql.Exec(s.Context(), sql, args...); err != nil {
		s.Fatalf("%s: %v", sql, err)
	}
}

// query returns the one value that a query yields, as text.
func (s *server) query(sql string, args ...any) (text string) {
	s.Helper()
	if err := s.stores.sql.QueryRow(s.Context(), sql, args...).Scan(&text); err != nil {
		s.Fatalf("%s: %v", sql, err)
	}
	return text
}

// passwordHash is the hash that PostgreSQL has of the user's password.
func (c *client) passwordHash() string {
	c.s.Helper()
	return c.s.query("SELECT password_hash FROM users WHERE id = $1", c.id)
}

// keys are the names of the keys that match a pattern of Redis.
func (s *server) keys(pattern string) (names []string) {
	s.Helper()
	iter := s.stores.redis.Scan(s.Context(), 0, pattern, 1000).Iterator()
	for iter.Next(s.Context()) {
		names = append(names, iter.Val())
	}
	if err := iter.Err(); err != nil {
		s.Fatal(err)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// ttl is a key's time to live, which every key has.
func (s *server) ttl(key string) time.Duration {
	s.Helper()
	ttl, err := s.stores.redis.PTTL(s.Context(), key).Result()
	if err != nil || ttl <= 0 {
		s.Errorf("%s has the TTL %v (%v)", key, ttl, err)
	}
	return ttl
}

// evict deletes keys, as Redis does when it is short of memory. All of them must be there.
func (s *server) evict(keys ...string) {
	s.Helper()
	n, err := s.stores.redis.Del(s.Context(), keys...).Result()
	if err != nil || int(n) != len(keys) {
		s.Fatalf("of %q %d were there (%v)", keys, n, err)
	}
}
