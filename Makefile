# Every target that needs an environment creates it: `make test` and `make demo` work in a fresh clone.
# The network is used by pip alone, once; afterwards all targets work offline.

PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
OLDEST := .venv-oldest/bin
RELEASE := .venv-release/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo profile test test-full test-oldest support lint format types unit reference release clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/installed ## create .venv with the tested versions (the other targets do it themselves)

# in plain torch, native library or not, so that its times mean the same everywhere
demo: .venv/installed ## find needles in long prompts with the model inside, dense and sparse; results in demo/
	SPARSEPREFILL_NATIVE=build/none $(BIN)/sparseprefill demo

test: lint types unit ## what every change must pass: lint, types and the quick tests

test-full: lint types ## the same with the slow sweeps
	$(BIN)/pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/installed ## the tests of the Hugging Face seam on the oldest supported releases
	$(OLDEST)/pytest tests/test_huggingface*.py tests/test_ways.py tests/test_tensor_parallel.py tests/test_doctor.py tests/test_refusals.py $(PYTEST_ARGS)

# thresholds of SALE are made in plain torch, native library or not, so that a run gives the same bytes everywhere
profile: .venv/installed ## profile the model inside again, as it ships (when methods were added), and write a page of it
	mkdir -p build
	$(BIN)/sparseprefill profile inside --prompts builtin:needle --budget 0.3 --out build/profile.json \
		--html build/profile.html --again
	cp build/profile.json sparseprefill/needle_model/profile.json
	SPARSEPREFILL_NATIVE=build/none $(BIN)/sparseprefill profile inside --prompts builtin:needle --method sale \
		--density 0.35 --out build/sale.json --html build/sale.html --again
	cp build/sale.json sparseprefill/needle_model/sale.json

SUPPORT := tests/test_ways.py tests/test_refusals.py tests/test_architectures.py
support: .venv/installed .venv-oldest/installed ## write docs/support.md from tests on the newest and the oldest release
	mkdir -p build
	$(BIN)/pytest $(SUPPORT) --junitxml build/support_newest.xml
	$(OLDEST)/pytest $(SUPPORT) --junitxml build/support_oldest.xml
	$(BIN)/python scripts/support_table.py build/support_newest.xml build/support_oldest.xml --date $$(date +%F)

lint: .venv/installed ## style and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed ## put the style right where that can be done automatically
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# mypy ignores the import hook of an editable install, so it gets a tree in which every room lies inside the package.
# build/lib is setuptools' own staging area: a module deleted from the source would live on in it.
types: .venv/installed ## mypy, strict, on the package as it installs
	rm -rf build/typed build/lib build/bdist.*
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --no-index --no-compile --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p sparseprefill

# two processes for the two cores that CI has; each takes its half in order, so that fixtures of a module are made once
unit: .venv/installed ## the quick tests alone
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal $(PYTEST_ARGS)

reference: .venv/installed ## the API reference from docstrings, in build/reference
	$(BIN)/python scripts/build_reference.py --out build/reference

release: .venv-release/installed ## build sdist and wheel of the last commit into dist/ and try them out; uploads nothing
	$(RELEASE)/python scripts/release.py

clean: ## remove environments, caches and build products
	rm -rf .venv .venv-oldest .venv-release build/typed build/reference build/lib build/bdist.* dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first and is then used as it stands, so that an install builds with the pinned one.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed for the pinned versions: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv: a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# always from nothing: the packaging that is tested is too old for a setuptools that finds it beside itself.
.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	@echo "installing into .venv-oldest: a few minutes the first time"
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST)/python -m pip install -q -c constraints-oldest.txt setuptools
	$(OLDEST)/python -m pip install -q -c constraints-oldest.txt --no-build-isolation -e '.[test]'
	@touch $@

.venv-release/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed for the pinned versions: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(RELEASE)/python || $(PYTHON) -m venv .venv-release
	$(RELEASE)/python -m pip install -q -c constraints.txt build setuptools twine
	@touch $@
