# `make demo` and `make test` need nothing but Python (3.11 or newer for the pinned versions) and make.
#
# The environment is installed from constraints.txt. Where the package index offers a CUDA build of
# torch first, a CPU-only one is chosen by the usual pip settings, e.g.
#     PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> make demo
# and other versions than the pinned ones by   make demo CONSTRAINTS=/dev/null

PYTHON ?= python3
PYTHON_LOWEST ?= python3.10
PYTHON_NEWEST ?= $(PYTHON)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,dev
PIP_FLAGS ?=
ARGS ?=
PY := $(VENV)/bin/python

# Threads that wait do not spin: on cores shared with other programs, spinning makes PyTorch's small
# parallel loops more than ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help venv demo experiments test test-slow test-lowest test-newest test-versions dist lint bench zoo notebooks docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{printf "  %-13s %s\n", $$1, $$2}'

venv: $(VENV)/.installed ## create .venv with everything that the targets below need

# torch goes first and alone: the rest then finds it installed and never reaches for another build.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) torch
	$(PY) -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

# ARGS=--help builds no environment: where there is none yet, the head of the script is shown.
HELP := $(if $(wildcard $(VENV)/.installed),,$(filter -h --help,$(ARGS)))
script = $(if $(HELP),@$(PYTHON) -c "$$HEAD" $(1),$(PY) $(1) $(ARGS))

define HEAD
import ast, sys
print(ast.get_docstring(ast.parse(open(sys.argv[1], encoding="utf-8").read())))
endef
export HEAD

demo: $(if $(HELP),,venv) ## train a small BatchNorm ResNet on digits and show its exact curvature (under a minute)
	$(call script,experiments/digits_resnet.py)

experiments: $(if $(HELP),,venv) ## every statement about BatchNorm, measured: writes experiments/README.md (minutes)
	$(call script,experiments/run_all.py)

test: venv ## the whole default test suite, file by file on as many processes as there are cores
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: venv ## the tests that take minutes
	$(PY) -m pytest -m slow $(ARGS)

# Both install a torch of their own, which may be a CUDA build of several GB. No part of CI.
test-lowest: ## the default suite with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest PYTHON=$(PYTHON_LOWEST) CONSTRAINTS=constraints-lowest.txt EXTRAS=test

test-newest: ## the default suite with the newest versions that pip finds, in .venv-newest
	@rm -f .venv-newest/.installed
	$(MAKE) test VENV=.venv-newest PYTHON=$(PYTHON_NEWEST) CONSTRAINTS=/dev/null EXTRAS=test \
		PIP_FLAGS="$(PIP_FLAGS) --upgrade --upgrade-strategy eager"

VERSIONS = import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)
test-versions: ## the suite with the oldest, then with the newest Python and torch, and a line for each
	@status=0; lines=; for which in lowest newest; do \
		if $(MAKE) test-$$which; then said=passed; else said=FAILED; status=1; fi; \
		found=$$(.venv-$$which/bin/python -c '$(VERSIONS)' 2>/dev/null) || found="not installed"; \
		lines="$$lines$$which: $$found: $$said\n"; \
	done; printf "$$lines"; exit $$status

# `pytest`, not `python -m pytest`, which would find the sources beside the tests before what the wheel installed.
dist: ## sdist and wheel in dist/; the suite of the unpacked sdist runs on the installed wheel, in .venv-dist
	rm -rf dist build/sdist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) build torch twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python -m pip install $(PIP_FLAGS) -c $(CONSTRAINTS) "$$(echo dist/*.whl)[test]"
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && ../../.venv-dist/bin/pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: venv ## ruff on everything, mypy on the package
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: venv ## the benchmark, e.g. make bench ARGS="--help"
	$(PY) -m pip install $(PIP_FLAGS) -q -c $(CONSTRAINTS) -e ".[bench]"
	$(PY) experiments/benchmark/run.py $(ARGS)

zoo: ## public architectures with random weights: exact, and how fast? in .venv-zoo (minutes)
	$(MAKE) venv VENV=.venv-zoo CONSTRAINTS=constraints-zoo.txt EXTRAS=zoo
	.venv-zoo/bin/python experiments/zoo/run.py $(ARGS)

# The site is made from the text of the sources: its environment holds no torch, and installs in seconds.
docs: .venv-docs/.installed ## the documentation site in build/site; warnings are errors (a quarter of a minute)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)
	@echo "open build/site/index.html, or with the search: python -m http.server -d build/site"

.venv-docs/.installed: constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install $(PIP_FLAGS) -r constraints-docs.txt
	@touch $@

notebooks: venv ## execute notebooks/*.ipynb in place
	@$(PY) -c "$$EXECUTE" notebooks/*.ipynb

define EXECUTE
import sys
import nbformat
from nbclient import NotebookClient
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": "notebooks"}}
    NotebookClient(notebook, resources=where, coalesce_streams=True, record_timing=False).execute()
    nbformat.write(notebook, path)
endef
export EXECUTE

clean: ## remove the environment, caches and what the experiments wrote
	rm -rf .venv .venv-lowest .venv-newest .venv-zoo .venv-docs .venv-dist build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis experiments/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
