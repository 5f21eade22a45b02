"""Tokens into windows and back: the pad, roll and partition that unfused code copies through."""

from __future__ import annotations

import torch
from torch import Tensor

from swin_kernels.geometry import Grid


def pad_ends(x: Tensor, grid: Grid, filler: Tensor | None = None) -> Tensor:
    """(B, *size, …) -> (B, *padded, …): each axis ends in `filler`, of the last axes, or zeros."""
    for axis in range(grid.axes):
        missing = grid.padded[axis] - grid.size[axis]
        if missing == 0:
            continue
        shape = list(x.shape)
        shape[1 + axis] = missing
        tail = x.new_zeros(shape) if filler is None else filler.to(x.dtype).expand(shape)
        x = torch.cat((x, tail), dim=1 + axis)
    return x


def crop(x: Tensor, grid: Grid) -> Tensor:
    for axis in range(grid.axes):
        x = x.narrow(1 + axis, 0, grid.size[axis])
    return x


def roll(x: Tensor, grid: Grid, sign: int) -> Tensor:
    if not any(grid.shift):
        return x
    return torch.roll(x, [sign * s for s in grid.shift], tuple(range(1, 1 + grid.axes)))


def to_windows(x: Tensor, grid: Grid, filler: Tensor | None = None) -> Tensor:
    """(B, *S, H, D) -> (B, nW, H, N, D); tokens that padding adds hold `filler`."""
    if grid.pad_order == "pad-roll":
        x = roll(pad_ends(x, grid, filler), grid, -1)
    else:
        x = pad_ends(roll(x, grid, -1), grid, filler)
    return grid.split(x).transpose(2, 3)


def from_windows(windows: Tensor, grid: Grid) -> Tensor:
    """(B, nW, H, N, D) -> (B, *S, H, D): put back, the roll undone, the padding cropped."""
    x = grid.merge(windows.transpose(2, 3))
    if grid.pad_order == "pad-roll":
        return crop(roll(x, grid, 1), grid)
    return roll(crop(x, grid), grid, 1)


def padding_of(grid: Grid, device: torch.device) -> Tensor:
    """(nW, N) bool: the tokens of each window that padding added."""
    real = torch.ones((1, *grid.size, 1, 1), device=device)
    return to_windows(real, grid)[0, :, 0, :, 0] == 0
