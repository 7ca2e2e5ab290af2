AIR = github.com/air-verse/air@v1.67.4

help: ## show these lines
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

run dev: export NODE_ENV ?= development

run: go ## serve on http://localhost:3000, data in .data
	go build -o latchkey .
	scripts/with-services --keep .data ./latchkey

# air's delay, in milliseconds, is how long the server may drain. Without the exec air signals a shell
# and the server one after the other, and the second signal would cut the draining short.
dev: go ## like run, rebuilt and restarted at every saved change
	scripts/with-services --keep .data go run $(AIR) -tmp_dir .data/air -build.include_ext go,sql,lua,txt \
	    -build.exclude_dir .data,examples,integration,scripts -build.full_bin 'exec .data/air/main' \
	    -build.send_interrupt true -build.kill_delay 15000

test: go ## go vet and all tests, on a PostgreSQL and a Redis of their own
	go vet ./...
	@race=-race; [ "$$(go env CGO_ENABLED)" = 1 ] || { race=; echo "no C compiler here: the tests run without -race" >&2; }; \
	echo "go test $$race ./..."; scripts/with-services go test $$race ./...

bench: go ## the benchmarks
	scripts/with-services go test -run '^$$' -bench . -benchtime 500x .
	go test -C bench -bench .

integration: go ## the tests of the whole, with Docker and Chromium
	go test -C integration -count=1 -timeout 15m ./...

check: go ## formatting, tidiness, staticcheck, known vulnerabilities, shellcheck
	scripts/check

# A Go from 1.21 on fetches the version that go.mod names; this speaks up where that cannot be had.
go:
	@case "$$(go env GOVERSION 2>/dev/null)" in go1.2[6-9]*|go1.[3-9][0-9]*|devel*) ;; \
	*) echo "Go 1.26 or newer is needed: https://go.dev/dl" >&2; go version >&2; exit 1 ;; esac

.PHONY: help run dev test bench integration check go
