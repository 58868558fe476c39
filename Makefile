# Each target sets up .venv by itself; PYTHON chooses the interpreter it is made with.
#
#   make demo     draw 64 images with the embedded model into demo.png
#   make test     run the tests, on up to 8 cores
#   make lint     ruff and mypy
#   make bench    measure everything into benchmarks/results/
#   make quality  judge the embedded model's samples with a classifier
#   make gpu      on a machine with an NVIDIA GPU, torch and nvcc: build, test, measure; no network, no .venv
#   make clean    remove .venv and everything built
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; \
	done)
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test lint bench quality gpu clean

demo: .venv/installed
	$(BIN)/fastdiff sample --count 64 --steps 20 --guidance 2 --seed 0 --columns 8 --out demo.png

test: .venv/developing
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: .venv/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/benching
	$(BIN)/fastdiff bench

quality: .venv/developing
	$(BIN)/python -m benchmarks.quality

# The package is built into build/gpu and used from there, ahead of the sources: nothing is installed.
gpu: PYTHON := $(or $(PYTHON),python3)
gpu: export FASTDIFF_CUDA := 1
gpu: export PYTHONSAFEPATH := 1
gpu: export PYTHONPATH := $(CURDIR)/build/gpu:$(CURDIR)
gpu:
	$(PYTHON) setup.py --quiet build --build-lib build/gpu
	$(PYTHON) -m pytest -o pythonpath=tests tests/ops tests/gpu
	$(PYTHON) -m benchmarks.run --device cuda --seconds 1

.venv/made:
	@test -n "$(PYTHON)" || { echo "make: expected Python 3.11 or 3.12, found neither; pass PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet pip==26.3
	touch $@

# The compiler's output is kept in build/, so that a change in one C++ file compiles that file.
.venv/installed: .venv/made $(SOURCES)
	$(BIN)/python -m pip install --quiet --group build --group run
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

.venv/developing: .venv/installed
	$(BIN)/python -m pip install --quiet --group dev
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1  # its samplers, without what it trains with
	touch $@

.venv/benching: .venv/developing
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fastdiff/*.so
