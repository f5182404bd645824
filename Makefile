# make test, make bench: create .venv and install on the first run, start at once on the next.
# make gpu OUT=dir: with the Python on the path, which has torch, triton, timm, pytest and pytest-benchmark.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OPENBLAS_NUM_THREADS := 1

.PHONY: test bench microbench gpu lint format clean

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

bench: $(VENV)/installed
	$(BIN)/atm-triton bench

microbench: $(VENV)/installed
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-only --benchmark-json=microbench.json

gpu:
	$(if $(OUT),,$(error say where the results go: make gpu OUT=dir))
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || echo "not installed: runs from the checkout"
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
