"""The traps of the contract, all seen in the libraries themselves: each test names its trap."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contract_cases import over_dtypes
from modes import cut

from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.testing import (
    Case,
    Result,
    assert_within_error_rule,
    make_grad_out,
    make_operands,
    run,
    run_exact,
    run_unfused,
)

pytestmark = pytest.mark.every_dtype


@pytest.mark.parametrize(
    ("pad_order", "reached"), [("roll-pad", [0, 1, 10, 11]), ("pad-roll", [0, 1, 2])]
)
def test_pad_order_decides_which_rows_see_row_0(pad_order, reached, backend):
    qkv = torch.randn(1, 12, 12, 3, 2, 8)
    changed = qkv.clone()
    changed[:, 0] += 1
    out, moved = (
        shifted_window_attention_qkvpacked(x, 7, 3, pad_order=pad_order, backend=backend)
        for x in (qkv, changed)
    )
    rows = (moved != out).sum(dim=(0, 2, 3, 4)) > 0
    assert rows.nonzero().flatten().tolist() == reached


def _stock_linear_attention(x, weight, bias, heads, size, window, shift, pad_order):
    """Pad the features, roll, run qkv on every token, partition, attend: as the libraries do it."""
    case = Case(1, size, window, shift, heads, dtype=x.dtype, pad_order=pad_order)
    missing = [p - s for p, s in zip(case.grid.padded, size)]
    amounts = [-s for s in shift]
    if pad_order == "pad-roll":
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0])).roll(amounts, (1, 2))
    else:
        x = F.pad(x.roll(amounts, (1, 2)), (0, 0, 0, missing[1], 0, missing[0]))
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1))
    q, k, v = case.grid.split(qkv).permute(3, 0, 1, 4, 2, 5).unbind(0)
    mask = case.grid.shift_mask(dtype=x.dtype)[:, None]
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1)
    out = case.grid.merge((weights @ v).transpose(2, 3)).flatten(-2)
    if pad_order == "pad-roll":
        return out.roll(shift, (1, 2))[:, : size[0], : size[1]]
    return out[:, : size[0], : size[1]].roll(shift, (1, 2))


@pytest.mark.float64
@pytest.mark.parametrize("pad_order", ["pad-roll", "roll-pad"])
def test_gradients_of_padded_tokens_reach_the_qkv_bias(pad_order, backend):
    size, window, shift, heads = (11, 9), (4, 4), (2, 1), 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *size, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(96, 32, generator=generator, dtype=torch.float64) / 6
    bias = torch.randn(96, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(2, *size, 32, generator=generator, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    stock = _stock_linear_attention(*leaves, heads, size, window, shift, pad_order)
    expected = torch.autograd.grad(stock, leaves, grad_out)

    def attend(qkv_bias):
        _, pad_key, pad_value = qkv_bias.unflatten(0, (3, heads, -1))
        return shifted_window_attention_qkvpacked(
            F.linear(*leaves).unflatten(-1, (3, heads, -1)),
            window,
            shift,
            pad_key=pad_key,
            pad_value=pad_value,
            pad_order=pad_order,
            backend=backend,
        ).flatten(-2)

    out = attend(bias)
    torch.testing.assert_close(out, stock, rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad(out, leaves, grad_out)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    # leave padding out, and the gradient of the q bias stays right while that of k and v is wrong
    without = torch.autograd.grad(attend(bias.detach()), bias, grad_out)[0]
    wrong = (without - expected[2]).abs().view(3, -1).amax(-1)
    assert wrong[0] < 1e-12
    assert wrong[1:].min() > 1e-3


@over_dtypes
def test_minus_100_is_finite_under_a_large_logit_scale(dtype, backend):
    # tokens of one region point away from each other, those of another region along
    query = torch.zeros(1, 4, 1, 8, dtype=dtype)
    query[..., 0] = 1
    key, value = query.clone(), torch.zeros_like(query)
    key[:, 1:] *= -1  # with window 4 and shift 1, token 0 alone is beyond the seam
    value[:, 0] = 4
    scale = torch.full((1,), 80.0, dtype=dtype)
    finite, infinite = (
        shifted_window_attention(
            query, key, value, 4, 1, mask_value=v, logit_scale=scale, backend=backend
        )
        for v in (-100.0, -math.inf)
    )
    assert (finite[:, 1:].double() > 3.9).all()
    assert (infinite[:, 1:].double() == 0).all()


def test_probabilities_below_the_smallest_normal_number_are_flushed(cpu_kernels):
    query = torch.zeros(1, 8, 1, 16)
    value = torch.zeros(1, 8, 1, 16)
    value[:, :4] = 1e38  # beyond the seam of the one window
    out = shifted_window_attention(query, query, value, 8, 4, backend="cpu")
    assert (out[:, 4:] == 0).all()
    assert (out[:, :4] > 9e37).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pad_order", ["pad-roll", "roll-pad"])
def test_zero_vectors_under_cosine_give_no_nan(pad_order, dtype, backend):
    case = cut(Case(2, (11, 9), (4, 4), (2, 2), dtype=dtype, cosine=True, pad_order=pad_order))
    operands = make_operands(case)
    for x in operands[:2]:
        x[:, 3:5] = 0
    actual = run(case, operands, make_grad_out(case), backend)
    assert actual.out.isfinite().all()
    for name, grad in actual.grads.items():
        assert not grad.isnan().any(), name
    eager, exact = (f(case, operands, make_grad_out(case)) for f in (run_unfused, run_exact))

    def without_norms(result):  # what passes a zero vector is larger than fp16 holds
        return Result(result.out, {"value": result.grads["value"]})

    assert_within_error_rule(*map(without_norms, (actual, eager, exact)))


@pytest.mark.float64
@pytest.mark.parametrize("length", [1e-13, 7e-13, 2e-12, 1e-11])
def test_norms_round_the_clamp_match_autograd(length, backend):
    case = Case(1, (8,), (4,), dtype=torch.float64, cosine=True)
    operands = make_operands(case)
    for x in operands[:2]:
        x[:, 2] *= length / x[:, 2].norm(dim=-1, keepdim=True)
    actual = run(case, operands, make_grad_out(case), backend)
    exact = run_exact(case, operands, make_grad_out(case))
    torch.testing.assert_close(actual.out, exact.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual.grads, exact.grads, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tiny_vectors_keep_their_direction(dtype, backend):
    tiny = 6e-7 if dtype == torch.float16 else 1e-9  # squares underflow in fp16
    query = torch.zeros(1, 4, 1, 8, dtype=dtype)
    query[..., 0] = tiny
    key = query.clone()
    key[:, 2:] *= -1
    value = torch.zeros(1, 4, 1, 8, dtype=dtype)
    value[:, :2] = 1
    out = shifted_window_attention(
        query, key, value, 4, logit_scale=torch.tensor([20.0], dtype=dtype), backend=backend
    )
    assert (out.double() - 1).abs().max() < 1e-2
