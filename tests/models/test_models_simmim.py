"""SimMIM: what is hidden is not seen, and nothing else counts. Against transformers':
test_model_weights.py.
"""

from __future__ import annotations

import pytest
import torch
from own_models import SMALL, VIT

from swin_kernels.models import (
    SimMIM,
    SwinTransformer,
    SwinTransformerV2,
    VisionTransformer,
    random_masks,
)

SWIN = SMALL | {"num_classes": 0}
ENCODERS = {
    "v1": lambda: SwinTransformer(img_size=64, window_size=4, drop_path_rate=0.0, **SWIN),
    "v2": lambda: SwinTransformerV2(img_size=64, window_size=4, drop_path_rate=0.0, **SWIN),
    "vit": lambda: VisionTransformer(img_size=64, **(VIT | {"num_classes": 0})),
}
over_encoders = pytest.mark.parametrize("kind", ENCODERS)


def make(kind: str) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(ENCODERS[kind](), mask_patch_size=16)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 10), (0.5, 8), (0, 0), (1, 16)])
def test_each_image_hides_the_share_rounded_up(ratio, hidden):
    masks = random_masks(5, (4, 4), ratio, torch.Generator().manual_seed(0))
    assert masks.dtype == torch.bool
    assert masks.flatten(1).sum(1).tolist() == [hidden] * 5
    again = random_masks(5, (4, 4), ratio, torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)
    if 0 < ratio < 1:
        assert not torch.equal(masks[0], masks[1])


@over_encoders
def test_hidden_pixels_are_not_seen(kind, cpu_kernels):
    """The squares of the mask are those of the image, pixel for pixel."""
    model = make(kind).eval()
    image, mask = torch.randn(2, 3, 64, 64), random_masks(2, (4, 4))
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = torch.where(hidden, torch.randn_like(image), image)
    assert torch.equal(model.reconstruct(image, mask), model.reconstruct(other, mask))
    seen = torch.where(hidden, image, torch.randn_like(image))
    assert not torch.equal(model.reconstruct(image, mask), model.reconstruct(seen, mask))


@over_encoders
def test_loss_is_the_mean_error_of_hidden_pixels(kind, cpu_kernels):
    model = make(kind)
    image, mask = torch.randn(2, 3, 64, 64), random_masks(2, (4, 4))
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(image)
    error = (model.reconstruct(image, mask) - image)[hidden].abs().mean()
    loss = model(image, mask)
    torch.testing.assert_close(loss, error)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert model.mask_token.grad.abs().sum() > 0


def test_an_image_that_squares_do_not_divide(cpu_kernels):
    model = make("v1")
    image = torch.randn(1, 3, 50, 70)
    assert model.masks(image).shape == (1, 4, 5)
    assert model.reconstruct(image, model.masks(image)).shape == image.shape
    assert torch.isfinite(model(image))


def test_many_hidden_pixels_do_not_overflow_fp16(cpu_kernels):
    image = 60 * torch.ones(8, 3, 64, 64, dtype=torch.float16)
    assert torch.isfinite(make("v1").half()(image))


def test_nothing_hidden_has_no_error(cpu_kernels):
    assert make("v1")(torch.randn(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: SimMIM(ENCODERS["v1"](), mask_patch_size=6), "mask_patch_size: expected a mult"),
        (lambda: SimMIM(ENCODERS["v1"](), 16, mask_ratio=0), "mask_ratio: expected above 0"),
        (lambda: SimMIM(SwinTransformer(features_only=True, **SWIN)), "expected one that ends"),
        (lambda: random_masks(1, (2, 2), 1.5), "ratio: expected between 0 and 1"),
        (
            lambda: make("v1")(torch.randn(1, 3, 64, 64), torch.zeros(1, 16, 16) > 0),
            r"mask: expected \(1, 4, 4\) of bool",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()
