"""What instructions ask of the path to shared memory and first cache, 128 bytes a clock.

A load or store of a warp takes a wavefront for each 128 bytes, and more where banks of shared
memory conflict, as far as banks.py tells: of sm_80 to sm_90. A product of a warp group (HGMMA)
reads its second operand from shared memory, and its first where that is not in registers: what a
gdesc names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.codegen import banks
from benchmarks.codegen.sass import Instruction

CLOCK = 128  # bytes
GROUP = 4  # warps that share a product
ROWS, DEPTH = 64, 32  # of a product's first operand; bytes of a row, whatever its elements
_GLOBAL = re.compile(r"^(LDG|STG|SHFL)\b")
_PRODUCT = re.compile(r"^[HQI]GMMA\.64x(\d+)x")


def wavefronts(instruction: Instruction) -> int:
    """Of a warp's access to shared or global memory, without conflicts; 0 if it is none."""
    if banks.accesses(instruction):
        return banks.ideal(instruction.name)
    if not _GLOBAL.match(instruction.name):
        return 0
    return 4 if ".128" in instruction.name else 2 if ".64" in instruction.name else 1


def operand_clocks(instruction: Instruction) -> float:
    """A warp's share of what a product of its group reads from shared memory."""
    if not (found := _PRODUCT.match(instruction.name)):
        return 0
    # R24, gdesc[UR16], … has both operands there, R24, R88, gdesc[UR16], … only the second
    first = instruction.operands.split(", ")[1]
    return (int(found[1]) + ROWS * first.startswith("gdesc")) * DEPTH / CLOCK / GROUP


def clocks_of(code: Sequence[Instruction], arch: str, warps: int) -> dict[int, float]:
    """Clocks that one warp's execution takes of the path, by an instruction's address."""
    conflicts = banks.wavefronts(code, warps) if arch in banks.ARCHITECTURES else {}
    return {x.address: conflicts.get(x.address, wavefronts(x)) + operand_clocks(x) for x in code}
