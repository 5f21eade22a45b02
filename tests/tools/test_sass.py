"""The reader of machine code, on listings written by hand."""

from __future__ import annotations

import pytest
from sass_listing import parse

from benchmarks.codegen import sass


def names(trip: sass.Trip) -> list[str]:
    return [x.base for x in trip.instructions]


def test_guard_name_and_operands_are_told_apart():
    load, jump = parse("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "@P1 BRA `(.L_x_2)  0x10")
    assert (load.guard, load.name, load.base) == ("@!P0", "LDG.E.128", "LDG")
    assert load.operands == "R4, desc[UR4][R2.64]"
    assert load.target is None
    assert jump.target == 0x10


@pytest.mark.parametrize(
    ("line", "leaves"),
    [
        ("BRA 0x40", True),
        ("@P0 BRA 0x40", False),
        ("BRA.U !UP0, 0x40", False),
        ("EXIT", True),
        ("@P0 EXIT", False),
        ("FADD R0, R0, R1", False),
    ],
)
def test_what_follows_a_jump_is_reached_where_it_has_a_condition(line, leaves):
    assert parse(line)[0].leaves is leaves


def test_a_trip_has_its_shortest_and_longest_way_and_no_nop():
    code = parse(
        "MOV R0, RZ",
        "FADD R1, R1, R2",  # 0x10: a trip begins
        "@P0 BRA 0x50",
        "FMUL R1, R1, R3",
        "FMUL R1, R1, R3",
        "NOP",  # 0x50
        "@P1 BRA 0x10",
        "EXIT",
    )
    shortest, longest = sass.main_loop(code)
    assert (len(shortest), len(longest)) == (3, 5)
    assert names(longest) == ["FADD", "BRA", "FMUL", "FMUL", "NOP", "BRA"]
    found = longest.histogram({x.address: x.base == "FMUL" for x in code})
    assert dict(found) == {("FADD", 0): 1, ("BRA", 0): 2, ("FMUL", 1): 2}


def test_a_copy_of_the_last_trip_is_not_in_the_loop():
    code = parse(
        "FADD R1, R1, R2",  # 0x00: a trip begins
        "@!P0 BRA 0x40",  # the last one goes on in the copy
        "FMUL R1, R1, R3",
        "BRA 0x00",
        "FMUL R1, R1, R3",  # 0x40: the copy, within the loop's addresses in other layouts
        "EXIT",
    )
    shortest, longest = sass.main_loop(code)
    assert names(shortest) == names(longest) == ["FADD", "BRA", "FMUL", "BRA"]


def test_a_loop_inside_is_counted_once():
    code = parse(
        "FADD R1, R1, R2",  # 0x00: a trip begins
        "SYNCS R4",  # 0x10: waits
        "@!P0 BRA 0x10",
        "FMUL R1, R1, R3",
        "@P1 BRA 0x00",
        "EXIT",
    )
    shortest, longest = sass.main_loop(code)
    assert names(shortest) == names(longest) == ["FADD", "SYNCS", "BRA", "FMUL", "BRA"]


def test_the_costlier_of_two_loops_is_the_main_one():
    code = parse(
        "FADD R1, R1, R2",
        "@P0 BRA 0x00",
        "FMUL R1, R1, R3",  # 0x20
        "FMUL R1, R1, R3",
        "@P1 BRA 0x20",
        "EXIT",
    )
    assert names(sass.main_loop(code)[1]) == ["FMUL", "FMUL", "BRA"]


def test_code_without_a_loop_has_no_trip():
    assert sass.main_loop(parse("FADD R1, R1, R2", "EXIT")) is None


def test_a_call_under_a_predicate_leads_out_of_a_loop():
    code = parse(
        "FADD R1, R1, R2",  # 0x00: a trip begins
        "@!P0 CALL.REL.NOINC 0x30",
        "BRA 0x00",
        "FMUL R1, R1, R3",  # 0x30: behind the loop
        "CALL.REL.NOINC 0x60",  # a subroutine, which returns
        "EXIT",
        "RET.REL.NODEC R4 0x50",
    )
    assert names(sass.main_loop(code)[1]) == ["FADD", "CALL", "BRA"]
    assert sorted(sass.Graph(code).order) == [0x00, 0x20, 0x30]
