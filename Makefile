AIR = github.com/air-verse/air@v1.67.4
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0

help: ## show these lines
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

run dev: export NODE_ENV ?= development

run: go ## serve on http://localhost:3000, data in .data
	go build -o latchkey .
	scripts/with-services --keep .data ./latchkey

# The delay, in milliseconds, is how long a server that is told to stop may drain.
dev: go ## like run, rebuilt and restarted at every saved change
	scripts/with-services --keep .data go run $(AIR) -tmp_dir .data/air -build.include_ext go,sql,txt \
	    -build.exclude_dir .data,examples,integration,scripts -build.send_interrupt true -build.kill_delay 15000

test: go ## go vet and all tests, on a PostgreSQL and a Redis of their own
	go vet ./...
	@race=-race; [ "$$(go env CGO_ENABLED)" = 1 ] || { race=; echo "no C compiler here: the tests run without -race" >&2; }; \
	echo "go test $$race ./..."; scripts/with-services go test $$race ./...

bench: go ## the benchmarks
	scripts/with-services go test -run '^$$' -bench . -benchmem .

integration: go ## the tests that need Docker (and Chromium)
	go test -C integration ./...

check: go ## formatting, tidiness, staticcheck, known vulnerabilities
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt -w $$unformatted" >&2; exit 1; }
	go mod tidy -diff
	go run $(STATICCHECK) ./...
	go run $(GOVULNCHECK) ./...

# A Go from 1.21 on fetches the version that go.mod names; this speaks up where that cannot be had.
go:
	@case "$$(go env GOVERSION 2>/dev/null)" in go1.2[6-9]*|go1.[3-9][0-9]*|devel*) ;; \
	*) echo "Go 1.26 or newer is needed: https://go.dev/dl" >&2; go version >&2; exit 1 ;; esac

.PHONY: help run dev test bench integration check go
