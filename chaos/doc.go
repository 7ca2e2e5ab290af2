// Package chaos holds the tests that really break the parts that Latchkey stands on: they kill
// PostgreSQL, Redis and the server itself, stop them with SIGSTOP, slow them down, cut their
// connections, empty them, fill them and make them read-only. All parts are real programs, and
// every one is a child process on 127.0.0.1.
//
// The tests need Linux, PostgreSQL from version 13 on, and Redis from version 7 on. With -short they
// try less. LATCHKEY_BINARY names the server to test. Without it, the server is built from the
// folder above. TestMatrix writes its table to the file that -matrix names.
package chaos
