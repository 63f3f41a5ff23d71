# make demo | make test | make check | make bench; each sets up what it needs.
PYTHON ?= python3
# The tests compare with PyTorch. This version has a CPU build for every platform we test on.
TORCH ?= torch==2.13.0
# A checkpoint for the demo; empty: the MIT weights are fetched (once, 5 MB).
WEIGHTS ?=

VENV := .venv
DEMO_VENV := .venv-demo
PIP_QUIET := -q --disable-pip-version-check

.PHONY: demo test check bench test-gpu clean

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/extract_overhead.py $(if $(WEIGHTS),--weights $(WEIGHTS))
	$(VENV)/bin/python benchmarks/export_cost.py $(if $(WEIGHTS),--weights $(WEIGHTS))

test-gpu:
	@if [ -d tests/gpu ]; then $(PYTHON) -m pytest tests/gpu; else echo "no GPU tests yet: they come with the engines"; fi

demo: $(DEMO_VENV)/.ready
	$(DEMO_VENV)/bin/python demo.py $(if $(WEIGHTS),--weights $(WEIGHTS))

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_QUIET) $(TORCH)
	$(VENV)/bin/pip install $(PIP_QUIET) -e '.[dev,torch]'
	touch $@

$(DEMO_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO_VENV)
	$(if $(filter %.safetensors,$(WEIGHTS)),,$(DEMO_VENV)/bin/pip install $(PIP_QUIET) $(TORCH))
	$(DEMO_VENV)/bin/pip install $(PIP_QUIET) -e . scikit-image
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) demo build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
