# The two commands a newcomer needs:   make demo   and   make test
# Both make .venv the first time (Python >= 3.10, torch for this machine, this project) and use it from then on.

VENV ?= .venv
PY := $(VENV)/bin/python
BOOTSTRAP := python3 scripts/bootstrap.py --venv $(VENV)
# More threads than idle cores make small CPU forwards many times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint format types docs build clean

help:
	@echo "make demo    answer a question about a long document with DynamicCache and RedKnotCache, side by side"
	@echo "             (DEMO_ARGS='--max-new-tokens 32': options of redknot demo)"
	@echo "make test    run the tests (PYTEST_ARGS='-m gpu' and the like)"
	@echo "make lint    ruff: rules and formatting        make format  let ruff fix both"
	@echo "make types   mypy                              make docs    build the documentation into site/"
	@echo "make build   wheel and sdist into dist/        make clean   remove .venv and everything built"

demo:
	@$(BOOTSTRAP) --extra demo
	@$(VENV)/bin/redknot demo $(DEMO_ARGS)

test:
	@$(BOOTSTRAP) --extra dev
	@$(PY) -m pytest $(PYTEST_ARGS)

lint:
	@$(BOOTSTRAP) --extra dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format:
	@$(BOOTSTRAP) --extra dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types:
	@$(BOOTSTRAP) --extra dev
	@$(PY) -m mypy

docs:
	@$(BOOTSTRAP) --extra docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "site/index.html"

build:
	@$(BOOTSTRAP) --extra dev
	@$(PY) -m build

# The demo model in the user's cache folder stays: it is shared between checkouts.
clean:
	rm -rf $(VENV) .ci/venv .ci/transformers-* build dist site demo_out *.egg-info src/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
