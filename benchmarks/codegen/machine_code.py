"""What the Triton kernels compile to: registers, shared memory and instructions, without a GPU.

    python -m benchmarks.codegen.machine_code     writes build/machine-code.md, all of it, and a
                                                  summary to docs/machine-code.md: some 13 minutes
    python -m benchmarks.codegen.machine_code --arch sm_90 --dtype bf16 --case swin

Each case is compiled as a call of it would be launched, forward and backward with every gradient.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton

from benchmarks.codegen import aot, predict
from benchmarks.codegen.chips import CHIPS
from benchmarks.codegen.layouts import CASES, RARE
from benchmarks.codegen.plans import launches_of
from benchmarks.report.rows import ROOT, markdown_table
from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.backends.triton.launch_spec import REGISTERS

REPORT = ROOT / "build" / "machine-code.md"
SUMMARY = ROOT / "docs" / "machine-code.md"
SHOWN = ("swin", "swin, window 12")  # in the summary, in bf16: a window in one tile, and in several
PREDICTED_CASES = ("T1 shift 3", "T3 shift 3")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # its products rounded
}
RARE_ON = (("bf16", "sm_80"), ("bf16", "sm_90"), ("fp32", "sm_90"), ("bf16", "sm_100"))
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# what no layout so far avoids, in instructions, by the Triton that compiled it, on sm_80, sm_90,
# sm_100 and sm_120; a test sees to it that these are the very numbers
KNOWN_SPILLS = {
    "3.8": {
        ("swin", "tf32", "_single_tile_bwd_kernel"): (40, 15, 0, 34),
        ("swin, unshifted", "tf32", "_single_tile_bwd_kernel"): (48, 9, 0, 31),
        ("swin v2, window 8", "fp32", "_single_tile_bwd_kernel"): (0, 3, 0, 0),
        ("swin v2, window 8", "tf32", "_single_tile_bwd_kernel"): (43, 54, 0, 44),
        ("dense, masked", "bf16", "_single_tile_bwd_kernel"): (0, 0, 37, 0),
        ("head dim 128, everything", "bf16", "_single_tile_fwd_kernel"): (0, 8, 0, 0),
        ("cosine, dropout", "bf16", "_tiled_dq_kernel"): (0, 0, 2, 0),
        ("swin, padded", "tf32", "_single_tile_bwd_kernel"): (0, 75, 0, 0),
        ("dropout", "fp32", "_single_tile_fwd_kernel"): (0, 6, 0, 0),
        ("cosine, dropout", "fp32", "_single_tile_fwd_kernel"): (0, 6, 0, 0),
        ("strided", "fp32", "_single_tile_bwd_kernel"): (0, 11, 0, 0),
    },
    "3.9": {
        ("swin", "tf32", "_single_tile_bwd_kernel"): (194, 0, 0, 128),
        ("swin, unshifted", "tf32", "_single_tile_bwd_kernel"): (208, 0, 0, 110),
        ("swin, padded", "tf32", "_single_tile_bwd_kernel"): (12, 64, 0, 0),
        ("swin, padded", "bf16", "_single_tile_bwd_kernel"): (0, 0, 3, 0),
        ("swin, padded", "fp16", "_single_tile_bwd_kernel"): (0, 0, 3, 0),
        ("swin v2, window 8", "fp32", "_single_tile_bwd_kernel"): (0, 17, 0, 0),
        ("swin v2, window 8", "tf32", "_single_tile_bwd_kernel"): (129, 0, 0, 117),
        ("separate, masked", "tf32", "_tiled_dq_kernel"): (0, 2, 2, 0),
        ("window 12, everything", "bf16", "_tiled_dq_kernel"): (0, 2, 0, 0),
        ("98 tokens, everything", "bf16", "_tiled_dq_kernel"): (0, 0, 2, 0),
        ("video swin, window 2", "bf16", "_tiled_fwd_kernel"): (0, 0, 2, 0),
        ("video swin, window 2", "fp16", "_tiled_fwd_kernel"): (0, 0, 2, 0),
        ("head dim 64, strided", "bf16", "_single_tile_bwd_kernel"): (0, 36, 0, 0),
        ("head dim 80", "bf16", "_tiled_dkv_kernel"): (0, 2, 0, 0),
        ("window 12, everything", "fp32", "_tiled_dbias_kernel"): (0, 3, 0, 0),
    },
}
COUNTED = tuple(KNOWN_SPILLS)


def triton_version() -> str:
    """Major and minor, as in `KNOWN_SPILLS`."""
    return ".".join(triton.__version__.split(".")[:2])


HEADER = """\
# The machine code of the Triton kernels

`make aot-report`, triton {triton}, torch {torch}: compiled ahead of time, read with cuobjdump
(NVIDIA) and from the assembly (AMD). Nothing here was run or timed.

Registers are a thread's, shared memory a program's in bytes; instructions, and matrix
instructions among them, are those of the whole kernel. `a tile` is a trip through its loop times
warps: what a window of one head, or a tile of a larger window, costs the issue slots, by the
shortest way and by the longest (a window that a seam of the shift cuts). Nothing spills to memory
unless the end of this page says so; on gfx942 scalars that overflow their registers are kept in
lanes of vector registers.\
"""

SUMMARY_HEADER = """\
# Machine code

What the Triton kernels compile to, read from their machine code without a GPU: {versions}. Nothing
here was run or timed. This is an excerpt, in bf16; all {count} kernels of five architectures are in
build/machine-code.md, and those of CUDA C++ in build/cuda-machine-code.md, after

```bash
make aot-report   # some 15 minutes on two cores
```

Registers are a thread's, shared memory a program's in bytes. `a tile` is a trip through the loop
times warps: what a window of one head, or a tile of a larger one, costs the issue slots, by the
shortest way and by the longest (a window that a seam of the shift cuts).\
"""
SUMMARY_PREDICTED = """\
## Predicted

What the attention of these cases would take, by `python -m benchmarks.codegen.predict`, from
instructions and each GPU's data sheet: a launch is bound by the longest of its bytes, what is in
flight, the issue slots and what each unit does, shared memory with what products of a warp group
read there. Waits, the second cache and imperfect overlap are not in it, so that the truth is
longer. In µs; in brackets what the bytes alone take:\
"""

PREDICTED = """\
## Predicted

What these kernels would take for the cases that `make gpu` times, in bf16, by
`benchmarks.codegen.predict`: every time below is predicted, from instructions and each GPU's data
sheet, nine tenths of whose memory rate a copy is taken to reach. A launch is bound by the longest
of its columns, in µs: bytes at the rate of a copy; bytes in flight, at 0.7 µs from a load to its
data; four instructions a clock; then what each unit does, where the trips through a loop tell it
(products of sm_100 are not counted, nor what they read), shared memory with the operands that
HGMMA reads there. Waits, the second cache and imperfect overlap are not in it, so that the truth is
longer. `off by` is predicted against measured.\
"""


@dataclass(frozen=True)
class Row:
    """One kernel of a case, compiled."""

    case: str
    dtype: str
    arch: str
    kernel: str
    layout: str
    num_warps: int
    code: aot.Code

    @property
    def per_tile(self) -> tuple[int, int]:
        """Warp-instructions of one trip through the kernel's loop, the shortest and the longest."""
        shortest, longest = (
            sum(count for _, count in way) * self.num_warps
            for way in (self.code.shortest, self.code.longest)
        )
        return shortest, longest

    def spills(self) -> list[str]:
        """What spills, if it is not what is known of this Triton; ValueError of another Triton."""
        version = triton_version()
        if version not in COUNTED:
            raise ValueError(f"Triton: expected {' or '.join(COUNTED)}, got {version}")
        code = self.code
        on_archs = KNOWN_SPILLS[version].get((self.case, self.dtype, self.kernel), ())
        known = dict(zip(ARCHS, on_archs)).get(self.arch, 0)
        if code.spills < known:
            return [f"only {code.spills} spills: lower KNOWN_SPILLS, so that they stay few"]
        if code.spills > known or (code.stack and not known):
            return [f"{code.spills} spills, {code.stack} bytes of stack"]
        return []

    def misfits(self) -> list[str]:
        """What no Triton may make of a shipped configuration."""
        gpu, code = KNOWN_GPUS[self.arch], self.code
        found = []
        if gpu.arch.startswith("sm_"):
            held = -(-code.registers // 8) * 8 * 32 * self.num_warps
            if held > REGISTERS:
                found.append(f"{held} registers a program, {REGISTERS} are there")
        if code.shared > gpu.shared_memory:
            found.append(f"{code.shared} bytes of shared memory, {gpu.shared_memory} are there")
        multiplies = self.kernel.startswith(("_single_tile_", "_tiled_"))
        if multiplies and self.dtype != "fp32" and code.matrix == 0:
            found.append("no matrix instruction")
        return found


def compile_case(name: str, dtype: str, arch: str) -> list[Row]:
    """The rows of one case."""
    gpu, rows = KNOWN_GPUS[arch], {}
    case = (CASES | RARE)[name].but(dtype=DTYPES[dtype])
    for step, dtypes in launches_of(case, gpu, tf32=dtype == "tf32"):
        kernel, config = step.kernel.split(".")[1], step.config
        block = f"{config.block_m}×{config.block_n}"
        layout = f"{block}, {config.num_warps} warps, {config.loop_stages} stages"
        code = aot.read(aot.compile_launch(step, dtypes, gpu))
        rows[kernel] = Row(name, dtype, arch, kernel, layout, config.num_warps, code)
    return list(rows.values())


def _table(rows: list[Row]) -> Iterator[str]:
    dtypes: dict[tuple, list[str]] = {}  # those whose code costs the same share a line
    for row in rows:
        code = row.code
        figures = (f"`{row.kernel}`", row.layout, code.registers, f"{code.shared:,}")
        figures += (f"{code.instructions:,}", predict.ways(*row.per_tile), code.matrix)
        dtypes.setdefault((row.case, figures), []).append(row.dtype)
    header = ("case", "dtype", "kernel", "layout", "registers", "shared", "instructions")
    lines = ((case, ", ".join(names), *rest) for (case, rest), names in dtypes.items())
    return markdown_table((*header, "a tile", "matrix"), lines, "llllrrrrr")


def report(rows: list[Row], predicted: Iterable[str] = ()) -> str:
    """The page: one table per architecture, and what `predict` makes of such code."""
    lines = [HEADER.format(triton=triton.__version__, torch=torch.__version__)]
    for arch in dict.fromkeys(row.arch for row in rows):
        lines += ["", f"## {arch}", "", *_table([row for row in rows if row.arch == arch])]
    spilled = [
        f"- {row.case}, {row.dtype}, {row.arch}, `{row.kernel}`: {row.code.spills} instructions"
        for row in rows
        if row.code.spills
    ]
    if spilled:
        lines += ["", "## What spills", "", *spilled]
    if predicted := list(predicted):
        lines += ["", PREDICTED, *predicted]
    return "\n".join(lines) + "\n"


def summary(
    rows: list[Row],
    unseen: list[Row],
    predicted: Mapping[tuple[str, str], Mapping[str, Sequence[predict.Launch]]],
) -> str:
    """The page in docs/: a few rows of `report`, what spills anywhere, and how to make the rest."""
    spilled = [row for row in rows + unseen if row.code.spills]
    known = ", ".join(dict.fromkeys(f"{x.case} ({x.dtype}, {x.arch})" for x in spilled))
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    text = SUMMARY_HEADER.format(versions=versions, count=len(rows + unseen))
    spills = f"Tests hold these counts, and that nothing spills to memory but for: {known or '–'}."
    shown = (
        (
            *(row.arch, row.case, f"`{row.kernel}`", row.layout, row.code.registers),
            *(f"{row.code.shared:,}", predict.ways(*row.per_tile)),
        )
        for row in rows
        if row.case in SHOWN and row.dtype == "bf16" and row.code.matrix
    )
    header = ("architecture", "case", "kernel", "layout", "registers", "shared", "a tile")
    lines = [text, "", textwrap.fill(spills, 100), "", *markdown_table(header, shown, "llllrrr")]
    times: dict[tuple[str, str], list[str]] = {}
    for (case, _), directions in predicted.items():
        for direction, launches in directions.items() if case in PREDICTED_CASES else ():
            seconds = zip(*((x.predicted, x.seconds["memory"]) for x in launches))
            total, memory = (f"{1e6 * sum(x):.0f}" for x in seconds)
            times.setdefault((case, direction), []).append(f"{total} ({memory})")
    gpus = list(dict.fromkeys(gpu for _, gpu in predicted))
    table = markdown_table(
        ("case", "direction", *gpus),
        ((*of, *cells) for of, cells in times.items()),
        "ll" + "r" * len(gpus),
    )
    lines += ["", SUMMARY_PREDICTED, "", *table]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES | RARE)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    whole = not (arguments.case or arguments.dtype or arguments.arch)
    jobs = [
        (case, dtype, arch)
        for arch in arguments.arch or ARCHS
        for case in arguments.case or CASES
        for dtype in arguments.dtype or DTYPES
    ]
    rare = [(case, *on) for on in RARE_ON for case in RARE] if whole else []
    found = aot.in_processes(compile_case, [*zip(*jobs, *rare)], arguments.jobs)
    rows = [row for of_case in found[: len(jobs)] for row in of_case]
    unseen = [row for of_case in found[len(jobs) :] for row in of_case]
    if whole:
        predicted = predict.predictions(predict.speed_cases(), CHIPS)
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(rows, predict.tables(predicted)))
        SUMMARY.write_text(summary(rows, unseen, predicted))
        print(f"wrote {REPORT.relative_to(ROOT)} and {SUMMARY.relative_to(ROOT)}")
    else:
        print(report(rows))
    defects = [
        f"{row.case}, {row.dtype}, {row.arch}, `{row.kernel}`: {'; '.join(wrong)}"
        for row in rows + unseen
        if (wrong := row.misfits() + row.spills())
    ]
    sys.exit("\n".join(defects) or 0)


if __name__ == "__main__":
    main()
