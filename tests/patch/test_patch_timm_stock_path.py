"""Where a patched block of timm takes the stock path, and that it says so."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the patches are tested on timm's models")

from patch_models import (
    KINDS,
    attend,
    blocks_of,
    fused_blocks,
    image,
    patched_copy,
    small_block,
    small_model,
    train_step,
)

from swin_kernels import explain, patch, patched, unpatch
from swin_kernels.ops import dispatch

kinds = pytest.mark.parametrize("kind", KINDS)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", ["attn", "attn.softmax", "attn.attn_drop"])
def test_hooked_attention_keeps_the_stock_path(place, hook, calls):
    model = small_model("v1")
    seen, block = [], blocks_of(model)[1]
    handle = HOOKS[hook](block.get_submodule(place), seen)
    with pytest.warns(UserWarning, match=f"{place} has hooks"):
        report = patch(model)
    assert list(report.left) == ["layers.0.blocks.1"]
    train_step(model, image(56, 56))
    assert (len(seen), len(calls)) == (1, 3)
    handle.remove()
    assert patch(model).replaced == ("layers.0.blocks.1",)


@pytest.mark.parametrize("place", ["attn", "attn.softmax", "attn.attn_drop"])
def test_hook_added_after_patch_is_called_while_it_is_there(place, calls):
    model, x, seen = small_model("v1"), image(56, 56), []
    expected = model(x)
    patch(model)
    block = blocks_of(model)[1]
    handle = block.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    out = model(x)
    assert (len(seen), len(calls)) == (1, 3)
    handle.remove()
    model(x)
    assert (len(seen), len(calls)) == (1, 7)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@kinds
def test_replaced_attention_module_keeps_the_stock_path(kind, calls):
    class Mine(nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.inner = attn

        def forward(self, x, mask=None):
            return self.inner(x, mask) * 2

    before, after = small_block(kind, (14, 14)), small_block(kind, (14, 14))
    before.attn = Mine(before.attn)
    with pytest.warns(UserWarning, match="its attn is a Mine"):
        assert patch(before).replaced == ()
    patch(after)
    after.attn = Mine(after.attn)
    x = torch.randn(1, 14, 14, 16)
    assert torch.equal(after(x), before(x))
    assert calls == []


@pytest.mark.parametrize(
    "name, module", [("softmax", nn.Softmin(-1)), ("attn_drop", nn.Identity())]
)
def test_replaced_softmax_or_dropout_keeps_the_stock_path(name, module, calls):
    block, x = small_block("v1", (14, 14)), torch.randn(1, 14, 14, 16)
    patch(block)
    setattr(block.attn, name, module)
    stock = copy.deepcopy(block)
    unpatch(stock)
    assert torch.equal(block(x), stock(x))
    assert calls == []


def test_forward_replaced_on_an_instance_is_called(calls):
    """As accelerate does: on softmax by the stock path, on qkv by the fused one."""
    block, x, seen = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16), []

    def replace_forward(module: nn.Module) -> None:
        inner = module.forward
        module.forward = lambda x: seen.append(1) or 1.5 * inner(x)

    patch(block)
    replace_forward(block.attn.qkv)
    stock = copy.deepcopy(block)
    unpatch(stock)
    torch.testing.assert_close(block(x), stock(x), rtol=1e-5, atol=1e-6)
    assert (len(seen), len(calls)) == (2, 1)
    replace_forward(block.attn.softmax)
    block(x)
    assert len(calls) == 1


def test_shift_that_does_not_fit_its_window_keeps_the_stock_path(calls):
    block, x = small_block("v1", (14, 14)), torch.randn(1, 14, 14, 16)
    block.shift_size = (8, 3)
    with pytest.warns(UserWarning, match=r"shift \(8, 3\) does not fit"):
        patch(block)
    block.shift_size = (3, 3)
    assert patch(block).replaced == ("",)
    block.shift_size = (8, 3)
    block(x)
    assert calls == []


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


def test_scale_of_another_shape_keeps_the_stock_path():
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    block.attn.scale = nn.Parameter(torch.full((8,), block.attn.scale))  # one a channel
    with pytest.warns(UserWarning, match=r"attn\.scale has shape \(8,\)"):
        ours = patched_copy(block)
    assert not fused_blocks(ours)
    assert torch.equal(attend(ours, x), attend(block, x))


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
