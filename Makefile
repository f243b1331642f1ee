# The first Python that runs; another one: make PYTHON=/path/to/python3.12 demo
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c "" >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format lock

help:
	@echo "make demo       install, then infill pairs cut from Python's standard library with a real engine"
	@echo "make test       install, then run every test (ARGS='tests/jobs -k plan' for some, but no -m or --pdb)"
	@echo "make install    install the locked packages and spanfill into .venv"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the layout"
	@echo "make lock       renew deploy/lock-*.txt from pyproject.toml (ARGS=--upgrade for the newest versions)"
	@echo "Linux on x86-64 only, elsewhere Docker (deploy/Dockerfile). SPANFILL_DEVICE=cpu or gpu overrules detection."

install:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python found; spanfill needs Python 3.11, 3.12 or 3.13: https://www.python.org/downloads/" >&2; \
		exit 2; fi
	@"$(PYTHON)" deploy/install.py

demo: install
	$(BIN)/spanfill demo

# First what starts no engine, several at a time; then what does, since engines want the cores for themselves.
# 2: interrupted. 5: no such test, which may be where ARGS names some.
test: install
	@$(BIN)/python -m pytest -m "not engine" -n logical --maxprocesses 8 $(ARGS); fast=$$?; \
	[ $$fast -ne 2 ] || exit 2; \
	$(BIN)/python -m pytest -m engine $(ARGS); slow=$$?; \
	if [ -n "$$ARGS" ] && [ $$fast$$slow != 55 ]; then \
		[ $$fast -ne 5 ] || fast=0; [ $$slow -ne 5 ] || slow=0; fi; \
	[ $$fast -eq 0 ] || exit $$fast; exit $$slow

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff format

lock:
	@"$(PYTHON)" deploy/lock.py $(ARGS)
