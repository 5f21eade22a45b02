"""What instructions ask of the path to shared memory and first cache, 128 bytes a clock.

A load or store of a warp takes a wavefront for each 128 bytes. A product of a warp group (HGMMA)
reads its second operand from shared memory, and its first where that is not in registers: what a
gdesc names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.codegen.sass import Instruction

BANKS = 128  # bytes a clock
GROUP = 4  # warps that share a product
ROWS, DEPTH = 64, 32  # of a product's first operand; bytes of a row, whatever its elements
_MEMORY = re.compile(r"^(LD|ST)(G|S)(TS)?|^LDSM|^STSM|^SHFL|^LDGSTS")
_PRODUCT = re.compile(r"^[HQI]GMMA\.64x(\d+)x")


def wavefronts(name: str) -> int:
    """Of a warp's access to shared or global memory, without conflicts; 0 if it is none."""
    if name.startswith(("LDSM", "STSM")):
        width = re.search(r"\.([124])\b", name)
        return int(width[1]) if width else 1
    if not _MEMORY.match(name):
        return 0
    return 4 if ".128" in name else 2 if ".64" in name else 1


def operand_clocks(instruction: Instruction) -> float:
    """A warp's share of what a product of its group reads from shared memory."""
    if not (found := _PRODUCT.match(instruction.name)):
        return 0
    # R24, gdesc[UR16], … has both operands there, R24, R88, gdesc[UR16], … only the second
    first = instruction.operands.split(", ")[1]
    return (int(found[1]) + ROWS * first.startswith("gdesc")) * DEPTH / BANKS / GROUP


def clocks_of(code: Iterable[Instruction]) -> dict[int, float]:
    """Clocks that one warp's execution takes of the path, by an instruction's address."""
    return {x.address: wavefronts(x.name) + operand_clocks(x) for x in code}
