// Package contract holds a server to its HTTP contract, promise by promise, over HTTP. It knows
// nothing of the server's inside, so it can be asked of any server behind the same contract.
//
// From the parent folder, make test runs it against a binary built from there, on a PostgreSQL and
// a Redis that it starts. On stores of your own it is
//
//	DATABASE_URL=… REDIS_URL=… go test -C contract -count=1 ./...
//
// where LATCHKEY_BINARY may name another executable to start. Each test starts the servers that it
// needs as processes, and uses databases of its own, which it drops, and Redis keys of its own. The
// servers send their mails to mail servers on this machine, which are a part of the tests.
//
// A server that is already running is asked by its URL:
//
//	LATCHKEY_BASE_URL=http://localhost:3000 go test -C contract -count=1 -v ./...
//
// It should trust X-Forwarded-For from here (TRUSTED_PROXIES), since every test is a client with an
// address of its own. What needs more than a URL is then skipped and says why, unless the tests are
// given the variables that configure the server (DATABASE_URL, REDIS_URL, JWT_SECRET, …) as well.
// Some promises are about the rate limit, which such a server should not have turned off.
//
// Mind the -count=1: the go command cannot see that the server has changed, and would show an old
// result.
package contract
