# Needs Python 3.11 or newer and make (GNU make 3.81 of macOS will do); everything else goes into .venv.
# On Linux PyPI's torch comes with CUDA (gigabytes). For the small CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
# Test processes; each uses one thread.
WORKERS ?= 2
# Which tests; `make test MARKERS=slow` runs those that take minutes.
HERE := not slow and not shared and not gpu and not browser and not ray
MARKERS ?= not thorough and $(HERE)
# The demo's language model: smollm2 (135 M parameters) or tiny (5 M).
LM ?= smollm2
# What to measure; `make bench BENCH=--quick` runs a tiny model.
BENCH ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished

.PHONY: help demo test test-thorough lint format bench bench-gpu setup clean distclean

help:  ## this list (default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## train an encoder and search with it: the whole path on a CPU (LM=tiny: a toy LM, a quarter of the time)
	$(BIN)/llm2comp demo --lm $(LM)

test: $(READY)  ## the test suite, without what takes long (WORKERS=2, MARKERS='not slow and ...')
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m '$(MARKERS)'

test-thorough: MARKERS := thorough and $(HERE)
test-thorough: test  ## what `make test` leaves out for time: whole runs, other processes, more families

lint: $(READY)  ## ruff and mypy, changing nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(READY)  ## let ruff mend and format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(READY)  ## speed and memory against the release's shape and stock peers (BENCH='--quick', '--only ROW')
	TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks $(BENCH)

bench-gpu: $(READY)  ## the same on a CUDA device, at the shapes of 7B and 0.6B models
	TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks --device cuda $(BENCH)

setup: $(READY)  ## the virtual environment and the demo's language model; the other targets get both by themselves
	@$(BIN)/llm2comp fetch || echo "Set up, but without builtin:smollm2: what needs it will try again, as above." >&2

clean:  ## delete caches and builds; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## delete .venv as well; keeps runs
	rm -rf $(VENV)

# Once, and again when the requirements change. The stamp is written last. A set-up that was cut off leaves its mark
# (the pid of its make) and is begun anew, since it may have left half a package; an environment that was
# here before is only installed into. torch comes first and pinned: any open request for it may fetch gigabytes.
$(READY): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ]; then \
	  if kill -0 "$$(cat $(UNFINISHED))" 2>/dev/null; then \
	    echo "Another make (pid $$(cat $(UNFINISHED))) is setting up $(VENV): wait for it, or delete $(VENV)." >&2; exit 1; \
	  fi; \
	  echo "The last set-up was cut off: starting anew."; rm -rf $(VENV); \
	fi
	@if [ ! -e $(VENV) ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "llm2comp needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	    echo "Name another one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	  mkdir $(VENV) && echo $$PPID > $(UNFINISHED) && $(PYTHON) -m venv $(VENV); \
	elif [ -e $(READY) ]; then \
	  rm $(READY) && echo $$PPID > $(UNFINISHED); \
	fi
	$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY) && rm -f $(UNFINISHED)
