# PYTHON makes the environment; a torch that it already imports is used as it is.
PYTHON ?= python3
VENV ?= .venv
# `make gpu` builds and installs nothing: it takes this Python with the torch that it has
GPU_PYTHON ?= python3
ARGS ?=

RUN := $(VENV)/bin/python
OBJECT := swin_kernels/_C_cpu.abi3.so
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# VENV comes first, so that plain `python3` is its own once it is there; PYTHON's tools come last:
# ninja, ruff and clang-format may be installed beside its torch
# the CUDA object takes minutes to compile: `make build SWIN_KERNELS_CUDA=1` also builds that
export SWIN_KERNELS_CUDA ?= 0
export PATH := $(abspath $(VENV)/bin):$(PATH):$(dir $(shell command -v $(PYTHON)))

.PHONY: demo test gpu aot-report check build environment clean FORCE

demo: build  ## a timm Swin on a photograph, patched against stock; ARGS="--help" lists options
	@$(RUN) -m swin_kernels demo $(ARGS)

test: build  ## the tests, and those of the Triton kernels interpreted; ARGS="-k name" picks some
	@.ci/tests $(RUN) $(ARGS)

gpu:  ## on a machine with a GPU: tests, benchmark, counters; under 10 minutes
	$(GPU_PYTHON) .ci/gpu.py $(ARGS)

aot-report: build  ## docs/machine-code.md: what every kernel compiles to, without a GPU
	$(RUN) -m benchmarks.machine_code $(ARGS)

check: environment  ## linters, types, formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	clang-format --dry-run -Werror $(FORMATTED)

build: $(OBJECT)  ## the extension, in place

environment: build/environment

# rewritten only when torch's version changed, so its time is that of the last change
build/environment: FORCE
	@$(PYTHON) .ci/environment.py $(VENV) $@

$(OBJECT): build/environment setup.py $(shell find csrc)
	@command -v $${CXX:-c++} > /dev/null || { echo "a C++20 compiler is needed (CXX=…)"; exit 1; }
	@echo "building $@"
	@$(RUN) setup.py --quiet build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }
	@grep -A 4 '^$(CURDIR)/csrc.*warning:' build/log || true  # torch's own headers warn too
	@touch $@

clean:  ## what was built or cached; the environment stays
	rm -rf build dist out *.egg-info swin_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find swin_kernels tests .ci -name __pycache__ -prune -exec rm -rf {} +
