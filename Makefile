# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test docs clean

# overwrite: the demo shows a whole run each time, also after the code has changed.
demo: $(VENV)/.installed
	$(VENV)/bin/hasten compress run_dir=runs/demo output=runs/demo/model overwrite=true

test: $(VENV)/.installed-test
	$(VENV)/bin/pytest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first, alone: pip then takes the build that this machine's index offers, and keeps it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

# Warnings are errors. The hook in docs/generate.py reads the options from the code.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python docs/generate.py --check
	$(VENV)/bin/mkdocs build --quiet

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
