"""Swin V1 and V2 in plain PyTorch round the fused operation, for any size of image."""

from swin_kernels.models.swin import SwinConfig, SwinTransformer, swin
from swin_kernels.models.swin_v2 import SwinTransformerV2, SwinV2Config, swin_v2

__all__ = [
    "SwinConfig",
    "SwinTransformer",
    "SwinTransformerV2",
    "SwinV2Config",
    "swin",
    "swin_v2",
]
