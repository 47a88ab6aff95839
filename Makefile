# make demo   installs into .venv, learns Python's standard library for five minutes, shows what context is worth
# make test   installs and tests; make check lints, types and layers; make fix formats
# make docs   builds the documentation into build/site, any warning an error, and follows every link
# make wheel  builds dist/longnet_torch-….whl, recipes and types inside
.PHONY: install fix check test test-oldest test-deep test-gpu test-wheel test-browser wheel docs bench demo
.DELETE_ON_ERROR:

BIN := .venv/bin
PACKAGE := .venv/.package
INSTALLED := .venv/.installed
TORCH := 2.13.0
TRITON := 3.7.1
# Versions that passed; a new release of a library cannot break an installation. `make test CONSTRAINTS=` takes the newest.
CONSTRAINTS := constraints.txt
INSTALL := $(BIN)/pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable
# Without a GPU the CPU build of torch, which plain pip finds only where an index of such builds is set up; uv knows one.
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
# One thread a worker: two test processes share the cores better than their threads would.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

DEMO := runs/demo

install: $(INSTALLED)

$(INSTALLED): $(PACKAGE)
	$(INSTALL) '.[dev]'
	touch $@

$(PACKAGE): pyproject.toml $(CONSTRAINTS)
	python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "LongNet needs Python 3.11 or later")'
	python3 -m venv .venv
ifeq ($(HAS_GPU),)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH)+cpu \
	  || ($(BIN)/pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu torch==$(TORCH))
# Pinned here and not among the constraints: a CUDA build of torch brings the Triton that it needs.
	[ "$$(uname -s)" != Linux ] || $(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet triton==$(TRITON)
else
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch
endif
	$(INSTALL) .
	touch $@

fix: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not deep and not gpu and not browser"

# The oldest transformers that pyproject.toml allows, with what it needs, before the newest on the path.
OLDEST := .venv/.transformers-$(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml)

$(OLDEST): $(INSTALLED)
	rm -rf $@.partial
	$(BIN)/pip install --quiet --target $@.partial $(@:.venv/.transformers-%=transformers==%)
	mv $@.partial $@

test-oldest: $(OLDEST)
	PYTHONPATH=$(OLDEST) $(PYTEST) --numprocesses 2 --dist loadfile -m "not deep and not gpu and not browser" \
	  $(addprefix tests/,model evaluation training comparison bench cli data/test_tokenizer.py)

wheel: install
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

test-wheel: wheel
	$(PYTEST) tests/test_wheel.py

# Pages as a browser shows them; needs Chromium on the path (apt-get install chromium).
test-browser: install
	$(BIN)/pip install --quiet $(CONSTRAINTS:%=--constraint %) playwright
	$(PYTEST) -m browser tests/browser

docs: install
	$(BIN)/python docs/site.py

test-deep: install
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not gpu and not browser" --hypothesis-profile deep --timeout 36000

test-gpu: install
	$(BIN)/python -m pytest -m gpu

bench: install
	$(BIN)/longnet bench attention
	$(BIN)/longnet bench decode
	$(BIN)/longnet bench distributed

demo: $(PACKAGE)
	$(BIN)/longnet prepare "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
	  --suffixes .py --exclude test tests idle_test encodings pydoc_data lib2to3 \
	  --train-bpe 4096 --split-by folder --validation 0.08 --output $(DEMO)/data
	$(BIN)/longnet train demo --data.path $(DEMO)/data --output $(DEMO)/run --resume
	$(BIN)/longnet evaluate $(DEMO)/run $(DEMO)/data --contexts 64,256,1024 --tokens 131072 \
	  --output $(DEMO)/evaluation --report $(DEMO)/report.html
	$(BIN)/longnet generate $(DEMO)/run --prompt 'def ' --tokens 120
