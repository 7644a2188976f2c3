# Every target sets itself up: a virtual environment with pinned dependencies and the compiled C++ module.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test bench lint setup clean

demo: setup
	$(BIN)/cdistill demo

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	$(BIN)/python -m pytest benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# pip installs torch by itself first: deepspeed's build reads its version.
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel pybind11 ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build *.egg-info cdistill/*.so $(VENV)
