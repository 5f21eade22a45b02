"""ViT: sizes as published, any image, two tokens, errors. Against timm's: test_model_weights.py."""

from __future__ import annotations

import pytest
import torch
from own_models import VIT

from swin_kernels.models import VisionTransformer, vit


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_base_patch16_224", 86.57),
        ("vit_base_patch32_224", 88.22),
        ("vit_large_patch16_224", 304.33),
        ("vit_large_patch32_224", 306.54),
        ("vit_huge_patch14_224", 632.05),
    ],
)
def test_parameters_are_as_many_as_published(name, millions):
    with torch.device("meta"):
        model = vit(name)
        logits = model(torch.randn(2, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)
    assert logits.shape == (2, 1000)


def test_any_image_has_logits_and_a_map(cpu_kernels):
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


def test_checkpointing_changes_no_gradient(cpu_kernels):
    model = VisionTransformer(img_size=32, **VIT)
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    (plain,) = torch.autograd.grad(model(image).square().sum(), image)
    model.set_checkpointing()
    (again,) = torch.autograd.grad(model(image).square().sum(), image)
    assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"img_size": 30}, "img_size: expected a multiple of the patches"),
        ({"num_heads": 5}, "num_heads: expected a divisor"),
        ({"attention": "fast"}, "attention: expected one of"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        VisionTransformer(**(VIT | {"img_size": 32} | options))


def test_bad_images_and_names_are_errors():
    with pytest.raises(ValueError, match=r"image: expected \(B, 3, height, width\)"):
        VisionTransformer(img_size=32, **VIT)(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="expected one of vit_base_patch16_224"):
        vit("vit_tiny")
