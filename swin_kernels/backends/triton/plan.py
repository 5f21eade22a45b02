"""Plans of a forward and of a backward: pure functions of a call and the GPU."""

from __future__ import annotations

import math
from typing import Any

import torch

from swin_kernels.backends.triton.config import (
    LARGEST_BLOCK,
    config_for,
    fits_single_tile,
    leaves_units,
)
from swin_kernels.backends.triton.kernel_args import (
    Meta,
    bias_args,
    expanded_bias_args,
    make_plan,
    operand_pointers,
    scalar_args,
    tile_args,
)
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
from swin_kernels.backends.triton.token_layout import TokenLayout, pad_to_3d
from swin_kernels.problem import NEEDS, Options


def kept_shape(call: Call, gpu: Gpu) -> tuple[int, ...]:
    """Of what a differentiable forward keeps beside its output; (0,) if nothing.

    `stats` (W, H, 2·N) where the backward works in tiles, else `tiles`.
    """
    if not fits_single_tile("backward", call, gpu):
        return call.stats_shape
    shape = tiles_shape(call.options, call.heads, call.bias != "none", call.explicit_mask)
    return shape if shape[0] > 0 else (0,)


def tiles_shape(
    options: Options, heads: int, biased: bool, masked: bool
) -> tuple[int, int, int, int]:
    """(heads, sets, BLOCK_N, BLOCK_N) of what a backward of whole windows adds to the logits.

    That is bias and shift mask: a tile for every set of seams that can cut a window, numbered by
    the bits that the kernels give them. One head without a bias, none if there is nothing to add.
    An explicit mask is first added to the shift mask, which then is not in the tiles.
    """
    cut = pad_to_3d([s > 0 and not p for s, p in zip(options.shift_size, options.periodic)], False)
    sets = 8 >> cut.index(True) if any(cut) and not masked else 1
    tokens = math.prod(options.window_size)
    block = block_of(tokens)
    if not biased:
        heads = int(sets > 1 or tokens < block)
    return heads, sets, block, block


def forward_plan(call: Call, gpu: Gpu, *, differentiable: bool = False) -> Plan:
    """Writes `out` (B, *S, H, Dv), and in fp32 what `kept_shape` says, if `differentiable`."""
    kept = kept_shape(call, gpu) if differentiable else (0,)
    keep_stats, keep_tiles = len(kept) == 3, len(kept) == 4
    shape = (call.batch, *call.grid.size, call.heads, call.value_dim)
    out = TokenLayout.contiguous("out", shape)
    buffers: Buffers = {"out": (shape, call.dtype)}
    if keep_stats:
        buffers["stats"] = (kept, torch.float32)
    pointers = operand_pointers(call) | {
        "out_ptr": "out",
        "stats_ptr": "stats" if keep_stats else None,
    }
    scalars = scalar_args(call, out) | {"out_strides": out.strides, "KEEP_STATS": keep_stats}
    if fits_single_tile("forward", call, gpu):
        config = config_for("forward", call, gpu)
        run = config.windows_per_program(call, gpu)
        bias_pointers, bias_scalars = bias_args(call)
        if keep_tiles:
            buffers["tiles"] = (kept, torch.float32)
        tiles = tiles_shape(call.options, call.heads, call.bias != "none", call.explicit_mask)
        launch = LaunchSpec(
            "fwd._single_tile_fwd_kernel",
            -(-call.windows // run) * call.heads,
            pointers | bias_pointers | {"tiles_ptr": "tiles" if keep_tiles else None},
            scalars
            | bias_scalars
            | {
                "KEEP_TILES": keep_tiles,
                "TILES_PER_HEAD": tiles[1],
                "tile_heads": tiles[0],
                "windows_per_program": run,
                "BLOCK_N": config.block_n,
                "LOOP_STAGES": config.loop_stages,
            },
            config,
        )
        return make_plan(call, [launch], buffers)
    config = config_for("tiled_forward", call, gpu)
    block = max(LARGEST_BLOCK, config.block_m)
    expand, bias_pointers, bias_scalars = expanded_bias_args(call, buffers, block)
    launch = LaunchSpec(
        "fwd._tiled_fwd_kernel",
        -(-call.tokens // config.block_m) * call.heads * call.windows,
        pointers | bias_pointers,
        scalars | bias_scalars | tile_args(call, config, gpu),
        config,
    )
    return make_plan(call, [*expand, launch], buffers)


def backward_plan(call: Call, gpu: Gpu) -> Plan:
    """Writes `grad_query` (packed if the query is), `grad_key`, `grad_value`.

    And `grad_bias` or `grad_bias_table`; and, in fp32, the sums of what else windows share,
    `pad_key_sums`, `pad_value_sums`, `logit_scale_sums`, with axes to be summed, as `Plan.sums`
    says.
    The facts are those of the operands, of grad_out, and of what the forward kept: `stats` with
    its `out`, or `tiles`.
    """
    shapes = [(f"grad_{name}", call.facts[name].shape, part) for name, part in call.parts]
    grads = [TokenLayout.contiguous(*x) for x in shapes]
    buffers: Buffers = {name: (shape, call.dtype) for name, shape, _ in shapes}
    facts = call.facts["grad_out"]
    grad_out = TokenLayout.of("grad_out", facts.shape, facts.stride)
    pad_key, pad_value = (bool(call.needs & NEEDS[p]) and call.fills(p) for p in _PADS)
    scalars = scalar_args(call, grad_out, *grads) | {
        "grad_out_strides": grad_out.strides,
        "grad_query_strides": grads[0].strides,
        "grad_value_strides": grads[2].strides,
        "grad_key_start": grads[1].start,
        "grad_value_start": grads[2].start,
        "NEEDS_PAD_KEY": pad_key,
        "NEEDS_PAD_VALUE": pad_value,
    }
    pointers = operand_pointers(call) | {
        "grad_out_ptr": "grad_out",
        "grad_query_ptr": grads[0].tensor,
        "grad_key_ptr": grads[1].tensor,
        "grad_value_ptr": grads[2].tensor,
        "pad_key_sums_ptr": "pad_key_sums" if pad_key else None,
        "pad_value_sums_ptr": "pad_value_sums" if pad_value else None,
        "logit_scale_sums_ptr": "logit_scale_sums" if call.cosine else None,
        "bias_sums_ptr": "bias_sums" if call.sums_bias else None,
    }
    whole = fits_single_tile("backward", call, gpu)
    plan = _single_tile_backward if whole else _tiled_backward
    return plan(call, gpu, pointers, scalars, buffers)


_PADS = ("pad_key", "pad_value")


def _sums(
    call: Call, scalars, rows: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[Buffers, dict[str, tuple[int, ...]]]:
    """Buffers of sums that are not of a bias: a row for each of `rows`, to sum over `axes`."""
    shapes = {
        "pad_key_sums": ((*rows, call.head_dim), scalars["NEEDS_PAD_KEY"]),
        "pad_value_sums": ((*rows, call.value_dim), scalars["NEEDS_PAD_VALUE"]),
        "logit_scale_sums": (rows, call.cosine),
    }
    wanted = {name: shape for name, (shape, wanted) in shapes.items() if wanted}
    buffers = {name: (shape, torch.float32) for name, shape in wanted.items()}
    return buffers, dict.fromkeys(wanted, axes)


def _single_tile_backward(call: Call, gpu: Gpu, pointers, scalars, buffers) -> Plan:
    config = config_for("backward", call, gpu)
    run = config.windows_per_program(call, gpu)
    runs = -(-call.windows // run)
    extra, sums = _sums(call, scalars, (runs, call.heads), (0,))
    after, gradients = _bias_gradient(call, gpu, runs)
    has_tiles = "tiles" in call.facts
    tile_heads, tiles_per_head = call.facts["tiles"].shape[:2] if has_tiles else (1, 1)
    launch = LaunchSpec(
        "bwd_single_tile._single_tile_bwd_kernel",
        runs * call.heads,
        pointers | {"tiles_ptr": "tiles" if has_tiles else None},
        scalars
        | {
            # offsets kept for the stores save instructions, but cosine needs the registers
            "SHARED_GRAD_STRIDES": scalars["SHARED_STRIDES"]
            and call.layouts[0].strides
            == scalars["grad_query_strides"]
            == scalars["grad_value_strides"]
            and not call.cosine,
            "HAS_TILES": has_tiles,
            "TILES_PER_HEAD": tiles_per_head,
            "tile_heads": tile_heads,
            "windows_per_program": run,
            "NEEDS_BIAS": call.sums_bias,
            "HOLDS_BIAS": config.holds_bias,
            "BLOCK_N": config.block_n,
            "LOOP_STAGES": config.loop_stages,
        },
        config,
    )
    return make_plan(call, [launch, *after], buffers | extra | gradients, sums)


def _tiled_backward(call: Call, gpu: Gpu, pointers, scalars, buffers) -> Plan:
    tokens = call.tokens
    buffers["delta"] = ((call.windows, call.heads, tokens), torch.float32)
    expand, bias_pointers, bias_scalars = expanded_bias_args(
        call, buffers, LARGEST_BLOCK, transposed=True
    )
    shape = (call.batch, *call.grid.size, call.heads, call.value_dim)
    out = TokenLayout.contiguous("out", shape)
    biased = call.bias != "none"
    # normalised once, by the pass that goes first through them
    units = {"unit_query": leaves_units(call, gpu)}
    units["unit_key"] = units["unit_query"] and call.sums_bias
    rows = (call.windows, call.heads, tokens)
    buffers |= {n: ((*rows, call.head_dim), call.dtype) for n, kept in units.items() if kept}
    pointers |= {f"{name}_ptr": name if kept else None for name, kept in units.items()}
    pointers |= bias_pointers | {"out_ptr": "out", "stats_ptr": "stats", "delta_ptr": "delta"}
    scalars |= bias_scalars | {"out_strides": out.strides}

    def launch(
        kernel: str, config: Config, programs: int, transposed: bool = False, **more: int
    ) -> LaunchSpec:
        args = scalars | tile_args(call, config, gpu) | {"TRANSPOSED": transposed} | more
        bias = {"bias_ptr": "transposed_bias"} if transposed and biased else {}
        return LaunchSpec(kernel, programs, pointers | bias, args, config)

    programs = call.heads * call.windows
    config = config_for("dq", call, gpu)
    query_tiles = -(-tokens // config.block_m)
    # a product more, where its operands are not loaded to registers
    sums_keys = gpu.multiplies_from_shared
    dq = launch("bwd_tiled._tiled_dq_kernel", config, query_tiles * programs, SUMS_KEYS=sums_keys)
    config = config_for("dkv", call, gpu)
    key_tiles = -(-tokens // config.block_n)
    dkv = launch("bwd_tiled._tiled_dkv_kernel", config, key_tiles * programs, transposed=True)
    launches, runs = [*expand, dq, dkv], 0
    if call.sums_bias:
        config = config_for("dbias", call, gpu)
        tiles = -(-tokens // config.block_m) * -(-tokens // config.block_n)
        run = config.windows_per_program(call, gpu, tiles)
        runs = -(-call.windows // run)
        kernel = "bwd_tiled._tiled_dbias_kernel"
        launches.append(launch(kernel, config, tiles * call.heads * runs, windows_per_program=run))
    # rows of sums are (window, head, tile)
    extra, sums = _sums(call, scalars, (call.windows, call.heads, key_tiles), (0, 2))
    after, gradients = _bias_gradient(call, gpu, runs)
    if "logit_scale_sums" in extra:
        rows = (call.windows, call.heads, query_tiles)
        extra["logit_scale_sums"] = (rows, torch.float32)
    return make_plan(call, [*launches, *after], buffers | extra | gradients, sums)


def _bias_gradient(call: Call, gpu: Gpu, runs: int) -> tuple[list[LaunchSpec], Buffers]:
    """The gradient of bias or table, from `bias_sums`, one of a run each: launches, and buffers."""
    if not call.sums_bias:
        return [], {}
    matrix = (call.heads, call.tokens, call.tokens)
    buffers: Buffers = {"bias_sums": ((runs, *matrix), torch.float32)}
    if call.bias == "dense":
        buffers["grad_bias"] = (matrix, call.facts["bias"].dtype)
        return [_sum_of_runs(call, runs, "grad_bias")], buffers
    table = call.facts["bias_table"]
    buffers["grad_bias_table"] = (table.shape, table.dtype)
    if call.bias == "table":
        return [_table_gradient(call, gpu, runs)], buffers
    buffers["summed_bias"] = (matrix, torch.float32)
    return [_sum_of_runs(call, runs, "summed_bias"), _indexed_gradient(call)], buffers


def _bias_launch(
    call: Call,
    kernel: str,
    parts: int,
    pointers: dict[str, str | None],
    config: Config,
    **more: Any,
) -> LaunchSpec:
    """One of kernels/bias.py after a backward, by `parts` of each head."""
    fixed = dict.fromkeys(Meta._fields) | {"heads": call.heads, "TOKENS": call.tokens}
    scalars = fixed | {"BLOCK": config.block_n} | more
    return LaunchSpec(f"bias.{kernel}", parts * call.heads, pointers, scalars, config)


def _sum_of_runs(call: Call, runs: int, to: str) -> LaunchSpec:
    """The runs' sums, (H, N, N) each, added up."""
    config = Config(256, 256, 4, 1)
    parts = -(-(call.tokens**2) // config.block_n)
    pointers: Pointers = {"sums_ptr": "bias_sums", "grad_ptr": to}
    return _bias_launch(
        call, "_bias_grad_kernel", parts, pointers, config, runs=runs, BLOCK_RUNS=16
    )


def _table_gradient(call: Call, gpu: Gpu, runs: int) -> LaunchSpec:
    """The same gathered into the rows of a geometric table."""
    rows = call.facts["bias_table"].shape[0]
    # as many rows at once as leave a program to each multiprocessor
    block = next((n for n in (16, 8) if -(-rows // n) * call.heads >= gpu.multiprocessors), 4)
    # left alone, the assembler spills two registers for a third program
    limit = 255 if gpu.arch.startswith("sm_") else 0
    config = Config(block, min(64, block_of(call.tokens)), 4, 1, registers=limit)
    return _bias_launch(
        call,
        "_table_grad_kernel",
        -(-rows // block),
        {"sums_ptr": "bias_sums", "grad_ptr": "grad_bias_table"},
        config,
        runs=runs,
        table_rows=rows,
        WINDOW=pad_to_3d(call.grid.window, 1),
        BLOCK_ROWS=block,
        BLOCK_RUNS=128 // block,
    )


def _indexed_gradient(call: Call) -> LaunchSpec:
    """A summed bias gathered into the rows of a table that has an index."""
    rows, block = call.facts["bias_table"].shape[0], 16
    config = Config(block, min(128, block_of(call.tokens**2)), 4, 1)
    return _bias_launch(
        call,
        "_indexed_grad_kernel",
        -(-rows // block),
        {"summed_ptr": "summed_bias", "index_ptr": "bias_index", "grad_ptr": "grad_bias_table"},
        config,
        table_rows=rows,
        BLOCK_ROWS=block,
    )
