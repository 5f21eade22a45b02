"""What the tests of the contract are run over: dtypes, and maps that windows do not divide."""

from __future__ import annotations

import pytest
import torch
from modes import sized

from swin_kernels.testing import Case

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPE_IDS = ("fp32", "fp64", "fp16", "bf16")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


def over(*cases: Case):
    return pytest.mark.parametrize("case", cases, ids=str)


def judged(*cases: Case):
    return over(*map(sized, cases))


LINE = Case(size=(21,), window=(8,), bias="table", pads=True)
PLANE = Case(size=(11, 9), window=(4, 4), bias="table", pads=True)
SPACE = Case(size=(4, 5, 7), window=(2, 3, 4), bias="table", pads=True)
