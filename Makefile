# make compare   the main job: install, fit a line-up of models to real digits, print the table
# make test      install with the test extra, check, run the tests
# make docs      build the documentation into docs/_build/html; make docs-serve shows it at http://localhost:8000
# make notebooks run the notebooks at full size, and write what they show (minutes)
# COVERAGE=1     with make test: which lines of probae the tests ran, at the end
# CPU=1          on Linux without an NVIDIA GPU: take PyTorch's CPU build, not gigabytes of CUDA
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: compare test slow notebooks docs docs-serve clean

compare: $(VENV)/.compare
	@# one thread: networks of this size gain nothing from two, and lose much when another process holds a core
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/probae compare

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python $(if $(COVERAGE),-m slipcover --source probae) -m pytest -n auto --dist loadgroup

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

docs-serve: docs
	$(BIN)/python -m http.server --bind localhost --directory docs/_build/html 8000

notebooks: $(VENV)/.test
	$(BIN)/jupytext --to ipynb notebooks/*.md
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/jupyter execute --inplace notebooks/*.ipynb

$(BIN)/python:
	@$(PYTHON) -c '' 2>/dev/null || { echo "probae needs Python 3.11 or newer: no '$(PYTHON)' found; name one by PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "probae needs Python 3.11 or newer: $$($(PYTHON) -V 2>&1) is too old; name another by PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "probae needs Python's venv module: install it (on Debian: apt install python3-venv)"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.compare: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing probae (once; PyTorch is large)"
	@$(PIP) -e '.[compare]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing probae and what its tests need (once; PyTorch is large)"
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing probae and what its documentation needs (once; PyTorch is large)"
	@$(PIP) -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info docs/_build docs/api docs/gallery docs/models docs/notebooks
