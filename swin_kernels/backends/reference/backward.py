"""The gradients of the forward, written out: the formulas of every kernel (docs/math.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from swin_kernels.backends.reference.forward import (
    NORM_CLAMP,
    attend,
    bias_index_of,
    grid_of,
    sum_dtype,
    without_autocast,
)
from swin_kernels.backends.reference.windows import from_windows, padding_of, to_windows
from swin_kernels.geometry import Grid
from swin_kernels.problem import Operands, Options


def _saturated(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` held within what `dtype` can store on `rows`; elsewhere overflow stays visible.

    fp16 cannot hold dx̂/ε, the gradient of a zero vector, and inf turns into NaN against the zero
    input behind it.
    """
    limit = min(torch.finfo(dtype).max, torch.finfo(grad.dtype).max)
    return torch.where(rows, grad.clamp(-limit, limit), grad)


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """dx of x̂ = x/max(‖x‖, ε): (dx̂ − x̂·(x̂·dx̂))/‖x‖, and dx̂/ε where the clamp holds."""
    clamped = norm <= NORM_CLAMP
    radial = unit * (unit * grad).sum(-1, keepdim=True)
    return _saturated((grad - torch.where(clamped, 0.0, radial)) / norm, clamped, dtype)


def saturated_at_zero(grad: Tensor, x: Tensor) -> Tensor:
    """`_saturated` where `x` is a zero vector, whose gradient may lie in a wider dtype."""
    norm = torch.linalg.vector_norm(x.to(grad.dtype), dim=-1, keepdim=True)
    return _saturated(grad, norm <= NORM_CLAMP, x.dtype)


def _sum_over_padding(grad: Tensor, grid: Grid) -> Tensor:
    """(B, nW, H, N, D) summed over the tokens that padding added -> (H, D)."""
    return (grad * padding_of(grid, grad.device)[:, None, :, None]).sum((0, 1, 3))


def backward(grad_out: Tensor, operands: Operands, options: Options) -> Operands:
    """Gradients of the operands, each in its dtype; None for what is absent or has none.

    With W the windows, P the probabilities, M the dropout factor and s the scale (or logit_scale):
    dV = (P∘M)ᵀ·dO, dP = (dO·Vᵀ)∘M, dS = P∘(dP − rowsum(P∘dP)), dQ = s·dS·K, dK = s·dSᵀ·Q, dbias =
    Σ_W dS.
    """
    with without_autocast(operands.query.device):
        return _backward(grad_out, operands, options)


def _backward(grad_out: Tensor, operands: Operands, options: Options) -> Operands:
    grid, dtype = grid_of(operands, options), sum_dtype(operands.query.dtype)
    a = attend(operands, options)
    p, s = a.probabilities, a.scores
    d_out = to_windows(
        grad_out.to(dtype), grid
    )  # rows of padding get no gradient: their output is cropped

    weights = p if a.dropout is None else p * a.dropout
    d_value = weights.mT @ d_out
    d_p = d_out @ s.value.mT
    if a.dropout is not None:
        d_p = d_p * a.dropout
    d_logits = p * (d_p - (p * d_p).sum(-1, keepdim=True))  # (B, nW, H, N, N)
    d_query, d_key = d_logits @ s.key, d_logits.mT @ s.query

    extras = {}
    if operands.logit_scale is not None:
        d_scale = (s.query * d_query).sum((0, 1, 3, 4))
        extras["logit_scale"] = d_scale.to(operands.logit_scale.dtype)
    d_query, d_key = d_query * s.factor, d_key * s.factor
    if s.query_norm is not None and s.key_norm is not None:
        d_query = _through_norm(d_query, s.query, s.query_norm, operands.query.dtype)
        d_key = _through_norm(d_key, s.key, s.key_norm, operands.query.dtype)

    if operands.bias is not None:
        extras["bias"] = d_logits.sum((0, 1)).to(operands.bias.dtype)
    if operands.bias_table is not None:
        rows = d_logits.sum((0, 1)).flatten(1).T  # (N·N, H)
        index = bias_index_of(operands, options).reshape(-1)
        table = rows.new_zeros(operands.bias_table.shape).index_add_(0, index, rows)
        extras["bias_table"] = table.to(operands.bias_table.dtype)
    if operands.pad_key is not None:
        d_pad = _sum_over_padding(d_key, grid)
        if operands.logit_scale is not None:
            d_pad = saturated_at_zero(d_pad, operands.pad_key)
        extras["pad_key"] = d_pad.to(operands.pad_key.dtype)
    if operands.pad_value is not None:
        extras["pad_value"] = _sum_over_padding(d_value, grid).to(operands.pad_value.dtype)

    d_q, d_k, d_v = (
        from_windows(x, grid).to(operands.query.dtype).contiguous()
        for x in (d_query, d_key, d_value)
    )
    if operands.key is None:
        return Operands(torch.stack((d_q, d_k, d_v), dim=-3), **extras)
    return Operands(d_q, d_k, d_v, **extras)
