"""What instructions ask of a multiprocessor's memory, on listings written by hand."""

from __future__ import annotations

import pytest

from benchmarks.codegen.memory_path import clocks_of
from benchmarks.codegen.sass import Instruction


@pytest.mark.parametrize(
    ("line", "clocks"),
    [
        ("FADD R0, R0, R1", 0),
        ("LDS R4, [R2]", 1),
        ("LDS.64 R4, [R2]", 2),
        ("LDGSTS.E.BYPASS.128 [R41], desc[UR46][R30.64]", 4),
        ("STG.E.128 desc[UR4][R2.64], R4", 4),
        ("LDSM.16.MT88.4 R100, [R13]", 4),
        ("STSM.16.M88.2 [R79], R132", 2),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", 1),
        # of a group of four warps: 64 + 64 rows of 32 bytes are 32 clocks
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT", 8),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0", 8),
        ("HGMMA.64x32x16.F32.BF16 R56, R100, gdesc[UR24].tnspB, RZ, !UPT", 2),
        ("HGMMA.64x64x8.F32.TF32 R24, R88, gdesc[UR4], R24, gsb0", 4),
    ],
)
def test_loads_stores_and_products_take_their_share_of_the_path(line, clocks):
    name, _, operands = line.partition(" ")
    assert clocks_of([Instruction(0x10, "", name, operands)], "sm_100", 4) == {0x10: clocks}


def test_conflicts_count_where_they_are_known():
    lines = (
        ("S2R", "R0, SR_TID.X"),
        ("SHF.L.U32", "R2, R0, 0x3, RZ"),  # every second word
        ("LDS", "R4, [R2]"),
        ("LDS", "R4, [R9]"),
        ("EXIT", ""),
    )
    code = [Instruction(16 * i, "", *line) for i, line in enumerate(lines)]
    assert clocks_of(code, "sm_90", 4) == {0: 0, 0x10: 0, 0x20: 2, 0x30: 1, 0x40: 0}
    assert clocks_of(code, "sm_100", 4)[0x20] == 1  # whose instructions were not gone through
