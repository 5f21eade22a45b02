"""Random configurations of the whole contract against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modes import sized

from swin_kernels.backends.triton.backend import INTERPRETED
from swin_kernels.testing import (
    DIFFERENTIABLE,
    LAYOUTS,
    MASKS,
    Case,
    check,
    make_operands,
    repetitions,
)


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...]) -> Case:
    axes = draw(st.integers(1, 3))
    most = (40, 8, 4)[axes - 1]
    window = tuple(draw(st.integers(1, most)) for _ in range(axes))
    size = tuple(draw(st.integers(1, 3 * w if axes < 3 else 2 * w)) for w in window)
    packed = draw(st.booleans())
    cosine = draw(st.booleans())
    # of a few channels one vector close to zero decides the largest error behind the norm
    head_dim = draw(st.integers(8 if cosine else 1, 40))
    return Case(
        batch=draw(st.integers(1, 3)),
        size=size,
        window=window,
        shift=tuple(draw(st.integers(0, w - 1)) for w in window),
        heads=draw(st.integers(1, 4)),
        head_dim=head_dim,
        value_dim=None if packed else draw(st.none() | st.integers(1, 40)),
        dtype=draw(st.sampled_from(dtypes)),
        packed=packed,
        bias=draw(st.sampled_from(["none", "dense", "table", "table+index"])),
        cosine=cosine,
        mask=draw(st.sampled_from(MASKS)),
        mask_value=draw(st.sampled_from([-100.0, -200.0, -1.5, -math.inf])),
        pads=draw(st.booleans()),
        pad_order=draw(st.sampled_from(["pad-roll", "roll-pad"])),
        periodic=draw(st.none() | st.tuples(*[st.booleans()] * axes)),
        scale=None if cosine else draw(st.none() | st.floats(-1, 1)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
        extras_dtype=draw(st.sampled_from([None, torch.float32])),
    )


def _affordable(case: Case) -> bool:
    """Under the interpreter: few windows of a head, in all inputs that `check` judges together."""
    if not INTERPRETED:
        return True
    operands = make_operands(case)
    given = [x for name in DIFFERENTIABLE if (x := getattr(operands, name)) is not None]
    numbers = case.batch * math.prod(case.size) * case.heads * case.dv
    windows = case.batch * case.grid.windows * case.heads
    return windows * repetitions(numbers, min(x.numel() for x in given)) <= 40


@pytest.mark.in_pairs
@settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_any_configuration_matches_float64(backend, mode, data):
    check(data.draw(cases(mode.dtypes).map(sized).filter(_affordable)), backend)
