"""Dropout: one mask for all backends, regenerated in backward, drawn from torch's generator."""

from __future__ import annotations

import pytest
import torch
from contract_cases import SHIFTED, TILES, assert_same_bits, over, over_dtypes
from modes import sized

from swin_kernels import shifted_window_attention
from swin_kernels.backends.reference.dropout import dropout_factor
from swin_kernels.testing import Case, call, check, make_grad_out, make_operands, run

PLANE = SHIFTED.but(dropout_p=0.3)


@pytest.mark.in_pairs
@over_dtypes
@over(
    PLANE,
    PLANE.but(packed=True, pad_order="roll-pad", cosine=True, dropout_p=0.7),
    PLANE.but(mask="dead", bias="dense"),
    Case(2, (5, 6, 7), (2, 3, 4), (1, 0, 2), heads=3, value_dim=24, dropout_p=0.1),
)
def test_dropout_matches_the_reference_of_the_same_seed(case, dtype, backend):
    check(sized(case.but(dtype=dtype)), backend)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@over(
    Case(2, (8, 8), (4, 4), heads=3, head_dim=16),
    Case(2, (140,), (70,), heads=2, head_dim=70),  # in tiles
)
def test_dropped_probabilities_are_those_of_the_definition(case, p, backend):
    images, windows, heads, tokens = case.batch, case.grid.windows, case.heads, case.grid.tokens
    # equal logits, and values and gradients that are unit vectors: out is P, dV its transpose
    query = torch.zeros(images, *case.size, heads, tokens)
    units = torch.eye(tokens).view(1, 1, tokens, 1, tokens).expand(images, windows, -1, heads, -1)
    value = case.grid.merge(units).requires_grad_()
    torch.manual_seed(2**40 + 3)
    out = shifted_window_attention(query, query, value, case.window, dropout_p=p, backend=backend)
    (d_value,) = torch.autograd.grad(out, value, value.detach())
    torch.manual_seed(2**40 + 3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    factor = dropout_factor(seed, p, images, windows, heads, tokens)  # (B, nW, H, N, N)
    found = [case.grid.split(x.detach()).transpose(2, 3) for x in (out, d_value)]
    for probabilities in (found[0], found[1].mT):
        expected = (factor / tokens).float()
        torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-7)


@over_dtypes
@over(PLANE, TILES.but(dropout_p=0.2))
def test_one_torch_seed_gives_one_result(case, dtype, backend):
    case = case.but(dtype=dtype)
    operands, grad_out = make_operands(case), make_grad_out(case)
    first, again, other = (run(case, operands, grad_out, backend, seed) for seed in (3, 3, 4))
    assert_same_bits(again, first)
    assert not torch.equal(first.out, other.out)


def test_successive_calls_draw_successive_masks(backend):
    operands = make_operands(PLANE)
    assert not torch.equal(call(PLANE, operands, backend), call(PLANE, operands, backend))


def _generator_states():
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def test_without_dropout_the_generator_is_left_alone(backend):
    case = PLANE.but(dropout_p=0.0)
    operands, before = make_operands(case), _generator_states()
    call(case, operands, backend)
    assert all(map(torch.equal, _generator_states(), before))


@over_dtypes
def test_everything_dropped_gives_zeros_and_zero_gradients(dtype, backend):
    case = PLANE.but(dropout_p=1.0, dtype=dtype, cosine=True)
    actual = run(case, make_operands(case), make_grad_out(case), backend)
    assert not actual.out.any()
    for name, grad in actual.grads.items():
        assert not grad.any(), name


def test_almost_nothing_dropped_is_almost_no_dropout(backend):
    case = PLANE.but(dropout_p=1e-12)
    operands = make_operands(case)
    expected = call(case.but(dropout_p=0.0), operands, backend)
    torch.testing.assert_close(call(case, operands, backend), expected)


@pytest.mark.slow_emulator
def test_the_mean_over_seeds_is_the_result_without_dropout(backend):
    operands = make_operands(PLANE)
    expected = call(PLANE.but(dropout_p=0.0), operands, backend)
    torch.manual_seed(0)
    draws = torch.stack([call(PLANE, operands, backend) for _ in range(128)])
    spread = draws.std(0) / 128**0.5 + 1e-6
    deviations = (draws.mean(0) - expected) / spread
    assert deviations.abs().mean() < 1.0  # 0.8 for a normal distribution
    assert deviations.mean().abs() < 0.1
