"""Window attention on a map: a linear layer, the fused operation, a linear layer.

Nothing is rolled, padded or partitioned, and no mask is kept: that is in the operation, for any
size of map. Parameters are named as in the Swin authors' `WindowAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swin_kernels.modules import BIAS_LIMIT, MAX_LOGIT_SCALE, apply_linear
from swin_kernels.ops.layers import attention_of_map, is_plain, sum_of
from swin_kernels.position_bias import log_coordinates, table_length

ATTENTIONS = ("fused", "reference")


def backend_of(attention: str, backend: str | None) -> str | None:
    """The backend that a model's `attention` and `backend` ask for."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention: expected one of {ATTENTIONS}, got {attention!r}")
    if attention == "reference" and backend not in (None, "reference"):
        raise ValueError(f'attention="reference" has no backend, got backend={backend!r}')
    return "reference" if attention == "reference" else backend


class _MapAttention(nn.Module):
    """What both versions share: the arguments and all that follows from them."""

    qkv: Any

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
        pad_order: str = "pad-roll",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(
                f"num_heads: expected a divisor of the {dim} channels, got {num_heads}"
            )
        self.dim, self.num_heads = dim, num_heads
        self.window_size, self.shift_size = window_size, shift_size
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)
        self.backend = backend
        self.pad_order = pad_order

    def _shift(self, x: Tensor) -> tuple[int, int]:
        """Nothing is shifted on an axis that one window covers."""
        height, width = (
            0 if window >= size else shift
            for window, size, shift in zip(self.window_size, x.shape[1:3], self.shift_size)
        )
        return height, width

    def _attend(self, x: Tensor, qkv_bias: Tensor | None, **options) -> Tensor:
        """`qkv_bias` is added to what the qkv layer gives.

        A token of padding is 0 before that layer, and so its bias behind it.
        """
        return attention_of_map(
            x,
            self,
            self.window_size,
            self._shift(x),
            qkv=lambda tokens: apply_linear(self.qkv, tokens, qkv_bias),
            qkv_of_zeros=lambda: sum_of(self.qkv.bias, qkv_bias),
            qkv_is_plain=is_plain(self.qkv, nn.Linear),
            pad_order=self.pad_order,
            softmax=self.softmax,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, window_size={self.window_size}, shift_size={self.shift_size}, "
            f"num_heads={self.num_heads}"
        )


class MapAttention(_MapAttention):
    """softmax(q·kᵀ/√d + B)·v within shifted windows of a map (Liu et al., ICCV 2021, eq. 4)."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(table_length(self.window_size), self.num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> the same."""
        return self._attend(x, None, bias_table=self.relative_position_bias_table)


class MapAttentionV2(_MapAttention):
    """Cosine attention with a continuous position bias (Liu et al., CVPR 2022, eq. 2 to 4).

    `pretrained_window_size` is that of the weights, by which coordinates are scaled; 0: this one.
    """

    relative_coords_table: Tensor

    def __init__(
        self, *arguments, pretrained_window_size: Sequence[int] = (0, 0), **options
    ) -> None:
        super().__init__(*arguments, **options)
        dim, num_heads = self.dim, self.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False)
        )
        self.pretrained_window_size = tuple(pretrained_window_size)
        self.register_buffer("relative_coords_table", self.coordinates(), persistent=False)

    def coordinates(self) -> Tensor:
        """(T, 2) fp32: what the bias network is asked, `relative_coords_table` as it is made."""
        return log_coordinates(self.window_size, self.pretrained_window_size).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, dim) -> the same."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        table = BIAS_LIMIT * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))
        return self._attend(
            x,
            bias,
            bias_table=table,
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().flatten(),
        )
