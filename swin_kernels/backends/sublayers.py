"""The sublayers' backends: the fused C++ kernels for CPU tensors, and the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    ATTENTION_SUBLAYER_DIFFERENTIABLE,
    AttentionSublayerProblem,
    attention_sublayer_needs_of,
    split_attention_sublayer_arguments,
)
from swin_kernels.backends import native
from swin_kernels.backends.base import Backend, Needed, Ops, Saved, asked_while_tracing
from swin_kernels.backends.packed_weights import packed_for_inference
from swin_kernels.backends.reference.attention_sublayer import (
    attention_sublayer_backward,
    attention_sublayer_forward,
)
from swin_kernels.backends.reference.mlp import mlp_backward, mlp_forward
from swin_kernels.mlp_problem import (
    MLP_DIFFERENTIABLE,
    MlpProblem,
    mlp_needs_of,
    split_mlp_arguments,
)
from swin_kernels.sublayer_problem import SublayerFacts

SublayerProblem = MlpProblem | AttentionSublayerProblem


def _mlp_products(arguments: Sequence[Any]) -> int:
    """Both layers, of every row; arguments as in a schema, shapes for tensors."""
    operands, _, _ = split_mlp_arguments(arguments)
    *rows, channels = operands.x
    return 4 * math.prod(rows) * channels * operands.fc1_weight[0]


def _attention_products(arguments: Sequence[Any]) -> int:
    """Both layers, of every token, and QKᵀ and AV in all windows, of padding too."""
    operands, options, _ = split_attention_sublayer_arguments(arguments)
    batch, *size, channels = operands.x
    grid = options.attention.grid(size)
    pairs = batch * grid.windows * grid.tokens**2
    return 8 * batch * math.prod(size) * channels**2 + 4 * pairs * channels


def _fakes(split: Callable[[Sequence[Any]], tuple], differentiable: tuple[str, ...]) -> tuple:
    def forward(*arguments) -> Tensor:
        x = split(arguments)[0].x
        return x.new_empty(x.shape)

    def backward(grad_out, *arguments) -> tuple[Tensor, ...]:
        operands, _, (needs,) = split(arguments)
        grads = []
        for bit, name in enumerate(differentiable):
            t = getattr(operands, name)
            written = t is not None and (name == "x" or needs >> bit & 1)
            grads.append(t.new_empty(t.shape) if written else grad_out.new_empty(0))
        return tuple(grads)

    return forward, backward


@functools.cache
def _native_ops(name: str) -> Ops:
    split, differentiable, products = {
        "mlp_sublayer": (split_mlp_arguments, MLP_DIFFERENTIABLE, _mlp_products),
        "window_attention_sublayer": (
            split_attention_sublayer_arguments,
            ATTENTION_SUBLAYER_DIFFERENTIABLE,
            _attention_products,
        ),
    }[name]
    return Ops.named(
        f"swin_kernels::{name}_forward",
        f"swin_kernels::{name}_backward",
        fakes=_fakes(split, differentiable),
        products=products,
    )


# (vector code, dtype of the products) -> why unfused layers are at least as fast there. What is not
# listed is faster fused: docs/design/cpu.md has the measurements.
_SLOWER_HERE = {
    ("default", None): "vectors of 16 bytes alone: torch's own products are faster",
    ("avx2", torch.bfloat16): "AVX2 multiplies bfloat16 in fp32: torch's own products are faster",
    ("avx2", torch.float16): "AVX2 multiplies float16 in fp32: torch's own products are faster",
    ("avx512", torch.float16): "float16 is multiplied in fp32: torch's own products are faster",
}


def why_slower(capability: str, dtype: torch.dtype, multiplies: frozenset[str]) -> str | None:
    """Why unfused layers are chosen for products of this dtype, None where fused ones are faster.

    `capability` is what `native.cpu_capability` says, `multiplies` what the processor multiplies by
    itself beyond that: "amx_bf16", "avx512_bf16".
    """
    for key in ((capability, None), (capability, dtype)):
        if key in _SLOWER_HERE:
            return _SLOWER_HERE[key]
    if dtype == torch.bfloat16 and "amx_bf16" in multiplies:
        return "the processor has AMX, which torch's own bfloat16 products use and these do not yet"
    if dtype == torch.bfloat16 and "avx512_bf16" not in multiplies:
        return "the processor does not multiply bfloat16 by itself: torch's own products are faster"
    return None


@functools.cache
def _multiplies() -> frozenset[str]:
    known = torch.cpu.get_capabilities()
    return frozenset(name for name in ("amx_bf16", "avx512_bf16") if known.get(name, False))


@asked_while_tracing
def _why_slower_here(dtype: torch.dtype) -> str | None:
    return why_slower(native.cpu_capability(), dtype, _multiplies())


class SublayerBackend(Backend):
    """One way to compute a sublayer: which calls it takes follows from few facts."""

    def why_not(self, problem: SublayerProblem) -> str | None:
        return self.why_not_on(problem.facts)

    def why_not_unasked(self, problem: SublayerProblem) -> str | None:
        return self.why_slower_on(problem.facts)

    def why_not_on(self, facts: SublayerFacts) -> str | None:
        """None if it can run calls of these facts, else the reason."""
        return None

    def why_slower_on(self, facts: SublayerFacts) -> str | None:
        """Why the layers one by one are at least as fast."""
        return None


class _CpuSublayer(SublayerBackend):
    """The fused C++ kernels for CPU tensors."""

    name = "cpu"
    device_types = ("cpu",)
    weights: tuple[str, str]
    needs_of: Callable[[Sequence[bool]], int]

    def why_not_on(self, facts: SublayerFacts) -> str | None:
        if self.ops is None:
            return native.CPU_OBJECT.error
        if facts.device.type != "cpu":
            return f"runs on CPU tensors, got {facts.device}"
        if facts.dtype not in (facts.compute_dtype, torch.float32):
            return f"x of {facts.dtype} does not go with products in {facts.compute_dtype}"
        return None

    def why_slower_on(self, facts: SublayerFacts) -> str | None:
        if (reason := _why_slower_here(facts.compute_dtype)) is not None:
            return reason
        # of symbols, as a trace has them, nothing is asked
        if torch.compiler.is_compiling() or type(facts.windows) is not int:
            return None
        if facts.windows < _threads():
            return "there are fewer windows than threads, each of which takes whole windows"
        return None

    def prepared(self, operands: Any, problem: SublayerProblem) -> Any:
        return packed_for_inference(operands, self.weights, problem.facts.compute_dtype)

    def forward(self, operands: Any, options: Any, differentiable: bool) -> tuple[Tensor, Saved]:
        assert self.ops is not None
        return self.ops.forward(*operands, *options), ()

    def backward(
        self, grad_out: Tensor, operands: Any, options: Any, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        assert self.ops is not None
        grads = self.ops.backward(grad_out, *operands, *options, type(self).needs_of(needed))
        return (*grads, *(None,) * (len(operands) - len(grads)))


class CpuMlp(_CpuSublayer):
    weights = ("fc1", "fc2")
    needs_of = staticmethod(mlp_needs_of)
    ops = _native_ops("mlp_sublayer") if native.CPU_OBJECT.error is None else None


class CpuAttentionSublayer(_CpuSublayer):
    weights = ("qkv", "proj")
    needs_of = staticmethod(attention_sublayer_needs_of)
    ops = _native_ops("window_attention_sublayer") if native.CPU_OBJECT.error is None else None


@asked_while_tracing
def _threads() -> int:
    return torch.get_num_threads()


class ReferenceSublayer(SublayerBackend):
    """Plain PyTorch: whatever torch runs on, differentiable to any order."""

    name = "reference"

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., tuple]) -> None:
        self._forward, self._backward = forward, backward

    def forward(self, operands: Any, options: Any, differentiable: bool) -> tuple[Tensor, Saved]:
        return self._forward(operands, options), ()

    def backward(
        self, grad_out: Tensor, operands: Any, options: Any, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        return self._backward(grad_out, operands, options)


class AbsentSublayer(ReferenceSublayer):
    """A backend that does not have a sublayer yet."""

    def __init__(self, name: str, operation: str) -> None:
        self.name, self.operation = name, operation  # type: ignore[misc]

    def why_not_on(self, facts: SublayerFacts) -> str | None:
        return f"has no {self.operation} yet"


def mlp_reference() -> ReferenceSublayer:
    return ReferenceSublayer(mlp_forward, mlp_backward)


def attention_sublayer_reference() -> ReferenceSublayer:
    return ReferenceSublayer(attention_sublayer_forward, attention_sublayer_backward)
