"""The contract of the operation: outputs and every gradient within the error rule of float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from contract_cases import (
    GEOMETRIES,
    OPTIONS,
    PLANE,
    SHIFTED,
    TILES,
    assert_same_bits,
    judged,
    over,
    over_dtypes,
)
from modes import sized

from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.position_bias import relative_position_index
from swin_kernels.testing import (
    LAYOUTS,
    LEAST_INPUTS,
    Case,
    assert_within_error_rule,
    call,
    check,
    make_grad_out,
    make_operands,
    run,
    run_exact,
    run_unfused,
    with_grad,
)

SMALLER_THAN_A_WINDOW = (
    Case(2, (3, 5), (7, 7), (3, 3), bias="table", pads=True),
    Case(2, (3, 5), (7, 7), (3, 3), bias="table", pads=True, pad_order="roll-pad", cosine=True),
    Case(1, (1,), (4,), (2,), pads=True),
    Case(1, (1, 1, 1), (2, 2, 2), (1, 0, 1), pad_order="roll-pad", pads=True),
)
BIASES_OF_ANOTHER_DTYPE = (
    PLANE.but(shift=(2, 2), bias="dense", mask="soft", extras_dtype=torch.float32),
    PLANE.but(shift=(2, 2), cosine=True, packed=True, extras_dtype=torch.float32),
    PLANE.but(bias="table+index", pad_order="roll-pad", shift=(1, 3), extras_dtype=torch.float32),
)
MEMORY_LAYOUTS = tuple(
    PLANE.but(shift=(2, 2), bias="dense", mask="soft", layout=layout, packed=packed)
    for layout in LAYOUTS
    for packed in (False, True)
)


@pytest.mark.in_pairs
@over_dtypes
@judged(*GEOMETRIES, *OPTIONS, *SMALLER_THAN_A_WINDOW, *BIASES_OF_ANOTHER_DTYPE, *MEMORY_LAYOUTS)
def test_geometries_options_and_layouts_match_float64(case, dtype, backend):
    check(case.but(dtype=dtype), backend)


@over_dtypes
@pytest.mark.parametrize(
    "head_dim",
    [
        *(8, 10, 16, 30, 32, 48, 64, 88, 128),
        pytest.param(24, marks=pytest.mark.slow_interpreter),
        pytest.param(96, marks=pytest.mark.slow_emulator),
    ],
)
def test_head_dims_match_float64(head_dim, dtype, backend):
    case = Case(1, (11, 8), (4, 4), (2, 2), head_dim=head_dim, dtype=dtype, bias="table")
    case = case.but(packed=head_dim % 16 == 0, pads=True, cosine=head_dim % 3 == 0)
    check(sized(case).but(head_dim=head_dim), backend)


WINDOWS = (
    ((4, 5), (2, 2)),
    ((6, 7), (3, 3)),
    ((8, 7), (4, 4)),
    ((14, 12), (7, 7)),
    ((16, 13), (8, 8)),
    ((10, 12), (10, 10)),
    ((12, 21), (12, 12)),
    ((14, 28), (14, 14)),
    ((197,), (197,)),
    ((16, 30), (16, 16)),
    ((7, 7, 9), (7, 7, 7)),
    ((8, 7, 12), (8, 7, 7)),
    ((24, 20), (24, 24)),
)


@over_dtypes
@pytest.mark.parametrize(
    ("size", "window"),
    [
        pytest.param(
            *case,
            id=str(tokens),
            marks=[pytest.mark.slow_interpreter] * (tokens == 392)
            + [pytest.mark.in_pairs] * (tokens > 100),
        )
        for case in WINDOWS
        for tokens in [math.prod(case[1])]
    ],
)
def test_windows_of_4_to_576_tokens_match_float64(size, window, dtype, backend):
    shift = tuple(w // 2 if s > w else 0 for s, w in zip(size, window))
    case = Case(1, size, window, shift, 1, 32, dtype=dtype, bias="table", pads=True)
    check(case if math.prod(window) > 64 else sized(case), backend)


# 65 to 128 tokens: Triton's forward may hold the window whole, and its backward does not
@pytest.mark.in_pairs
@over_dtypes
@over(
    Case(1, (4, 7, 9), (2, 7, 7), (1, 3, 3), 1, 32, bias="table+index", pads=True),
    Case(1, (14, 14), (9, 9), (4, 4), 1, 32, bias="dense", packed=True, pad_order="roll-pad"),
    Case(1, (100,), (100,), heads=24, head_dim=16, bias="none", cosine=True),
    Case(1, (11, 11), (10, 11), (5, 0), 1, 16, bias="table", value_dim=32, mask_value=-math.inf),
)
def test_windows_of_65_to_128_tokens_match_float64(case, dtype, backend):
    check(case.but(dtype=dtype, layout="contiguous"), backend)


@over_dtypes
@pytest.mark.parametrize("bias", ["none", "dense", "table+index"])
def test_wide_heads_without_padding_match_float64(bias, dtype, backend):
    case = Case(1, (14, 7), (7, 7), (3, 0), 1, 64, bias=bias, dtype=dtype, packed=True)
    check(case, backend)


@over_dtypes
def test_views_of_one_packed_buffer_match_packed(dtype, backend):
    case = SHIFTED.but(dtype=dtype, packed=True)
    operands, grad_out = make_operands(case), make_grad_out(case)
    packed = run(case, operands, grad_out, backend)
    query, key, value = operands.query.unbind(-3)
    apart = operands._replace(query=query, key=key, value=value)
    separate = run(case.but(packed=False), apart, grad_out, backend)
    tokens = dict(zip(("query", "key", "value"), packed.grads["query"].unbind(-3)))
    assert_same_bits(separate, (packed.out, packed.grads | tokens))


@over_dtypes
def test_expanded_operands_match_their_copies(dtype, backend):
    case = SHIFTED.but(dtype=dtype, bias="dense", mask="soft")
    operands, grad_out = make_operands(case), make_grad_out(case)
    wide = operands._replace(
        key=operands.key[:1, :1].expand(operands.key.shape),
        value=operands.value[..., :1].expand(operands.value.shape),
        bias=operands.bias[:1].expand(operands.bias.shape),
        mask=operands.mask[:1].expand(operands.mask.shape),
        pad_key=operands.pad_key[:1].expand(operands.pad_key.shape),
    )
    copies = wide._replace(
        **{n: getattr(wide, n).clone() for n in ("key", "value", "bias", "mask")}
    )
    expanded, copied = (run(case, x, grad_out, backend) for x in (wide, copies))
    assert_same_bits(expanded, copied)


@over_dtypes
def test_expanded_gradient_of_a_sum_matches_float64(dtype, backend):
    case = sized(PLANE.but(shift=(2, 2), dtype=dtype, cosine=True))
    ones = torch.ones((), dtype=dtype).expand(make_grad_out(case).shape)

    def judged(result):
        # logit_scale: a number a head is too few for the rule, and is judged in the cases above
        return result._replace(
            grads={name: grad for name, grad in result.grads.items() if name != "logit_scale"}
        )

    results = []
    for seed in range(LEAST_INPUTS):
        operands = make_operands(case, seed=seed)
        leaves = with_grad(operands)
        call(case, leaves, backend).sum().backward()
        with_ones = run(case, operands, ones, backend)
        for name, grad in with_ones.grads.items():
            assert torch.equal(getattr(leaves, name).grad, grad)
        others = (f(case, operands, ones) for f in (run_unfused, run_exact))
        results.append([judged(result) for result in (with_ones, *others)])
    assert_within_error_rule(*zip(*results))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_index_of_any_stride_and_int_dtype_matches(index_dtype, backend):
    case = SHIFTED.but(bias="table+index")
    operands, grad_out = make_operands(case), make_grad_out(case)
    index = operands.bias_index.to(index_dtype)
    flipped = index.T.contiguous().T
    sliced = torch.stack((index, index), dim=-1)[..., 0]
    expected = run(case, operands, grad_out, backend)
    for other in (index, flipped, sliced):
        actual = run(case, operands._replace(bias_index=other), grad_out, backend)
        assert_same_bits(actual, expected)


def test_geometric_index_given_equals_none(backend):
    case = SHIFTED
    operands, grad_out = make_operands(case), make_grad_out(case)
    given = operands._replace(bias_index=relative_position_index(case.window))
    expected, actual = (run(case, x, grad_out, backend) for x in (operands, given))
    assert torch.equal(actual.out, expected.out)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-5, atol=1e-5)


@over_dtypes
@over(
    Case(0, (14, 9), (7, 7), (3, 3), bias="table", pads=True, cosine=True, mask="soft"),
    Case(0, (8, 8), (4, 4), bias="dense", packed=True),
    Case(0, (8,), (4,), (1,), bias="table+index", value_dim=3, pads=True),
)
def test_empty_batch_gives_empty_output_and_zero_bias_gradients(case, dtype, backend):
    actual = check(case.but(dtype=dtype), backend)
    assert actual.out.shape == (0, *case.size, case.heads, case.dv)
    for name in actual.grads.keys() - {"query", "key", "value"}:
        assert not actual.grads[name].any()


@pytest.mark.parametrize("layout", ["strided", "channels-inside"])
@over(SHIFTED.but(mask="soft"), TILES.but(mask="soft"))
def test_operands_are_left_as_they_were(case, layout, backend):
    case = case.but(layout=layout)
    operands, grad_out = make_operands(case), make_grad_out(case)
    given = [x for x in (*operands, grad_out) if x is not None]
    # of the whole storage: what lies between the rows of a strided tensor is another's
    whole = [x.new_empty(0).set_(x.untyped_storage()) for x in given]
    before = [x.clone() for x in whole]
    run(case, operands, grad_out, backend)
    assert all(map(torch.equal, whole, before))


def test_one_token_windows_return_the_value(backend):
    case = Case(2, (3, 4), (1, 1), bias="table")
    operands = make_operands(case)
    assert torch.equal(call(case, operands, backend), operands.value)


def test_pads_of_float64_match_float64(backend):
    case = PLANE.but(dtype=torch.float16, extras_dtype=torch.float64, cosine=True, shift=(2, 2))
    operands, grad_out = make_operands(case), make_grad_out(case)
    actual, exact = run(case, operands, grad_out, backend), run_exact(case, operands, grad_out)
    for name in ("pad_key", "pad_value"):
        assert actual.grads[name].dtype == torch.float64
        torch.testing.assert_close(actual.grads[name], exact.grads[name], rtol=0.02, atol=0.05)


@over_dtypes
def test_output_is_contiguous_and_in_the_dtype_of_the_input(dtype, backend):
    case = SHIFTED.but(dtype=dtype)
    out = call(case, make_operands(case), backend)
    assert out.dtype == dtype
    assert out.is_contiguous()


def test_integer_and_sequence_arguments_agree(backend):
    attend = functools.partial(shifted_window_attention_qkvpacked, backend=backend)
    qkv = torch.randn(1, 8, 8, 3, 2, 8)
    sequences = attend(qkv, (4, 4), [2, 2], periodic=(False, False))
    assert torch.equal(sequences, attend(qkv, 4, 2, periodic=False))


def test_shift_defaults_to_none_and_scale_to_the_root_of_the_head_dim(backend):
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind()
    actual = shifted_window_attention(q, k, v, 3, backend=backend)
    given = shifted_window_attention(q, k, v, 3, 0, scale=8**-0.5, backend=backend)
    assert torch.equal(actual, given)
