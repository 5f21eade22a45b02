"""The bank conflicts of a case's kernels, by banks.py.

python -m benchmarks.codegen.conflicts --case "T1 shift 3" --arch sm_90
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.cases import other_cases, swin_cases
from benchmarks.codegen import aot, sass
from benchmarks.codegen.banks import ARCHITECTURES, accesses, ideal, wavefronts
from benchmarks.codegen.plans import launches_in, plans_of
from benchmarks.report.rows import markdown_table
from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.testing import Case


class Count(NamedTuple):
    """What several accesses take."""

    accesses: int
    known: int  # of them; the rest is of these
    ideal: int
    wavefronts: float


def counted(code: Iterable[sass.Instruction], found: dict[int, float]) -> Count:
    every = [x for x in code if accesses(x)]
    known = [x for x in every if x.address in found]
    wanted, real = sum(ideal(x.name) for x in known), sum(found[x.address] for x in known)
    return Count(len(every), len(known), wanted, real)


def counts(code: list[sass.Instruction], warps: int) -> tuple[Count, Count]:
    """Those of a trip through the loop that costs most, by its longest way, and all others."""
    found = wavefronts(code, warps)
    trips = sass.main_loop(code)
    inside = {x.address for x in trips[1].instructions} if trips else set()
    graph = sass.Graph(code)
    reached = [x for block in graph.order for x in graph.blocks[block]]
    parts = ([x for x in reached if (x.address in inside) == of] for of in (True, False))
    loop, rest = (counted(part, found) for part in parts)
    return loop, rest


def rows_of(case: Case, arch: str) -> list[list[str]]:
    """The table's line of each kernel that a case launches."""
    gpu = KNOWN_GPUS[arch]
    plans, rows = plans_of(case, gpu), []
    for plan in (plans.inference, plans.backward):
        for step, dtypes in launches_in(plan):
            code = sass.parse(aot.listing_of(aot.compile_launch(step, dtypes, gpu)))
            row = [f"`{step.kernel.split('.')[1]}`"]
            for count in counts(code, step.config.num_warps):
                row += [f"{count.known} of {count.accesses}", f"{count.ideal}"]
                row.append(f"{count.wavefronts:.1f}")
            rows.append(row)
    return rows


def main() -> None:
    cases = swin_cases() | other_cases()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=cases)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    options = parser.parse_args()
    part = "known", "without conflicts", "with"
    heads = ("kernel", *(f"loop: {x}" for x in part), *(f"outside: {x}" for x in part))
    for case in options.case or cases:
        for arch in options.arch or ARCHITECTURES:
            print(f"\n{case}, {arch}: accesses, wavefronts of a warp\n")
            print("\n".join(markdown_table(heads, rows_of(cases[case], arch), "lrrrrrr")))


if __name__ == "__main__":
    main()
