"""Bank conflicts of shared memory in NVIDIA's machine code, without a GPU.

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

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.codegen import sass
from benchmarks.codegen.lane_values import Value
from benchmarks.codegen.lanes import WARP, Interpreter, State

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")  # whose instructions were gone through
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
