"""One configuration of the operation, and random operands for it in awkward layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_kernels.geometry import Grid
from swin_kernels.position_bias import table_length
from swin_kernels.problem import Operands

BIASES = ("none", "dense", "table", "table+index")
MASKS = ("none", "soft", "regions", "holes", "dead")
LAYOUTS = ("strided", "contiguous", "channels-inside")
DTYPE_NAMES = {
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

    batch: int = 2  #: images
    size: tuple[int, ...] = (14, 14)  #: tokens of the map on each axis
    window: tuple[int, ...] = (7, 7)  #: tokens of a window on each axis
    shift: tuple[int, ...] = ()  #: tokens on each axis, empty for no shift
    heads: int = 2  #: heads
    head_dim: int = 16  #: channels a head of queries and keys
    value_dim: int | None = None  #: channels a head of values, None for head_dim
    dtype: torch.dtype = torch.float32  #: of query, key and value
    packed: bool = False  #: one tensor qkv instead of three
    bias: str = "none"  #: one of BIASES
    cosine: bool = False  #: cosine attention, with logit_scale
    mask: str = "none"  #: one of MASKS; "dead" has one row whose keys are all at −inf
    mask_value: float = -100.0  #: added between tokens of different regions
    pads: bool = False  #: pad_key and pad_value given
    pad_order: str = "pad-roll"  #: or "roll-pad"
    periodic: tuple[bool, ...] | None = None  #: on each axis, None for none
    scale: float | None = None  #: factor of q·k, None for head_dim**-0.5
    dropout_p: float = 0.0  #: dropout on the probabilities
    layout: str = "strided"  #: one of LAYOUTS
    extras_dtype: torch.dtype | None = None  #: of the other tensors, None for dtype

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
        parts.append(DTYPE_NAMES[self.dtype])
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
                "periodic" + "".join(f"{p:d}" for p in self.periodic or ()),
            ),
            (self.scale is not None, f"scale{self.scale}"),
            (self.dropout_p > 0, f"drop{self.dropout_p}"),
            (self.layout != "strided", self.layout),
            (
                self.extras_dtype is not None,
                f"extras-{DTYPE_NAMES.get(self.extras_dtype or self.dtype)}",
            ),
        )
        return "-".join(parts + [name for used, name in flags if used])

    @property
    def dv(self) -> int:
        """Channels a head of values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def grid(self) -> Grid:
        """How the map is padded, shifted and split into windows."""
        return Grid.checked(
            self.size, self.window, self.shift, self.periodic or False, self.pad_order
        )

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the public functions that are not tensors."""
        return {
            "window_size": self.window,
            "shift_size": self.shift,
            "mask_value": self.mask_value,
            "pad_order": self.pad_order,
            "dropout_p": self.dropout_p,
            "periodic": self.periodic or False,
            "scale": self.scale,
        }

    def but(self, **changes) -> Case:
        """This case with some fields changed."""
        return dataclasses.replace(self, **changes)


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


def _explicit_mask(case: Case, draws: dict[str, Any]) -> Tensor:
    windows, tokens = case.grid.windows, case.grid.tokens
    shape = (windows, tokens, tokens)
    if case.mask == "soft":
        return torch.randn(shape, **draws)
    away, zeros = torch.rand(shape, **draws) < 0.25, torch.zeros(shape, device=draws["device"])
    if case.mask == "regions":
        return zeros.masked_fill(away, -100.0)
    away.diagonal(dim1=1, dim2=2).zero_()
    if case.mask == "dead":
        away[:, tokens // 2] = True
    return zeros.masked_fill(away, -torch.inf)


def _source(device: torch.device | str | None, seed: int) -> tuple[torch.device, dict[str, Any]]:
    """The device, and what numbers are drawn with: nowhere for tensors without data."""
    device = torch.device(torch.get_default_device() if device is None else device)
    if device.type == "meta":
        return device, {"device": device}
    return device, {"device": "cpu", "generator": torch.Generator().manual_seed(seed)}


def make_operands(case: Case, device: torch.device | str | None = None, seed: int = 0) -> Operands:
    """Random operands of `case` in its dtype, without grad, strided as `case.layout` says.

    They are drawn on the CPU, the same for every device; None is torch's default device. In fp64
    the values are those of fp32, so that fp32 arithmetic on them errs by rounding alone.
    """
    device, draws = _source(device, seed)
    extras_dtype = case.extras_dtype or case.dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, **draws)

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
        index = torch.randint(rows, (tokens, tokens), dtype=torch.int64, **draws)
        tensors["bias_index"] = index.to(device)
    if case.mask != "none":
        tensors["mask"] = placed(_explicit_mask(case, draws))
    if case.pads:
        tensors["pad_key"] = placed(randn(heads, case.head_dim))
        tensors["pad_value"] = placed(randn(heads, case.dv))
    if case.cosine:
        tensors["logit_scale"] = placed(torch.rand(heads, **draws) * 6 + 8)
    return Operands(**tensors)


def make_grad_out(case: Case, device: torch.device | str | None = None, seed: int = 1) -> Tensor:
    """A random gradient of the output, in the layout of the case."""
    device, draws = _source(device, seed)
    grad = torch.randn((case.batch, *case.size, case.heads, case.dv), **draws)
    return _laid_out(grad.to(device=device, dtype=case.dtype), case.layout)
