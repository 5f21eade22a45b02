"""Bank conflicts read from machine code: known patterns, and a kernel whose own Triton counts."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="what is read are Triton's kernels")

from gluon_probes import compiled_transpose

from benchmarks.codegen import aot, banks, conflicts, sass
from benchmarks.codegen import lane_values as lv

THREAD = "S2R R0, SR_TID.X"
UNKNOWN = "LDC R9, c[0x0][0x210]"  # a parameter
LOADED = "LDG.E R9, desc[UR4][R0.64]"  # a number of each lane's own


def parse(*lines: str) -> list[sass.Instruction]:
    return sass.parse("".join(f"        /*{16 * i:04x}*/   {x} ;\n" for i, x in enumerate(lines)))


def last(*lines: str, warps: int = 1) -> float | None:
    """The wavefronts of the last access of a program."""
    code = parse(THREAD, *lines, "EXIT")
    return banks.wavefronts(code, warps).get([x.address for x in code if banks.accesses(x)][-1])


@pytest.mark.parametrize(
    ("access", "stride", "expected"),
    [
        ("LDS R2, [R1]", 4, 1),
        ("LDS R2, [R1+0x404]", 4, 1),
        ("LDS R2, [R1]", 8, 2),
        ("LDS R2, [R1]", 128, 32),
        ("LDS R2, [R1]", 132, 1),
        ("LDS R2, [R1]", 0, 1),  # a broadcast
        ("STS [R1], R2", 8, 2),
        ("LDS.U16 R2, [R1]", 2, 1),
        ("LDS.U16 R2, [R1]", 64, 16),
        ("STS.64 [R1], R2", 8, 2),
        ("STS.64 [R1], R2", 16, 4),
        ("LDS.128 R4, [R1]", 16, 4),
        ("LDS.128 R4, [R1]", 80, 4),  # 8 rows of this pitch fill all banks
        ("LDS.128 R4, [R1]", 64, 16),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R6.64]", 128, 32),
        ("LDSM.16.M88.4 R4, [R1]", 64, 16),
        ("LDSM.16.MT88.2 R4, [R1]", 64, 8),
        ("LDSM.16.M88 R4, [R1]", 80, 1),
        ("STSM.16.M88.4 [R1], R4", 80, 4),
    ],
)
def test_lanes_at_a_stride(access, stride, expected):
    assert last(f"IMAD R1, R0, {stride:#x}, RZ", access) == expected


def test_the_scale_of_an_address_and_the_uniform_register_in_it_count():
    assert last("LDS R2, [R0.X4+UR4+0x10]") is None  # nothing has written UR4
    assert last("S2UR UR4, SR_CTAID.X", "LDS R2, [R0.X4+UR4+0x10]") == 1
    assert last("UMOV UR4, 0x400", "LDS.128 R4, [R0.X16+UR4+-0x10]") == 4


SWIZZLE = (
    "IMAD.SHL.U32 R1, R0, 0x40, RZ",  # rows of 64 bytes
    "SHF.R.U32.HI R2, RZ, 0x1, R0",
    "LOP3.LUT R2, R2, 0x3, RZ, 0xc0, !PT",
    "SHF.L.U32 R2, R2, 0x4, RZ",
)


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ((), True),
        (("IMAD R1, R9, 0x1000, R1",), True),  # by tiles that begin where no row's bits are
        (("IMAD R1, R9, 0x10, R1",), False),
    ],
    ids=["alone", "aligned base", "base that may turn the swizzle"],
)
def test_a_swizzle_by_exclusive_or_has_no_conflict(base, known):
    lines = UNKNOWN, *SWIZZLE, *base, "LOP3.LUT R3, R1, R2, RZ, 0x3c, !PT"
    assert last(*lines, "LDSM.16.M88.4 R4, [R3]") == (4 if known else None)


def test_a_swizzle_by_a_predicate_is_followed():
    bit = "LOP3.LUT P0, RZ, R0, 0x4, RZ, 0xc0, !PT"
    lines = bit, "SEL R2, RZ, 0x40, !P0", "LEA R1, R0, R2, 0x4"
    assert last(*lines, "LDS.128 R4, [R1]") == 8  # lanes 4 to 7 are on the banks of 0 to 3
    assert last(bit, "IMAD.SHL.U32 R1, R0, 0x80, RZ", "@P0 MOV R1, RZ", "LDS R2, [R1]") == 16


def test_lanes_and_warps_that_a_known_predicate_turns_off_are_not_counted():
    half = "ISETP.GE.U32.AND P0, PT, R0, 0x10, PT"
    assert last(half, "@!P0 STS.128 [R0.X16], R4") == 2
    first = "ISETP.GT.U32.AND P0, PT, R0, 0x1f, PT"
    assert last(first, "@!P0 STS [R0.X4], R4", warps=4) == 0.25
    unknown = UNKNOWN, "ISETP.GE.AND P0, PT, R9, 0x1, PT"
    assert last(*unknown, "@P0 STS.64 [R0.X8], R4") == 2
    assert not banks.wavefronts(parse(THREAD, "@!PT LDS RZ, [RZ]", "EXIT"), 1)


def test_warps_are_averaged():
    row = "SHF.R.U32.HI R1, RZ, 0x5, R0", "IMAD R1, R1, R0, RZ"  # strides of 0, 4, 8 and 12 bytes
    assert last(*row, "LDS R2, [R1.X4]", warps=4) == (1 + 1 + 2 + 1) / 4


def test_a_loop_that_moves_the_address_keeps_its_pattern():
    code = parse(
        THREAD,
        "IMAD R1, R0, 0x8, RZ",
        "LDS R2, [R1]",  # 0x20: a trip begins
        "IADD3 R1, R1, 0x1000, RZ",
        "@P0 BRA 0x20",
        "EXIT",
    )
    assert banks.wavefronts(code, 4) == {0x20: 2}


def test_two_patterns_for_one_access_are_not_known():
    ways = UNKNOWN, "ISETP.GE.AND P0, PT, R9, 0x1, PT", "IMAD R1, R0, 0x4, RZ"
    assert last(*ways, "@P0 IADD3 R1, R1, 0x40, RZ", "LDS R2, [R1]") == 1  # one pattern, two places
    assert last(*ways, "@P0 IMAD R1, R0, 0x8, RZ", "LDS R2, [R1]") is None
    assert last(*ways, "@P0 BRA 0x60", "IMAD R1, R0, 0x8, RZ", "LDS R2, [R1]") is None


def test_numbers_that_lanes_load_are_not_known():
    assert last(LOADED, "LDS R2, [R9]") is None
    assert last(LOADED, "LOP3.LUT R9, R9, 0x0, RZ, 0xc0, !PT", "LDS R2, [R9]") is None
    assert last(LOADED, "SHFL.IDX PT, R9, R9, RZ, 0x1f", "LEA R1, R0, R9, 0x2", "LDS R2, [R1]") == 1


def test_what_a_subroutine_writes_is_not_known_after_it():
    def code(end: str) -> list[sass.Instruction]:
        lines = "IMAD R1, R0, 0x4, RZ", "IMAD R2, R0, 0x8, RZ", "CALL.REL.NOINC 0x70"
        return parse(THREAD, *lines, "LDS R3, [R1]", "LDS R3, [R2]", "EXIT", "FADD R2, R2, R4", end)

    assert banks.wavefronts(code("RET.REL.NODEC R4 0x0"), 1) == {0x40: 1}
    assert banks.wavefronts(code("EXIT"), 1) == {0x40: 1, 0x50: 2}  # it never comes back


def test_signed_division_of_a_moving_index_by_a_power_of_two_is_followed():
    lines = (
        "LDC R3, c[0x0][RZ]",  # threads of the program
        "MOV R1, R0",
        "SHF.R.S32.HI R2, RZ, 0x1f, R1",  # 0x30: a trip begins
        "LEA.HI R2, R2, R1, RZ, 0x3",
        "SHF.R.S32.HI R2, RZ, 0x3, R2",
        "IMAD R2, R2, 0x80, RZ",
        "LDS R4, [R2]",  # rows of 128 bytes, eight lanes each
        "IADD3 R1, R1, R3, RZ",
        "@P0 BRA 0x30",
    )
    assert last(*lines, warps=4) == 4


def test_ideal_is_a_pass_for_each_128_bytes():
    names = "LDS.U8", "STS", "LDS.64", "LDGSTS.E.BYPASS.128", "LDSM.16.M88", "STSM.16.MT88.4"
    assert list(map(banks.ideal, names)) == [1, 1, 2, 4, 1, 4]


def values() -> dict[str, lv.Value]:
    lanes = np.arange(32, dtype=np.int64)[None]
    return {
        "lane": lv.value(lanes),
        "row": lv.value(lanes >> 2),
        "constant": lv.constant(0x34),
        "parameter": lv.UNIFORM,
        "tile": lv.unknown(64),
        "lane of a tile": lv.value(lanes, 64),
        "row of a tile": lv.value(3 * lanes + 5, 16),
    }


OPERATIONS = {
    "add": (lv.add, lambda a, b: a + b),
    "multiply": (lv.multiply, lambda a, b: a * b),
    "shift right": (lambda a, b: lv.shift_right(a, b, False), lambda a, b: a >> np.minimum(b, 63)),
    "and": (lambda a, b: lv.logical(0xC0, (a, b, lv.constant(0))), lambda a, b: a & b),
    "or": (lambda a, b: lv.logical(0xFC, (a, b, lv.constant(0))), lambda a, b: a | b),
    "exclusive or": (lambda a, b: lv.logical(0x3C, (a, b, lv.constant(0))), lambda a, b: a ^ b),
    "and not": (lambda a, b: lv.logical(0x30, (a, b, lv.constant(0))), lambda a, b: a & ~b),
    "join": (lv.join, lambda a, b: a),
    "less": (lambda a, b: lv.compare("LT", a, b), lambda a, b: (a < b).astype(np.int64)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_value_holds_for_whatever_is_unknown(name):
    """Every result is what it says for any unknown: `lanes` and a shared multiple of `step`."""
    found, real = OPERATIONS[name]
    known = 0
    for a, b in itertools.product(values().values(), repeat=2):
        result = found(a, b)
        known += result is not None
        for u, v in itertools.product((0, 1, 2, 7, 11), repeat=2) if result is not None else ():
            inputs = (x.lanes + (0 if x.exact else x.step * k) for x, k in ((a, u), (b, v)))
            shared = (real(*inputs) - result.lanes) & lv.BITS
            assert (shared == shared[:, :1]).all(), (a, b, u, v)
            assert not (shared % result.step).any(), (a, b, u, v)
    assert known > len(values())  # the test is not of nothing


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("phases", [1, 2, 8, 32])
def test_a_compiled_transpose_has_the_conflicts_that_triton_counts(arch, phases):
    conflicts = 32 // phases - 1
    code = sass.parse(aot.listing_of(compiled_transpose(arch, phases, conflicts)))
    found = banks.wavefronts(code, warps=4)
    loads = [x.address for x in code if x.base == "LDS"]
    assert len(loads) == 8
    assert {found[x] for x in loads} == {1 + conflicts}
    stores = [x for x in code if x.base in ("STS", "STSM")]
    assert stores
    assert all(found[x.address] == banks.ideal(x.name) for x in stores)


@pytest.mark.slow
def test_every_access_of_the_first_stage_is_known(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["conflicts", "--arch", "sm_90", "--case", "T1 shift 3"])
    conflicts.main()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| `_single_tile_")]
    assert len(lines) == 2
    for line in lines:
        known, wanted, found = (x.strip() for x in line.split("|")[2:5])
        assert re.fullmatch(r"([1-9]\d*) of \1", known)
        assert float(found) == int(wanted)  # no conflict in the loop
