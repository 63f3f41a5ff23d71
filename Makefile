# make demo | make test | make check | make bench: each sets up what it needs in an environment of its own.
PYTHON ?= python3
# The tests compare with PyTorch, and .pth checkpoints need it. 2.13.0 has no build for Python 3.9.
TORCH ?= $(shell $(PYTHON) -c "import sys; print('torch==2.13.0' if sys.version_info >= (3, 10) else 'torch>=2.6')")
# A checkpoint for demo and bench. Empty: demo fetches the MIT one (5 MB).
WEIGHTS ?=

# The Python that has TensorRT and this package.
GPU_PYTHON ?= $(PYTHON)

VENV := .venv
DEMO_VENV := .venv-demo
PIP := -m pip install -q --disable-pip-version-check
SUPERPOINT := $(DEMO_VENV)/bin/superpoint
FETCHED := demo/superpoint_v6_from_tf.pth

.PHONY: test check bench test-gpu bench-gpu demo clean

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

# On a machine with an NVIDIA GPU, in an environment that has TensorRT: make test-gpu GPU_PYTHON=python
test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu --confcutdir=tests/gpu

bench-gpu:
	$(GPU_PYTHON) benchmarks/engines.py --engines engines $(if $(WEIGHTS),--weights $(WEIGHTS)) --batch 1 --batch 8

demo: $(DEMO_VENV)/.ready
	@mkdir -p demo
	$(if $(WEIGHTS),,$(SUPERPOINT) weights fetch v6 --output $(FETCHED) || { echo "offline? make demo WEIGHTS=path/to/checkpoint.pth"; exit 2; })
	$(if $(filter %.safetensors,$(WEIGHTS)),,$(DEMO_VENV)/bin/python -c "import torch" 2>/dev/null || $(DEMO_VENV)/bin/python $(PIP) '$(TORCH)')
	@$(DEMO_VENV)/bin/python -c "from skimage import data, io; io.imsave('demo/astronaut.png', data.astronaut())"
	$(SUPERPOINT) export --weights $(or $(WEIGHTS),$(FETCHED)) --output demo/superpoint.onnx --dynamic
	$(SUPERPOINT) infer --model demo/superpoint.onnx --image demo/astronaut.png --output demo/keypoints.jpg --save demo/features.npz
	@echo "look at demo/keypoints.jpg"

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) '$(TORCH)'
	$(VENV)/bin/python $(PIP) -e '.[dev,torch,report]'
	@touch $@

$(DEMO_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(PIP) -e . scikit-image
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) demo build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
