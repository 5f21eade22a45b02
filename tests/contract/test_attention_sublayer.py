"""The attention sublayer against stock modules: outputs and every gradient by the error rule."""

from __future__ import annotations

import math

import pytest
import torch
from contract_cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import swin_kernels
from swin_kernels.attention_sublayer_problem import (
    ATTENTION_SUBLAYER_DIFFERENTIABLE,
    AttentionSublayerProblem,
)
from swin_kernels.testing import DTYPE_NAMES, assert_within_error_rule
from swin_kernels.testing.attention_sublayer import (
    BIASES,
    SublayerCase,
    call_sublayer,
    check_sublayer,
    make_sublayer_grad_out,
    make_sublayer_operands,
    run_sublayer,
    run_sublayer_exact,
    run_sublayer_unfused,
)

PLAIN = SublayerCase()
SHIFTED = SublayerCase(shift=(2, 1), layer_scale=True, drop=True, batch=3)
CASES = (
    PLAIN,
    SHIFTED,
    SHIFTED.but(norm="post", pad_order="roll-pad"),
    SHIFTED.but(norm="none", bias="dense", layout="cropped"),
    SHIFTED.but(cosine=True, bias="table+index"),
    SHIFTED.but(cosine=True, norm="post", pad_order="roll-pad"),
    SHIFTED.but(mask=True, bias="none"),
    SHIFTED.but(mask_value=-math.inf, periodic=(True, False)),
    SHIFTED.but(scale=0.3, biases=False),
    SublayerCase(4, (14, 14), (7, 7), (3, 3), 3, 96),
    SublayerCase(2, (7, 7), (7, 7), (0, 0), 6, 192, norm="post", cosine=True),
    SublayerCase(2, (13,), (5,), (2,), 4, 40),
    SublayerCase(1, (4, 6, 5), (2, 3, 3), (1, 1, 0), 4, 100),
    SublayerCase(2, (12, 12), (12, 12), (0, 0), 2, 24),  # a window larger than a block of rows
    SublayerCase(1, (3, 3), (4, 4), (1, 1), 2, 34),  # a map smaller than its window
)
over_backends = pytest.mark.parametrize("sublayer_backend", ["cpu", "reference"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())


@over_backends
@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_keep_the_error_rule(case, dtype, sublayer_backend):
    check_sublayer(case.but(dtype=dtype), sublayer_backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [SHIFTED, SHIFTED.but(norm="post", cosine=True)], ids=str)
def test_other_parameters_may_be_wider_than_the_tokens(case, dtype):
    check_sublayer(case.but(dtype=dtype, others_dtype=torch.float32), "cpu")


@given(
    case=st.builds(
        lambda axes, heads, head_dim, **others: SublayerCase(
            size=tuple(a[0] for a in axes),
            window=tuple(a[1] for a in axes),
            shift=tuple(a[2] % a[1] for a in axes),
            heads=heads,
            channels=heads * head_dim,
            **others,
        ),
        axes=st.lists(
            st.tuples(st.integers(3, 11), st.integers(2, 5), st.integers(0, 4)),
            min_size=1,
            max_size=3,
        ),
        heads=st.integers(1, 4),
        head_dim=st.integers(8, 20),
        batch=st.integers(2, 3),
        dtype=st.sampled_from(list(DTYPE_NAMES)),
        norm=st.sampled_from(["pre", "none"]),
        bias=st.sampled_from(BIASES),
        biases=st.booleans(),
        cosine=st.booleans(),
        pad_order=st.sampled_from(["pad-roll", "roll-pad"]),
        layer_scale=st.booleans(),
        drop=st.booleans(),
        layout=st.sampled_from(["contiguous", "cropped"]),
    ).filter(lambda case: case.batch * math.prod(case.size) >= 32 and case.channels >= 16),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
def test_any_shape_gives_what_the_reference_gives(case, seed):
    case = case.but(dtype=torch.float64)
    operands, grad_out = make_sublayer_operands(case, seed), make_sublayer_grad_out(case, seed + 1)
    ours, exact = (f(case, operands, grad_out) for f in (_run_cpu, run_sublayer_unfused))
    for a, b in ((ours.out, exact.out), *((g, exact.grads[n]) for n, g in ours.grads.items())):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def _run_cpu(case, operands, grad_out):
    return run_sublayer(case, operands, grad_out, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [SHIFTED, SublayerCase(5, (28, 28), (7, 7), (3, 3), 3, 96, norm="post", cosine=True)],
    ids=str,
)
def test_bits_do_not_depend_on_the_threads(case, dtype):
    case = case.but(dtype=dtype)
    operands, grad_out = make_sublayer_operands(case), make_sublayer_grad_out(case)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7, 7):
            torch.set_num_threads(count)
            results.append(_run_cpu(case, operands, grad_out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0].out, other.out)
        for name, grad in results[0].grads.items():
            assert_same_bits(grad, other.grads[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_autocast_multiplies_in_its_dtype_and_keeps_x(norm, dtype):
    case, measured = SHIFTED.but(norm=norm), []
    for seed in range(6):
        operands = make_sublayer_operands(case, seed)
        grad_out = make_sublayer_grad_out(case, seed + 9)
        with torch.autocast("cpu", dtype):
            ours = _run_cpu(case, operands, grad_out)
            stock = run_sublayer_unfused(case, operands, grad_out)
            with torch.no_grad():
                packed = call_sublayer(case, operands, "cpu")
        assert_same_bits(packed, ours.out)
        assert {ours.out.dtype} | {g.dtype for g in ours.grads.values()} == {torch.float32}
        measured.append((ours, stock, run_sublayer_exact(case, operands, grad_out)))
    assert_within_error_rule(*zip(*measured))


@over_backends
def test_dropout_is_that_of_attention_alone(sublayer_backend):
    # an identity before and behind: what is left is the op, whose dropout is its own test's
    case = SublayerCase(2, (8, 8), (4, 4), (1, 1), 2, 16, norm="none", biases=False, dropout_p=0.4)
    operands = make_sublayer_operands(case)
    operands = operands._replace(proj_weight=torch.eye(16))
    torch.manual_seed(3)
    ours = call_sublayer(case, operands, sublayer_backend) - operands.x
    qkv = torch.nn.functional.linear(operands.x, operands.qkv_weight).unflatten(-1, (3, 2, 8))
    torch.manual_seed(3)
    alone = swin_kernels.shifted_window_attention_qkvpacked(
        qkv, 4, 1, bias_table=operands.bias_table, dropout_p=0.4, backend=sublayer_backend
    )
    torch.testing.assert_close(ours, alone.flatten(-2), rtol=1e-4, atol=1e-5)


def test_a_dropped_image_costs_nothing_and_passes_its_gradient_on():
    operands, grad_out = make_sublayer_operands(SHIFTED), make_sublayer_grad_out(SHIFTED)
    operands.x[-1] = float("nan")  # of the image that is dropped
    result = _run_cpu(SHIFTED, operands, grad_out)
    assert result.out[-1].isnan().all()
    assert result.out[:-1].isfinite().all()
    assert_same_bits(result.grads["x"][-1], grad_out[-1])
    assert all(g.isfinite().all() for g in result.grads.values())


@over_backends
@pytest.mark.parametrize("batch", [0, 2], ids=["empty", "all dropped"])
def test_no_window_gives_x_and_zero_gradients(batch, sublayer_backend):
    case = SHIFTED.but(batch=batch, cosine=True, drop=False)
    operands = make_sublayer_operands(case)._replace(residual_scale=torch.zeros(batch))
    result = run_sublayer(case, operands, make_sublayer_grad_out(case), sublayer_backend)
    assert_same_bits(result.out, operands.x)
    assert all(not g.any() for name, g in result.grads.items() if name != "x")


@pytest.mark.parametrize("name", ATTENTION_SUBLAYER_DIFFERENTIABLE)
def test_one_gradient_alone_equals_it_among_all(name):
    case = SHIFTED.but(cosine=True, bias="dense" if name == "bias" else "table")
    operands, grad_out = make_sublayer_operands(case), make_sublayer_grad_out(case)
    leaf = getattr(operands, name).detach().requires_grad_()
    out = call_sublayer(case, operands._replace(**{name: leaf}), "cpu")
    (grad,) = torch.autograd.grad(out, leaf, grad_out)
    assert_same_bits(grad, _run_cpu(case, operands, grad_out).grads[name])


_OPERANDS = make_sublayer_operands(SHIFTED)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(2, 32)}, r"x: expected \(B, \*S, C\)"),
        ({"x": "x"}, "x: expected a tensor, got str"),
        ({"x": _OPERANDS.x.double()}, "qkv_weight is torch.float32, x torch.float64"),
        ({"num_heads": 5}, "num_heads: expected a number that divides 32 channels, got 5"),
        ({"num_heads": 2.0}, "num_heads: expected a number that divides"),
        ({"qkv_weight": torch.randn(32, 96)}, r"qkv_weight: expected shape \(96, 32\)"),
        ({"qkv_bias": torch.randn(32)}, r"qkv_bias: expected shape \(96,\), got \(32,\)"),
        ({"proj_weight": torch.randn(32, 33)}, r"proj_weight: expected shape \(32, 32\)"),
        ({"bias_table": torch.randn(48, 2)}, r"bias_table: expected shape \(49, 2\)"),
        ({"window_size": (4, 4, 4)}, "window_size"),
        ({"shift_size": 4}, "shift"),
        ({"mask": torch.zeros(1, 16, 16)}, "mask: expected shape"),
        ({"logit_scale": torch.ones(3)}, r"logit_scale: expected shape \(2,\)"),
        ({"residual_scale": torch.ones(2)}, r"residual_scale: expected shape \(3,\)"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability"),
        ({"norm": "both"}, "norm: expected 'pre' or 'post'"),
        ({"pad_order": "neither"}, "pad_order"),
        ({"backend": "gpu"}, "backend: expected one of cpu, triton, cuda, reference"),
    ],
)
def test_bad_input_raises_before_anything_is_computed(changes, message):
    names = ("x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "bias_table")
    arguments = {name: getattr(_OPERANDS, name) for name in names}
    arguments |= {"num_heads": 2, "window_size": 4, "shift_size": (2, 1)} | changes
    with pytest.raises(ValueError, match=message):
        swin_kernels.window_attention_sublayer(**arguments)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_that_lacks_it_says_so(name):
    with pytest.raises(NotImplementedError, match=f"{name}: has no window_attention_sublayer yet"):
        call_sublayer(PLAIN, make_sublayer_operands(PLAIN), name)


def test_explain_tells_which_backend_runs_a_call():
    problem = AttentionSublayerProblem.checked(make_sublayer_operands(PLAIN), 2, 4)
    told = swin_kernels.explain(problem)
    assert "window_attention_sublayer B=2 map=9×11 window=4×4" in told
    assert "cpu would run it" in told
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        assert "fewer windows than threads" in swin_kernels.explain(problem)
    finally:
        torch.set_num_threads(threads)
