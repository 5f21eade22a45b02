"""What surrounds attention: patch embedding, patch merging, the MLP half, stochastic depth."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swin_kernels.ops.layers import (
    is_exporting,
    is_plain,
    is_plain_parameter,
    why_modules_are_watched,
)
from swin_kernels.ops.sublayers import FUSED_ON, mlp_sublayer, why_mlp_unfused


def check_least(config: object, least: float, *names: str) -> None:
    """ValueError unless each of these fields is a number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")


def initialise(module: nn.Module) -> None:
    """Linear layers as in both papers' code; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_head(channels: int, classes: int) -> nn.Module:
    """The classifier, nothing where there are no classes."""
    return nn.Linear(channels, classes) if classes else nn.Identity()


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Of each block: 0 in the first, `last` in the last, linear between them."""
    return [i * (last / max(blocks - 1, 1)) for i in range(blocks)]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """x through all blocks; with `checkpointing` each is computed again in the backward."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


def pad_to_multiple(x: Tensor, of: tuple[int, int], axes: tuple[int, int]) -> Tensor:
    """x with zeros behind two of its axes, up to multiples of `of`."""
    for axis, multiple in zip(axes, of):
        if missing := -x.shape[axis] % multiple:
            # F.pad counts axes from the last one
            x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing])
    return x


class DropPath(nn.Module):
    """Stochastic depth: while training, x is 0 for an image with probability `p`, else x/(1 − p).

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_path: expected a probability below 1, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> the same."""
        if (factors := self.draw(x)) is None:
            return x
        return x * factors.view(-1, *[1] * (x.ndim - 1))

    def draw(self, x: Tensor) -> Tensor | None:
        """(B,): the factor of each image, None where all are 1."""
        if self.p == 0 or not self.training:
            return None
        return x.new_empty((x.shape[0],)).bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) on the last axis."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def add_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    mlp: Mlp,
    drop_path: DropPath,
    norm_last: bool,
    backend: str | None = None,
) -> Tensor:
    """x + drop_path(mlp(norm(x))), or x + drop_path(norm(mlp(x))), of (B, height, width, dim).

    One operation where a fused kernel is faster and every module is plain: without hooks, dropout
    at work or a layer of another class.
    """
    plain = (
        not is_exporting(x)
        and x.device.type in FUSED_ON
        and is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and len(norm.normalized_shape) == 1
        and is_plain(mlp, Mlp)
        and is_plain(mlp.fc1, nn.Linear)
        and is_plain(mlp.fc2, nn.Linear)
        and is_plain(mlp.drop, nn.Dropout)
        and not (mlp.drop.training and mlp.drop.p > 0)
        and is_plain(drop_path, DropPath)
        and all(is_plain_parameter(p) for m in (norm, mlp.fc1, mlp.fc2) for p in m.parameters())
        and why_modules_are_watched() is None
        and x.dtype == mlp.fc1.weight.dtype
    )
    if not plain or why_mlp_unfused(x, mlp.fc1.weight, backend) is not None:
        branch = norm(mlp(x)) if norm_last else mlp(norm(x))
        return x + drop_path(branch)
    return mlp_sublayer(
        x,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        norm="post" if norm_last else "pre",
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        norm_eps=norm.eps,
        residual_scale=drop_path.draw(x),
        backend=backend,
    )


class PatchEmbed(nn.Module):
    """Non-overlapping patches as tokens: a convolution whose stride is its kernel, then LayerNorm.

    An image that patches do not divide is padded with zeros. ViT has no `norm`.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, ⌈height/p⌉, ⌈width/p⌉, dim)."""
        fits = image.ndim == 4 and image.shape[1] == self.proj.in_channels
        if not fits or 0 in image.shape[2:] or not image.is_floating_point():
            raise ValueError(
                f"image: expected (B, {self.proj.in_channels}, height, width) of floating point, "
                f"got {tuple(image.shape)} of {image.dtype}"
            )
        image = pad_to_multiple(image, (self.patch_size,) * 2, (2, 3))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Each 2×2 cell of a map as one token of twice the channels (Liu et al., ICCV 2021, 3.1).

    V1 normalises the four concatenated tokens, V2 (`norm_last`) what the linear layer makes of
    them. A map of odd size is padded with zeros.
    """

    def __init__(self, dim: int, norm_last: bool = False) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_last else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> (B, ⌈height/2⌉, ⌈width/2⌉, 2·dim)."""
        x = pad_to_multiple(x, (2, 2), (1, 2))
        # the order of the authors: (0, 0), (1, 0), (0, 1), (1, 1)
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = torch.cat(cells, -1)
        return self.norm(self.reduction(x)) if self.norm_last else self.reduction(self.norm(x))
