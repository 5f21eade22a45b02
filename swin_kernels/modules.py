"""Window attention as modules: the parameters of the Swin authors' classes round one op call.

Constructor arguments, `forward(x, mask)` and state_dict keys are those of `WindowAttention` in the
authors' swin_transformer.py and swin_transformer_v2.py, so one can stand in for the other. Hooks on
`softmax` and `attn_drop`, or other modules in their places, are called: that call is not fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_kernels.geometry import per_axis
from swin_kernels.ops.layers import attention_of_qkv, is_plain
from swin_kernels.position_bias import log_coordinates, relative_position_index, table_length

MAX_LOGIT_SCALE = math.log(100.0)  # Liu et al., CVPR 2022, section 3.2: a temperature above 0.01
BIAS_LIMIT = 16.0  # the authors' code bounds the continuous bias by 16·sigmoid


def apply_linear(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """layer(x) + bias, in one pass where `layer` is a plain linear layer without bias."""
    if bias is None:
        return layer(x)
    if is_plain(layer, nn.Linear) and layer.bias is None:
        return F.linear(x, layer.weight, bias)
    return layer(x) + bias


class _PartitionedAttention(nn.Module):
    """What both versions share: sizes, layers and checks for windows that are already cut out."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        qkv_layer_bias: bool,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads != 0:
            raise ValueError(
                f"dim: expected a positive multiple of num_heads, got {dim} with {num_heads} heads"
            )
        self.dim = dim
        self.window_size = per_axis(window_size, 2, "window_size")
        if min(self.window_size) < 1:
            raise ValueError(f"window_size: expected at least 1 on each axis, got {window_size}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_layer_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))

    def _windows_per_image(self, x: Tensor, mask: Tensor | None) -> int:
        """nW, or 1 without a mask; ValueError if x or the mask does not fit this module."""
        tokens = math.prod(self.window_size)
        if x.ndim != 3 or x.shape[1] != tokens or x.shape[2] != self.dim:
            raise ValueError(
                f"x: expected (B·nW, {tokens}, {self.dim}), the windows of {self.window_size} in "
                f"{self.dim} channels, got {tuple(x.shape)}"
            )
        if mask is None:
            return 1
        if mask.ndim != 3 or mask.shape[0] < 1 or tuple(mask.shape[1:]) != (tokens, tokens):
            raise ValueError(
                f"mask: expected (nW, {tokens}, {tokens}) for windows of {self.window_size}, "
                f"got {tuple(mask.shape)}"
            )
        if x.shape[0] % mask.shape[0] != 0:
            raise ValueError(
                f"x holds {x.shape[0]} windows, which is no multiple of the {mask.shape[0]} of "
                "the mask: expected the windows of whole images, window fastest"
            )
        return mask.shape[0]

    def _attend(self, x: Tensor, mask: Tensor | None, qkv_bias: Tensor | None, **options) -> Tensor:
        """An image is a line of nW·N tokens under a window of N: so windows and mask match."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x: expected a tensor (B·nW, N, {self.dim}), got {type(x).__name__}")
        windows = self._windows_per_image(x, mask)
        # not x.shape[1], which is a tensor while torch.jit.trace records
        tokens, head_dim = math.prod(self.window_size), self.dim // self.num_heads
        qkv = apply_linear(self.qkv, x, qkv_bias)
        images = x.shape[0] // windows
        lines = qkv.reshape(images, windows * tokens, 3, self.num_heads, head_dim)
        out = attention_of_qkv(
            lines,
            tokens,
            bias_index=self.relative_position_index,
            mask=mask,
            softmax=self.softmax,
            attn_drop=self.attn_drop,
            **options,
        )
        return self.proj_drop(self.proj(out.reshape(x.shape)))

    def flops(self, N: int) -> int:
        """Multiply-accumulates for one window of N tokens: qkv, QKᵀ, AV and projection."""
        return 4 * N * self.dim * self.dim + 2 * N * N * self.dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"


class WindowAttention(_PartitionedAttention):
    """softmax(scale·q·kᵀ + B)·v within each window, B from a table of relative positions.

    Liu et al., "Swin Transformer", ICCV 2021, eq. 4. `forward(x, mask)` takes x (B·nW, N, dim), its
    windows already cut out, and mask (nW, N, N) added to the logits of each image's windows, or
    None; it returns (B·nW, N, dim). A whole block without the copies of roll and partition is
    `swin_kernels.shifted_window_attention`.

    Args:
        dim: channels of the input.
        window_size: tokens of the window, (height, width).
        num_heads: heads; a divisor of dim.
        qkv_bias: whether the qkv layer has a bias.
        qk_scale: factor of q·k, default (dim / num_heads)**-0.5.
        attn_drop, proj_drop: dropout on the probabilities and on the output, while training.

    Raises:
        ValueError: sizes that do not fit each other, here or in forward.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, window_size, num_heads, qkv_bias, attn_drop, proj_drop)
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(table_length(self.window_size), num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B·nW, N, dim) and (nW, N, N) or None -> (B·nW, N, dim)."""
        return self._attend(
            x, mask, None, scale=self.scale, bias_table=self.relative_position_bias_table
        )


class WindowAttentionV2(_PartitionedAttention):
    """softmax(cos(q, k)·exp(min(logit_scale, ln 100)) + 16·sigmoid(MLP(Δ)))·v within each window.

    Liu et al., "Swin Transformer V2", CVPR 2022, eq. 2 to 4: cosine attention, and a bias that a
    small network computes from log-spaced relative coordinates Δ. Shapes as in `WindowAttention`.

    Args:
        dim, window_size, num_heads, attn_drop, proj_drop: as in `WindowAttention`.
        qkv_bias: whether queries and values have a bias; keys have none.
        pretrained_window_size: the window of the checkpoint, (height, width); 0 for this window.

    Raises:
        ValueError: sizes that do not fit each other, here or in forward.
    """

    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | Sequence[int] = (0, 0),
    ) -> None:
        super().__init__(dim, window_size, num_heads, False, attn_drop, proj_drop)
        self.pretrained_window_size = per_axis(pretrained_window_size, 2, "pretrained_window_size")
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False)
        )
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        coordinates = log_coordinates(self.window_size, self.pretrained_window_size)
        self.register_buffer("relative_coords_table", coordinates[None])

    def _qkv_bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B·nW, N, dim) and (nW, N, N) or None -> (B·nW, N, dim)."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return self._attend(
            x,
            mask,
            self._qkv_bias(),
            bias_table=BIAS_LIMIT * torch.sigmoid(table),
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().flatten(),
        )
