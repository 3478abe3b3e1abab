# One word a chore. Everything runs from .venv, which `setup` makes from package registries only.
SHELL := /bin/bash
KAT := .venv/bin/kat-stream
SEED ?= 0
LOG ?= memory
SCAFFOLD ?= shell
N ?= 100
WORKERS ?= 2

.PHONY: demo test check bench chaos fuzz warm-start setup setup-test clean

demo: setup ## set everything up and train the small policy: make demo [SEED=1] [LOG=kafka] [SCAFFOLD=codex]
	$(KAT) demo --seed $(SEED) --log $(LOG) --scaffold $(SCAFFOLD)

test: setup-test ## set everything up and run all tests: make test [WORKERS=2]
	$(MAKE) --no-print-directory check
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: ## style, types, import direction
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup-test ## every benchmark; prints its tables
	@for name in engine learner sandboxes gateway gateway_replies ledger ack packer takeover mcla; do \
		echo "== python -m tests.benchmarks.$$name"; .venv/bin/python -m tests.benchmarks.$$name || exit 1; done

chaos: setup-test ## strike a running system N times and account for every rollout: make chaos [N=100] [SEED=7]
	.venv/bin/python -m tests.chaos --faults $(N) --seed $(SEED)

fuzz: N = 10000
fuzz: setup-test ## malformed records through the real stages: make fuzz [N=10000] [SEED=4]
	.venv/bin/python -m tests.fuzz --count $(N) --seed $(SEED)

warm-start: setup ## make the small policy that ships in kat_stream/demo/policy again
	.venv/bin/python -m kat_stream.demo.warm_start --out .kat/policy --seed $(SEED)

setup:
	@LOG=$(LOG) ops/setup.sh run

setup-test:
	@ops/setup.sh test

clean:
	rm -rf .venv .kat dist
