"""A forward like one before, run again at once: neither checks nor torch's dispatcher.

What a backend does depends on the facts of its operands and on the options; where those are what a
call had that was checked and ran, the same is right again. Only in plain eager calls that want no
gradient: nothing there would see the op (no mode, transform, autocast, profiler, trace).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled

from swin_kernels.backends.base import Backend, Repeat
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import Operands, Options, types_within

DEVICES = {device for backend in BACKENDS.values() for device in backend.repeats_on}
_MOST = 1024
_PER_AXIS = ("window_size", "shift_size", "periodic")
_PLAIN = (Tensor, nn.Parameter)  # a subclass may want to see every op

_ready: dict[Hashable, Repeat] = {}


def key_of(operands: Operands, backend: str | None, options: Mapping[str, Any]) -> Hashable | None:
    """What tells a call from others; None where it has to go the long way."""
    # first what tracing folds to a constant
    if torch.compiler.is_compiling() or not isinstance(operands.query, Tensor):
        return None
    if (
        operands.query.device.type not in DEVICES
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _profiler_enabled()
    ):
        return None
    if type(options["dropout_p"]) is not float or options["dropout_p"] > 0:  # it draws a seed
        return None
    grad = torch.is_grad_enabled()
    facts: list[Hashable] = []
    for x in operands:
        if x is None:
            facts.append(None)
            continue
        # a view that negates is none of its memory: the dispatcher writes it out
        if type(x) not in _PLAIN or (grad and x.requires_grad) or x.is_neg():
            return None
        try:
            start = x.data_ptr()
            facts.append((x.shape, x.stride(), x.dtype, x.device, start % 16))
        except RuntimeError:  # a sparse tensor
            return None
        if not start:  # zeros without memory
            return None
    precision = None
    if operands.query.dtype == torch.float32:
        precision = torch.backends.cuda.matmul.fp32_precision
    given = (backend, *options.values())
    kinds = tuple(map(type, given))  # in a key 2, 2.0 and True are the same
    if list in kinds:  # no key
        return None
    return (*facts, precision, *given, *kinds, *map(types_within, map(options.get, _PER_AXIS)))


def find(key: Hashable) -> Repeat | None:
    """What runs a call like this one, if there was any."""
    try:
        return _ready.get(key)
    except TypeError:  # an option that no dict takes
        return None


def remember(key: Hashable, backend: Backend, operands: Operands, options: Options) -> None:
    """Keeps what `backend` has for calls like this one, which ran on operands as they are."""
    if (run := backend.repeat(operands, options)) is None:
        return
    if len(_ready) >= _MOST:
        _ready.clear()
    with contextlib.suppress(TypeError):  # as in `find`
        _ready[key] = run


def forget() -> None:
    _ready.clear()
