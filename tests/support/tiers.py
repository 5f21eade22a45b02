"""How much of the tests a run takes: `--tier fast`, `standard`, `rest` or `all`.

| tier | make | what |
|---|---|---|
| fast | test-fast | as standard, without the tests marked `slow` |
| standard | test | every backend, kernel and pair of options; of a case in several dtypes, one |
| rest | test-rest | what standard leaves out |
| all | test-all | standard and rest; under Triton's interpreter, a case in one dtype |

What standard leaves out, another test covers:

- a case in another dtype, the pairs of test_option_pairs.py, where each dtype meets each value of
  every option (on the CPU those marked `every_dtype` stay: what they are about depends on it);
- under the interpreter and in the emulator, a list of cases marked `in_pairs`, the same;
- a test marked `thorough`, those that its marker names.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest

TIERS = ("fast", "standard", "rest", "all")
_DTYPE_IN_ID = re.compile(r"(?<![\w.])(?:torch\.b?float\d+|fp\d\d|bf16)(?!\w)")


def thorough(*covered_by: str) -> pytest.MarkDecorator:
    """Left out of `make test`, where the tests `covered_by`, "file.py::test", find its faults."""
    return pytest.mark.thorough(covered_by=covered_by)


def all_but_one_dtype(names: Iterable[str]) -> set[str]:
    """Of test ids that differ in a dtype alone, all but one; which one, the id decides."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_DTYPE_IN_ID.sub("*", name)].append(name)
    return {
        name
        for key, group in alike.items()
        for i, name in enumerate(sorted(group))
        if i != zlib.crc32(key.encode()) % len(group)
    }


def left_out(
    tier: str, items: list[pytest.Item], other_dtypes: set[str], slow_kernels: bool
) -> set[str]:
    """Ids of the tests that a tier leaves out.

    `other_dtypes` are of cases that run in another one; `slow_kernels` says that a call takes
    milliseconds a window, as under the interpreter and in the emulator.
    """

    def marked(name: str) -> set[str]:
        return {item.nodeid for item in items if item.get_closest_marker(name)}

    if tier == "all":
        return set()
    beyond = other_dtypes | marked("thorough")
    if slow_kernels:
        beyond |= marked("in_pairs")
    if tier == "rest":
        return {item.nodeid for item in items} - beyond
    return beyond | marked("slow") if tier == "fast" else beyond
