# make demo: train a small GPT-2 on this machine and see what it learned.   make test: prove that everything holds.
# make faults: the long programme of injected faults, about three hours; its table goes into docs/reliability.md.
# Each target sets up .venv by itself; nothing but Python 3.11+, pip and make is needed.

PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
READY := .venv/.ready

.PHONY: setup lock demo quick test faults lint types audit bill check docs notebooks clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) tools/set_up.py
	@touch $(READY)

# After a change of dependencies in pyproject.toml. To move to new versions: make lock UV_FLAGS=--upgrade
lock:
	$(PYTHON) tools/set_up.py lock
	$(BIN)/python tools/lock.py $(UV_FLAGS)

demo: setup
	$(BIN)/python -m anew train demo

# Three at a time with a thread each: most tests wait for processes, and threads of two tests on one core wait for each other.
test: .venv/.launcher
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

faults: setup
	$(BIN)/python -m tests.faults.programme --full --write

# AWS's launcher, for one test. It is compiled: where that cannot be done the test is skipped and says so.
.venv/.launcher: $(READY)
	-$(PYTHON) tools/set_up.py sagemaker 2> .venv/launcher.log
	@touch $@

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/guarantees.py --check
	$(BIN)/python tools/supply_chain.py licences --check

types: setup
	$(BIN)/python -m mypy

# Known vulnerabilities of the pinned packages. Where the database cannot be reached, this says so.
audit: setup
	$(BIN)/python tools/supply_chain.py audit

# The bill of materials of a release.
bill: setup
	$(BIN)/python tools/supply_chain.py bill > anew.cdx.json

check: lint types audit test

# While you work: linters and the unit tests.
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit

# The lessons, run again and shipped with their outputs.
notebooks: setup
	$(BIN)/python notebooks/execute.py

docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
