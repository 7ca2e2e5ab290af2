// Package main measures ../jwt.go, which is linked into this folder, beside golang-jwt. It is a
// module of its own, so that the server does not need golang-jwt.
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var (
	key = []byte("a secret of thirty-three characters")
	now = time.Now()
)

// ours is what the server puts into an access token.
var ours = claims{
	UserID:    "7f6e5d4c-3b2a-4190-8f7e-6d5c4b3a2910",
	Email:     "someone@example.com",
	IssuedAt:  now.Unix(),
	ExpiresAt: now.Add(15 * time.Minute).Unix(),
	Subject:   "7f6e5d4c-3b2a-4190-8f7e-6d5c4b3a2910",
	SessionID: "0a1b2c3d-4e5f-4789-abcd-ef0123456789",
	TokenID:   "123e4567-e89b-42d3-a456-426614174000",
}

// theirs is the same in the types of golang-jwt.
var theirs = golangClaims{
	UserID:    ours.UserID,
	Email:     ours.Email,
	SessionID: ours.SessionID,
	RegisteredClaims: jwt.RegisteredClaims{
		Subject:   ours.Subject,
		ID:        ours.TokenID,
		IssuedAt:  jwt.NewNumericDate(time.Unix(ours.IssuedAt, 0)),
		ExpiresAt: jwt.NewNumericDate(time.Unix(ours.ExpiresAt, 0)),
	},
}

type golangClaims struct {
	UserID    string `json:"userId"`
	Email     string `json:"email"`
	SessionID string `json:"sid"`
	jwt.RegisteredClaims
}

// BenchmarkVerify verifies the same token with the same key and clock. golang-jwt makes those of our
// checks that it knows.
func BenchmarkVerify(b *testing.B) {
	token := keys{current: key}.sign(ours)
	parser := jwt.NewParser(
		jwt.WithValidMethods([]string{"HS256"}),
		jwt.WithExpirationRequired(),
		jwt.WithStrictDecoding(),
	)
	secret := func(*jwt.Token) (any, error) { return key, nil }
	compare(b, token,
		func() error {
			_, err := keys{current: key}.verify(token, time.Now())
			return err
		},
		func() error {
			_, err := parser.ParseWithClaims(token, &golangClaims{}, secret)
			return err
		})
}

// BenchmarkSign signs the same claims with the same key.
func BenchmarkSign(b *testing.B) {
	compare(b, keys{current: key}.sign(ours),
		func() error {
			keys{current: key}.sign(ours)
			return nil
		},
		func() error {
			_, err := jwt.NewWithClaims(jwt.SigningMethodHS256, theirs).SignedString(key)
			return err
		})
}

// compare reports the median time of one call of each, and how many times as long as ours the one
// of golang-jwt takes. They take turns, a hundred calls each, so that whatever else the machine does
// slows all of them down alike. The bare HMAC is what neither can do without.
func compare(b *testing.B, token string, ours, golangJWT func() error) {
	signed := []byte(token[:strings.LastIndexByte(token, '.')])
	bareHMAC := func() error {
		mac := hmac.New(sha256.New, key)
		mac.Write(signed)
		mac.Sum(nil)
		return nil
	}
	calls := []func() error{ours, golangJWT, bareHMAC}
	times := make([][]float64, len(calls))
	for b.Loop() {
		for i, call := range calls {
			times[i] = append(times[i], nanoseconds(b, call))
		}
	}
	for i, name := range []string{"latchkey", "golang-jwt", "bare-hmac"} {
		b.ReportMetric(median(times[i]), name+"-ns")
		b.ReportMetric(testing.AllocsPerRun(100, func() { _ = calls[i]() }), name+"-allocs")
	}
	b.ReportMetric(median(times[1])/median(times[0]), "x-as-fast")
	b.ReportMetric(0, "ns/op") // it would be of three hundred calls, and says nothing
}

// nanoseconds returns the mean time of a hundred calls.
func nanoseconds(b *testing.B, call func() error) float64 {
	start := time.Now()
	for range 100 {
		if err := call(); err != nil {
			b.Fatal(err)
		}
	}
	return float64(time.Since(start).Nanoseconds()) / 100
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
