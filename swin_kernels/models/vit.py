"""Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) on the same operation.

Global attention is window attention with one window that covers the whole line of tokens. Modules
and parameters are named as in timm's vision_transformer.py, whose state dicts load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_kernels.models.attention import backend_of
from swin_kernels.models.layers import (
    PatchEmbed,
    check_least,
    drop_path_rates,
    initialise,
    make_head,
    run_blocks,
)
from swin_kernels.models.swin import Replace, SwinBlock
from swin_kernels.ops.layers import attention_of_qkv

NORM_EPS = 1e-6  # the authors'; Swin's is torch's own 1e-5


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is made of; `img_size` is that of its weights' position embedding."""

    patch_size: int = 16  #: pixels on a side of a patch
    embed_dim: int = 768  #: channels of a token
    depth: int = 12  #: blocks
    num_heads: int = 12  #: heads of each block; a divisor of embed_dim
    img_size: int = 224  #: pixels on a side; a multiple of patch_size
    in_chans: int = 3  #: channels of the image
    num_classes: int = 1000  #: outputs of the head, 0 for no head
    mlp_ratio: float = 4.0  #: hidden channels of an MLP per channel of a token
    representation_size: int = 0  #: of the linear layer and tanh before the head, 0 for none
    distilled: bool = False  #: a second token and head (Touvron et al., ICML 2021)
    drop_rate: float = 0.0  #: dropout of position embeddings, projections and MLPs
    attn_drop_rate: float = 0.0  #: dropout of attention probabilities
    drop_path_rate: float = 0.0  #: stochastic depth of the last block, linear from 0 in the first

    def __post_init__(self) -> None:
        check_least(self, 1, "patch_size", "embed_dim", "depth", "img_size", "in_chans")
        check_least(self, 0, "num_classes", "mlp_ratio", "representation_size")
        if self.img_size % self.patch_size != 0:
            raise ValueError(
                f"img_size: expected a multiple of the patches of {self.patch_size}, "
                f"got {self.img_size}"
            )
        if self.num_heads < 1 or self.embed_dim % self.num_heads != 0:
            raise ValueError(
                f"num_heads: expected a divisor of the {self.embed_dim} channels, "
                f"got {self.num_heads}"
            )

    @property
    def grid(self) -> int:
        """Patches on a side of an image of `img_size`."""
        return self.img_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Class token, and the distillation token where there is one."""
        return 2 if self.distilled else 1


_SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
CONFIGS = {
    f"vit_{size}_patch{patch}_224": ViTConfig(patch, *_SIZES[size])
    for size, patch in (("base", 16), ("base", 32), ("large", 16), ("large", 32), ("huge", 14))
}


def resize_positions(positions: Tensor, tokens: int, grid: tuple[int, int]) -> Tensor:
    """Position embedding (1, tokens + g·g, C) moved to a grid of (height, width) patches.

    Bicubic with antialiasing, in fp32, as timm does; the first `tokens` have no place and stay.
    """
    side = round((int(positions.shape[1]) - tokens) ** 0.5)  # a tensor in torch.jit.trace
    if side * side + tokens != positions.shape[1]:
        raise ValueError(
            f"positions: expected {tokens} tokens and a square of patches, "
            f"got {positions.shape[1]} in all"
        )
    if grid == (side, side):
        return positions
    first, rest = positions[:, :tokens], positions[:, tokens:]
    plane = rest.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((first, plane.flatten(2).transpose(1, 2).to(rest.dtype)), 1)


class GlobalAttention(nn.Module):
    """softmax(q·kᵀ/√d)·v over a whole line of tokens: one window, no bias, no shift."""

    def __init__(
        self, dim: int, num_heads: int, attn_drop: float, proj_drop: float, backend: str | None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> the same."""
        # torch.jit.trace has tensors for sizes
        tokens = int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]
        out = attention_of_qkv(
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)),
            tokens,
            attn_drop=self.attn_drop,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(out.flatten(-2)))


class ViTBlock(SwinBlock):
    """x + MSA(LN(x)), then x + MLP(LN(x)) (eq. 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path: float, backend: str | None) -> None:
        c, dim = config, config.embed_dim
        attention = GlobalAttention(dim, c.num_heads, c.attn_drop_rate, c.drop_rate, backend)
        super().__init__(attention, dim, c.mlp_ratio, c.drop_rate, drop_path, NORM_EPS)


class VisionTransformer(nn.Module):
    """ViT: logits of an image.

    With `distilled` the two heads' logits are averaged, but while training with
    `distilled_training` set they come as a pair.

    Args:
        config, attention, backend, **changes: as in `SwinTransformer`, with a `ViTConfig`.

    Raises:
        ValueError: sizes that do not fit each other, here or in forward.
    """

    def __init__(
        self,
        config: ViTConfig | None = None,
        *,
        attention: str = "fused",
        backend: str | None = None,
        **changes,
    ) -> None:
        super().__init__()
        self.config = c = replace(config or ViTConfig(), **changes)
        self.backend = backend_of(attention, backend)
        self.distilled_training = False
        self.checkpointing = False
        self.patch_embed = PatchEmbed(c.patch_size, c.in_chans, c.embed_dim, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim)) if c.distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, c.tokens + c.grid**2, c.embed_dim))
        self.pos_drop = nn.Dropout(c.drop_rate)
        rates = drop_path_rates(c.drop_path_rate, c.depth)
        self.blocks = nn.ModuleList(ViTBlock(c, rate, self.backend) for rate in rates)
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS)
        self.num_features = c.embed_dim
        self.pre_logits: nn.Module = nn.Identity()
        if c.representation_size:  # as ViT is pretrained (section 3.1)
            fc = nn.Linear(c.embed_dim, c.representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, tanh=nn.Tanh()))
        channels = c.representation_size or c.embed_dim
        self.head = make_head(channels, c.num_classes)
        self.head_dist = make_head(channels, c.num_classes) if c.distilled else None
        self.apply(initialise)
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def set_checkpointing(self, on: bool = True) -> None:
        """Whether blocks are computed again in the backward instead of kept (while training)."""
        self.checkpointing = on

    @property
    def stride(self) -> int:
        """Pixels on a side of a patch."""
        return self.config.patch_size

    def _attended(self, image: Tensor, replace_patches: Replace | None = None):
        """All tokens, normalised, (B, tokens + patches, dim), and the grid of the patches."""
        x = self.patch_embed(image)
        grid = (x.shape[1], x.shape[2])
        if replace_patches is not None:
            x = replace_patches(x)
        tokens = [t for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in tokens), x.flatten(1, 2)], 1)
        x = self.pos_drop(x + resize_positions(self.pos_embed, len(tokens), grid))
        return self.norm(run_blocks(self.blocks, x, self.checkpointing)), grid

    def forward_map(self, image: Tensor, replace_patches: Replace | None = None) -> Tensor:
        """(B, 3, height, width) -> the patches, normalised, (B, height/p, width/p, dim)."""
        x, grid = self._attended(image, replace_patches)
        return x[:, self.config.tokens :].unflatten(1, grid)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, height, width) -> (B, num_classes). Any height and width."""
        x, _ = self._attended(image)
        logits = self.head(self.pre_logits(x[:, 0]))
        if self.head_dist is None:
            return logits
        distilled = self.head_dist(self.pre_logits(x[:, 1]))
        if self.training and self.distilled_training:
            return logits, distilled
        return (logits + distilled) / 2


def vit(name: str, **options) -> VisionTransformer:
    """The published ViT of this name, such as "vit_base_patch16_224".

    Arguments and errors are those of `swin`, with options of `VisionTransformer` and `ViTConfig`.
    """
    if name not in CONFIGS:
        raise ValueError(f"expected one of {', '.join(CONFIGS)}, got {name!r}")
    return VisionTransformer(CONFIGS[name], **options)
