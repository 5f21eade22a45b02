# PYTHON makes the environment; a torch that it already imports is used as it is.
PYTHON ?= python3
VENV ?= .venv
# `make gpu` installs nothing: it takes this Python with the torch that it has
GPU_PYTHON ?= python3
ARGS ?=

RUN := $(VENV)/bin/python
OBJECT := swin_kernels/_C_cpu.abi3.so
FORMATTED := $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# VENV comes first, so that plain `python3` is its own once it is there; PYTHON's tools come last:
# ninja, ruff and clang-format may be installed beside its torch
export PATH := $(abspath $(VENV)/bin):$(PATH):$(dir $(shell command -v $(PYTHON)))

BUILD_IN_PLACE = $(RUN) setup.py build_ext --inplace > build/log 2>&1 \
	|| { cat build/log; exit 1; }; \
	grep -A 4 '^$(CURDIR)/csrc.*warning:' build/log || true  # torch's own headers warn too

.PHONY: demo test gpu aot-report check build cuda environment clean FORCE

demo: build  ## a timm Swin on a photograph, patched against stock; ARGS="--help" lists options
	@$(RUN) -m swin_kernels demo $(ARGS)

test: build cuda  ## the tests, also of the GPU kernels on this CPU; ARGS="-k name" picks some
	@.ci/tests $(RUN) $(ARGS)

gpu:  ## on a machine with a GPU: tests, benchmark, counters; under 10 minutes
	$(GPU_PYTHON) .ci/gpu.py $(ARGS)

aot-report: build cuda  ## docs/*machine-code.md: what every kernel compiles to, without a GPU
	$(RUN) -m benchmarks.cuda_object
	$(RUN) -m benchmarks.machine_code $(ARGS)

check: environment  ## linters, types, formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	clang-format --dry-run -Werror $(FORMATTED)

build: $(OBJECT)  ## the CPU extension, in place

cuda: build/cuda  ## the CUDA extension, in place, where there is a toolkit; SWIN_KERNELS_CUDA=0 not

environment: build/environment

# rewritten only when torch's version changed, so its time is that of the last change
build/environment: FORCE
	@$(PYTHON) .ci/environment.py $(VENV) $@

$(OBJECT): build/environment setup.py $(shell find csrc)
	@command -v $${CXX:-c++} > /dev/null || { echo "a C++20 compiler is needed (CXX=…)"; exit 1; }
	@echo "building $@"
	@rm -f swin_kernels/_C_cuda*.so  # of other sources
	@SWIN_KERNELS_CUDA=0 $(BUILD_IN_PLACE)
	@touch $@

# takes minutes: for two architectures, unless TORCH_CUDA_ARCH_LIST names others
build/cuda: $(OBJECT)
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;9.0+PTX}" $(BUILD_IN_PLACE)
	@grep '^swin_kernels:' build/log
	@touch $@

clean:  ## what was built or cached; the environment stays
	rm -rf build dist out *.egg-info swin_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find swin_kernels tests .ci -name __pycache__ -prune -exec rm -rf {} +
