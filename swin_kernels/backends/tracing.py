"""How ops are called, and what is asked of the machine, in eager mode and while traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from swin_kernels.backends.flops import tell_counters


def asked_while_tracing(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, without importing dynamo (and triton) for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def below_autograd(op: Any, *arguments: Any) -> Any:
    """`op(*arguments)` past its autograd kernel."""
    if _len_torch_dispatch_stack():  # a mode, which may count FLOPs
        tell_counters()
    with _AutoDispatchBelowAutograd():
        return op(*arguments)


def forward_of(op: Any, *arguments: Any) -> Any:
    """A forward op, for a caller that sees to gradients itself.

    A graph keeps the op whole: its autograd kernel is what differentiates the graph.
    """
    if is_compiling():
        return op(*arguments)
    if _len_torch_dispatch_stack():
        tell_counters()
    with _AutoDispatchBelowAutograd():  # not by a call of the above: each one counts here
        return op(*arguments)


def backward_of(op: Any, *arguments: Any) -> Any:
    """A backward op, with its autograd kernel, which refuses a second derivative, if needed."""
    if torch.is_grad_enabled() or is_compiling():
        return op(*arguments)
    if _len_torch_dispatch_stack():
        tell_counters()
    with _AutoDispatchBelowAutograd():
        return op(*arguments)
