// Package chaos holds the tests that really break the parts that Latchkey stands on: they kill
// PostgreSQL, Redis and the server itself, stop them with SIGSTOP, slow them down, cut their
// connections, empty them, fill them and make them read-only. All parts are real programs, and
// every one is a child process on 127.0.0.1. Only the mail server that they take away is a listener
// of the tests' own: it answers nothing, or less than a mail server would.
//
// The tests need Linux, PostgreSQL from version 13 on, and Redis from version 7 on. What needs
// PgBouncer, HAProxy or nginx is skipped where that is missing. LATCHKEY_BINARY names the server to
// test. Without it, the server is built from the folder above.
//
// With -short the tests try less. Other flags let a single test try more or something else:
//
//	-matrix FILE   TestMatrix writes its table to FILE
//	-rounds N      TestNothingLost kills N times
//	-restarts N    TestRollingRestart restarts each server N times
//	-delay D       TestRollingRestart runs with SHUTDOWN_DELAY=D
//	-soak D        TestSoak runs for D; without this flag it is skipped
package chaos
