"""What the tests of the contract are run over, dtypes and maps, and what several of them ask."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from modes import cut, sized
from torch import Tensor

from swin_kernels.problem import Operands, Options, Problem
from swin_kernels.testing import DTYPE_NAMES, Case, call, make_operands, with_grad

over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())


def over(*cases: Case):
    return pytest.mark.parametrize("case", cases, ids=str)


def judged(*cases: Case):
    return over(*map(sized, cases))


LINE = Case(size=(21,), window=(8,), bias="table", pads=True)
PLANE = Case(size=(11, 9), window=(4, 4), bias="table", pads=True)
SHIFTED = cut(PLANE.but(shift=(2, 2)))
SPACE = Case(size=(4, 5, 7), window=(2, 3, 4), bias="table", pads=True)
# of so many tokens a window that Triton's kernels take it in tiles
TILES = Case(2, (90,), (70,), (20,), heads=1, bias="table", pads=True, cosine=True)

# maps padded, shifted and of one to three axes
GEOMETRIES = (
    LINE,
    LINE.but(size=(24,)),
    LINE.but(shift=(3,)),
    LINE.but(shift=(3,), pad_order="roll-pad"),
    LINE.but(size=(24,), shift=(7,), packed=True),
    PLANE,
    PLANE.but(size=(12, 12), shift=(2, 2)),
    PLANE.but(shift=(2, 2)),
    PLANE.but(shift=(2, 2), pad_order="roll-pad"),
    PLANE.but(shift=(0, 2), packed=True),
    PLANE.but(shift=(3, 0), pad_order="roll-pad", packed=True),
    PLANE.but(size=(9, 11), window=(3, 5), shift=(1, 4)),
    PLANE.but(size=(9, 11), window=(3, 5), shift=(1, 4), pad_order="roll-pad", pads=False),
    SPACE,
    SPACE.but(size=(4, 6, 8), shift=(1, 1, 2)),
    SPACE.but(shift=(1, 0, 2)),
    SPACE.but(shift=(1, 2, 0), pad_order="roll-pad", packed=True),
    PLANE.but(size=(8, 12), shift=(2, 2), periodic=(False, True)),
    PLANE.but(shift=(2, 1), periodic=(True, True)),
    SPACE.but(shift=(1, 1, 2), periodic=(False, False, True), pad_order="roll-pad"),
)

# what is added to the logits and how they are scaled
OPTIONS = (
    PLANE.but(shift=(2, 2), bias="none", pads=False),
    PLANE.but(shift=(2, 2), bias="dense"),
    PLANE.but(shift=(2, 2), bias="table+index"),
    PLANE.but(shift=(2, 2), mask_value=-200.0),
    PLANE.but(shift=(2, 2), mask_value=-math.inf),
    PLANE.but(size=(12, 12), shift=(2, 0), mask_value=-math.inf, pad_order="roll-pad"),
    PLANE.but(mask="soft"),
    PLANE.but(shift=(2, 2), mask="soft", packed=True),
    PLANE.but(shift=(2, 1), mask="regions", bias="dense"),
    PLANE.but(mask="holes", mask_value=-math.inf),
    PLANE.but(shift=(1, 2), mask="holes", mask_value=-math.inf),
    PLANE.but(scale=0.11, packed=True),
    PLANE.but(scale=-1.0),
    PLANE.but(value_dim=24, heads=3),
    PLANE.but(value_dim=5, shift=(2, 2), heads=3),
    PLANE.but(cosine=True),
    PLANE.but(cosine=True, shift=(2, 2), packed=True, pad_order="roll-pad"),
    PLANE.but(cosine=True, shift=(2, 2), value_dim=20, mask="soft", bias="dense"),
    LINE.but(cosine=True, shift=(2,), mask_value=-200.0, bias="table+index"),
    SPACE.but(cosine=True, shift=(1, 0, 2), pads=False),
)


# of tensors, and of whatever holds them
assert_same_bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def checked(case: Case) -> tuple[Operands, Options]:
    """The operands of a case, a seed among them where there is dropout, and its options."""
    operands = make_operands(case)
    if case.dropout_p > 0:
        operands = operands._replace(dropout_seed=torch.tensor([1234567890123456789]))
    return operands, Problem.checked(operands, **case.options).options


def needing(operands: Operands, name: str) -> Operands:
    """The same memory, where `name` alone requires grad."""
    return operands._replace(**{name: getattr(operands, name).detach().requires_grad_()})


def saved_by_a_call(case: Case, backend: str) -> tuple[Tensor, list[Tensor]]:
    """The output, and what autograd keeps beside the operands, all of which it keeps."""
    operands, saved = with_grad(make_operands(case)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = call(case, operands, backend)
    given = {x.data_ptr() for x in operands if x is not None}
    assert given <= {x.data_ptr() for x in saved}
    return out, [x for x in saved if x.data_ptr() not in given]
