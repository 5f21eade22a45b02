"""One call of the MLP sublayer: its tensors, its options, and the checks that both must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.problem import DTYPES, check_number

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


class MlpOperands(NamedTuple):
    """The tensors of a call, in the order of the ops' schemas."""

    x: Tensor  #: (B, *S, C)
    norm_weight: Tensor | None  #: (C,), None for no norm
    norm_bias: Tensor | None  #: (C,)
    fc1_weight: Tensor  #: (K, C)
    fc1_bias: Tensor | None  #: (K,)
    fc2_weight: Tensor  #: (C, K)
    fc2_bias: Tensor | None  #: (C,)
    layer_scale: Tensor | None = None  #: (C,)
    residual_scale: Tensor | None = None  #: (B,), not differentiable
    fc1_packed: Tensor | None = None  #: fc1_weight as the kernels read it; its dtype is theirs
    fc2_packed: Tensor | None = None  #: fc2_weight likewise


MLP_DIFFERENTIABLE = MlpOperands._fields[:8]
RESIDUAL_SCALE_HAS_NO_GRADIENT = (
    "residual_scale requires grad, but has no gradient here: it is drawn, not learnt; detach it"
)


class MlpOptions(NamedTuple):
    """The numbers of a call, which follow its operands in the ops' schemas."""

    activation: int  #: place in ACTIVATIONS
    norm_last: bool  #: norm="post"
    norm_eps: float


def split_mlp_arguments(
    arguments: Sequence[Any],
) -> tuple[MlpOperands, MlpOptions, tuple[Any, ...]]:
    """What an op got, in the order of its schema: operands, options, and what follows."""
    first, last = len(MlpOperands._fields), len(MlpOperands._fields) + len(MlpOptions._fields)
    options = MlpOptions(*arguments[first:last])
    return MlpOperands(*arguments[:first]), options, tuple(arguments[last:])


def mlp_needs_of(needed: Sequence[bool]) -> int:
    """Bits of the backward op's `needs`, by the fields of `MlpOperands`."""
    return sum(1 << bit for bit, _ in enumerate(MLP_DIFFERENTIABLE) if needed[bit])


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


@dataclass(frozen=True)
class MlpProblem:
    """The facts of one call: all that a backend may ask before it says if it can run."""

    batch: int
    size: tuple[int, ...]
    channels: int
    hidden: int
    activation: str
    norm: str  # "none", "pre" or "post"
    dtype: torch.dtype
    compute_dtype: torch.dtype  # of the weights, and so of what products take
    device: torch.device
    options: MlpOptions

    def __str__(self) -> str:
        dtype, compute = (str(d).removeprefix("torch.") for d in (self.dtype, self.compute_dtype))
        return (
            f"mlp_sublayer B={self.batch} map={'×'.join(map(str, self.size))} C={self.channels} "
            f"K={self.hidden} {self.activation} norm={self.norm} {dtype} {self.device}"
            + (f", products in {compute}" if compute != dtype else "")
        )

    @classmethod
    def checked(
        cls,
        operands: MlpOperands,
        *,
        activation: str = "gelu",
        norm: str = "pre",
        norm_eps: float = 1e-5,
        compute_dtype: torch.dtype | None = None,
    ) -> MlpProblem:
        """The problem that these arguments pose; ValueError if they do not fit together.

        `compute_dtype` is autocast's, where it is on: weights may then have another dtype than x.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if norm not in ("pre", "post"):
            raise ValueError(f"norm: expected 'pre' or 'post', got {norm!r}")
        check_number("norm_eps", norm_eps)
        if not 0.0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps: expected a finite number of at least 0, got {norm_eps}")
        check_layer_tensors(operands, ("fc1_weight", "fc2_weight"), compute_dtype)
        _check_shapes(operands)
        x = operands.x
        return cls(
            batch=x.shape[0],
            size=tuple(x.shape[1:-1]),
            channels=x.shape[-1],
            hidden=operands.fc1_weight.shape[0],
            activation=activation,
            norm="none" if operands.norm_weight is None else norm,
            dtype=x.dtype,
            compute_dtype=compute_dtype or operands.fc1_weight.dtype,
            device=x.device,
            options=MlpOptions(ACTIVATIONS.index(activation), norm == "post", float(norm_eps)),
        )


_WHOLE_NUMBERS = ("bias_index", "dropout_seed")


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


def _check_shapes(operands: MlpOperands) -> None:
    x, fc1 = operands.x, operands.fc1_weight
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x: expected (B, *S, C) with 1, 2 or 3 axes S, got {_shape(x)}")
    channels = x.shape[-1]
    if channels < 1:
        raise ValueError(f"x: expected at least one channel, got {_shape(x)}")
    if fc1.ndim != 2 or fc1.shape[1] != channels or fc1.shape[0] < 1:
        raise ValueError(
            f"fc1_weight: expected (K, {channels}) beside x of {_shape(x)}, as nn.Linear has it, "
            f"got {_shape(fc1)}"
        )
    hidden = fc1.shape[0]
    expected = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "fc1_bias": (hidden,),
        "fc2_weight": (channels, hidden),
        "fc2_bias": (channels,),
        "layer_scale": (channels,),
        "residual_scale": (x.shape[0],),
    }
    for name, shape in expected.items():
        t = getattr(operands, name)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {_shape(t)}")
