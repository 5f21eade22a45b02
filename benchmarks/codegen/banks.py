"""Bank conflicts of shared memory in NVIDIA's machine code, without a GPU.

    python -m benchmarks.codegen.banks --case "T1 shift 3" --arch sm_90

Shared memory has 32 banks of 4 bytes. In one pass each bank gives one word, to every lane that asks
for it: a warp whose lanes want different words of a bank takes several (CUDA C++ programming guide,
"Shared Memory" of compute capability 5.x and since). With 8 bytes a lane each half of a warp is
served by itself, with 16 each quarter (Andersch et al., GTC 2019, S9593, "phases"; NVIDIA/cutlass,
issue 328). LDSM and STSM move matrices of eight rows of 16 bytes, and lanes 8i to 8i + 7 give the
addresses of the i-th (PTX ISA, ldmatrix): each is a quarter warp's access. LDGSTS counts as a
store. Passes are called wavefronts, as in Nsight Compute.

Which address a lane gives is found by `lanes`. An unknown that the lanes share changes nothing:
accesses are aligned, so that it turns all banks alike. Lanes that a predicate of unknown value may
turn off are counted. What HGMMA and TMA read by descriptors is not counted, nor are atomics.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.cases import other_cases, swin_cases
from benchmarks.codegen import aot, sass
from benchmarks.codegen.lane_values import Value
from benchmarks.codegen.lanes import WARP, Interpreter, State
from benchmarks.codegen.plans import launches_in, plans_of
from benchmarks.report.rows import markdown_table
from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.testing import Case

ARCHITECTURES = ("sm_80", "sm_90")  # whose instructions were gone through
BANKS, BANK = 32, 4  # bytes
_LOADS, _STORES = ("LDS", "LDSM"), ("STS", "STSM", "LDGSTS")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def accesses(x: sass.Instruction) -> bool:
    """Whether it reads or writes shared memory at addresses of its lanes."""
    return x.base in (*_LOADS, *_STORES) and x.guard not in ("@!PT", "@!UPT")


def _shape(name: str) -> tuple[int, int]:
    """The bytes at each address, and how many lanes give one."""
    base, *parts = name.split(".")
    if base in ("LDSM", "STSM"):
        matrices = int(parts[-1]) if parts[-1].isdigit() else 1
        return 16, 8 * matrices
    return next((_BYTES[x] for x in parts if x in _BYTES), BANK), WARP


def ideal(name: str) -> int:
    """Wavefronts of an access without a conflict."""
    size, lanes = _shape(name)
    return max(1, size * lanes // (BANKS * BANK))


def _passes(addresses: np.ndarray, active: np.ndarray, size: int) -> int:
    """Wavefronts of a warp whose lanes give these addresses."""
    together = BANKS * BANK // max(size, BANK)  # lanes that are served at once
    count = 0
    for first in range(0, len(addresses), together):
        lanes = slice(first, first + together)
        begins = addresses[lanes][active[lanes]] // BANK
        words = np.unique(begins[:, None] + np.arange(max(1, size // BANK)))
        count += int(np.bincount(words % BANKS, minlength=1).max())
    return count


def _places(address: Value, size: int) -> Iterator[np.ndarray]:
    """The addresses, but for what turns all banks alike; each way that words may be cut."""
    if size >= BANK:
        yield address.lanes - address.lanes[:, :1]
    else:
        for unknown in range(0, BANK, min(max(address.step, size), BANK)):
            yield address.lanes - (address.lanes[:, :1] & -BANK) + unknown


def _counted(x: sass.Instruction, state: State, warps: int) -> float | None:
    """The wavefronts of one access; None where they are not known."""
    size, lanes = _shape(x.name)
    address = state.address(x.operands.split(", ")[x.base in _LOADS])
    if address is None:
        return None
    guard = state.read(x.guard[1:]) if x.guard else None
    on = np.ones((1, 1), bool) if guard is None or not guard.exact else guard.lanes != 0
    active = np.broadcast_to(on, (warps, WARP))[:, :lanes]
    counts = {
        sum(map(_passes, np.broadcast_to(place, (warps, WARP))[:, :lanes], active, [size] * warps))
        for place in _places(address, size)
    }
    return counts.pop() / warps if len(counts) == 1 else None


def wavefronts(code: Sequence[sass.Instruction], warps: int) -> dict[int, float]:
    """By an access's address in the code: its wavefronts, on average over a program's warps.

    An access is missing where the addresses of its lanes are not known.
    """
    found = {
        x.address: _counted(x, state, warps)
        for x, state in Interpreter(code, warps).states()
        if accesses(x)
    }
    return {address: count for address, count in found.items() if count is not None}


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
