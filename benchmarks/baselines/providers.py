"""The ways to attend within shifted windows that benchmarks compare.

Each takes qkv (B, *S, 3, H, D), a table of biases and, for cosine attention, scales of logits; and
gives (B, *S, H, D). What a model makes once (index, mask, regions) is made once here too. The
peers roll and partition qkv, once for all three, and then do what timm does.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import Device
from swin_kernels.backends.native import CUDA_OBJECT
from swin_kernels.position_bias import relative_position_index
from swin_kernels.problem import Operands
from swin_kernels.testing import Case, call

DIRECTIONS = ("forward", "backward", "forward + backward")
Attend = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Windows:
    """Roll and partition of a map of whole windows, and what a model makes once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        grid, axes = case.grid, len(case.size)
        assert not grid.needs_padding, case
        self.size, self.window, self.counts = case.size, case.window, grid.counts
        self.heads, self.head_dim, self.tokens = case.heads, case.head_dim, grid.tokens
        self.axes = tuple(range(1, 1 + axes))
        self.shift, self.shifted = case.shift, any(case.shift)
        self.scale = case.head_dim**-0.5
        self.index = relative_position_index(case.window).to(device).flatten()
        self.mask = self.regions = None
        if self.shifted:
            mask = grid.shift_mask(case.mask_value).to(device)
            self.mask = mask.to(case.dtype)  # (nW, N, N)
            # tokens of one region are those that see each other: the first of them is its number
            self.regions = (mask == 0).int().argmax(-1).int()  # (nW, N)
        self.split = [x for pair in zip(self.counts, self.window) for x in pair]
        places, within = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
        self.order = (0, *places, *within, 2 * axes + 1)
        self.back = (0, *(x for a in self.axes for x in (a, a + axes)), 2 * axes + 1)

    def split_heads(self, qkv: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, ...]:
        """q, k and v, (B·nW, H, N, D) each; plain products of q and k are the logits."""
        if self.shifted:
            qkv = torch.roll(qkv, [-s for s in self.shift], self.axes)
        x = qkv.reshape(qkv.shape[0], *self.split, 3 * self.heads * self.head_dim)
        x = x.permute(self.order).reshape(-1, self.tokens, 3, self.heads, self.head_dim)
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            return q * self.scale, k, v
        return F.normalize(q, dim=-1) * logit_scale[:, None, None], F.normalize(k, dim=-1), v

    def merge(self, out: Tensor) -> Tensor:
        """(B·nW, H, N, D) -> (B, *S, H, D)."""
        out = out.transpose(1, 2).reshape(
            -1, *self.counts, *self.window, self.heads * self.head_dim
        )
        out = out.permute(self.back).reshape(-1, *self.size, self.heads, self.head_dim)
        return torch.roll(out, self.shift, self.axes) if self.shifted else out

    def bias(self, table: Tensor) -> Tensor:
        """(H, N, N)."""
        bias = table[self.index].view(self.tokens, self.tokens, self.heads)
        return bias.permute(2, 0, 1).contiguous()

    def bias_and_mask(self, table: Tensor, windows: int) -> Tensor:
        """(1 or B·nW, H, N, N), of so many windows."""
        added = self.bias(table)[None]
        if self.mask is None:
            return added
        return added + self.mask[:, None].repeat(windows // len(self.mask), self.heads, 1, 1)


def ours(case: Case, device: Device, backend: str | None = None) -> Attend:
    """Our operation, by the device's own backend unless another is named."""
    backend = backend or device.backend

    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor | None) -> Tensor:
        return call(case, Operands(qkv, bias_table=table, logit_scale=logit_scale), backend)

    return attend


ours_cuda = partial(ours, backend="cuda")  # our kernels of CUDA C++
reference = partial(ours, backend="reference")  # our own fallback, in plain PyTorch


def unfused(case: Case, device: Device) -> Attend:
    """As timm without fused attention: a pass over memory a step, softmax in the tokens' dtype."""
    windows = Windows(case, device.device)

    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, v = windows.split_heads(qkv, logit_scale)
        logits = q @ k.transpose(-2, -1) + windows.bias(table)
        if windows.mask is not None:
            of_window = windows.mask[:, None]  # (nW, 1, N, N)
            logits = logits.view(-1, of_window.shape[0], *logits.shape[1:]) + of_window
            logits = logits.view(-1, *logits.shape[2:])
        return windows.merge(logits.softmax(-1) @ v)

    return attend


def sdpa(case: Case, device: Device) -> Attend:
    """As timm with fused attention: bias and mask as one tensor (B·nW, H, N, N)."""
    windows = Windows(case, device.device)

    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, v = windows.split_heads(qkv, logit_scale)
        added = windows.bias_and_mask(table, q.shape[0])
        # logits are scaled already
        return windows.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0))

    return attend


def xformers(case: Case, device: Device) -> Attend:
    """xformers' memory-efficient attention, with bias and mask as one tensor, as it wants them."""
    attention = importlib.import_module("xformers.ops").memory_efficient_attention
    windows = Windows(case, device.device)

    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, v = windows.split_heads(qkv, logit_scale)
        added = windows.bias_and_mask(table, q.shape[0]).expand(q.shape[0], -1, -1, -1)
        # its rows are to begin at a multiple of eight numbers
        added = F.pad(added, (0, -windows.tokens % 8))[..., : windows.tokens]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B·nW, N, H, D)
        return windows.merge(attention(q, k, v, attn_bias=added, scale=1.0).transpose(1, 2))

    return attend


def flex(case: Case, device: Device) -> Attend:
    """FlexAttention, compiled with roll and partition: bias and regions are read in score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    windows = Windows(case, device.device)
    regions, mask_value = windows.regions, case.mask_value
    count = math.prod(windows.counts)

    def attend_with(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, v = windows.split_heads(qkv, logit_scale)

        def biased(score, window, head, i, j):
            return score + bias[head, i, j]

        def masked(score, window, head, i, j):
            of_image = window % count
            apart = regions[of_image, i] != regions[of_image, j]
            return score + bias[head, i, j] + torch.where(apart, mask_value, 0.0)

        score_mod = biased if regions is None else masked
        return windows.merge(flex_attention(q, k, v, score_mod=score_mod, scale=1.0))

    def attend(qkv: Tensor, table: Tensor, logit_scale: Tensor | None) -> Tensor:
        return attend_with(qkv, windows.bias(table), logit_scale)

    if device.device.type != "cpu":
        return device.compiled(attend)
    # a graph that computes the bias as well does not compile there
    compiled_with, compiled_bias = device.compiled(attend_with), device.compiled(windows.bias)
    return lambda qkv, table, logit_scale: compiled_with(qkv, compiled_bias(table), logit_scale)


def compiled(case: Case, device: Device) -> Attend:
    return device.compiled(unfused(case, device))


class Provider(NamedTuple):
    name: str
    make: Callable[[Case, Device], Attend]
    graph: bool = False  # timed as replays of a CUDA graph
    slow: bool = False  # seconds of compilation: left out first where time is short
    factor: float = 10.0  # of the error rule: that a peer computes the same thing is enough
    same: bool = True  # False: it computes another function, so no gate
    backward: bool = True  # False: forward alone

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.backward else DIRECTIONS[:1]


PROVIDERS = (
    Provider("ours", ours, factor=2.0),
    Provider("ours, graph", ours, graph=True, factor=2.0),
    Provider("reference", reference, factor=2.0),
    Provider("unfused", unfused),
    Provider("sdpa", sdpa),
    Provider("compiled unfused", compiled, slow=True),
    Provider("flex", flex, slow=True),
)
# where a GPU is and the object was built for it
OURS_CUDA = (
    Provider("ours, CUDA C++", ours_cuda, factor=2.0),
    Provider("ours, CUDA C++, graph", ours_cuda, graph=True, factor=2.0),
)
PEERS = (Provider("xformers", xformers),)  # by the names of their packages
GPU_PROVIDERS = (
    *PROVIDERS[:2],
    *(OURS_CUDA if CUDA_OBJECT.error is None and torch.cuda.is_available() else ()),
    *PROVIDERS[2:],
    *(p for p in PEERS if importlib.util.find_spec(p.name) is not None),
)
