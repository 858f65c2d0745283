# Every target makes its own environment in .venv when there is none.
# PYTHON picks the interpreter, PIP_FLAGS is handed to pip, RANKS sets the ranks of the demo.

PYTHON ?= python3
PIP_FLAGS ?=
RANKS ?= 2
TEST_WORKERS ?= 2
VENV := .venv
DEMO := runs/demo
DEMO_STEPS := 5600
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"\(torch>=[^"]*\)",*$$/\1/p' pyproject.toml)

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check bench docs format clean

help:
	@echo "make demo       set up, then train, sample and report on $(RANKS) ranks"
	@echo "make test       set up, then run the tests (make test-slow: the long ones)"
	@echo "make check      set up, then lint, types and the docs build"
	@echo "make bench      set up, then the benchmarks, into benchmarks/results"
	@echo "make docs       set up, then the documentation, into site"

# torch goes first: a build that pip finds on this machine is then kept for all the rest.
$(VENV)/run.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hairpin needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) install $(PIP_FLAGS) "$(TORCH)"
	@echo "installing hairpin"
	@$(PIP) install $(PIP_FLAGS) --editable ".[video,fold,report]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "installing the tools for tests and docs"
	@$(PIP) install $(PIP_FLAGS) --editable ".[video,fold,report,triton,hf,docs,dev]"
	@touch $@

# Goes on from the checkpoint that the repository carries, so that minutes of training are enough.
# The same recipe made it: hairpin train video.
CHECKPOINT := $(wildcard checkpoints/video_digits)

demo: $(VENV)/run.stamp
	@rm -rf $(DEMO)
	@$(BIN)/hairpin train video --ranks $(RANKS) --out $(DEMO) \
	  $(if $(CHECKPOINT),--resume $(CHECKPOINT) --steps $(DEMO_STEPS))
	@$(BIN)/hairpin sample $(DEMO) --ranks $(RANKS) --seed 1 --out $(DEMO)/more
	@echo "look at $(DEMO)/samples.gif, more in $(DEMO)/more, everything in $(DEMO)/report.html"

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

test-slow: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 1800

check: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/dev.stamp
	$(BIN)/hairpin bench switch
	$(BIN)/hairpin bench sp2d

docs: $(VENV)/dev.stamp
	$(BIN)/zensical build --clean --strict
	@echo "open site/index.html"

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist site out .cache .mypy_cache .pytest_cache .ruff_cache
