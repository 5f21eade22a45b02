"""The three patched blocks of timm against stock: numbers, traps of the library, and every way of running it."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("timm", reason="the patches are tested on timm's models")

from patch_models import (
    KINDS,
    METHODS,
    assert_outcomes_no_worse,
    assert_same_training,
    attend,
    blocks_of,
    double,
    full_model,
    fused_blocks,
    image,
    small_block,
    small_model,
    train_step,
)
from timm.models import swin_transformer_v2

from swin_kernels import patch, unpatch
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.testing import assert_no_worse_than_eager

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def calls(monkeypatch):
    """Keyword arguments of every call that a fused block makes of the operation."""
    module = importlib.import_module("swin_kernels.patch.timm")
    op, recorded = module.shifted_window_attention_qkvpacked, []

    def recording(qkv, window, shift, **options):
        recorded.append({"size": tuple(qkv.shape[1:3]), "window": window, "shift": shift} | options)
        return op(qkv, window, shift, **options)

    monkeypatch.setattr(module, "shifted_window_attention_qkvpacked", recording)
    return recorded


@pytest.fixture
def on_cpu_kernels(cpu_kernels, monkeypatch):
    """patch on the C++ backend, which never falls back; every call is counted where it arrives."""
    arrived = []
    forward = BACKENDS["cpu"].forward

    def counted(*args):
        arrived.append(1)
        return forward(*args)

    monkeypatch.setattr(BACKENDS["cpu"], "forward", counted)

    def patch_all(model):
        report = patch(model, backend="cpu")
        assert report.left == {}
        assert report.replaced

    yield patch_all
    assert arrived, "no call reached the C++ kernels"


def assert_same_output(block: nn.Module, x: Tensor, patch_all=patch) -> Tensor:
    """Output of the attention method: stock in fp32 and fp64 against patched."""
    with torch.no_grad():
        exact, eager = attend(double(block), x.double()), attend(block, x)
        patch_all(block)
        actual = attend(block, x)
    assert_no_worse_than_eager(actual, eager, exact)
    return actual


# --- the models whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=["unpadded", "padded"])
@kinds
def test_small_model_trains_as_stock(kind, size, backend, calls):
    model = small_model(kind, size)
    images = [image(*size, seed=seed) for seed in range(3)]
    assert_same_training(model, lambda m: patch(m, backend=backend), images)
    assert len(calls) == 3 * len(blocks_of(model))
    # blocks without padding run no token of zeros
    assert {"pad_key" in c for c in calls if c["size"] == (14, 14)} <= {False}
    assert any("pad_key" in c for c in calls) == (size == (60, 76))


@pytest.mark.parametrize("size", [(224, 224), (200, 264)], ids=["224", "200x264"])
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"]
)
def test_full_model_trains_as_stock(name, size, calls, on_cpu_kernels):
    model = full_model(name, img_size=size)
    assert_same_training(model, on_cpu_kernels, [image(*size, batch=1)])
    assert len(calls) == 12
    assert any("pad_key" in c and any(c["shift"]) for c in calls) == (
        size == (200, 264) or name.startswith("swinv2_tiny")
    )


@kinds
def test_strict_img_size_false_takes_any_size(kind, calls, on_cpu_kernels):
    model = small_model(kind, 56, strict_img_size=False)
    images = [image(*size) for size in ((56, 56), (60, 76), (84, 64))]
    assert_same_training(model, on_cpu_kernels, images)
    assert {c["size"] for c in calls} >= {(14, 14), (15, 19), (21, 16)}
    assert not any("mask" in c for c in calls)


@pytest.mark.parametrize("dim, heads, head_dim", [(16, 2, None), (24, 3, 16), (20, 2, 10), (48, 1, 48)])
def test_head_dim_of_its_own(dim, heads, head_dim, on_cpu_kernels):
    block = small_block("v1", (12, 17), dim=dim, heads=heads, head_dim=head_dim)
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 12, 17, dim) for _ in range(4)])


@pytest.mark.parametrize("shift", [0, (2, 4), (0, 4), (2, 0)], ids=str)
@kinds
def test_window_that_is_not_square(kind, shift, calls, on_cpu_kernels):
    shift = shift if isinstance(shift, tuple) else (shift, shift)
    block = small_block(kind, (13, 22), window=(5, 8), shift=shift)
    block.shift_size = shift  # timm's Cr takes half the window whatever is asked
    block._init_buffers()
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 13, 22, 16) for _ in range(4)])
    assert {(c["window"], c["shift"]) for c in calls} == {((5, 8), shift)}


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_without_qkv_bias(kind, on_cpu_kernels):
    block = small_block(kind, (10, 12), qkv_bias=False)
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 10, 12, 16) for _ in range(4)])


def test_empty_batch(on_cpu_kernels):
    block = small_block("v1", (14, 14))
    on_cpu_kernels(block)
    assert attend(block, torch.randn(0, 14, 14, 16)).shape == (0, 14, 14, 16)


# --- traps ------------------------------------------------------------------------------------------------------


@kinds
def test_trap_1_rolls_before_it_pads(kind, on_cpu_kernels):
    """12 rows under window 7, shift 3: row 0 reaches rows 0, 1, 10 and 11; padding first would give 0, 1 and 2."""
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
def test_trap_2_padded_keys_and_values_reach_the_qkv_bias(kind, calls, on_cpu_kernels):
    model = small_block(kind, (12, 17))
    x = torch.randn(2, 12, 17, 16)
    others = [torch.randn(2, 12, 17, 16) for _ in range(3)]
    trained, *_ = assert_same_training(model, on_cpu_kernels, [x, *others])
    assert calls[0]["pad_key"].shape == (2, 8)
    assert calls[0]["pad_key"].requires_grad
    # without what comes through padding the k and v thirds would differ
    with_padding = trained.grads["attn.qkv.bias"]
    module = importlib.import_module("swin_kernels.patch.timm")
    op = module.shifted_window_attention_qkvpacked
    with pytest.MonkeyPatch.context() as patching:

        def detached(qkv, window, shift, pad_key, pad_value, **options):
            pads = {"pad_key": pad_key.detach(), "pad_value": pad_value.detach()}
            return op(qkv, window, shift, **pads, **options)

        patching.setattr(module, "shifted_window_attention_qkvpacked", detached)
        without = train_step(model, x).grads["attn.qkv.bias"]
    query, key, value = ((with_padding - without).abs().view(3, -1).amax(1) > 1e-4).tolist()
    assert (query, key, value) == (False, True, True)


def test_trap_3_shift_mask_is_a_finite_100(on_cpu_kernels):
    """At logit_scale 100 a masked key can win over all others: −inf in place of −100 gives another answer."""
    block, x = small_block("v2", (14, 14)), torch.randn(1, 1, 1, 16).expand(1, 14, 14, 16).clone()
    x[:, :3] *= -1  # the rows that the shift brings to the end, beside rows 10 to 13
    with torch.no_grad():
        block.attn.logit_scale.fill_(math.log(1000.0))  # the block clamps it to 100
        query, key, _ = block.attn.qkv.weight.view(3, 16, 16)
        query.copy_(-key)  # a token and one of its own region: cosine −1, logit −100; of the other: 100 − 100
        block.attn.q_bias.zero_()
        infinite = copy.deepcopy(block)
        infinite.attn_mask.masked_fill_(infinite.attn_mask != 0, -math.inf)
        far = attend(infinite, x)
    actual = assert_same_output(block, x, on_cpu_kernels)
    assert (actual - far).abs().max() > 0.1


@kinds
def test_trap_4_map_smaller_than_its_window_shrinks_it_per_axis(kind, calls, on_cpu_kernels):
    block = small_block(kind, (5, 14))
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 5, 14, 16) for _ in range(4)])
    assert {(c["window"], c["shift"]) for c in calls} == {((5, 7), (0, 3))}


@kinds
def test_trap_4_always_partition_keeps_window_and_shift(kind, calls, on_cpu_kernels):
    block = small_block(kind, (5, 14), always_partition=True)
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 5, 14, 16) for _ in range(4)])
    assert {(c["window"], c["shift"]) for c in calls} == {((7, 7), (3, 3))}


@pytest.mark.parametrize("always_partition", [None, True], ids=["shrink", "always_partition"])
@kinds
def test_trap_5_set_input_size_after_patch(kind, always_partition, calls, on_cpu_kernels):
    model, size = small_model(kind, 56), (72, 100)
    on_cpu_kernels(model)
    arguments = dict(window_size=(6, 9), always_partition=always_partition)
    model.set_input_size(size, **arguments)
    stock = small_model(kind, 56)
    stock.set_input_size(size, **arguments)
    for ours, theirs in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    exact, images = double(stock), [image(*size, seed=seed) for seed in range(3)]
    assert_outcomes_no_worse(
        [train_step(model, x) for x in images],
        [train_step(stock, x) for x in images],
        [train_step(exact, x.double()) for x in images],
    )
    assert {c["window"] for c in calls} == {(6, 9)}
    assert not any("mask" in c for c in calls)


@pytest.mark.parametrize("kind", ["v2", "cr"])
def test_trap_6_fp16_with_padding_stays_finite(kind, calls, on_cpu_kernels):
    """Stock gives NaN, as 1e-12 is 0 in fp16. fp16 has three bits more than bf16, so stock's error there bounds ours."""
    model, x = small_model(kind, (60, 76)), image(60, 76)
    if kind == "cr":  # a key that is exactly 0, as V2 has by construction
        with torch.no_grad():
            for block in blocks_of(model):
                block.attn.qkv.bias.view(3, -1)[1].zero_()
    half, brain = copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16()
    assert half(x.half()).isnan().any()
    exact = double(brain)  # each dtype against fp64 of its own weights
    rough = train_step(brain, x.bfloat16())
    best_of_brain = train_step(exact, x.bfloat16().double())
    best_of_half = train_step(double(half), x.half().double())
    on_cpu_kernels(half)
    ours = train_step(half, x.half())
    assert all(("pad_key" in c) for c in calls if c["size"] != (14, 14))
    for name, actual, eager, brain_exact, half_exact in [
        ("output", ours.out, rough.out, best_of_brain.out, best_of_half.out),
        *(
            (n, ours.grads[n], rough.grads[n], best_of_brain.grads[n], best_of_half.grads[n])
            for n in ours.grads
            if not n.endswith(("qkv.bias", "meta_mlp.fc2.bias"))
        ),
    ]:
        assert actual.isfinite().all(), name
        error = (actual.double() - half_exact).abs().max()
        assert error <= (eager.double() - brain_exact).abs().max(), name


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank update beside it, as PEFT wraps one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(base.in_features, 2))
        self.up = nn.Parameter(0.3 * torch.randn(2, base.out_features))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        # not linear in x: what it makes of a token of zeros is not its bias
        return self.base(x) + torch.cos(x) @ self.down @ self.up


def wrap(model: nn.Module, names=("qkv", "proj")) -> None:
    torch.manual_seed(1)
    for block in blocks_of(model):
        for name in names:
            setattr(block.attn, name, LoraLinear(getattr(block.attn, name)))


@pytest.mark.parametrize("kind", ["v1", "cr"])
def test_trap_7_wrapped_layers_are_called(kind, on_cpu_kernels):
    model = small_model(kind, (60, 76))
    wrap(model)
    trained = assert_same_training(model, on_cpu_kernels, [image(60, 76, seed=s) for s in range(3)])
    assert sum(name.endswith(("down", "up")) for name in trained[0].grads) == 16


def test_trap_7_v2_calls_a_wrapped_qkv_where_stock_does(on_cpu_kernels):
    """Stock V2 reads qkv.weight unless qkv_bias_separate: an adapter on qkv is then silently without effect."""
    model = small_model("v2", (60, 76))
    wrap(model)
    twin = copy.deepcopy(model)
    for block in blocks_of(twin):
        block.attn.qkv_bias_separate = True
    for m, called in ((model, False), (twin, True)):
        trained, *_ = assert_same_training(m, on_cpu_kernels, [image(60, 76, seed=s) for s in range(3)])
        assert ("layers.0.blocks.0.attn.qkv.down" in trained.grads) == called


def test_v2_report_notes_a_qkv_that_stock_does_not_call():
    model = small_model("v2")
    blocks_of(model)[0].attn.qkv.register_forward_hook(lambda *_: None)
    report = patch(model)
    assert list(report.notes) == ["layers.0.blocks.0"]
    assert "qkv_bias_separate = True has it called" in str(report)


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_v2_qkv_hooks_are_called_where_stock_does(separate, on_cpu_kernels):
    seen = []
    block = small_block("v2", (12, 17))
    block.attn.qkv_bias_separate = separate
    block.attn.qkv.register_forward_hook(lambda m, args, out: seen.append(1) or out * 1.5)
    assert_same_output(block, torch.randn(2, 12, 17, 16), on_cpu_kernels)
    # stock in fp64 and fp32, then ours for the map and for the token that padding adds
    assert len(seen) == (4 if separate else 0)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", ["attn", "attn.softmax", "attn.attn_drop"])
def test_trap_8_hooked_attention_keeps_the_stock_path(place, hook, calls):
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
def test_trap_8_hook_added_after_patch_is_called_while_it_is_there(place, calls):
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
def test_trap_8_replaced_attention_module_keeps_the_stock_path(kind, calls):
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


@pytest.mark.parametrize("name, module", [("softmax", nn.Softmin(-1)), ("attn_drop", nn.Identity())])
def test_trap_8_replaced_softmax_or_dropout_keeps_the_stock_path(name, module, calls):
    block, x = small_block("v1", (14, 14)), torch.randn(1, 14, 14, 16)
    patch(block)
    setattr(block.attn, name, module)
    stock = copy.deepcopy(block)
    unpatch(stock)
    assert torch.equal(block(x), stock(x))
    assert calls == []


# --- masks ------------------------------------------------------------------------------------------------------


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
    """Made for 14 × 28, run on 28 × 14: as many windows, in which stock's mask separates the wrong tokens."""
    block = small_block(kind, (14, 28))
    assert_same_training(block, on_cpu_kernels, [torch.randn(2, 28, 14, 16) for _ in range(4)])
    assert mask_arguments(calls) == [(True, 0.0)] * 4


@kinds
def test_static_mask_of_another_window_count_takes_the_stock_path(kind, calls):
    """Where the batch makes up for it stock runs, with masks dealt to the wrong windows; else it raises."""
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


# --- training ---------------------------------------------------------------------------------------------------


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
    assert torch.equal(first.out, again.out)
    assert all(torch.equal(first.grads[n], again.grads[n]) for n in first.grads)
    assert not torch.equal(first.out, other.out)
    block.eval()
    block(x)
    assert [c["dropout_p"] for c in calls] == [0.3, 0.3, 0.3, 0.0]


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
    assert torch.equal(plain.out, recomputed.out)
    assert all(torch.equal(plain.grads[n], recomputed.grads[n]) for n in plain.grads)


@pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=["unpadded", "padded"])
@kinds
def test_autocast_to_bf16(kind, size, on_cpu_kernels):
    model, images = small_model(kind, size), [image(*size, seed=seed) for seed in range(3)]
    best = double(model)
    exact = [train_step(best, x.double()) for x in images]
    with torch.autocast("cpu", torch.bfloat16):
        eager = [train_step(model, x) for x in images]
        on_cpu_kernels(model)
        actual = [train_step(model, x) for x in images]
    assert actual[0].out.dtype == torch.bfloat16
    assert_outcomes_no_worse(actual, eager, exact)


@kinds
def test_bf16_model(kind, on_cpu_kernels):
    model = small_model(kind, (60, 76)).bfloat16()
    images = [image(60, 76, seed=seed).bfloat16() for seed in range(3)]
    assert_same_training(model, on_cpu_kernels, images)


# --- compilers and transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=["unpadded", "padded"])
@kinds
def test_compile_fullgraph_trains_as_eager(kind, size, calls, on_cpu_kernels):
    model, x = small_model(kind, size), image(*size)
    on_cpu_kernels(model)
    eager = train_step(model, x)
    compiled = train_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(compiled.out, eager.out)
    for name, grad in eager.grads.items():
        traced = compiled.grads["_orig_mod." + name if name != "input" else name]
        torch.testing.assert_close(traced, grad)


def test_compile_with_inductor_trains_as_eager(on_cpu_kernels):
    block, x = small_block("v1", (12, 17)), torch.randn(2, 12, 17, 16)
    on_cpu_kernels(block)
    eager, compiled = train_step(block, x), train_step(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(compiled.out, eager.out)
    for name, grad in eager.grads.items():
        traced = compiled.grads["_orig_mod." + name if name != "input" else name]
        torch.testing.assert_close(traced, grad)


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
        patch(block, backend="cpu")
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
    assert "swin_kernels.window_attention_forward" in str(program.graph)


@kinds
def test_onnx_export_holds_only_stock_operators(kind, monkeypatch):
    model, x = small_model(kind), image(56, 56)
    patch(model)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert "swin_kernels" not in str(program.graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [torch.jit.script, torch.jit.trace], ids=["script", "trace"])
@kinds
def test_torchscript_records_the_stock_path(kind, record):
    model, x = small_model(kind), image(56, 56)
    expected = model(x)
    patch(model)
    with torch.no_grad():
        recorded = record(model) if record is torch.jit.script else record(model, x)
        torch.testing.assert_close(recorded(x), expected, rtol=1e-5, atol=1e-6)
    assert len(fused_blocks(model)) == 4
    assert "swin_kernels::" not in str(recorded.inlined_graph)


@kinds
def test_fx_records_the_stock_path(kind):
    from timm.models._features_fx import create_feature_extractor

    model, x = small_model(kind), image(56, 56)
    expected = model(x)
    patch(model)
    extractor = create_feature_extractor(model, return_nodes=["head"])
    assert torch.equal(extractor(x)["head"], expected)


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

    ours, theirs = per_sample(model), per_sample(stock)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


def test_model_made_in_inference_mode(calls):
    with torch.inference_mode():
        block, x = small_block("v1", (12, 17)), torch.randn(1, 12, 17, 16)
        expected = block(x)
        patch(block)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
    # such a mask has no version, so a change in place could not be seen
    assert mask_arguments(calls) == [(True, 0.0)]
