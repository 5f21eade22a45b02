"""Gradients of both sublayers of every kind, and their ops in graphs, as those of attention."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from contract_cases import assert_same_bits
from sublayers import SUBLAYERS
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from swin_kernels.testing.attention_sublayer import SublayerCase
from swin_kernels.testing.mlp import MlpCase

SMALL = {
    "mlp": MlpCase(2, (2, 3), 8, 11, dtype=torch.float64, layer_scale=True, drop=True),
    "attention": SublayerCase(
        2, (3, 4), (2, 2), (1, 1), 2, 8, torch.float64, layer_scale=True, drop=True
    ),
}
CASES = [
    ("mlp", MlpCase(2, (3, 4), 24, layer_scale=True, drop=True)),
    ("mlp", MlpCase(2, (3, 4), 24, norm="post", activation="silu", layout="cropped")),
    ("mlp", MlpCase(2, (5,), 17, 40, norm="none", biases=False, dtype=torch.bfloat16)),
    ("attention", SublayerCase(2, (5, 6), (3, 3), (1, 1), 2, 24, layer_scale=True, drop=True)),
    (
        "attention",
        SublayerCase(2, (5, 6), (3, 3), heads=2, channels=20, norm="post", cosine=True),
    ),
    (
        "attention",
        SublayerCase(
            1, (7,), (4,), (1,), 1, 17, torch.bfloat16, "none", bias="dense", biases=False
        ),
    ),
]
FIRST = [CASES[0], CASES[3]]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def over(cases):
    return pytest.mark.parametrize(
        "sublayer, case",
        [pytest.param(SUBLAYERS[name], case, id=f"{name}-{case}") for name, case in cases],
    )


over_both = over(list(SMALL.items()))


@over(
    [
        ("mlp", SMALL["mlp"].but(activation=a, norm=n))
        for a in ("gelu", "gelu_tanh", "silu")
        for n in ("pre", "post")
    ]
    + [
        ("attention", SMALL["attention"].but(cosine=c, norm=n))
        for c in (False, True)
        for n in ("pre", "post")
    ]
)
@pytest.mark.parametrize("sublayer_backend", ["cpu", "reference"])
def test_gradcheck_passes(sublayer, case, sublayer_backend):
    function, leaves = sublayer.leaves(case)
    assert torch.autograd.gradcheck(functools.partial(function, backend=sublayer_backend), leaves)


@over_both
def test_gradgradcheck_passes_for_the_reference(sublayer, case):
    function, leaves = sublayer.leaves(case)
    torch.autograd.gradgradcheck(functools.partial(function, backend="reference"), leaves)


@over(
    [
        ("mlp", SMALL["mlp"].but(activation=a, norm=n))
        for a in ("gelu", "gelu_tanh", "relu", "silu")
        for n in ("pre", "post", "none")
    ]
    + [
        ("attention", SMALL["attention"].but(cosine=c, norm=n))
        for c in (False, True)
        for n in ("pre", "post", "none")
    ]
)
def test_written_out_backward_equals_autograd(sublayer, case):
    operands, options = sublayer.arguments(case)
    grads = sublayer.written_out(sublayer.make_grad_out(case), operands, options)
    expected = sublayer.run_exact(case, operands, sublayer.make_grad_out(case)).grads
    for name, grad in zip(operands._fields, grads):
        if name in expected:
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)
        else:
            assert grad is None


@over_both
def test_forward_mode_gives_the_derivative_and_not_zeros(sublayer, case):
    function, leaves = sublayer.leaves(case)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(leaves, tangents)]
        found = forward_ad.unpack_dual(function(*duals)).tangent
    grads = torch.autograd.grad(function(*leaves).sum(), leaves)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents))
    torch.testing.assert_close(found.sum(), expected)


@over_both
def test_functorch_grad_and_vmap_match_autograd_and_a_loop(sublayer, case):
    function, leaves = sublayer.leaves(case.but(drop=False))
    plain = [leaf.detach() for leaf in leaves]
    grad = torch.func.grad(lambda x: function(x, *plain[1:]).sum())(plain[0])
    (expected,) = torch.autograd.grad(function(*leaves).sum(), leaves[0])
    torch.testing.assert_close(grad, expected)
    several = torch.stack([plain[0], 2 * plain[0]])
    mapped = torch.func.vmap(lambda x: function(x, *plain[1:]))(several)
    torch.testing.assert_close(mapped, torch.stack([function(x, *plain[1:]) for x in several]))


@over_both
def test_transform_of_a_backend_by_name_raises_and_names_the_reference(sublayer, case):
    function, leaves = sublayer.leaves(case)
    plain = [leaf.detach() for leaf in leaves]
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.func.vmap(lambda x: function(x, *plain[1:], backend="cpu"))(plain[0][None])


@over_both
def test_second_derivative_of_a_kernel_raises_along_every_path(sublayer, case):
    function, leaves = sublayer.leaves(case)
    x = leaves[0]
    (grad,) = torch.autograd.grad(function(*leaves).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad(grad.sum(), x)
    (grad,) = torch.autograd.grad((function(*leaves) * x * x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad(grad.sum(), x)


@over(FIRST)
def test_residual_scale_that_requires_grad_raises(sublayer, case):
    operands, options = sublayer.arguments(case)
    scale = operands.residual_scale.requires_grad_()
    with pytest.raises(ValueError, match="residual_scale requires grad"):
        sublayer.call(case, operands._replace(residual_scale=scale))
    operands = operands._replace(residual_scale=scale, x=operands.x.requires_grad_())
    out = sublayer.operation.function.apply(*operands, *options, "cpu")
    with pytest.raises(ValueError, match="residual_scale requires grad"):
        out.sum().backward()


@over(FIRST)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(sublayer, case, use_reentrant):
    operands, grad_out = sublayer.make(case), sublayer.make_grad_out(case)
    expected = sublayer.run(case, operands, grad_out, "cpu")
    leaves = sublayer.with_grad(operands)
    out = checkpoint(
        lambda *x: sublayer.call(case, type(operands)(*x), "cpu"),
        *leaves,
        use_reentrant=use_reentrant,
    )
    out.backward(grad_out)
    assert_same_bits(out.detach(), expected.out)
    for name, grad in expected.grads.items():
        assert_same_bits(getattr(leaves, name).grad, grad)


@over(FIRST)
def test_without_grad_there_is_no_graph_and_x_alone_is_saved(sublayer, case):
    function, leaves = sublayer.leaves(case)
    with torch.no_grad():
        assert function(*leaves).grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        function(*leaves)
    sizes = sorted(t.numel() for t in saved if t is not None)
    rows = case.batch * 12 * case.channels
    weights = sum(t.numel() >= rows for t in leaves[1:])
    assert sum(n >= rows for n in sizes) <= weights + 1  # x, and nothing between it and the result


@over(CASES)
def test_opcheck_passes_for_both_ops(sublayer, case):
    ops = sublayer.ops
    operands, options = sublayer.arguments(case)
    torch.library.opcheck(ops.forward, (*operands, *options))
    for needed in ((1 << len(sublayer.differentiable)) - 1, 1):
        torch.library.opcheck(
            ops.backward, (sublayer.make_grad_out(case), *operands, *options, needed)
        )


@over(CASES)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step_equals_eager(sublayer, case, compiler):
    operands, grad_out = sublayer.make(case), sublayer.make_grad_out(case)
    compiled = torch.compile(
        lambda leaves: sublayer.call(case, leaves, "cpu"), fullgraph=True, backend=compiler
    )
    found = sublayer.differentiate(compiled, operands, grad_out)
    expected = sublayer.run(case, operands, grad_out, "cpu")
    assert_same_bits(found.out, expected.out)
    for name, grad in found.grads.items():
        assert_same_bits(grad, expected.grads[name])


@over(FIRST)
def test_compiled_inference_under_autocast_equals_eager(sublayer, case):
    operands = sublayer.make(case)
    compiled = torch.compile(
        lambda x: sublayer.call(case, x, "cpu"), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(compiled(operands), sublayer.call(case, operands, "cpu"))


class _Layer(torch.nn.Module):
    def __init__(self, sublayer, case):
        super().__init__()
        self.call = functools.partial(sublayer.call, case)
        self.operands = sublayer.make(case)
        for name in sublayer.differentiable[1:]:
            if (t := getattr(self.operands, name)) is not None:
                self.register_parameter(name, torch.nn.Parameter(t.clone()))

    def forward(self, x):
        operands = self.operands._replace(x=x, **dict(self.named_parameters()))
        return self.call(operands, "cpu")


@over(FIRST)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_program_has_the_gradients_of_an_eager_call(sublayer, case, strict):
    layer, grad_out = _Layer(sublayer, case), sublayer.make_grad_out(case)
    x = layer.operands.x
    exported = torch.export.export(layer, (x,), strict=strict).module()
    for module in (layer, exported):
        module(x).backward(grad_out)
    for (_, a), (_, b) in zip(layer.named_parameters(), exported.named_parameters()):
        assert_same_bits(a.grad, b.grad)


@over(FIRST)
def test_ahead_of_time_compiled_package_equals_eager(sublayer, case, tmp_path):
    layer = _Layer(sublayer, case)
    x = layer.operands.x
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        assert_same_bits(torch._inductor.aoti_load_package(package)(x), layer(x))


@over(FIRST)
def test_replayed_graph_has_the_gradients_of_an_eager_call(sublayer, case):
    function, leaves = sublayer.leaves(case)
    graph = make_fx(function)(*(leaf.detach() for leaf in leaves))
    found, expected = (
        torch.autograd.grad(f(*leaves), leaves, sublayer.make_grad_out(case))
        for f in (graph, function)
    )
    for a, b in zip(found, expected):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    "name, case, products",
    [
        ("mlp", MlpCase(2, (3, 4), 24), 2 * 2 * 24 * 24 * 96),
        # layers, and QKᵀ and AV of 4 windows of 4 tokens in each of two images
        (
            "attention",
            SublayerCase(2, (3, 4), (2, 2), channels=24),
            2 * 24 * 4 * 24 * 24 + 4 * 8 * 16 * 24,
        ),
    ],
    ids=["mlp", "attention"],
)
def test_flops_are_those_of_the_unfused_layers(name, case, products):
    sublayer = SUBLAYERS[name]
    operands = sublayer.with_grad(sublayer.make(case))
    with FlopCounterMode(display=False) as counter:
        out = sublayer.call(case, operands, "cpu")
    assert counter.get_total_flops() == products
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * products


@over(FIRST)
def test_operands_are_the_leading_arguments_of_both_schemas(sublayer, case):
    ops = sublayer.ops
    operands, options = sublayer.arguments(case)
    names = [*operands._fields, *options._fields]
    assert [a.name for a in ops.forward._schema.arguments] == names
    assert [a.name for a in ops.backward._schema.arguments] == ["grad_out", *names, "needs"]
    assert sublayer.operation.split((*operands, *options, 5)) == (operands, options, (5,))
