"""Where a patched block of timm takes the stock path, and that it says so."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from patch_models import fused_blocks, image, small_block, small_model, train_step
from torch import nn

from swin_kernels import explain, patch, patched, unpatch
from swin_kernels.ops import dispatch

NAME = "layers.0.blocks.1"


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
@pytest.mark.parametrize("place", ["attn", "attn.softmax", "attn.attn_drop"])
def test_hook_on_attention_is_called_while_it_is_there(place, register, calls):
    model, x, seen = small_model("v1"), image(56, 56), []
    expected = model(x)
    hooked = model.get_submodule(f"{NAME}.{place}")

    def step_and_count() -> tuple[int, int]:
        torch.testing.assert_close(train_step(model, x).out, expected, rtol=1e-5, atol=1e-6)
        counts = len(seen), len(calls)
        seen.clear(), calls.clear()
        return counts

    handle = register(hooked, lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=f"{place} has hooks"):
        assert list(patch(model).left) == [NAME]
    assert step_and_count() == (1, 3)
    handle.remove()
    assert patch(model).replaced == (NAME,)
    handle = register(hooked, lambda *_: seen.append(1))
    assert step_and_count() == (1, 3)
    handle.remove()
    assert step_and_count() == (0, 4)


def test_forward_replaced_on_an_instance_is_called(calls):
    """As accelerate does; on softmax by the stock path, see `CHANGES`."""
    block, x, seen = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16), []
    patch(block)
    inner = block.attn.qkv.forward
    block.attn.qkv.forward = lambda x: seen.append(1) or 1.5 * inner(x)
    stock = copy.deepcopy(block)
    unpatch(stock)
    torch.testing.assert_close(block(x), stock(x), rtol=1e-5, atol=1e-6)
    assert (len(seen), len(calls)) == (2, 1)


def test_fused_attention_of_timm_is_replaced():
    block = small_block("v1", (14, 14))
    block.attn.fused_attn = True
    assert len(patch(block, strict=True).replaced) == 1


@pytest.fixture
def warned(caplog, monkeypatch):
    """What the log says."""
    monkeypatch.setattr(dispatch, "_already_logged", set())
    caplog.set_level(logging.WARNING, logger="swin_kernels")
    return lambda: [record.getMessage() for record in caplog.records]


class Doubled(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x, mask=None):
        return self.attn(x, mask) * 2


def leave_scale_out(block: nn.Module) -> None:
    """timm's own fused attention takes the scale that the head dim asks for."""
    block.attn.fused_attn, block.attn.scale = True, 1.0


def scale_channels(block: nn.Module) -> None:
    block.attn.scale = nn.Parameter(torch.full((16,), block.attn.scale))


def replace_by_itself(module: nn.Module, method: str) -> None:
    setattr(module, method, getattr(module, method))


CHANGES = {
    "hook": (lambda b: b.attn.register_forward_hook(lambda *_: None), "its attn has hooks"),
    "forward": (lambda b: replace_by_itself(b, "forward"), "its forward was replaced"),
    "_attn": (lambda b: replace_by_itself(b, "_attn"), "its _attn was replaced on the instance"),
    "attn.forward": (
        lambda b: replace_by_itself(b.attn, "forward"),
        r"its attn\.forward was replaced",
    ),
    "softmax.forward": (
        lambda b: replace_by_itself(b.attn.softmax, "forward"),
        r"its attn\.softmax has hooks",
    ),
    "attn": (lambda b: setattr(b, "attn", Doubled(b.attn)), "its attn is a Doubled"),
    "softmax": (lambda b: setattr(b.attn, "softmax", nn.Softmin(-1)), "softmax is a Softmin"),
    "attn_drop": (lambda b: setattr(b.attn, "attn_drop", nn.Identity()), "drop is a Identity"),
    "axis": (lambda b: setattr(b.attn.softmax, "dim", -2), r"attn\.softmax is over axis -2"),
    "mask": (lambda b: b.attn_mask.requires_grad_(), "attn_mask requires grad"),
    "fused": (leave_scale_out, r"stock leaves attn\.scale out"),
    "scale": (scale_channels, r"attn\.scale has shape \(16,\)"),
    "shift": (lambda b: setattr(b, "shift_size", (8, 3)), r"shift \(8, 3\) does not fit"),
}
changes = pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)


@changes
def test_block_changed_before_patch_is_left_and_refused_by_strict(change, reason):
    model = small_model("v1")
    change(model.get_submodule(NAME))
    with pytest.raises(ValueError, match=rf"layers\.0\.blocks\.1: .*{reason}"):
        patch(model, strict=True)
    assert not fused_blocks(model)
    with pytest.warns(UserWarning, match=reason):
        report = patch(model)
    assert list(report.left) == [NAME]
    assert len(fused_blocks(model)) == len(report.replaced) == 3


@changes
def test_block_changed_after_patch_runs_stock_and_says_so_once(change, reason, calls, warned):
    model, x = small_model("v1"), torch.randn(2, 14, 14, 32)
    stock = copy.deepcopy(model.get_submodule(NAME))
    patch(model, level="attention")
    block = model.get_submodule(NAME)
    block(x)
    assert warned() == []
    for each in (block, stock):
        change(each)
    for _ in range(2):
        assert torch.equal(block(x), stock(x))
    assert len(calls) == 1
    (said,) = warned()
    assert re.match(f"patched block '{NAME}' runs stock: .*{reason}", said)
    assert re.search(reason, explain(model))


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
