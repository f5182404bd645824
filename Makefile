# make test, make bench: create .venv and install on the first run, start at once on the next.
# make test-fast: the specification and its kernels, in a minute: for the loop of work.
# make test-oldest: tracing and compiling with the oldest torch and Triton that are supported (3 GB on the first run).
# make coverage VENV=.venv-3.12 PYTHON=python3.12: which lines the tests run; much slower before Python 3.12.
# make docs: the page site, in build/site, with an environment of its own.
# make test-integration: a patched model in the hands of other libraries (2 GB on the first run), and the table of it.
# make gpu OUT=dir: with the Python on the path, which has torch, triton, timm, pytest and pytest-benchmark.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OPENBLAS_NUM_THREADS := 1

.PHONY: test test-fast test-oldest test-integration coverage bench microbench docs gpu lint format clean

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal \
		tests/test_config.py tests/test_reference.py tests/test_parity.py tests/test_extending.py tests/test_kernels.py \
		-k "not (backward or 577 or four_sources or programs_share)"

test-oldest: $(VENV)-oldest/installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -q tests/test_triton.py tests/test_image.py \
		tests/test_export.py -k "compiles or one_graph or break or hands or export or trace"

test-integration: $(VENV)-integration/installed
	OMP_NUM_THREADS=1 $(VENV)-integration/bin/python -m benchmarks.integration

coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage -- --numprocesses auto --maxprocesses 8 --dist worksteal

bench: $(VENV)/installed
	$(BIN)/atm-triton bench

microbench: $(VENV)/installed
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-only --benchmark-json=microbench.json

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

gpu:
	$(if $(OUT),,$(error say where the results go: make gpu OUT=dir))
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable . || echo "not installed: runs from the checkout"
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-docs $(VENV)-integration build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

$(VENV)-oldest/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --editable '.[test]' torch==2.11.0 torchvision==0.26.0 'numpy<2.4'
	touch $@

$(VENV)-docs/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet mkdocs-material 'mkdocstrings[python]'
	touch $@

$(VENV)-integration/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)-integration
	$(VENV)-integration/bin/python -m pip install --quiet --editable '.[integration]'
	touch $@

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
