"""The contract where logits are huge, infinite, NaN or all masked, and where there is but one."""

from __future__ import annotations

import math

import pytest
import torch
from contract_cases import LINE, PLANE, SHIFTED, judged, over, over_dtypes

from swin_kernels.testing import Case, call, check, make_grad_out, make_operands, run

pytestmark = pytest.mark.every_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_logits_match_float64(dtype, backend):
    case = SHIFTED.but(dtype=dtype)

    def large(operands):
        return operands._replace(query=operands.query * 16, key=operands.key * 16)

    assert check(case, backend, change=large).out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_beyond_the_range_of_exp_stay_finite(dtype, backend):
    case = SHIFTED.but(dtype=dtype)
    operands = make_operands(case)
    huge = operands._replace(query=operands.query * 1e4, key=operands.key * 1e4)
    actual = run(case, huge, make_grad_out(case), backend)
    assert actual.out.isfinite().all()
    assert all(grad.isfinite().all() for grad in actual.grads.values())


@over_dtypes
@pytest.mark.parametrize("kind", ["dense", "table", "table+index"])
def test_minus_infinity_in_the_bias_matches_float64(kind, dtype, backend):
    case = SHIFTED.but(dtype=dtype, bias=kind)
    name = "bias" if kind == "dense" else "bias_table"
    shape = getattr(make_operands(case), name).shape
    holes = torch.rand(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu") < 0.2

    def with_holes(operands):
        bias = getattr(operands, name)
        return operands._replace(**{name: bias.masked_fill(holes.to(bias.device), -torch.inf)})

    actual = check(case, backend, change=with_holes)
    assert not actual.grads[name][holes].any()


@over_dtypes
@judged(
    PLANE.but(mask="dead", mask_value=-math.inf, shift=(2, 2)),
    PLANE.but(mask="dead", cosine=True, packed=True),
    LINE.but(mask="dead", bias="dense", shift=(3,), pad_order="roll-pad"),
)
def test_row_of_masked_keys_gives_zeros_and_zero_gradients(case, dtype, backend):
    actual = check(case.but(dtype=dtype), backend)
    assert all(grad.isfinite().all() for grad in actual.grads.values())
    whole = case.but(dtype=dtype, size=case.grid.padded, pad_order="pad-roll")
    operands, grad_out = make_operands(whole), make_grad_out(whole)
    actual = run(whole, operands, grad_out, backend)
    dead = (actual.out == 0).flatten(-2).all(-1)
    assert int(dead.sum()) == whole.batch * whole.grid.windows
    d_query = actual.grads["query"]
    if whole.packed:
        d_query = d_query.select(-3, 0)
    assert not d_query[dead].any()


@over_dtypes
@judged(
    PLANE.but(mask="soft", cosine=True, packed=True),
    LINE.but(mask="soft", bias="dense"),
    Case(1, (140,), (70,), heads=4, mask="soft"),
)
def test_row_masked_whole_by_minus_100_matches_float64(case, dtype, backend):
    def masked(operands):
        mask = torch.zeros_like(operands.mask)
        mask[:, ::3] = -100.0
        return operands._replace(mask=mask)

    check(case.but(dtype=dtype), backend, change=masked)


@over_dtypes
@pytest.mark.parametrize(
    "window",
    [
        pytest.param((16,), id="short"),
        pytest.param((70,), id="long", marks=pytest.mark.slow_interpreter),
    ],
)
def test_gradient_of_a_logit_scale_at_its_clamp_matches_float64(window, dtype, backend):
    case = Case(1, window, window, heads=48, head_dim=16, bias="table", cosine=True, dtype=dtype)

    def clamped(operands):
        return operands._replace(logit_scale=torch.full_like(operands.logit_scale, 100.0))

    check(case, backend, change=clamped)


@over_dtypes
@pytest.mark.parametrize("size", [(8,), (140,)], ids=["short", "long"])
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_row_of_the_lowest_finite_number_is_finite(name, size, dtype, backend):
    case = Case(1, size, (size[0] // 2,), heads=1, mask="soft", bias="dense", dtype=dtype)
    operands = make_operands(case)
    if name == "bias":
        operands = operands._replace(mask=None)
    lowest = torch.zeros_like(getattr(operands, name), dtype=torch.float32)
    lowest[:, 1] = torch.finfo(torch.float32).min
    lowest[:, 2, 0] = -2.5e38
    lowest[:, 3, 1] = 2.5e38
    out = call(case, operands._replace(**{name: lowest}), backend)
    value = operands.value[:, : size[0] // 2].float()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(out[:, 1].float(), value.mean(1), **close)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3].float(), value[:, 1], **close)


@over_dtypes
@pytest.mark.parametrize("size", [(8,), (140,)], ids=["short", "long"])
def test_a_shift_mask_of_the_lowest_finite_number_is_finite(size, dtype, backend):
    case = Case(1, size, (size[0] // 2,), (1,), heads=1, bias="dense", dtype=dtype)
    case = case.but(mask_value=torch.finfo(torch.float32).min)
    operands = make_operands(case)
    low = operands._replace(bias=torch.full_like(operands.bias, -1e38, dtype=torch.float32))
    out, expected = call(case, low, backend), call(case, low, "reference")
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(out, expected, **close)


@over(
    Case(1, (3, 3), (1, 1), heads=4, head_dim=48),
    Case(1, (3, 3), (1, 1), heads=4, head_dim=48, dtype=torch.float16),
)
def test_logits_of_one_token_have_gradient_zero(case, backend):
    check(case, backend)


@over_dtypes
def test_everything_masked_gives_zeros_and_zero_gradients(dtype, backend):
    case = SHIFTED.but(dtype=dtype, bias="dense", mask="soft", cosine=True)
    operands = make_operands(case)
    operands = operands._replace(mask=torch.full_like(operands.mask, -torch.inf))
    actual = run(case, operands, make_grad_out(case), backend)
    assert not actual.out.any()
    for name, grad in actual.grads.items():
        assert not grad.any(), name


@over_dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_nan_stays_in_its_window(packed, dtype, backend):
    case = Case(2, (8, 8), (4, 4), dtype=dtype, packed=packed)
    operands, grad_out = make_operands(case), make_grad_out(case)
    bad = operands._replace(query=operands.query.clone())
    bad.query[0, 1, 2] = torch.nan
    clean, actual = (run(case, x, grad_out, backend) for x in (operands, bad))
    inside = torch.zeros(case.batch, *case.size, dtype=torch.bool)
    inside[0, :4, :4] = True
    assert actual.out[0, 1, 2].isnan().all()
    assert torch.equal(actual.out[~inside], clean.out[~inside])
    for name in clean.grads:
        assert torch.equal(actual.grads[name][~inside], clean.grads[name][~inside])
    if packed:  # the token is a key and a value as well
        assert actual.out[inside].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_is_not_hidden_by_a_mask_of_minus_infinity(dtype, backend):
    case = Case(1, (8,), (4,), dtype=dtype, mask="holes")
    operands = make_operands(case)
    query = operands.query.clone()
    query[0, 5] = torch.nan
    mask = torch.zeros_like(operands.mask)
    mask[1, 1, 0] = -torch.inf
    out = call(case, operands._replace(query=query, mask=mask), backend)
    assert out[0, 5].isnan().all()
    assert not out[0, :4].isnan().any()
