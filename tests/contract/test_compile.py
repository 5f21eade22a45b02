"""The op under opcheck and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from contract_cases import SHIFTED, assert_same_bits, checked, over
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import NEEDS, Operands
from swin_kernels.testing import (
    Case,
    call,
    differentiate,
    make_grad_out,
    make_operands,
    run,
    with_grad,
)

CASES = (
    SHIFTED,
    SHIFTED.but(packed=True, bias="none", pads=False),
    SHIFTED.but(packed=True, pad_order="roll-pad", layout="channels-inside", dtype=torch.float64),
    SHIFTED.but(bias="dense", mask="soft", value_dim=24),
    SHIFTED.but(bias="table+index", cosine=True, dtype=torch.bfloat16, extras_dtype=torch.float32),
    Case(1, (7,), (4,), (1,), bias="dense", layout="contiguous"),
    Case(1, (3, 4, 5), (2, 2, 2), (1, 0, 1), cosine=True, packed=True, dropout_p=0.2),
    # of more than 64 tokens: here Triton's backward works in tiles, from other things kept
    Case(1, (90,), (81,), (40,), bias="table", pads=True, dtype=torch.float16),
)
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "fused")


def _compiled(case, backend, compiler="aot_eager"):
    """The call as a function of its operands, compiled."""
    return torch.compile(lambda x: call(case, x, backend), fullgraph=True, backend=compiler)


def _forward_op(fused, case):
    """The forward op of a backend and its arguments."""
    operands, options = checked(case)
    last = fused == "triton"  # whether it keeps what a backward wants; else whether TF32 is allowed
    return BACKENDS[fused].ops.forward, (*operands, *options, last)


def _backward_op(fused, case, all_needed):
    """The backward op of a backend and its arguments."""
    operands, options = checked(case)
    needs = sum(bit for n, bit in NEEDS.items() if getattr(operands, n) is not None and all_needed)
    backend, grad_out = BACKENDS[fused], make_grad_out(case)
    if fused != "triton":
        return backend.ops.backward, (grad_out, *operands, *options, False, needs)
    _, saved = backend.forward(operands, options, True)
    kept = (None, None, *saved)[-2:]
    return backend.ops.backward, (grad_out, *kept, *operands, *options, needs)


@over(*CASES)
def test_opcheck_passes_for_the_forward_op(case, fused):
    torch.library.opcheck(*_forward_op(fused, case))


@over(*CASES)
@pytest.mark.parametrize("all_needed", [True, False], ids=["all", "tokens"])
def test_opcheck_passes_for_the_backward_op(case, all_needed, fused):
    torch.library.opcheck(*_backward_op(fused, case, all_needed))


@over(*CASES)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step_equals_eager(case, compiler, fused):
    case = case.but(dropout_p=0.0)  # under inductor the seeds are drawn by another generator
    operands, grad_out = make_operands(case), make_grad_out(case)
    expected = run(case, operands, grad_out, fused)
    actual = differentiate(_compiled(case, fused, compiler), operands, grad_out)
    assert_same_bits(actual, expected)


def test_compiled_reference_equals_eager():
    operands, grad_out = make_operands(SHIFTED), make_grad_out(SHIFTED)
    expected = run(SHIFTED, operands, grad_out, "reference")
    actual = differentiate(_compiled(SHIFTED, "reference"), operands, grad_out)
    torch.testing.assert_close(actual.out, expected.out)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-4, atol=1e-5)


def test_compiled_inference_equals_eager(fused):
    operands = make_operands(SHIFTED)
    with torch.no_grad():
        out = _compiled(SHIFTED, fused)(operands)
        assert torch.equal(out, call(SHIFTED, operands, fused))


def test_compiled_dropout_is_reproducible(fused):
    case = SHIFTED.but(dropout_p=0.4)
    operands, compiled = make_operands(case), _compiled(case, fused)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(compiled(operands))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_autocast_inside_a_compiled_region_equals_eager(fused, mode):
    operands = with_grad(make_operands(SHIFTED))
    device = operands.query.device.type
    dtype = torch.bfloat16 if torch.bfloat16 in mode.dtypes else torch.float16

    def step(operands):
        with torch.autocast(device, dtype):
            return call(SHIFTED, operands, fused)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(operands)
    assert out.dtype == dtype
    assert torch.equal(out, step(operands))
    out.sum().backward()
    assert operands.query.grad.dtype == torch.float32


@pytest.mark.slow_emulator
def test_other_sizes_of_a_dynamic_graph_compile_nothing_more(fused):
    def step(qkv, table):
        out = shifted_window_attention_qkvpacked(qkv, 4, 2, bias_table=table, backend=fused)
        return out, out.square().sum()

    def results(function, *leaves):
        out, loss = function(*leaves)
        return out, torch.autograd.grad(loss, leaves)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    table, first = torch.randn(49, 2, requires_grad=True), None
    for batch, height, width in ((5, 10, 12), (3, 16, 8), (4, 9, 13), (2, 11, 30), (7, 24, 17)):
        qkv = torch.randn(batch, height, width, 3, 2, 16, requires_grad=True)
        assert_same_bits(results(compiled, qkv, table), results(step, qkv, table))
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_changing_sizes_without_asking_compile_at_most_four_times(fused):
    def step(q, k, v):
        return shifted_window_attention(q, k, v, 4, 1, backend=fused)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for batch, length in ((1, 8), (2, 12), (3, 15), (4, 33), (5, 9), (6, 41)):
        q, k, v = torch.randn(3, batch, length, 2, 8).unbind()
        assert torch.equal(compiled(q, k, v), step(q, k, v))
    assert counter.frame_count <= 4


@over(*CASES)
def test_fakes_have_the_shapes_strides_and_dtypes_of_the_kernels(case, fused):
    op, arguments = _forward_op(fused, case)
    reals = op(*arguments)
    with FakeTensorMode() as fake_mode:
        fakes = [fake_mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments]
        fakes = op(*fakes)
    if torch.is_tensor(reals):
        reals, fakes = [reals], [fakes]
    for real, fake in zip(reals, fakes):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_operands_are_the_leading_arguments_of_both_schemas(fused):
    forward = [a.name for a in _forward_op(fused, SHIFTED)[0]._schema.arguments]
    backward = [a.name for a in _backward_op(fused, SHIFTED, True)[0]._schema.arguments]
    names = list(Operands._fields)
    saved = ["out", "kept"] if fused == "triton" else []
    assert forward[: len(names)] == names
    assert backward[: 1 + len(saved) + len(names)] == ["grad_out", *saved, *names]


@pytest.mark.float64
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_forward_mode_under_compile_is_not_zero(compiler):
    """The silent error: a raw op has no tangent, and a compiled call would answer zeros."""
    x = torch.randn(1, 4, 3, 1, 8, dtype=torch.float64)
    v = torch.randn_like(x)

    def attend(y):
        return shifted_window_attention_qkvpacked(y, 2, 1)

    def tangent(x, v):
        return torch.func.jvp(attend, (x,), (v,))[1]

    expected = tangent(x, v)
    assert expected.abs().max() > 0
    compiled = torch.compile(tangent, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(x, v), expected)
    compiled = torch.compile(attend, backend=compiler)  # newer torch breaks the graph at a dual
    compiled(x)  # traced outside of forward-mode AD first
    with forward_ad.dual_level():
        dual = compiled(forward_ad.make_dual(x, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
