"""Swin V1 and V2, ViT: sizes and cost as published, any image, fused against reference, errors.

Against timm's, torchvision's and transformers': test_model_weights.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from own_models import SMALL, VIT
from torch.utils.flop_counter import FlopCounterMode

from examples.gate import ChannelGate
from swin_kernels.models import (
    SwinTransformer,
    SwinTransformerV2,
    SwinV2Config,
    VisionTransformer,
    swin,
    swin_v2,
    vit,
)

CLASSES = {"v1": SwinTransformer, "v2": SwinTransformerV2, "vit": VisionTransformer}
WINDOWS = {"v1": 7, "v2": 8}
kinds = pytest.mark.parametrize("kind", WINDOWS)


def small(kind: str, **options) -> torch.nn.Module:
    """Two windows a side at an image of 56 or 64."""
    window = WINDOWS[kind]
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.0} | SMALL | options
    model = CLASSES[kind](img_size=8 * window, window_size=window, **options)
    with torch.no_grad():  # V2's branches begin with nothing
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(1.0)
    return model


def test_new_blocks_of_v2_change_nothing():
    """Norms behind the branches begin with zero, so that a deep model begins as the identity."""
    model = SwinTransformerV2(img_size=64, window_size=8, **SMALL)
    x = torch.randn(1, 16, 16, model.layers[0].blocks[0].norm1.normalized_shape[0])
    for block in model.layers[0].blocks:
        assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("make", "name", "millions"),
    [
        (swin, "swin_tiny_patch4_window7_224", 28.29),
        (swin, "swin_small_patch4_window7_224", 49.61),
        (swin, "swin_base_patch4_window7_224", 87.77),
        (swin, "swin_large_patch4_window7_224", 196.53),
        (swin_v2, "swinv2_tiny_window8_256", 28.35),
        (swin_v2, "swinv2_small_window8_256", 49.73),
        (swin_v2, "swinv2_base_window12to16_192to256", 87.92),
        (swin_v2, "swinv2_large_window12to24_192to384", 196.74),
        (swin_v2, "swinv2_huge", pytest.approx(658, abs=0.5)),
        (swin_v2, "swinv2_giant", pytest.approx(3002, abs=0.5)),
        (vit, "vit_base_patch16_224", 86.57),
        (vit, "vit_base_patch32_224", 88.22),
        (vit, "vit_large_patch16_224", 304.33),
        (vit, "vit_large_patch32_224", 306.54),
        (vit, "vit_huge_patch14_224", 632.05),
    ],
)
def test_parameters_are_as_many_as_published(make, name, millions):
    with torch.device("meta"):
        model = make(name)
        logits = model(torch.empty(2, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("make", "name", "size", "gmacs"),
    [
        (swin, "swin_tiny_patch4_window7_224", 224, 4.5),
        (swin, "swin_small_patch4_window7_224", 224, 8.7),
        (swin, "swin_base_patch4_window7_224", 224, 15.4),
        (swin, "swin_large_patch4_window7_224", 224, 34.5),
        (swin, "swin_base_patch4_window12_384", 384, 47.1),
        (swin_v2, "swinv2_tiny_window8_256", 256, 5.9),
        (swin_v2, "swinv2_small_window16_256", 256, 12.6),
        (swin_v2, "swinv2_base_window16_256", 256, 21.8),
    ],
)
def test_multiplications_are_as_many_as_published(make, name, size, gmacs):
    """Of an image: V2's bias network, which does not depend on it, is not counted."""
    with torch.device("meta"):
        model = make(name, attention="reference")
        flops = []
        for batch in (1, 2):
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(batch, 3, size, size))
            flops.append(counter.get_total_flops())
    assert (flops[1] - flops[0]) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_the_giant_takes_its_largest_images():
    with torch.device("meta"):
        model = swin_v2("swinv2_giant", features_only=True)
        maps = model(torch.empty(1, 3, 1536, 1536))
    assert [tuple(x.shape) for x in maps] == [
        (1, 512, 384, 384),
        (1, 1024, 192, 192),
        (1, 2048, 96, 96),
        (1, 4096, 48, 48),
    ]


@kinds
def test_fused_and_reference_attention_agree(kind, cpu_kernels):
    fused, reference = small(kind), small(kind, attention="reference")
    image = torch.randn(2, 3, 50, 61)  # windows and patches do not divide it
    torch.testing.assert_close(fused(image), reference(image))


@pytest.mark.slow
@kinds
def test_fused_and_reference_train_alike(kind, cpu_kernels):
    """Eighty steps of AdamW from one seed, with stochastic depth; in float64, as the steps amplify
    what float32 rounds."""
    images = torch.randn(16, 3, 56, 56, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(16) % 10
    curves = []
    for attention in ("fused", "reference"):
        model = small(kind, attention=attention, drop_path_rate=0.1).double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        torch.manual_seed(1)
        for step in range(80):
            chosen = [(4 * step + i) % 16 for i in range(4)]
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-4:].mean() < 0.8 * curves[0][:4].mean()
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)


def test_features_are_four_maps_of_strides_4_to_32(cpu_kernels):
    model = SwinTransformer(features_only=True, embed_dim=16, depths=(1,) * 4, num_heads=(1,) * 4)
    shapes = [tuple(x.shape) for x in model(torch.randn(1, 3, 96, 65))]
    assert shapes == [(1, 16, 24, 17), (1, 32, 12, 9), (1, 64, 6, 5), (1, 128, 3, 3)]


def test_a_vit_takes_any_image_and_has_a_map(cpu_kernels):
    model = VisionTransformer(img_size=32, **VIT).eval()
    image = torch.randn(2, 3, 45, 64)
    assert model(image).shape == (2, 10)
    assert model.forward_map(image).shape == (2, 6, 8, 32)


def test_distilled_training_gives_a_pair_and_inference_their_mean(cpu_kernels):
    model = VisionTransformer(img_size=32, distilled=True, representation_size=16, **VIT)
    model.distilled_training = True
    image = torch.randn(2, 3, 32, 32)
    first, second = model(image)
    torch.testing.assert_close(model.eval()(image), (first + second) / 2)


@pytest.mark.parametrize("kind", ["v2", "vit"])
def test_checkpointing_changes_no_gradient(kind, cpu_kernels):
    model = small(kind) if kind in WINDOWS else VisionTransformer(img_size=64, **VIT)
    image = torch.randn(2, 3, 64, 64, requires_grad=True)
    (plain,) = torch.autograd.grad(model(image).square().sum(), image)
    model.set_checkpointing()
    (again,) = torch.autograd.grad(model(image).square().sum(), image)
    assert torch.equal(again, plain)


@kinds
def test_a_module_of_the_users_stands_before_attention(kind, cpu_kernels):
    """The gate of examples/gate.py: open, a model is what it was; shut, no attention is left."""
    plain = small(kind).eval()
    gated = small(kind, before_attention=lambda c: ChannelGate(c, open_at=100.0)).eval()
    added = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(".before_attention." in name for name in added)
    image = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(gated(image), plain(image))
    other = copy.deepcopy(gated)
    gate = other.layers[1].blocks[0].before_attention.gate
    with torch.no_grad():
        gate.weight.add_(1.0)
        gate.bias.zero_()
    assert not torch.allclose(other(image), plain(image))
    other.train()(image).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("v1", {"attention": "fast"}, "attention: expected one of"),
        ("v1", {"attention": "reference", "backend": "cpu"}, "has no backend"),
        ("v1", {"depths": (2,)}, "depths and num_heads: expected one number a stage"),
        ("v1", {"num_heads": (5, 6, 12, 24)}, "num_heads: expected a divisor of the 96 channels"),
        ("v1", {"depths": (2, 0, 6, 2)}, "depths and num_heads: expected at least 1"),
        ("v1", {"num_classes": -1}, "num_classes: expected a number of at least 0, got -1"),
        ("v1", {"window_size": (7, 7)}, "window_size: expected a number of at least 1"),
        ("v1", {"pad_order": "roll"}, "pad_order: expected one of"),
        ("v1", {"config": SwinV2Config()}, "config: expected a SwinConfig, got a SwinV2Config"),
        ("v1", {"drop_path_rate": 1.0}, "drop_path: expected a probability below 1"),
        ("v2", {"pretrained_window_sizes": (8,)}, "sizes: expected one for each of 4"),
        ("v2", {"pretrained_window_sizes": (8, 8, -1, 8)}, "sizes: expected one for each of 4"),
        ("vit", {"img_size": 30}, "img_size: expected a multiple of the patches"),
        ("vit", {"num_heads": 5}, "num_heads: expected a divisor"),
        ("vit", {"attention": "fast"}, "attention: expected one of"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(kind, options, complaint):
    with torch.device("meta"), pytest.raises(ValueError, match=complaint):
        CLASSES[kind](**options)


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 8, 8), torch.zeros(1, 3, 0, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["3-d", "empty", "uint8"],
)
@pytest.mark.parametrize("kind", ["v1", "vit"])
def test_an_image_that_is_none_is_an_error(kind, image):
    with torch.device("meta"):
        model = CLASSES[kind]()
    with pytest.raises(ValueError, match=r"image: expected \(B, 3, height, width\) of floating"):
        model(image)


def test_modules_of_the_users_keep_the_weights_they_came_with():
    class Scale(torch.nn.Linear):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels)
            torch.nn.init.constant_(self.weight, 0.25)

    model = small("v1", before_attention=Scale)
    assert (model.layers[0].blocks[0].before_attention.weight == 0.25).all()


@pytest.mark.parametrize(
    ("make", "known"), [(swin, "swin_tiny_patch4_window7_224"), (vit, "vit_base_patch16_224")]
)
def test_an_unknown_name_lists_the_known(make, known):
    with pytest.raises(ValueError, match=f"expected one of {known}"):
        make("swin_huge")
