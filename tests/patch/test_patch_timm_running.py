"""Patched timm models in training, under compilers, exporters and transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from patch_models import (
    assert_outcomes_no_worse,
    assert_same_training,
    attend,
    double,
    fused_blocks,
    image,
    kinds,
    patched_copy,
    sizes,
    small_block,
    small_model,
    train_step,
    train_steps,
)
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from swin_kernels import patch, unpatch


@kinds
def test_drop_path_draws_the_same_in_training(kind, on_cpu_kernels):
    """Also the dropout inside Cr's meta network, drawn in the same order."""
    model = small_model(kind, (60, 76), drop_path_rate=0.5).train()
    images = [image(60, 76, seed=seed) for seed in range(3)]
    trained = assert_same_training(model, on_cpu_kernels, images, seed=5)
    other = train_step(model, images[0], seed=6)
    assert not torch.equal(other.out, trained[0].out)


ATTENTION_DROPOUT = {"v1": "attn_drop", "v2": "attn_drop", "cr": "drop_attn"}


@kinds
def test_attention_dropout_follows_the_seed(kind, calls, on_cpu_kernels):
    block = small_block(kind, (12, 17), **{ATTENTION_DROPOUT[kind]: 0.3}).train()
    on_cpu_kernels(block)
    x = torch.randn(2, 12, 17, 16)
    first, again, other = (train_step(block, x, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first.out, other.out)
    block.eval()
    block(x)
    block.attn.attn_drop.train()  # as Monte Carlo dropout does
    block(x)
    assert [c["dropout_p"] for c in calls] == [0.3, 0.3, 0.3, 0.0, 0.3]


def test_attention_dropout_has_the_mean_and_spread_of_stock(on_cpu_kernels):
    block, draws = small_block("v1", (8, 8), window=4, shift=2, attn_drop=0.3), 600
    x = torch.randn(1, 8, 8, 16).expand(draws, -1, -1, -1)
    with torch.no_grad():
        plain = attend(block, x[:1])
        block.train()
        torch.manual_seed(0)
        stock = attend(block, x)
        on_cpu_kernels(block)
        ours = attend(block, x)
    error_of_mean = stock.std(0) / draws**0.5
    assert ((ours.mean(0) - plain[0]).abs() <= 5 * error_of_mean + 1e-6).all()
    # a standard deviation is known to 1/√(2·draws)
    ratio = ours.std(0) / stock.std(0)
    assert ((ratio - 1).abs() <= 5 * (1 / draws) ** 0.5).float().mean() > 0.99


def test_projection_dropout_runs_as_the_module(on_cpu_kernels):
    block = small_block("v1", (12, 17), proj_drop=0.5).train()
    on_cpu_kernels(block)
    out = attend(block, torch.randn(4, 12, 17, 16))
    assert abs(float((out == 0).float().mean()) - 0.5) < 0.02


@kinds
def test_checkpointing_gives_the_same_gradients(kind, calls, on_cpu_kernels):
    options = {"attn_drop_rate": 0.2, "drop_path_rate": 0.2}
    model, x = small_model(kind, (60, 76), **options).train(), image(60, 76)
    on_cpu_kernels(model)
    plain = train_step(model, x)
    assert len(calls) == 4
    model.set_grad_checkpointing()
    recomputed = train_step(model, x)
    assert len(calls) == 12
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@sizes
@kinds
def test_autocast_to_bf16(kind, size, on_cpu_kernels):
    model, images = small_model(kind, size), [image(*size, seed=seed) for seed in range(3)]
    exact = train_steps(double(model), images)
    with torch.autocast("cpu", torch.bfloat16):
        eager = train_steps(model, images)
        on_cpu_kernels(model)
        actual = train_steps(model, images)
    assert actual[0].out.dtype == torch.bfloat16
    assert_outcomes_no_worse(actual, eager, exact)


@kinds
def test_bf16_model(kind, on_cpu_kernels):
    model = small_model(kind, (60, 76)).bfloat16()
    images = [image(60, 76, seed=seed) for seed in range(3)]
    assert_same_training(model, on_cpu_kernels, images)


@pytest.mark.slow
@sizes
@kinds
def test_compile_fullgraph_trains_as_eager(kind, size, calls, on_cpu_kernels):
    model, x = small_model(kind, size), image(*size)
    on_cpu_kernels(model)
    eager = train_step(model, x)
    compiled = train_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(compiled, eager)


def test_compile_with_inductor_trains_as_eager(on_cpu_kernels):
    block, x = small_block("v1", (12, 17)), torch.randn(2, 12, 17, 16)
    on_cpu_kernels(block)
    eager, compiled = train_step(block, x), train_step(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(compiled, eager)


def test_compile_sees_patch_hooks_and_masks_that_come_later(calls):
    nodes, seen = [], []

    def backend(graph, inputs):
        named = [n for n in graph.graph.nodes if "window_attention_forward" in str(n.target)]
        nodes.append([n.args[6] is not None for n in named])
        return graph

    block, x = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = compiled(x)
        patch(block, backend="cpu", level="attention")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
        handle = block.attn.register_forward_hook(lambda *_: seen.append(1))
        compiled(x)
        handle.remove()
        block.attn_mask = torch.randn_like(block.attn_mask)
        out = compiled(x)
        unpatch(block)
        torch.testing.assert_close(out, block(x), rtol=1e-5, atol=1e-6)
    # stock, fused without a mask, stock for the hook, fused with the mask
    assert nodes == [[], [False], [], [True]]
    assert seen == [1]


@pytest.mark.slow
def test_compile_with_dynamic_sizes(on_cpu_kernels):
    block = small_block("v2", (12, 17), dynamic_mask=True)
    stock = copy.deepcopy(block)
    on_cpu_kernels(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((12, 17), (15, 20), (30, 9)):
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(compiled(x), stock(x), rtol=1e-5, atol=1e-5)


@kinds
def test_export_holds_the_operation(kind):
    model, x = small_model(kind), image(56, 56)
    patch(model, backend="cpu")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        out = program.module()(x)
        torch.testing.assert_close(out, model(x))
    assert "swin_kernels.window_attention_sublayer_forward" in str(program.graph)
    assert "swin_kernels.mlp_sublayer_forward" in str(program.graph)


def exported_for_onnx(model: nn.Module, x: Tensor) -> nn.Module:
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        return torch.export.export(model, (x,)).module()


RECORDERS = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": torch.jit.trace,
    "fx": lambda model, x: create_feature_extractor(model, return_nodes=["head"]),
    "onnx": exported_for_onnx,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
@kinds
def test_record_for_another_runtime_holds_only_stock_operators(kind, record):
    model, x = small_model(kind), image(56, 56)
    patch(model)
    with torch.no_grad():
        expected = model(x)
        recorded = record(model, x)
        found = recorded(x)
    found = found["head"] if record is RECORDERS["fx"] else found
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(fused_blocks(model)) == 4
    if isinstance(recorded, torch.fx.GraphModule):
        assert "swin_kernels" not in str(recorded.graph)
    else:  # types bear the names of our classes
        assert "swin_kernels::" not in str(recorded.inlined_graph)


@kinds
def test_per_sample_gradients_by_vmap(kind):
    model, x = small_model(kind, (60, 76)), image(60, 76)
    stock = copy.deepcopy(model)
    patch(model)

    def per_sample(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],))[0, 1]

        gradient = torch.func.vmap(torch.func.grad(loss), (None, 0))
        return gradient(dict(model.named_parameters()), x)

    torch.testing.assert_close(per_sample(model), per_sample(stock), rtol=1e-4, atol=1e-5)


@kinds
@sizes
def test_flops_of_a_training_step_are_those_of_stock(kind, size):
    def counted(model):
        with FlopCounterMode(display=False) as counter:
            model(image(*size)).sum().backward()
        return counter.get_total_flops()

    stock = small_model(kind, size)
    ours = patched_copy(stock)
    # of the tokens of padding ours spares the layers
    assert counted(ours) == pytest.approx(counted(stock), rel=0 if size == (56, 56) else 0.3)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_block_is_traced_by_make_fx_without_a_call_before(kind, tracing_mode):
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    ours = patched_copy(block)
    graph = make_fx(ours, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    again = torch.randn(2, 12, 17, 16)
    torch.testing.assert_close(graph(again), block(again), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_stock_path_of_a_dynamic_graph_compiles_whole(fresh_dynamo):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    ours = patched_copy(block)
    for each in (block, ours):
        each.attn_mask = each.attn_mask[:1].clone()
    # sizes of a whole graph of symbols take AOTAutograd minutes, in stock too
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_program_trains_as_eager(kind, strict):
    stock, x = small_model(kind, (60, 76)), image(60, 76)
    expected = train_step(stock, x)
    ours = patched_copy(stock)
    ours(x)
    exported = torch.export.export(ours, (x,), strict=strict).module()
    assert "window_attention_sublayer_forward" in str(exported.graph)
    for run in (exported, torch.compile(exported, backend="aot_eager")):
        torch.testing.assert_close(train_step(run, x), expected, rtol=1e-3, atol=1e-4)
