"""One configuration of the MLP sublayer, random operands for it, and its unfused form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.mlp_problem import MLP_DIFFERENTIABLE, MlpOperands
from swin_kernels.ops.sublayers import mlp_sublayer
from swin_kernels.testing.cases import DTYPE_NAMES
from swin_kernels.testing.error_rule import assert_within_error_rule, repetitions
from swin_kernels.testing.runs import Result

LAYOUTS = ("contiguous", "cropped", "channels-inside")
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class MlpCase:
    """One configuration of the MLP sublayer; its `str` is a readable test id."""

    batch: int = 2  #: images
    size: tuple[int, ...] = (7, 7)  #: tokens of the map on each axis
    channels: int = 32  #: C
    hidden: int | None = None  #: K, None for 4·C
    dtype: torch.dtype = torch.float32  #: of x and of the weights
    activation: str = "gelu"  #: as `mlp_sublayer` takes it
    norm: str = "pre"  #: "pre", "post" or "none"
    biases: bool = True  #: of both layers and of the norm
    layer_scale: bool = False  #: whether there is one
    drop: bool = False  #: residual_scale, with an image that is dropped
    layout: str = "contiguous"  #: of x and of the gradient, one of LAYOUTS
    others_dtype: torch.dtype | None = None  #: of what has C or B numbers, None for dtype

    def __str__(self) -> str:
        parts = [
            f"B{self.batch}",
            "x".join(map(str, self.size)),
            f"c{self.channels}",
            f"k{self.width}",
            DTYPE_NAMES[self.dtype],
            self.activation,
            f"norm-{self.norm}",
        ]
        flags = (
            (not self.biases, "nobias"),
            (self.layer_scale, "layerscale"),
            (self.drop, "drop"),
            (self.layout != "contiguous", self.layout),
            (self.others_dtype is not None, f"others-{DTYPE_NAMES.get(self.others_dtype)}"),  # type: ignore[arg-type]
        )
        return "-".join(parts + [name for used, name in flags if used])

    @property
    def width(self) -> int:
        return 4 * self.channels if self.hidden is None else self.hidden

    @property
    def options(self) -> dict[str, Any]:
        norm = "pre" if self.norm == "none" else self.norm
        return {"activation": self.activation, "norm": norm, "norm_eps": 1e-5}

    def but(self, **changes: Any) -> MlpCase:
        return dataclasses.replace(self, **changes)


def _map(case: MlpCase, generator: torch.Generator) -> Tensor:
    shape = (case.batch, *case.size, case.channels)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    if case.layout == "cropped":
        larger = (case.batch, *(n + 2 for n in case.size), case.channels + 3)
        inside = (slice(1, -1),) * len(case.size)
        crop = (slice(None), *inside, slice(2, -1))
        return randn(*larger)[crop]
    if case.layout == "channels-inside":
        return randn(case.batch, case.channels, *case.size).movedim(1, -1)
    return randn(*shape)


def make_mlp_operands(case: MlpCase, seed: int = 0) -> MlpOperands:
    """Random tensors of the case, as trained layers hold them in size."""
    generator = torch.Generator().manual_seed(seed)
    others = case.others_dtype or case.dtype
    channels, hidden = case.channels, case.width

    def randn(*shape: int, std: float, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std + mean).to(dtype)

    normed = case.norm != "none"
    scale = None
    if case.drop:
        scale = torch.rand(case.batch, generator=generator).to(others) + 0.5
        scale[-1] = 0.0
    return MlpOperands(
        _map(case, generator),
        randn(channels, std=0.2, dtype=others, mean=1.0) if normed else None,
        randn(channels, std=0.2, dtype=others) if normed and case.biases else None,
        randn(hidden, channels, std=channels**-0.5, dtype=case.dtype),
        randn(hidden, std=0.2, dtype=others) if case.biases else None,
        randn(channels, hidden, std=hidden**-0.5, dtype=case.dtype),
        randn(channels, std=0.2, dtype=others) if case.biases else None,
        randn(channels, std=1.0, dtype=others) if case.layer_scale else None,
        scale,
    )


def make_mlp_grad_out(case: MlpCase, seed: int = 1) -> Tensor:
    """A random gradient of the output, laid out as x is."""
    return _map(case, torch.Generator().manual_seed(seed))


def call_mlp(case: MlpCase, operands: MlpOperands, backend: str | None = None) -> Tensor:
    """The public function on these operands."""
    return mlp_sublayer(
        operands.x,
        operands.fc1_weight,
        operands.fc1_bias,
        operands.fc2_weight,
        operands.fc2_bias,
        norm_weight=operands.norm_weight,
        norm_bias=operands.norm_bias,
        layer_scale=operands.layer_scale,
        residual_scale=operands.residual_scale,
        **case.options,
        backend=backend,
    )


def unfused_mlp(case: MlpCase, operands: MlpOperands) -> Tensor:
    """The composition of stock modules."""
    x, weight, bias, w1, b1, w2, b2, layer_scale, residual_scale, *_ = operands

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    def norm(x: Tensor) -> Tensor:
        if weight is None:
            return x
        dtype = x.dtype
        given = None if bias is None else bias.to(dtype)
        return F.layer_norm(x, x.shape[-1:], weight.to(dtype), given, 1e-5)

    branch = norm(x) if case.norm == "pre" else x
    branch = linear(_ACTIVATIONS[case.activation](linear(branch, w1, b1)), w2, b2)
    if case.norm == "post":
        branch = norm(branch)
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    if residual_scale is not None:
        branch = branch * residual_scale.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))
    return x + branch


def mlp_with_grad(operands: MlpOperands) -> MlpOperands:
    """The same memory, as leaves that require grad where the operation is differentiable."""
    leaves = {
        name: t.detach().requires_grad_()
        for name in MLP_DIFFERENTIABLE
        if (t := getattr(operands, name)) is not None
    }
    return operands._replace(**leaves)


def differentiate_mlp(function: Any, operands: MlpOperands, grad_out: Tensor) -> Result:
    """`function` of the operands and its gradients at `grad_out`."""
    leaves = mlp_with_grad(operands)
    out = function(leaves)
    names = [name for name in MLP_DIFFERENTIABLE if getattr(leaves, name) is not None]
    grads = torch.autograd.grad(
        out, [getattr(leaves, name) for name in names], grad_out.to(out.dtype)
    )
    return Result(out.detach(), dict(zip(names, grads)))


def run_mlp(
    case: MlpCase, operands: MlpOperands, grad_out: Tensor, backend: str | None = None
) -> Result:
    """The operation and its gradients on `backend`."""
    return differentiate_mlp(lambda leaves: call_mlp(case, leaves, backend), operands, grad_out)


def run_mlp_unfused(case: MlpCase, operands: MlpOperands, grad_out: Tensor) -> Result:
    """Stock modules, and their gradients."""
    return differentiate_mlp(lambda leaves: unfused_mlp(case, leaves), operands, grad_out)


def run_mlp_exact(case: MlpCase, operands: MlpOperands, grad_out: Tensor) -> Result:
    """The same in float64."""
    wide = MlpOperands(*(None if t is None else t.double() for t in operands))  # type: ignore[arg-type]
    return run_mlp_unfused(case, wide, grad_out.double())


def check_mlp(case: MlpCase, backend: str | None = None, seed: int = 0) -> Result:
    """Run `case` on `backend` and hold it to the error rule, over several inputs if it is small.

    Raises:
        AssertionError: the error rule is broken.
        NotImplementedError: the backend cannot run the case, with the reason.
    """

    def measure(seed: int) -> tuple[Result, Result, Result]:
        operands, grad_out = make_mlp_operands(case, seed), make_mlp_grad_out(case, seed + 1)
        return (
            run_mlp(case, operands, grad_out, backend),
            run_mlp_unfused(case, operands, grad_out),
            run_mlp_exact(case, operands, grad_out),
        )

    measured = [measure(seed)]
    sizes = [t.numel() for t in (measured[0][0].out, *measured[0][0].grads.values())]
    runs = repetitions(max(sizes[0], 1), min(sizes))
    measured += [measure(seed + 2 * i) for i in range(1, runs)]
    ours, eager, exact = zip(*measured)
    if case.dtype == torch.float64:  # the unfused path is what is called exact there
        for mine, best in zip(ours, exact):
            assert_close_in_float64(mine, best)
    else:
        assert_within_error_rule(ours, eager, exact)
    return ours[0]


def assert_close_in_float64(ours: Result, exact: Result) -> None:
    """Within 32 units of the last place of the largest value, in every result."""
    pairs = {"output": (ours.out, exact.out)}
    pairs |= {f"gradient of {name}": (g, exact.grads[name]) for name, g in ours.grads.items()}
    for name, (a, b) in pairs.items():
        error = float((a - b).abs().max()) if a.numel() else 0.0
        allowed = 32 * torch.finfo(torch.float64).eps * float(b.abs().max()) if b.numel() else 0.0
        assert error <= allowed, f"{name}: {error=:.3e} exceeds {allowed=:.3e}"
