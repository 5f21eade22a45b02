"""One call of the attention sublayer: its tensors, its options, and the checks both must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.mlp_problem import check_layer_tensors
from swin_kernels.problem import Operands, Options, Problem, check_number


class AttentionSublayerOperands(NamedTuple):
    """The tensors of a call, in the order of the ops' schemas."""

    x: Tensor  #: (B, *S, C)
    norm_weight: Tensor | None  #: (C,), None for no norm
    norm_bias: Tensor | None  #: (C,)
    qkv_weight: Tensor  #: (3·C, C)
    qkv_bias: Tensor | None  #: (3·C,)
    proj_weight: Tensor  #: (C, C)
    proj_bias: Tensor | None  #: (C,)
    layer_scale: Tensor | None = None  #: (C,)
    bias: Tensor | None = None  #: (H, N, N)
    bias_table: Tensor | None = None  #: (T, H)
    logit_scale: Tensor | None = None  #: (H,)
    residual_scale: Tensor | None = None  #: (B,), not differentiable
    bias_index: Tensor | None = None  #: (N, N) int
    mask: Tensor | None = None  #: (nW, N, N), not differentiable
    dropout_seed: Tensor | None = None  #: (1,) int64
    qkv_packed: Tensor | None = None  #: qkv_weight as the kernels read it; its dtype is theirs
    proj_packed: Tensor | None = None  #: proj_weight likewise

    def of_attention(self, query: Tensor, **pads: Tensor | None) -> Operands:
        """Those of attention itself, on a packed qkv."""
        return Operands(
            query,
            bias=self.bias,
            bias_table=self.bias_table,
            bias_index=self.bias_index,
            mask=self.mask,
            logit_scale=self.logit_scale,
            dropout_seed=self.dropout_seed,
            **pads,
        )


ATTENTION_SUBLAYER_DIFFERENTIABLE = AttentionSublayerOperands._fields[:11]


class AttentionSublayerOptions(NamedTuple):
    """The numbers of a call, which follow its operands in the ops' schemas."""

    window_size: tuple[int, ...]
    shift_size: tuple[int, ...]
    periodic: tuple[bool, ...]
    roll_then_pad: bool
    mask_value: float
    scale: float
    dropout_p: float
    num_heads: int
    norm_last: bool  #: norm="post"
    norm_eps: float

    @property
    def attention(self) -> Options:
        return Options(*self[: len(Options._fields)])  # type: ignore[arg-type]


def split_attention_sublayer_arguments(
    arguments: Sequence[Any],
) -> tuple[AttentionSublayerOperands, AttentionSublayerOptions, tuple[Any, ...]]:
    """What an op got, in the order of its schema: operands, options, and what follows."""
    first = len(AttentionSublayerOperands._fields)
    last = first + len(AttentionSublayerOptions._fields)
    window, shift, periodic, *numbers = arguments[first:last]
    # lists, as an op gets them, are no keys of a cache
    options = AttentionSublayerOptions(tuple(window), tuple(shift), tuple(periodic), *numbers)
    return AttentionSublayerOperands(*arguments[:first]), options, tuple(arguments[last:])


def attention_sublayer_needs_of(needed: Sequence[bool]) -> int:
    """Bits of the backward op's `needs`, by the fields of `AttentionSublayerOperands`."""
    return sum(1 << b for b, _ in enumerate(ATTENTION_SUBLAYER_DIFFERENTIABLE) if needed[b])


@dataclass(frozen=True)
class AttentionSublayerProblem:
    """The facts of one call: all that a backend may ask before it says if it can run."""

    attention: Problem
    channels: int
    norm: str  # "none", "pre" or "post"
    dtype: torch.dtype
    compute_dtype: torch.dtype  # of the weights, and so of what products take
    device: torch.device
    options: AttentionSublayerOptions

    def __str__(self) -> str:
        dtype, compute = (str(d).removeprefix("torch.") for d in (self.dtype, self.compute_dtype))
        return f"window_attention_sublayer {self.attention} norm={self.norm}" + (
            f", x in {dtype}, products in {compute}" if compute != dtype else ""
        )

    @property
    def windows(self) -> int:
        """Windows of the whole batch."""
        return self.attention.batch * self.attention.grid.windows

    @classmethod
    def checked(
        cls,
        operands: AttentionSublayerOperands,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        norm: str = "pre",
        norm_eps: float = 1e-5,
        compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> AttentionSublayerProblem:
        """The problem that these arguments pose; ValueError if they do not fit together.

        `compute_dtype` is autocast's, where it is on: weights may then have another dtype than x.
        `options` are those of `Problem.checked`.
        """
        if norm not in ("pre", "post"):
            raise ValueError(f"norm: expected 'pre' or 'post', got {norm!r}")
        check_number("norm_eps", norm_eps)
        if not 0.0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps: expected a finite number of at least 0, got {norm_eps}")
        x = operands.x
        check_layer_tensors(operands, ("qkv_weight", "proj_weight"), compute_dtype)
        if not 3 <= x.ndim <= 5 or x.shape[-1] < 1:
            raise ValueError(f"x: expected (B, *S, C) with 1, 2 or 3 axes S, got {tuple(x.shape)}")
        channels = x.shape[-1]
        if not isinstance(num_heads, int) or num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"num_heads: expected a number that divides {channels} channels, got {num_heads!r}"
            )
        expected = {
            "norm_weight": (channels,),
            "norm_bias": (channels,),
            "qkv_weight": (3 * channels, channels),
            "qkv_bias": (3 * channels,),
            "proj_weight": (channels, channels),
            "proj_bias": (channels,),
            "layer_scale": (channels,),
            "residual_scale": (x.shape[0],),
        }
        for name, shape in expected.items():
            t = getattr(operands, name)
            if t is not None and tuple(t.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        # a qkv of no memory, to be checked as attention's own
        packed = x.new_empty(1).expand(*x.shape[:-1], 3, num_heads, channels // num_heads)
        attention = Problem.checked(
            operands.of_attention(packed), window_size, shift_size, **options
        )
        return cls(
            attention=attention,
            channels=channels,
            norm="none" if operands.norm_weight is None else norm,
            dtype=x.dtype,
            compute_dtype=compute_dtype or operands.qkv_weight.dtype,
            device=x.device,
            options=AttentionSublayerOptions(
                *attention.options, num_heads, norm == "post", float(norm_eps)
            ),
        )
