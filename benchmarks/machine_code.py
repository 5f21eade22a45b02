"""What the Triton kernels compile to: registers, shared memory and instructions, without a GPU.

    python -m benchmarks.machine_code                  writes docs/machine-code.md
    python -m benchmarks.machine_code --arch sm_90 --dtype bf16 --case swin

Each case is compiled as a call of it would be launched, forward and backward with every gradient.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from swin_kernels.kernels.triton import ahead
from swin_kernels.kernels.triton.configs import KNOWN_GPUS, Gpu
from swin_kernels.kernels.triton.plan import (
    STRIDED,
    Needs,
    Plan,
    Step,
    TensorFacts,
    backward_plan,
    facts_of,
    forward_plan,
)
from swin_kernels.problem import Operands, Problem
from swin_kernels.testing import Case, make_grad_out, make_operands

REPORT = Path(__file__).resolve().parent.parent / "docs" / "machine-code.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
HEADER = """\
# The machine code of the Triton kernels

`make aot-report`, triton {triton}, torch {torch}: compiled ahead of time, read with cuobjdump
(NVIDIA) and from the assembly (AMD). Nothing here was run or timed.

Registers are a thread's, shared memory a program's in bytes; instructions, and matrix
instructions among them, are those of the whole kernel. `a tile` is the largest loop body times
warps: what a window of one head, or a tile of a larger window, costs the issue slots, both sides
of a branch counted. (On sm_100 a pipelined loop holds a copy of its last trip, which is counted
too: up to twice the truth.) Nothing spills to memory unless the end of this page says so; on
gfx942 scalars that overflow their registers are kept in lanes of vector registers.\
"""

_MODEL = {"batch": 64, "heads": 3, "head_dim": 32, "packed": True, "layout": "contiguous"}
CASES = {
    "swin": Case(size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **_MODEL),
    "swin, unshifted": Case(size=(56, 56), window=(7, 7), bias="table+index", **_MODEL),
    "swin, padded": Case(
        size=(64, 64),
        window=(7, 7),
        shift=(3, 3),
        bias="table+index",
        pads=True,
        pad_order="roll-pad",
        **_MODEL,
    ),
    "swin, window 12": Case(size=(96, 96), window=(12, 12), shift=(6, 6), bias="table", **_MODEL),
    "swin v2, window 8": Case(
        size=(64, 64), window=(8, 8), shift=(4, 4), bias="dense", cosine=True, **_MODEL
    ),
    "swin v2, window 24": Case(
        size=(96, 96), window=(24, 24), shift=(12, 12), bias="dense", cosine=True, **_MODEL
    ),
    "video swin": Case(
        size=(16, 56, 56), window=(8, 7, 7), shift=(0, 3, 3), bias="table", **_MODEL
    ),
    "swin unetr": Case(
        size=(48, 48, 48),
        window=(7, 7, 7),
        shift=(3, 3, 3),
        bias="table+index",
        pads=True,
        **{**_MODEL, "batch": 4, "head_dim": 16},
    ),
    "swin ir": Case(
        size=(64, 64),
        window=(8, 8),
        shift=(4, 4),
        bias="table",
        **{**_MODEL, "heads": 6, "head_dim": 30},
    ),
    "head dim 64": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **{**_MODEL, "head_dim": 64}
    ),
    "head dim 128": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", **{**_MODEL, "head_dim": 128}
    ),
    "window 4": Case(size=(56, 56), window=(4, 4), shift=(2, 2), bias="table", **_MODEL),
    "vit": Case(size=(197,), window=(197,), **{**_MODEL, "head_dim": 64}),
    "dropout": Case(
        size=(56, 56), window=(7, 7), shift=(3, 3), bias="table", dropout_p=0.1, **_MODEL
    ),
    "separate, masked": Case(
        size=(56, 56),
        window=(7, 7),
        bias="dense",
        mask="regions",
        **{**_MODEL, "packed": False},
    ),
}


@dataclass(frozen=True)
class Row:
    """One kernel of a case, compiled."""

    case: str
    dtype: str
    arch: str
    kernel: str
    layout: str
    num_warps: int
    code: ahead.Code

    @property
    def per_tile(self) -> int:
        """Warp-instructions of one trip through the kernel's loop."""
        return self.code.loop * self.num_warps

    def defects(self) -> list[str]:
        """What a shipped configuration must not have."""
        gpu, code = KNOWN_GPUS[self.arch], self.code
        found = []
        if code.spills or code.stack:
            found.append(f"{code.spills} spills, {code.stack} bytes of stack")
        if code.shared > gpu.shared_memory:
            found.append(f"{code.shared} bytes of shared memory, {gpu.shared_memory} are there")
        multiplies = not self.kernel.startswith(("_spread", "_table"))
        if multiplies and self.dtype != "fp32" and code.matrix == 0:
            found.append("no matrix instruction")
        return found


def _facts(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, TensorFacts]:
    return {
        name: facts_of(x if name in STRIDED else x.contiguous())
        for name, x in tensors
        if x is not None
    }


def plans_of(case: Case, gpu: Gpu) -> tuple[Plan, Plan]:
    """Forward and backward of a training step of the case, with every gradient."""
    with torch.device("meta"):
        operands = make_operands(case)
        if case.dropout_p > 0:
            operands = operands._replace(dropout_seed=torch.empty(1, dtype=torch.int64))
        problem = Problem.checked(operands, **case.options)
        facts = _facts(zip(Operands._fields, operands))
        forward = forward_plan(facts, problem.options, gpu, differentiable=True)
        kept = [
            (name, torch.empty(buffer.shape, dtype=buffer.dtype))
            for name, buffer in forward.buffers.items()
            if name in ("stats", "tiles")
        ]
        if "stats" in forward.buffers:
            kept.append(("out", torch.empty(forward.buffers["out"].shape, dtype=case.dtype)))
        grad_out = make_grad_out(case)
    facts |= _facts([("grad_out", grad_out), *kept])
    return forward, backward_plan(facts, problem.options, gpu, Needs(True, True, True))


def steps_of(case: Case, gpu: Gpu) -> Iterator[tuple[Step, dict[str, torch.dtype]]]:
    """Every launch of a training step, with the dtypes of what it names."""
    for plan in plans_of(case, gpu):
        for step in (*plan.steps, *plan.after):
            yield step, plan.dtypes


def compile_case(name: str, dtype: str, arch: str) -> list[Row]:
    """The rows of one case."""
    gpu, rows = KNOWN_GPUS[arch], {}
    for step, dtypes in steps_of(CASES[name].but(dtype=DTYPES[dtype]), gpu):
        kernel, config = step.kernel.split(".")[1], step.config
        block = f"{config.block_m}×{config.block_n}"
        layout = f"{block}, {config.num_warps} warps, {config.loop_stages} stages"
        code = ahead.read(ahead.compile_step(step, dtypes, gpu))
        rows[kernel] = Row(name, dtype, arch, kernel, layout, config.num_warps, code)
    return list(rows.values())


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| case | dtype | kernel | layout | registers | shared | instructions | a tile | matrix |"
    yield "|---|---|---|---|--:|--:|--:|--:|--:|"
    dtypes: dict[tuple, list[str]] = {}  # those whose code costs the same share a line
    for row in rows:
        code = row.code
        tile = f"{row.per_tile:,}" if code.loop else "–"
        figures = (
            f"| `{row.kernel}` | {row.layout} | {code.registers} | {code.shared:,} | "
            f"{code.instructions:,} | {tile} | {code.matrix} |"
        )
        dtypes.setdefault((row.case, figures), []).append(row.dtype)
    for (case, figures), names in dtypes.items():
        yield f"| {case} | {', '.join(names)} {figures}"


def report(rows: list[Row]) -> str:
    """The page: one table per architecture."""
    lines = [HEADER.format(triton=triton.__version__, torch=torch.__version__)]
    for arch in dict.fromkeys(row.arch for row in rows):
        lines += ["", f"## {arch}", "", *_table([row for row in rows if row.arch == arch])]
    if found := defects_of(rows):
        lines += ["", "## What is still wrong", "", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def defects_of(rows: list[Row]) -> list[str]:
    """Every defect of every row, a line each."""
    return [
        f"{row.case}, {row.dtype}, {row.arch}, `{row.kernel}`: {'; '.join(found)}"
        for row in rows
        if (found := row.defects())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    whole = not (arguments.case or arguments.dtype or arguments.arch)
    jobs = [
        (case, dtype, arch)
        for arch in arguments.arch or ARCHS
        for case in arguments.case or CASES
        for dtype in arguments.dtype or DTYPES
    ]
    # a fork of a process that runs torch's threads may hang
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_case, *zip(*jobs)) for row in found]
    if whole:
        REPORT.write_text(report(rows))
        print(f"wrote {REPORT.relative_to(REPORT.parent.parent)}")
    else:
        print(report(rows))
    sys.exit("\n".join(defects_of(rows)) or 0)


if __name__ == "__main__":
    main()
