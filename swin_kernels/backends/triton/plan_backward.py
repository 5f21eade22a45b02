"""The plan of a backward: a pure function of its tensors' facts, its options and the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from swin_kernels.backends.triton.config import (
    LARGEST_BLOCK,
    Config,
    Gpu,
    block_of,
    config_for,
    takes_whole_windows,
)
from swin_kernels.backends.triton.kernel_args import (
    BIAS_KINDS,
    Call,
    at_once,
    blocks_of,
    call_of,
    finish,
    numbers_of,
    operand_pointers,
    shared_strides,
    tiled_bias,
)
from swin_kernels.backends.triton.launch_spec import Buffer, Plan, Step, TensorFacts
from swin_kernels.backends.triton.tokens import Tokens, contiguous_stride, three
from swin_kernels.problem import Options


class Needs(NamedTuple):
    """The gradients that cost extra work."""

    bias: bool = False  # dense, or of the table
    pad_key: bool = False
    pad_value: bool = False


def backward_plan(
    facts: Mapping[str, TensorFacts],
    options: Options,
    gpu: Gpu,
    needs: Needs,
    *,
    tf32: bool = False,
) -> Plan:
    """Writes `grad_query` (packed if the query is), `grad_key`, `grad_value`.

    And, in fp32, the sums of what is shared by windows: `bias_sums`, `pad_key_sums`,
    `pad_value_sums`, `logit_scale_sums`, each with axes in front to be summed, as `Plan.sums` says.
    `facts` are those of the operands, of grad_out, and of what the forward kept: `stats` with
    its `out`, or `tiles`.
    """
    call = call_of(facts, options, gpu, tf32)
    needs = Needs(
        needs.bias and call.bias != "none",
        needs.pad_key and call.fills("pad_key"),
        needs.pad_value and call.fills("pad_value"),
    )
    grads, buffers = _gradient_tokens(call)
    grad_out = Tokens.of("grad_out", facts["grad_out"].shape, facts["grad_out"].stride)
    numbers = numbers_of(call, grad_out, *grads) | {
        "grad_out_strides": grad_out.strides,
        "grad_query_strides": grads[0].strides,
        "grad_value_strides": grads[2].strides,
        "grad_key_start": grads[1].start,
        "grad_value_start": grads[2].start,
        "NEEDS_PAD_KEY": needs.pad_key,
        "NEEDS_PAD_VALUE": needs.pad_value,
    }
    pointers = operand_pointers(call) | {
        "grad_out_ptr": "grad_out",
        "grad_query_ptr": grads[0].tensor,
        "grad_key_ptr": grads[1].tensor,
        "grad_value_ptr": grads[2].tensor,
        "pad_key_sums_ptr": "pad_key_sums" if needs.pad_key else None,
        "pad_value_sums_ptr": "pad_value_sums" if needs.pad_value else None,
        "logit_scale_sums_ptr": "logit_scale_sums" if numbers["COSINE"] else None,
        "bias_sums_ptr": "bias_sums" if needs.bias else None,
    }
    if takes_whole_windows("backward", call.shape(needs.bias), gpu):
        return _whole_backward(call, needs, pointers, numbers, buffers)
    return _tiled_backward(call, needs, pointers, numbers, buffers)


def _gradient_tokens(call: Call) -> tuple[list[Tokens], dict[str, Buffer]]:
    if call.packed:
        shape = call.facts["query"].shape
        stride = contiguous_stride(shape)
        tokens = [Tokens.of("grad_query", shape, stride, part) for part in range(3)]
        return tokens, {"grad_query": Buffer(shape, call.dtype)}
    buffers = {
        f"grad_{name}": Buffer(call.facts[name].shape, call.dtype)
        for name in ("query", "key", "value")
    }
    return [
        Tokens.of(name, b.shape, contiguous_stride(b.shape)) for name, b in buffers.items()
    ], buffers


def _sum_buffers(
    call: Call, needs: Needs, runs: int, rows: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[dict[str, Buffer], dict[str, tuple[int, ...]]]:
    """Buffers of sums: a bias a run; of the rest a row for each of `rows`, to sum over `axes`."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    if needs.bias:
        shapes["bias_sums"] = ((runs, call.heads, call.grid.tokens, call.grid.tokens), (0,))
    if needs.pad_key:
        shapes["pad_key_sums"] = ((*rows, call.head_dim), axes)
    if needs.pad_value:
        shapes["pad_value_sums"] = ((*rows, call.value_dim), axes)
    if "logit_scale" in call.facts:
        shapes["logit_scale_sums"] = (rows, axes)
    buffers = {name: Buffer(shape, torch.float32) for name, (shape, _) in shapes.items()}
    return buffers, {name: over for name, (_, over) in shapes.items()}


def _whole_backward(call: Call, needs: Needs, pointers, numbers, buffers) -> Plan:
    shape = call.shape(needs.bias)
    config = config_for("backward", shape, call.gpu)
    run = config.windows_per_program(shape, call.gpu)
    runs = -(-call.windows // run)
    extra, sums = _sum_buffers(call, needs, runs, (runs, call.heads), (0,))
    has_tiles = "tiles" in call.facts
    step = Step(
        "bwd_single_tile._whole_window_bwd_kernel",
        runs * call.heads,
        pointers | {"tiles_ptr": "tiles" if has_tiles else None},
        numbers
        | {
            "SHARED_STRIDES": shared_strides(call),
            # offsets kept for the stores save instructions, but cosine needs the registers
            "SHARED_GRAD_STRIDES": shared_strides(call)
            and call.query.strides == numbers["grad_query_strides"] == numbers["grad_value_strides"]
            and not numbers["COSINE"],
            "HAS_TILES": has_tiles,
            "TILES_PER_HEAD": call.facts["tiles"].shape[1] if has_tiles else 1,
            "tile_heads": call.facts["tiles"].shape[0] if has_tiles else 0,
            "windows": call.windows,
            "windows_per_program": run,
            "NEEDS_BIAS": needs.bias,
            "BLOCK_N": config.block_n,
            "LOOP_STAGES": config.loop_stages,
        },
        config,
    )
    return finish(call, [step], buffers | extra, sums, _table_grad(call, needs))


def _tiled_backward(call: Call, needs: Needs, pointers, numbers, buffers) -> Plan:
    shape, tokens = call.shape(needs.bias), call.grid.tokens
    rows = (call.windows, call.heads, tokens)
    buffers["delta"] = Buffer(rows, torch.float32)
    spread, bias_pointers, bias_numbers = tiled_bias(call, buffers, LARGEST_BLOCK)
    out_shape = call.map_shape(call.value_dim)
    out = Tokens.of("out", out_shape, contiguous_stride(out_shape))
    pointers |= bias_pointers | {
        "out_ptr": "out",
        "stats_ptr": "stats",
        "delta_ptr": "delta",
    }
    numbers |= bias_numbers | {"out_strides": out.strides}

    config = config_for("dq", shape, call.gpu)
    query_tiles = -(-tokens // config.block_m)
    dq = Step(
        "bwd_tiled._tiled_dq_kernel",
        query_tiles * call.heads * call.windows,
        pointers,
        numbers | blocks_of(config) | at_once(call, config),
        config,
    )
    config = config_for("dkv", shape, call.gpu)
    key_tiles = -(-tokens // config.block_n)
    dkv = Step(
        "bwd_tiled._tiled_dkv_kernel",
        key_tiles * call.heads * call.windows,
        pointers,
        numbers | blocks_of(config) | at_once(call, config),
        config,
    )
    steps, runs = [*spread, dq, dkv], 0
    if needs.bias:
        config = config_for("dbias", shape, call.gpu)
        tiles = -(-tokens // config.block_m) * -(-tokens // config.block_n)
        run = config.windows_per_program(shape, call.gpu, tiles)
        runs = -(-call.windows // run)
        dbias = Step(
            "bias_grad._tiled_dbias_kernel",
            tiles * call.heads * runs,
            pointers,
            numbers | blocks_of(config) | {"windows_per_program": run},
            config,
        )
        steps.append(dbias)
    # rows of sums are (window, head, tile)
    extra, sums = _sum_buffers(call, needs, runs, (call.windows, call.heads, key_tiles), (0, 2))
    if "logit_scale_sums" in extra:
        shape_of_sums = (call.windows, call.heads, query_tiles)
        extra["logit_scale_sums"] = Buffer(shape_of_sums, torch.float32)
    return finish(call, steps, buffers | extra, sums, _table_grad(call, needs))


def _table_grad(call: Call, needs: Needs) -> list[Step]:
    """The summed dense gradient, `bias_grad`, gathered into the table's: `table_grad`."""
    if not needs.bias or call.bias == "dense":
        return []
    table, pairs = call.facts["bias_table"], call.grid.tokens**2
    rows, block = 16, 128 if call.bias == "indexed" or call.grid.tokens > 64 else 64
    block = min(block, block_of(pairs))
    return [
        Step(
            "bias._table_grad_kernel",
            -(-table.shape[0] // rows) * call.heads,
            {
                "dense_ptr": "bias_grad",
                "index_ptr": call.pointer("bias_index"),
                "grad_ptr": "table_grad",
            },
            {
                "heads": call.heads,
                "table_rows": table.shape[0],
                "WINDOW": three(call.grid.window, 1),
                "BIAS": BIAS_KINDS[call.bias],
                "BLOCK_ROWS": rows,
                "BLOCK": block,
            },
            Config(rows, block, 4, 1),
        )
    ]
