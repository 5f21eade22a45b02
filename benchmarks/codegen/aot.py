"""Compiles a plan's launches for a GPU that need not be present, and reads the machine code's cost.

The specialisation is the one a launch would get: integers equal to 1 are constants, and what 16
divides is said to be so. cuobjdump comes with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.codegen import memory_path, sass
from swin_kernels.backends.triton.kernel_args import arguments_of
from swin_kernels.backends.triton.launch_spec import Gpu, LaunchSpec
from swin_kernels.backends.triton.launcher import kernel_of
from swin_kernels.backends.triton.token_layout import LARGEST_INT32
from swin_kernels.testing import DTYPE_NAMES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = DTYPE_NAMES | {torch.int32: "i32", torch.int64: "i64"}
# HMMA of a warp; sm_90: HGMMA of a warp group; sm_100: UTCHMMA on the tensor cores' own memory
MATRIX = re.compile(r"^(U?T?C?[HQ]G?MMA|v_mfma|OMMA)")
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Code:
    """What one compiled kernel costs."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that bring what did not fit the registers to memory, or back
    shared: int  # bytes a program
    instructions: int
    matrix: int  # matrix instructions
    # of the loop that costs most, a warp's trip by the shortest and by the longest way
    shortest: sass.Histogram = ()
    longest: sass.Histogram = ()


def target_of(gpu: Gpu) -> GPUTarget:
    if gpu.arch.startswith("sm_"):
        return GPUTarget("cuda", int(gpu.arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", gpu.arch, gpu.warp_size)


def _specialised(value: Any, place: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The type of an argument that is no pointer, as Triton's own launch would take it."""
    if isinstance(value, tuple):
        types = [_specialised(v, (*place, i), constants, attributes) for i, v in enumerate(value)]
        return type(value)._make(types) if hasattr(value, "_make") else tuple(types)
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[place] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[place] = [["tt.divisibility", 16]]
    return "i32" if -LARGEST_INT32 - 1 <= value <= LARGEST_INT32 else "i64"


def source_of(spec: LaunchSpec, dtypes: dict[str, torch.dtype]) -> ASTSource:
    """A launch's kernel for tensors that are aligned to 16 bytes."""
    kernel = kernel_of(spec)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, ((name, value), parameter) in enumerate(
        zip(arguments_of(spec, kernel.arg_names).items(), kernel.params)
    ):
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif name.endswith("_ptr"):
            signature[name] = f"*{_TYPES[dtypes[value]]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _specialised(value, (position,), constants, attributes)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(spec: LaunchSpec, dtypes: dict[str, torch.dtype], gpu: Gpu) -> Any:
    """The compiled kernel, as `triton.compile` returns it."""
    target, options = target_of(gpu), spec.config.options
    return triton.compile(source_of(spec, dtypes), target=target, options=options)


def in_processes(
    function: Callable, columns: Sequence[Sequence], jobs: int | None = None
) -> list[Any]:
    """`map`, each call in a process of several."""
    # a fork of a process that runs torch's threads may hang
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(function, *columns))


def _dumped(compiled: Any, what: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        # what nvdisasm warns of the format of its input is of no use here
        return subprocess.run(
            [CUOBJDUMP, what, file.name], capture_output=True, check=True, text=True
        ).stdout


def listing_of(compiled: Any) -> str:
    """The machine code of a kernel for NVIDIA's GPUs."""
    return _dumped(compiled, "--dump-sass")


def _read_cuda(compiled: Any) -> Code:
    usage = _dumped(compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    code = sass.parse(listing_of(compiled))
    instructions, matrix, spills = counts_of([x.base for x in code if x.base != "NOP"])
    registers, stack = map(int, found.groups())
    clocks = memory_path.clocks_of(
        code, f"sm_{compiled.metadata.target.arch}", compiled.metadata.num_warps
    )
    trips = (trip.histogram(clocks) for trip in sass.main_loop(code) or ())
    return Code(registers, stack, spills, compiled.metadata.shared, instructions, matrix, *trips)


def counts_of(names: Sequence[str]) -> tuple[int, int, int]:
    """Instructions, those of matrices and those that spill, by their names without suffixes."""
    matrix = sum(bool(MATRIX.match(name)) for name in names)
    return len(names), matrix, sum(name in SPILLS for name in names)


def _read_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    body = re.findall(r"^\t([a-z]\w+)(?:[ \t]|$)", text, re.M)
    return Code(
        number("vgpr_count"),
        number("private_segment_fixed_size"),
        # scalars that overflow go to lanes of vector registers, and never to memory
        sum(name.startswith("scratch_") for name in body),
        number("group_segment_fixed_size") or compiled.metadata.shared,
        len(body),
        sum(name.startswith("v_mfma") for name in body),
    )  # its loops are not read


def read(compiled: Any) -> Code:
    """What the machine code of a compiled kernel costs."""
    return _read_cuda(compiled) if "cubin" in compiled.asm else _read_amd(compiled)
