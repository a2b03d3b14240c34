# Everything runs in .venv, which is made on first use.
#
#   make boot ARGS="..."           boot a guest; ARGS go to the command (and to pytest, fuzz and bench)
#   make test                      all tests, with Debian's kernel and OVMF if they can be had
#   make lint types                ruff; mypy
#   make fuzz                      give 200,000 hostile inputs to everything that reads bytes
#   make artefacts                 get Debian's kernels, OVMF and iasl for the tests
#   make bench                     measure

PYTHON ?= python3
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: boot test lint types fuzz bench artefacts clean

boot: $(READY)
	$(RUN)/unaccepted boot $(ARGS)

# Without artefacts the tests that need them are left out, but not in CI: there they fail.
test: $(READY)
	tests/artefacts.sh || test -z "$$CI"
	$(RUN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(READY)
	$(RUN)/mypy

fuzz: $(READY)
	$(RUN)/python -m tests.fuzz $(ARGS)

bench: $(READY)
	$(RUN)/python -m tools.bench $(ARGS)

artefacts:
	tests/artefacts.sh

clean:
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
