"""What tools that wrap, watch or look for the modules of a patched block find there."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="the patches are tested on timm's models")

from patch_models import (
    BLOCKS,
    KINDS,
    attend,
    blocks_of,
    fused_blocks,
    image,
    small_block,
    small_model,
    train_step,
)
from torch.ao.quantization.observer import MovingAverageMinMaxObserver
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from swin_kernels import explain, patch, patched, unpatch
from swin_kernels.ops import dispatch
from swin_kernels.patch import static_mask

kinds = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=["unpadded", "padded"])


def patched_copy(model: nn.Module, **options) -> nn.Module:
    twin = copy.deepcopy(model)
    patch(twin, **options)
    return twin


def separate(model: nn.Module) -> nn.Module:
    """V2 blocks call their qkv layer only where its bias is added apart."""
    for block in blocks_of(model):
        block.attn.qkv_bias_separate = True
    return model


class _ByChannel(nn.Module):
    """An adapter of qkv that adds to queries and values, by their place among the channels."""

    def __init__(self, qkv: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        self.down = nn.ModuleList(nn.Linear(self.dim, rank, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(rank, self.dim, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        _, _, channels = tokens.shape
        assert channels == self.dim
        packed = self.qkv(tokens)
        packed[:, :, : self.dim] += self.up[0](self.down[0](tokens))
        packed[:, :, -self.dim :] += self.up[1](self.down[1](tokens))
        return packed


@kinds
@sizes
def test_adapter_that_counts_channels_trains_as_with_stock(kind, size):
    stock = separate(small_model(kind, size))
    torch.manual_seed(3)
    for block in blocks_of(stock):
        block.attn.qkv = _ByChannel(block.attn.qkv)
    ours = patched_copy(stock)
    expected, actual = train_step(stock, image(*size)), train_step(ours, image(*size))
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-4, atol=1e-5)
    assert actual.grads.keys() == expected.grads.keys()
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-3, atol=1e-4)


def second_moments(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, Tensor]]:
    """Of the inputs of each linear layer of a block: how many, and their mean x·xᵀ."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".attn." in name and "mlp" not in name:

            def watch(module, inputs, output, name=name):
                (x,) = inputs
                assert x.ndim == output.ndim == 3
                seen.setdefault(name, []).append(x.flatten(0, 1))

            module.register_forward_hook(watch)
    with torch.no_grad():
        model(image(*size))
    assert all(len(inputs) == 1 for inputs in seen.values()), "called more than once"
    return {name: (len(x), x.T @ x / len(x)) for name, (x,) in seen.items()}


@kinds
@sizes
def test_hooks_on_linear_layers_see_the_tokens_that_stock_shows(kind, size):
    stock = separate(small_model(kind, size))
    ours = patched_copy(stock)
    expected, actual = second_moments(stock, size), second_moments(ours, size)
    assert len(expected) == 8
    for name, (count, moment) in expected.items():
        assert actual[name][0] == count, name
        torch.testing.assert_close(actual[name][1], moment, rtol=1e-3, atol=1e-4)


@sizes
def test_moving_averages_of_observers_are_those_of_stock(size):
    def ranges(model):
        observers = {}
        for name, module in model.named_modules():
            if name.endswith(("attn.qkv", "attn.proj")):
                observer = observers[name] = MovingAverageMinMaxObserver(averaging_constant=0.1)
                module.register_forward_hook(lambda m, x, out, see=observer: see(out.detach()))
        with torch.no_grad():
            for seed in range(5):
                model(image(*size, seed=seed))
        return {n: torch.stack((o.min_val, o.max_val)) for n, o in observers.items()}

    stock = small_model("v1", size)
    ours = patched_copy(stock)
    torch.testing.assert_close(ranges(ours), ranges(stock), rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("wrapped", ["qkv", "proj", "proj_drop"])
def test_wrapped_layer_is_called_once_on_the_tokens_of_stock(kind, wrapped):
    """One that is not linear, so that each token of padding counts, and only in its own window."""

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.tokens = layer, []

        def forward(self, x):
            self.tokens.append(x.shape[0] * x.shape[1])
            return torch.sin(3 * self.layer(x))

    block = small_block(kind, (12, 17)).double()
    x = torch.randn(2, 12, 17, 16, dtype=torch.float64)
    block.attn.qkv_bias_separate = True
    setattr(block.attn, wrapped, Wrapped(getattr(block.attn, wrapped)))
    ours = patched_copy(block)
    expected, actual = train_step(block, x), train_step(ours, x)
    assert getattr(ours.attn, wrapped).tokens == getattr(block.attn, wrapped).tokens
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-9, atol=1e-9)


def test_loss_on_hooked_outputs_has_the_gradients_of_stock():
    def step(model):
        penalties = []
        for block in blocks_of(model):
            block.attn.qkv.register_forward_hook(
                lambda m, x, out: penalties.append(out.square().mean())
            )
        out = model(image(60, 76))
        (out.square().sum() + sum(penalties)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    stock = small_model("v1", (60, 76))
    ours = patched_copy(stock)
    torch.testing.assert_close(step(ours), step(stock), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)], ids=["number", "one", "heads"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_scale_that_is_learnt_has_the_gradient_of_stock(shape, when):
    block, x = small_block("v1", (12, 17)), torch.randn(2, 12, 17, 16)

    def learning(block):
        factor = torch.linspace(0.7, 1.3, math.prod(shape)).reshape(shape)
        block.attn.scale = nn.Parameter(block.attn.scale * factor)
        return block

    stock = learning(copy.deepcopy(block))
    ours = patched_copy(stock, strict=True) if when == "before" else None
    ours = ours or learning(patched_copy(block, strict=True))
    expected, actual = train_step(stock, x), train_step(ours, x)
    assert expected.grads["attn.scale"].abs().max() > 1e-3
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-3, atol=1e-4)


def test_scale_of_another_shape_keeps_the_stock_path():
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    block.attn.scale = nn.Parameter(torch.full((8,), block.attn.scale))  # one a channel
    with pytest.warns(UserWarning, match=r"attn\.scale has shape \(8,\)"):
        ours = patched_copy(block)
    assert not fused_blocks(ours)
    assert torch.equal(attend(ours, x), attend(block, x))


@kinds
def test_patched_class_keeps_its_name_and_pickles(kind):
    stock = BLOCKS[kind]
    model = patched_copy(small_model(kind))
    for block in fused_blocks(model):
        cls = type(block)
        assert cls is not stock
        assert isinstance(block, stock)
        assert (cls.__name__, cls.__qualname__) == (stock.__name__, stock.__qualname__)
        assert cls.__module__ == "swin_kernels.patch.timm"
        assert "swin_kernels" in repr(block)
    assert sum(type(m).__name__ == stock.__name__ for m in model.modules()) == 4
    again = pickle.loads(pickle.dumps(model))
    for twin in (again, copy.deepcopy(model)):
        assert [type(b) for b in fused_blocks(twin)] == [type(b) for b in fused_blocks(model)]
    unpatch(model)
    assert "swin_kernels" not in repr(model)


@pytest.fixture(params=[True, False], ids=["compared", "watched"])
def read_each_time(request, monkeypatch):
    """As on a CPU, or as on devices where a comparison on each call would wait."""
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: request.param)


EDITS = {
    "data": lambda mask: mask.data.zero_(),
    "numpy": lambda mask: mask.numpy().fill(0.0),
    "storage": lambda mask: mask.untyped_storage().fill_(0),
    "one number": lambda mask: mask.data[1, 2].fill_(-7.0),
    "detached": lambda mask: mask.detach().zero_(),
}


@kinds
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_mask_edited_without_a_trace_is_used(kind, edit, read_each_time):
    """Longitude that wraps round, in a panorama or on a globe, is often made so."""
    block, x = small_block(kind, (14, 14)), torch.randn(2, 14, 14, 16)
    ours = patched_copy(block, strict=True)
    with torch.no_grad():
        before = attend(ours, x)
        for each in (block, ours):
            edit(each.attn_mask)
        expected, actual = attend(block, x), attend(ours, x)
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for each in (block, ours):
            each.attn_mask.data.fill_(0.5)  # again, now that it is known to be another
        torch.testing.assert_close(attend(ours, x), attend(block, x), rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("held_as", [Tensor.detach, lambda mask: mask.data], ids=["detach", "data"])
def test_mask_edited_through_what_was_held_before_the_patch_is_used(kind, held_as, read_each_time):
    block, x = small_block(kind, (14, 14)), torch.randn(2, 14, 14, 16)
    held = held_as(block.attn_mask)
    patch(block, strict=True)
    with torch.no_grad():
        attend(block, x)
        held.zero_()
        actual = attend(block, x)
        unpatch(block)
        torch.testing.assert_close(actual, attend(block, x), rtol=1e-4, atol=1e-5)


def masking_of(block: nn.Module, size: int) -> set[str]:
    return set(block._masking((size, size)))


def test_watched_mask_is_read_once_until_someone_writes(monkeypatch):
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: False)
    read, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: read.append(a) or equal(a, b))
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    patch(block, strict=True)
    for _ in range(3):
        attend(block, x)
    block.attn.softmax.dim = 2  # stock reads the mask too
    block._swin_kernels.strict = False
    attend(block, x)
    block.attn.softmax.dim = -1
    attend(block, x)
    assert len(read) == 1
    block.attn_mask.data.copy_(block.attn_mask.clone())  # as DDP broadcasts buffers
    for _ in range(2):
        assert masking_of(block, 14) == {"mask_value"}
    assert len(read) == 2


def test_masks_in_the_same_memory_are_each_compared_after_an_edit(monkeypatch):
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: False)
    blocks, x = [small_block("v1", (14, 14)) for _ in range(2)], torch.randn(2, 14, 14, 16)
    masks = torch.stack([block.attn_mask for block in blocks])
    for block, mask in zip(blocks, masks):
        block.attn_mask = mask
        patch(block, strict=True)
        attend(block, x)
    assert [masking_of(block, 14) for block in blocks] == [{"mask_value"}] * 2
    blocks[1].attn_mask.data.zero_()
    assert masking_of(blocks[0], 14) == {"mask_value"}  # watches the memory of both again
    assert masking_of(blocks[1], 14) == {"mask", "mask_value"}


def test_mask_for_another_layout_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: False)
    block = small_block("v1", (14, 28))
    patch(block, strict=True)
    monkeypatch.setattr(torch, "equal", lambda a, b: pytest.fail("was compared"))
    for _ in range(2):
        block.attn_mask.data_ptr()  # as a launch asks for it
        assert set(block._masking((28, 14))) == {"mask", "mask_value"}


def test_mask_in_memory_that_cannot_be_watched_is_used_as_it_is(monkeypatch):
    block = small_block("v1", (14, 14))
    block.attn_mask.share_memory_()
    assert masking_of(patched_copy(block, strict=True), 14) == {"mask_value"}
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: False)
    patch(block, strict=True)
    assert masking_of(block, 14) == {"mask", "mask_value"}


@pytest.mark.slow
@pytest.mark.parametrize("called", [False, True], ids=["", "after a call"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_mask_edited_before_it_is_compiled_is_used(called, edit, read_each_time, fresh_dynamo):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    ours = patched_copy(block, strict=True)
    with torch.no_grad():
        if called:
            ours(x)
        for each in (block, ours):
            edit(each.attn_mask)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_block_is_traced_by_make_fx_without_a_call_before(kind, tracing_mode):
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    ours = patched_copy(block)
    graph = make_fx(ours, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    again = torch.randn(2, 12, 17, 16)
    torch.testing.assert_close(graph(again), block(again), rtol=1e-4, atol=1e-5)


def test_fused_attention_of_timm_that_leaves_the_scale_out_stays_stock():
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    block.attn.fused_attn = True
    assert len(patch(copy.deepcopy(block), strict=True).replaced) == 1
    block.attn.scale = 1.0
    with pytest.warns(UserWarning, match=r"stock leaves attn\.scale out"):
        ours = patched_copy(block)
    assert torch.equal(attend(ours, x), attend(block, x))


def test_softmax_over_another_axis_stays_stock():
    block = small_block("v1", (14, 14))
    block.attn.softmax = nn.Softmax(dim=-2)
    with pytest.raises(ValueError, match=r"attn\.softmax is over axis -2"):
        patch(block, strict=True)


def test_mask_that_requires_grad_is_refused_by_strict():
    block = small_block("v1", (14, 14))
    block.attn_mask.requires_grad_()
    with pytest.raises(ValueError, match="attn_mask requires grad"):
        patch(block, strict=True)


def test_scale_of_numpy_is_a_number():
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    block.attn.scale = np.float32(0.3)
    ours = patched_copy(block, strict=True)
    torch.testing.assert_close(attend(ours, x), attend(block, x), rtol=1e-4, atol=1e-5)


def test_each_copy_of_a_block_speaks_for_itself(warned):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    size = len(pickle.dumps(block))
    patch(block)
    block(x)
    assert len(pickle.dumps(block)) < size + 1000
    for each in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        each.attn.register_forward_hook(lambda *_: None)
        each(x)
        each(x)
    assert len(warned()) == 3


@pytest.mark.slow
def test_stock_path_of_a_dynamic_graph_compiles_whole(fresh_dynamo):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    ours = patched_copy(block)
    for each in (block, ours):
        each.attn_mask = each.attn_mask[:1].clone()
    # sizes of a whole graph of symbols take AOTAutograd minutes, in stock too
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def warned(caplog, monkeypatch):
    """What the log says."""
    monkeypatch.setattr(dispatch, "_already_logged", set())
    caplog.set_level(logging.WARNING, logger="swin_kernels")
    return lambda: [record.getMessage() for record in caplog.records]


TO_STOCK = {
    "hook": (lambda b: b.attn.register_forward_hook(lambda *_: None), "its attn has hooks"),
    "forward": (lambda b: setattr(b, "forward", b.forward), "its forward was replaced"),
    "module": (lambda b: setattr(b.attn, "softmax", nn.Identity()), "softmax is a Identity"),
    "mask": (lambda b: b.attn_mask.requires_grad_(), "attn_mask requires"),
    "windows": (lambda b: setattr(b, "attn_mask", b.attn_mask[:1]), "another number of windows"),
}


@pytest.mark.parametrize(("change", "reason"), TO_STOCK.values(), ids=TO_STOCK)
def test_block_that_takes_the_stock_path_says_so_once(change, reason, warned):
    model = small_model("v1")
    patch(model)
    x = image(56, 56)
    model(x)
    assert warned() == []
    change(model.layers[0].blocks[1])
    for _ in range(2):
        model(x)
    (said,) = warned()
    assert "patched block 'layers.0.blocks.1' runs stock: " in said
    assert reason in said
    if "number of windows" not in reason:  # which depends on the map
        assert reason in explain(model)


def test_strict_patch_makes_the_stock_path_an_error(warned):
    model, x = small_model("v1"), image(56, 56)
    assert len(patch(model, strict=True).replaced) == 4
    model(x)
    handle = model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"\.blocks\.0' runs stock: its attn has"):
        model(x)
    handle.remove()
    model(x)
    with patched(model, strict=False):
        model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: None)
        model(x)
    with pytest.raises(NotImplementedError, match="strict=True"):
        model(x)


def test_strict_patch_of_a_block_that_cannot_be_replaced_changes_nothing():
    model = small_model("v1")
    model.layers[0].blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.1: its attn has hooks"):
        patch(model, strict=True)
    assert not fused_blocks(model)


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


def gradients(model: nn.Module, x: Tensor, parameters: dict) -> dict[str, Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_program_trains_as_eager(kind, strict):
    stock, x = small_model(kind, (60, 76)), image(60, 76)
    expected = gradients(stock, x, dict(stock.named_parameters()))
    ours = patched_copy(stock)
    ours(x)
    exported = torch.export.export(ours, (x,), strict=strict).module()
    assert "window_attention_forward" in str(exported.graph)
    parameters = dict(exported.named_parameters())
    for run in (exported, torch.compile(exported, backend="aot_eager")):
        found = gradients(run, x, parameters)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
