"""Swin V1 and V2, ViT and SimMIM in plain PyTorch round the fused operation, at any image size."""

from swin_kernels.models.checkpoints import Loaded, load, read, state_dict_for
from swin_kernels.models.simmim import SimMIM, random_masks
from swin_kernels.models.swin import SwinConfig, SwinTransformer, swin
from swin_kernels.models.swin_v2 import SwinTransformerV2, SwinV2Config, swin_v2
from swin_kernels.models.vit import VisionTransformer, ViTConfig, vit

__all__ = [
    "Loaded",
    "SimMIM",
    "SwinConfig",
    "SwinTransformer",
    "SwinTransformerV2",
    "SwinV2Config",
    "ViTConfig",
    "VisionTransformer",
    "load",
    "random_masks",
    "read",
    "state_dict_for",
    "swin",
    "swin_v2",
    "vit",
]
