package clients

import (
	"crypto/rand"
	"strings"
	"testing"
)

// TestTypeScript holds two files to the types that openapi-typescript has generated from
// openapi.yaml, and runs one of them.
func TestTypeScript(t *testing.T) {
	needNPM(t)
	run(t, "typescript", nil, "../node_modules/.bin/tsc")
	url, email := serve(t), newEmail()
	got := run(t, "typescript", nil, "node", "build/main.js", url, email)
	if got != email+"\n" {
		t.Errorf("the account is %q, want %s", got, email)
	}
}

// TestGo generates a package from openapi.yaml, and runs the program that uses it.
func TestGo(t *testing.T) {
	run(t, "go", nil, "go", "generate")
	run(t, "go", nil, "go", "mod", "tidy", "-diff")
	run(t, "go", nil, "go", "vet", "./...")
	url, email := serve(t), newEmail()
	got := run(t, "go", nil, "go", "run", ".", url, email)
	if got != email+"\n" {
		t.Errorf("the account is %q, want %s", got, email)
	}
}

// newEmail is an address that has no account yet.
func newEmail() string { return strings.ToLower(rand.Text()) + "@example.com" }
