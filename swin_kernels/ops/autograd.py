"""One autograd Function an operation, over all its backends, and the autograd kernels of their ops.

An eager call enters the Function itself. torch.export, make_fx and torch.compile record an op: its
kernels under the key Autograd give the graph the gradients of an eager call when it is run, or
traced again. Eager calls pass these by: see `below_autograd`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    AttentionSublayerOperands,
    AttentionSublayerOptions,
    split_attention_sublayer_arguments,
)
from swin_kernels.backends.base import Backend, Ops, asked_while_tracing, below_autograd
from swin_kernels.mlp_problem import MlpOperands, MlpOptions, split_mlp_arguments
from swin_kernels.ops.dispatch import (
    ATTENTION_SUBLAYER_BACKENDS,
    BACKENDS,
    DEFAULT_BACKEND,
    MLP_BACKENDS,
    Backends,
    check_name,
)
from swin_kernels.problem import MASK_HAS_NO_GRADIENT, Operands, Options, split_arguments
from swin_kernels.sublayer_problem import RESIDUAL_SCALE_HAS_NO_GRADIENT

NO_SECOND_DERIVATIVE = (
    'the fused kernels have no second derivative: use backend="reference" for that'
)
_libraries: dict[str, torch.library.Library] = {}  # a kernel lives as long as its library


@dataclass(frozen=True)
class Operation:
    """What tells one operation from another: its arguments and its backends."""

    operands: Any  # the named tuples that its ops' schemas begin with
    options: Any
    split: Callable[[Sequence[Any]], tuple[Any, Any, tuple[Any, ...]]]
    backends: Backends
    constants: dict[str, str]  # operands that have no gradient -> what is said where one is wanted

    @property
    def reference(self) -> Backend:
        return self.backends["reference"]

    @property
    def function(self) -> Any:
        """Its autograd Function."""
        return _FUNCTIONS[self.operands]

    @property
    def operand_count(self) -> int:
        return len(self.operands._fields)

    @property
    def argument_count(self) -> int:
        return self.operand_count + len(self.options._fields)


ATTENTION = Operation(Operands, Options, split_arguments, BACKENDS, {"mask": MASK_HAS_NO_GRADIENT})
MLP = Operation(
    MlpOperands,
    MlpOptions,
    split_mlp_arguments,
    MLP_BACKENDS,
    {"residual_scale": RESIDUAL_SCALE_HAS_NO_GRADIENT},
)
ATTENTION_SUBLAYER = Operation(
    AttentionSublayerOperands,
    AttentionSublayerOptions,
    split_attention_sublayer_arguments,
    ATTENTION_SUBLAYER_BACKENDS,
    {"mask": MASK_HAS_NO_GRADIENT, "residual_scale": RESIDUAL_SCALE_HAS_NO_GRADIENT},
)


def _past_autograd() -> Any:
    """`below_autograd`, but where dynamo records: compiled autograd goes through the Function."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else below_autograd()


def _forward_of(operation: Operation) -> Callable:
    """The forward of its Function; made, not called, by it: a call is to reach its kernel soon."""
    n, m = operation.operand_count, operation.argument_count

    def forward(ctx, *args):
        operands, options = operation.operands(*args[:n]), operation.options(*args[n:m])
        backend = args[m]
        with _past_autograd():
            out, saved = operation.backends[backend].forward(operands, options, True)
        ctx.save_for_backward(*operands, *saved)
        ctx.options = options
        ctx.backend = backend
        ctx.others = len(args) - n
        ctx.set_materialize_grads(False)
        if len(args) == m + 1:
            return out
        beside = tuple(x for x in saved if x is not out)
        ctx.mark_non_differentiable(*beside)
        return (out, *beside)

    return forward


def _backward_of(operation: Operation) -> Callable:
    """The backward of its Function."""
    n = operation.operand_count
    constants = {operation.operands._fields.index(k): why for k, why in operation.constants.items()}

    def backward(ctx, grad_out, *of_saved):
        needed = ctx.needs_input_grad[:n]
        for place, why in constants.items():
            if needed[place]:
                raise ValueError(why)
        others = (None,) * ctx.others
        if grad_out is None:
            return (*(None,) * n, *others)
        saved = ctx.saved_tensors
        operands, saved = operation.operands(*saved[:n]), saved[n:]
        backend = operation.backends[ctx.backend]
        # where a second derivative may follow, the op's own kernel refuses it
        with contextlib.nullcontext() if torch.is_grad_enabled() else _past_autograd():
            grads = backend.backward(grad_out, operands, ctx.options, saved, needed)
        kept = [grad if wanted else None for grad, wanted in zip(grads, needed)]
        return (*kept, *others)

    return backward


class ShiftedWindowAttentionFunction(torch.autograd.Function):
    """`apply(*Operands, *Options, backend)`: the fused forward and backward, without the checks.

    The arguments are the fields of `swin_kernels.problem.Operands` and
    `swin_kernels.problem.Options` in order, then the name of a backend. Saved are the operands, and
    what little the backend adds (Triton's kernels for large windows: the output and two numbers per
    row): no probabilities, no windows. With True as one more argument it returns the output and
    what was added beside it.
    """

    forward = staticmethod(_forward_of(ATTENTION))
    backward = staticmethod(_backward_of(ATTENTION))


class MlpSublayerFunction(torch.autograd.Function):
    """`apply(*MlpOperands, *MlpOptions, backend)`: the same for the MLP sublayer.

    The arguments are the fields of `swin_kernels.mlp_problem.MlpOperands` and `MlpOptions` in
    order, then the name of a backend. Saved are the operands alone.
    """

    forward = staticmethod(_forward_of(MLP))
    backward = staticmethod(_backward_of(MLP))


class WindowAttentionSublayerFunction(torch.autograd.Function):
    """`apply(*AttentionSublayerOperands, *AttentionSublayerOptions, backend)`: the same for the
    attention sublayer, by the named tuples of `swin_kernels.attention_sublayer_problem`.
    """

    forward = staticmethod(_forward_of(ATTENTION_SUBLAYER))
    backward = staticmethod(_backward_of(ATTENTION_SUBLAYER))


_FUNCTIONS = {
    ATTENTION.operands: ShiftedWindowAttentionFunction,
    MLP.operands: MlpSublayerFunction,
    ATTENTION_SUBLAYER.operands: WindowAttentionSublayerFunction,
}


@asked_while_tracing  # dynamo guards on the transforms, but cannot trace the call
def _functorch_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def transforms_active() -> bool:
    """Forward-mode AD or functorch: a raw op would answer both with silent zeros."""
    # read in traced code, so that dynamo guards on the level and compiles anew inside `dual_level`
    return forward_ad._current_level >= 0 or _functorch_active()


def reference_under_transforms(operation: Operation, name: str | None) -> Backend:
    """The reference, which alone can; NotImplementedError if `name` is another backend."""
    name = DEFAULT_BACKEND if name is None else name
    if name is not None and check_name(name, operation.backends) is not operation.reference:
        raise NotImplementedError(
            f"backend {name!r} cannot run under torch.func transforms or forward-mode AD; "
            'leave backend out, or use backend="reference"'
        )
    return operation.reference


def _need_grad(arguments: tuple) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    )


def _forward_kernel(operation: Operation, op: Any, names: dict[str, str]) -> Callable:
    returns, only = len(op._schema.returns), next(iter(names.values()))
    function = operation.function

    def kernel(*arguments):
        transformed = transforms_active()
        if not transformed and not _need_grad(arguments):
            with below_autograd():
                return op(*arguments)
        operands, options, others = operation.split(arguments)
        if transformed:
            found = operation.reference.forward(operands, options, True)[:1]
        else:
            name = names.get(operands[0].device.type, only)
            found = function.apply(*operands, *options, name, True)
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


def register(operation: Operation, *backends: Backend) -> None:
    """Gives the ops of these backends their autograd kernels; one op may serve several devices."""
    served: dict[Ops, dict[str, str]] = {}
    for backend in backends:
        if backend.ops is not None:
            names = served.setdefault(backend.ops, {})
            names.update(dict.fromkeys(backend.device_types, backend.name))
    for ops, names in served.items():
        namespace = ops.forward.namespace
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
        forward = _forward_kernel(operation, ops.forward, names)
        library.impl(ops.forward._opname, forward, "Autograd")
        library.impl(ops.backward._opname, _backward_kernel(ops.backward), "Autograd")


for _operation in (ATTENTION, MLP, ATTENTION_SUBLAYER):
    register(_operation, *_operation.backends.values())
