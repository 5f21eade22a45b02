"""Relative position bias: index, table, log-spaced coordinates, the move to another window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def table_length(window: Sequence[int]) -> int:
    """T, the number of relative positions in a window: the product of 2·w − 1 over its axes."""
    return math.prod([2 * w - 1 for w in window])  # a list: dynamo cannot trace a generator here


def relative_position_index(
    window: Sequence[int], device: torch.device | str | None = None
) -> torch.Tensor:
    """(N, N) int64: the row of the table for query i and key j, Δ row-major from −(w−1).

    Liu et al. 2021, eq. 4.
    """
    axes = [torch.arange(w, device=device) for w in window]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (axes, N)
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, w in enumerate(window):
        delta = positions[axis][:, None] - positions[axis][None, :]
        index = index * (2 * w - 1) + delta + (w - 1)
    return index


def bias_from_table(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(T, H) and (N, N) -> dense bias (H, N, N)."""
    tokens = index.shape[0]
    # index_select: an index below 0 is an error, not a row from the end
    return table.index_select(0, index.reshape(-1)).view(tokens, tokens, -1).permute(2, 0, 1)


def log_coordinates(
    window: Sequence[int], pretrained_window: Sequence[int] | None = None
) -> torch.Tensor:
    """(2·w0−1, 2·w1−1, …, axes) fp32: sign(Δ)·log2(1+|Δ|)/log2(8), Δ in [−8, 8] (V2, eq. 4).

    Δ is divided by `pretrained_window` − 1 where that is given and not 0, so that a model
    fine-tuned at another window sees the coordinates it was trained on.
    """
    axes = []
    for w, trained in zip(window, pretrained_window or window, strict=True):
        steps = torch.arange(-(w - 1), w, dtype=torch.float32)
        axes.append(steps / max((trained or w) - 1, 1) * 8)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return torch.sign(grid) * torch.log2(grid.abs() + 1.0) / math.log2(8)


def resize_table(
    table: torch.Tensor, window: Sequence[int], new_window: Sequence[int]
) -> torch.Tensor:
    """A table (T, H) of a 2-D `window` moved to `new_window` by bicubic interpolation per head.

    On the (2·w0−1) × (2·w1−1) grid, as the Swin authors load a checkpoint at another window size.
    ValueError if the table does not belong to `window` or the window is not 2-D.
    """
    if len(window) != 2 or len(new_window) != 2:
        raise ValueError(
            f"resize_table: expected 2-D windows, got {tuple(window)} and {tuple(new_window)}"
        )
    if table.ndim != 2 or table.shape[0] != table_length(window):
        raise ValueError(
            f"resize_table: expected ({table_length(window)}, heads) for window {tuple(window)}, "
            f"got {tuple(table.shape)}"
        )
    old, new = ([2 * w - 1 for w in side] for side in (window, new_window))
    grid = table.T.reshape(1, -1, *old)
    moved = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return moved.reshape(table.shape[1], -1).T.to(table.dtype).contiguous()
