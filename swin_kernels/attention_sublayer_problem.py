"""One call of the attention sublayer: its tensors, its options, and the checks both must pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.problem import Operands, Options, Problem
from swin_kernels.sublayer_problem import (
    SublayerFacts,
    check_layer_shapes,
    check_layer_tensors,
    check_norm,
    needs_of_first,
    split_arguments_of,
)


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
    """`split_arguments_of` the ops of the attention sublayer."""
    return split_arguments_of(AttentionSublayerOperands, AttentionSublayerOptions, arguments)


def attention_sublayer_needs_of(needed: Sequence[bool]) -> int:
    """Bits of the backward op's `needs`, by the fields of `AttentionSublayerOperands`."""
    return needs_of_first(needed, len(ATTENTION_SUBLAYER_DIFFERENTIABLE))


@dataclass(frozen=True)
class AttentionSublayerProblem:
    """The facts of one call: all that a backend may ask before it says if it can run."""

    attention: Problem
    norm: str  # "none", "pre" or "post"
    facts: SublayerFacts
    options: AttentionSublayerOptions

    def __str__(self) -> str:
        dtype, compute = (str(d).removeprefix("torch.") for d in self.facts[1:3])
        return f"window_attention_sublayer {self.attention} norm={self.norm}" + (
            f", x in {dtype}, products in {compute}" if compute != dtype else ""
        )

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
        check_norm(norm, norm_eps)
        x = operands.x
        check_layer_tensors(operands, ("qkv_weight", "proj_weight"), compute_dtype)
        channels = x.shape[-1]
        if not isinstance(num_heads, int) or num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"num_heads: expected a number that divides {channels} channels, got {num_heads!r}"
            )
        expected = {
            "qkv_weight": (3 * channels, channels),
            "qkv_bias": (3 * channels,),
            "proj_weight": (channels, channels),
            "proj_bias": (channels,),
        }
        check_layer_shapes(operands, expected)
        # a qkv of no memory, to be checked as attention's own
        packed = x.new_empty(1).expand(*x.shape[:-1], 3, num_heads, channels // num_heads)
        attention = Problem.checked(
            operands.of_attention(packed), window_size, shift_size, **options
        )
        return cls(
            attention=attention,
            norm="none" if operands.norm_weight is None else norm,
            facts=SublayerFacts(
                x.device,
                x.dtype,
                compute_dtype or operands.qkv_weight.dtype,
                attention.batch * attention.grid.windows,
            ),
            options=AttentionSublayerOptions(
                *attention.options, num_heads, norm == "post", float(norm_eps)
            ),
        )
