"""Tiers: one dtype of a case is kept, and what `make test` leaves out names tests that cover it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import FAULTS, applied
from tiers import all_but_one_dtype, left_out, thorough

TESTS = Path(__file__).resolve().parents[1]


NODES = [
    (path.name, node)
    for path in TESTS.rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
]
# every test, by "file.py::name"
FUNCTIONS = {
    f"{where}::{node.name}": node
    for where, node in NODES
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}
# what each call of `thorough` in the tests names, with the file that it is in
COVERING = [
    (where, getattr(argument, "value", None))
    for where, node in NODES
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "thorough"
    if where != Path(__file__).name
    for argument in (node.args or [None])
]


@pytest.mark.parametrize("where, named", COVERING, ids=str)
def test_what_covers_a_thorough_test_is_in_make_test(where, named):
    assert isinstance(named, str), f"{where}: thorough() takes names of tests that cover it"
    assert named in FUNCTIONS, f"{where}: {named} is no test"
    for decorator in map(ast.unparse, FUNCTIONS[named].decorator_list):
        left_out_too = re.match(r"(pytest\.mark\.)?thorough\b", decorator)
        assert not left_out_too, f"{where}: {named} is left out as well"


def test_of_a_case_in_several_dtypes_one_is_kept():
    names = [
        *(f"t.py::f[cpu-B2-{dtype}-packed]" for dtype in ("fp16", "fp32", "fp64", "bf16")),
        *(f"t.py::g[torch.{dtype}]" for dtype in ("float16", "bfloat16")),
        "t.py::f[cpu-B2-fp16-packed-extras-fp32]",
        "t.py::h",
    ]
    out = all_but_one_dtype(names)
    kept = [name for name in names if name not in out]
    assert [name.split("[")[0] for name in kept] == ["t.py::f", "t.py::g", "t.py::f", "t.py::h"]
    assert out == all_but_one_dtype(reversed(names))


def _item(nodeid: str, *marks: str) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=marks.__contains__)


def test_standard_and_rest_share_nothing_and_are_all():
    items = [_item("a"), _item("b", "slow"), _item("c", "thorough"), _item("d")]
    kept = {
        tier: {x.nodeid for x in items} - left_out(tier, items, {"d"}, False)
        for tier in ("fast", "standard", "rest", "all")
    }
    assert kept == {
        "fast": {"a"},
        "standard": {"a", "b"},
        "rest": {"c", "d"},
        "all": {"a", "b", "c", "d"},
    }


def test_lists_of_cases_are_left_to_the_pairs_where_kernels_are_slow():
    items = [_item("a"), _item("b", "in_pairs")]
    assert left_out("standard", items, set(), False) == set()
    assert left_out("standard", items, set(), True) == {"b"}
    assert left_out("rest", items, set(), True) == {"a"}


def test_thorough_names_what_covers_a_test():
    mark = thorough("test_tiers.py::test_thorough_names_what_covers_a_test").mark
    assert mark.name == "thorough"
    assert mark.kwargs["covered_by"] == ("test_tiers.py::test_thorough_names_what_covers_a_test",)


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_can_be_put_in(name, tmp_path):
    fault = FAULTS[name]
    path = tmp_path / fault.file
    path.parent.mkdir(parents=True)
    path.write_text((TESTS.parent / fault.file).read_text())
    before = path.read_text()
    applied(fault, tmp_path)
    assert path.read_text() != before
