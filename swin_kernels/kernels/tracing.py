"""What a backend may ask of the machine while torch.compile traces the call."""

from __future__ import annotations

from collections.abc import Callable


def asked_while_tracing(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, without importing dynamo (and triton) for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
