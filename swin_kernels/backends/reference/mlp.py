"""The MLP sublayer in plain PyTorch: forward, its backward written out, and what both sublayers
share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.mlp_problem import ACTIVATIONS, MlpOperands, MlpOptions

_ACTIVATE = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def _slope(h: Tensor, activation: str) -> Tensor:
    """f′(h)"""
    if activation == "relu":
        return (h > 0).to(h.dtype)
    if activation == "silu":
        weight = torch.sigmoid(h)
        return weight + h * weight * (1 - weight)
    if activation == "gelu":
        density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-h * math.sqrt(0.5)) + h * density
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * (h + b * h**3))
    return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * a * (1 + 3 * b * h * h)


def along_images(scale: Tensor, x: Tensor) -> Tensor:
    """(B,) to be multiplied with (B, *S, C)."""
    return scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def norm_of(x: Tensor, operands: Any, eps: float) -> Tensor:
    """LayerNorm of x with the operands' weight and bias; x where they have none."""
    weight, bias = operands.norm_weight, operands.norm_bias
    if weight is None:
        return x
    dtype = torch.promote_types(x.dtype, weight.dtype)
    given = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), given, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b in the dtype of the weight."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def add_branch(
    x: Tensor, branch: Tensor, layer_scale: Tensor | None, residual_scale: Tensor | None
) -> Tensor:
    """x + residual_scale·layer_scale·branch, in the dtype of x."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if residual_scale is not None:
        # a dropped image takes nothing of its branch, not even what is not finite in it
        scale = along_images(residual_scale, branch)
        branch = torch.where(scale == 0, torch.zeros_like(branch), branch * scale)
    return (x + branch).to(x.dtype)


def mlp_forward(operands: MlpOperands, options: MlpOptions) -> Tensor:
    """x + residual_scale·layer_scale·branch, as stock modules compose it.

    Products are in the dtype of the weights; the result in that of x.
    """
    x, last = operands.x, options.norm_last
    branch = norm_of(x, operands, options.norm_eps) if not last else x
    hidden = linear(branch, operands.fc1_weight, operands.fc1_bias)
    hidden = _ACTIVATE[ACTIVATIONS[options.activation]](hidden)
    branch = linear(hidden, operands.fc2_weight, operands.fc2_bias)
    if last:
        branch = norm_of(branch, operands, options.norm_eps)
    return add_branch(x, branch, operands.layer_scale, operands.residual_scale)


def norm_backward(
    grad: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised to `unit`, of the weight and of the bias."""
    rows = tuple(range(grad.ndim - 1))
    grad_weight, grad_bias = (grad * unit).sum(rows), grad.sum(rows)
    grad = grad * weight
    mean, slope = grad.mean(-1, keepdim=True), (grad * unit).mean(-1, keepdim=True)
    return (grad - mean - unit * slope) * inverse, grad_weight, grad_bias


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean)/√(var + ε), and the root's inverse."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def mlp_backward(
    grad_out: Tensor, operands: MlpOperands, options: MlpOptions
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `MlpOperands`, from the formulas of docs/math.md, in fp32 or fp64.

    Computed again from the operands alone: normalised rows, the hidden activations and, where it is
    asked for, the end of the branch.
    """
    dtype = torch.promote_types(operands.x.dtype, torch.float32)
    wide = MlpOperands(*(None if t is None else t.to(dtype) for t in operands[:9]))  # type: ignore[arg-type]
    x, weight1, weight2 = wide.x, wide.fc1_weight, wide.fc2_weight
    grad = grad_out.to(dtype)
    rows = tuple(range(x.ndim - 1))
    first = x
    if wide.norm_weight is not None and not options.norm_last:
        unit, inverse = normalised(x, options.norm_eps)
        first = unit * wide.norm_weight + (0 if wide.norm_bias is None else wide.norm_bias)
    activation = ACTIVATIONS[options.activation]
    before = F.linear(first, weight1, wide.fc1_bias)
    hidden = _ACTIVATE[activation](before)
    branch = F.linear(hidden, weight2, wide.fc2_bias)
    grad_branch = grad
    if wide.residual_scale is not None:
        grad_branch = grad_branch * along_images(wide.residual_scale, grad)
    end, last_inverse = branch, None
    if wide.norm_weight is not None and options.norm_last:
        unit, last_inverse = normalised(branch, options.norm_eps)
        end = unit * wide.norm_weight + (0 if wide.norm_bias is None else wide.norm_bias)
    grad_layer_scale = None
    if wide.layer_scale is not None:
        grad_layer_scale = (grad_branch * end).sum(rows)
        grad_branch = grad_branch * wide.layer_scale
    grad_norm_weight = grad_norm_bias = None
    if last_inverse is not None:
        assert wide.norm_weight is not None
        grad_branch, grad_norm_weight, grad_norm_bias = norm_backward(
            grad_branch, unit, last_inverse, wide.norm_weight
        )
    grad_before = (grad_branch @ weight2) * _slope(before, activation)
    grad_first = grad_before @ weight1
    if wide.norm_weight is not None and not options.norm_last:
        grad_first, grad_norm_weight, grad_norm_bias = norm_backward(
            grad_first, unit, inverse, wide.norm_weight
        )
    grads = (
        grad + grad_first,
        grad_norm_weight,
        grad_norm_bias,
        grad_before.flatten(0, -2).T @ first.flatten(0, -2),
        grad_before.sum(rows),
        grad_branch.flatten(0, -2).T @ hidden.flatten(0, -2),
        grad_branch.sum(rows),
        grad_layer_scale,
    )
    kept = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, operands)]
    return (*kept, None, None, None)
