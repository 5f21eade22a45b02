"""Swin Transformer V2 (Liu et al., CVPR 2022, arXiv 2111.09883): res-post-norm, cosine attention,
log-spaced continuous position bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from swin_kernels.models.attention import MapAttentionV2
from swin_kernels.models.layers import check_least
from swin_kernels.models.swin import SIZES, SwinBlock, SwinConfig, SwinTransformer


@dataclass(frozen=True)
class SwinV2Config(SwinConfig):
    """`SwinConfig`, and what Swin V2 has besides."""

    window_size: int = 8  #: tokens on a side of a window
    img_size: int = 256  #: pixels on a side; a stage's map at this size bounds its window
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)  #: of each stage, 0 for its window
    extra_norm_every: int = 0  #: blocks after which the main branch is normalised, 0 for never

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "extra_norm_every")
        sizes = self.pretrained_window_sizes
        if len(sizes) < len(self.depths) or min(sizes) < 0:
            raise ValueError(
                f"pretrained_window_sizes: expected one for each of {len(self.depths)} stages, or "
                f"0, got {sizes}"
            )


_HUGE = {
    "huge": (352, (2, 2, 18, 2), (11, 22, 44, 88)),
    "giant": (512, (2, 2, 42, 4), (16, 32, 64, 128)),
}
CONFIGS = {
    **{f"swinv2_{n}_window8_256": SwinV2Config(*s) for n, s in SIZES.items()},
    **{f"swinv2_{n}_window16_256": SwinV2Config(*s, window_size=16) for n, s in SIZES.items()},
    # pretrained at 192 with windows of 12
    **{
        f"swinv2_{n}_window12to{window}_192to{size}": SwinV2Config(
            *s, window_size=window, img_size=size, pretrained_window_sizes=(12, 12, 12, 6)
        )
        for window, size in ((16, 256), (24, 384))
        for n, s in SIZES.items()
    },
    **{f"swinv2_{n}": SwinV2Config(*s, extra_norm_every=6) for n, s in _HUGE.items()},
}


class SwinV2Block(SwinBlock):
    """x + LN(W-MSA(x)), then x + LN(MLP(x)) (section 3.2); `norm3` normalises the main branch."""

    def __init__(self, *arguments, extra_norm: bool = False, **options) -> None:
        super().__init__(*arguments, **options)
        for norm in (self.norm1, self.norm2):  # branches begin by adding nothing
            nn.init.zeros_(norm.weight)
        dim = self.norm1.normalized_shape
        self.norm3 = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> the same."""
        x = x + self.drop_path(self.norm1(self.attend(x)))
        return self.norm3(self.add_mlp(x, norm_last=True))


class SwinTransformerV2(SwinTransformer):
    """Swin V2: logits of an image, or the maps of its stages.

    Arguments and methods are those of `SwinTransformer`, with a `SwinV2Config`.
    """

    config: SwinV2Config
    config_type = SwinV2Config
    norm_last = True

    def make_block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        c = self.config
        pretrained = (c.pretrained_window_sizes[stage],) * 2
        return SwinV2Block(
            self.make_attention(stage, index, MapAttentionV2, pretrained_window_size=pretrained),
            c.embed_dim << stage,
            c.mlp_ratio,
            c.drop_rate,
            drop_path,
            extra_norm=c.extra_norm_every > 0 and (index + 1) % c.extra_norm_every == 0,
        )


def swin_v2(name: str, **options) -> SwinTransformerV2:
    """The published Swin V2 of this name, such as "swinv2_base_window16_256".

    Arguments and errors are those of `swin`, with fields of `SwinV2Config`.
    """
    if name not in CONFIGS:
        raise ValueError(f"expected one of {', '.join(CONFIGS)}, got {name!r}")
    return SwinTransformerV2(CONFIGS[name], **options)
