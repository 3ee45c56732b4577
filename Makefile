# Two commands to begin with: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
UNPINNED := $(VENV)/constraints.txt

# torch-xla needs an older torch, so that its tests have an environment of their own: outside of the clone, since it is
# large; named by all that it is made of, so that other versions give another one; complete once it holds `.complete`.
TPU_MADE_OF = { cat constraints-tpu.txt; sed -n '/^install_requires/,/^$$/p' setup.cfg; $(PYTHON) -VV; }
TPU_CACHE = $${XDG_CACHE_HOME:-$$HOME/.cache}/distrib

.PHONY: help demo test test-all test-tpu check bench clean
help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.run  ## Train a small GPT on 2 CPU processes, lose one, resume
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## Everything but the long runs
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev-hf  ## Everything, with whole matrices, storms and soaks, and Hugging Face's data sets
	$(BIN)/python -m distrib.strategies.deepspeed build-ops
	$(BIN)/python -m pytest

test-tpu:  ## The strategy xla, on the CPU client of torch-xla (Linux, Python 3.11 to 3.13)
	@set -eu; venv="$(TPU_CACHE)/tpu-$$($(TPU_MADE_OF) | sha256sum | cut -c1-12)"; mkdir -p "$(TPU_CACHE)"; \
	exec 9>"$$venv.lock"; flock 9; \
	if [ ! -e "$$venv/.complete" ]; then \
		echo "installing torch 2.9 and torch-xla into $$venv (3 minutes and 6 GB, once)"; \
		rm -rf "$$venv"; $(PYTHON) -m venv "$$venv"; \
		"$$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --no-compile -r constraints-tpu.txt; \
		"$$venv/bin/python" -m compileall -q -j 0 "$$venv/lib" || true; \
		touch "$$venv/.complete"; \
	fi; \
	exec 9>&-; \
	PJRT_DEVICE=CPU PYTHONPATH="$$PWD:$$PWD/launcher" "$$venv/bin/python" -m pytest tests/tpu

check: $(VENV)/.dev  ## Format, lint, types, layers and unit tests, in under a minute
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 tests/arch tests/unit

bench: $(VENV)/.bench  ## Compare cost with hand-written PyTorch and Accelerate; SUITES="steps data" for some
	$(BIN)/python -m benchmarks $(SUITES)

clean:  ## Remove the virtual environment and what builds leave
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# TORCH= may name another version than constraints.txt pins, so torch's own line is taken out of the constraints.
$(VENV)/.run: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "distrib needs Python 3.10 or newer; set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@grep -v '^torch==' constraints.txt > $(UNPINNED)
	@echo "installing $(TORCH) and distrib into $(VENV) (a few minutes the first time)"
	$(PIP) install -c $(UNPINNED) "$(TORCH)" -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install -c $(UNPINNED) "$(TORCH)" -e ".[dev]"
	@touch $@

$(VENV)/.dev-hf: $(VENV)/.dev
	$(PIP) install -c $(UNPINNED) "$(TORCH)" -e ".[dev,dev-hf,dev-remote]"
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	$(PIP) install -c $(UNPINNED) "$(TORCH)" -e ".[bench]"
	@touch $@
