AIR = github.com/air-verse/air@v1.67.4

# The race detector needs a C compiler.
RACE = $(if $(filter 1,$(shell go env CGO_ENABLED)),-race)

help: ## show these lines
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

run dev: export NODE_ENV ?= development

run: go ## serve on http://localhost:3000, with the data in .data
	go build -o latchkey .
	scripts/with-services --keep .data ./latchkey

# The kill_delay is the time in milliseconds that the server has for draining. air starts the server
# through a shell, which exec replaces: otherwise air would send both a signal, one after the other,
# and the second would cut the draining short.
dev: go ## like run, but rebuild and restart at every saved change
	scripts/with-services --keep .data go run $(AIR) \
	    -tmp_dir .data/air \
	    -build.include_ext go,sql,lua,tmpl,txt \
	    -build.exclude_dir .data,bench,chaos,clients,contract,examples,integration,scripts,spec \
	    -build.full_bin 'exec .data/air/main' \
	    -build.send_interrupt true \
	    -build.kill_delay 15000

# The contract's tests build the server and run it on the same PostgreSQL and Redis.
test: go ## go vet, all tests, and the HTTP contract held against the server
	$(if $(RACE),,@echo "There is no C compiler here: the tests run without -race." >&2)
	go vet ./...
	scripts/with-services sh -exc 'go test $(RACE) ./...; go test -C contract -count=1 ./...'

check: go ## what needs no server: formatting, linters, complexity, known vulnerabilities
	scripts/check

spec: ## the model of the sessions' protocol, and faults in it, which needs spin and gcc
	spec/check
	spec/faults

bench: go ## the benchmarks
	scripts/with-services go test -run '^$$' -bench . -benchtime 500x .
	go test -C bench -bench .

chaos: go ## break the stores and the servers, and print what happened
	PATH="$$PATH:/usr/sbin" go test -C chaos -count=1 -timeout 60m -v ./...

clients: go ## clients in Go, TypeScript and React, which need npm and Chromium
	scripts/with-services go test -C clients -count=1 ./...

integration: go ## the tests of the image, Compose, a cluster and the browser, which need Docker
	go test -C integration -count=1 -timeout 25m ./...

# Any Go from 1.21 on fetches the version that go.mod names. This fails early where it cannot.
go:
	@case "$$(go env GOVERSION 2>/dev/null)" in \
	go1.2[6-9]* | go1.[3-9][0-9]* | devel*) ;; \
	*) \
	    echo "Latchkey needs Go 1.26 or newer: https://go.dev/dl" >&2; \
	    go version >&2; \
	    exit 1 ;; \
	esac

.PHONY: help run dev test check spec bench chaos clients integration go
