"""The public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swin_kernels.backends import reference
from swin_kernels.backends.base import below_autograd
from swin_kernels.ops import repeated
from swin_kernels.ops.autograd import (
    ATTENTION,
    ShiftedWindowAttentionFunction,
    reference_under_transforms,
    transforms_active,
)
from swin_kernels.ops.dispatch import REFERENCE, choose
from swin_kernels.problem import Operands, Problem


def _for_autocast(operands: Operands) -> Operands:
    """query, key and value in autocast's dtype; biases stay: logits are summed in fp32 anyway."""
    device = operands.query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta
        return operands
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == torch.float64 else x.to(dtype)

    query = cast(operands.query)
    assert query is not None
    return operands._replace(query=query, key=cast(operands.key), value=cast(operands.value))


def _attend(operands: Operands, backend: str | None, **options) -> Tensor:
    asked = operands
    if (key := repeated.key_of(operands, backend, options)) is not None and (
        run := repeated.find(key)
    ) is not None:
        return run(operands)[0]
    if isinstance(operands.query, Tensor):  # else the check below says what came
        operands = _for_autocast(operands)
    problem = Problem.checked(operands, **options)
    if problem.options.dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=operands.query.device)
        operands = operands._replace(dropout_seed=seed)
    if transforms_active():
        reference = reference_under_transforms(ATTENTION, backend)
        return reference.forward(operands, problem.options, True)[0]
    chosen = choose(problem, backend)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in operands
    )
    # a graph gets the op, whose autograd is its own
    if chosen is REFERENCE or torch.compiler.is_compiling():
        return chosen.forward(operands, problem.options, needs_grad)[0]
    if needs_grad:
        return ShiftedWindowAttentionFunction.apply(*operands, *problem.options, chosen.name)
    with below_autograd():
        out = chosen.forward(operands, problem.options, False)[0]
    if key is not None:
        repeated.remember(key, chosen, asked, problem.options)
    return out


def shifted_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    pad_order: str = "pad-roll",
    periodic: bool | Sequence[bool] = False,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale·q·kᵀ + bias + mask)·v in shifted windows of an unpartitioned map, in one op.

    Pad each axis at its end to a multiple of the window, roll by −shift, split into windows,
    attend within each, put back, roll back, crop: without a copy of query, key or value, and
    without the logits ever in memory. Liu et al., "Swin Transformer", ICCV 2021, eq. 4 and section
    3.2; cosine attention from "Swin Transformer V2", CVPR 2022, eq. 2. The full contract is
    docs/contract.md.

    Args:
        query, key: (B, *S, H, D), any strides; S has 1, 2 or 3 axes. fp16, bf16, fp32 or fp64.
        value: (B, *S, H, Dv).
        window_size, shift_size: tokens, one int or one per axis; 0 <= shift < window; 0 is no
            shift on that axis.
        bias: (H, N, N) added to the logits, differentiable; N is the product of window_size.
        bias_table, bias_index: (T, H) and (N, N) int, instead of `bias`; without an index the
            geometric one. The gradient is a gradient of the table.
        mask: (nW, N, N) added per window of an image, row-major; not differentiable.
        mask_value: what is added between tokens of different regions of a shifted map: −100, −200,
            −inf, …
        pad_key, pad_value: (H, D) and (H, Dv), what a token added by padding holds; None is zeros.
            Padded tokens are keys like any other.
        pad_order: "pad-roll" (torchvision, transformers, MONAI) or "roll-pad" (timm).
        periodic: per axis, True where the map wraps round: no region boundary there.
        scale: default D**-0.5.
        logit_scale: (H,), cosine attention: q·k/(‖q‖‖k‖)·logit_scale; the caller clamps and
            exponentiates.
        dropout_p: dropout on the probabilities, seeded from torch's generator.
        backend: None chooses; a name ("cpu", "reference") never falls back.

    Returns:
        (B, *S, H, Dv), contiguous, in the dtype of query (under autocast, autocast's).

    Raises:
        ValueError: shapes, dtypes, devices, windows or options that do not fit, before anything is
            computed.
        NotImplementedError: the backend asked for cannot run this, with the reason.
    """
    operands = Operands(
        query, key, value, bias, bias_table, bias_index, mask, pad_key, pad_value, logit_scale
    )
    if key is None or value is None:
        raise ValueError(
            "key and value: expected tensors; for packed qkv use shifted_window_attention_qkvpacked"
        )
    return _attend(
        operands,
        backend,
        window_size=window_size,
        shift_size=shift_size,
        mask_value=mask_value,
        pad_order=pad_order,
        periodic=periodic,
        scale=scale,
        dropout_p=dropout_p,
    )


def shifted_window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    pad_order: str = "pad-roll",
    periodic: bool | Sequence[bool] = False,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`shifted_window_attention` of qkv (B, *S, 3, H, D), as one linear layer writes it.

    The gradient of qkv is written packed.

    Args:
        qkv: (B, *S, 3, H, D), query, key and value in this order; any strides; S has 1, 2 or 3
            axes. fp16, bf16, fp32 or fp64.

    All other arguments are those of `shifted_window_attention`, with Dv = D.

    Returns:
        (B, *S, H, D), contiguous, in the dtype of qkv (under autocast, autocast's).

    Raises:
        ValueError, NotImplementedError: As `shifted_window_attention` does.
    """
    return _attend(
        Operands(
            qkv, None, None, bias, bias_table, bias_index, mask, pad_key, pad_value, logit_scale
        ),
        backend,
        window_size=window_size,
        shift_size=shift_size,
        mask_value=mask_value,
        pad_order=pad_order,
        periodic=periodic,
        scale=scale,
        dropout_p=dropout_p,
    )


def unfused_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    softmax: Callable[[Tensor], Tensor],
    attn_drop: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """`shifted_window_attention_qkvpacked` in plain PyTorch, through two functions of the caller.

    `softmax` and `attn_drop` are called on (B·nW, H, N, N), in the dtype of the sums.
    """
    given = {name: options.pop(name, None) for name in Operands._fields[1:]}
    operands = Operands(qkv, **given)
    if isinstance(qkv, Tensor):
        operands = _for_autocast(operands)
    problem = Problem.checked(operands, window_size, shift_size, **options)
    return reference.forward_through(operands, problem.options, softmax, attn_drop)
