"""One call of the operation: its tensors, its options, and the checks that both must pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch.utils.weak import WeakIdKeyDictionary

from swin_kernels.geometry import Grid
from swin_kernels.position_bias import table_length

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Operands(NamedTuple):
    """The tensors of a call, in the order of every op's schema; no key and value if packed."""

    query: Tensor  #: (B, *S, H, D), or qkv (B, *S, 3, H, D)
    key: Tensor | None = None  #: (B, *S, H, D)
    value: Tensor | None = None  #: (B, *S, H, Dv)
    bias: Tensor | None = None  #: (H, N, N)
    bias_table: Tensor | None = None  #: (T, H)
    bias_index: Tensor | None = None  #: (N, N) int
    mask: Tensor | None = None  #: (nW, N, N)
    pad_key: Tensor | None = None  #: (H, D)
    pad_value: Tensor | None = None  #: (H, Dv)
    logit_scale: Tensor | None = None  #: (H,)
    dropout_seed: Tensor | None = None  #: (1,) int64

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value as views, packed or not."""
        if self.key is None or self.value is None:
            query, key, value = self.query.unbind(-3)
            return query, key, value
        return self.query, self.key, self.value


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
# bits of the backward ops' `needs`: the gradients that cost extra work
NEEDS = {name: 1 << bit for bit, name in enumerate(DIFFERENTIABLE[3:])}


def needs_of(needed: Sequence[bool]) -> int:
    """Bits of `NEEDS`, of the operands whose gradient is `needed`."""
    return sum(bit for name, bit in NEEDS.items() if needed[Operands._fields.index(name)])


class Options(NamedTuple):
    """The numbers of a call, which follow its operands in every op's schema."""

    window_size: tuple[int, ...]  #: tokens on each axis
    shift_size: tuple[int, ...]  #: tokens on each axis, below the window
    periodic: tuple[bool, ...]  #: on each axis, whether the map wraps round
    roll_then_pad: bool  #: pad_order="roll-pad"
    mask_value: float  #: added between tokens of different regions
    scale: float  #: factor of q·k; without effect under cosine attention
    dropout_p: float  #: probability of dropping

    def grid(self, size: Sequence[int]) -> Grid:
        order = "roll-pad" if self.roll_then_pad else "pad-roll"
        return Grid(tuple(size), self.window_size, self.shift_size, self.periodic, order)


def split_arguments(arguments: Sequence[Any]) -> tuple[Operands, Options, tuple[Any, ...]]:
    """What an op got, in the order of every schema: operands, options, and what follows."""
    first, last = len(Operands._fields), len(Operands._fields) + len(Options._fields)
    window, shift, periodic, *numbers = arguments[first:last]
    # lists, as an op gets them, are no keys of a cache
    options = Options(tuple(window), tuple(shift), tuple(periodic), *numbers)
    return Operands(*arguments[:first]), options, tuple(arguments[last:])


class Facts(NamedTuple):
    """What a check may know of a tensor: hashable, so that no call is checked twice."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)


def check_number(name: str, number: object) -> None:
    """That it is a plain number: a tensor would be read once and lose its gradient."""
    if isinstance(number, bool) or not isinstance(
        number, (int, float, torch.SymInt, torch.SymFloat)
    ):
        raise ValueError(f"{name}: expected a number, got {type(number).__name__}")


def _facts(operands: Operands) -> Operands:
    """The operands, each as its `Facts`."""
    for name, x in zip(Operands._fields, operands):
        if not isinstance(x, Tensor) and (x is not None or name == "query"):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x is not None and x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
    return Operands._make(
        None if x is None else Facts(x.shape, x.dtype, x.device) for x in operands
    )


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else str(tuple(x.shape))


@dataclass(frozen=True)
class Problem:
    """The frozen facts of one call: all that a backend may ask before it says if it can run."""

    batch: int
    grid: Grid
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    packed: bool
    bias: str  # "none", "dense" or "table"
    has_mask: bool
    cosine: bool
    options: Options

    def __str__(self) -> str:
        grid = self.grid
        sizes = ["×".join(map(str, axis)) for axis in (grid.size, grid.window, grid.shift)]
        extras = (
            ("packed", self.packed),
            (f"{self.bias} bias", self.bias != "none"),
            ("mask", self.has_mask),
            ("cosine", self.cosine),
            (f"dropout {self.options.dropout_p}", self.options.dropout_p > 0),
        )
        return (
            f"B={self.batch} map={sizes[0]} window={sizes[1]} shift={sizes[2]}"
            + f" H={self.heads} D={self.head_dim}"
            + (f" Dv={self.value_dim}" if self.value_dim != self.head_dim else "")
            + f" {str(self.dtype).removeprefix('torch.')} {self.device}"
            + "".join(f", {name}" for name, used in extras if used)
        )

    @classmethod
    def checked(
        cls,
        operands: Operands,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        mask_value: float = -100.0,
        pad_order: str = "pad-roll",
        periodic: bool | Sequence[bool] = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Problem:
        """The problem that these arguments pose; ValueError if they do not fit together."""
        check_number("mask_value", mask_value)
        check_number("dropout_p", dropout_p)
        if scale is not None:
            check_number("scale", scale)
        _check_mask_gradient(operands.mask)
        arguments = (
            _facts(operands),
            window_size,
            shift_size,
            periodic,
            pad_order,
            mask_value,
            scale,
            dropout_p,
        )
        if torch.compiler.is_compiling():
            return _problem(*arguments)  # its sizes may be symbols, which are not for a cache
        try:
            # 7, 7.0 and True are one key to a dict, but not one argument to a check
            types = tuple(map(types_within, (window_size, shift_size, periodic)))
            problem = _problem_cached(types, *arguments)
        except TypeError:  # a list among the arguments cannot be a key
            problem = _problem(*arguments)
        _check_index_range(operands)
        return problem


def _problem(
    operands: Operands,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int],
    periodic: bool | Sequence[bool],
    pad_order: str,
    mask_value: float,
    scale: float | None,
    dropout_p: float,
) -> Problem:
    size, heads, head_dim, value_dim = _check_tokens(operands)
    grid = Grid.checked(size, window_size, shift_size, periodic, pad_order)
    _check_floats(operands)
    _check_bias(operands, heads)
    _check_shapes(operands, grid, heads, head_dim, value_dim)
    if not mask_value < math.inf:  # NaN as well, in a form that dynamo can trace
        raise ValueError(f"mask_value: expected a finite number or -inf, got {mask_value}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")
    if scale is None:
        scale = head_dim**-0.5
    elif not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    elif operands.logit_scale is not None:
        raise ValueError(
            f"scale={scale} came together with logit_scale: cosine attention is scaled by "
            "logit_scale alone; leave scale out"
        )
    bias = "none" if operands.bias_table is None else "table"
    query = operands.query
    return Problem(
        batch=query.shape[0],
        grid=grid,
        heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=query.dtype,
        device=query.device,
        packed=operands.key is None,
        bias=bias if operands.bias is None else "dense",
        has_mask=operands.mask is not None,
        cosine=operands.logit_scale is not None,
        options=Options(
            grid.window,
            grid.shift,
            grid.periodic,
            pad_order == "roll-pad",
            float(mask_value),
            float(scale),
            float(dropout_p),
        ),
    )


@functools.lru_cache(maxsize=1024)
def _problem_cached(types: tuple, *arguments) -> Problem:
    return _problem(*arguments)


def types_within(value: object) -> object:
    """The types in a tuple, else the type."""
    return tuple(map(type, value)) if isinstance(value, tuple) else type(value)


def _check_tokens(operands: Operands) -> tuple[tuple[int, ...], int, int, int]:
    """Spatial size, heads, head dim and value dim of query, key and value, packed or not."""
    query, key, value = operands.query, operands.key, operands.value
    if key is None or value is None:
        if not 5 <= query.ndim <= 7 or query.shape[-3] != 3:
            raise ValueError(
                "qkv: expected (B, *S, 3, H, D) with 1, 2 or 3 axes S, as one linear layer "
                f"writes it after .unflatten(-1, (3, heads, head_dim)), got {_shape(query)}"
            )
        size, value_dim = query.shape[1:-3], query.shape[-1]
    else:
        if not 4 <= query.ndim <= 6:
            raise ValueError(
                f"query: expected (B, *S, H, D) with 1, 2 or 3 axes S, got {_shape(query)}"
            )
        if key.shape != query.shape:
            raise ValueError(
                f"key: expected the shape of query, {_shape(query)}, got {_shape(key)}"
            )
        if value.shape[:-1] != query.shape[:-1] or value.ndim != query.ndim:
            raise ValueError(
                f"value: expected {(*query.shape[:-1], 'Dv')} beside a query of {_shape(query)}, "
                f"got {_shape(value)}"
            )
        size, value_dim = query.shape[1:-2], value.shape[-1]
    heads, head_dim = query.shape[-2:]
    if heads < 1 or head_dim < 1 or value_dim < 1:
        raise ValueError(
            f"expected at least one head and one channel, got {heads} heads of {head_dim} and "
            f"{value_dim} channels"
        )
    return tuple(size), heads, head_dim, value_dim


def _check_floats(operands: Operands) -> None:
    query = operands.query
    if query.dtype not in DTYPES:
        raise ValueError(
            f"query: expected float16, bfloat16, float32 or float64, got {query.dtype}"
        )
    for name, x in zip(Operands._fields, operands):
        if x is None:
            continue
        if x.device != query.device and name != "dropout_seed":
            raise ValueError(
                f"{name} is on {x.device}, query on {query.device}: move them to one device"
            )
        if name in ("key", "value") and x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype}, query {query.dtype}: cast them to one dtype")
        if name not in ("bias_index", "dropout_seed") and x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def _check_bias(operands: Operands, heads: int) -> None:
    table, index = operands.bias_table, operands.bias_index
    if operands.bias is not None and table is not None:
        raise ValueError(
            f"both bias {_shape(operands.bias)} and bias_table {_shape(table)} were given: "
            "pass one of them"
        )
    if index is not None:
        if table is None:
            raise ValueError(
                f"bias_index {_shape(index)} came without a bias_table: pass both or neither"
            )
        if index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"bias_index: expected int32 or int64, got {index.dtype}")
    if table is not None and (table.ndim != 2 or table.shape[1] != heads):
        raise ValueError(
            f"bias_table: expected (T, {heads}), one column per head, got {_shape(table)}"
        )


def _check_shapes(
    operands: Operands, grid: Grid, heads: int, head_dim: int, value_dim: int
) -> None:
    pairs = (grid.tokens, grid.tokens)
    expected = {  # its meaning is formatted only for a message: dynamo has symbols for sizes
        "bias": ((heads, *pairs), "(H, N, N) for window {.window}"),
        "bias_index": (pairs, "(N, N) for window {.window}"),
        "bias_table": ((table_length(grid.window), heads), "(T, H) for window {.window}"),
        "mask": ((grid.windows, *pairs), "(nW, N, N) for a map of {.size}"),
        "pad_key": ((heads, head_dim), "(H, D)"),
        "pad_value": ((heads, value_dim), "(H, Dv)"),
        "logit_scale": ((heads,), "one number per head"),
    }
    if operands.bias_index is not None:
        del expected["bias_table"]  # of any length: the index tells its rows
    for name, (shape, meaning) in expected.items():
        x = getattr(operands, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape}, {meaning.format(grid)}, got {_shape(x)}"
            )


def is_traced_by_mode() -> bool:
    """Whether make_fx or a FakeTensorMode watches: no value may be looked at."""
    return _len_torch_dispatch_stack() > 0 and any(
        _get_dispatch_mode(key) is not None
        for key in (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY)
    )


# an index is read once, and again only after it was written to: (version, rows of its table)
_indices_in_range = WeakIdKeyDictionary()


def _check_index_range(operands: Operands) -> None:
    """That a bias_index on the CPU points into its table; elsewhere kernels guard their loads."""
    index, table = operands.bias_index, operands.bias_table
    if index is None or table is None or index.device.type != "cpu":
        return
    if type(index) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(index):
        return  # tensors of a transform have no data to look at
    if is_traced_by_mode():
        return
    seen = None if index.is_inference() else (index._version, table.shape[0])
    if seen is not None and _indices_in_range.get(index) == seen:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= table.shape[0]:
        raise ValueError(
            f"bias_index: expected rows of the table, 0 to {table.shape[0] - 1}, "
            f"got {low} to {high}"
        )
    if seen is not None:
        _indices_in_range[index] = seen


MASK_HAS_NO_GRADIENT = (
    "mask requires grad, but has no gradient here: pass what is learnt as bias, or detach it"
)


def _check_mask_gradient(mask: Tensor | None) -> None:
    if isinstance(mask, Tensor) and mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(MASK_HAS_NO_GRADIENT)
