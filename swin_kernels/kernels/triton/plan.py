"""What to launch for a call: a pure function of its tensors' facts, its options and the GPU.

A plan names tensors and holds numbers; no tensor, no Triton. So it is made once for all calls
alike, can be compiled for a GPU that is not there, and is tested on tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.geometry import Grid
from swin_kernels.kernels.triton.configs import (
    LARGEST_BLOCK,
    Config,
    Gpu,
    Shape,
    block_of,
    config_for,
    takes_whole_windows,
)
from swin_kernels.problem import Operands, Options

LARGEST_INT32 = 2**31 - 1
# the values of the kernels' BIAS
BIAS_KINDS = {"none": 0, "dense": 1, "table": 2, "indexed": 3}


class TensorFacts(NamedTuple):
    """What a launch depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # its first element, to 16 bytes


class Buffer(NamedTuple):
    """A tensor that a plan needs besides its operands."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One launch: names for pointers, numbers for the rest; by the names of the kernel's arguments.

    Tensors are named as in `Plan.buffers` and `Operands`.
    """

    kernel: str  # module.function
    grid: int
    pointers: dict[str, str | None]
    numbers: dict[str, Any]
    config: Config
    compiled: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """Launches, in order, and the tensors they need."""

    steps: tuple[Step, ...]
    buffers: dict[str, Buffer]
    dtypes: dict[str, torch.dtype]  # of every tensor a step names
    # after the steps: sums over these axes of buffers, then the launches that use them
    sums: dict[str, tuple[int, ...]] = field(default_factory=dict)
    after: tuple[Step, ...] = ()


def three(values, filler) -> tuple:
    """Values of one to three axes as three: those that are missing lead."""
    return (filler,) * (3 - len(values)) + tuple(values)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def needs_wide_offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether an element of one image lies 2^31 elements or more from its first: (B, *S, H, D).

    Kernels find image and head with 64 bits; the rest is 32 bits wherever that is enough.
    """
    reach = sum((n - 1) * abs(s) for n, s in zip(shape[1:-2], stride[1:-2]))
    return reach + (shape[-1] - 1) * abs(stride[-1]) > LARGEST_INT32


class _Tokens(NamedTuple):
    """query, key or value, or a gradient of one, inside the tensor that holds it."""

    tensor: str
    strides: tuple[int, ...]  # image, three axes, head, channel
    start: int
    wide: bool

    @classmethod
    def of(cls, tensor: str, shape, stride, part: int | None = None) -> _Tokens:
        start = 0
        if part is not None:  # (B, *S, 3, H, D)
            start = part * stride[-3]
            shape, stride = shape[:-3] + shape[-2:], stride[:-3] + stride[-2:]
        strides = (stride[0], *three(stride[1:-2], 0), stride[-2], stride[-1])
        return cls(tensor, strides, start, needs_wide_offsets(shape, stride))


class _Call(NamedTuple):
    """The parts of a call that its launches share."""

    facts: Mapping[str, TensorFacts]
    options: Options
    gpu: Gpu
    tf32: bool
    grid: Grid
    batch: int
    query: _Tokens
    key: _Tokens
    value: _Tokens
    head_dim: int
    value_dim: int
    heads: int
    bias: str  # one of BIAS_KINDS

    @property
    def dtype(self) -> torch.dtype:
        return self.facts["query"].dtype

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
        return _alignment(tokens) % row != 0 or any(
            t.strides[-1] != 1 or not self.facts[t.tensor].aligned for t in tokens
        )

    def fills(self, pad: str) -> bool:
        return pad in self.facts and self.grid.needs_padding

    def pointer(self, name: str) -> str | None:
        return name if name in self.facts else None

    def map_shape(self, dim: int) -> tuple[int, ...]:
        return (self.batch, *self.grid.size, self.heads, dim)


def _alignment(tokens: Iterable[_Tokens]) -> int:
    """The largest power of two, up to 16, that divides where every head of every token begins."""
    return math.gcd(16, *(n for t in tokens for n in (*t.strides[:-1], t.start)))


def _call(facts: Mapping[str, TensorFacts], options: Options, gpu: Gpu, tf32: bool) -> _Call:
    query = facts["query"]
    if "key" in facts:
        q, k, v = (
            _Tokens.of(name, facts[name].shape, facts[name].stride)
            for name in ("query", "key", "value")
        )
        size, value_dim = query.shape[1:-2], facts["value"].shape[-1]
    else:
        q, k, v = (_Tokens.of("query", query.shape, query.stride, part) for part in range(3))
        size, value_dim = query.shape[1:-3], query.shape[-1]
    bias = "none"
    if "bias" in facts:
        bias = "dense"
    elif "bias_table" in facts:
        bias = "indexed" if "bias_index" in facts else "table"
    return _Call(
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


def _geometry(call: _Call) -> dict[str, Any]:
    """The arguments that say where windows and tokens lie."""
    grid = call.grid
    padded = grid.padded
    periods = grid.size if grid.pad_order == "roll-pad" else padded
    return {
        "sizes": three(grid.size, 1),
        "counts": three(grid.counts, 1),
        "periods": three(periods, 1),
        "rolls": three([s % p for s, p in zip(grid.shift, periods)], 0),
        "seams": three([w - s for w, s in zip(grid.window, grid.shift)], 1),
        "WINDOW": three(grid.window, 1),
        "REGIONS": three(
            [s > 0 and not wraps for s, wraps in zip(grid.shift, grid.periodic)], False
        ),
        "ROLLED": any(grid.shift),
        "PADDED": grid.needs_padding,
    }


def _numbers(call: _Call, *more: _Tokens) -> dict[str, Any]:
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
        "mask_value": float(options.mask_value),
        "kept_factor": 1.0 / (1.0 - p) if p < 1 else 0.0,
        "WIDE": any(t.wide for t in tokens),
        "ALIGNED": _alignment(tokens),
        "HAS_MASK": "mask" in call.facts,
        "HAS_PAD_KEY": call.fills("pad_key"),
        "HAS_PAD_VALUE": call.fills("pad_value"),
        "COSINE": "logit_scale" in call.facts,
        "DROPOUT_THRESHOLD": threshold,
        "PRECISION": "ieee" if call.dtype == torch.float32 and not call.tf32 else "tf32",
        "HEAD_DIM": call.head_dim,
        "VALUE_DIM": call.value_dim,
        "BLOCK_D": block_of(call.head_dim),
        "BLOCK_DV": block_of(call.value_dim),
    }


_SMALL = ("mask", "pad_key", "pad_value", "logit_scale")


def _operand_pointers(call: _Call) -> dict[str, str | None]:
    pointers: dict[str, str | None] = {
        "query_ptr": call.query.tensor,
        "key_ptr": call.key.tensor,
        "value_ptr": call.value.tensor,
        "seed_ptr": call.pointer("dropout_seed"),
    }
    return pointers | {f"{name}_ptr": call.pointer(name) for name in _SMALL}


def _shared_strides(call: _Call) -> bool:
    return call.query.strides == call.key.strides == call.value.strides


def _whole_bias(call: _Call) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Pointers and numbers of a bias that a kernel reads as the caller holds it."""
    tensor = {"none": None, "dense": "bias"}.get(call.bias, "bias_table")
    rows = call.facts["bias_table"].shape[0] if tensor == "bias_table" else 0
    pointers = {"bias_ptr": tensor, "index_ptr": call.pointer("bias_index")}
    return pointers, {"BIAS": BIAS_KINDS[call.bias], "table_rows": rows}


def _tiled_bias(
    call: _Call, buffers: dict[str, Buffer]
) -> tuple[list[Step], dict[str, str | None], dict[str, Any]]:
    """Spreads a bias for kernels that load tiles of it: the launch, pointers, numbers."""
    tokens = call.grid.tokens
    spread = -(-tokens // LARGEST_BLOCK) * LARGEST_BLOCK
    numbers = {"HAS_BIAS": call.bias != "none", "SPREAD": spread}
    if call.bias == "none":
        return [], {"bias_ptr": None}, numbers
    buffers["spread_bias"] = Buffer((call.heads, spread, spread), torch.float32)
    pointers, bias_numbers = _whole_bias(call)
    block = 1024
    step = Step(
        "table._spread_bias_kernel",
        -(-(spread**2) // block) * call.heads,
        pointers | {"spread_ptr": "spread_bias"},
        bias_numbers
        | {
            "heads": call.heads,
            "WINDOW": three(call.grid.window, 1),
            "SPREAD": spread,
            "BLOCK": block,
        },
        Config(block, block, 4, 1),
    )
    return [step], {"bias_ptr": "spread_bias"}, numbers


def _finish(call: _Call, steps, buffers, sums=None, after=()) -> Plan:
    steps = tuple(s for s in steps if s.grid > 0)
    dtypes = {name: f.dtype for name, f in call.facts.items()}
    dtypes |= {name: b.dtype for name, b in buffers.items()} | {"bias_grad": torch.float32}
    if "bias_table" in dtypes:
        dtypes["table_grad"] = dtypes["bias_table"]
    return Plan(steps, buffers, dtypes, sums or {}, tuple(after))


def kept_shape(operands: Operands, options: Options, gpu: Gpu) -> tuple[int, ...]:
    """Of what a differentiable forward keeps beside its output; (0,) if nothing."""
    facts = {
        name: TensorFacts(x.shape, (0,) * x.ndim, x.dtype, True)
        for name, x in zip(Operands._fields, operands)
        if x is not None
    }
    call = _call(facts, options, gpu, False)
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
    call = _call(facts, options, gpu, tf32)
    shape = call.shape()
    whole_backward = takes_whole_windows("backward", shape, gpu)
    keep_stats = differentiable and not whole_backward
    tiles = tiles_shape(options, call.heads, call.bias != "none", "mask" in call.facts)
    keep_tiles = differentiable and whole_backward and tiles[0] > 0
    buffers = {"out": Buffer(call.map_shape(call.value_dim), call.dtype)}
    if keep_stats:
        buffers["stats"] = Buffer(call.stats_shape, torch.float32)
    out = _Tokens.of("out", buffers["out"].shape, contiguous_stride(buffers["out"].shape))
    pointers = _operand_pointers(call) | {
        "out_ptr": "out",
        "stats_ptr": "stats" if keep_stats else None,
    }
    numbers = _numbers(call, out) | {"out_strides": out.strides, "KEEP_STATS": keep_stats}
    if takes_whole_windows("forward", shape, gpu):
        config = config_for("forward", shape, gpu)
        run = config.windows_per_program(shape, gpu)
        bias_pointers, bias_numbers = _whole_bias(call)
        if keep_tiles:
            buffers["tiles"] = Buffer(tiles, torch.float32)
        step = Step(
            "forward._whole_window_fwd_kernel",
            -(-call.windows // run) * call.heads,
            pointers | bias_pointers | {"tiles_ptr": "tiles" if keep_tiles else None},
            numbers
            | bias_numbers
            | {
                "SHARED_STRIDES": _shared_strides(call),
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
        return _finish(call, [step], buffers)
    spread, bias_pointers, bias_numbers = _tiled_bias(call, buffers)
    config = config_for("tiled_forward", shape, gpu)
    step = Step(
        "forward._tiled_fwd_kernel",
        -(-shape.tokens // config.block_m) * call.heads * call.windows,
        pointers | bias_pointers,
        numbers | bias_numbers | _blocks(config),
        config,
    )
    return _finish(call, [*spread, step], buffers)


def _blocks(config: Config) -> dict[str, int]:
    # the spread bias has whole tiles of LARGEST_BLOCK
    assert LARGEST_BLOCK % config.block_m == LARGEST_BLOCK % config.block_n == 0, config
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LOOP_STAGES": config.loop_stages,
    }


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
    call = _call(facts, options, gpu, tf32)
    needs = Needs(
        needs.bias and call.bias != "none",
        needs.pad_key and call.fills("pad_key"),
        needs.pad_value and call.fills("pad_value"),
    )
    grads, buffers = _gradient_tokens(call)
    grad_out = _Tokens.of("grad_out", facts["grad_out"].shape, facts["grad_out"].stride)
    numbers = _numbers(call, grad_out, *grads) | {
        "grad_out_strides": grad_out.strides,
        "grad_query_strides": grads[0].strides,
        "grad_value_strides": grads[2].strides,
        "grad_key_start": grads[1].start,
        "grad_value_start": grads[2].start,
        "NEEDS_PAD_KEY": needs.pad_key,
        "NEEDS_PAD_VALUE": needs.pad_value,
    }
    pointers = _operand_pointers(call) | {
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


def _gradient_tokens(call: _Call) -> tuple[list[_Tokens], dict[str, Buffer]]:
    if call.packed:
        shape = call.facts["query"].shape
        stride = contiguous_stride(shape)
        tokens = [_Tokens.of("grad_query", shape, stride, part) for part in range(3)]
        return tokens, {"grad_query": Buffer(shape, call.dtype)}
    buffers = {
        f"grad_{name}": Buffer(call.facts[name].shape, call.dtype)
        for name in ("query", "key", "value")
    }
    return [
        _Tokens.of(name, b.shape, contiguous_stride(b.shape)) for name, b in buffers.items()
    ], buffers


def _sum_buffers(
    call: _Call, needs: Needs, runs: int, rows: tuple[int, ...], axes: tuple[int, ...]
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


def _whole_backward(call: _Call, needs: Needs, pointers, numbers, buffers) -> Plan:
    shape = call.shape(needs.bias)
    config = config_for("backward", shape, call.gpu)
    run = config.windows_per_program(shape, call.gpu)
    runs = -(-call.windows // run)
    extra, sums = _sum_buffers(call, needs, runs, (runs, call.heads), (0,))
    has_tiles = "tiles" in call.facts
    step = Step(
        "backward._whole_window_bwd_kernel",
        runs * call.heads,
        pointers | {"tiles_ptr": "tiles" if has_tiles else None},
        numbers
        | {
            "SHARED_STRIDES": _shared_strides(call),
            # offsets kept for the stores save instructions, but cosine needs the registers
            "SHARED_GRAD_STRIDES": _shared_strides(call)
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
    return _finish(call, [step], buffers | extra, sums, _table_grad(call, needs))


def _tiled_backward(call: _Call, needs: Needs, pointers, numbers, buffers) -> Plan:
    shape, tokens = call.shape(needs.bias), call.grid.tokens
    rows = (call.windows, call.heads, tokens)
    buffers["delta"] = Buffer(rows, torch.float32)
    spread, bias_pointers, bias_numbers = _tiled_bias(call, buffers)
    out_shape = call.map_shape(call.value_dim)
    out = _Tokens.of("out", out_shape, contiguous_stride(out_shape))
    pointers |= bias_pointers | {
        "out_ptr": "out",
        "stats_ptr": "stats",
        "delta_ptr": "delta",
    }
    numbers |= bias_numbers | {"out_strides": out.strides}

    config = config_for("dq", shape, call.gpu)
    query_tiles = -(-tokens // config.block_m)
    dq = Step(
        "backward_tiled._tiled_dq_kernel",
        query_tiles * call.heads * call.windows,
        pointers,
        numbers | _blocks(config),
        config,
    )
    config = config_for("dkv", shape, call.gpu)
    key_tiles = -(-tokens // config.block_n)
    dkv = Step(
        "backward_tiled._tiled_dkv_kernel",
        key_tiles * call.heads * call.windows,
        pointers,
        numbers | _blocks(config),
        config,
    )
    steps, runs = [*spread, dq, dkv], 0
    if needs.bias:
        config = config_for("dbias", shape, call.gpu)
        tiles = -(-tokens // config.block_m) * -(-tokens // config.block_n)
        run = config.windows_per_program(shape, call.gpu, tiles)
        runs = -(-call.windows // run)
        dbias = Step(
            "backward_tiled._tiled_dbias_kernel",
            tiles * call.heads * runs,
            pointers,
            numbers | _blocks(config) | {"windows": call.windows, "windows_per_program": run},
            config,
        )
        steps.append(dbias)
    # programs are (window, head, tile), row-major
    extra, sums = _sum_buffers(call, needs, runs, (call.windows, call.heads, key_tiles), (0, 2))
    if "logit_scale_sums" in extra:
        shape_of_sums = (call.windows, call.heads, query_tiles)
        extra["logit_scale_sums"] = Buffer(shape_of_sums, torch.float32)
    return _finish(call, steps, buffers | extra, sums, _table_grad(call, needs))


def _table_grad(call: _Call, needs: Needs) -> list[Step]:
    """The summed dense gradient, `bias_grad`, gathered into the table's: `table_grad`."""
    if not needs.bias or call.bias == "dense":
        return []
    table, pairs = call.facts["bias_table"], call.grid.tokens**2
    rows, block = 16, 128 if call.bias == "indexed" or call.grid.tokens > 64 else 64
    block = min(block, block_of(pairs))
    return [
        Step(
            "table._table_grad_kernel",
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


STRIDED = ("query", "key", "value", "grad_out")  # kernels read these as they lie


def facts_of(x: Tensor) -> TensorFacts:
    aligned = x.device.type == "meta" or x.data_ptr() % 16 == 0
    return TensorFacts(tuple(x.shape), x.stride(), x.dtype, aligned)
