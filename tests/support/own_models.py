"""Small models of swin_kernels.models for tests."""

from __future__ import annotations

import torch
from torch import nn

from swin_kernels.models import SwinTransformer

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def stirred(model: nn.Module) -> nn.Module:
    """Every parameter moved away from its start, where biases and the norms of Cr are 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("logit_scale"):
                parameter.add_(0.5 * noise)
            else:
                parameter.add_(0.05 * noise)
    return model


def swin_with(window: int = 7, **changes) -> SwinTransformer:
    """For images of 56 pixels, every parameter moved away from its start."""
    torch.manual_seed(0)
    return stirred(SwinTransformer(img_size=56, window_size=window, **(SMALL | changes)))
