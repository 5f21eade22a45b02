"""The MLP sublayer against stock modules: outputs and every gradient by the error rule."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from contract_cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import swin_kernels
from swin_kernels.backends.sublayers import why_slower
from swin_kernels.mlp_problem import MLP_DIFFERENTIABLE, MlpProblem
from swin_kernels.ops.dispatch import MLP_BACKENDS
from swin_kernels.testing import (
    DTYPE_NAMES,
    assert_no_worse_than_eager,
    assert_within_error_rule,
)
from swin_kernels.testing.mlp import (
    MlpCase,
    call_mlp,
    check_mlp,
    make_mlp_grad_out,
    make_mlp_operands,
    run_mlp,
    run_mlp_exact,
    run_mlp_unfused,
)

PLAIN = MlpCase()
FULL = MlpCase(3, (5, 9), 40, 100, layer_scale=True, drop=True)
CASES = (
    PLAIN,
    FULL,
    FULL.but(norm="post", activation="silu"),
    FULL.but(norm="none", activation="relu"),
    FULL.but(activation="gelu_tanh", layout="cropped"),
    PLAIN.but(layout="channels-inside", norm="post"),
    PLAIN.but(biases=False),
    PLAIN.but(norm="post", biases=False, layer_scale=True),
    MlpCase(1, (50,), 24, 24),
    MlpCase(2, (3, 4, 5), 100, 37, layout="cropped", norm="post", drop=True),
    MlpCase(1, (56, 56), 96),  # several chunks of rows
    MlpCase(2, (1, 1), 16, 5),
    MlpCase(1, (3,), 1, 3, norm="none"),
    MlpCase(2, (3, 3), 1, 3, norm="none", layout="channels-inside"),
    MlpCase(1, (7, 7), 384, layer_scale=True),
)
over_backends = pytest.mark.parametrize("mlp_backend", ["cpu", "reference"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())


@over_backends
@over_dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_keep_the_error_rule(case, dtype, mlp_backend):
    check_mlp(case.but(dtype=dtype), mlp_backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [FULL, FULL.but(norm="post")], ids=str)
def test_norms_and_biases_may_be_wider_than_the_tokens(case, dtype):
    check_mlp(case.but(dtype=dtype, others_dtype=torch.float32), "cpu")


# at least 16 rows: LayerNorm makes of a row's errors one, and the largest of few is sampling noise
_SHAPES = st.tuples(
    st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
).filter(lambda shape: shape[0] * math.prod(shape[1]) >= 16)


@given(
    case=st.builds(
        lambda shape, **others: MlpCase(*shape, **others),
        _SHAPES,
        channels=st.integers(24, 90),  # LayerNorm of few may divide by almost nothing
        hidden=st.integers(24, 150),
        dtype=st.sampled_from(list(DTYPE_NAMES)),
        activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
        norm=st.sampled_from(["pre", "post", "none"]),
        biases=st.booleans(),
        layer_scale=st.booleans(),
        drop=st.booleans(),
        layout=st.sampled_from(["contiguous", "cropped", "channels-inside"]),
    ),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_any_shape_keeps_the_error_rule(case, seed):
    check_mlp(case, "cpu", seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "case", [FULL, MlpCase(1, (56, 56), 96, norm="post"), MlpCase(2, (7, 7), 100)], ids=str
)
def test_bits_do_not_depend_on_the_threads(case, dtype):
    case = case.but(dtype=dtype)
    operands, grad_out = make_mlp_operands(case), make_mlp_grad_out(case)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7, 7):
            torch.set_num_threads(count)
            results.append(run_mlp(case, operands, grad_out, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0].out, other.out)
        for name, grad in results[0].grads.items():
            assert_same_bits(grad, other.grads[name])


@pytest.mark.parametrize("value", [1e-6, 0.3, 3.0, 10.0, 60.0])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_activations_are_right_at_every_size(activation, dtype, value):
    # one layer is the identity, the other sums: the activation alone is seen
    x = torch.linspace(-value, value, 4096, dtype=dtype).reshape(1, 512, 8)
    identity = torch.eye(8, dtype=dtype)
    case = MlpCase(1, (512,), 8, 8, dtype, activation, "none", biases=False)
    operands = make_mlp_operands(case)._replace(x=x, fc1_weight=identity, fc2_weight=identity)
    grad_out = make_mlp_grad_out(case)
    ours = run_mlp(case, operands, grad_out, "cpu")
    eager, exact = (f(case, operands, grad_out) for f in (run_mlp_unfused, run_mlp_exact))
    factor = 2.0 if dtype == torch.float32 else 4.0  # eager float64 is what is called exact here
    if dtype == torch.float64:
        torch.testing.assert_close(ours.out, exact.out, rtol=1e-14, atol=1e-14 * value)
        torch.testing.assert_close(ours.grads["x"], exact.grads["x"], rtol=1e-13, atol=1e-14)
        return
    assert_no_worse_than_eager(ours.out, eager.out, exact.out, factor, "output")
    assert_no_worse_than_eager(
        ours.grads["x"], eager.grads["x"], exact.grads["x"], factor, "gradient of x"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_what_is_not_finite_stays_in_its_row(norm, bad):
    case = PLAIN.but(norm=norm)
    operands = make_mlp_operands(case)
    operands.x[0, 3, 2, 5] = bad
    ours, stock = (f(case, operands, make_mlp_grad_out(case)) for f in (_run_cpu, run_mlp_unfused))
    assert torch.equal(ours.out.isnan(), stock.out.isnan())
    assert ours.out.isfinite().all(-1).sum() == 2 * 49 - 1


_run_cpu = functools.partial(run_mlp, backend="cpu")


def test_a_dropped_image_costs_nothing_and_passes_its_gradient_on():
    case = MlpCase(4, (7, 7), 32, drop=True)
    operands, grad_out = make_mlp_operands(case), make_mlp_grad_out(case)
    operands.x[-1] = float("nan")  # of the image that is dropped
    result = run_mlp(case, operands, grad_out, "cpu")
    assert result.out[-1].isnan().all()
    assert result.out[:-1].isfinite().all()
    assert_same_bits(result.grads["x"][-1], grad_out[-1])
    assert all(g.isfinite().all() for g in result.grads.values())


@over_backends
def test_all_images_dropped_gives_x_and_zero_gradients(mlp_backend):
    case = MlpCase(2, (3, 3), 16, drop=True, layer_scale=True)
    operands = make_mlp_operands(case)._replace(residual_scale=torch.zeros(2))
    result = run_mlp(case, operands, make_mlp_grad_out(case), mlp_backend)
    assert_same_bits(result.out, operands.x)
    assert all(not g.any() for name, g in result.grads.items() if name != "x")


@over_backends
def test_empty_batch_gives_an_empty_result_and_zero_gradients(mlp_backend):
    case = MlpCase(0, (3, 3), 16)
    result = run_mlp(case, make_mlp_operands(case), make_mlp_grad_out(case), mlp_backend)
    assert result.out.shape == (0, 3, 3, 16)
    assert all(not g.any() for g in result.grads.values())


@pytest.mark.parametrize("name", MLP_DIFFERENTIABLE)
def test_one_gradient_alone_equals_it_among_all(name):
    operands, grad_out = make_mlp_operands(FULL), make_mlp_grad_out(FULL)
    leaf = getattr(operands, name).detach().requires_grad_()
    out = call_mlp(FULL, operands._replace(**{name: leaf}), "cpu")
    (grad,) = torch.autograd.grad(out, leaf, grad_out)
    assert_same_bits(grad, run_mlp(FULL, operands, grad_out, "cpu").grads[name])


def test_packed_weights_follow_every_change_of_a_weight():
    case = MlpCase(1, (7, 7), 96)
    operands = make_mlp_operands(case)

    def ours():
        with torch.no_grad():
            return call_mlp(case, operands, "cpu")

    def expected():  # packed anew, as for training
        x = operands.x.detach().requires_grad_()
        return call_mlp(case, operands._replace(x=x), "cpu").detach()

    assert_same_bits(ours(), expected())
    operands.fc1_weight.mul_(2)  # by an optimiser: its version tells
    assert_same_bits(ours(), expected())
    operands.fc2_weight.data.mul_(0.5)  # behind its back
    assert_same_bits(ours(), expected())
    operands.fc1_weight.data = torch.randn_like(operands.fc1_weight)  # as by .to()
    assert_same_bits(ours(), expected())
    for columns in (slice(0, None, 2), slice(1, None, 2), slice(5, 40)):  # as by pruning
        operands.fc2_weight.data[:, columns] = 0
        assert_same_bits(ours(), expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [FULL, MlpCase(1, (28, 28), 96, norm="post")], ids=str)
def test_autocast_multiplies_in_its_dtype_and_keeps_x(case, dtype):
    measured = []
    for seed in range(4):
        operands, grad_out = make_mlp_operands(case, seed), make_mlp_grad_out(case, seed + 9)
        with torch.autocast("cpu", dtype):
            ours = run_mlp(case, operands, grad_out, "cpu")
            stock = run_mlp_unfused(case, operands, grad_out)
            with torch.no_grad():
                packed = call_mlp(case, operands, "cpu")
        assert_same_bits(packed, ours.out)
        assert {ours.out.dtype} | {g.dtype for g in ours.grads.values()} == {torch.float32}
        measured.append((ours, stock, run_mlp_exact(case, operands, grad_out)))
    assert_within_error_rule(*zip(*measured))


def test_packed_weights_go_with_their_weight():
    from swin_kernels.backends import packed_weights

    case = MlpCase(1, (7, 7), 32)
    operands = make_mlp_operands(case)
    packed_weights.forget()
    with torch.inference_mode():
        call_mlp(case, operands, "cpu")
    assert len(packed_weights._packed) == 2
    torch.utils.swap_tensors(operands.fc1_weight, torch.randn(128, 32))  # nothing refers to it
    del operands
    packed_weights.forget_gone()
    assert len(packed_weights._packed) == 0


_X = torch.randn(2, 4, 4, 8)
_FC1, _FC2 = nn.Linear(8, 16), nn.Linear(16, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(2, 8)}, r"x: expected \(B, \*S, C\)"),
        ({"x": "x"}, "x: expected a tensor, got str"),
        ({"x": _X.int()}, "x: expected a floating dtype"),
        ({"x": _X.to_sparse()}, "x: expected a dense tensor"),
        ({"x": _X.double()}, "fc1_weight is torch.float32, x torch.float64"),
        ({"x": _X.to("meta")}, "is on cpu, x on meta"),
        ({"fc1_weight": _FC2.weight}, r"fc1_weight: expected \(K, 8\)"),
        ({"fc2_weight": _FC1.weight}, r"fc2_weight: expected shape \(8, 16\), got \(16, 8\)"),
        ({"fc1_bias": _FC2.bias}, r"fc1_bias: expected shape \(16,\), got \(8,\)"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight: expected shape \(8,\)"),
        ({"norm_bias": torch.ones(8)}, "norm_bias came without a norm_weight"),
        ({"layer_scale": torch.ones(1)}, r"layer_scale: expected shape \(8,\)"),
        ({"residual_scale": torch.ones(3)}, r"residual_scale: expected shape \(2,\)"),
        ({"residual_scale": torch.ones(2, requires_grad=True)}, "residual_scale requires grad"),
        ({"activation": "tanh"}, "activation: expected one of gelu, gelu_tanh, relu, silu"),
        ({"norm": "both"}, "norm: expected 'pre' or 'post'"),
        ({"norm_eps": -1.0}, "norm_eps: expected a finite number of at least 0"),
        ({"norm_eps": "small"}, "norm_eps: expected a number"),
        ({"backend": "gpu"}, "backend: expected one of cpu, triton, cuda, reference"),
    ],
)
def test_bad_input_raises_before_anything_is_computed(changes, message):
    weights = {
        "fc1_weight": _FC1.weight,
        "fc1_bias": _FC1.bias,
        "fc2_weight": _FC2.weight,
        "fc2_bias": _FC2.bias,
    }
    arguments = {"x": _X} | weights | changes
    with pytest.raises(ValueError, match=message):
        swin_kernels.mlp_sublayer(**arguments)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_that_lacks_it_says_so(name):
    with pytest.raises(NotImplementedError, match=f"{name}: has no mlp_sublayer yet"):
        call_mlp(PLAIN, make_mlp_operands(PLAIN), name)


@pytest.mark.parametrize(
    "capability, multiplies, fused",
    [
        ("avx512", {"avx512_bf16"}, {torch.float32, torch.float64, torch.bfloat16}),
        ("avx512", {"avx512_bf16", "amx_bf16"}, {torch.float32, torch.float64}),
        ("avx512", set(), {torch.float32, torch.float64}),
        ("avx2", set(), {torch.float32, torch.float64}),
        ("default", set(), set()),
    ],
)
def test_fused_kernels_are_chosen_only_where_they_are_faster(capability, multiplies, fused):
    chosen = {d for d in DTYPE_NAMES if why_slower(capability, d, frozenset(multiplies)) is None}
    assert chosen == fused


def test_backends_bear_the_names_of_those_of_attention():
    from swin_kernels.ops.dispatch import BACKENDS

    assert list(MLP_BACKENDS) == list(BACKENDS)


def test_explain_tells_which_backend_runs_a_call():
    problem = MlpProblem.checked(make_mlp_operands(PLAIN))
    told = swin_kernels.explain(problem)
    assert "mlp_sublayer B=2 map=7×7 C=32 K=128 gelu norm=pre float32 cpu: cpu would run it" in told
    assert "triton: has no mlp_sublayer yet" in told
    half = MlpProblem.checked(make_mlp_operands(PLAIN.but(dtype=torch.float16)))
    told = swin_kernels.explain(half)
    assert "reference would run it" in told
    assert "cpu: could, when asked for as backend='cpu': " in told
    assert "torch's own products are faster" in told
