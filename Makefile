# On a fresh machine `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# `make gpu` runs tests and kernel benchmarks on a GPU. It uses PYTHON as it is; needed packages: torch, transformers,
# triton, safetensors, accelerate, numpy, pytest and pytest-xdist. DEVICE=cpu is a trial without a GPU. If OUT names a
# folder, reports are written there.
DEVICE ?= cuda
OUT ?=
GPU_TEST_SECONDS ?= 270
GPU_BENCHMARK_SECONDS ?= 190

.PHONY: demo test soak quick gpu docs clean

# overwrite=true: the demo runs from the start each time, also after the code has changed.
demo: $(VENV)/.installed
	$(VENV)/bin/hasten compress run_dir=runs/demo output=runs/demo/model overwrite=true

test: $(VENV)/.installed-test
	$(VENV)/bin/pytest

# Whole runs that are killed, or started in unusual places: `test` has their parts.
soak: $(VENV)/.installed-test
	$(VENV)/bin/pytest -m soak

# Tests to run while working: folders whose tests start no job and no Ray; under two minutes on two cores.
QUICK ?= tests/costs tests/data tests/evaluation tests/models tests/kernels tests/training tests/decoding/lengths \
	tests/decoding/verifiers tests/decoding/targets $(wildcard tests/decoding/test_*.py) tests/compression/quantizers \
	tests/compression/pruners tests/compression/allocators tests/compression/formats tests/compression/calibration

quick: $(VENV)/.installed-test
	$(VENV)/bin/pytest -m "not slow and not ray and not faults and not gpu" $(QUICK)

# The table of benchmarks is printed last, also if a test failed or hung.
gpu:
	@status=0; \
	HASTEN_TEST_DEVICE=$(DEVICE) timeout --kill-after=10 $(GPU_TEST_SECONDS) \
		$(PYTHON) -m pytest -n 0 -m gpu -p no:cacheprovider $(if $(OUT),--junitxml=$(OUT)/gpu-tests.xml) tests || status=$$?; \
	OUT=$(OUT) timeout --kill-after=10 $(GPU_BENCHMARK_SECONDS) \
		$(PYTHON) -m hasten.kernels.benchmark --device $(DEVICE) \
		--seconds $$(($(GPU_BENCHMARK_SECONDS) - 20)) || status=$$?; \
	exit $$status

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is installed first, alone, so that pip takes the build that this machine's index offers, and keeps it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

# All at once: this is also what `demo` needs.
$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e '.[test,distributed]'
	touch $(VENV)/.installed $@

# Warnings are errors. The hook in docs/generate.py reads the options from the code.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
