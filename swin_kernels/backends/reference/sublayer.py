"""What both sublayers share in plain PyTorch: norms, layers, and the sum with x.

x + residual_scale·layer_scale·branch; the branch is layers behind a norm, or a norm behind layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _along_images(scale: Tensor, x: Tensor) -> Tensor:
    """(B,) to be multiplied with (B, *S, C)."""
    return scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b in the dtype of the weight."""
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def linear_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a layer's weight and bias."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2), grad.sum(tuple(range(grad.ndim - 1)))


def _layer_norm(x: Tensor, operands: Any, eps: float) -> Tensor:
    weight, bias = operands.norm_weight, operands.norm_bias
    dtype = torch.promote_types(x.dtype, weight.dtype)
    given = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), given, eps)


def norm_first(operands: Any, options: Any) -> Tensor:
    """What the first layer takes."""
    if operands.norm_weight is None or options.norm_last:
        return operands.x
    return _layer_norm(operands.x, operands, options.norm_eps)


def add_branch(branch: Tensor, operands: Any, options: Any) -> Tensor:
    """x plus what the second layer gave, in the dtype of x."""
    x, scale = operands.x, operands.residual_scale
    if operands.norm_weight is not None and options.norm_last:
        branch = _layer_norm(branch, operands, options.norm_eps)
    if operands.layer_scale is not None:
        branch = branch * operands.layer_scale
    if scale is not None:
        # a dropped image takes nothing of its branch, not even what is not finite in it
        scale = _along_images(scale, branch)
        branch = torch.where(scale == 0, torch.zeros_like(branch), branch * scale)
    return (x + branch).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean)/√(var + ε), and the root's inverse."""
    centred = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


@dataclass
class BranchBackward:
    """The backward of all but the layers, from the formulas of docs/math.md.

    Operands in fp32 or fp64. In turn: `first` is what the first layer takes, `behind` goes from the
    end to the second layer's output, `before` from the first layer's input to x; both leave the
    gradients of the parameters that they pass in `grads`.
    """

    grad_out: Tensor
    operands: Any
    options: Any
    grads: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = self.operands.x
        if self._has_norm and not self.options.norm_last:
            self._unit, self._inverse = _normalised(self.operands.x, self.options.norm_eps)
            self._first = self._affine()

    @property
    def _has_norm(self) -> bool:
        return self.operands.norm_weight is not None

    @property
    def first(self) -> Tensor:
        return self._first

    def _affine(self) -> Tensor:
        bias = self.operands.norm_bias
        return self._unit * self.operands.norm_weight + (0 if bias is None else bias)

    def behind(self, output: Tensor) -> Tensor:
        """The gradient of the second layer's `output`."""
        grad, scale = self.grad_out, self.operands.residual_scale
        if scale is not None:
            grad = grad * _along_images(scale, grad)
        norm_last = self._has_norm and self.options.norm_last
        if norm_last:
            self._unit, self._inverse = _normalised(output, self.options.norm_eps)
            output = self._affine()
        if self.operands.layer_scale is not None:
            self.grads["layer_scale"] = (grad * output).sum(tuple(range(grad.ndim - 1)))
            grad = grad * self.operands.layer_scale
        return self._through_norm(grad) if norm_last else grad

    def before(self, grad: Tensor) -> Tensor:
        """The gradient of x, from that of what the first layer takes."""
        if self._has_norm and not self.options.norm_last:
            grad = self._through_norm(grad)
        return self.grad_out + grad

    def _through_norm(self, grad: Tensor) -> Tensor:
        rows, unit = tuple(range(grad.ndim - 1)), self._unit
        self.grads |= {"norm_weight": (grad * unit).sum(rows), "norm_bias": grad.sum(rows)}
        grad = grad * self.operands.norm_weight
        mean, slope = grad.mean(-1, keepdim=True), (grad * unit).mean(-1, keepdim=True)
        return (grad - mean - unit * slope) * self._inverse


def widened(operands: Any) -> Any:
    """The operands of a sublayer in fp32, in fp64 for fp64."""
    dtype = torch.promote_types(operands.x.dtype, torch.float32)
    wide = (t.to(dtype) if t is not None and t.is_floating_point() else t for t in operands)
    return type(operands)(*wide)


def in_order(grads: dict[str, Tensor | None], operands: Any) -> tuple[Tensor | None, ...]:
    """Gradients by name as those of operands, each in its operand's dtype."""
    found = ((t, grads.get(name)) for name, t in zip(operands._fields, operands))
    return tuple(None if t is None or g is None else g.to(t.dtype) for t, g in found)
