"""Swin V1 and V2 against timm's: the same weights, the same logits and gradients."""

from __future__ import annotations

import pytest
import torch

from swin_kernels.models import SwinTransformer, SwinTransformerV2, swin, swin_v2
from swin_kernels.testing import assert_no_worse_than_eager

timm = pytest.importorskip("timm", reason="what models are compared with")

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10}
KINDS = {
    "v1": (timm.models.swin_transformer.SwinTransformer, SwinTransformer, 7),
    "v2": (timm.models.swin_transformer_v2.SwinTransformerV2, SwinTransformerV2, 8),
}


def pair(kind: str, size: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """timm's model at `size`, and ours, made for two windows a side, with its weights."""
    theirs_of, ours_of, window = KINDS[kind]
    torch.manual_seed(0)
    theirs = theirs_of(img_size=size, window_size=window, drop_path_rate=0.0, **SMALL)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = ours_of(img_size=8 * window, window_size=window, drop_path_rate=0.0, **SMALL)
    state = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.replace("head.fc", "head").split(".")
        if parts[0] == "layers" and parts[2] == "downsample":  # timm's stages begin with it
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = tensor
    ours.load_state_dict(state)
    return theirs, ours


def outcome(model: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the image."""
    image = image.clone().requires_grad_()
    logits = model(image)
    (grad,) = torch.autograd.grad(logits.square().sum(), image)
    return logits.detach(), grad


@pytest.mark.parametrize("windows", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_timms(kind, windows, cpu_kernels):
    size = 4 * windows * KINDS[kind][2]
    theirs, ours = pair(kind, size)
    image = torch.randn(4, 3, size, size)
    found, eager = outcome(ours, image), outcome(theirs, image)
    exact = outcome(theirs.double(), image.double())
    for name, a, b, best in zip(("logits", "gradient"), found, eager, exact):
        assert_no_worse_than_eager(a, b, best, name=name)


@pytest.mark.parametrize(
    ("make", "name", "millions"),
    [
        (swin, "swin_tiny_patch4_window7_224", 28.29),
        (swin, "swin_small_patch4_window7_224", 49.61),
        (swin, "swin_base_patch4_window7_224", 87.77),
        (swin, "swin_large_patch4_window7_224", 196.53),
        (swin_v2, "swinv2_tiny_window8_256", 28.35),
        (swin_v2, "swinv2_giant", 3002),
    ],
)
def test_parameters_are_as_many_as_published(make, name, millions):
    with torch.device("meta"):
        model = make(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_fused_and_reference_attention_agree(cpu_kernels):
    _, fused = pair("v1", 56)
    reference = SwinTransformer(
        attention="reference", img_size=56, window_size=7, drop_path_rate=0.0, **SMALL
    )
    reference.load_state_dict(fused.state_dict())
    image = torch.randn(2, 3, 50, 61)  # windows and patches do not divide it
    torch.testing.assert_close(fused(image), reference(image))


def test_features_are_four_maps_of_strides_4_to_32(cpu_kernels):
    model = SwinTransformer(features_only=True, embed_dim=16, depths=(1,) * 4, num_heads=(1,) * 4)
    shapes = [tuple(x.shape) for x in model(torch.randn(1, 3, 96, 65))]
    assert shapes == [(1, 16, 24, 17), (1, 32, 12, 9), (1, 64, 6, 5), (1, 128, 3, 3)]


def test_checkpointing_changes_no_gradient(cpu_kernels):
    _, model = pair("v2", 64)
    image = torch.randn(2, 3, 64, 64)
    plain = outcome(model, image)
    model.set_checkpointing()
    for a, b in zip(outcome(model, image), plain):
        assert torch.equal(a, b)


def test_a_module_of_the_users_stands_before_attention(cpu_kernels):
    model = SwinTransformer(before_attention=torch.nn.LayerNorm, img_size=56, **SMALL)
    assert isinstance(model.layers[1].blocks[0].before_attention, torch.nn.LayerNorm)
    assert model(torch.randn(1, 3, 56, 56)).shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attention": "fast"}, "attention: expected one of"),
        ({"attention": "reference", "backend": "cpu"}, "has no backend"),
        ({"depths": (2,)}, "depths and num_heads: expected one number a stage"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads: expected a divisor of the 96 channels"),
        ({"drop_path_rate": 1.0}, "drop_path: expected a probability below 1"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, complaint):
    with torch.device("meta"), pytest.raises(ValueError, match=complaint):
        SwinTransformer(**options)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="expected one of swin_tiny_patch4_window7_224"):
        swin("swin_huge")
