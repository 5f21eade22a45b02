"""What the CUDA C++ kernels of whole windows should take on a GPU, from the built object.

    python -m benchmarks.codegen.predict_cuda --case "T1 shift 3" --gpu H200

As `predict` does for Triton's kernels, in bf16 and 32 channels. These kernels branch on the options
of a call, so a trip is the longest way that leaves out what a plain call skips: single elements,
dropout, cosine attention, an explicit mask; keys are counted as 64. What a program does once is all
that stands before its loop, with a trip for each number of the bias that a thread gathers. A
launch's runs are those that the object's own code chooses for the programs that a GPU holds.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.codegen import cuda_object, memory_path, sass
from benchmarks.codegen.aot import Code
from benchmarks.codegen.chips import CHIPS, Chip
from benchmarks.codegen.predict import (
    LATENCY,
    UNITS,
    demands,
    programs_at_once,
    speed_cases,
)
from benchmarks.report.rows import markdown_table
from swin_kernels.backends import native
from swin_kernels.testing import Case

WARPS, CHANNELS = cuda_object.THREADS // 32, 32
BF16 = ("13__nv_bfloat16", str(CHANNELS))  # as in a mangled name
BIAS_TRIPS = 64 * 64 // cuda_object.THREADS  # numbers of the bias that a thread gathers
# single elements of tokens or of a mask, fp64, norms; what is printed of Philox's first constant
_OTHER = re.compile(r"LDG\.|MUFU\.(RSQ|SQRT)|D(ADD|MUL|FMA|SETP)|FCHK|STG(?!.*\.128)")
_PHILOX = re.compile(r"0xd2511f53|-0x2daee0ad", re.I)


@dataclass(frozen=True)
class Body:
    """A kernel of the object: its trip and what it does once, all for one warp."""

    registers: int
    inside: sass.Trip  # a window that no seam cuts
    border: sass.Trip
    once: sass.Histogram
    clocks: Mapping[int, float]  # of the path to memory, by address

    @property
    def held(self) -> float:
        """The share of a trip for which the tokens that are asked for last fill their place."""
        code = [x.base for x in self.inside.instructions] * 3
        names = [f"{x.name} {x.operands}" for x in self.inside.instructions] * 3
        asked = max(i for i, x in enumerate(code[: len(code) // 3]) if x == "LDGSTS")
        for i in range(asked, len(code)):
            groups = code[asked : i + 1].count("LDGDEPBAR")
            wait = re.match(r"DEPBAR\.LE SB0, 0x(\d)", names[i])
            if wait and groups > int(wait[1]):
                return max(0.0, 1 - (i - asked) * 3 / len(code))
        return 1.0


def _skipped(block: Sequence[sass.Instruction], border: bool) -> bool:
    """Whether a block belongs to what a call without those options never runs."""
    return any(
        _OTHER.match(x.name)
        or _PHILOX.search(x.operands)
        or (x.base == "CALL" and not x.guard)
        or (not border and x.guard and x.base == "FADD")  # the shift mask
        for x in block
    )


def _way(graph: sass.Graph, head: int, border: bool) -> sass.Trip:
    """One trip of the loop at `head`."""
    loops = graph.loops()
    skipped = {b for b in loops[head] if _skipped(graph.blocks[b], border)}
    for inner in loops.values():
        names = {x.name for b in inner for x in graph.blocks[b]}
        wide = any(re.match(r"LDGSTS|STG.*\.128", name) for name in names)
        if inner < loops[head] and inner & skipped and not wide:  # of single elements
            skipped |= inner
    return graph.without(skipped).trip(head, loops[head] - skipped, max)


def body_of(code: list[sass.Instruction], registers: int, arch: str) -> Body:
    """The ways through one kernel."""
    graph = sass.Graph(code)
    loops = graph.loops()
    head = max(loops, key=lambda x: len(graph.trip(x, loops[x], max)))
    before = set(graph.order[: graph.order.index(head)])
    clocks = memory_path.clocks_of(code, arch, WARPS)
    once: Counter[sass.Kind] = Counter()
    for first, body in loops.items():
        names = Counter(x.base for b in body for x in graph.blocks[b])
        if body <= before and names["LDG"]:  # the bias is gathered, or single elements are loaded
            before -= body
            gathers = graph.trip(first, body, max).histogram(clocks) if names["STS"] == 1 else ()
            once.update({kind: n * BIAS_TRIPS for kind, n in gathers})
    once.update(x.kind(clocks) for b in before for x in graph.blocks[b])
    ways = (_way(graph, head, border) for border in (False, True))
    return Body(registers, *ways, tuple(once.items()), clocks)


@cache
def bodies(path: Path) -> dict[tuple[str, str], Body]:
    """{(kernel, architecture): its body} of the kernels of whole windows in bf16."""
    registers = {
        (arch, function): int(cost[1])
        for arch, function, line in cuda_object.dump(path, "--dump-resource-usage")
        if (cost := re.search(r"REG:(\d+)", line))
    }
    listings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arch, function, line in cuda_object.dump(path, "--dump-sass"):
        listings[arch, function].append(line)
    found = {}
    for (arch, function), lines in listings.items():
        name = cuda_object.NAME.search(function)
        if name and name[1].startswith("single_tile") and name.group(2, 4) == BF16:
            code = sass.parse("\n".join(lines))
            found[name[1], arch] = body_of(code, registers[arch, function], arch)
    return found


def predict(case: Case, kernel: str, chip: Chip, path: Path) -> dict[str, object]:
    """A row of the table: the columns' values by name; times in seconds."""
    body = bodies(path)[kernel, chip.arch]
    shared = cuda_object.shared_memory()[kernel, "bf16", CHANNELS]
    resident = programs_at_once(Code(body.registers, 0, 0, shared, 0, 0), WARPS, chip)
    tokens, windows = case.grid.tokens, case.batch * case.grid.windows
    problem = windows, case.heads, resident * chip.multiprocessors
    length = int(cuda_object.check("run lengths", " ".join(map(str, problem))))
    runs = -(-windows // length)
    rounds = -(-runs * case.heads // chip.multiprocessors)  # programs of the busiest multiprocessor
    cut = 1 - math.prod((n - 1) / n for n, s in zip(case.grid.counts, case.shift) if s)
    seconds = {}
    codes = body.once, *(way.histogram(body.clocks) for way in (body.inside, body.border))
    once, *ways = (demands(code, WARPS, chip) for code in codes)
    for unit in UNITS[2:]:
        trip = (1 - cut) * ways[0][unit] + cut * ways[1][unit]
        seconds[unit] = rounds * (once[unit] + length * trip) / chip.clock
    one, backward = tokens * case.head_dim * case.dtype.itemsize, "backward" in kernel
    bytes_moved = windows * case.heads * one * (7 if backward else 4)
    if backward:  # partial sums, written and read
        bytes_moved += 2 * runs * case.heads * tokens**2 * 4
    seconds["memory"] = bytes_moved / chip.copy_rate
    trip = LATENCY + body.held * ways[1]["issue"] / chip.clock
    at_once = min(resident, rounds)
    seconds["latency"] = rounds / at_once * length * trip
    sizes = [len(way) * WARPS for way in (body.inside, body.border)[: 1 + (cut > 0)]]
    return {
        "windows a run": length,
        "programs": runs * case.heads,
        "at once": at_once,
        "once, instructions": f"{sum(n for _, n in body.once) * WARPS:,}",
        "a window": " to ".join(f"{n:,}" for n in sizes),
        "registers": body.registers,
        "shared": f"{shared / 1024:.1f} KB",
        "in flight": f"{at_once * one * (4 if backward else 3) / 1024:.1f} KB",
        "held": f"{body.held:.0%}",
        **{f"{unit} µs": f"{seconds[unit] * 1e6:.1f}" for unit in UNITS},
        "bound": max(seconds, key=lambda unit: seconds[unit]),
    }


def table(cases: Sequence[str], gpus: Sequence[str], path: Path) -> Iterator[str]:
    """Markdown, a line for each launch."""
    rows = [
        {"GPU": name, "case": case, "kernel": kernel.removeprefix("single_tile_")}
        | predict(speed_cases()[case], kernel, CHIPS[name], path)
        for name in gpus
        for case in cases
        for kernel in ("single_tile_forward", "single_tile_backward")
    ]
    columns = tuple(rows[0])
    yield from markdown_table(
        columns, (tuple(r.values()) for r in rows), "lll" + "r" * (len(columns) - 4) + "l"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", choices=[n for n in speed_cases() if n[0] == "T"]
    )
    gpus = [name for name, chip in CHIPS.items() if chip.arch in ("sm_80", "sm_90")]
    parser.add_argument("--gpu", action="append", choices=gpus)
    options = parser.parse_args()
    if native.CUDA_OBJECT.path is None:
        sys.exit(f"predict_cuda: {native.CUDA_OBJECT.error}")
    built = {arch for _, arch in bodies(native.CUDA_OBJECT.path)}
    if lacking := sorted({CHIPS[name].arch for name in options.gpu or ()} - built):
        sys.exit(
            f"predict_cuda: the object has no code for {', '.join(lacking)}, only for "
            f"{', '.join(sorted(built))}: build it with TORCH_CUDA_ARCH_LIST"
        )
    gpus = options.gpu or [name for name in gpus if CHIPS[name].arch in built]
    cases = options.case or ["T1 shift 3", "T3 shift 3", "T4 shift 0"]
    print("\n".join(table(cases, gpus, native.CUDA_OBJECT.path)))


if __name__ == "__main__":
    main()
