"""The static mask of a patched block of timm: which mask is added, and edits of it."""

from __future__ import annotations

import copy

import pytest
import torch
from patch_models import (
    assert_same_output,
    assert_same_training,
    attend,
    kinds,
    patched_copy,
    small_block,
)
from torch import Tensor, nn

from swin_kernels import patch, unpatch
from swin_kernels.patch import static_mask


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
def test_static_mask_of_another_window_count_takes_the_stock_path(kind, calls, caplog):
    """Where the batch makes up for it stock runs, with the wrong masks; else it raises."""
    block = small_block(kind, (14, 28))
    x = torch.randn(2, 14, 14, 16)
    expected = block(x)
    patch(block, level="attention")
    assert torch.equal(block(x), expected)
    assert calls == []
    assert "runs stock: its attn_mask is for another number of windows" in caplog.text
    with pytest.raises(RuntimeError):
        block(x[:1])


@kinds
def test_mask_of_the_user_is_added(kind, calls, on_cpu_kernels):
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    block.attn_mask = torch.randn_like(block.attn_mask)
    assert_same_output(block, x, on_cpu_kernels)
    assert mask_arguments(calls) == [(True, 0.0)]


def test_model_made_in_inference_mode(calls):
    with torch.inference_mode():
        block, x = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16)
        expected = block(x)
        patch(block)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
    # such a mask has no version, so a change in place could not be seen
    assert mask_arguments(calls) == [(True, 0.0)]


@pytest.fixture(params=[True, False], ids=["compared", "watched"])
def read_each_time(request, monkeypatch):
    """As on a CPU, or as on devices where a comparison on each call would wait."""
    monkeypatch.setattr(static_mask, "reads_each_time", lambda mask: request.param)


WITHOUT_A_TRACE = {
    "data": lambda block: block.attn_mask.data.zero_(),
    "numpy": lambda block: block.attn_mask.numpy().fill(0.0),
    "storage": lambda block: block.attn_mask.untyped_storage().fill_(0),
    "one number": lambda block: block.attn_mask.data[-1, 2].fill_(-7.0),
    "detached": lambda block: block.attn_mask.detach().zero_(),
}
EDITS = WITHOUT_A_TRACE | {
    "replaced": lambda block: setattr(block, "attn_mask", block.attn_mask.flip(0)),
    "zeroed in place": lambda block: block.attn_mask.zero_(),
    "one row in place": lambda block: block.attn_mask[-1, 1].fill_(-7.0),
    "shift changed under it": lambda block: setattr(block, "shift_size", (1, 2)),
}


@kinds
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_mask_is_used(kind, edit, read_each_time, calls):
    """Longitude that wraps round, in a panorama or on a globe, is often made so."""
    block, x = small_block(kind, (12, 17)), torch.randn(2, 12, 17, 16)
    ours = patched_copy(block, strict=True)
    edits = [
        edit,
        lambda block: block.attn_mask.data.copy_(torch.eye(49)),  # known to be another now
        lambda block: setattr(block, "attn_mask", None),
    ]
    with torch.no_grad():
        expected = attend(ours, x)
        for change in edits:
            for each in (block, ours):
                change(each)
            before, expected = expected, attend(block, x)
            assert (expected - before).abs().max() > 1e-3
            torch.testing.assert_close(attend(ours, x), expected, rtol=1e-4, atol=1e-5)
            assert calls[-1]["mask_value"] == 0.0


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
@pytest.mark.parametrize("edit", WITHOUT_A_TRACE.values(), ids=WITHOUT_A_TRACE)
def test_mask_edited_before_it_is_compiled_is_used(called, edit, read_each_time, fresh_dynamo):
    block, x = small_block("v1", (14, 14)), torch.randn(2, 14, 14, 16)
    ours = patched_copy(block, strict=True)
    with torch.no_grad():
        if called:
            ours(x)
        for each in (block, ours):
            edit(each)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
