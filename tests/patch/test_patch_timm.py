"""The three patched blocks of timm against stock: numbers, and the traps of the library."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from own_models import stirred
from patch_models import (
    assert_outcomes_no_worse,
    assert_same_output,
    assert_same_training,
    attend,
    blocks_of,
    double,
    image,
    kinds,
    sizes,
    small_block,
    small_model,
    train_step,
    train_steps,
)
from tiers import thorough
from timm import create_model

from swin_kernels import patch
from swin_kernels.ops import layers
from swin_kernels.testing import LEAST_INPUTS


@pytest.mark.parametrize("name", ["cpu", "reference"])
@sizes
@kinds
def test_small_model_trains_as_stock(kind, size, name, calls):
    model = small_model(kind, size)
    images = [image(*size, seed=seed) for seed in range(3)]
    assert_same_training(model, lambda m: patch(m, backend=name), images)
    assert len(calls) == 3 * len(blocks_of(model))
    # blocks without padding run no token of zeros
    assert {c["padded"] for c in calls if c["size"] == (14, 14)} <= {False}
    assert any(c["padded"] for c in calls) == (size == (60, 76))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            (224, 224),
            id="224",
            marks=thorough("test_patch_timm.py::test_small_model_trains_as_stock"),
        ),
        pytest.param((200, 264), id="200x264"),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"]
)
def test_full_model_trains_as_stock(name, size, calls, on_cpu_kernels):
    torch.manual_seed(0)
    model = stirred(create_model(name, img_size=size)).eval()
    images = [image(*size, batch=1, seed=seed) for seed in range(3)]
    assert_same_training(model, on_cpu_kernels, images)
    assert len(calls) == 3 * 12
    assert any(c["padded"] and any(c["shift"]) for c in calls) == (
        size == (200, 264) or name.startswith("swinv2_tiny")
    )


@kinds
def test_strict_img_size_false_takes_any_size(kind, calls, on_cpu_kernels):
    model = small_model(kind, 56, strict_img_size=False)
    images = [image(*size) for size in ((56, 56), (60, 76), (84, 64))]
    assert_same_training(model, on_cpu_kernels, images)
    assert {c["size"] for c in calls} >= {(14, 14), (15, 19), (21, 16)}
    assert not any("mask" in c for c in calls)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("v1", {"dim": 24, "heads": 3, "head_dim": 16}),
        ("v1", {"dim": 20, "heads": 2, "head_dim": 10}),
        ("v1", {"dim": 48, "heads": 1, "head_dim": 48}),
        ("v1", {"qkv_bias": False}),
        ("v2", {"qkv_bias": False}),
    ],
    ids=str,
)
def test_head_dim_of_its_own_and_no_bias(kind, options, on_cpu_kernels):
    block = small_block(kind, (12, 17), **options)
    images = [torch.randn(2, 12, 17, block.dim) for _ in range(4)]
    assert_same_training(block, on_cpu_kernels, images)


@pytest.mark.parametrize("shift", [(0, 0), (2, 4), (0, 4), (2, 0)], ids=str)
@kinds
def test_window_that_is_not_square(kind, shift, calls, on_cpu_kernels):
    block = small_block(kind, (13, 22), window=(5, 8), shift=shift)
    block.shift_size = shift  # timm's Cr takes half the window whatever is asked
    block._init_buffers()
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 13, 22, 16) for _ in range(4)])
    assert {(c["window"], c["shift"]) for c in calls} == {((5, 8), shift)}


@pytest.mark.parametrize("kind", ["v2", "cr"])
def test_logit_scale_is_clamped(kind, on_cpu_kernels):
    block = small_block(kind, (10, 12), heads=4)
    with torch.no_grad():
        scales = torch.tensor([2.0, math.log(99.0), math.log(101.0), 8.0])
        block.attn.logit_scale.copy_(scales.view_as(block.attn.logit_scale))
    images = [torch.randn(2, 10, 12, 16) for _ in range(4)]
    trained = assert_same_training(block, on_cpu_kernels, images)
    at_clamp = trained[0].grads["attn.logit_scale"].flatten() == 0
    assert at_clamp.tolist() == [False, False, True, True]


@pytest.mark.parametrize("scale", [0.7, np.float32(0.7)], ids=["float", "NumPy"])
def test_scale_of_the_module_counts(scale, on_cpu_kernels):
    block = small_block("v1", (10, 12))
    block.attn.scale = scale
    assert_same_output(block, torch.randn(4, 10, 12, 16), on_cpu_kernels)


def test_empty_batch(on_cpu_kernels):
    block = small_block("v1", (14, 14))
    on_cpu_kernels(block)
    assert attend(block, torch.randn(0, 14, 14, 16)).shape == (0, 14, 14, 16)


@kinds
def test_rolls_before_it_pads(kind, on_cpu_kernels):
    """12 rows, window 7, shift 3: row 0 reaches 0, 1, 10 and 11; padding first gives 0, 1, 2."""
    block, x = small_block(kind, (12, 12)), torch.randn(1, 12, 12, 16)
    touched = x.clone()
    touched[:, 0] += 1.0

    def reached(block):
        with torch.no_grad():
            change = (attend(block, touched) - attend(block, x)).abs().amax((0, 2, 3))
        return (change > 1e-4).nonzero().flatten().tolist()

    assert reached(block) == [0, 1, 10, 11]
    on_cpu_kernels(block)
    assert reached(block) == [0, 1, 10, 11]


@pytest.mark.parametrize("kind", ["v1", "cr"])
def test_padded_keys_and_values_reach_the_qkv_bias(kind, calls, on_cpu_kernels, monkeypatch):
    model = small_block(kind, (12, 17))
    images = [torch.randn(2, 12, 17, 16) for _ in range(4)]
    alone = functools.partial(on_cpu_kernels, level="attention")
    trained, *_ = assert_same_training(model, alone, images)
    assert calls[0]["pad_key"].shape == (2, 8)
    assert calls[0]["pad_key"].requires_grad
    # without what comes through padding the k and v thirds would differ
    with_padding = trained.grads["attn.qkv.bias"]
    op = layers.shifted_window_attention_qkvpacked

    def detached(qkv, window, shift, pad_key, pad_value, **options):
        pads = {"pad_key": pad_key.detach(), "pad_value": pad_value.detach()}
        return op(qkv, window, shift, **pads, **options)

    monkeypatch.setattr(layers, "shifted_window_attention_qkvpacked", detached)
    without = train_step(model, images[0]).grads["attn.qkv.bias"]
    query, key, value = ((with_padding - without).abs().view(3, -1).amax(1) > 1e-4).tolist()
    assert (query, key, value) == (False, True, True)


def test_shift_mask_is_a_finite_100(on_cpu_kernels):
    """At logit_scale 50 masked keys can weigh as much as the others; under −inf they cannot."""
    block, x = small_block("v2", (14, 14)), torch.randn(4, 1, 1, 16).expand(4, 14, 14, 16).clone()
    x[:, :3] *= -1  # the rows that the shift brings to the end, beside rows 10 to 13
    with torch.no_grad():
        block.attn.logit_scale.fill_(math.log(50.0))
        query, key, _ = block.attn.qkv.weight.view(3, 16, 16)
        query.copy_(-key)  # cosine −1 and logit −50 in a token's own region; 50 − 100 in the other
        block.attn.q_bias.zero_()
        infinite = copy.deepcopy(block)
        infinite.attn_mask.masked_fill_(infinite.attn_mask != 0, -math.inf)
        far = attend(infinite, x)
    actual = assert_same_output(block, x, on_cpu_kernels)
    assert (actual - far).abs().max() > 0.1


@pytest.mark.parametrize(
    "always_partition, window, shift",
    [(False, (5, 7), (0, 3)), (True, (7, 7), (3, 3))],
    ids=["shrink", "always_partition"],
)
@kinds
def test_map_smaller_than_its_window_shrinks_it_per_axis(
    kind, always_partition, window, shift, calls, on_cpu_kernels
):
    block = small_block(kind, (5, 14), always_partition=always_partition)
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 5, 14, 16) for _ in range(4)])
    assert {(c["window"], c["shift"]) for c in calls} == {(window, shift)}


@pytest.mark.parametrize("always_partition", [None, True], ids=["shrink", "always_partition"])
@kinds
def test_set_input_size_after_patch(kind, always_partition, calls, on_cpu_kernels):
    model, size = small_model(kind, 56), (72, 100)
    on_cpu_kernels(model)
    arguments = {"window_size": (6, 9), "always_partition": always_partition}
    model.set_input_size(size, **arguments)
    stock = small_model(kind, 56)
    stock.set_input_size(size, **arguments)
    for ours, theirs in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    images = [image(*size, seed=seed) for seed in range(3)]
    assert_outcomes_no_worse(*(train_steps(m, images) for m in (model, stock, double(stock))))
    assert {c["window"] for c in calls} == {(6, 9)}
    assert not any("mask" in c for c in calls)


@pytest.mark.parametrize("kind", ["v2", "cr"])
def test_fp16_with_padding_stays_finite(kind, calls, on_cpu_kernels):
    """Stock gives NaN, as 1e-12 is 0 in fp16; ours errs less than stock in coarser bf16."""
    model = small_model(kind, (60, 76))
    images = [image(60, 76, seed=seed) for seed in range(LEAST_INPUTS)]
    if kind == "cr":  # a key that is exactly 0, as V2 has by construction
        with torch.no_grad():
            for block in blocks_of(model):
                block.attn.qkv.bias.view(3, -1)[1].zero_()
    half, brain = copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16()
    assert all(half(x.half()).isnan().any() for x in images)
    exact = double(half)

    def errors(model, exact):
        """The largest of each quantity, summed over the images; `exact` has the same weights."""
        found = defaultdict(float)
        for x in images:
            rounded = x.to(next(model.parameters()).dtype)
            ours, best = train_step(model, rounded), train_step(exact, rounded.double())
            quantities = {"output": (ours.out, best.out)}
            quantities |= {name: (grad, best.grads[name]) for name, grad in ours.grads.items()}
            for name, (actual, true) in quantities.items():
                assert actual.isfinite().all(), name
                found[name] += float((actual.double() - true).abs().max())
        return found

    bounds = errors(brain, double(brain))
    on_cpu_kernels(half)
    for name, error in errors(half, exact).items():
        if not name.endswith(("qkv.bias", "meta_mlp.fc2.bias")):
            assert error <= bounds[name], name
    assert all(c["padded"] for c in calls if c["size"] != (14, 14))


def test_v2_report_notes_a_qkv_that_stock_does_not_call():
    model = small_model("v2")
    blocks_of(model)[0].attn.qkv.register_forward_hook(lambda *_: None)
    report = patch(model)
    assert list(report.notes) == ["layers.0.blocks.0"]
    assert "is not called, as in stock timm, which reads its weight only" in str(report)
    assert "qkv_bias_separate = True has it called" in str(report)


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_v2_qkv_hooks_are_called_where_stock_does(separate, on_cpu_kernels):
    seen = []
    block = small_block("v2", (12, 17))
    block.attn.qkv_bias_separate = separate
    block.attn.qkv.register_forward_hook(lambda m, args, out: seen.append(1) or out * 1.5)
    assert_same_output(block, torch.randn(4, 12, 17, 16), on_cpu_kernels)
    assert len(seen) == (3 if separate else 0)  # stock in fp64 and fp32, then ours
