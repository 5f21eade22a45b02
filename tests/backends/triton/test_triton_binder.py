"""Triton's own binding of arguments, without a GPU: what a launch specialises a kernel for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from benchmarks.codegen import aot
from benchmarks.codegen.plans import launches_of
from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.backends.triton.kernel_args import arguments_of
from swin_kernels.backends.triton.launcher import INTERPRETED, kernel_of
from swin_kernels.testing import Case

CASES = (
    Case(2, (14, 14), (7, 7), (3, 3), 3, 32, bias="table", dtype=torch.float16, packed=True),
    Case(1, (13, 13), (7, 7), (3, 3), 3, 32, bias="dense", mask="soft", pads=True, cosine=True),
    Case(1, (24, 20), (12, 12), (6, 0), 2, 32, bias="table+index", dropout_p=0.5, pads=True),
)


@pytest.mark.skipif(INTERPRETED, reason="there nothing is compiled")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_binds_what_is_compiled_for_a_gpu_that_is_absent(case):
    """Geometry and constants are tuples with names: their types, and what is constant in them."""
    case, gpu = case.but(layout="contiguous"), KNOWN_GPUS["sm_90"]
    compiler = CUDABackend(GPUTarget("cuda", 90, 32))
    for spec, dtypes in launches_of(case, gpu):
        kernel = kernel_of(spec)
        arguments = {
            name: torch.empty(16, dtype=dtypes[x]) if name.endswith("_ptr") and x else x
            for name, x in arguments_of(spec, kernel.arg_names).items()
        }
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        bound, found, _ = bind(*arguments.values(), **spec.config.options, debug=False)
        expected = aot.source_of(spec, dtypes).signature
        assert {name: kind for name, (kind, _) in zip(bound, found)} == expected
        if "geometry" in expected:
            assert expected["geometry"]._fields == arguments["geometry"]._fields
