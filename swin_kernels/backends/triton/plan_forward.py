"""The plan of a forward: a pure function of its tensors' facts, its options and the GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from swin_kernels.backends.triton.config import (
    LARGEST_BLOCK,
    Gpu,
    block_of,
    config_for,
    takes_whole_windows,
)
from swin_kernels.backends.triton.kernel_args import (
    at_once,
    blocks_of,
    call_of,
    finish,
    numbers_of,
    operand_pointers,
    shared_strides,
    tiled_bias,
    whole_bias,
)
from swin_kernels.backends.triton.launch_spec import Buffer, Plan, Step, TensorFacts
from swin_kernels.backends.triton.tokens import Tokens, contiguous_stride, three
from swin_kernels.problem import Operands, Options


def kept_shape(operands: Operands, options: Options, gpu: Gpu) -> tuple[int, ...]:
    """Of what a differentiable forward keeps beside its output; (0,) if nothing."""
    facts = {
        name: TensorFacts(x.shape, (0,) * x.ndim, x.dtype, True)
        for name, x in zip(Operands._fields, operands)
        if x is not None
    }
    call = call_of(facts, options, gpu, False)
    if not takes_whole_windows("backward", call.shape(), gpu):
        return call.stats_shape
    shape = tiles_shape(options, call.heads, call.bias != "none", "mask" in call.facts)
    return shape if shape[0] > 0 else (0,)


def tiles_shape(
    options: Options, heads: int, biased: bool, masked: bool
) -> tuple[int, int, int, int]:
    """(heads, sets, BLOCK_N, BLOCK_N) of what a backward of whole windows adds to the logits.

    That is bias and shift mask: a tile for every set of seams that can cut a window, numbered by
    the bits that the kernels give them. One head without a bias, none if there is nothing to add.
    An explicit mask is first added to the shift mask, which then is not in the tiles.
    """
    cut = three([s > 0 and not p for s, p in zip(options.shift_size, options.periodic)], False)
    sets = 8 >> cut.index(True) if any(cut) and not masked else 1
    tokens = math.prod(options.window_size)
    block = block_of(tokens)
    if not biased:
        heads = int(sets > 1 or tokens < block)
    return heads, sets, block, block


def forward_plan(
    facts: Mapping[str, TensorFacts],
    options: Options,
    gpu: Gpu,
    *,
    tf32: bool = False,
    differentiable: bool = False,
) -> Plan:
    """Writes `out` (B, *S, H, Dv), and in fp32 what `backward_plan` reads if `differentiable`.

    That is `stats` (W, H, 2·N) where it works in tiles, else `tiles`: see `tiles_shape`.
    """
    call = call_of(facts, options, gpu, tf32)
    shape = call.shape()
    whole_backward = takes_whole_windows("backward", shape, gpu)
    keep_stats = differentiable and not whole_backward
    tiles = tiles_shape(options, call.heads, call.bias != "none", "mask" in call.facts)
    keep_tiles = differentiable and whole_backward and tiles[0] > 0
    buffers = {"out": Buffer(call.map_shape(call.value_dim), call.dtype)}
    if keep_stats:
        buffers["stats"] = Buffer(call.stats_shape, torch.float32)
    out = Tokens.of("out", buffers["out"].shape, contiguous_stride(buffers["out"].shape))
    pointers = operand_pointers(call) | {
        "out_ptr": "out",
        "stats_ptr": "stats" if keep_stats else None,
    }
    numbers = numbers_of(call, out) | {"out_strides": out.strides, "KEEP_STATS": keep_stats}
    if takes_whole_windows("forward", shape, gpu):
        config = config_for("forward", shape, gpu)
        run = config.windows_per_program(shape, gpu)
        bias_pointers, bias_numbers = whole_bias(call)
        if keep_tiles:
            buffers["tiles"] = Buffer(tiles, torch.float32)
        step = Step(
            "fwd._whole_window_fwd_kernel",
            -(-call.windows // run) * call.heads,
            pointers | bias_pointers | {"tiles_ptr": "tiles" if keep_tiles else None},
            numbers
            | bias_numbers
            | {
                "SHARED_STRIDES": shared_strides(call),
                "KEEP_TILES": keep_tiles,
                "TILES_PER_HEAD": tiles[1],
                "tile_heads": tiles[0],
                "windows": call.windows,
                "windows_per_program": run,
                "BLOCK_N": config.block_n,
                "LOOP_STAGES": config.loop_stages,
            },
            config,
        )
        return finish(call, [step], buffers)
    config = config_for("tiled_forward", shape, gpu)
    block = max(LARGEST_BLOCK, config.block_m)
    spread, bias_pointers, bias_numbers = tiled_bias(call, buffers, block)
    step = Step(
        "fwd._tiled_fwd_kernel",
        -(-shape.tokens // config.block_m) * call.heads * call.windows,
        pointers | bias_pointers,
        numbers | bias_numbers | blocks_of(config) | at_once(call, config),
        config,
    )
    return finish(call, [*spread, step], buffers)
