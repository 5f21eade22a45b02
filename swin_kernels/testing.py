"""Inputs of the operation, its unfused form and the error rule: for tests and benchmarks alike.

A check is three lines: `operands = make_operands(case)`, `grad_out = make_grad_out(case)`, then
`assert_within_error_rule(run(...), run_unfused(...), run_exact(...))`; `check(case, backend)` is
all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_kernels.geometry import Grid
from swin_kernels.ops.window_attention import (
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
)
from swin_kernels.position_bias import table_length
from swin_kernels.problem import Operands
from swin_kernels.reference.dropout import dropout_factor

DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "bias",
    "bias_table",
    "pad_key",
    "pad_value",
    "logit_scale",
)
BIASES = ("none", "dense", "table", "table+index")
MASKS = ("none", "soft", "regions", "holes", "dead")
LAYOUTS = ("strided", "contiguous", "channels-inside")
# numbers in a gradient and in an output below which one draw of rounding errors says little
FEW, SMALL, MOST_RUNS = 48, 16384, 24
_DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def _times(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


@dataclass(frozen=True)
class Case:
    """One configuration of the operation; its `str` is a readable test id."""

    batch: int = 2
    size: tuple[int, ...] = (14, 14)
    window: tuple[int, ...] = (7, 7)
    shift: tuple[int, ...] = ()  # empty: no shift on any axis
    heads: int = 2
    head_dim: int = 16
    value_dim: int | None = None  # None: head_dim
    dtype: torch.dtype = torch.float32
    packed: bool = False
    bias: str = "none"  # one of BIASES
    cosine: bool = False
    mask: str = "none"  # one of MASKS; "dead" has one row whose keys are all at −inf
    mask_value: float = -100.0
    pads: bool = False  # pad_key and pad_value given
    pad_order: str = "pad-roll"
    periodic: tuple[bool, ...] | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "strided"  # one of LAYOUTS
    extras_dtype: torch.dtype | None = None  # of biases, mask, pads and logit_scale; None: dtype

    def __post_init__(self) -> None:
        if not self.shift:
            object.__setattr__(self, "shift", (0,) * len(self.size))
        for value, known in ((self.bias, BIASES), (self.mask, MASKS), (self.layout, LAYOUTS)):
            assert value in known, f"{value!r} is not one of {known}"
        assert not (self.packed and self.value_dim not in (None, self.head_dim))

    def __str__(self) -> str:
        parts = [
            f"B{self.batch}",
            "x".join(map(str, self.size)),
            f"w{_times(self.window)}",
            f"s{_times(self.shift)}",
            f"h{self.heads}",
            f"d{self.head_dim}",
        ]
        if self.dv != self.head_dim:
            parts.append(f"dv{self.dv}")
        parts.append(_DTYPE_NAMES[self.dtype])
        flags = (
            (self.packed, "packed"),
            (self.grid.needs_padding, "padded"),
            (self.pad_order == "roll-pad", "rollpad"),
            (self.pads, "pads"),
            (self.bias != "none", self.bias),
            (self.cosine, "cosine"),
            (self.mask != "none", f"{self.mask}mask"),
            (self.mask_value != -100.0, f"mv{self.mask_value:g}"),
            (
                self.periodic is not None,
                "periodic" + "".join(str(int(p)) for p in self.periodic or ()),
            ),
            (self.scale is not None, f"scale{self.scale}"),
            (self.dropout_p > 0, f"drop{self.dropout_p}"),
            (self.layout != "strided", self.layout),
            (
                self.extras_dtype is not None,
                f"extras-{_DTYPE_NAMES.get(self.extras_dtype or self.dtype)}",
            ),
        )
        return "-".join(parts + [name for used, name in flags if used])

    @property
    def dv(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def grid(self) -> Grid:
        periodic = self.periodic if self.periodic is not None else False
        return Grid.checked(self.size, self.window, self.shift, periodic, self.pad_order)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the public functions that are not tensors."""
        options: dict[str, Any] = {
            "window_size": self.window,
            "shift_size": self.shift,
            "mask_value": self.mask_value,
            "pad_order": self.pad_order,
            "dropout_p": self.dropout_p,
        }
        if self.periodic is not None:
            options["periodic"] = self.periodic
        if self.scale is not None:
            options["scale"] = self.scale
        return options

    def but(self, **changes) -> Case:
        """This case with some fields changed."""
        return dataclasses.replace(self, **changes)


class Result(NamedTuple):
    """An output and the gradient of every differentiable operand that is present."""

    out: Tensor
    grads: dict[str, Tensor]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; the shape stays."""
    if layout == "contiguous" or x.ndim == 0:
        return x.contiguous()
    if layout == "channels-inside" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)  # the last stride is not 1
    # a slice of a larger buffer, one element off any alignment
    buffer = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
    buffer[..., 1 : 1 + x.shape[-1]] = x
    return buffer[..., 1 : 1 + x.shape[-1]]


def _heads_first(x: Tensor) -> Tensor:
    """(B, *S, H, D) with the strides of (B, H, *S, D), as the unfused path writes its heads."""
    return x.movedim(-2, 1).contiguous().movedim(1, -2)


def _explicit_mask(case: Case, randn: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    windows, tokens = case.grid.windows, case.grid.tokens
    shape = (windows, tokens, tokens)
    if case.mask == "soft":
        return randn(*shape)
    away = torch.rand(shape, generator=generator) < 0.25
    if case.mask == "regions":
        return torch.zeros(shape).masked_fill(away, -100.0)
    away.diagonal(dim1=1, dim2=2).zero_()
    if case.mask == "dead":
        away[:, tokens // 2] = True
    return torch.zeros(shape).masked_fill(away, -torch.inf)


def make_operands(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Operands:
    """Random operands of `case` in its dtype, without grad, strided as `case.layout` says.

    In fp64 the values are those of fp32, so that fp32 arithmetic on them errs by rounding alone.
    """
    generator = torch.Generator().manual_seed(seed)
    extras_dtype = case.extras_dtype or case.dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def placed(x: Tensor, dtype: torch.dtype = extras_dtype, layout: str = case.layout) -> Tensor:
        return _laid_out(x.to(device=device, dtype=dtype), layout)

    tokens, heads = case.grid.tokens, case.heads
    shape = (case.batch, *case.size)
    if case.packed:
        tensors = {"query": placed(randn(*shape, 3, heads, case.head_dim), case.dtype)}
    else:
        query, key = (placed(randn(*shape, heads, case.head_dim), case.dtype) for _ in "qk")
        value = placed(randn(*shape, heads, case.dv), case.dtype)
        tensors = {"query": _heads_first(query) if case.layout == "strided" else query}
        tensors |= {"key": key, "value": value}
    if case.bias == "dense":
        tensors["bias"] = placed(randn(heads, tokens, tokens))
    elif case.bias == "table":
        tensors["bias_table"] = placed(randn(table_length(case.window), heads))
    elif case.bias == "table+index":
        rows = tokens + 3
        tensors["bias_table"] = placed(randn(rows, heads))
        index = torch.randint(rows, (tokens, tokens), generator=generator, dtype=torch.int64)
        tensors["bias_index"] = index.to(device)
    if case.mask != "none":
        tensors["mask"] = placed(_explicit_mask(case, randn, generator))
    if case.pads:
        tensors["pad_key"] = placed(randn(heads, case.head_dim))
        tensors["pad_value"] = placed(randn(heads, case.dv))
    if case.cosine:
        tensors["logit_scale"] = placed(torch.rand(heads, generator=generator) * 6 + 8)
    return Operands(**tensors)


def make_grad_out(case: Case, device: torch.device | str = "cpu", seed: int = 1) -> Tensor:
    """A random gradient of the output, in the layout of the case."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn((case.batch, *case.size, case.heads, case.dv), generator=generator)
    return _laid_out(grad.to(device=device, dtype=case.dtype), case.layout)


def call(case: Case, operands: Operands, backend: str | None = None) -> Tensor:
    """The public function of the case, packed or not, on these operands."""
    arguments = dict(zip(Operands._fields[3:10], operands[3:10])) | case.options
    if operands.key is None or operands.value is None:
        return shifted_window_attention_qkvpacked(operands.query, backend=backend, **arguments)
    query, key, value = operands.unpacked()
    return shifted_window_attention(query, key, value, backend=backend, **arguments)


def with_grad(operands: Operands) -> Operands:
    """The same memory, as leaves that require grad where the operation is differentiable."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in zip(Operands._fields, operands)
        if x is not None and name in DIFFERENTIABLE
    }
    return operands._replace(**leaves)


def differentiate(
    function: Callable[[Operands], Tensor], operands: Operands, grad_out: Tensor
) -> Result:
    """`function` of the operands and its gradients at `grad_out`."""
    leaves = with_grad(operands)
    out = function(leaves)
    names = [name for name in DIFFERENTIABLE if getattr(leaves, name) is not None]
    # what the output does not depend on, such as pad_key where nothing is padded, has gradient 0
    grads = torch.autograd.grad(
        out,
        [getattr(leaves, name) for name in names],
        grad_out.to(out.dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return Result(out.detach(), dict(zip(names, grads)))


def run(
    case: Case, operands: Operands, grad_out: Tensor, backend: str | None = None, seed: int = 0
) -> Result:
    """The operation and its gradients on `backend`; `seed` fixes the dropout."""
    torch.manual_seed(seed)
    return differentiate(lambda leaves: call(case, leaves, backend), operands, grad_out)


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    """Every floating operand in `dtype`; pads are rounded to the tokens' dtype first."""
    tokens_dtype = operands.query.dtype
    cast = {
        name: (x.to(tokens_dtype) if name.startswith("pad_") else x).to(dtype)
        for name, x in zip(Operands._fields, operands)
        if x is not None and x.is_floating_point()
    }
    return operands._replace(**cast)


def run_exact(case: Case, operands: Operands, grad_out: Tensor, seed: int = 0) -> Result:
    """The reference in fp64, differentiated by autograd."""
    return run(case, _cast(operands, torch.float64), grad_out.double(), "reference", seed)


def run_unfused(case: Case, operands: Operands, grad_out: Tensor, seed: int = 0) -> Result:
    """The unfused path in the dtype of the case: the bound that the error rule names.

    fp64 has no wider type to be measured in, so its error is that of fp32, scaled by the ratio of
    their roundings, and doubled, as `run_exact` errs as well.
    """
    if case.dtype != torch.float64:
        torch.manual_seed(seed)
        return differentiate(lambda leaves: unfused(case, leaves), operands, grad_out)
    exact = run_exact(case, operands, grad_out, seed)
    single = case.but(dtype=torch.float32, extras_dtype=torch.float32)
    rough = run_unfused(single, _cast(operands, torch.float32), grad_out.float(), seed)
    ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def scaled(rough: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
        return (exact + (rough.double() - exact) * ratio).to(dtype)

    return Result(
        scaled(rough.out, exact.out, torch.float64),
        {
            name: scaled(rough.grads[name], exact.grads[name], getattr(operands, name).dtype)
            for name in exact.grads
        },
    )


def _unfused_regions(case: Case, device: torch.device) -> Tensor:
    """(1, *padded, 1): regions numbered by slices of the rolled map, as the stock models do."""
    regions = torch.zeros((1, *case.grid.padded, 1), device=device)
    slices = []
    for axis, (window, shift) in enumerate(zip(case.window, case.shift)):
        wraps = case.periodic is not None and case.periodic[axis]
        cuts = (
            [slice(None)]
            if shift == 0 or wraps
            else [
                slice(0, -window),
                slice(-window, -shift),
                slice(-shift, None),
            ]
        )
        slices.append(cuts)
    for number, parts in enumerate(itertools.product(*slices)):
        place = (slice(None), *parts)
        regions[place] = number
    return regions


def _unfused_windows(case: Case, x: Tensor, filler: Tensor | None = None) -> Tensor:
    """(B, *S, C) -> (B·nW, N, C), by pad, roll and partition."""
    axes = range(1, 1 + len(case.size))
    missing = [p - s for p, s in zip(case.grid.padded, case.size)]
    shifts = [-s for s in case.shift]

    def pad(x: Tensor) -> Tensor:
        for axis, more in zip(axes, missing):
            if more == 0:
                continue
            if filler is None:
                # F.pad counts axes from the last one
                x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, more])
            else:
                shape = (*x.shape[:axis], more, *x.shape[axis + 1 :])
                x = torch.cat((x, filler.to(x.dtype).expand(shape)), axis)
        return x

    def roll(x: Tensor) -> Tensor:
        return torch.roll(x, shifts, tuple(axes)) if any(shifts) else x

    x = roll(pad(x)) if case.pad_order == "pad-roll" else pad(roll(x))
    batch, channels, window = x.shape[0], x.shape[-1], case.window
    if len(window) == 1:
        return x.reshape(-1, window[0], channels)
    if len(window) == 2:
        (rows, cols), (wh, ww) = case.grid.counts, window
        x = x.view(batch, rows, wh, cols, ww, channels).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, wh * ww, channels)
    (slabs, rows, cols), (wd, wh, ww) = case.grid.counts, window
    x = x.view(batch, slabs, wd, rows, wh, cols, ww, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, wd * wh * ww, channels)


def _unfused_map(case: Case, windows: Tensor, batch: int) -> Tensor:
    """(B·nW, N, C) -> (B, *S, C), the inverse of `_unfused_windows`."""
    channels, window, counts = windows.shape[-1], case.window, case.grid.counts
    x = windows.view(batch, *counts, *window, channels)
    axes = len(window)
    order = [
        0,
        *itertools.chain.from_iterable((1 + a, 1 + axes + a) for a in range(axes)),
        1 + 2 * axes,
    ]
    x = x.permute(order).reshape(batch, *case.grid.padded, channels)

    def crop(x: Tensor) -> Tensor:
        place = (slice(None), *(slice(0, s) for s in case.size))
        return x[place]

    def roll(x: Tensor) -> Tensor:
        return torch.roll(x, case.shift, tuple(range(1, 1 + axes))) if any(case.shift) else x

    return crop(roll(x)) if case.pad_order == "pad-roll" else roll(crop(x))


def _unfused_bias(operands: Operands, case: Case) -> Tensor | None:
    """(H, N, N), gathered from the table as the stock modules do it."""
    if operands.bias is not None or operands.bias_table is None:
        return operands.bias
    index = operands.bias_index
    if index is None:
        axes = [torch.arange(w, device=operands.query.device) for w in case.window]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).T  # (N, axes)
        offsets = (
            places[:, None] - places[None, :] + torch.tensor(case.window, device=places.device) - 1
        )
        index = offsets[..., 0]
        for axis, w in enumerate(case.window[1:], start=1):
            index = index * (2 * w - 1) + offsets[..., axis]
    tokens = index.shape[0]
    bias = operands.bias_table[index.long().reshape(-1)].view(tokens, tokens, -1)
    return bias.permute(2, 0, 1).contiguous()


def unfused(case: Case, operands: Operands) -> Tensor:
    """Window attention as timm runs it: pad, roll, partition, QKᵀ, bias, mask, softmax, AV, back.

    Each step is a pass over memory. Products are in the dtype of the tokens, norms and softmax in
    fp32; a wider bias or mask promotes the logits.
    """
    batch, heads, dtype = operands.query.shape[0], case.heads, operands.query.dtype
    q, k, v = operands.unpacked()

    def split(x: Tensor, filler: Tensor | None) -> Tensor:
        windows = _unfused_windows(
            case, x.flatten(-2), None if filler is None else filler.flatten()
        )
        return windows.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B·nW, H, N, D)

    q, k, v = split(q, None), split(k, operands.pad_key), split(v, operands.pad_value)
    if operands.logit_scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        q, k = (F.normalize(x.to(wide), dim=-1).to(dtype) for x in (q, k))
        logits = q @ k.transpose(-2, -1) * operands.logit_scale[:, None, None]
    else:
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        logits = q * scale @ k.transpose(-2, -1)
    bias = _unfused_bias(operands, case)
    if bias is not None:
        logits = logits + bias
    mask = None
    if any(case.shift):
        regions = _unfused_windows(
            case.but(shift=(0,) * len(case.size), size=case.grid.padded),
            _unfused_regions(case, q.device),
        ).squeeze(-1)  # (nW, N)
        mask = torch.zeros(*regions.shape, regions.shape[1], dtype=logits.dtype, device=q.device)
        mask = mask.masked_fill(regions[:, None] != regions[..., None], case.mask_value)
    if operands.mask is not None:
        mask = operands.mask if mask is None else mask + operands.mask
    if mask is not None:
        logits = logits.view(batch, case.grid.windows, *logits.shape[1:]) + mask[:, None]
        logits = logits.flatten(0, 1)
    dead = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)
    weights = logits.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).masked_fill(
        dead, 0.0
    )
    if case.dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        kept = dropout_factor(
            seed, case.dropout_p, batch, case.grid.windows, heads, case.grid.tokens
        )
        weights = weights * kept.flatten(0, 1).to(weights.dtype)
    out = (weights.to(dtype) @ v).transpose(1, 2).flatten(-2)  # (B·nW, N, H·Dv)
    return _unfused_map(case, out, batch).unflatten(-1, (heads, -1))


def assert_no_worse_than_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Error against float64 within `factor` of the unfused path's own, plus one ulp.

    For the largest error the ulp is that of the largest value, for the mean error that of the mean
    magnitude; sums of probabilities that were flushed, being below the smallest normal number, are
    free. Where `exact` is not finite, `actual` must hold the same; what is not finite in `eager`
    allows nothing.
    """
    assert actual.shape == exact.shape == eager.shape, (
        f"{name}: shape {tuple(actual.shape)}, eager {tuple(eager.shape)}, "
        f"exact {tuple(exact.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager {eager.dtype}"
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}, not float64"
    if exact.numel() == 0:
        return
    # a value beyond the dtype's range is rightly stored as infinite
    stored = exact.to(actual.dtype)
    finite = stored.isfinite()
    wrong = int((actual.isfinite() != finite).sum())
    assert wrong == 0, (
        f"{name}: {wrong} of {actual.numel()} values finite where float64 is not, or the reverse "
        f"({int(actual.isnan().sum())} NaN, {int(actual.isinf().sum())} infinite)"
    )
    strange = ~finite
    assert torch.equal(actual[strange].isnan(), stored[strange].isnan()), (
        f"{name}: NaN for infinity"
    )
    if not finite.any():
        return
    exact = exact[finite]
    errors = (actual[finite].double() - exact).abs()
    kept = eager[finite].isfinite()
    eager_errors = (eager[finite].double() - exact).abs()[kept]
    eps = torch.finfo(actual.dtype).eps
    flushed = 1024 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).tiny
    for kind, reduce in (("largest", torch.amax), ("mean", torch.mean)):
        error = float(reduce(errors))
        allowed = float(reduce(eager_errors)) if kept.any() else 0.0
        ulp = eps * float(reduce(exact.abs())) + flushed
        assert error <= factor * allowed + ulp, (
            f"{name}: {kind} {error=:.3e} exceeds {factor} x {allowed=:.3e} + {ulp=:.3e} "
            f"({_DTYPE_NAMES[actual.dtype]}, shape {tuple(actual.shape)})"
        )


def assert_within_error_rule(
    actual: Result, eager: Result, exact: Result, factor: float = 2.0
) -> None:
    """The error rule for the output and every gradient."""
    assert actual.grads.keys() == exact.grads.keys() == eager.grads.keys(), (
        f"gradients {sorted(actual.grads)}, eager {sorted(eager.grads)}, "
        f"exact {sorted(exact.grads)}"
    )
    assert_no_worse_than_eager(actual.out, eager.out, exact.out, factor, "output")
    for name in exact.grads:
        assert_no_worse_than_eager(
            actual.grads[name], eager.grads[name], exact.grads[name], factor, f"gradient of {name}"
        )


def _measure(
    case: Case, backend: str | None, device: torch.device | str, seed: int
) -> tuple[Result, Result, Result]:
    operands, grad_out = make_operands(case, device, seed), make_grad_out(case, device, seed + 1)
    return (
        run(case, operands, grad_out, backend, seed),
        run_unfused(case, operands, grad_out, seed),
        run_exact(case, operands, grad_out, seed),
    )


def _joined(results: Sequence[Result]) -> Result:
    """Several results as one, each tensor flattened."""
    if len(results) == 1:
        return results[0]
    return Result(
        torch.cat([r.out.flatten() for r in results]),
        {name: torch.cat([r.grads[name].flatten() for r in results]) for name in results[0].grads},
    )


def check(
    case: Case, backend: str | None = None, device: torch.device | str = "cpu", seed: int = 0
) -> Result:
    """Run `case` on `backend` and hold it to the error rule; returns what the backend computed.

    The largest error among a few numbers is a throw of dice: small cases are judged over several
    inputs together.
    """
    measured = [_measure(case, backend, device, seed)]
    actual, eager, exact = measured[0]
    assert actual.out.shape == exact.out.shape, f"output of {case}: shape {tuple(actual.out.shape)}"
    for name, grad in actual.grads.items():
        assert grad.shape == exact.grads[name].shape, f"gradient of {name}: {tuple(grad.shape)}"
    if actual.out.numel() > 0:
        fewest = min(grad.numel() for grad in actual.grads.values())
        runs = max(-(-FEW // fewest), min(-(-SMALL // actual.out.numel()), MOST_RUNS))
        measured += [_measure(case, backend, device, seed + 2 * i) for i in range(1, runs)]
    ours, eager, exact = (_joined(results) for results in zip(*measured))
    assert_within_error_rule(ours, eager, exact)
    return actual
