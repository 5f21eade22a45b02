"""Small models of swin_kernels.models for tests."""

from __future__ import annotations

import torch
from patch_models import stirred

from swin_kernels.models import SwinTransformer

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 10}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def swin_with(window: int = 7, **changes) -> SwinTransformer:
    """For images of 56 pixels, every parameter moved away from its start."""
    torch.manual_seed(0)
    return stirred(SwinTransformer(img_size=56, window_size=window, **(SMALL | changes)))
