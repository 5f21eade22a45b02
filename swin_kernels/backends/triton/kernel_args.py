"""The arguments that the kernels of a call share, by their names: pointers and scalars."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch

from swin_kernels.backends.triton.launch_spec import (
    Buffers,
    Call,
    Config,
    Gpu,
    LaunchSpec,
    Plan,
    Pointers,
    block_of,
)
from swin_kernels.backends.triton.token_layout import TokenLayout, alignment, divisor, pad_to_3d

# what the kernels know of every call: as arguments, and as constants
Geometry = namedtuple("Geometry", "sizes counts factors shifts images periods rolls seams")
Meta = namedtuple(
    "Meta",
    "TOKENS WINDOW REGIONS ROLLED PADDED PLANES WIDE ALIGNED SHARED_STRIDES HAS_BIAS EXPANDED "
    "HAS_MASK HAS_PAD_KEY HAS_PAD_VALUE COSINE DROPOUT_THRESHOLD LOG2 PRECISION HEAD_DIM VALUE_DIM "
    "TRANSPOSED",
)

# the values of the kernels' BIAS
BIAS_KINDS = {"none": 0, "dense": 1, "table": 2, "indexed": 3}


def geometry_args(call: Call) -> dict[str, Any]:
    """The arguments that say where windows and tokens lie."""
    grid = call.grid
    divisors = [divisor(n) for n in pad_to_3d(grid.counts, 1)]
    periods = grid.size if grid.pad_order == "roll-pad" else grid.padded
    return {
        "sizes": pad_to_3d(grid.size, 1),
        "counts": pad_to_3d(grid.counts, 1),
        "factors": tuple(factor for factor, _ in divisors),
        "shifts": tuple(shift for _, shift in divisors),
        "images": (call.batch, *divisor(max(1, call.batch))),
        "periods": pad_to_3d(periods, 1),
        "rolls": pad_to_3d([s % p for s, p in zip(grid.shift, periods)], 0),
        "seams": pad_to_3d([w - s for w, s in zip(grid.window, grid.shift)], 1),
        "TOKENS": grid.tokens,
        "WINDOW": pad_to_3d(grid.window, 1),
        "REGIONS": pad_to_3d(
            [s > 0 and not wraps for s, wraps in zip(grid.shift, grid.periodic)], False
        ),
        "ROLLED": any(grid.shift),
        "PADDED": grid.needs_padding,
        "PLANES": len(grid.size) == 3,
    }


def scalar_args(call: Call, *more: TokenLayout) -> dict[str, Any]:
    """Every number that is the same for all kernels of a call."""
    p = call.options.dropout_p
    query, key, value = call.layouts
    layouts = (*call.layouts, *more)
    return {
        **geometry_args(call),
        "query_strides": query.strides,
        "key_strides": key.strides,
        "value_strides": value.strides,
        "key_start": key.start,
        "value_start": value.start,
        "heads": call.heads,
        "scale": float(call.options.scale),
        "mask_value": call.mask_value,
        "kept_factor": 1.0 / (1.0 - p) if p < 1 else 0.0,
        "WIDE": any(x.wide for x in layouts),
        "ALIGNED": alignment(layouts),
        "HAS_MASK": call.explicit_mask,
        "HAS_PAD_KEY": call.fills("pad_key"),
        "HAS_PAD_VALUE": call.fills("pad_value"),
        "COSINE": call.cosine,
        "DROPOUT_THRESHOLD": min(int(p * 2**32), 2**32 - 1),
        "LOG2": call.logits_in_log2,
        "PRECISION": "ieee" if call.fp32 and not call.tf32 else "tf32",
        "HEAD_DIM": call.head_dim,
        "VALUE_DIM": call.value_dim,
        "BLOCK_D": block_of(call.head_dim),
        "BLOCK_DV": block_of(call.value_dim),
        "SHARED_STRIDES": query.strides == key.strides == value.strides,
        "TRANSPOSED": False,  # whether keys are the rows of a tile of logits
        "HAS_BIAS": None,  # of tiled kernels: see expanded_bias_args
        "EXPANDED": None,
        "windows": call.windows,
    }


def operand_pointers(call: Call) -> Pointers:
    names = {"seed": "dropout_seed"} | {
        name: name for name in ("mask", "pad_key", "pad_value", "logit_scale")
    }
    small = {f"{arg}_ptr": name if name in call.facts else None for arg, name in names.items()}
    query, key, value = call.layouts
    tokens = {"query_ptr": query.tensor, "key_ptr": key.tensor, "value_ptr": value.tensor}
    return {**tokens, **small}


def bias_args(call: Call) -> tuple[Pointers, dict[str, Any]]:
    """Pointers and scalars of a bias that a kernel reads as the caller holds it."""
    tensor = {"none": None, "dense": "bias"}.get(call.bias, "bias_table")
    rows = call.facts["bias_table"].shape[0] if tensor == "bias_table" else 0
    index = "bias_index" if call.bias == "indexed" else None
    pointers = {"bias_ptr": tensor, "index_ptr": index}
    return pointers, {"BIAS": BIAS_KINDS[call.bias], "table_rows": rows}


def expanded_bias_args(
    call: Call, buffers: Buffers, block: int, transposed: bool = False
) -> tuple[list[LaunchSpec], Pointers, dict[str, Any]]:
    """Lays out bias and seams for kernels that load tiles: the launch, pointers, scalars.

    `block` is a multiple of the sides of all tiles. The buffer `transposed_bias`, if `transposed`,
    is the same bias with keys as rows.
    """
    geometry = geometry_args(call)
    side = -(-call.tokens // block) * block
    biased, regions = call.bias != "none", any(geometry["REGIONS"])
    scalars = {"HAS_BIAS": biased, "EXPANDED": side}
    written = {
        "bias_ptr": "expanded_bias" if biased else None,
        "sides_ptr": "sides" if regions else None,
    }
    if biased:
        for name in ("expanded_bias", *(("transposed_bias",) if transposed else ())):
            buffers[name] = ((call.heads, side, side), torch.float32)
    if regions:
        buffers["sides"] = ((side,), torch.int32)
    if not (biased or regions):
        return [], written, scalars
    pointers, bias_scalars = bias_args(call)
    pairs, heads = 1024, call.heads if biased else 1
    launch = LaunchSpec(
        "bias._expand_bias_kernel",
        -(-(side**2 if biased else side) // pairs) * heads,
        pointers
        | {
            "expanded_ptr": written["bias_ptr"],
            "transposed_ptr": "transposed_bias" if biased and transposed else None,
            "sides_ptr": written["sides_ptr"],
        },
        # what it does not read is the same for all calls, so that it is compiled once
        dict.fromkeys(Meta._fields)
        | {name: geometry[name] for name in ("TOKENS", "WINDOW", "REGIONS", "seams")}
        | bias_scalars
        | {"heads": heads, "LOG2": call.logits_in_log2, "EXPANDED": side, "BLOCK": pairs},
        Config(pairs, pairs, 4, 1),
    )
    return [launch], written, scalars


def make_plan(call: Call, launches, buffers: Buffers, sums=None) -> Plan:
    dtypes = {name: facts.dtype for name, facts in call.facts.items()}
    dtypes |= {name: dtype for name, (_, dtype) in buffers.items()}
    launches = tuple(launch for launch in launches if launch.grid > 0)
    return Plan(launches, buffers, dtypes, sums or {})


def tile_args(call: Call, config: Config, gpu: Gpu) -> dict[str, int]:
    """Sides of tiles, and how many windows are worked on at once.

    A program each, sixteen warps a multiprocessor; not more windows than there are, so that all
    their programs have a number of 32 bits.
    """
    programs = gpu.multiprocessors * max(1, 16 // config.num_warps)
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LOOP_STAGES": config.loop_stages,
        "group_windows": max(1, min(programs, call.windows)),
    }


def arguments_of(spec: LaunchSpec, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a launch for a kernel's parameters: names of tensors, None, and numbers."""
    tuples: dict[str, Any] = {"geometry": Geometry, "META": Meta}
    return {
        name: spec.pointers[name]
        if name.endswith("_ptr")
        else tuples[name]._make(map(spec.scalars.__getitem__, tuples[name]._fields))
        if name in tuples
        else spec.scalars[name]
        for name in names
    }
