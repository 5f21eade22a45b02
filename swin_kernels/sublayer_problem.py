"""What the calls of both sublayers have in common: facts, checks, the arguments of their ops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from swin_kernels.problem import DTYPES, check_number

RESIDUAL_SCALE_HAS_NO_GRADIENT = (
    "residual_scale requires grad, but has no gradient here: it is drawn, not learnt; detach it"
)
_WHOLE_NUMBERS = ("bias_index", "dropout_seed")

OperandsT = TypeVar("OperandsT", bound=tuple)
OptionsT = TypeVar("OptionsT", bound=tuple)


class SublayerFacts(NamedTuple):
    """What a backend's choice depends on, whatever else a call is."""

    device: torch.device
    dtype: torch.dtype  #: of x
    compute_dtype: torch.dtype  #: of the weights, and so of what products take
    windows: int | None = None  #: of the whole batch; None where there are none, or not yet known


def split_arguments_of(
    operands: type[OperandsT], options: type[OptionsT], arguments: Sequence[Any]
) -> tuple[OperandsT, OptionsT, tuple[Any, ...]]:
    """What an op got, in the order of its schema: operands, options, and what follows."""
    first = len(operands._fields)  # type: ignore[attr-defined]
    last = first + len(options._fields)  # type: ignore[attr-defined]
    # lists, as an op gets them, are no keys of a cache
    numbers = (tuple(x) if isinstance(x, list) else x for x in arguments[first:last])
    return operands(*arguments[:first]), options(*numbers), tuple(arguments[last:])


def needs_of_first(needed: Sequence[bool], count: int) -> int:
    """Bits of a backward op's `needs`: which of its first `count` operands need a gradient."""
    return sum(1 << bit for bit in range(count) if needed[bit])


def check_norm(norm: str, norm_eps: float) -> None:
    if norm not in ("pre", "post"):
        raise ValueError(f"norm: expected 'pre' or 'post', got {norm!r}")
    check_number("norm_eps", norm_eps)
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a finite number of at least 0, got {norm_eps}")


def check_layer_tensors(
    operands: Any, weights: tuple[str, str], compute_dtype: torch.dtype | None
) -> None:
    """ValueError unless all are dense floating tensors on one device, x and weights of one dtype.

    `operands` is a named tuple of a sublayer; without autocast `compute_dtype` is None.
    """
    for name, t in zip(operands._fields, operands):
        if t is None and name not in ("x", *weights):
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(t).__name__}")
        if name in _WHOLE_NUMBERS:
            continue
        if t.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {t.layout}")
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {t.dtype}")
        if t.device != operands.x.device:
            raise ValueError(
                f"{name} is on {t.device}, x on {operands.x.device}: move them to one device"
            )
    for name in weights:
        dtype = getattr(operands, name).dtype
        if compute_dtype is None and dtype != operands.x.dtype:
            raise ValueError(
                f"{name} is {dtype}, x {operands.x.dtype}: cast them to one dtype, or use autocast"
            )
    if operands.norm_bias is not None and operands.norm_weight is None:
        raise ValueError("norm_bias came without a norm_weight: pass both or neither")
    scale = operands.residual_scale
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(RESIDUAL_SCALE_HAS_NO_GRADIENT)
    x = operands.x
    if not 3 <= x.ndim <= 5 or x.shape[-1] < 1:
        raise ValueError(
            f"x: expected (B, *S, C) with 1, 2 or 3 axes S and at least one channel, "
            f"got {tuple(x.shape)}"
        )


def check_layer_shapes(operands: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the operands have these shapes, and the branch's vectors theirs."""
    batch, *_, channels = operands.x.shape
    vectors = dict.fromkeys(("norm_weight", "norm_bias", "layer_scale"), (channels,))
    for name, shape in (vectors | {"residual_scale": (batch,)} | dict(expected)).items():
        t: Tensor | None = getattr(operands, name)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
