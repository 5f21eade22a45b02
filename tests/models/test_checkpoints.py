"""Checkpoints of our models: what is resized, what is kept, what does not fit, and files.

Those of other libraries: test_model_weights.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

timm = pytest.importorskip("timm", reason="what a resized embedding is compared with")

from contract_cases import assert_same_bits
from own_models import SMALL, VIT, swin_with

from swin_kernels.models import (
    SimMIM,
    SwinTransformer,
    SwinTransformerV2,
    VisionTransformer,
    load,
    read,
    state_dict_for,
)
from swin_kernels.position_bias import resize_table


def test_a_bias_table_is_resized_to_the_models_window():
    small, large = swin_with(7), SwinTransformer(img_size=96, window_size=12, **SMALL)
    loaded = load(large, small.state_dict())
    tables = [n for n in small.state_dict() if n.endswith("bias_table")]
    assert sorted(loaded.resized) == sorted(tables)
    for name in tables:
        expected = resize_table(small.state_dict()[name], (7, 7), (12, 12))
        assert torch.equal(large.state_dict()[name], expected)


def test_a_position_embedding_is_resized_to_the_models_image():
    small, large = VisionTransformer(img_size=32, **VIT), VisionTransformer(img_size=48, **VIT)
    assert load(large, small.state_dict()).resized == ("pos_embed",)
    theirs = timm.layers.resample_abs_pos_embed(small.pos_embed, (6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(large.pos_embed, theirs)


def test_coordinates_of_another_pretraining_window_are_asked_for():
    trained = SwinTransformerV2(img_size=64, window_size=8, **SMALL)
    state = state_dict_for(trained, "authors")
    with pytest.raises(ValueError, match="trained on windows of 8: give pretrained_window_sizes"):
        load(SwinTransformerV2(img_size=128, window_size=16, **SMALL), state)
    told = SMALL | {"pretrained_window_sizes": (8, 8)}
    load(SwinTransformerV2(img_size=128, window_size=16, **told), state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("norm.weight"), r"missing: norm\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda s: s.update({"norm.weight": torch.zeros(3)}),
            r"norm\.weight: expected \(32,\), got",
        ),
        (lambda s: s.pop("head.weight"), "missing: head.weight; head=False keeps"),
        (lambda s: s.update({"head.weight": torch.zeros(5, 32)}), "head=False keeps"),
        (lambda s: s.update(norm=3), "expected a state dict, names with tensors, got a int under"),
        (lambda s: s.pop("patch_embed.proj.weight"), "expected a checkpoint of Swin"),
        (
            lambda s: s.update(
                {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(170, 1)}
            ),
            r"bias_table: expected \(169, 1\), got \(170, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(change, complaint):
    model = swin_with()
    before = copy.deepcopy(model.state_dict())
    state = {name: t + 1 for name, t in before.items()}
    change(state)
    with pytest.raises(ValueError, match=complaint):
        load(model, state)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_coordinates_in_half_precision_tell_their_window(dtype):
    ours = SwinTransformerV2(img_size=96, window_size=24, **SMALL)
    state = state_dict_for(ours.to(dtype), "authors")
    assert state["layers.0.blocks.0.attn.relative_coords_table"].dtype == torch.float32
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    assert load(SwinTransformerV2(img_size=96, window_size=24, **SMALL), state).missing == ()


def test_a_model_made_without_memory_takes_weights_after_to_empty(cpu_kernels):
    state = SwinTransformerV2(img_size=64, window_size=8, **SMALL).state_dict()
    with torch.device("meta"):
        model = SwinTransformerV2(img_size=64, window_size=8, **SMALL)
    with pytest.raises(ValueError, match="to_empty"):
        load(model, state)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "relative_coords_table"):
            module.relative_coords_table.fill_(torch.nan)
    load(model, state)
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_a_distilled_vit_keeps_both_its_heads():
    state = VisionTransformer(img_size=32, distilled=True, **VIT).state_dict()
    for classes in (5, 0):
        options = VIT | {"num_classes": classes, "distilled": True}
        loaded = load(VisionTransformer(img_size=32, **options), state, head=False)
        assert set(loaded.unexpected) == {
            f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
        }


def test_modules_of_the_users_are_neither_asked_for_nor_lost():
    from examples.gate import ChannelGate

    plain, gated = swin_with(), swin_with(before_attention=ChannelGate)
    loaded = load(gated, plain.state_dict())
    assert all(".before_attention." in name for name in loaded.missing)
    state = state_dict_for(gated, "timm")
    assert state.keys() > state_dict_for(plain, "timm").keys()
    again = swin_with(before_attention=ChannelGate)
    assert load(again, state).missing == ()
    assert_same_bits(again.state_dict(), gated.state_dict())


def test_a_pretrained_encoder_goes_into_a_classifier_and_a_backbone():
    pretrained = SimMIM(swin_with(num_classes=0), mask_patch_size=8)
    for state in (pretrained.state_dict(), state_dict_for(pretrained, "authors")):
        classifier, backbone = swin_with(), swin_with(features_only=True)
        loaded = load(classifier, state, head=False)
        assert {"mask_token", "decoder.0.weight"} <= {
            n.removeprefix("encoder.") for n in loaded.unexpected
        }
        load(backbone, state)
        for name, tensor in pretrained.encoder.state_dict().items():
            assert torch.equal(classifier.state_dict()[name], tensor)
            if not name.startswith("norm."):
                assert torch.equal(backbone.state_dict()[name], tensor)


def test_strict_off_takes_what_fits():
    model = swin_with()
    state = dict(model.state_dict(), extra=torch.zeros(1))
    del state["norm.bias"]
    loaded = load(model, state, strict=False)
    assert (loaded.missing, loaded.unexpected) == (("norm.bias",), ("extra",))


def test_files_are_read(tmp_path):
    from safetensors.torch import save_file

    model = swin_with()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "authors.pth")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("authors.pth", "plain.safetensors"):
        state = read(tmp_path / name)
        assert_same_bits(state, model.state_dict())
        load(swin_with(), str(tmp_path / name))
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "text.safetensors", "list.pth"):
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (swin_with, "mmdet"),
        (lambda: VisionTransformer(img_size=32, **VIT), "torchvision"),
    ],
)
def test_unknown_layout_is_refused(model, layout):
    with pytest.raises(ValueError, match="layout: "):
        state_dict_for(model(), layout)
