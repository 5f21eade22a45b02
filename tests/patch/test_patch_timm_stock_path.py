"""Where a patched block of timm takes the stock path, and which mask it adds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the patches are tested on timm's models")

from patch_models import (
    KINDS,
    assert_same_output,
    assert_same_training,
    attend,
    blocks_of,
    image,
    small_block,
    small_model,
    train_step,
)

from swin_kernels import patch, unpatch

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


def mask_arguments(calls) -> list[tuple[bool, float]]:
    return [("mask" in c, c["mask_value"]) for c in calls]


@kinds
def test_static_mask_of_stock_is_never_read(kind, calls):
    block = small_block(kind, (12, 17))
    patch(block)
    for moved in (block, copy.deepcopy(block), copy.deepcopy(block).double()):
        attend(moved, torch.randn(1, 12, 17, 16, dtype=moved.norm1.weight.dtype))
    assert mask_arguments(calls) == [(False, -100.0)] * 3


@kinds
def test_stale_static_mask_is_taken_as_stock_takes_it(kind, calls, on_cpu_kernels):
    """Made for 14 × 28, run on 28 × 14: as many windows, and the wrong tokens separated."""
    block = small_block(kind, (14, 28))
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 28, 14, 16) for _ in range(4)])
    assert mask_arguments(calls) == [(True, 0.0)] * 4


@kinds
def test_static_mask_of_another_window_count_takes_the_stock_path(kind, calls):
    """Where the batch makes up for it stock runs, with the wrong masks; else it raises."""
    block = small_block(kind, (14, 28))
    x = torch.randn(2, 14, 14, 16)
    expected = block(x)
    patch(block)
    assert torch.equal(block(x), expected)
    assert calls == []
    with pytest.raises(RuntimeError):
        block(x[:1])


@kinds
def test_mask_of_the_user_is_added(kind, calls, on_cpu_kernels):
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    block.attn_mask = torch.randn_like(block.attn_mask)
    assert_same_output(block, x, on_cpu_kernels)
    assert mask_arguments(calls) == [(True, 0.0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "attn_mask", torch.randn_like(block.attn_mask)),
        lambda block: block.attn_mask.fill_(0.0),
        lambda block: block.attn_mask[0, 3].fill_(-7.0),
        lambda block: setattr(block, "attn_mask", None),
        lambda block: setattr(block, "shift_size", (1, 2)),
    ],
    ids=["replaced", "zeroed in place", "one row in place", "None", "shift changed under it"],
)
@kinds
def test_mask_changed_after_patch_is_seen(kind, change, calls):
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    stock = copy.deepcopy(block)
    patch(block)
    attend(block, x)
    with torch.no_grad():
        torch.manual_seed(3)
        change(block)
        torch.manual_seed(3)
        change(stock)
    torch.testing.assert_close(attend(block, x), attend(stock, x), rtol=1e-5, atol=1e-6)
    assert mask_arguments(calls)[-1][1] == 0.0


def test_mask_that_requires_grad_keeps_the_stock_path(calls):
    block, x = small_block("v1", (14, 14)), torch.randn(1, 14, 14, 16)
    patch(block)
    block.attn_mask = block.attn_mask.clone().requires_grad_()
    block(x).sum().backward()
    assert block.attn_mask.grad is not None
    assert calls == []


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


def test_model_made_in_inference_mode(calls):
    with torch.inference_mode():
        block, x = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16)
        expected = block(x)
        patch(block)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
    # such a mask has no version, so a change in place could not be seen
    assert mask_arguments(calls) == [(True, 0.0)]
