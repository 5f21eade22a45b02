"""softmax(scale·q·kᵀ + bias + mask)·v over shifted windows, one step of docs/contract.md a line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swin_kernels.backends.reference.dropout import dropout_factor
from swin_kernels.backends.reference.windows import from_windows, to_windows
from swin_kernels.geometry import Grid
from swin_kernels.position_bias import bias_from_table, relative_position_index
from swin_kernels.problem import Operands, Options

NORM_CLAMP = 1e-12  # F.normalize's default, applied in fp32: it underflows to 0 in fp16


class Scores(NamedTuple):
    """What goes into the softmax, and what goes on beside it, in the dtype of the sums."""

    query: Tensor  # (B, nW, H, N, D), normalised when cosine
    key: Tensor  # (B, nW, H, N, D), normalised when cosine
    value: Tensor  # (B, nW, H, N, Dv)
    query_norm: Tensor | None  # (B, nW, H, N, 1), clamped
    key_norm: Tensor | None
    factor: Tensor | float  # scale, or logit_scale (H, 1, 1)
    logits: Tensor  # (B, nW, H, N, N)


class Attention(NamedTuple):
    """What the forward computes on its way."""

    scores: Scores
    probabilities: Tensor  # (B, nW, H, N, N), before dropout
    dropout: Tensor | None  # (B, nW, H, N, N), 0 or 1/(1−p)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and all sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would cut products and sums that are fp32 by contract to its own dtype."""
    if device.type == "meta":  # autocast knows no meta
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def grid_of(operands: Operands, options: Options) -> Grid:
    query, _, _ = operands.unpacked()
    return options.grid(query.shape[1:-2])


def bias_index_of(operands: Operands, options: Options) -> Tensor:
    if operands.bias_index is not None:
        return operands.bias_index.long()
    return relative_position_index(options.window_size, operands.query.device)


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_CLAMP)
    return x / norm, norm


def scores_of(operands: Operands, options: Options) -> Scores:
    """Everything up to the logits."""
    grid, dtype = grid_of(operands, options), sum_dtype(operands.query.dtype)
    q, k, v = (x.to(dtype) for x in operands.unpacked())
    # what padding holds is a token like any other, so it is rounded to their dtype first
    pad_key, pad_value = (
        None if x is None else x.to(operands.query.dtype).to(dtype)
        for x in (operands.pad_key, operands.pad_value)
    )
    query = to_windows(q, grid)
    key, value = to_windows(k, grid, pad_key), to_windows(v, grid, pad_value)
    query_norm = key_norm = None
    factor: Tensor | float = options.scale
    if operands.logit_scale is not None:
        query, query_norm = _normalised(query)
        key, key_norm = _normalised(key)
        factor = operands.logit_scale.to(dtype)[:, None, None]

    logits = (query * factor) @ key.mT
    if operands.bias is not None:
        logits = logits + operands.bias.to(dtype)
    if operands.bias_table is not None:
        logits = logits + bias_from_table(
            operands.bias_table.to(dtype), bias_index_of(operands, options)
        )
    if any(grid.shift):
        logits = logits + grid.shift_mask(options.mask_value, dtype, logits.device)[:, None]
    if operands.mask is not None:
        logits = logits + operands.mask.to(dtype)[:, None]

    return Scores(query, key, value, query_norm, key_norm, factor, logits)


def _dead(logits: Tensor) -> Tensor:
    """Rows whose keys are all at −inf: they are zeros, and so are their gradients."""
    return (logits == -torch.inf).all(-1, keepdim=True)


def attend(operands: Operands, options: Options) -> Attention:
    """Everything up to the probabilities."""
    scores = scores_of(operands, options)
    logits = scores.logits
    dead = _dead(logits)
    probabilities = logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    dropout = None
    if options.dropout_p > 0:
        assert operands.dropout_seed is not None
        seed = operands.dropout_seed.to(logits.device)
        batch, windows, heads, tokens = logits.shape[:-1]
        dropout = dropout_factor(
            seed, options.dropout_p, batch, windows, heads, tokens, logits.dtype
        )
    return Attention(scores, probabilities, dropout)


def _put_back(out: Tensor, operands: Operands, options: Options) -> Tensor:
    """(B, nW, H, N, Dv) -> (B, *S, H, Dv) in the dtype of the query."""
    out = from_windows(out, grid_of(operands, options))
    return out.to(operands.query.dtype).contiguous()


def forward(operands: Operands, options: Options) -> Tensor:
    """(B, *S, H, Dv) in the dtype of the query; differentiable to any order by autograd."""
    with without_autocast(operands.query.device):
        a = attend(operands, options)
        weights = a.probabilities if a.dropout is None else a.probabilities * a.dropout
        return _put_back(weights @ a.scores.value, operands, options)


def forward_through(
    operands: Operands,
    options: Options,
    softmax: Callable[[Tensor], Tensor],
    dropout: Callable[[Tensor], Tensor],
) -> Tensor:
    """`forward` with the softmax and the dropout of the caller, each of (B·nW, H, N, N)."""
    with without_autocast(operands.query.device):
        scores = scores_of(operands, options)
        logits = scores.logits.flatten(0, 1)
        dead = _dead(logits)
        weights = softmax(logits.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)
        weights = dropout(weights)
        weights = weights.to(scores.value.dtype).unflatten(0, scores.logits.shape[:2])
        return _put_back(weights @ scores.value, operands, options)
