"""A graph that holds the op, exported, run with gradients or traced again: as an eager call."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from contract_cases import SHIFTED, assert_same_bits, over
from tiers import thorough
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from swin_kernels.ops import autograd
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    call,
    differentiate,
    make_grad_out,
    make_operands,
    with_grad,
)

CASES = (
    SHIFTED,
    SHIFTED.but(packed=True, bias="dense", mask="soft", cosine=True, pads=False),
    # of more than 64 tokens: here Triton's backward works in tiles, from other things kept
    Case(1, (90,), (81,), (40,), bias="table", pads=True, dtype=torch.float16),
)
pytestmark = pytest.mark.usefixtures("fresh_dynamo", "fused")


class _Call(torch.nn.Module):
    """A call whose differentiable operands are its parameters, all but the query."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.case, self.backend = case, backend
        self.operands = make_operands(case)
        for name in DIFFERENTIABLE[1:]:
            if (x := getattr(self.operands, name)) is not None:
                self.register_parameter(name, torch.nn.Parameter(x.clone()))

    def forward(self, query):
        operands = self.operands._replace(query=query, **dict(self.named_parameters()))
        return call(self.case, operands, self.backend)


def _step(module, query, grad_out):
    """The output and the gradients of the query and of every parameter."""
    for parameter in module.parameters():
        parameter.grad = None
    query = query.detach().clone().requires_grad_()
    out = module(query)
    out.backward(grad_out)
    grads = {n.removeprefix("_orig_mod."): p.grad for n, p in module.named_parameters()}
    return out.detach(), grads | {"query": query.grad}


@over(*CASES)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no_grad"])
def test_exported_program_has_the_gradients_of_an_eager_call(case, strict, with_grad, fused):
    module, grad_out = _Call(case, fused), make_grad_out(case)
    query = module.operands.query
    expected = _step(module, query, grad_out)
    with torch.set_grad_enabled(with_grad):
        exported = torch.export.export(module, (query.clone(),), strict=strict).module()
    assert_same_bits(_step(exported, query, grad_out), expected)
    compiled = torch.compile(exported, fullgraph=True, backend="aot_eager")
    assert_same_bits(_step(compiled, query, grad_out), expected)


def _exported_for_any_batch(fused):
    """A module, and a program of it that takes any number of images."""
    module = _Call(SHIFTED.but(packed=True, layout="contiguous"), fused)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        example = (module.operands.query,)
        return module, torch.export.export(module, example, dynamic_shapes=({0: batch},))


def test_exported_inference_equals_eager(fused):
    module, program = _exported_for_any_batch(fused)
    targets = [str(node.target) for node in program.graph.nodes]
    assert str(BACKENDS[fused].ops.forward) in targets
    with torch.no_grad():
        for query in (module.operands.query, torch.randn(5, *SHIFTED.size, 3, 2, 16)):
            assert torch.equal(program.module()(query), module(query))


@pytest.mark.slow_emulator
@thorough("test_examples_cpp.py::test_a_patched_swin_runs_from_cpp_without_python")
def test_ahead_of_time_compiled_package_equals_eager(tmp_path, fused):
    module, program = _exported_for_any_batch(fused)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    package = torch._inductor.aoti_load_package(path)
    query = torch.randn(3, *SHIFTED.size, 3, 2, 16)
    with torch.no_grad():
        torch.testing.assert_close(package(query), module(query))


@over(*CASES)
@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["", "pre_dispatch"])
def test_replayed_graph_has_the_gradients_of_an_eager_call(case, pre_dispatch, fused):
    operands, grad_out = with_grad(make_operands(case)), make_grad_out(case)

    def forward(leaves):
        return call(case, leaves, fused)

    graph = make_fx(forward, pre_dispatch=pre_dispatch)(operands)
    expected = differentiate(forward, operands, grad_out)
    assert_same_bits(differentiate(graph, operands, grad_out), expected)


def test_graph_of_a_whole_step_gives_its_gradients_and_refuses_theirs(fused):
    operands = with_grad(make_operands(SHIFTED))
    query = operands.query.detach()

    def step(query):
        query = query.detach().requires_grad_()
        out = call(SHIFTED, operands._replace(query=query), fused)
        return torch.autograd.grad(out.square().sum(), query)[0]

    graph = make_fx(step)(query)
    again = torch.randn_like(query)
    assert torch.equal(graph(again), step(again))

    exported = torch.export.export(_Call(SHIFTED, fused), (query,)).module()
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(exported(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match='use backend="reference"'):
        grad.sum().backward()


def test_compiled_autograd_has_the_gradients_of_an_eager_call(fused):
    module, grad_out = _Call(SHIFTED, fused), make_grad_out(SHIFTED)
    expected = _step(module, module.operands.query, grad_out)
    with compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend="eager", fullgraph=True)
    ):
        assert_same_bits(_step(module, module.operands.query, grad_out), expected)


def test_transforms_of_a_graph_run_on_the_reference(fused):
    module = _Call(SHIFTED, fused).requires_grad_(False)
    query = module.operands.query
    exported = torch.export.export(module, (query,)).module()
    tangent = torch.randn_like(query)

    def unfused(query):
        return call(SHIFTED, module.operands._replace(query=query), "reference")

    def loss(function):
        return lambda query: function(query).square().sum()

    expected = torch.func.jvp(unfused, (query,), (tangent,))
    actual = torch.func.jvp(exported, (query,), (tangent,))
    torch.testing.assert_close(actual, expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(exported(forward_ad.make_dual(query, tangent)))
    torch.testing.assert_close(dual.tangent, expected[1])
    torch.testing.assert_close(
        torch.func.grad(loss(exported))(query), torch.func.grad(loss(unfused))(query)
    )


def test_eager_calls_pass_the_autograd_kernels_by(fused):
    """They would cost some µs a call."""
    operands = make_operands(SHIFTED)
    entered = set()

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == autograd.__file__:
            entered.add(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        call(SHIFTED, operands, fused)
        out = call(SHIFTED, with_grad(operands), fused)
        with torch.no_grad():
            call(SHIFTED, operands, fused)
        out.sum().backward()
    finally:
        sys.setprofile(None)
    assert "forward" in entered  # of the Function, whose backward runs in another thread on a GPU
    assert "kernel" not in entered
