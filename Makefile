# make demo | make test | make test-all | make check | make figures | make web | make bench: each sets up its own environment.
PYTHON ?= python3
# The tests compare with PyTorch, and .pth checkpoints need it. 2.13.0 has no build for Python 3.9.
TORCH ?= $(shell $(PYTHON) -c "import sys; print('torch==2.13.0' if sys.version_info >= (3, 10) else 'torch>=2.6')")
# Another checkpoint than the packaged one, for demo and bench.
WEIGHTS ?=

# The Python that has TensorRT and this package.
GPU_PYTHON ?= $(PYTHON)

VENV := .venv
DEMO_VENV := .venv-demo
PIP := -m pip install -q --disable-pip-version-check
# Where this Python has all that the package needs, the demo runs in it, offline too.
NEEDS := click, cv2, numpy, onnx, onnxruntime, rich, safetensors
DEMO_PYTHON = $(shell $(PYTHON) -c "import $(NEEDS)" 2>/dev/null && echo $(PYTHON) || echo $(DEMO_VENV)/bin/python)
SUPERPOINT = PYTHONPATH=src $(DEMO_PYTHON) -m superpoint_trt

.PHONY: test test-all fuzz check bench test-gpu bench-gpu demo train clean

# One process a core; each holds PyTorch, so not more than eight.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.ready
	$(VENV)/bin/python $(PYTEST) -m "not exhaustive"

# The page is tested in a browser where Node.js and Chromium or Firefox are; elsewhere its tests are skipped, and say so.
test-all: $(VENV)/.ready
	-$(if $(shell command -v npm),@$(MAKE) -s web web/node_modules/puppeteer-core)
	$(VENV)/bin/python $(PYTEST)

# Mutated files at every parser: FUZZ_INPUTS a target (tests/fuzz/README.md).
FUZZ_INPUTS ?= 2000
fuzz: $(VENV)/.ready
	FUZZ_INPUTS=$(FUZZ_INPUTS) $(VENV)/bin/python -m pytest tests/fuzz -n auto --maxprocesses 8 -s -q

check: $(VENV)/.ready docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The site in build/site; --strict: a broken link fails.
.PHONY: docs
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Every picture of the READMEs and of docs/. SHARED: a folder with the photographs that are not in this repository.
.PHONY: figures
figures: $(VENV)/.ready
	$(VENV)/bin/python scripts/figures.py $(if $(SHARED),--shared $(SHARED))

# The page of `superpoint web`, from web/ into web/dist and into the package; needs Node.js 20 or newer.
PAGE := src/superpoint_trt/packaged/web
.PHONY: web
web: web/node_modules/.ready
	cd web && npm run --silent build
	rm -rf $(PAGE) && cp -r web/dist $(PAGE)

web/node_modules/.ready: web/package-lock.json
	cd web && npm ci --omit=dev --no-audit --no-fund
	@touch $@

# What the tests drive browsers with; the page is built without it.
web/node_modules/puppeteer-core: web/node_modules/.ready
	cd web && npm ci --no-audit --no-fund
	@touch web/node_modules/.ready $@

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/extract_overhead.py $(if $(WEIGHTS),--weights $(WEIGHTS))
	$(VENV)/bin/python benchmarks/export_cost.py $(if $(WEIGHTS),--weights $(WEIGHTS))

# On a machine with an NVIDIA GPU, in an environment that has TensorRT: make test-gpu GPU_PYTHON=python
test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu --confcutdir=tests/gpu

bench-gpu:
	$(GPU_PYTHON) benchmarks/engines.py --engines engines $(if $(WEIGHTS),--weights $(WEIGHTS)) --batch 1 --batch 8

# On a machine with an NVIDIA GPU and PyTorch: make train PHOTOS="folder folder" (training/README.md)
train:
	PYTHONPATH=src:. $(GPU_PYTHON) -m training $(foreach folder,$(PHOTOS),--photos $(folder)) --output runs/weights

demo:
	@$(if $(filter $(DEMO_VENV)/%,$(DEMO_PYTHON)),$(MAKE) -s $(DEMO_VENV)/.ready)
	$(if $(filter %.pth %.pt,$(WEIGHTS)),@$(DEMO_PYTHON) -c "import torch" 2>/dev/null || $(DEMO_PYTHON) $(PIP) '$(TORCH)')
	@mkdir -p demo
	$(SUPERPOINT) export $(if $(WEIGHTS),--weights $(WEIGHTS)) --output demo/superpoint.onnx --dynamic
	$(SUPERPOINT) demo --model demo/superpoint.onnx --output demo
	$(SUPERPOINT) infer --model demo/superpoint.onnx --image src/superpoint_trt/packaged/astronaut.jpg --save demo/features.npz

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) '$(TORCH)'
	$(VENV)/bin/python $(PIP) -e '.[dev,docs,torch,report,bulk,colmap,openvino]'
	@touch $@

$(DEMO_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(PIP) -e .
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) demo build web/dist web/node_modules $(PAGE) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
