# Every target sets up .venv when it needs it; none needs another to have run first. `make help` lists them.

PYTHON ?= python3
PRESET ?= auto
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# The set-up counts as done only where it was done (a moved checkout is not) and while its Python still starts.
HEALTHY := $(shell [ "$$(cat $(READY) 2>/dev/null)" = "$$(pwd)" ] && $(PY) -c pass 2>/dev/null && echo yes)

# Without an NVIDIA driver, torch's CPU build will do and saves gigabytes. Empty: take what PyPI has.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)
TORCH_PIN = $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PIP = $(PY) -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help figures charts test lint format lab clean force

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PRESET=auto|quick|full   what the lessons run with (auto: full on a GPU, quick without one)"
	@echo "  ARGS='...'               further arguments, for the runner, pytest, the charts or JupyterLab"
	@echo "  PYTHON=python3.12        the Python that .venv is made with, 3.11 or newer"

figures: $(READY) ## run every lesson headless and redraw every chart; on a GPU, measure first
	@status=0; \
	$(PY) -m lab.run --preset $(PRESET) $(ARGS) || status=$$?; \
	$(PY) -m lab.charts || status=$$?; \
	exit $$status

charts: $(READY) ## redraw every chart from data/ alone
	@$(PY) -m lab.charts $(ARGS)

test: $(READY) ## run the tests; those that need a GPU skip without one
	@$(PY) -m pytest $(ARGS)

lint: $(READY) ## check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(READY) ## mend what `make lint` can mend by itself
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lab: $(READY) ## open JupyterLab on the lessons
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(ARGS)

clean: ## remove executed copies, quick measurements and caches; .venv stays
	rm -rf build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find kernels lab notebooks tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# An interrupted set-up leaves no $(READY), so the next run starts over; a changed pyproject.toml installs on top.
$(READY): pyproject.toml $(if $(HEALTHY),,force)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "PYTHON = $(PYTHON) is not Python 3.11 or newer ($$($(PYTHON) --version 2>&1 | tail -n 1))." >&2; \
	  echo "Name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "PYTHON = $(PYTHON) lacks venv or ensurepip. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $@
	@echo "Setting up $(VENV): this takes a few minutes the first time."
	@$(if $(HEALTHY),:,$(PYTHON) -m venv --clear $(VENV))
	@$(if $(TORCH_INDEX),$(PIP) --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) $(TORCH_PIN) \
	  || echo "No CPU build of torch from $(TORCH_INDEX): taking the one on PyPI.",:)
	@$(PIP) --editable '.[dev]'
	@pwd > $@
