"""Window attention as timm runs it, a pass over memory a step: what the error rule bounds by."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.backends.reference.dropout import dropout_factor
from swin_kernels.problem import Operands
from swin_kernels.testing.cases import Case


def _unfused_regions(case: Case, device: torch.device) -> Tensor:
    """(1, *padded, 1): regions numbered by slices of the rolled map, as the stock models do."""
    regions = torch.zeros((1, *case.grid.padded, 1), device=device)
    slices = []
    for axis, (window, shift) in enumerate(zip(case.window, case.shift)):
        wraps = case.periodic is not None and case.periodic[axis]
        cuts = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
        slices.append([slice(None)] if shift == 0 or wraps else cuts)
    for number, place in enumerate(itertools.product([slice(None)], *slices)):
        regions[place] = number
    return regions


def _unfused_windows(case: Case, x: Tensor, filler: Tensor | None = None) -> Tensor:
    """(B, *S, C) -> (B·nW, N, C), by pad, roll and partition."""
    axes = range(1, 1 + len(case.size))
    missing = [p - s for p, s in zip(case.grid.padded, case.size)]
    shifts = [-s for s in case.shift]

    def pad(x: Tensor) -> Tensor:
        for axis, more in zip(axes, missing):
            if more == 0:
                continue
            if filler is None:
                # F.pad counts axes from the last one
                x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, more])
            else:
                shape = (*x.shape[:axis], more, *x.shape[axis + 1 :])
                x = torch.cat((x, filler.to(x.dtype).expand(shape)), axis)
        return x

    def roll(x: Tensor) -> Tensor:
        return torch.roll(x, shifts, tuple(axes)) if any(shifts) else x

    x = roll(pad(x)) if case.pad_order == "pad-roll" else pad(roll(x))
    halves = itertools.chain.from_iterable(zip(case.grid.counts, case.window))
    windows = x.view(x.shape[0], *halves, x.shape[-1])
    windows = windows.movedim(tuple(range(1, 2 * len(axes), 2)), tuple(axes))
    return windows.reshape(-1, case.grid.tokens, x.shape[-1])


def _unfused_map(case: Case, windows: Tensor, batch: int) -> Tensor:
    """(B·nW, N, C) -> (B, *S, C), the inverse of `_unfused_windows`."""
    channels, axes = windows.shape[-1], len(case.size)
    x = windows.view(batch, *case.grid.counts, *case.window, channels)
    x = x.movedim(tuple(range(1, 1 + axes)), tuple(range(1, 2 * axes, 2)))
    x = x.reshape(batch, *case.grid.padded, channels)

    def crop(x: Tensor) -> Tensor:
        place = (slice(None), *(slice(0, s) for s in case.size))
        return x[place]

    def roll(x: Tensor) -> Tensor:
        return torch.roll(x, case.shift, tuple(range(1, 1 + axes))) if any(case.shift) else x

    return crop(roll(x)) if case.pad_order == "pad-roll" else roll(crop(x))


def _unfused_bias(operands: Operands, case: Case) -> Tensor | None:
    """(H, N, N), gathered from the table as the stock modules do it."""
    if operands.bias is not None or operands.bias_table is None:
        return operands.bias
    index = operands.bias_index
    if index is None:
        # by itself, not by the package's own function, which the reference uses
        axes = [torch.arange(w, device=operands.query.device) for w in case.window]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (axes, N)
        index = torch.zeros((), dtype=torch.int64, device=places.device)
        for w, place in zip(case.window, places):
            index = index * (2 * w - 1) + place[:, None] - place[None, :] + w - 1
    tokens = index.shape[0]
    bias = operands.bias_table[index.long().reshape(-1)].view(tokens, tokens, -1)
    return bias.permute(2, 0, 1).contiguous()


def unfused(case: Case, operands: Operands) -> Tensor:
    """Window attention as timm runs it: pad, roll, partition, QKᵀ, bias, mask, softmax, AV, back.

    Each step is a pass over memory. Products are in the dtype of the tokens, norms and softmax in
    fp32; a wider bias or mask promotes the logits.
    """
    batch, heads, dtype = operands.query.shape[0], case.heads, operands.query.dtype
    q, k, v = operands.unpacked()

    def split(x: Tensor, filler: Tensor | None) -> Tensor:
        windows = _unfused_windows(
            case, x.flatten(-2), None if filler is None else filler.flatten()
        )
        return windows.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B·nW, H, N, D)

    q, k, v = split(q, None), split(k, operands.pad_key), split(v, operands.pad_value)
    if operands.logit_scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        q, k = (F.normalize(x.to(wide), dim=-1).to(dtype) for x in (q, k))
        logits = q @ k.transpose(-2, -1) * operands.logit_scale[:, None, None]
    else:
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        logits = q * scale @ k.transpose(-2, -1)
    bias = _unfused_bias(operands, case)
    if bias is not None:
        logits = logits + bias
    mask = None
    if any(case.shift):
        regions = _unfused_windows(
            case.but(shift=(0,) * len(case.size), size=case.grid.padded),
            _unfused_regions(case, q.device),
        ).squeeze(-1)  # (nW, N)
        mask = torch.zeros(*regions.shape, regions.shape[1], dtype=logits.dtype, device=q.device)
        mask = mask.masked_fill(regions[:, None] != regions[..., None], case.mask_value)
    if operands.mask is not None:
        mask = operands.mask if mask is None else mask + operands.mask
    if mask is not None:
        logits = logits.view(batch, case.grid.windows, *logits.shape[1:]) + mask[:, None]
        logits = logits.flatten(0, 1)
    dead = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)
    weights = logits.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).masked_fill(
        dead, 0.0
    )
    if case.dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        shape = batch, case.grid.windows, heads, case.grid.tokens
        kept = dropout_factor(seed, case.dropout_p, *shape, weights.dtype)
        weights = weights * kept.flatten(0, 1)
    out = (weights.to(dtype) @ v).transpose(1, 2).flatten(-2)  # (B·nW, N, H·Dv)
    return _unfused_map(case, out, batch).unflatten(-1, (heads, -1))
