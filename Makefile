# `make demo` and `make test` each do all set-up first. PYTHON names the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check clean

help:
	@echo "make demo    set up, then fuse two real models (ten to fifteen minutes on two cores)"
	@echo "make test    set up, then run all tests"
	@echo "make lint    set up, then check the style"
	@echo "make types   set up, then check the types"
	@echo "make clean   remove the environment"

# torch comes first and alone: left to another package's range, pip may take a build with gigabytes of CUDA libraries.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fuseline demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows the import name, and the checkout may have any: a link gives it the package's.
types: $(VENV)/installed
	@folder=$$(mktemp -d) && ln -s "$(CURDIR)" $$folder/fuseline && MYPYPATH=$$folder $(BIN)/mypy \
		-m fuseline.cli $(foreach package,store ingest align train eval pipeline commands,-p fuseline.$(package)); \
		status=$$?; rm -r $$folder; exit $$status

check: lint types test

clean:
	rm -rf $(VENV)
