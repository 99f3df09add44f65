# Every target sets itself up: on a fresh machine, type `make demo` or `make test` and nothing else.

PYTHON ?= python3
VENV ?= .venv
# A folder in COCO's 2017 layout; empty: synthetic images.
COCO ?=

# Threads that wait for each other spin less. Measured with another process on the same two cores: 3 to 9 times
# the images/s of the default; alone on the machine: no difference.
export GOMP_SPINCOUNT ?= 10000

BIN := $(VENV)/bin
READY := $(VENV)/.ready
WITH_COCO := $(if $(COCO),--coco-path "$(COCO)")

.PHONY: demo test lint bench clean

# Train a tiny detector for minutes, evaluate it, draw its detections and attention maps.
demo: $(READY)
	$(BIN)/conddetr demo $(WITH_COCO)

# The whole test suite. COCO=dir, or the variable CONDDETR_COCO, adds the tests on real images.
test: $(READY)
	$(if $(COCO),CONDDETR_COCO="$(COCO)") $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Inference of the large preset against the HuggingFace implementation, on the same weights.
bench: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/model.py

$(READY): pyproject.toml setup.py
	@echo "setting up $(VENV): PyTorch and the package, a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --editable ".[test]"
	touch $@

$(VENV)/.ready-bench: $(READY)
	$(BIN)/python -m pip install -qq --editable ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
