"""The built object `_C_cuda`, without a GPU: that it loads, and what its machine code is."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="the tool that reads machine code comes with Triton")

from tiers import thorough

from benchmarks.codegen import aot, cuda_object
from benchmarks.codegen.chips import CHIPS
from benchmarks.codegen.predict import programs_at_once
from swin_kernels import shifted_window_attention_qkvpacked
from swin_kernels.backends import native

BUILT_FOR = (  # by `make test` the one, by `make cuda` both
    "sm_90",
    pytest.param(
        "sm_80",
        marks=thorough(
            "test_cuda_object.py::test_kernels_spill_nothing_and_use_matrix_units_where_they_should"
        ),
    ),
)
pytestmark = pytest.mark.skipif(
    native.CUDA_OBJECT.path is None,
    reason=f"{native.CUDA_OBJECT.error}, for which a CUDA toolkit is needed",
)


@pytest.fixture(scope="module")
def kernels():
    assert native.CUDA_OBJECT.path is not None
    return cuda_object.kernels_of(native.CUDA_OBJECT.path)


def test_the_object_loads_and_registers_kernels_for_cuda():
    assert native.CUDA_OBJECT.error is None
    for direction in ("forward", "backward"):
        name = f"swin_kernels::window_attention_{direction}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def test_the_backend_says_what_it_runs_on():
    with pytest.raises(NotImplementedError, match="runs on CUDA tensors, got cpu"):
        shifted_window_attention_qkvpacked(torch.zeros(1, 4, 3, 1, 8), 2, backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("arch", BUILT_FOR)
def test_kernels_spill_nothing_and_use_matrix_units_where_they_should(arch, kernels):
    found = [k for k in kernels if k.arch == arch]
    if not found and "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip(f"the object was built for {', '.join(sorted({k.arch for k in kernels}))}")
    tiled = 5  # forward, statistics, gradients of queries, of keys and values, of the bias
    count = {p: sum(k.precision == p for k in found) for p in cuda_object.PRECISIONS.values()}
    # two widths of whole windows in half precision; fp64 has no whole-window backward
    half, single, double = tiled + 4, tiled + 2, tiled + 1
    assert count == {"fp16": half, "bf16": half, "tf32": single, "fp32": single, "fp64": double}
    defects = {(k.name, k.precision, k.channels): k.defects() for k in found}
    assert not any(defects.values()), {k: v for k, v in defects.items() if v}


@pytest.mark.parametrize(("arch", "gpu", "programs"), [("sm_90", "H200", 3), ("sm_80", "A100", 2)])
def test_a_backward_of_32_channels_has_room_for_what_it_loads_ahead(arch, gpu, programs, kernels):
    """Two tiles of queries and keys, and as many programs at once as keep memory busy."""
    name, channels, shared = "single_tile_backward", 32, cuda_object.shared_memory()
    found = [
        aot.Code(k.registers, 0, 0, shared[name, k.precision, channels], 0, 0)
        for k in kernels
        if (k.arch, k.name, k.channels) == (arch, name, channels)
        if k.precision in ("bf16", "fp16")
    ]
    if not found:
        pytest.skip(f"the object was not built for {arch}")
    assert len(found) == 2
    at_once = {programs_at_once(code, cuda_object.THREADS // 32, CHIPS[gpu]) for code in found}
    assert at_once == {programs}


def test_every_kernel_has_room_in_the_shared_memory_of_every_gpu(kernels):
    shared = cuda_object.shared_memory()
    sizes = {k: shared[k.name, k.precision, k.channels] for k in kernels}
    assert max(sizes.values()) <= cuda_object.SHARED
    page = cuda_object.report(kernels, shared, "13.0")
    for kernel, size in sizes.items():
        assert f"`{kernel.name}` | {kernel.channels} | {kernel.registers} | {size:,} |" in page
