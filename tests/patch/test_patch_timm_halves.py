"""The halves of timm's blocks: one operation each where all is plain, and said so where not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from patch_models import image, kinds, small_block, small_model, train_step
from timm.layers import DropPath
from torch import nn

import swin_kernels
from swin_kernels.ops.autograd import MlpSublayerFunction
from swin_kernels.patch import timm_halves
from swin_kernels.patch.core import patch, unpatch
from swin_kernels.testing import assert_no_worse_than_eager


@pytest.fixture
def halves(monkeypatch):
    """The `residual_scale` of every MLP half that runs as one operation."""
    recorded = []

    def recording(*arguments, **options):
        recorded.append(options["residual_scale"])
        return swin_kernels.mlp_sublayer(*arguments, **options)

    monkeypatch.setattr(timm_halves, "mlp_sublayer", recording)
    return recorded


def _float64(model):
    return copy.deepcopy(model).double()


def _hook(block):
    block.mlp.register_forward_hook(lambda *_: None)


def _hook_on_a_layer(block):
    block.mlp.fc2.register_forward_pre_hook(lambda *_: None)


def _own_forward(block):
    block.mlp.forward = block.mlp.forward


def _subclass_of_a_layer(block):
    block.mlp.fc1.__class__ = type("Adapter", (nn.Linear,), {})


def _another_activation(block):
    block.mlp.act = nn.Tanh()


def _another_norm(block):
    block.norm2 = nn.Identity()


def _norm_of_the_hidden(block):
    block.mlp.norm = nn.LayerNorm(block.mlp.fc1.out_features)


def _dropout_at_work(block):
    block.mlp.drop1.p = 0.5
    block.mlp.drop1.train()


def _another_drop_path(block):
    block.drop_path2 = type("MyDropPath", (DropPath,), {})()


def _parametrised(block):
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)


def _another_mlp(block):
    block.mlp = nn.Sequential(block.mlp)


CHANGES = {
    _hook: "its mlp has hooks",
    _hook_on_a_layer: "its mlp.fc2 has hooks",
    _own_forward: "its mlp has hooks, or a forward of its own",
    _subclass_of_a_layer: "its mlp.fc1 is a Adapter",
    _another_activation: "its mlp.act is a Tanh",
    _another_norm: "its norm2 is a Identity",
    _norm_of_the_hidden: "its mlp.norm is a LayerNorm",
    _dropout_at_work: "its mlp.drop1 drops, being in training mode",
    _another_drop_path: "its drop_path2 is a MyDropPath",
    _parametrised: "its mlp.fc1 is a ParametrizedLinear",
    _another_mlp: "its mlp is a Sequential",
}


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_whole_blocks_keep_the_error_rule(kind, dtype, halves):
    stock = small_model(kind, drop_path_rate=0.0).to(dtype).train()
    model = copy.deepcopy(stock)
    report = patch(model)
    steps = [
        [train_step(m, image(56, 56, seed=s).to(d)) for s in range(3)]
        for m, d in ((model, dtype), (stock, dtype), (_float64(stock), torch.float64))
    ]
    assert_no_worse_than_eager(*([s.out for s in several] for several in steps))
    for name in steps[0][0].grads:
        several = ([s.grads[name] for s in each] for each in steps)
        # of a whole model: what is behind a gradient errs in both, each in its own way
        assert_no_worse_than_eager(*several, factor=3.0, name=name)
    if report.halves["MLP"]:  # bfloat16 is fused only where the processor multiplies it
        assert len(halves) == 3 * 4
    else:
        assert dtype == torch.bfloat16


@kinds
def test_stochastic_depth_drops_the_images_that_stock_drops(kind, halves):
    stock = small_model(kind, drop_path_rate=0.5).train()
    model = copy.deepcopy(stock)
    patch(model)
    for seed in range(4):
        x = image(56, 56, batch=5, seed=seed)
        a, b = (train_step(m, x, seed=seed) for m in (model, stock))
        torch.testing.assert_close(a.out, b.out, rtol=1e-4, atol=1e-4)
        for name, grad in a.grads.items():
            torch.testing.assert_close(grad, b.grads[name], rtol=1e-3, atol=1e-3)
    scales = [s for s in halves if s is not None]
    assert scales
    assert {0.0} < {float(x) for s in scales for x in s}
    halves.clear()
    model.eval()(image(56, 56))
    assert halves == [None] * 4


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_half_that_is_not_plain_runs_its_modules(change, halves):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    change(block)
    stock = copy.deepcopy(block)
    report = patch(block)
    assert report.replaced == ("",)
    assert report.halves["MLP"] == ()
    assert CHANGES[change] in report.halves_left["MLP"][""]
    assert CHANGES[change] in str(report)
    torch.manual_seed(0)
    ours = block(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, stock(x))
    assert halves == []


def _hook_on_qkv(block):
    block.attn.qkv.register_forward_hook(lambda *_: None)


def _adapter_as_proj(block):
    block.attn.proj.__class__ = type("Adapter", (nn.Linear,), {})


def _another_first_norm(block):
    block.norm1 = nn.Identity()


def _first_norm_with_a_hook(block):
    block.norm1.register_forward_hook(lambda *_: None)


def _dropout_behind_proj(block):
    block.attn.proj_drop.p = 0.5
    block.attn.proj_drop.train()


def _another_first_drop_path(block):
    block.drop_path1 = type("MyDropPath", (DropPath,), {})()


def _learnt_scale(block):
    block.attn.scale = nn.Parameter(torch.tensor(block.attn.scale))


ATTENTION_CHANGES = {
    _hook_on_qkv: "its attn.qkv has hooks",
    _adapter_as_proj: "its attn.proj is a Adapter",
    _another_first_norm: "its norm1 is a Identity",
    _first_norm_with_a_hook: "its norm1 has hooks",
    _dropout_behind_proj: "its attn.proj_drop drops, being in training mode",
    _another_first_drop_path: "its drop_path1 is a MyDropPath",
    _learnt_scale: "its attn.scale is a tensor",
}


@pytest.mark.parametrize("change", ATTENTION_CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_attention_half_that_is_not_plain_runs_attention_alone(change, halves, calls):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    change(block)
    stock = copy.deepcopy(block)
    report = patch(block)
    assert report.replaced == ("",)
    assert report.halves == {"attention": (), "MLP": ("",)}
    assert ATTENTION_CHANGES[change] in report.halves_left["attention"][""]
    assert ATTENTION_CHANGES[change] in swin_kernels.explain(block)
    ours = block(x)
    if change is not _dropout_behind_proj:  # which stock draws window by window
        torch.testing.assert_close(ours, stock(x))
    assert len(halves) == 1
    # the op of attention, not the sublayer; of a learnt scale on query, key and value apart
    assert ["norm_weight" in c for c in calls] == ([] if change is _learnt_scale else [False])


@kinds
@pytest.mark.parametrize("change", [_hook_on_a_layer, _first_norm_with_a_hook])
def test_one_half_is_whole_where_the_other_is_not(kind, change, halves, calls):
    block, x = small_block(kind, (14, 14)), torch.randn(2, 14, 14, 16)
    change(block)
    stock = copy.deepcopy(block)
    patch(block)
    torch.testing.assert_close(block(x), stock(x))
    whole = (["norm_weight" in c for c in calls], len(halves))
    assert whole == (([True], 0) if change is _hook_on_a_layer else ([False], 1))


def test_attention_that_runs_stock_leaves_the_mlp_half_whole(halves, calls):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    patch(block)
    stock = copy.deepcopy(block)
    unpatch(stock)
    block.attn.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), stock(x))
    assert calls == []
    assert len(halves) == 1


def test_hooks_on_all_modules_and_replaced_forwards_are_called(halves, calls, monkeypatch):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    patch(block)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    block(x)
    handle.remove()
    assert seen.count(nn.Linear) == 4
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)
    assert "Linear.forward was replaced" in swin_kernels.explain(block)
    doubled = block(x)
    monkeypatch.undo()
    assert not torch.allclose(block(x), doubled, atol=1e-2)


def test_quantised_layers_of_v2_are_reported(halves):
    model = small_model("v2")
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    report = patch(model)
    assert all("attn.qkv.weight is a" in why for why in report.halves_left["attention"].values())


def test_fewer_windows_than_threads_run_attention_alone(calls):
    block, x = small_block("v1", (7, 7), shift=0), torch.randn(1, 7, 7, 16)
    patch(block)
    threads = torch.get_num_threads()
    try:
        for count, whole in ((1, True), (4, False)):
            torch.set_num_threads(count)
            calls.clear()
            block(x)
            assert ("norm_weight" in calls[0]) == whole
    finally:
        torch.set_num_threads(threads)


def test_half_changed_after_patch_runs_its_modules_for_as_long(halves):
    block, x = small_block("v2", (14, 14)), torch.randn(2, 14, 14, 16)
    patch(block)
    block(x)
    handle = block.mlp.fc1.register_forward_hook(lambda *_: None)
    block(x)
    assert len(halves) == 1
    assert "its mlp.fc1 has hooks" in swin_kernels.explain(block)
    handle.remove()
    block(x)
    assert len(halves) == 2


def test_source_that_was_not_tested_leaves_the_half_stock(monkeypatch, halves):
    monkeypatch.setattr(timm_halves, "KNOWN_SOURCES", {})
    block = small_block("v1", (14, 14))
    assert "has fingerprint" in patch(block).halves_left["MLP"][""]
    block(torch.randn(2, 14, 14, 16))
    assert halves == []


@kinds
def test_attention_alone_when_asked(kind, halves):
    model, x = small_model(kind), image(56, 56)
    report = patch(model, level="attention")
    assert len(report.replaced) == 4
    assert report.halves["MLP"] == ()
    model(x)
    assert halves == []
    assert 'patched with level="attention"' in swin_kernels.explain(model)
    report = patch(model)
    assert len(report.already_patched) == len(report.halves["MLP"]) == 4
    model(x)
    assert len(halves) == 4
    with swin_kernels.patched(model, level="attention"):
        model(x)
    assert len(halves) == 4
    model(x)
    assert len(halves) == 8


def test_unknown_level_raises_and_changes_nothing():
    block = small_block("v1", (14, 14))
    with pytest.raises(ValueError, match="level: expected one of attention, block, got 'mlp'"):
        patch(block, level="mlp")
    assert unpatch(block) == ()


def test_copies_keep_their_level_and_hold_no_packed_weights(halves):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    size, state = len(pickle.dumps(block)), block.state_dict().keys()
    patch(block)
    with torch.inference_mode():
        expected = block(x)
    assert block.state_dict().keys() == state
    for each in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert len(pickle.dumps(each)) < size + 1000
        with torch.inference_mode():
            assert torch.equal(each(x), expected)
    assert len(halves) == 3
    patch(block, level="attention")
    pickle.loads(pickle.dumps(block))(x)
    assert len(halves) == 3


def test_backend_without_the_operation_leaves_the_half_stock(halves):
    block = small_block("v1", (14, 14))
    report = patch(block, backend="reference")
    assert report.halves_left["MLP"][""] == "reference fuses nothing"
    block(torch.randn(2, 14, 14, 16))
    assert halves == []


def test_training_keeps_no_row_of_the_hidden_channels():
    block, x = small_block("v1", (14, 14), dim=32), torch.randn(2, 14, 14, 32)
    kept = {}
    for name, each in {"stock": copy.deepcopy(block), "ours": block}.items():
        if name == "ours":
            patch(each)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            out = each(x.requires_grad_())
        own = {p.data_ptr() for p in each.parameters()}
        kept[name] = sum(t.numel() for t in saved if t.data_ptr() not in own) / x.numel()
    assert isinstance(out.grad_fn, MlpSublayerFunction._backward_cls)
    assert kept["ours"] < 8 < 12 < kept["stock"]
