"""Kernels that show a fault or a cost of machine code on purpose, compiled without a GPU."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper


@gluon.jit
def reused_operand_kernel(a_ptr, b_ptr, c_ptr, out_ptr, steps, WARPS: gl.constexpr):
    """Sums a·b + a·c: a barrier while `b` is read makes Triton forget, before 3.9, that it is."""
    ROWS: gl.constexpr = 16 * WARPS
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    a = gl.allocate_shared_memory(gl.bfloat16, [ROWS, 64], a_layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [64, 64], b_layout)
    c = gl.allocate_shared_memory(gl.bfloat16, [64, 64], b_layout)
    i = gl.arange(0, ROWS, gl.SliceLayout(1, flat))[:, None]
    k = gl.arange(0, 64, gl.SliceLayout(1, flat))[:, None]
    j = gl.arange(0, 64, gl.SliceLayout(0, flat))[None, :]
    a.store(gl.load(a_ptr + i * 64 + j))
    b.store(gl.load(b_ptr + k * 64 + j))
    acc = gl.zeros([ROWS, 64], gl.float32, sums)
    for step in range(steps):
        acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
        c.store(gl.load(c_ptr + k * 64 + j))
        acc = hopper.warpgroup_mma(a, c, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        b.store(gl.load(b_ptr + step * 4096 + k * 64 + j))
    gl.store(out_ptr + i * 64 + j, gl.convert_layout(acc, flat))


def compiled_reuse(warps: int) -> Any:
    """It, compiled for sm_90."""
    signature = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*bf16")
    signature |= {"out_ptr": "*fp32", "steps": "i32", "WARPS": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = GluonASTSource(reused_operand_kernel, signature, {(5,): warps}, aligned)
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})


@gluon.jit
def transposed_kernel(x_ptr, out_ptr, PHASES: gl.constexpr, CONFLICTS: gl.constexpr):
    """Transposes 32 by 32 numbers: a warp writes rows of shared memory, and reads columns."""
    rows: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, PHASES, [1, 0])
    i = gl.arange(0, 32, gl.SliceLayout(1, rows))[:, None]
    j = gl.arange(0, 32, gl.SliceLayout(0, rows))[None, :]
    tile = gl.allocate_shared_memory(gl.float32, [32, 32], shared)
    written = gl.load(x_ptr + i * 32 + j)
    tile.store(written)
    read = tile.load(columns)
    if CONFLICTS is not None:  # Triton from 3.7 on counts them itself
        gl.static_assert(gl.bank_conflicts(written.type, tile.type) == 0)
        gl.static_assert(gl.bank_conflicts(read.type, tile.type) == CONFLICTS)
    i = gl.arange(0, 32, gl.SliceLayout(1, columns))[:, None]
    j = gl.arange(0, 32, gl.SliceLayout(0, columns))[None, :]
    gl.store(out_ptr + j * 32 + i, read)


def compiled_transpose(arch: int, phases: int, conflicts: int) -> Any:
    """It, with `phases` ways to turn a row's columns; Triton asserts that it has `conflicts`."""
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "PHASES": "constexpr"}
    signature["CONFLICTS"] = "constexpr"
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(2)}
    constants = {(2,): phases, (3,): conflicts if hasattr(gl, "bank_conflicts") else None}
    source = GluonASTSource(transposed_kernel, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": 4})
