# PYTHON makes the environment; a torch that it already imports is used as it is.
PYTHON ?= python3
VENV ?= .venv
# `make gpu` installs nothing: it takes this Python with the torch that it has
GPU_PYTHON ?= python3
ARGS ?=

VENV_PYTHON := $(VENV)/bin/python
OBJECT := swin_kernels/_C_cpu.abi3.so
WITH_CUDA := "_C_cpu, and _C_cuda where there is a toolkit"
FORMATTED := $(shell find csrc tests examples -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# VENV comes first, so that plain `python3` is its own once it is there; PYTHON's tools come last:
# ninja, ruff and clang-format may be installed beside its torch
export PATH := $(abspath $(VENV)/bin):$(PATH):$(dir $(shell command -v $(PYTHON)))

BUILD_IN_PLACE = $(VENV_PYTHON) .ci/progress.py build/log $(if $(findstring cuda,$@),$(WITH_CUDA),$@) $(VENV_PYTHON) setup.py build_ext --inplace && \
	{ grep -A 4 '^$(CURDIR)/csrc.*warning:' build/log || true; }  # torch's own headers warn too

.NOTPARALLEL:  # tests and builds use both processors by themselves

.PHONY: help demo test test-fast test-rest test-all test-torch gpu gpu-rehearse aot-report check build cuda environment clean docs FORCE

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build  ## a timm Swin on a photograph, patched against stock; ARGS="--help" lists options
	@$(VENV_PYTHON) -m swin_kernels demo $(ARGS)

test: build build/cuda-sm_90  ## the tests, of the GPU kernels too, in 15 minutes; ARGS="-k name" picks
	@.ci/tests $(VENV_PYTHON) standard $(ARGS)

test-fast: build  ## after an edit: the CPU backends, patches and models, in 2 minutes
	@.ci/tests $(VENV_PYTHON) fast $(ARGS)

test-rest: build cuda  ## what `make test` leaves out
	@.ci/tests $(VENV_PYTHON) rest $(ARGS)

test-all: test test-rest  ## both

test-torch:  ## `make test` with another torch: TORCH=2.11, in an environment of its own
	@test -n "$(TORCH)" || { echo "test-torch: expected TORCH=VERSION, as TORCH=2.11"; exit 2; }
	@$(MAKE) --no-print-directory test VENV=$(VENV)-torch-$(TORCH)

gpu:  ## on a machine with a GPU: RUN=A, what matters most in 4 minutes; RUN=B, the rest in 7
	$(GPU_PYTHON) -m benchmarks.gpu_tools.driver $(RUN) $(ARGS)

gpu-rehearse: build  ## both runs of `make gpu` on a CPU, at toy sizes
	$(VENV_PYTHON) -m benchmarks.gpu_tools.driver A --rehearse $(ARGS)
	$(VENV_PYTHON) -m benchmarks.gpu_tools.driver B --rehearse $(ARGS)

aot-report: build cuda  ## build/*machine-code.md: what every kernel compiles to, without a GPU
	$(VENV_PYTHON) -m benchmarks.codegen.cuda_object
	$(VENV_PYTHON) -m benchmarks.codegen.machine_code $(ARGS)

check: environment  ## linters, types, formatting
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	clang-format --dry-run -Werror $(FORMATTED)

docs: environment  ## the documentation, in build/docs; warnings are errors
	$(VENV_PYTHON) -m sphinx -q -W --keep-going -d build/doctrees docs build/docs $(ARGS)

build: $(OBJECT)  ## the CPU extension, in place

cuda: build/cuda  ## the CUDA extension, in place, where there is a toolkit; SWIN_KERNELS_CUDA=0 not

environment: build/environment  ## the virtual environment, in VENV

# rewritten only when torch's version changed, so its time is that of the last change
build/environment: FORCE
	@$(PYTHON) .ci/environment.py $(VENV) $@ $(if $(TORCH),--torch $(TORCH))

$(OBJECT): build/environment setup.py $(shell find csrc)
	@command -v $${CXX:-c++} > /dev/null || \
		{ echo "no $${CXX:-c++} found: install a C++20 compiler, or name one with CXX=…"; exit 1; }
	@rm -f swin_kernels/_C_cuda*.so  # of other sources
	@SWIN_KERNELS_CUDA=0 $(BUILD_IN_PLACE)
	@touch $@

# takes minutes: for two architectures, unless TORCH_CUDA_ARCH_LIST names others
build/cuda: $(OBJECT)
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;9.0+PTX}" $(BUILD_IN_PLACE)
	@grep '^swin_kernels:' build/log
	@touch $@ $@-sm_90

build/cuda-sm_90: $(OBJECT)  # half of it
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0}" $(BUILD_IN_PLACE)
	@grep '^swin_kernels:' build/log
	@touch $@

clean:  ## what was built or cached; the environment stays
	rm -rf build dist out *.egg-info swin_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find swin_kernels tests .ci -name __pycache__ -prune -exec rm -rf {} +
