AIR = github.com/air-verse/air@v1.67.4
run dev: export NODE_ENV ?= development

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

run: go ## the server on http://localhost:3000, its data in .data
	go build -o latchkey .
	scripts/with-services --keep .data ./latchkey

test: go ## go vet and every test, against a PostgreSQL and a Redis of their own
	go vet ./...
	@race=-race; [ "$$(go env CGO_ENABLED)" = 1 ] || { race=; echo "no C compiler: testing without -race" >&2; }; \
	set -x; scripts/with-services go test $$race ./...

# Go 1.21 and newer fetch the version that go.mod asks for.
go:
	@case "$$(go env GOVERSION 2>&1)" in \
	go1.2[6-9]*|go1.[3-9][0-9]*|devel*) ;; \
	*) echo "Go 1.26 or newer is needed (https://go.dev/dl), found: $$(go version 2>&1)" >&2; exit 1 ;; esac

.PHONY: help run test go
