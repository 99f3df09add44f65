# Every target sets itself up: on a fresh machine, type `make demo` or `make test` and nothing else.

PYTHON ?= python3
VENV ?= .venv
# A folder in COCO's 2017 layout; empty: synthetic images.
COCO ?=

# Threads that wait for each other spin less. Measured with another process on the same two cores: 23 images/s where
# the default gives 6; alone on the machine: no difference.
export GOMP_SPINCOUNT ?= 10000

# Every process would compile all that it imports anew, 6 s each for PyTorch and what it brings, where the environment
# says so (many containers do).
export PYTHONDONTWRITEBYTECODE :=

# Processes that share the tests; auto: one for each core.
WORKERS ?= auto

BIN := $(VENV)/bin
# What is set up comes in layers: the demonstration needs PyTorch and the package, the tests more, benchmarks others.
PACKAGE := $(VENV)/.ready-package
READY := $(VENV)/.ready
WITH_COCO = $(if $(COCO),--coco-path "$(COCO)")
# A free process takes the next file, whose tests share what is expensive to make.
SHARED := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest -q $(SHARED) --benchmark-disable
# Python compiles what is imported when it is; pip would take 40 s for all of PyTorch.
PIP := $(BIN)/python -m pip install -qq --no-compile
# What an extra of the package names, to install it without building the package again.
EXTRA := $(BIN)/python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*project["optional-dependencies"][sys.argv[1]], sep="\n")'

.PHONY: demo test test-all lint docs wheel tree bench count predict paper gpu sanitize clean

# Train a tiny detector for two minutes, evaluate it, draw its detections and attention maps.
demo: $(PACKAGE)
	$(BIN)/conddetr demo $(WITH_COCO)

# The test suite. COCO=dir, or the variable CONDDETR_COCO, adds the tests on real images.
test: $(READY)
	@echo "testing: about 5 minutes on two cores, 7 where Triton has compiled nothing yet"
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(PYTEST)

# All of it once, with what takes long: the demonstration, the sanitizers (with -j2 beside it), and the tests that are
# marked slow. Whatever COCO is, the demonstration is that on shapes, which is known to learn.
test-all: WITH_COCO =
test-all: demo sanitize $(READY)
	@echo "testing, slow tests too: about 13 minutes on two cores"
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(PYTEST) -m "slow or not slow"

# All C, C++ and CUDA; .clang-format says how it is laid out.
CODE = $(shell find csrc tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
lint: $(READY) tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CODE)
	cd build/tree && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy

# The documentation as a site in build/site; a link or an anchor that leads nowhere is an error. REPO_URL=address shows
# a link to the repository there.
docs: $(VENV)/.ready-docs tree
	NO_MKDOCS_2_WARNING=1 REPO_URL="$(REPO_URL)" $(BIN)/python -m mkdocs build --strict --quiet
	@echo "built build/site/index.html"

# A wheel for this Python, with the kernels compiled: it installs without a compiler (docs/building.md). What an earlier
# build left would be packed too.
wheel: $(PACKAGE)
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .

# The package as it is when installed, `kernels/` in its place, for tools that read sources: links to the files.
tree:
	rm -rf build/tree && mkdir -p build/tree/conddetr
	ln -s $(CURDIR)/conddetr/* $(CURDIR)/kernels build/tree/conddetr

# Each operation and the decoder against their peers, then inference and training of the large preset against the
# official-style and the HuggingFace implementation on the same weights; tables and pictures from the result files.
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py ops decoder
	$(BIN)/python benchmarks/model.py --compiled
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/run.py report
	$(BIN)/python benchmarks/run.py measured

# What a training step and inference ask of a GPU, counted without one, beside how it was (docs/predictions.md).
count: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py step --before benchmarks/counts/before.json

# What the attention kernels should take on an H100, predicted from their machine code without one, beside how it was.
predict: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py predict --before benchmarks/predictions/before.json

# The paper's tables, the convergence of both families in small, and cost against size. COCO=dir gives the tables its
# image sizes; convergence stays with synthetic images, whose number does not depend on a data set.
paper: $(VENV)/.ready-bench
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/convergence.py --small
	$(BIN)/python benchmarks/run.py scaling

# On a machine with an NVIDIA GPU and its own PyTorch, without network: parity on the device, benchmarks and a training,
# packed into a few files; no longer than 390 s. FLIGHT passes options on, for example FLIGHT="--limit 300" (docs/gpu.md).
FLIGHT ?=
gpu:
	$(PYTHON) tests/fly.py $(FLIGHT)

# CPU kernels under AddressSanitizer and UBSan: a copy of the package, built with them, in build/sanitized.
SUITE := $(foreach op,attn sine match dropout bits conv3x3,tests/kernels/test_$(op).py) \
    -k "native or instruction or threads or rise"
sanitize: $(READY)
	CONDDETR_SANITIZE=address,undefined CONDDETR_CUDA=0 \
	    $(PIP) --no-deps --no-build-isolation --upgrade --target build/sanitized .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONSAFEPATH=1 PYTHONPATH=build/sanitized $(PYTEST) $(SUITE)

# First what the build needs: it then takes this PyTorch, not a second one of several GB.
$(PACKAGE): pyproject.toml setup.py
	@echo "setting up $(VENV), 1 of 2: PyTorch (5 GB), about a minute"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel pybind11 ninja torch torchvision
	@echo "setting up $(VENV), 2 of 2: the package, whose kernels are compiled, about a minute on two cores"
	$(PIP) --no-build-isolation --editable .
	touch $@

$(READY): $(PACKAGE)
	@echo "setting up $(VENV): what the tests need, about 20 s"
	$(EXTRA) test > $(VENV)/test.txt
	$(PIP) -r $(VENV)/test.txt
	touch $@

$(VENV)/.ready-docs: $(READY)
	$(EXTRA) docs > $(VENV)/docs.txt
	$(PIP) -r $(VENV)/docs.txt
	touch $@

$(VENV)/.ready-bench: $(READY)
	$(EXTRA) bench > $(VENV)/bench.txt
	$(PIP) -r $(VENV)/bench.txt
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
