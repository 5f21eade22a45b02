"""What the tests of the contract are run over: dtypes, and maps that windows do not divide."""

from __future__ import annotations

import pytest
from modes import sized

from swin_kernels.testing import DTYPE_NAMES, Case

over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())


def over(*cases: Case):
    return pytest.mark.parametrize("case", cases, ids=str)


def judged(*cases: Case):
    return over(*map(sized, cases))


LINE = Case(size=(21,), window=(8,), bias="table", pads=True)
PLANE = Case(size=(11, 9), window=(4, 4), bias="table", pads=True)
SPACE = Case(size=(4, 5, 7), window=(2, 3, 4), bias="table", pads=True)
