# make quickstart   trains a small B'MOJO on this machine and shows what came of it
# make test         installs what is missing and runs the tests (20 to 30 minutes on 2 cores)
# make check        format, lint and types
# make install-aot  installs the TPU compiler, for the slow tests that count a kernel's instructions

# Python 3.12 or later; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv/bin/python
# Further flags of train.py, e.g. make quickstart ARGS=--config.data.path=$HOME/notes
ARGS ?=
WORKDIR ?= runs/quickstart

.PHONY: quickstart test test-slow check format install install-dev install-aot

quickstart: install
	$(VENV) train.py --config configs/quickstart.py --workdir $(WORKDIR) $(ARGS)

test: install-dev
	$(VENV) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: install-dev
	$(VENV) -m pytest -n 2 --dist loadfile -m slow

check: install-dev
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m pyrefly check --output-format min-text

format: install-dev
	$(VENV) -m ruff format .
	$(VENV) -m ruff check --fix .

install: .venv/.installed
install-dev: .venv/.installed-dev

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "Python 3.12 or later is needed; found: $$($(PYTHON) --version) ($(PYTHON))"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.installed: .venv/.python requirements.txt constraints.txt
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt requirements-harness.txt
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

install-aot: .venv/.installed-aot

.venv/.installed-aot: .venv/.installed-dev requirements-aot.txt
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-aot.txt -c constraints.txt
	touch $@
