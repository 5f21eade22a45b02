"""Swin Transformer (Liu et al., ICCV 2021, arXiv 2103.14030), on the fused operation.

A map is (B, height, width, C) throughout. Modules and parameters are named as in the authors'
swin_transformer.py, whose checkpoints load as they are, but for their buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from swin_kernels.geometry import PAD_ORDERS
from swin_kernels.models.attention import MapAttention, backend_of
from swin_kernels.models.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    PatchMerging,
    add_mlp,
    check_least,
    drop_path_rates,
    initialise,
    make_head,
    run_blocks,
)


@dataclass(frozen=True)
class SwinConfig:
    """What a Swin is made of; `window_size` and `img_size` are those of its weights."""

    embed_dim: int = 96  #: channels of the first stage; each later stage has twice as many
    depths: tuple[int, ...] = (2, 2, 6, 2)  #: blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  #: heads of each stage
    window_size: int = 7  #: tokens on a side of a window
    img_size: int = 224  #: pixels on a side; a stage's map at this size bounds its window
    patch_size: int = 4  #: pixels on a side of a patch
    in_chans: int = 3  #: channels of the image
    num_classes: int = 1000  #: outputs of the head, 0 for no head
    mlp_ratio: float = 4.0  #: hidden channels of an MLP per channel of the map
    drop_rate: float = 0.0  #: dropout of patch embeddings, projections and MLPs
    attn_drop_rate: float = 0.0  #: dropout of attention probabilities
    drop_path_rate: float = 0.1  #: stochastic depth of the last block, linear from 0 in the first
    pad_order: str = "pad-roll"  #: "roll-pad" where windows do not divide a map and timm did it

    def __post_init__(self) -> None:
        got = f"got {self.depths} and {self.num_heads}"
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ValueError(f"depths and num_heads: expected one number a stage each, {got}")
        if min(self.depths) < 1 or min(self.num_heads) < 1:
            raise ValueError(f"depths and num_heads: expected at least 1 a stage, {got}")
        check_least(self, 1, "embed_dim", "window_size", "img_size", "patch_size", "in_chans")
        check_least(self, 0, "num_classes", "mlp_ratio")
        if self.pad_order not in PAD_ORDERS:
            raise ValueError(f"pad_order: expected one of {PAD_ORDERS}, got {self.pad_order!r}")

    def map_size(self, stage: int) -> int:
        """Tokens on a side of the map of a stage, at `img_size`."""
        return -(-self.img_size // (self.patch_size << stage))

    def window(self, stage: int) -> int:
        """Tokens on a side of a stage's windows."""
        return min(self.window_size, self.map_size(stage))


# channels, depths and heads
SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
CONFIGS = {
    f"swin_{n}_patch4_window{window}_{size}": SwinConfig(*s, window_size=window, img_size=size)
    for window, size in ((7, 224), (12, 384))
    for n, s in SIZES.items()
}
ModuleOfMap = Callable[[int], nn.Module]  # of a map's channels: a module from a map to such a map
Replace = Callable[[Tensor], Tensor]  # of embedded patches (B, height, width, C), the same


class SwinBlock(nn.Module):
    """x + W-MSA(LN(x)), then x + MLP(LN(x)); windows are shifted in every other block (eq. 3).

    `before_attention` is a module of the user's on what attention gets, or None.
    """

    before_attention: nn.Module | None

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.before_attention = None
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def attend(self, x: Tensor) -> Tensor:
        if self.before_attention is not None:
            x = self.before_attention(x)
        return self.attn(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> the same."""
        return self.add_mlp(x + self.drop_path(self.attend(self.norm1(x))))

    def add_mlp(self, x: Tensor, norm_last: bool = False) -> Tensor:
        backend = getattr(self.attn, "backend", None)
        return add_mlp(x, self.norm2, self.mlp, self.drop_path, norm_last, backend)


class Stage(nn.Module):
    """Blocks of one resolution; `downsample`, which the next stage's map comes by, stands last."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, C) -> the same, before `downsample`."""
        return run_blocks(self.blocks, x, self.checkpointing)


class SwinTransformer(nn.Module):
    """Swin V1: logits of an image, or the maps of its stages.

    Args:
        config: sizes; CONFIGS holds the published ones by name.
        attention: "fused", or "reference" for the unfused path in plain PyTorch.
        backend: of the fused operation; None takes the first that can.
        features_only: `forward` returns the stages' maps instead of logits, each through a
            LayerNorm of its own, and there is no head.
        before_attention: makes, of a block's channels, a module that each block applies to what
            its attention gets: the normalised map in V1, the map itself in V2.
        **changes: fields of the configuration to replace, such as num_classes=10.

    Raises:
        ValueError: sizes that do not fit each other, here or in forward.
    """

    config_type: ClassVar[type[SwinConfig]] = SwinConfig
    norm_last: ClassVar[bool] = False  # of patch merging

    def __init__(
        self,
        config: SwinConfig | None = None,
        *,
        attention: str = "fused",
        backend: str | None = None,
        features_only: bool = False,
        before_attention: ModuleOfMap | None = None,
        **changes,
    ) -> None:
        super().__init__()
        self.config = config = replace(config or self.config_type(), **changes)
        if type(config) is not self.config_type:
            raise ValueError(
                f"config: expected a {self.config_type.__name__}, got a {type(config).__name__}"
            )
        self.backend = backend_of(attention, backend)
        self.features_only = features_only
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.embed_dim)
        self.pos_drop = nn.Dropout(config.drop_rate)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
        stages, last = [], len(config.depths) - 1
        for i, depth in enumerate(config.depths):
            blocks = [self.make_block(i, j, next(rates)) for j in range(depth)]
            downsample = PatchMerging(config.embed_dim << i, self.norm_last) if i < last else None
            stages.append(Stage(blocks, downsample))
        self.layers = nn.ModuleList(stages)
        self.num_features = config.embed_dim << last
        if features_only:
            self.out_norms = nn.ModuleList(
                nn.LayerNorm(config.embed_dim << i) for i in range(len(config.depths))
            )
        else:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = make_head(self.num_features, config.num_classes)
        self.apply(initialise)
        if before_attention is not None:  # after that: they have weights of their own
            for i, stage in enumerate(stages):
                for block in stage.blocks:
                    block.before_attention = before_attention(config.embed_dim << i)

    def make_attention(
        self, stage: int, index: int, kind: type[nn.Module] = MapAttention, **options
    ) -> nn.Module:
        """Attention of block `index` of a stage."""
        c, window = self.config, self.config.window(stage)
        shift = window // 2 if index % 2 else 0  # on maps of several windows
        return kind(
            c.embed_dim << stage,
            (window, window),
            (shift, shift),
            c.num_heads[stage],
            c.attn_drop_rate,
            c.drop_rate,
            self.backend,
            c.pad_order,
            **options,
        )

    def make_block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        """Block `index` of a stage."""
        c, attention = self.config, self.make_attention(stage, index)
        return SwinBlock(attention, c.embed_dim << stage, c.mlp_ratio, c.drop_rate, drop_path)

    def set_checkpointing(self, on: bool = True) -> None:
        """Whether blocks are computed again in the backward instead of kept (while training)."""
        for stage in self.layers:
            assert isinstance(stage, Stage)
            stage.checkpointing = on

    @property
    def stride(self) -> int:
        """Pixels on a side of a token of the last map."""
        return self.config.patch_size << (len(self.config.depths) - 1)

    def stages(self, image: Tensor, replace_patches: Replace | None = None) -> list[Tensor]:
        """The map of each stage, (B, height, width, C).

        `replace_patches` changes the embedded patches first: a mask token's place (SimMIM).
        """
        x = self.patch_embed(image)
        if replace_patches is not None:
            x = replace_patches(x)
        x = self.pos_drop(x)
        maps = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def forward_map(self, image: Tensor, replace_patches: Replace | None = None) -> Tensor:
        """(B, 3, height, width) -> the last map, normalised, (B, height/32, width/32, C)."""
        return self.norm(self.stages(image, replace_patches)[-1])

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """(B, 3, height, width) -> (B, num_classes); with features_only [(B, C, h, w), …].

        Any height and width: what windows do not divide is padded inside.
        """
        if self.features_only:
            maps = self.stages(image)
            return [n(x).permute(0, 3, 1, 2) for n, x in zip(self.out_norms, maps)]
        return self.head(self.forward_map(image).mean((1, 2)))


def swin(name: str, **options) -> SwinTransformer:
    """The published Swin V1 of this name, with random weights.

    Args:
        name: such as "swin_tiny_patch4_window7_224"; all names are in docs/models.md.
        **options: those of `SwinTransformer`, and fields of `SwinConfig` to replace.

    Raises:
        ValueError: an unknown name, with the known ones, or sizes that do not fit each other.
    """
    if name not in CONFIGS:
        raise ValueError(f"expected one of {', '.join(CONFIGS)}, got {name!r}")
    return SwinTransformer(CONFIGS[name], **options)
