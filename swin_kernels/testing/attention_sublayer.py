"""One configuration of the attention sublayer, random operands for it, and its unfused form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    ATTENTION_SUBLAYER_DIFFERENTIABLE,
    AttentionSublayerOperands,
)
from swin_kernels.geometry import Grid
from swin_kernels.ops.sublayers import window_attention_sublayer
from swin_kernels.position_bias import table_length
from swin_kernels.problem import Operands
from swin_kernels.testing.cases import DTYPE_NAMES, Case
from swin_kernels.testing.error_rule import assert_within_error_rule, repetitions
from swin_kernels.testing.mlp import assert_close_in_float64
from swin_kernels.testing.runs import Result
from swin_kernels.testing.unfused import unfused

BIASES = ("none", "dense", "table", "table+index")


@dataclass(frozen=True)
class SublayerCase:
    """One configuration of the attention sublayer; its `str` is a readable test id."""

    batch: int = 2  #: images
    size: tuple[int, ...] = (9, 11)  #: tokens of the map on each axis
    window: tuple[int, ...] = (4, 4)  #: tokens of a window on each axis
    shift: tuple[int, ...] = ()  #: tokens on each axis, empty for no shift
    heads: int = 2  #: heads
    channels: int = 32  #: C
    dtype: torch.dtype = torch.float32  #: of x and of the weights
    norm: str = "pre"  #: "pre", "post" or "none"
    bias: str = "table"  #: one of BIASES
    biases: bool = True  #: of both layers and of the norm
    cosine: bool = False  #: cosine attention, with logit_scale
    mask: bool = False  #: an explicit mask
    mask_value: float = -100.0  #: added between tokens of different regions
    pad_order: str = "pad-roll"  #: or "roll-pad"
    periodic: tuple[bool, ...] | None = None  #: on each axis, None for none
    scale: float | None = None  #: factor of q·k, None for head_dim**-0.5
    dropout_p: float = 0.0  #: dropout on the probabilities
    layer_scale: bool = False  #: whether there is one
    drop: bool = False  #: residual_scale, with an image that is dropped
    layout: str = "contiguous"  #: of x and of the gradient: or "cropped"
    others_dtype: torch.dtype | None = None  #: of all but x and the weights, None for dtype

    def __post_init__(self) -> None:
        if not self.shift:
            object.__setattr__(self, "shift", (0,) * len(self.size))
        assert self.bias in BIASES, self.bias

    def __str__(self) -> str:
        parts = [
            f"B{self.batch}",
            "x".join(map(str, self.size)),
            "w" + "x".join(map(str, self.window)),
            "s" + "x".join(map(str, self.shift)),
            f"h{self.heads}",
            f"c{self.channels}",
            DTYPE_NAMES[self.dtype],
            f"norm-{self.norm}",
            self.bias,
        ]
        flags = (
            (not self.biases, "nobias"),
            (self.cosine, "cosine"),
            (self.mask, "mask"),
            (self.mask_value != -100.0, f"mv{self.mask_value:g}"),
            (self.pad_order != "pad-roll", "rollpad"),
            (self.periodic is not None, "periodic"),
            (self.scale is not None, f"scale{self.scale}"),
            (self.dropout_p > 0, f"p{self.dropout_p}"),
            (self.layer_scale, "layerscale"),
            (self.drop, "drop"),
            (self.layout != "contiguous", self.layout),
            (self.others_dtype is not None, "wide"),
        )
        return "-".join(parts + [name for used, name in flags if used])

    @property
    def grid(self) -> Grid:
        return Grid(
            self.size,
            self.window,
            self.shift,
            self.periodic or (False,) * len(self.size),
            self.pad_order,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "norm": "pre" if self.norm == "none" else self.norm,
            "mask_value": self.mask_value,
            "pad_order": self.pad_order,
            "periodic": self.periodic or False,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
        }

    @property
    def attention(self) -> Case:
        """The case of attention alone, on a packed qkv."""
        return Case(
            self.batch,
            self.size,
            self.window,
            self.shift,
            self.heads,
            self.channels // self.heads,
            packed=True,
            mask_value=self.mask_value,
            pad_order=self.pad_order,
            periodic=self.periodic,
            scale=self.scale,
            dropout_p=self.dropout_p,
            cosine=self.cosine,
        )

    def but(self, **changes: Any) -> SublayerCase:
        return dataclasses.replace(self, **changes)


def _map(case: SublayerCase, generator: torch.Generator) -> Tensor:
    if case.layout == "cropped":
        larger = (case.batch, *(n + 2 for n in case.size), case.channels + 3)
        inside = (slice(1, -1),) * len(case.size)
        crop = (slice(None), *inside, slice(2, -1))
        return torch.randn(*larger, generator=generator).to(case.dtype)[crop]
    shape = (case.batch, *case.size, case.channels)
    return torch.randn(*shape, generator=generator).to(case.dtype)


def make_sublayer_operands(case: SublayerCase, seed: int = 0) -> AttentionSublayerOperands:
    """Random tensors of the case, as trained layers hold them in size."""
    generator = torch.Generator().manual_seed(seed)
    others = case.others_dtype or case.dtype
    c, n, heads = case.channels, case.grid.tokens, case.heads

    def randn(*shape: int, std: float, dtype: torch.dtype = others, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std + mean).to(dtype)

    normed, scale, index = case.norm != "none", None, None
    if case.drop:
        scale = torch.rand(case.batch, generator=generator).to(others) + 0.5
        scale[-1] = 0.0
    rows = table_length(case.window)
    if case.bias == "table+index":
        rows = 7
        index = torch.randint(rows, (n, n), generator=generator)
    return AttentionSublayerOperands(
        _map(case, generator),
        randn(c, std=0.2, mean=1.0) if normed else None,
        randn(c, std=0.2) if normed and case.biases else None,
        randn(3 * c, c, std=c**-0.5, dtype=case.dtype),
        randn(3 * c, std=0.5) if case.biases else None,
        randn(c, c, std=c**-0.5, dtype=case.dtype),
        randn(c, std=0.2) if case.biases else None,
        randn(c, std=1.0) if case.layer_scale else None,
        randn(heads, n, n, std=1.0) if case.bias == "dense" else None,
        randn(rows, heads, std=1.0) if case.bias.startswith("table") else None,
        randn(heads, std=1.0, mean=5.0) if case.cosine else None,
        scale,
        index,
        randn(case.grid.windows, n, n, std=1.0) if case.mask else None,
    )


def make_sublayer_grad_out(case: SublayerCase, seed: int = 1) -> Tensor:
    """A random gradient of the output, laid out as x is."""
    return _map(case, torch.Generator().manual_seed(seed))


def call_sublayer(
    case: SublayerCase, operands: AttentionSublayerOperands, backend: str | None = None
) -> Tensor:
    """The public function on these operands."""
    named = ["norm_weight", "norm_bias", "layer_scale", "residual_scale", "bias", "bias_table"]
    named += ["bias_index", "mask", "logit_scale"]
    return window_attention_sublayer(
        operands.x,
        operands.qkv_weight,
        operands.qkv_bias,
        operands.proj_weight,
        operands.proj_bias,
        case.heads,
        case.window,
        case.shift,
        **{name: getattr(operands, name) for name in named},
        **case.options,
        backend=backend,
    )


def unfused_sublayer(case: SublayerCase, operands: AttentionSublayerOperands) -> Tensor:
    """The composition of stock modules."""
    x, weight, bias = operands.x, operands.norm_weight, operands.norm_bias

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    def norm(x: Tensor) -> Tensor:
        if weight is None:
            return x
        given = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), given, 1e-5)

    first = norm(x) if case.norm == "pre" else x
    qkv = linear(first, operands.qkv_weight, operands.qkv_bias)
    qkv = qkv.unflatten(-1, (3, case.heads, -1))
    pads = {}
    if operands.qkv_bias is not None:
        packed = operands.qkv_bias.to(qkv.dtype).reshape(qkv.shape[-3:])
        pads = {"pad_key": packed[1], "pad_value": packed[2]}
    inner: Operands = operands.of_attention(qkv, **pads)
    branch = linear(
        unfused(case.attention, inner).flatten(-2), operands.proj_weight, operands.proj_bias
    )
    if case.norm == "post":
        branch = norm(branch)
    if operands.layer_scale is not None:
        branch = branch * operands.layer_scale.to(branch.dtype)
    if operands.residual_scale is not None:
        scale = operands.residual_scale.to(branch.dtype)
        branch = branch * scale.view(-1, *[1] * (x.ndim - 1))
    return x + branch


def sublayer_with_grad(operands: AttentionSublayerOperands) -> AttentionSublayerOperands:
    """The same memory, as leaves that require grad where the operation is differentiable."""
    leaves = {
        name: t.detach().requires_grad_()
        for name in ATTENTION_SUBLAYER_DIFFERENTIABLE
        if (t := getattr(operands, name)) is not None
    }
    return operands._replace(**leaves)


def differentiate_sublayer(
    function: Any, operands: AttentionSublayerOperands, grad_out: Tensor
) -> Result:
    """`function` of the operands and its gradients at `grad_out`."""
    leaves = sublayer_with_grad(operands)
    out = function(leaves)
    names = [n for n in ATTENTION_SUBLAYER_DIFFERENTIABLE if getattr(leaves, n) is not None]
    grads = torch.autograd.grad(
        out, [getattr(leaves, name) for name in names], grad_out.to(out.dtype)
    )
    return Result(out.detach(), dict(zip(names, grads)))


def run_sublayer(
    case: SublayerCase,
    operands: AttentionSublayerOperands,
    grad_out: Tensor,
    backend: str | None = None,
) -> Result:
    """The operation and its gradients on `backend`."""
    return differentiate_sublayer(
        lambda leaves: call_sublayer(case, leaves, backend), operands, grad_out
    )


def run_sublayer_unfused(
    case: SublayerCase, operands: AttentionSublayerOperands, grad_out: Tensor
) -> Result:
    """Stock modules, and their gradients."""
    return differentiate_sublayer(lambda leaves: unfused_sublayer(case, leaves), operands, grad_out)


def run_sublayer_exact(
    case: SublayerCase, operands: AttentionSublayerOperands, grad_out: Tensor
) -> Result:
    """The same in float64."""
    wide = AttentionSublayerOperands(
        *(t.double() if t is not None and t.is_floating_point() else t for t in operands)  # type: ignore[arg-type]
    )
    return run_sublayer_unfused(case, wide, grad_out.double())


def check_sublayer(case: SublayerCase, backend: str | None = None, seed: int = 0) -> Result:
    """Run `case` on `backend` and hold it to the error rule, over several inputs if it is small.

    Raises:
        AssertionError: the error rule is broken.
        NotImplementedError: the backend cannot run the case, with the reason.
    """

    def measure(seed: int) -> tuple[Result, Result, Result]:
        operands = make_sublayer_operands(case, seed)
        grad_out = make_sublayer_grad_out(case, seed + 1)
        return (
            run_sublayer(case, operands, grad_out, backend),
            run_sublayer_unfused(case, operands, grad_out),
            run_sublayer_exact(case, operands, grad_out),
        )

    measured = [measure(seed)]
    sizes = [t.numel() for t in (measured[0][0].out, *measured[0][0].grads.values())]
    runs = repetitions(max(sizes[0], 1), max(min(sizes), 1))
    measured += [measure(seed + 2 * i) for i in range(1, runs)]
    ours, eager, exact = zip(*measured)
    if case.dtype == torch.float64:  # the unfused path is what is called exact there
        for mine, best in zip(ours, exact):
            assert_close_in_float64(mine, best)
    else:
        assert_within_error_rule(ours, eager, exact)
    return ours[0]
