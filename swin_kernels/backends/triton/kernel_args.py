"""What the launches of one call share: its facts, and the arguments that all its kernels take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from swin_kernels.backends.triton.config import Config, Gpu, Shape, block_of
from swin_kernels.backends.triton.launch_spec import Buffer, Plan, Step, TensorFacts
from swin_kernels.backends.triton.tokens import Tokens, alignment, divisor, three
from swin_kernels.geometry import Grid
from swin_kernels.problem import Options

LARGEST_LOGIT = 1.1e38  # as in tile.py
# the values of the kernels' BIAS
BIAS_KINDS = {"none": 0, "dense": 1, "table": 2, "indexed": 3}


class Call(NamedTuple):
    """The parts of a call that its launches share."""

    facts: Mapping[str, TensorFacts]
    options: Options
    gpu: Gpu
    tf32: bool
    grid: Grid
    batch: int
    query: Tokens
    key: Tokens
    value: Tokens
    head_dim: int
    value_dim: int
    heads: int
    bias: str  # one of BIAS_KINDS

    @property
    def dtype(self) -> torch.dtype:
        return self.facts["query"].dtype

    @property
    def logits_in_log2(self) -> bool:
        """Whether kernels keep logits in units of log2: see tile.py."""
        return self.dtype != torch.float32 and "mask" not in self.facts

    @property
    def mask_value(self) -> float:
        """Of the shift mask; what is finite stays so in units of log2."""
        value = float(self.options.mask_value)
        if self.logits_in_log2 and math.isfinite(value):
            return max(-LARGEST_LOGIT, min(value, LARGEST_LOGIT))
        return value

    @property
    def windows(self) -> int:
        return self.batch * self.grid.windows

    @property
    def packed(self) -> bool:
        return "key" not in self.facts

    @property
    def stats_shape(self) -> tuple[int, int, int]:
        """Of what a tiled forward keeps: each row's largest logit, then the shares of its sum."""
        return self.windows, self.heads, 2 * self.grid.tokens

    def shape(self, sums_bias: bool = False) -> Shape:
        return Shape(
            self.grid.tokens,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.windows,
            self.heads,
            sums_bias,
            cosine="logit_scale" in self.facts,
            dropout=self.options.dropout_p > 0,
            explicit_mask="mask" in self.facts,
            fills_padding=self.fills("pad_key") or self.fills("pad_value"),
            scattered=self.scattered,
            tf32=self.tf32 and self.dtype == torch.float32,
        )

    @property
    def scattered(self) -> bool:
        tokens = (self.query, self.key, self.value)
        row = 16 // self.dtype.itemsize  # channels a load
        return alignment(tokens) % row != 0 or any(
            t.strides[-1] != 1 or not self.facts[t.tensor].aligned for t in tokens
        )

    def fills(self, pad: str) -> bool:
        return pad in self.facts and self.grid.needs_padding

    def pointer(self, name: str) -> str | None:
        return name if name in self.facts else None

    def map_shape(self, dim: int) -> tuple[int, ...]:
        return (self.batch, *self.grid.size, self.heads, dim)


def call_of(facts: Mapping[str, TensorFacts], options: Options, gpu: Gpu, tf32: bool) -> Call:
    query = facts["query"]
    if "key" in facts:
        q, k, v = (
            Tokens.of(name, facts[name].shape, facts[name].stride)
            for name in ("query", "key", "value")
        )
        size, value_dim = query.shape[1:-2], facts["value"].shape[-1]
    else:
        q, k, v = (Tokens.of("query", query.shape, query.stride, part) for part in range(3))
        size, value_dim = query.shape[1:-3], query.shape[-1]
    bias = "none"
    if "bias" in facts:
        bias = "dense"
    elif "bias_table" in facts:
        bias = "indexed" if "bias_index" in facts else "table"
    return Call(
        facts,
        options,
        gpu,
        tf32,
        options.grid(size),
        query.shape[0],
        q,
        k,
        v,
        query.shape[-1],
        value_dim,
        query.shape[-2],
        bias,
    )


def _geometry(call: Call) -> dict[str, Any]:
    """The arguments that say where windows and tokens lie."""
    grid = call.grid
    padded = grid.padded
    divisors = [divisor(n) for n in three(grid.counts, 1)]
    periods = grid.size if grid.pad_order == "roll-pad" else padded
    return {
        "sizes": three(grid.size, 1),
        "counts": three(grid.counts, 1),
        "factors": tuple(factor for factor, _ in divisors),
        "shifts": tuple(shift for _, shift in divisors),
        "periods": three(periods, 1),
        "rolls": three([s % p for s, p in zip(grid.shift, periods)], 0),
        "seams": three([w - s for w, s in zip(grid.window, grid.shift)], 1),
        "WINDOW": three(grid.window, 1),
        "REGIONS": three(
            [s > 0 and not wraps for s, wraps in zip(grid.shift, grid.periodic)], False
        ),
        "ROLLED": any(grid.shift),
        "PADDED": grid.needs_padding,
        "PLANES": len(grid.size) == 3,
    }


def numbers_of(call: Call, *more: Tokens) -> dict[str, Any]:
    """Every number that is the same for all kernels of a call."""
    options = call.options
    p = options.dropout_p
    threshold = min(int(p * 2**32), 2**32 - 1)
    tokens = (call.query, call.key, call.value, *more)
    return {
        **_geometry(call),
        "query_strides": call.query.strides,
        "key_strides": call.key.strides,
        "value_strides": call.value.strides,
        "key_start": call.key.start,
        "value_start": call.value.start,
        "heads": call.heads,
        "scale": float(options.scale),
        "mask_value": call.mask_value,
        "kept_factor": 1.0 / (1.0 - p) if p < 1 else 0.0,
        "WIDE": any(t.wide for t in tokens),
        "ALIGNED": alignment(tokens),
        "HAS_MASK": "mask" in call.facts,
        "HAS_PAD_KEY": call.fills("pad_key"),
        "HAS_PAD_VALUE": call.fills("pad_value"),
        "COSINE": "logit_scale" in call.facts,
        "DROPOUT_THRESHOLD": threshold,
        "LOG2": call.logits_in_log2,
        "PRECISION": "ieee" if call.dtype == torch.float32 and not call.tf32 else "tf32",
        "HEAD_DIM": call.head_dim,
        "VALUE_DIM": call.value_dim,
        "BLOCK_D": block_of(call.head_dim),
        "BLOCK_DV": block_of(call.value_dim),
    }


_SMALL = ("mask", "pad_key", "pad_value", "logit_scale")


def operand_pointers(call: Call) -> dict[str, str | None]:
    pointers: dict[str, str | None] = {
        "query_ptr": call.query.tensor,
        "key_ptr": call.key.tensor,
        "value_ptr": call.value.tensor,
        "seed_ptr": call.pointer("dropout_seed"),
    }
    return pointers | {f"{name}_ptr": call.pointer(name) for name in _SMALL}


def shared_strides(call: Call) -> bool:
    return call.query.strides == call.key.strides == call.value.strides


def whole_bias(call: Call) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Pointers and numbers of a bias that a kernel reads as the caller holds it."""
    tensor = {"none": None, "dense": "bias"}.get(call.bias, "bias_table")
    rows = call.facts["bias_table"].shape[0] if tensor == "bias_table" else 0
    pointers = {"bias_ptr": tensor, "index_ptr": call.pointer("bias_index")}
    return pointers, {"BIAS": BIAS_KINDS[call.bias], "table_rows": rows}


def tiled_bias(
    call: Call, buffers: dict[str, Buffer], block: int
) -> tuple[list[Step], dict[str, str | None], dict[str, Any]]:
    """Lays out bias and seams for kernels that load tiles: the launch, pointers, numbers.

    `block` is a multiple of the sides of all tiles.
    """
    tokens, geometry = call.grid.tokens, _geometry(call)
    spread = -(-tokens // block) * block
    biased, regions = call.bias != "none", any(geometry["REGIONS"])
    numbers = {
        "HAS_BIAS": biased,
        "SPREAD": spread,
        "SHARED_STRIDES": shared_strides(call),
        "windows": call.windows,
    }
    written = {
        "bias_ptr": "spread_bias" if biased else None,
        "sides_ptr": "sides" if regions else None,
    }
    if biased:
        buffers["spread_bias"] = Buffer((call.heads, spread, spread), torch.float32)
    if regions:
        buffers["sides"] = Buffer((spread,), torch.int32)
    if not (biased or regions):
        return [], written, numbers
    pointers, bias_numbers = whole_bias(call)
    pairs, heads = 1024, call.heads if biased else 1
    step = Step(
        "bias._spread_bias_kernel",
        -(-(spread**2 if biased else spread) // pairs) * heads,
        pointers | {"spread_ptr": written["bias_ptr"], "sides_ptr": written["sides_ptr"]},
        bias_numbers
        | {name: geometry[name] for name in ("WINDOW", "REGIONS", "seams")}
        | {
            "heads": heads,
            "LOG2": call.logits_in_log2,
            "SPREAD": spread,
            "BLOCK": pairs,
        },
        Config(pairs, pairs, 4, 1),
    )
    return [step], written, numbers


def finish(call: Call, steps, buffers, sums=None, after=()) -> Plan:
    steps = tuple(s for s in steps if s.grid > 0)
    dtypes = {name: f.dtype for name, f in call.facts.items()}
    dtypes |= {name: b.dtype for name, b in buffers.items()} | {"bias_grad": torch.float32}
    if "bias_table" in dtypes:
        dtypes["table_grad"] = dtypes["bias_table"]
    return Plan(steps, buffers, dtypes, sums or {}, tuple(after))


def at_once(call: Call, config: Config) -> dict[str, int]:
    """Windows that the device works on at once, a program each: sixteen warps a multiprocessor.

    Not more than there are, so that all their programs have a number of 32 bits.
    """
    programs = call.gpu.multiprocessors * max(1, 16 // config.num_warps)
    return {"windows_at_once": max(1, min(programs, call.windows))}


def blocks_of(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LOOP_STAGES": config.loop_stages,
    }
