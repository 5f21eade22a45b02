"""The MLP sublayer in plain PyTorch: forward, and its backward written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.backends.reference.sublayer import (
    BranchBackward,
    add_branch,
    in_order,
    linear,
    linear_backward,
    norm_first,
    widened,
)
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


def mlp_forward(operands: MlpOperands, options: MlpOptions) -> Tensor:
    """x + residual_scale·layer_scale·branch, as stock modules compose it.

    Products are in the dtype of the weights; the result in that of x.
    """
    hidden = linear(norm_first(operands, options), operands.fc1_weight, operands.fc1_bias)
    hidden = _ACTIVATE[ACTIVATIONS[options.activation]](hidden)
    return add_branch(linear(hidden, operands.fc2_weight, operands.fc2_bias), operands, options)


def mlp_backward(
    grad_out: Tensor, operands: MlpOperands, options: MlpOptions
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `MlpOperands`, computed in fp32 or fp64 from the operands alone."""
    wide: MlpOperands = widened(operands)
    branch = BranchBackward(grad_out.to(wide.x.dtype), wide, options)
    activation = ACTIVATIONS[options.activation]
    before = linear(branch.first, wide.fc1_weight, wide.fc1_bias)
    hidden = _ACTIVATE[activation](before)
    grad_branch = branch.behind(linear(hidden, wide.fc2_weight, wide.fc2_bias))
    grad_before = (grad_branch @ wide.fc2_weight) * _slope(before, activation)
    grads: dict[str, Tensor | None] = {"x": branch.before(grad_before @ wide.fc1_weight)}
    grads["fc1_weight"], grads["fc1_bias"] = linear_backward(grad_before, branch.first)
    grads["fc2_weight"], grads["fc2_bias"] = linear_backward(grad_branch, hidden)
    return in_order(grads | branch.grads, operands)
