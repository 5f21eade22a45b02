"""Our models with the weights of timm's, torchvision's and transformers': their logits and
gradients, their names in and out.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swin_kernels.models import (
    SimMIM,
    SwinTransformer,
    SwinTransformerV2,
    VisionTransformer,
    load,
    state_dict_for,
)
from swin_kernels.models.simmim import random_masks

timm = pytest.importorskip("timm", reason="what models are compared with")
torchvision = pytest.importorskip("torchvision", reason="what models are compared with")
transformers = pytest.importorskip("transformers", reason="what models are compared with")

from contract_cases import assert_same_bits
from own_models import SMALL, VIT, stirred, swin_with
from patch_models import Outcome, assert_outcomes_no_worse, train_steps
from timm.models.deit import VisionTransformerDistilled
from torchvision.models import swin_transformer as tv

WINDOW = {SwinTransformer: 7, SwinTransformerV2: 8}
Size = int | tuple[int, int]


def timm_swin(size: Size) -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(size, window_size=7, **SMALL)


def timm_swinv2(size: Size) -> nn.Module:
    return timm.models.swin_transformer_v2.SwinTransformerV2(size, window_size=8, **SMALL)


def timm_vit(size: Size, cls: type = timm.models.VisionTransformer) -> nn.Module:
    return cls(img_size=32, dynamic_img_size=True, **VIT)


def timm_deit(size: Size) -> nn.Module:
    return timm_vit(size, VisionTransformerDistilled)


def timm_vit_with_pre_logits(size: Size) -> nn.Module:
    """timm's own has had none since 0.9: its place is before the head."""
    model = timm_vit(size)
    model.pre_logits = nn.Sequential()
    model.pre_logits.fc = nn.Linear(32, 32)
    model.head.register_forward_pre_hook(lambda _, args: model.pre_logits(*args).tanh())
    return model


def torchvision_swin(size: Size, window: int = 7, **options) -> nn.Module:
    sizes = {"patch_size": [4, 4], "window_size": [window] * 2, "stochastic_depth_prob": 0.0}
    return tv.SwinTransformer(**sizes, **SMALL, **options)


def torchvision_swinv2(size: Size) -> nn.Module:
    layers = {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2}
    return torchvision_swin(size, 8, **layers)


def _config(cls: type, size: Size, window: int):
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "num_labels": 10}
    others = {"drop_path_rate": 0.0, "encoder_stride": 8}
    return cls(image_size=size, window_size=window, **sizes, **others)


def _classifier(kind: str, size: Size, window: int) -> nn.Module:
    """The model of transformers', returning what others do."""
    config = _config(getattr(transformers, f"{kind}Config"), size, window)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model.register_forward_hook(lambda _, args, out: out.logits)
    return model


def transformers_swin(size: Size) -> nn.Module:
    return _classifier("Swin", size, 7)


def transformers_swinv2(size: Size) -> nn.Module:
    return _classifier("Swinv2", size, 8)


# whose, ours, the names that its state dict has
MODELS = {
    timm_swin: (SwinTransformer, "timm"),
    timm_swinv2: (SwinTransformerV2, "timm"),
    timm_vit: (VisionTransformer, "timm"),
    timm_deit: (VisionTransformer, "timm"),
    timm_vit_with_pre_logits: (VisionTransformer, "timm"),
    torchvision_swin: (SwinTransformer, "torchvision"),
    torchvision_swinv2: (SwinTransformerV2, "torchvision"),
    transformers_swin: (SwinTransformer, "transformers"),
    transformers_swinv2: (SwinTransformerV2, "transformers-old"),
}
over_models = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


SIZES = {"native": 1, "twice": 2, "padded": (72, 88)}  # the last in pixels


def made(make, of: Size = 1) -> tuple[nn.Module, nn.Module, tuple[int, int]]:
    """Theirs for an image `of` that many times the native size, ours for the native one; the size.

    Where windows do not divide a map, timm rolls and then pads: `pad_order` tells ours.
    """
    cls = MODELS[make][0]
    native = 8 * WINDOW[cls] if cls in WINDOW else 32
    torch.manual_seed(0)
    size = of if isinstance(of, tuple) else (of * native, of * native)
    theirs = stirred(make(size)).eval()
    for module in theirs.modules():  # torchvision and the authors keep a bias of keys at 0
        if isinstance(module, tv.ShiftedWindowAttentionV2):
            module.qkv.bias.data.chunk(3)[1].zero_()
    if cls in WINDOW:
        order = "roll-pad" if MODELS[make][1] == "timm" else "pad-roll"
        sizes = {"img_size": native, "window_size": WINDOW[cls], "pad_order": order}
        ours = cls(drop_path_rate=0.0, **sizes, **SMALL)
    else:
        ours = cls(
            img_size=32,
            distilled=make is timm_deit,
            representation_size=32 if make is timm_vit_with_pre_logits else 0,
            **VIT,
        )
    return theirs, ours.eval(), size


def renamed(ours: nn.Module, outcome: Outcome) -> Outcome:
    """Gradients under our names."""
    like = copy.deepcopy(ours).to(outcome.out.dtype)
    load(like, {n: g for n, g in outcome.grads.items() if n != "input"})
    grads = {n: p.detach() for n, p in like.named_parameters()}
    return Outcome(outcome.out, grads | {"input": outcome.grads["input"]})


@pytest.mark.parametrize("of", SIZES.values(), ids=SIZES)
@over_models
def test_logits_and_gradients_are_theirs(make, of, cpu_kernels):
    theirs, ours, size = made(make, of)
    loaded = load(ours, theirs.state_dict())
    assert (loaded.layout, loaded.resized, loaded.missing) == (MODELS[make][1], (), ())
    images = [torch.randn(2, 3, *size) for _ in range(3)]
    found = train_steps(ours, images)
    eager, exact = (
        [renamed(ours, outcome) for outcome in train_steps(theirs.to(dtype), images)]
        for dtype in (torch.float32, torch.float64)
    )
    assert_outcomes_no_worse(found, eager, exact)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["bare", "wrapped"])
@over_models
def test_what_came_in_goes_out_bit_for_bit(make, prefix):
    theirs, ours, _ = made(make)
    before = theirs.state_dict()
    assert load(ours, {prefix + name: t for name, t in before.items()}).unexpected == ()
    after = state_dict_for(ours, MODELS[make][1])
    assert_same_bits(after, before)
    theirs.load_state_dict(after)


@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
def test_the_authors_names_and_buffers(cls):
    ours = cls(img_size=64, window_size=8, **SMALL)
    state = state_dict_for(ours, "authors")
    if cls is SwinTransformerV2:  # timm's has the same window, and so the same buffers
        blocks = [(n, m) for n, m in timm_swinv2(64).named_modules() if hasattr(m, "attn_mask")]
        for name, block in blocks:
            mask, attn = state.get(f"{name}.attn_mask"), block.attn
            assert (block.attn_mask is None) == (mask is None)
            assert mask is None or torch.equal(block.attn_mask, mask)
            index = state[f"{name}.attn.relative_position_index"]
            assert torch.equal(attn.relative_position_index, index)
            coordinates = state[f"{name}.attn.relative_coords_table"]
            assert torch.equal(attn.relative_coords_table.reshape(coordinates.shape), coordinates)
    again = cls(img_size=64, window_size=8, **SMALL)
    loaded = load(again, {"model." + n: t for n, t in state.items()})
    assert loaded.layout == "authors"
    assert_same_bits(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (SwinTransformer, "swin_tiny_patch4_window7_224"),
        (SwinTransformerV2, "swinv2_tiny_window8_256"),
    ],
    ids=["v1", "v2"],
)
def test_backbones_of_timm_go_both_ways(cls, name):
    """features_only=True: stages are attributes of their own, and nothing comes after them."""
    sizes = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}
    theirs = timm.create_model(name, features_only=True, **sizes)
    theirs = stirred(theirs).eval()
    window = {"img_size": WINDOW[cls] * 32, "window_size": WINDOW[cls], "pad_order": "roll-pad"}
    ours = cls(features_only=True, drop_path_rate=0.0, **window, **sizes).eval()
    assert load(ours, theirs.state_dict()).layout == "timm-features"
    for norm in ours.out_norms:  # timm has none
        norm.forward = lambda x: x
    image = torch.randn(1, 3, WINDOW[cls] * 32, WINDOW[cls] * 32)
    with torch.no_grad():
        for mine, map_of_theirs in zip(ours(image), theirs(image), strict=True):
            torch.testing.assert_close(
                mine.permute(0, 2, 3, 1), map_of_theirs, rtol=1e-4, atol=1e-4
            )
    assert_same_bits(state_dict_for(ours, "timm-features"), theirs.state_dict())


def test_transformers_names_before_version_5(tmp_path):
    """transformers renames them itself when it loads a file."""
    ours = swin_with()
    state = state_dict_for(ours, "transformers-old")
    assert "swin.encoder.layers.0.blocks.1.attention.self.query.weight" in state
    assert "swin.encoder.layers.0.blocks.1.intermediate.dense.bias" in state
    again = SwinTransformer(img_size=56, **SMALL)
    assert load(again, state).layout == "transformers-old"
    assert_same_bits(again.state_dict(), ours.state_dict())
    model = transformers.SwinForImageClassification(_config(transformers.SwinConfig, 56, 7))
    assert len(state) == len(model.state_dict())
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    theirs = transformers.SwinForImageClassification.from_pretrained(tmp_path)
    assert_same_bits(theirs.state_dict(), state_dict_for(ours, "transformers"))


@pytest.mark.parametrize("make", [transformers_swin, transformers_swinv2])
def test_simmim_is_transformers(make, cpu_kernels):
    theirs, ours, (size, _) = made(make)
    kind = {
        transformers_swin: transformers.SwinForMaskedImageModeling,
        transformers_swinv2: transformers.Swinv2ForMaskedImageModeling,
    }[make]
    torch.manual_seed(1)
    config = theirs.config
    config.image_size = size  # of one number, it asks here
    theirs = stirred(kind(config)).eval()
    cls = type(ours)
    changes = SMALL | {"num_classes": 0}
    encoder = cls(img_size=size, window_size=WINDOW[cls], drop_path_rate=0.0, **changes)
    ours = SimMIM(encoder, mask_patch_size=8).eval()
    loaded = load(ours, theirs.state_dict())
    assert loaded.missing == ()
    image = torch.randn(2, 3, size, size)
    mask = random_masks(2, (size // 8, size // 8))
    patches = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    out = theirs(image, bool_masked_pos=patches)
    torch.testing.assert_close(ours(image, mask), out.loss, rtol=1e-5, atol=0)  # it adds 1e-5
    torch.testing.assert_close(ours.reconstruct(image, mask), out.reconstruction)
    assert_same_bits(state_dict_for(ours, MODELS[make][1]), theirs.state_dict())


def test_a_backbone_of_transformers_is_ours():
    config = _config(transformers.SwinConfig, 56, 7)
    config.out_features = ["stage1", "stage2"]
    theirs = stirred(transformers.SwinBackbone(config)).eval()
    ours = swin_with(features_only=True).eval()
    loaded = load(ours, theirs.state_dict())
    assert loaded.missing == ()
    image = torch.randn(1, 3, 112, 112)  # at 56 theirs shifts where one window covers the map
    for found, expected in zip(ours(image), theirs(image).feature_maps):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "tensor", "complaint"),
    [
        (torchvision_swinv2, "features.1.0.attn.qkv.bias", torch.zeros(()), "three parts of"),
        (torchvision_swinv2, "features.1.0.attn.qkv.bias", torch.zeros(2), "three parts of"),
        (
            transformers_swin,
            "swin.encoder.layers.0.blocks.0.attention.q_proj.weight",
            torch.zeros(16, 5),
            "parts of one width",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(make, name, tensor, complaint):
    theirs, ours, _ = made(make)
    with pytest.raises(ValueError, match=complaint):
        load(ours, dict(theirs.state_dict()) | {name: tensor})
