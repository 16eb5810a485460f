# VLFoundry. `make` alone prints what there is.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup run test quick lint format accept bench wheel lock clean

# The lock file that .venv is made from: dev, core, gpu or bench.
LOCK ?= dev
# `make run PROFILE=base`, `make run SET="seed=1 contrastive.train.lr=1e-3"`
PROFILE ?=
SET ?=
# `make test TESTS=tests/flows`, `make accept SUBJECT=pipeline`
TESTS ?= tests
SUBJECT ?= pipeline
# how many test files run at a time
JOBS ?= 2

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv from requirements/$(LOCK).lock (every other target does it when needed)
	@scripts/bootstrap.sh $(LOCK)

run: setup ## run the whole pipeline (PROFILE=base, SET="key=value ...")
	@exec vlfoundry run $(if $(PROFILE),--profile $(PROFILE)) $(foreach s,$(SET),--set $(s))

test: setup ## run all tests (TESTS=path for some, JOBS=n at a time)
	@python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

quick: setup ## run what takes less than a minute altogether (no ranks, no processes that train)
	@python -m pytest -n $(JOBS) --dist loadfile -m "not accept and not slow and not dist" $(TESTS)

lint: setup ## ruff, types, layers
	@ruff check .
	@ruff format --check .
	@pyrefly check
	@lint-imports

format: setup ## let ruff rewrite what it can
	@ruff check --fix .
	@ruff format .

accept: setup ## run the long acceptance checks of SUBJECT (pipeline, wheel, official, engine, fp8, cases, kills, dvc, hour) and store their results
	@python -m accept.run $(SUBJECT)

bench: setup ## run the benchmarks, one JSON line a measurement
	@python -m benchmarks.harness

wheel: setup ## build dist/vlfoundry-*.whl, which installs without a checkout
	@uv=$$(command -v uv || echo .cache/uv/bin/uv); $$uv build --quiet --no-build-isolation --python .venv/bin/python

lock: setup ## resolve requirements/*.lock again from pyproject.toml, keeping versions that still fit
	@scripts/lock.sh

clean: ## remove what was built here and what tools cached; runs and the environment stay (vlfoundry gc frees what runs left)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
