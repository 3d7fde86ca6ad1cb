# `make run` and `make test` each do all their own set-up on a fresh machine.
#
#   make run         recognise the bundled sample lines (builds plugins and engines first where there is an NVIDIA GPU)
#   make test        build the plugin library and run every test that this machine can run
#   make gpu-check   on a GPU machine: tests, stock and fused engines, accuracy, benches -> results/<gpu>/
#   make gpu-sweep   there, after gpu-check: more batches, tokens and peers, single kernels, errors tensor by tensor
#   make family      there: every published configuration at full size, with random weights
#   make sanitize    there: every kernel under compute-sanitizer
#
# PYTHON=... SETUP=0 uses a Python that already has the packages (a container, a machine without a network).

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

BOOTSTRAP_PYTHON ?= python3
VENV ?= .venv
SETUP ?= 1
BUILD ?= build
MODEL ?= bundled
TEST_JOBS ?= 2
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)

ifeq ($(SETUP),1)
PYTHON := $(VENV)/bin/python
export PATH := $(abspath $(VENV)/bin):$(PATH)
PACKAGES := $(VENV)/.installed
TOOLCHAIN := .deps/.toolchain
else
PYTHON ?= $(BOOTSTRAP_PYTHON)
endif

.PHONY: help run test gpu-check gpu-sweep family sanitize setup build all-archs lint format lock clean

help:
	@sed -n '3,10s/^# \{0,1\}//p' $(MAKEFILE_LIST)

run: $(PACKAGES) $(if $(HAS_GPU),build)
	$(if $(HAS_GPU),$(PYTHON) build.py)
	$(PYTHON) -m runtime.recognize --model models/trocr-tiny-printed --labels samples/labels.tsv --ignore-case samples

# Two processes, and memory that they freed stays theirs: weights come and go, and pages that come back from the
# system have to be cleared, which took a third of the time.
test: $(PACKAGES) build
	MALLOC_TRIM_THRESHOLD_=200000000000 MALLOC_MMAP_MAX_=0 $(PYTHON) -m pytest -n $(TEST_JOBS) --dist worksteal

gpu-check: $(PACKAGES) $(TOOLCHAIN)
	$(PYTHON) -m profiling.gpu_check --model $(MODEL)

gpu-sweep: $(PACKAGES) $(TOOLCHAIN)
	$(PYTHON) -m profiling.gpu_check --model $(MODEL) --sweep

family: build
	$(PYTHON) -m profiling.family

sanitize: build
	$(PYTHON) -m profiling.sanitize

setup: $(PACKAGES) $(TOOLCHAIN)

# The plugin library and the kernels' Python module, for this machine's GPU (sm_90 where there is none).
build: $(PACKAGES) $(TOOLCHAIN)
	cmake -S . -B $(BUILD) -G Ninja
	cmake --build $(BUILD)

# Real code for every supported architecture, as it is shipped.
all-archs: $(PACKAGES) $(TOOLCHAIN)
	cmake --preset all-archs
	cmake --build --preset all-archs

$(VENV)/.installed: requirements.txt
	@$(BOOTSTRAP_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(BOOTSTRAP_PYTHON) is $$($(BOOTSTRAP_PYTHON) --version 2>&1); Python 3.11 or newer is needed:" \
	      "make BOOTSTRAP_PYTHON=/path/to/python3.11" >&2; exit 2; }
	@# a TensorRT that belongs to the system's Python (NVIDIA's image) stays visible
	@$(BOOTSTRAP_PYTHON) -m venv $(VENV) $$($(BOOTSTRAP_PYTHON) -c 'import tensorrt' 2>/dev/null && echo --system-site-packages) || \
	    { echo "error: cannot make a virtual environment in $(VENV); on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing the pinned Python packages into $(VENV) (about 2 minutes, 5 GB)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.txt
	@touch $@

# nvcc and TensorRT: what is installed is used, what is missing is fetched into $(VENV) and .deps/.
$(TOOLCHAIN): $(PACKAGES) requirements-cuda.txt requirements-tensorrt.txt scripts/get_cuda.py scripts/get_tensorrt.py
	$(PYTHON) scripts/get_cuda.py
	$(PYTHON) scripts/get_tensorrt.py
	@mkdir -p $(@D) && touch $@

CPP_SOURCES = $(shell git ls-files 'plugins/*.cu' 'plugins/*.cuh' 'plugins/*.h' 'plugins/*.cpp' 'tests/*.cpp' 'tests/*.h' 'tests/*.cuh')

lint: $(PACKAGES)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(PACKAGES)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CPP_SOURCES)

lock: $(PACKAGES)
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	    requirements.in --output-file requirements.txt

clean:
	rm -rf $(BUILD) build-all-archs engines
