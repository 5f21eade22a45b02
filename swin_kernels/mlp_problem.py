"""One call of the MLP sublayer: its tensors, its options, and the checks that both must pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.sublayer_problem import (
    SublayerFacts,
    check_layer_shapes,
    check_layer_tensors,
    check_norm,
    needs_of_first,
    split_arguments_of,
)

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


class MlpOptions(NamedTuple):
    """The numbers of a call, which follow its operands in the ops' schemas."""

    activation: int  #: place in ACTIVATIONS
    norm_last: bool  #: norm="post"
    norm_eps: float


def split_mlp_arguments(
    arguments: Sequence[Any],
) -> tuple[MlpOperands, MlpOptions, tuple[Any, ...]]:
    """`split_arguments_of` the ops of the MLP sublayer."""
    return split_arguments_of(MlpOperands, MlpOptions, arguments)


def mlp_needs_of(needed: Sequence[bool]) -> int:
    """Bits of the backward op's `needs`, by the fields of `MlpOperands`."""
    return needs_of_first(needed, len(MLP_DIFFERENTIABLE))


@dataclass(frozen=True)
class MlpProblem:
    """The facts of one call: all that a backend may ask before it says if it can run."""

    batch: int
    size: tuple[int, ...]
    channels: int
    hidden: int
    activation: str
    norm: str  # "none", "pre" or "post"
    facts: SublayerFacts
    options: MlpOptions

    def __str__(self) -> str:
        dtype, compute = (str(d).removeprefix("torch.") for d in self.facts[1:3])
        return (
            f"mlp_sublayer B={self.batch} map={'×'.join(map(str, self.size))} C={self.channels} "
            f"K={self.hidden} {self.activation} norm={self.norm} {dtype} {self.facts.device}"
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
        check_norm(norm, norm_eps)
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
            facts=SublayerFacts(x.device, x.dtype, compute_dtype or operands.fc1_weight.dtype),
            options=MlpOptions(ACTIVATIONS.index(activation), norm == "post", float(norm_eps)),
        )


def _check_shapes(operands: MlpOperands) -> None:
    x, fc1 = operands.x, operands.fc1_weight
    channels = x.shape[-1]
    if fc1.ndim != 2 or fc1.shape[1] != channels or fc1.shape[0] < 1:
        raise ValueError(
            f"fc1_weight: expected (K, {channels}) beside x of {tuple(x.shape)}, as nn.Linear has "
            f"it, got {tuple(fc1.shape)}"
        )
    hidden = fc1.shape[0]
    expected = {"fc1_bias": (hidden,), "fc2_weight": (channels, hidden), "fc2_bias": (channels,)}
    check_layer_shapes(operands, expected)
