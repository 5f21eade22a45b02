"""The one autograd Function over all backends, and the autograd kernels of their ops.

An eager call enters the Function itself. torch.export, make_fx and torch.compile record an op: its
kernels under the key Autograd give the graph the gradients of an eager call when it is run, or
traced again. Eager calls pass these by: see `below_autograd`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from swin_kernels.backends.base import Backend, Ops, asked_while_tracing, below_autograd
from swin_kernels.ops.dispatch import BACKENDS, REFERENCE
from swin_kernels.problem import MASK_HAS_NO_GRADIENT, Operands, Options, split_arguments

NO_SECOND_DERIVATIVE = (
    'the fused kernels have no second derivative: use backend="reference" for that'
)
_OPERANDS = len(Operands._fields)
_ARGUMENTS = _OPERANDS + len(Options._fields)
_MASK = Operands._fields.index("mask")
_libraries: dict[str, torch.library.Library] = {}  # a kernel lives as long as its library


def _past_autograd() -> Any:
    """`below_autograd`, but where dynamo records: compiled autograd goes through the Function."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else below_autograd()


class ShiftedWindowAttentionFunction(torch.autograd.Function):
    """`apply(*Operands, *Options, backend)`: the fused forward and backward, without the checks.

    The arguments are the fields of `swin_kernels.problem.Operands` and
    `swin_kernels.problem.Options` in order, then the name of a backend. Saved are the operands, and
    what little the backend adds (Triton's kernels for large windows: the output and two numbers per
    row): no probabilities, no windows. With True as one more argument it returns the output and
    what was added beside it.
    """

    @staticmethod
    def forward(ctx, *args):
        operands, options = Operands(*args[:_OPERANDS]), Options(*args[_OPERANDS:_ARGUMENTS])
        backend = args[_ARGUMENTS]
        with _past_autograd():
            out, saved = BACKENDS[backend].forward(operands, options, True)
        ctx.save_for_backward(*operands, *saved)
        ctx.options = options
        ctx.backend = backend
        ctx.others = len(args) - _OPERANDS
        ctx.set_materialize_grads(False)
        if len(args) == _ARGUMENTS + 1:
            return out
        beside = tuple(x for x in saved if x is not out)
        ctx.mark_non_differentiable(*beside)
        return (out, *beside)

    @staticmethod
    def backward(ctx, grad_out, *of_saved):
        needed = ctx.needs_input_grad[:_OPERANDS]
        if needed[_MASK]:
            raise ValueError(MASK_HAS_NO_GRADIENT)
        others = (None,) * ctx.others
        if grad_out is None:
            return (*(None,) * _OPERANDS, *others)
        saved = ctx.saved_tensors
        operands, saved = Operands(*saved[:_OPERANDS]), saved[_OPERANDS:]
        # where a second derivative may follow, the op's own kernel refuses it
        with contextlib.nullcontext() if torch.is_grad_enabled() else _past_autograd():
            grads = BACKENDS[ctx.backend].backward(grad_out, operands, ctx.options, saved, needed)
        kept = [grad if wanted else None for grad, wanted in zip(grads, needed)]
        return (*kept, *others)


@asked_while_tracing  # dynamo guards on the transforms, but cannot trace the call
def _functorch_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def transforms_active() -> bool:
    """Forward-mode AD or functorch: a raw op would answer both with silent zeros."""
    # read in traced code, so that dynamo guards on the level and compiles anew inside `dual_level`
    return forward_ad._current_level >= 0 or _functorch_active()


def _need_grad(arguments: tuple) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    )


def _forward_kernel(op: Any, names: dict[str, str]) -> Callable:
    returns, only = len(op._schema.returns), next(iter(names.values()))

    def kernel(*arguments):
        transformed = transforms_active()
        if not transformed and not _need_grad(arguments):
            with below_autograd():
                return op(*arguments)
        operands, options, others = split_arguments(arguments)
        if transformed:
            found = REFERENCE.forward(operands, options, True)[:1]
        else:
            name = names.get(operands.query.device.type, only)
            found = ShiftedWindowAttentionFunction.apply(*operands, *options, name, True)
        if returns == 1:
            return found[0]
        # beside its output, what the backward will want: nothing if the caller wants none
        wanted = others[-1] and len(found) == returns
        return found if wanted else (found[0], found[0].new_empty(0))

    return kernel


class _BackwardOnce(torch.autograd.Function):
    """A backward op as a node of its own, so that a second derivative raises along every path.

    `once_differentiable` would instead drop this term silently from derivatives along other paths.
    """

    @staticmethod
    def forward(ctx, op, *arguments):
        with below_autograd():
            return op(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


def _backward_kernel(op: Any) -> Callable:
    def kernel(*arguments):
        if transforms_active():
            raise NotImplementedError(NO_SECOND_DERIVATIVE)
        if _need_grad(arguments):
            return _BackwardOnce.apply(op, *arguments)
        with below_autograd():
            return op(*arguments)

    return kernel


def register(*backends: Backend) -> None:
    """Gives the ops of these backends their autograd kernels; one op may serve several devices."""
    served: dict[Ops, dict[str, str]] = {}
    for backend in backends:
        if backend.ops is not None:
            names = served.setdefault(backend.ops, {})
            names.update(dict.fromkeys(backend.device_types, backend.name))
    for ops, names in served.items():
        namespace = ops.forward.namespace
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
        library.impl(ops.forward._opname, _forward_kernel(ops.forward, names), "Autograd")
        library.impl(ops.backward._opname, _backward_kernel(ops.backward), "Autograd")


register(*BACKENDS.values())
