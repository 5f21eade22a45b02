"""The attention sublayer in plain PyTorch: forward, and its backward written out."""

from __future__ import annotations

from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    AttentionSublayerOperands,
    AttentionSublayerOptions,
)
from swin_kernels.backends.reference.backward import backward
from swin_kernels.backends.reference.forward import forward
from swin_kernels.backends.reference.sublayer import (
    BranchBackward,
    add_branch,
    in_order,
    linear,
    linear_backward,
    norm_first,
    widened,
)
from swin_kernels.problem import Operands


def _attention_operands(operands: AttentionSublayerOperands, qkv: Tensor) -> Operands:
    """Those of attention: a token that padding adds has the bias of qkv for its qkv."""
    pads: dict[str, Tensor | None] = {}
    if operands.qkv_bias is not None:
        _, pads["pad_key"], pads["pad_value"] = operands.qkv_bias.reshape(qkv.shape[-3:]).unbind(0)
    return operands.of_attention(qkv, **pads)


def _qkv(x: Tensor, operands: AttentionSublayerOperands, heads: int) -> Tensor:
    """(B, *S, 3, H, D)"""
    return linear(x, operands.qkv_weight, operands.qkv_bias).unflatten(-1, (3, heads, -1))


def attention_sublayer_forward(
    operands: AttentionSublayerOperands, options: AttentionSublayerOptions
) -> Tensor:
    """x + residual_scale·layer_scale·branch, as stock modules compose it.

    Products are in the dtype of the weights; the result in that of x.
    """
    qkv = _qkv(norm_first(operands, options), operands, options.num_heads)
    attended = forward(_attention_operands(operands, qkv), options.attention).flatten(-2)
    branch = linear(attended, operands.proj_weight, operands.proj_bias)
    return add_branch(branch, operands, options)


def attention_sublayer_backward(
    grad_out: Tensor, operands: AttentionSublayerOperands, options: AttentionSublayerOptions
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `AttentionSublayerOperands`, in fp32 or fp64.

    All between x and the result is computed again.
    """
    wide: AttentionSublayerOperands = widened(operands)
    branch = BranchBackward(grad_out.to(wide.x.dtype), wide, options)
    inner = _attention_operands(wide, _qkv(branch.first, wide, options.num_heads))
    attended = forward(inner, options.attention).flatten(-2)
    grad_branch = branch.behind(linear(attended, wide.proj_weight, wide.proj_bias))
    grad_attended = (grad_branch @ wide.proj_weight).unflatten(-1, (options.num_heads, -1))
    of_attention = Operands(*backward(grad_attended, inner, options.attention))
    grad_qkv = of_attention.query.flatten(-3)
    weight, bias = linear_backward(grad_qkv, branch.first)
    # of keys and values that padding added, which are the bias
    for part, pad in ((1, of_attention.pad_key), (2, of_attention.pad_value)):
        if pad is not None:
            bias.unflatten(0, (3, options.num_heads, -1))[part] += pad
    grads: dict[str, Tensor | None] = {
        "x": branch.before(grad_qkv @ wide.qkv_weight),
        "qkv_weight": weight,
        "qkv_bias": bias,
        "bias": of_attention.bias,
        "bias_table": of_attention.bias_table,
        "logit_scale": of_attention.logit_scale,
    }
    grads["proj_weight"], grads["proj_bias"] = linear_backward(grad_branch, attended)
    return in_order(grads | branch.grads, operands)
