package contract

import (
	"flag"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
)

// A promise is one sentence of the contract and the test that holds it.
type promise struct {
	says  string
	needs needs
	holds func(s *server)
}

// needs is what a promise takes besides the URL of a server.
type needs string

const (
	aURL    needs = ""
	own     needs = "servers of its own configuration: run without LATCHKEY_BASE_URL"
	stored  needs = "PostgreSQL and Redis: give DATABASE_URL and REDIS_URL"
	secrets needs = "the secrets: give JWT_SECRET and JWT_REFRESH_SECRET"
)

func (s *server) lacks(n needs) bool {
	switch n {
	case own:
		return s.lab == nil
	case stored:
		return s.stores == nil
	case secrets:
		return s.env["JWT_SECRET"] == "" || s.env["JWT_REFRESH_SECRET"] == ""
	}
	return false
}

const underLoad = "Under load"

// contract is the table: each promise once, by the sections of the contract.
var contract = []struct {
	section  string
	promises []promise
}{
	{underLoad, loadPromises},
	{"Routes", routePromises},
	{"Errors", errorPromises},
	{"Bodies", bodyPromises},
	{"Order of the checks", orderPromises},
	{"Tokens", tokenPromises},
	{"Rotation", rotationPromises},
	{"Revocation", revocationPromises},
	{"Redis keys", keyPromises},
	{"Limits on input", inputPromises},
	{"Rate limit", rateLimitPromises},
	{"Login limit", loginLimitPromises},
	{"Browser rules", browserPromises},
	{"Links by mail", linkPromises},
	{"Mail", mailPromises},
	{"SMTP", smtpPromises},
	{"Configuration", configurationPromises},
	{"Operators' subcommands", operatorPromises},
	{"Database", databasePromises},
	{"Log", logPromises},
	{"Metrics", metricsPromises},
}

// testedWhole is set once every promise was tested, none skipped or filtered out.
var testedWhole atomic.Bool

func TestMain(m *testing.M) {
	flag.Parse()
	lacking := os.Getenv("DATABASE_URL") == "" || os.Getenv("REDIS_URL") == ""
	if lacking && os.Getenv("LATCHKEY_BASE_URL") == "" {
		fmt.Fprintln(os.Stderr, "DATABASE_URL or REDIS_URL is missing: run `make test`")
		os.Exit(1)
	}
	// Most tests wait: for a process to start, a window to pass, a token to run out.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func TestContract(t *testing.T) {
	var server *server
	if base := os.Getenv("LATCHKEY_BASE_URL"); base != "" {
		server = peer(t, base)
	} else {
		server = newLab(t).start(nil)
	}
	var promises, tested atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d promises, %d tested", promises.Load(), tested.Load())
		testedWhole.Store(promises.Load() == tested.Load())
	})
	for _, section := range contract {
		promises.Add(int64(len(section.promises)))
		t.Run(section.section, func(t *testing.T) {
			// A peer may be busy with other things, and load would disturb the other promises.
			parallel := server.lab != nil && section.section != underLoad
			if parallel {
				t.Parallel()
			}
			for _, p := range section.promises {
				t.Run(p.says, func(t *testing.T) {
					if parallel {
						t.Parallel()
					}
					p.test(server.askedBy(t))
					tested.Add(1)
				})
			}
		})
	}
}

func (p promise) test(s *server) {
	if s.lacks(p.needs) {
		s.Skipf("needs %s", p.needs)
	}
	p.holds(s)
}
