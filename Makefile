# Each target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo python3)
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*) setup.py pyproject.toml

.PHONY: demo test bench quality lint gpu clean

demo: .venv/installed
	$(BIN)/fastdiff sample --count 64 --steps 20 --guidance 2 --seed 0 --out demo.png

test: .venv/developing
	$(BIN)/python -m pytest

bench: .venv/developing
	$(BIN)/fastdiff bench

quality: .venv/developing
	$(BIN)/python -m benchmarks.quality

lint: .venv/developing
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# On a machine with an NVIDIA GPU, torch and nvcc: no network, no virtual environment.
gpu:
	FASTDIFF_CUDA=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest tests/ops tests/gpu
	$(PYTHON) -m benchmarks.run --device cuda

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet pip==26.3
	touch $@

.venv/installed: .venv/made $(SOURCES)
	$(BIN)/python -m pip install --quiet --group build --group run
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

.venv/developing: .venv/installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf .venv build *.egg-info fastdiff/*.so
