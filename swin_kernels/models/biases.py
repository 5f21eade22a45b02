"""The position bias that a block has learnt, from a checkpoint of any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.models.names import found_layout, pieces
from swin_kernels.modules import BIAS_LIMIT
from swin_kernels.position_bias import (
    bias_from_table,
    log_coordinates,
    relative_position_index,
    table_length,
)


def learnt_bias(
    state: Mapping[str, Tensor], stage: int, block: int, window: Sequence[int] | None = None
) -> Tensor:
    """(H, N, N): what a block adds to its logits.

    A table (V1) tells its window where that is square. V2's network is asked at the coordinates
    that the checkpoint holds, or else, trained on that window, at those of `window`.

    ValueError: no such block, or a window that cannot be inferred.
    """
    layout = found_layout(state)

    def tensor(name: str) -> Tensor | None:
        (piece,) = pieces(f"layers.{stage}.blocks.{block}.attn.{name}", layout)
        found = state.get(piece.name)
        return None if found is None else found.float()

    table = tensor("relative_position_bias_table")
    if table is None:
        hidden, bias, last = (tensor(f"cpb_mlp.{n}") for n in ("0.weight", "0.bias", "2.weight"))
        if hidden is None or bias is None or last is None:
            raise ValueError(
                f"block {block} of stage {stage}: the checkpoint, by its keys one of "
                f"{layout.name}, has no position bias there"
            )
        coordinates = tensor("relative_coords_table")
        if coordinates is None:
            if window is None or len(window) != 2 or min(window) < 1:
                raise ValueError(
                    "the checkpoint does not tell the window of its bias: expected one of two "
                    f"axes, got {window}"
                )
            coordinates = log_coordinates(window)
        grid = coordinates.reshape(-1, coordinates.shape[-1])
        table = BIAS_LIMIT * torch.sigmoid(F.linear(F.relu(F.linear(grid, hidden, bias)), last))
        if coordinates.ndim > 2:
            window = [(size + 1) // 2 for size in coordinates.shape[-3:-1]]
    elif window is None:
        side = (math.isqrt(len(table)) + 1) // 2
        window = (side, side)
    assert window is not None
    if table_length(window) != len(table):
        raise ValueError(
            f"the bias is a table of {len(table)} rows: expected a window of two axes that has as "
            f"many relative positions, got {tuple(window)}"
        )
    return bias_from_table(table, relative_position_index(window))
