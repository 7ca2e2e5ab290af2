package integration

import (
	"sync/atomic"
	"testing"
)

// A promise is one sentence of the contract, and the test that holds it.
type promise struct {
	says  string
	needs needs
	holds func(t *testing.T, s *server)
}

// needs is what a promise takes besides the URL of a server.
type needs string

const (
	aURL    needs = ""
	own     needs = "servers of its own configuration: run without LATCHKEY_BASE_URL"
	kept    needs = "PostgreSQL and Redis: give DATABASE_URL and REDIS_URL"
	secrets needs = "the secrets: give JWT_SECRET and JWT_REFRESH_SECRET"
)

func (s *server) lacks(n needs) bool {
	switch n {
	case own:
		return s.c == nil
	case kept:
		return s.st == nil
	case secrets:
		return s.env["JWT_SECRET"] == "" || s.env["JWT_REFRESH_SECRET"] == ""
	}
	return false
}

// contract is the table: each promise once, by the sections of the contract.
var contract = []struct {
	section  string
	promises []promise
}{
	{"Routes", routes},
	{"Errors", errorFormat},
	{"Order of the checks", orderOfChecks},
	{"Tokens", tokens},
	{"Rotation", rotation},
	{"Revocation", revocation},
	{"Limits on input", inputLimits},
	{"Rate limit", rateLimit},
	{"Login limit", loginLimit},
	{"Browser rules", browserRules},
	{"Configuration", configuration},
	{"Database", database},
	{"Outages", outages},
	{"Log", logging},
	{"Redis keys", redisKeys}, // last: it looks at what all the others have left
}

// contractRanWhole is set when every promise was tested, none skipped or filtered out.
var contractRanWhole atomic.Bool

func TestContract(t *testing.T) {
	var tested atomic.Int64
	promises := 0
	for _, section := range contract {
		promises += len(section.promises)
		t.Run(section.section, func(t *testing.T) {
			for _, p := range section.promises {
				t.Run(p.says, func(t *testing.T) {
					if suite.lacks(p.needs) {
						t.Skipf("needs %s", p.needs)
					}
					if p.needs == own { // mostly waiting: for containers, for windows to pass
						t.Parallel()
					}
					tested.Add(1)
					p.holds(t, suite)
				})
			}
		})
	}
	contractRanWhole.Store(tested.Load() == int64(promises))
	t.Logf("%d promises, %d tested", promises, tested.Load())
}
