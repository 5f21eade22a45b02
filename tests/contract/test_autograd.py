"""Gradients of every kind: first, second, forward-mode, functorch, checkpointed, under autocast."""

from __future__ import annotations

import functools
import math
from unittest.mock import Mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from contract_cases import SHIFTED, assert_same_bits, checked, needing, over, saved_by_a_call
from torch.utils.checkpoint import checkpoint

import swin_kernels
from swin_kernels import ShiftedWindowAttentionFunction
from swin_kernels.backends import native
from swin_kernels.backends.base import Ops
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import NEEDS, Operands
from swin_kernels.testing import (
    DIFFERENTIABLE,
    LEAST_INPUTS,
    Case,
    assert_within_error_rule,
    call,
    differentiate,
    make_grad_out,
    make_operands,
    run,
    run_exact,
    run_unfused,
    with_grad,
)

SMALL = Case(1, (5, 4), (3, 2), (1, 1), 2, 4, dtype=torch.float64, bias="table", pads=True)
SINGLE = SMALL.but(dtype=torch.float32)
NAMES = ("query", "key", "value", "bias_table", "pad_key", "pad_value")  # its gradients


def _leaves(case, seed=0):
    operands = with_grad(make_operands(case, seed=seed))
    names = [name for name in DIFFERENTIABLE if getattr(operands, name) is not None]

    def function(*leaves, backend=None):
        torch.manual_seed(seed)
        return call(case, operands._replace(**dict(zip(names, leaves))), backend)

    return function, [getattr(operands, name) for name in names]


_larger = functools.partial(pytest.param, marks=pytest.mark.slow_emulator)  # 15 s each there


@pytest.mark.parametrize(
    "case",
    [
        _larger(SMALL),
        _larger(SMALL.but(packed=True, pad_order="roll-pad")),
        _larger(SMALL.but(value_dim=3, bias="dense", mask="soft")),
        SMALL.but(bias="table+index", cosine=True, packed=True),
        _larger(
            SMALL.but(mask="holes", mask_value=-math.inf, pads=False, layout="channels-inside")
        ),
        SMALL.but(size=(5,), window=(4,), shift=(1,), bias="none", cosine=True),
        SMALL.but(size=(2, 3, 3), window=(2, 2, 2), shift=(0, 1, 1), heads=1, periodic=(True,) * 3),
        _larger(SMALL.but(dropout_p=0.3)),
    ],
    ids=str,
)
def test_gradcheck_passes(case, backend):
    function, leaves = _leaves(case)
    assert torch.autograd.gradcheck(lambda *x: function(*x, backend=backend), leaves)


@over(SMALL.but(pads=False), SMALL.but(cosine=True))
def test_gradgradcheck_passes_for_the_reference(case):
    function, leaves = _leaves(case)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, backend="reference"), leaves)


def test_forward_mode_gives_the_derivative_and_not_zeros():
    function, leaves = _leaves(SMALL)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)
    primals = tuple(x.detach() for x in leaves)
    tangents = tuple(torch.randn_like(x) for x in primals)
    _, tangent = torch.func.jvp(function, primals, tangents)
    assert tangent.abs().max() > 0.1
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, primals, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_functorch_grad_and_jacobian_match_autograd():
    function, leaves = _leaves(SMALL)
    plain = [x.detach() for x in leaves]
    expected = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves)
    positions = tuple(range(len(plain)))
    actual = torch.func.grad(lambda *x: function(*x).pow(2).sum(), positions)(*plain)
    torch.testing.assert_close(actual, expected)
    jacobian = torch.func.jacrev(lambda x: function(x, *plain[1:]))(plain[0])
    by_autograd = torch.autograd.functional.jacobian(lambda x: function(x, *plain[1:]), plain[0])
    torch.testing.assert_close(jacobian, by_autograd)


def test_vmap_equals_a_loop():
    case = SMALL.but(batch=2)
    many = [make_operands(case, seed=seed) for seed in range(3)]
    names = [name for name, x in zip(Operands._fields, many[0]) if x is not None]

    def function(*tensors):
        return call(case, Operands(**dict(zip(names, tensors))))

    stacked = [torch.stack([getattr(o, name) for o in many]) for name in names]
    expected = torch.stack([call(case, o) for o in many])
    torch.testing.assert_close(torch.func.vmap(function)(*stacked), expected)


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_transform_of_a_backend_by_name_raises_and_names_the_reference(transform, fused):
    function, leaves = _leaves(SINGLE)
    x, *rest = [x.detach() for x in leaves]

    def by_name(x):
        return function(x, *rest, backend=fused).sum()

    calls = {
        "jvp": lambda: torch.func.jvp(by_name, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(by_name)(x[None]),
        "grad": lambda: torch.func.grad(by_name)(x),
    }
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        calls[transform]()


def test_second_derivative_of_a_kernel_raises_and_names_the_reference(fused):
    function, leaves = _leaves(SINGLE)
    first = torch.autograd.grad(
        function(*leaves, backend=fused).pow(2).sum(), leaves[0], create_graph=True
    )[0]
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        first.sum().backward()


def test_second_derivative_along_another_path_raises_too(fused):
    function, (query, *rest) = _leaves(SINGLE)
    weight = torch.ones((), requires_grad=True)
    out = function(query * weight, *rest, backend=fused)
    inner = torch.autograd.grad(out.pow(2).sum(), rest[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad((inner**2).sum() + weight**2, weight)


def test_raw_ops_are_private():
    assert set(swin_kernels.__all__) <= set(dir(swin_kernels))
    for name in swin_kernels.__all__:
        assert not isinstance(getattr(swin_kernels, name), torch._ops.OpOverload)


def test_needed_gradient_goes_through_the_function_and_not_the_raw_op(fused):
    operands = make_operands(SHIFTED)
    for name in NAMES:
        node = call(SHIFTED, needing(operands, name), fused).grad_fn
        assert type(node).__name__ == "ShiftedWindowAttentionFunctionBackward"


def test_without_grad_there_is_no_graph(backend):
    operands = with_grad(make_operands(SHIFTED))
    with torch.no_grad():
        assert not call(SHIFTED, operands, backend).requires_grad
    with torch.inference_mode():
        assert not call(SHIFTED, operands, backend).requires_grad
    assert not call(SHIFTED, make_operands(SHIFTED), backend).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone_equals_it_among_all(name, backend):
    operands, grad_out = make_operands(SHIFTED), make_grad_out(SHIFTED)
    expected = run(SHIFTED, operands, grad_out, backend).grads[name]
    alone = needing(operands, name)
    out = call(SHIFTED, alone, backend)
    actual = torch.autograd.grad(out, getattr(alone, name), grad_out)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_gradients_that_nobody_needs_are_not_computed(cpu_kernels, monkeypatch):
    ops = native.CpuBackend.ops
    backward = Mock(wraps=ops.backward)
    monkeypatch.setattr(BACKENDS["cpu"], "ops", Ops(ops.forward, backward))
    operands = make_operands(SHIFTED)
    for name in ("query", "bias_table", "pad_value"):
        call(SHIFTED, needing(operands, name), "cpu").sum().backward()
    asked = [call.args[-1] for call in backward.call_args_list]
    assert asked == [0, NEEDS["bias_table"], NEEDS["pad_value"]]


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_absent_gradient_of_the_output_passes_none_on(backend):
    operands = with_grad(make_operands(SHIFTED))
    out = _NoGradient.apply(call(SHIFTED, operands, backend))
    (out.sum() + operands.query.sum()).backward()
    assert torch.equal(operands.query.grad, torch.ones_like(operands.query))
    assert operands.key.grad is None or not operands.key.grad.any()


def test_mask_that_requires_grad_raises(backend_name):
    case = SHIFTED.but(mask="soft")
    operands = needing(make_operands(case), "mask")
    with pytest.raises(ValueError, match="mask requires grad"):
        call(case, operands, backend_name)
    with torch.no_grad():
        call(case, operands, backend_name)


def test_backwards_through_one_graph_agree(backend):
    operands, grad_out = with_grad(make_operands(SHIFTED)), make_grad_out(SHIFTED)
    out = call(SHIFTED, operands, backend)
    leaves = [x for x in operands if x is not None and x.requires_grad]
    expected = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    for create_graph in (True, False):
        again = torch.autograd.grad(out, leaves, grad_out, create_graph=create_graph)
        assert_same_bits(again, expected)


def test_function_can_be_applied_directly(backend):
    (_, options), grad_out = checked(SHIFTED), make_grad_out(SHIFTED)

    def applied(leaves):
        return ShiftedWindowAttentionFunction.apply(*leaves, *options, backend)

    results = []
    for seed in range(LEAST_INPUTS):
        operands = make_operands(SHIFTED, seed=seed)
        others = (f(SHIFTED, operands, grad_out) for f in (run_unfused, run_exact))
        results.append((differentiate(applied, operands, grad_out), *others))
    assert_within_error_rule(*zip(*results))


def test_what_is_saved_beside_the_operands_does_not_grow_with_the_map(fused):
    _, few = saved_by_a_call(SHIFTED, fused)
    _, many = saved_by_a_call(SHIFTED.but(batch=5), fused)
    assert [x.shape for x in few] == [x.shape for x in many]
    if fused == "cpu":
        assert not few


def test_operand_changed_before_backward_raises(fused):
    operands = with_grad(make_operands(SHIFTED))
    key = operands.key * 1
    out = call(SHIFTED, operands._replace(key=key), fused)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_tensor_as_query_key_and_value_sums_their_gradients(backend):
    x = torch.randn(2, 8, 8, 2, 16)
    case = Case(2, (8, 8), (4, 4), (2, 2))
    apart = run(case, Operands(x, x.clone(), x.clone()), torch.ones_like(x), backend)
    leaf = x.clone().requires_grad_()
    call(case, Operands(leaf, leaf, leaf), backend).sum().backward()
    torch.testing.assert_close(leaf.grad, sum(apart.grads.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointing_changes_no_bit(use_reentrant, dropout_p, backend):
    case = SHIFTED.but(dropout_p=dropout_p, packed=True)
    operands, grad_out = make_operands(case), make_grad_out(case)
    expected = run(case, operands, grad_out, backend, seed=3)
    leaves = with_grad(operands)
    names = list(expected.grads)

    def segment(*tensors):
        return call(case, leaves._replace(**dict(zip(names, tensors))), backend)

    torch.manual_seed(3)
    out = checkpoint(segment, *(getattr(leaves, n) for n in names), use_reentrant=use_reentrant)
    out.backward(grad_out)
    grads = {name: getattr(leaves, name).grad for name in names}
    assert_same_bits((out, grads), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_autocast_casts_the_tokens_and_returns_fp32_gradients(dtype, packed, backend):
    case = SHIFTED.but(packed=packed, cosine=True)
    operands = make_operands(case)
    grad_out = make_grad_out(case).to(dtype)

    def under_autocast(leaves):
        with torch.autocast(grad_out.device.type, dtype):
            return call(case, leaves, backend)

    actual = differentiate(under_autocast, operands, grad_out)
    tokens = {n: x.to(dtype) for n, x in zip(Operands._fields, operands[:3]) if x is not None}
    expected = run(case, operands._replace(**tokens), grad_out, backend)
    assert actual.out.dtype == dtype
    grads = {name: grad.float() for name, grad in expected.grads.items()}
    assert_same_bits(actual, (expected.out, grads))


@pytest.mark.float64
def test_autocast_leaves_float64_alone(backend):
    case = SHIFTED.but(dtype=torch.float64)
    operands = make_operands(case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(case, operands, backend)
    assert torch.equal(actual, call(case, operands, backend))


def test_packed_gradient_is_written_packed(fused):
    case = SHIFTED.but(packed=True)
    (operands, options), grad_out = checked(case), make_grad_out(case)
    needed = tuple(name == "query" for name in Operands._fields)
    grads = BACKENDS[fused].backward(grad_out, operands, options, (), needed)
    assert grads[0].shape == operands.query.shape
    assert grads[0].is_contiguous()
    assert not any(grad is not None and grad.numel() for grad in grads[1:])


def test_function_refuses_a_mask_that_requires_grad(fused):
    case = SHIFTED.but(mask="soft")
    operands, options = checked(case)
    out = ShiftedWindowAttentionFunction.apply(*needing(operands, "mask"), *options, fused)
    with pytest.raises(ValueError, match="mask requires grad"):
        out.sum().backward()
