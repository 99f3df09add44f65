# Every target sets up everything it needs: on a fresh machine, type `make demo` or `make test` and nothing else.

PYTHON ?= python3
VENV ?= .venv
# A folder in COCO's 2017 layout; empty: synthetic images.
COCO ?=

# Waiting threads spin less. Measured beside another process on the same two cores: 23 images/s, with the default 6;
# alone on the machine: no difference.
export GOMP_SPINCOUNT ?= 10000

# Many containers set this variable. Every process would then compile all its imports again: 6 s for PyTorch and its
# dependencies.
export PYTHONDONTWRITEBYTECODE :=

# Number of processes that share the tests; auto: one per core.
WORKERS ?= auto

BIN := $(VENV)/bin
# Layers of the setup: the demonstration needs PyTorch and the package; the tests and the benchmarks need more.
PACKAGE := $(VENV)/.ready-package
READY := $(VENV)/.ready
WITH_COCO = $(if $(COCO),--coco-path "$(COCO)")
# A free process takes the next file. The tests of a file share results that are expensive to compute.
SHARED := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest -q $(SHARED) --benchmark-disable
# Python compiles modules at their first import; pip would take 40 s to compile all of PyTorch.
PIP := $(BIN)/python -m pip install -qq --no-compile
# Prints the requirements of one of the package's extras, to install them without building the package again.
EXTRA := $(BIN)/python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*project["optional-dependencies"][sys.argv[1]], sep="\n")'

.PHONY: demo test test-all lint docs notebook wheel tree bench count predict paper gpu sanitize clean

# Train a tiny detector for two minutes, evaluate it, draw its detections and attention maps.
demo: $(PACKAGE)
	$(BIN)/conddetr demo $(WITH_COCO)

# The test suite. COCO=dir, or the variable CONDDETR_COCO, adds the tests on real images.
test: $(READY)
	@echo "testing: about 7 minutes on two cores, 9 if Triton has compiled nothing yet"
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(PYTEST)

# The test suite with the demonstration, the sanitizers (in parallel with -j2), and the tests marked slow. The
# demonstration always runs on shapes, even if COCO is set, because it is known to learn there.
test-all: WITH_COCO =
test-all: demo sanitize $(READY)
	@echo "testing, slow tests too: about 15 minutes on two cores"
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(PYTEST) -m "slow or not slow"

# All C, C++ and CUDA files; .clang-format has their style.
CODE = $(shell find csrc tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
lint: $(READY) tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CODE)
	cd build/tree && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy

# The documentation as a site in build/site; a broken link or anchor is an error. REPO_URL=address adds a link to the
# repository.
docs: $(VENV)/.ready-docs tree
	NO_MKDOCS_2_WARNING=1 REPO_URL="$(REPO_URL)" $(BIN)/python -m mkdocs build --strict --quiet
	@echo "built build/site/index.html"

# The notebook of the tutorial, from its page.
notebook: $(VENV)/.ready-docs
	$(BIN)/python docs/notebook.py

# A wheel for this Python with compiled kernels, which installs without a compiler (docs/building.md). Files of an
# earlier build are removed first, because they would be packed too.
wheel: $(PACKAGE)
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .

# The package as it is installed, with `kernels/` in it, as links to the files, for tools that read sources.
tree:
	rm -rf build/tree && mkdir -p build/tree/conddetr
	ln -s $(CURDIR)/conddetr/* $(CURDIR)/kernels build/tree/conddetr

# Each operation and the decoder compared with their peers, then inference and training of the large preset compared
# with the official-style and the HuggingFace implementation on the same weights; then tables and charts.
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py ops decoder
	$(BIN)/python benchmarks/model.py --compiled
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/run.py report
	$(BIN)/python benchmarks/run.py measured

# Launches, bytes and FLOPs of a training step and of inference, counted without a GPU and compared with earlier counts
# (docs/predictions.md).
count: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py step --before benchmarks/counts/before.json

# Times of the attention kernels on an H100, predicted from their machine code and compared with earlier predictions.
predict: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/run.py predict --before benchmarks/predictions/before.json

# The paper's tables, the convergence of both families at small scale, and cost against size. With COCO=dir the tables
# use its image sizes; convergence always uses synthetic images, so that its numbers do not depend on a data set.
paper: $(VENV)/.ready-bench
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/convergence.py --small
	$(BIN)/python benchmarks/run.py scaling

# On a machine with an NVIDIA GPU and PyTorch, without network: device tests, benchmarks and a training, packed into a
# few files, in at most 390 s. FLIGHT passes options on, for example FLIGHT="--limit 300" (docs/gpu.md).
FLIGHT ?=
gpu:
	$(PYTHON) tests/fly.py $(FLIGHT)

# CPU kernels under AddressSanitizer and UBSan, with a copy of the package built for them in build/sanitized.
SUITE := $(foreach op,attn sine match dropout bits conv3x3,tests/kernels/test_$(op).py) \
    -k "native or instruction or threads or rise"
sanitize: $(READY)
	CONDDETR_SANITIZE=address,undefined CONDDETR_CUDA=0 \
	    $(PIP) --no-deps --no-build-isolation --upgrade --target build/sanitized .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONSAFEPATH=1 PYTHONPATH=build/sanitized $(PYTEST) $(SUITE)

# The build's requirements come first, so that it uses this PyTorch and not a second one of several GB.
$(PACKAGE): pyproject.toml setup.py
	@echo "setting up $(VENV), 1 of 2: PyTorch (5 GB), about a minute"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel pybind11 ninja torch torchvision
	@echo "setting up $(VENV), 2 of 2: the package, with its kernels compiled, about a minute on two cores"
	$(PIP) --no-build-isolation --editable .
	touch $@

$(READY): $(PACKAGE)
	@echo "setting up $(VENV): packages for the tests, about 20 s"
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
