"""What the Triton kernels should take on a GPU, from their machine code and the GPU's data sheet.

    python -m benchmarks.codegen.predict --gpu H200 --case "T1 shift 3"

A launch takes the longest of: its bytes at the rate of a copy, what a multiprocessor can keep in
flight of them (a loop of up to two stages loads, waits and then works), its instructions at four a
clock, and what it asks of each unit: fp32, the other arithmetic, exp2 (the special function unit),
shared memory (memory_path.py), matrices. Instructions are those of the trips through its loop, by
the short way for windows inside, by the long one for those that a seam cuts, and once a program
what is outside the loop. Waits and how well units overlap are not in it, nor is the second cache: a
prediction is a floor of this code. Launches are those of a CUDA graph. `make aot-report` writes the
tables for every case of the speed table to build/machine-code.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.cases import other_cases, swin_cases
from benchmarks.codegen import aot
from benchmarks.codegen.aot import Code
from benchmarks.codegen.chips import CHIPS, Chip, chip_named
from benchmarks.codegen.plans import launches_in, plans_of
from benchmarks.codegen.sass import Histogram
from benchmarks.report.rows import RESULTS, markdown_table, read
from swin_kernels.backends.triton.launch_spec import REGISTERS, LaunchSpec, Plan
from swin_kernels.backends.triton.launcher import kernel_of
from swin_kernels.cli.command import positive
from swin_kernels.problem import Operands
from swin_kernels.testing import Case, make_grad_out, make_operands

SCHEDULERS, WARP, RESERVED = 4, 32, 1024  # of a multiprocessor; lanes; bytes of a program's shared
SPECIAL = 16  # lanes a clock and multiprocessor, of exp2 and the like
LATENCY, CACHE_LATENCY = 0.7e-6, 0.3e-6  # seconds from a load to its data, under load


UNITS = ("memory", "latency", "issue", "fp32", "arithmetic", "exp", "shared", "matrix")
_FP32 = re.compile(r"^(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)")
_UNIFORM = re.compile(
    r"^(U[A-Z]|BRA|BSYNC|BSSY|BAR|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|LDC|S2|CS2|R2UR|LDS$)"
)


def _matrix_flop(name: str) -> int:
    """Of one instruction: HMMA.16816 of a warp, HGMMA.64x64x16 of a warp group (a quarter each)."""
    warp = name.startswith("HMMA.")
    shape = re.search(r"\.(16)(8)(4|8|16|32)\b" if warp else r"\.(\d+)x(\d+)x(\d+)", name)
    return 2 * math.prod(map(int, shape.groups())) // (1 if warp else 4) if shape else 0


def demands(instructions: Histogram, warps: int, chip: Chip) -> dict[str, float]:
    """Clocks of a multiprocessor that each unit needs for one program's instructions, by unit."""
    counts = dict.fromkeys(UNITS[2:], 0.0)
    for (name, clocks), count in instructions:
        n = count * warps
        counts["issue"] += n / SCHEDULERS
        counts["shared"] += n * clocks
        if name.startswith("MUFU"):
            counts["exp"] += n * WARP / SPECIAL
        elif _matrix_flop(name):
            counts["matrix"] += n * _matrix_flop(name) / chip.matrix
        elif _FP32.match(name):
            counts["fp32"] += n * WARP / chip.fp32
        elif name.startswith("IMAD"):  # in that unit, at the rate of integers
            counts["fp32"] += n * WARP / chip.arithmetic
        elif not clocks and not _UNIFORM.match(name):
            counts["arithmetic"] += n * WARP / chip.arithmetic
    return counts


class Launch(NamedTuple):
    """What is predicted of one launch."""

    kernel: str
    seconds: Mapping[str, float]  # by what bounds it
    inside: int = 0  # instructions a trip, all warps: a window that no seam cuts
    border: int = 0
    registers: int = 0
    shared: int = 0  # bytes a program
    programs: int = 0  # a multiprocessor holds at once
    in_flight: int = 0  # bytes of tokens that a multiprocessor asks for ahead

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def predicted(self) -> float:
        return self.seconds[self.bound]


def programs_at_once(code: Code, warps: int, chip: Chip) -> int:
    """How many programs of a kernel a multiprocessor holds."""
    registers = -(-code.registers // 8) * 8 * WARP * warps
    return min(
        REGISTERS // max(registers, 1),
        chip.shared // (code.shared + RESERVED),
        chip.warps // warps,
        chip.programs,
    )


def _sizes(case: Case, plans: Iterable[Plan]) -> dict[str, int]:
    """Bytes of every tensor that the launches of a case name."""
    with torch.device("meta"):
        operands, grad_out = make_operands(case), make_grad_out(case)
    tensors = {n: x for n, x in zip(Operands._fields, operands) if x is not None}
    sizes = {n: x.numel() * x.element_size() for n, x in (tensors | {"grad_out": grad_out}).items()}
    for plan in plans:
        buffers = plan.buffers.items()
        sizes |= {n: math.prod(shape) * dtype.itemsize for n, (shape, dtype) in buffers}
    return sizes


def bytes_of(step: LaunchSpec, sizes: Mapping[str, int]) -> int:
    """What a launch reads and writes, each tensor once; of packed ones the parts that it takes."""
    names = kernel_of(step).arg_names
    pointers = {name: x for name, x in step.pointers.items() if name in names and x is not None}
    # what an earlier pass left normalised is read instead
    if "unit_query_ptr" in pointers and "_dq_" not in step.kernel:
        del pointers["query_ptr"]
    if "unit_key_ptr" in pointers and "_dkv_" not in step.kernel:
        del pointers["key_ptr"]
    parts = {
        name: x for name, x in pointers.items() if re.match(r"(grad_)?(query|key|value)_ptr", name)
    }
    third = 1 if "key" in sizes else 3
    whole = {x for name, x in pointers.items() if name not in parts}
    return sum(sizes[x] // third for x in parts.values()) + sum(map(sizes.__getitem__, whole))


def _border(step: LaunchSpec) -> float:
    """The share of trips that take the longest way.

    Those are the windows that a seam of the shift cuts; of a backward that holds its bias, those
    before which it is read again: the first of a program, and where other seams cut.
    """
    numbers, windows = step.scalars, step.scalars["windows"]
    if step.config.holds_bias:
        cut = [n if seam else 0 for n, seam in zip(numbers["counts"], numbers["REGIONS"])]
        places = itertools.product(*map(range, numbers["counts"]))
        seams = [tuple(map(lambda x, n: x == n - 1, place, cut)) for place in places]
        changes = sum(a != b for a, b in itertools.pairwise(seams))
        programs = step.grid / numbers["heads"]
        return min(1.0, (changes + programs) / windows)
    whole = ((n - 1) / n for n, cut in zip(numbers["counts"], numbers["REGIONS"]) if cut)
    return 1 - math.prod(whole)


def _trips(step: LaunchSpec) -> tuple[int, int]:
    """Trips of a program through its loop, and the tokens of each kind that one loads."""
    numbers, tokens = step.scalars, step.scalars["TOKENS"]
    block_m, block_n = step.config.block_m, step.config.block_n
    if "_single_tile" in step.kernel:
        return numbers["windows_per_program"], tokens
    if "_dbias_" in step.kernel:
        return numbers["windows_per_program"], min(block_m, tokens) + min(block_n, tokens)
    if "_dkv_" in step.kernel:
        return -(-tokens // block_m), min(block_m, tokens)
    if "_dq_" in step.kernel or "_tiled_fwd_" in step.kernel:
        return -(-tokens // block_n), min(block_n, tokens)
    if "_indexed_grad_" in step.kernel:
        return -(-(tokens**2) // block_n), 0
    if "_bias_grad_" in step.kernel or "_table_grad_" in step.kernel:
        blocks = -(-tokens // block_n) if "_table" in step.kernel else 1
        return blocks * -(-numbers["runs"] // numbers["BLOCK_RUNS"]), 0  # sums, and no tokens
    return 0, 0  # an expanded bias: little beside the rest


def predict(
    step: LaunchSpec, code: Code, chip: Chip, sizes: Mapping[str, int], itemsize: int
) -> Launch:
    """What one launch takes, by everything that may bound it."""
    numbers, warps = step.scalars, step.config.num_warps
    seconds = {"memory": bytes_of(step, sizes) / chip.copy_rate}
    trips, tokens = _trips(step)
    border = _border(step) if tokens else 0.0
    # where the one trip was unrolled no loop tells what the units do, least of all one that waits
    looped = any("MMA" in kind.name for kind, _ in code.longest) or not tokens
    ways = {way: demands(way, warps, chip) for way in (code.shortest, code.longest)}
    outside = code.instructions - looped * sum(n for _, n in code.longest)
    rounds = -(-step.grid // chip.multiprocessors)  # programs of the busiest multiprocessor
    for unit in ways[code.shortest] if looped else ("issue",):
        inside, cut = ways[code.shortest][unit], ways[code.longest][unit]
        clocks = looped * max(1, trips) * ((1 - border) * inside + border * cut)
        if unit == "issue":
            clocks += outside * warps / SCHEDULERS
        seconds[unit] = rounds * clocks / chip.clock
    # whose sizes are in descriptors
    if any(kind.name.startswith("UTC") for kind, _ in code.longest):
        seconds.pop("matrix", None)
    programs, in_flight = min(programs_at_once(code, warps, chip), rounds), 0
    if trips and not tokens:  # sums of what was just written
        waves = -(-step.grid // (programs * chip.multiprocessors))
        seconds["latency"] = waves * trips * CACHE_LATENCY
    elif tokens:
        channels = numbers["HEAD_DIM"] + numbers["VALUE_DIM"]
        if "_single_tile_fwd" in step.kernel:
            channels += numbers["HEAD_DIM"]
        elif "_single_tile_bwd" in step.kernel:
            channels *= 2
        one = tokens * channels * itemsize
        # up to two stages a trip waits for its tile as soon as that is asked for, and then works:
        # the loop's DEPBAR leaves nothing under way
        waits = step.config.loop_stages < 3
        in_flight = programs * one * (1 if waits else step.config.loop_stages - 1)
        trip = LATENCY
        if waits:
            average = sum(
                share * sum(n for _, n in way)
                for share, way in ((1 - border, code.shortest), (border, code.longest))
            )
            trip += average * warps / SCHEDULERS / chip.clock
        seconds["latency"] = step.grid * trips * one * trip / in_flight / chip.multiprocessors
    inside, cut = (looped * sum(n for _, n in w) * warps for w in (code.shortest, code.longest))
    costs = code.registers, code.shared, programs, in_flight
    return Launch(step.kernel.split(".")[1], seconds, inside, cut, *costs)


def launches_of(case: Case, chip: Chip) -> dict[str, list[Launch]]:
    """The launches of the attention by direction, as `benchmarks.gpu` times it.

    That is an inference's forward and a training step's backward. Partial sums of what is no bias
    are summed by torch, which reads them once more.
    """
    gpu = chip.gpu
    plans = plans_of(case, gpu)
    sizes = _sizes(case, plans)
    found: dict[str, list[Launch]] = {"forward": [], "backward": []}
    for launches, plan in zip(found.values(), (plans.inference, plans.backward)):
        for step, dtypes in launches_in(plan):
            code = aot.read(aot.compile_launch(step, dtypes, gpu))
            launches.append(predict(step, code, chip, sizes, case.dtype.itemsize))
    if sums := plans.backward.sums:
        summed = sum(sizes[name] for name in sums) / chip.copy_rate
        found["backward"].append(Launch("sums by torch", {"memory": summed}))
    return found


def measured_seconds(case: str, chip: Chip, direction: str) -> float | None:
    """The newest median of our kernels under a graph on this GPU, from benchmarks/results."""
    found = {
        facts.get("date", ""): row.median_us * 1e-6
        for rows, facts in map(read, RESULTS.glob("gpu-*.csv"))
        if chip_named(facts.get("machine", "")) == chip
        for row in rows
        if (row.case, row.provider, row.direction) == (case, "ours, graph", direction)
        if row.median_us is not None
    }
    return found[max(found)] if found else None


def speed_cases() -> dict[str, Case]:
    """Those that `benchmarks.gpu` times."""
    return swin_cases() | other_cases()


def tables(
    found: Mapping[tuple[str, str], Mapping[str, Sequence[Launch]]],
) -> Iterator[str]:
    """Markdown: two tables a GPU, of {(case, its name): launches by direction}."""
    for name in dict.fromkeys(name for _, name in found):
        chip = CHIPS[name]
        yield from ("", f"### {chip.name} ({chip.arch})", "")
        yield (
            f"{chip.multiprocessors} multiprocessors at {chip.clock * 1e-9:.3g} GHz; a copy moves "
            f"{chip.copy_rate * 1e-12:.2f} TB/s."
        )
        yield ""
        here = [
            (case, *x) for (case, of), each in found.items() if of == name for x in each.items()
        ]
        times = []
        for case, direction, launches in here:
            total = sum(x.predicted for x in launches)
            memory = sum(x.seconds["memory"] for x in launches)
            real = measured_seconds(case, chip, direction)
            told = ("–", "–") if real is None else (_us(real), f"{total / real - 1:+.0%}")
            times.append((case, direction, _us(total), _us(memory), *told))
        heads = ("case", "direction", "predicted", "of which memory", "measured", "off by")
        yield from markdown_table(heads, times, "llrrrr")
        heads = (
            *("case", "kernel", "instructions a tile", "registers", "shared memory", "programs"),
            *("in flight", *(f"{unit} µs" for unit in UNITS), "bound"),
        )
        yield ""
        cells = (
            (
                *(case, f"`{x.kernel}`", ways(x.inside, x.border), x.registers),
                *(f"{x.shared / 1024:.1f} KB", x.programs, f"{x.in_flight / 1024:.1f} KB"),
                *(f"{x.seconds[u] * 1e6:.1f}" if u in x.seconds else "–" for u in UNITS),
                x.bound,
            )
            for case, _, launches in here
            for x in launches
        )
        yield from markdown_table(heads, cells, "ll" + "r" * (len(heads) - 3) + "l")


def ways(shortest: int, longest: int) -> str:
    """The instructions of a trip, in words."""
    return " to ".join(f"{n:,}" for n in dict.fromkeys((shortest, longest)) if n) or "–"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def predictions(
    cases: Iterable[str], gpus: Iterable[str], jobs: int | None = None
) -> dict[tuple[str, str], dict[str, list[Launch]]]:
    """{(case, a GPU's name): launches by direction}, compiled in processes."""
    keys = [(case, name) for name in gpus for case in cases]
    known = speed_cases()
    work = [known[case] for case, _ in keys], [CHIPS[name] for _, name in keys]
    return dict(zip(keys, aot.in_processes(launches_of, work, jobs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=speed_cases())
    parser.add_argument("--gpu", action="append", choices=CHIPS)
    parser.add_argument("--jobs", type=positive, help="processes that compile")
    options = parser.parse_args()
    found = predictions(options.case or speed_cases(), options.gpu or CHIPS, options.jobs)
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
