# Runs on a fresh machine with python 3.11, 3.12 or 3.13. `make help` lists the targets.
#
#   PYTHON=python3.12        the interpreter to make .venv with (default: the first of 3.11, 3.12, 3.13 that works)
#   TORCH="torch==2.12.1"    the build of torch to install (default: 2.13.0, the CPU build where there is no NVIDIA GPU
#                            and pip has one to offer: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may add a source)
#   ARGS="-k flow"           more arguments for pytest
#   WORKERS=4                processes that run tests at the same time (default: 2; 0: one test after the other)
#   TRAIN_ARGS="run.steps=9" overrides for the demo's training; likewise EVALUATE_ARGS, and DEMO for its folder

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := 2.13.0
ONE_THREAD := OMP_NUM_THREADS=1
# Dozens of processes import the project: all but the first find it compiled, whatever the environment says.
COMPILED := PYTHONDONTWRITEBYTECODE=
DEMO := runs/demo
WORKERS := 2
# A file's tests stay in one process, which keeps what they share; the long files of tests/cli and tests/dist go first.
TOGETHER := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# An interpreter fits if its version does and it can make virtual environments (Debian splits ensurepip off).
FITS := -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
CANDIDATES := $(or $(PYTHON),$(wildcard $(BIN)/python) python3.11 python3.12 python3.13 python3)

.PHONY: help install demo test lint clean distclean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP) ## make .venv with torch, sgmd_dist (editable) and the development tools

# A choice on the command line that differs from the one .venv was made with makes the stamp stale.
CHOICE := $(strip $(PYTHON) $(TORCH))
ifneq ($(CHOICE),)
ifneq ($(CHOICE),$(shell cat $(STAMP) 2>/dev/null))
$(STAMP): FORCE
endif
endif

$(STAMP): setup.py pyproject.toml sgmd_dist/__init__.py
	@for python in $(CANDIDATES); do "$$python" $(FITS) 2>/dev/null && break; python=; done; \
	if [ -z "$$python" ]; then \
	  echo "error: none of [$(strip $(CANDIDATES))] is a python 3.11, 3.12 or 3.13 with venv: install one" \
	    "(Debian: apt install python3 python3-venv) or name it, e.g. make install PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	version() { "$$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null; }; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1 || [ "$$(version "$$python")" != "$$(version $(BIN)/python)" ]; then \
	  echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@rm -f $(STAMP)
	@if [ -n "$(TORCH)" ]; then $(PIP) install "$(TORCH)"; \
	elif $(PIP) show --quiet torch 2>/dev/null; then :; \
	elif nvidia-smi -L >/dev/null 2>&1; then $(PIP) install torch==$(TORCH_VERSION); \
	elif $(PIP) install torch==$(TORCH_VERSION)+cpu 2>/dev/null; then :; \
	else \
	  echo "pip's index has no CPU build of torch $(TORCH_VERSION) for this python: taking its default build"; \
	  $(PIP) install torch==$(TORCH_VERSION); \
	fi
	$(PIP) install --editable '.[dev]'
	@echo "$(CHOICE)" > $(STAMP)

demo: install ## distil a tiny video model on two ranks and score it: runs/demo
	$(ONE_THREAD) $(BIN)/torchrun --nproc-per-node=2 launch/train.py recipes/tiny_sgmd.yaml \
	  run.dir=$(DEMO) run.resume=never $(TRAIN_ARGS)
	$(ONE_THREAD) $(BIN)/python launch/evaluate.py $(DEMO) $(EVALUATE_ARGS)

test: install ## run the whole test suite
	$(ONE_THREAD) $(COMPILED) $(BIN)/python -m pytest $(TOGETHER) $(ARGS)

lint: install ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean: ## remove build products and caches; keep .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## the same, and .venv; keep runs/
	rm -rf $(VENV)
