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
	options, err := redis.ParseURL(redisURL)
	if err != nil {
		t.Fatal("REDIS_URL is no URL of a single Redis") // the error would show its password
	}
	sql, err := pgxpool.New(t.Context(), databaseURL)
	if err != nil {
		t.Fatal("DATABASE_URL cannot be read")
	}
	st := &stores{databaseURL, redisURL, sql, redis.NewClient(options)}
	t.Cleanup(func() {
		st.sql.Close()
		st.redis.Close()
	})
	return st
}

// newStores makes an empty database, which is dropped when the test ends. The Redis is that of
// REDIS_URL and may be in use by others: tests touch keys of their own users and addresses only.
func newStores(t *testing.T, options ...string) *stores {
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
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
	if _, err := s.stores.sql.Exec(s.Context(), sql, args...); err != nil {
		s.Fatalf("%s: %v", sql, err)
	}
}

// query returns the one value that a query yields, as text.
func (s *server) query(sql string, args ...any) (text string) {
	if err := s.stores.sql.QueryRow(s.Context(), sql, args...).Scan(&text); err != nil {
		s.Fatalf("%s: %v", sql, err)
	}
	return text
}

// keys are the names of the keys that match a pattern of Redis.
func (s *server) keys(pattern string) (names []string) {
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

// userKeys are all that Redis has of a user.
func (c *client) userKeys() []string { return c.s.keys("*{" + c.id + "}*") }

// ttl is a key's time to live, which every key has.
func (s *server) ttl(key string) time.Duration {
	ttl, err := s.stores.redis.PTTL(s.Context(), key).Result()
	if err != nil || ttl <= 0 {
		s.Errorf("%s has the TTL %v (%v)", key, ttl, err)
	}
	return ttl
}

// lasts asserts a key's time to live, give or take what a slow machine does to it.
func (s *server) lasts(key string, want time.Duration) {
	got := s.ttl(key)
	s.expect(got <= want+time.Second && got >= want-30*time.Second,
		"%s lives for %v, want %v", key, got, want)
}

// evict deletes keys, as Redis does when it is short of memory. All of them must be there.
func (s *server) evict(keys ...string) {
	n, err := s.stores.redis.Del(s.Context(), keys...).Result()
	if err != nil || int(n) != len(keys) {
		s.Fatalf("of %q %d were there (%v)", keys, n, err)
	}
}

// spoil puts a value of another type in a key's place.
func (s *server) spoil(key string) {
	s.evict(key)
	if err := s.stores.redis.Set(s.Context(), key, "spoilt", time.Minute).Err(); err != nil {
		s.Fatal(err)
	}
}
