"""What torch.utils.flop_counter counts for an op: the products that unfused layers would run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from swin_kernels.problem import split_arguments

# FLOPs of an op's products, of its arguments as in a schema, shapes for tensors
Products = Callable[[Sequence[Any]], int]


def attention_products(arguments: Sequence[Any]) -> int:
    """QKᵀ and AV in all windows, of padding too."""
    operands, options, _ = split_arguments(arguments)
    if operands.value is None:  # packed: (B, *S, 3, H, D)
        batch, *size, _, heads, head_dim = operands.query
        value_dim = head_dim
    else:
        batch, *size, heads, head_dim = operands.query
        value_dim = operands.value[-1]
    grid = options.grid(size)
    pairs = batch * grid.windows * heads * grid.tokens**2
    return 2 * pairs * (head_dim + value_dim)


_formulas: dict[Any, Callable[..., int]] = {}


def count(forward: Any, backward: Any, before_operands: int, products: Products) -> None:
    """Formulas for a forward and a backward op; the latter has other arguments before operands.

    A backward has two products for each of the forward's, as in unfused layers: what it computes
    again is not counted.
    """
    _formulas[forward._overloadpacket] = lambda *arguments, **_: products(arguments)
    _formulas[backward._overloadpacket] = lambda *arguments, **_: (
        2 * products(arguments[before_operands:])
    )


def tell_counters() -> None:
    """Gives the formulas to torch's registry, and to counters at work, which hold a copy of it.

    Called when a dispatch mode is active; earlier, the import of the registry would import triton.
    """
    if (counting := sys.modules.get("torch.utils.flop_counter")) is None:
        return
    for op, formula in _formulas.items():
        if op not in counting.flop_registry:
            counting.register_flop_formula([op])(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", {})
        for op in _formulas:
            registry.setdefault(op, counting.flop_registry[op])
