"""The attention sublayer in plain PyTorch: forward, and its backward written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    AttentionSublayerOperands,
    AttentionSublayerOptions,
)
from swin_kernels.backends.reference.backward import backward
from swin_kernels.backends.reference.forward import forward
from swin_kernels.backends.reference.mlp import (
    add_branch,
    along_images,
    linear,
    norm_backward,
    norm_of,
    normalised,
)
from swin_kernels.problem import Operands


def _attention_operands(operands: AttentionSublayerOperands, qkv: Tensor) -> Operands:
    """Those of attention: a token that padding adds has the bias of qkv for its qkv."""
    pads: dict[str, Tensor | None] = {}
    if operands.qkv_bias is not None:
        _, pads["pad_key"], pads["pad_value"] = operands.qkv_bias.reshape(qkv.shape[-3:]).unbind(0)
    return operands.of_attention(qkv, **pads)


def attention_sublayer_forward(
    operands: AttentionSublayerOperands, options: AttentionSublayerOptions
) -> Tensor:
    """x + residual_scale·layer_scale·branch, as stock modules compose it.

    Products are in the dtype of the weights; the result in that of x.
    """
    x, last = operands.x, options.norm_last
    first = norm_of(x, operands, options.norm_eps) if not last else x
    qkv = linear(first, operands.qkv_weight, operands.qkv_bias)
    qkv = qkv.unflatten(-1, (3, options.num_heads, -1))
    out = forward(_attention_operands(operands, qkv), options.attention)
    branch = linear(out.flatten(-2), operands.proj_weight, operands.proj_bias)
    if last:
        branch = norm_of(branch, operands, options.norm_eps)
    return add_branch(x, branch, operands.layer_scale, operands.residual_scale)


def attention_sublayer_backward(
    grad_out: Tensor, operands: AttentionSublayerOperands, options: AttentionSublayerOptions
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `AttentionSublayerOperands`, in fp32 or fp64.

    From the formulas of docs/math.md, with all between x and the result computed again.
    """
    dtype = torch.promote_types(operands.x.dtype, torch.float32)
    wide = AttentionSublayerOperands(
        *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in operands)  # type: ignore[arg-type]
    )
    x, heads = wide.x, options.num_heads
    grad, rows = grad_out.to(dtype), tuple(range(x.ndim - 1))
    first = x
    if wide.norm_weight is not None and not options.norm_last:
        unit, inverse = normalised(x, options.norm_eps)
        first = unit * wide.norm_weight + (0 if wide.norm_bias is None else wide.norm_bias)
    qkv = F.linear(first, wide.qkv_weight, wide.qkv_bias).unflatten(-1, (3, heads, -1))
    inner = _attention_operands(wide, qkv)
    attended = forward(inner, options.attention).flatten(-2)
    branch = F.linear(attended, wide.proj_weight, wide.proj_bias)
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
    grad_attended = (grad_branch @ wide.proj_weight).unflatten(-1, (heads, -1))
    of_attention = Operands(*backward(grad_attended, inner, options.attention))
    grad_qkv = of_attention.query.flatten(-3)
    grad_qkv_bias = grad_qkv.sum(rows)
    for part, pad in enumerate((None, of_attention.pad_key, of_attention.pad_value)):
        if pad is not None:
            grad_qkv_bias.unflatten(0, (3, heads, -1))[part] += pad
    grad_first = grad_qkv @ wide.qkv_weight
    if wide.norm_weight is not None and not options.norm_last:
        grad_first, grad_norm_weight, grad_norm_bias = norm_backward(
            grad_first, unit, inverse, wide.norm_weight
        )
    grads = (
        grad + grad_first,
        grad_norm_weight,
        grad_norm_bias,
        grad_qkv.flatten(0, -2).T @ first.flatten(0, -2),
        grad_qkv_bias,
        grad_branch.flatten(0, -2).T @ attended.flatten(0, -2),
        grad_branch.sum(rows),
        grad_layer_scale,
        of_attention.bias,
        of_attention.bias_table,
        of_attention.logit_scale,
    )
    kept = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, operands)]
    return (*kept, *(None,) * (len(operands) - len(kept)))
