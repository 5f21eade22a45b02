"""The public functions, and the one autograd Function over all backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from swin_kernels.kernels.tracing import asked_while_tracing
from swin_kernels.kernels.triton import direct
from swin_kernels.ops.dispatch import (
    BACKENDS,
    DEFAULT_BACKEND,
    REFERENCE,
    check_name,
    choose,
)
from swin_kernels.problem import MASK_HAS_NO_GRADIENT, Operands, Options, Problem

_OPERANDS = len(Operands._fields)
_OPTIONS = len(Options._fields)


class _BackwardOnce(torch.autograd.Function):
    """The backward as a node of its own, so that a second derivative raises along every path to it.

    `once_differentiable` would instead drop this term silently from derivatives along other paths.
    """

    @staticmethod
    def forward(ctx, backend: str, needed: tuple[bool, ...], grad_out: Tensor, *args):
        operands = Operands(*args[:_OPERANDS])
        options = Options(*args[_OPERANDS : _OPERANDS + _OPTIONS])
        saved = args[_OPERANDS + _OPTIONS :]
        return BACKENDS[backend].backward(grad_out, operands, options, saved, needed)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            'the fused kernels have no second derivative: use backend="reference" for that'
        )


class ShiftedWindowAttentionFunction(torch.autograd.Function):
    """`apply(*Operands, *Options, backend)`: the fused forward and backward, without the checks.

    The arguments are the fields of `swin_kernels.problem.Operands` and
    `swin_kernels.problem.Options` in order, then the name of a backend. Saved are the operands, and
    what little the backend adds (Triton's kernels for large windows: the output and two numbers per
    row): no probabilities, no windows.
    """

    @staticmethod
    def forward(ctx, *args):
        operands, options, backend = (
            Operands(*args[:_OPERANDS]),
            Options(*args[_OPERANDS:-1]),
            args[-1],
        )
        out, saved = BACKENDS[backend].forward(operands, options, True)
        ctx.save_for_backward(*operands, *saved)
        ctx.options = options
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        needed = ctx.needs_input_grad[:_OPERANDS]
        if needed[Operands._fields.index("mask")]:
            raise ValueError(MASK_HAS_NO_GRADIENT)
        not_tensors = (None,) * (_OPTIONS + 1)
        if grad_out is None:
            return (*(None,) * _OPERANDS, *not_tensors)
        saved = ctx.saved_tensors
        operands, saved = Operands(*saved[:_OPERANDS]), saved[_OPERANDS:]
        if torch.is_grad_enabled():
            grads = _BackwardOnce.apply(
                ctx.backend, needed, grad_out, *operands, *ctx.options, *saved
            )
        else:
            grads = BACKENDS[ctx.backend].backward(grad_out, operands, ctx.options, saved, needed)
        kept = [grad if wanted else None for grad, wanted in zip(grads, needed)]
        return (*kept, *not_tensors)


@asked_while_tracing  # dynamo guards on the transforms, but cannot trace the call
def _functorch_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def _transforms_active() -> bool:
    """Forward-mode AD or functorch: a raw op would answer both with silent zeros."""
    # read in traced code, so that dynamo guards on the level and compiles anew inside `dual_level`
    return forward_ad._current_level >= 0 or _functorch_active()


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
    if (key := direct.key_of(operands, backend, options)) is not None and (
        ready := direct.find(key)
    ) is not None:
        return ready(operands)
    if isinstance(operands.query, Tensor):  # else the check below says what came
        operands = _for_autocast(operands)
    problem = Problem.checked(operands, **options)
    if problem.options.dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=operands.query.device)
        operands = operands._replace(dropout_seed=seed)
    if _transforms_active():
        name = DEFAULT_BACKEND if backend is None else backend
        if name is not None and check_name(name) is not REFERENCE:
            raise NotImplementedError(
                f"backend {name!r} cannot run under torch.func transforms or forward-mode AD; "
                'leave backend out, or use backend="reference"'
            )
        return REFERENCE.forward(operands, problem.options, True)[0]
    chosen = choose(problem, backend)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in operands
    )
    if chosen is REFERENCE or not needs_grad:
        out = chosen.forward(operands, problem.options, needs_grad)[0]
        if key is not None and chosen is BACKENDS["triton"]:
            direct.remember(key, asked, problem.options)
        return out
    return ShiftedWindowAttentionFunction.apply(*operands, *problem.options, chosen.name)


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
        ValueError: as in `shifted_window_attention`.
        NotImplementedError: as in `shifted_window_attention`.
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
