"""What a backend is, how its ops are called, and what all of them ask of a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, _len_torch_dispatch_stack

from swin_kernels.backends.flops import Products, attention_products, count, tell_counters
from swin_kernels.problem import DIFFERENTIABLE, NEEDS, Operands, split_arguments

OLDEST_CAPABILITY = (8, 0)

# a forward again, on operands of the very facts that it was made for, unchecked; output first
Repeat = Callable[[Operands], Sequence[Tensor]]
Saved = tuple[Tensor, ...]  # what a backward wants to find again beside the operands
Needed = tuple[bool, ...]  # by the fields of the operands, whether its gradient is
# of one operation: the facts of a call, its tensors and its numbers
ProblemT = TypeVar("ProblemT")
OperandsT = TypeVar("OperandsT")
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Ops:
    """The forward and the backward op of a backend."""

    forward: Any
    backward: Any

    @classmethod
    def named(
        cls,
        forward: str,
        backward: str,
        before_operands: int = 1,
        fakes: tuple = (),
        products: Products = attention_products,
    ) -> Ops:
        """Those of these qualified names, now defined; traced from now on.

        `before_operands` is the number of arguments of the backward op that come first, `products`
        what counts the FLOPs of the forward.
        """
        found = []
        for qualified, fake in zip((forward, backward), fakes or (forward_fake, backward_fake)):
            torch.library.register_fake(qualified, fake)
            namespace, name = qualified.split("::")
            found.append(getattr(getattr(torch.ops, namespace), name).default)
        ops = cls(*found)
        count(ops.forward, ops.backward, before_operands, products)
        return ops


class Backend(ABC, Generic[ProblemT, OperandsT, OptionsT]):
    """One way to compute one operation of the contract."""

    name: ClassVar[str]
    ops: Ops | None = None  # None: it has no op of its own, or it was not loaded
    device_types: tuple[str, ...] = ()  # that its ops have kernels for
    repeats_on: tuple[str, ...] = ()  # device types for which `repeat` may offer something

    @abstractmethod
    def why_not(self, problem: ProblemT) -> str | None:
        """None if it can run `problem`, else the reason."""

    def why_not_unasked(self, problem: ProblemT) -> str | None:
        """Why it does not run `problem`, though it can, unless asked for by name."""
        return None

    @abstractmethod
    def forward(
        self, operands: OperandsT, options: OptionsT, differentiable: bool
    ) -> tuple[Tensor, Saved]:
        """The output, and what is saved beside the operands."""

    @abstractmethod
    def backward(
        self, grad_out: Tensor, operands: OperandsT, options: OptionsT, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the operands; those not needed may be anything."""

    def prepared(self, operands: OperandsT, problem: ProblemT) -> OperandsT:
        """The operands of an eager call that wants no gradient, with what it may keep of them."""
        return operands

    def repeat(self, operands: OperandsT, options: OptionsT) -> Repeat | None:
        """What runs an inference call like this one again, faster than `forward`, if anything."""
        return None


def forward_fake(*arguments) -> Tensor:
    operands, *_ = split_arguments(arguments)
    query, _, value = operands.unpacked()
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def backward_fake(grad_out, *arguments) -> tuple[Tensor, ...]:
    operands, _, (*_, needs) = split_arguments(arguments)
    grads = []
    for name in DIFFERENTIABLE:
        x = getattr(operands, name)
        written = x is not None and (name not in NEEDS or needs & NEEDS[name])
        # each gradient that is absent is a tensor of its own: outputs of an op never alias
        grads.append(x.new_empty(x.shape) if written else grad_out.new_empty(0))
    return tuple(grads)


def below_autograd() -> Any:
    """A context in which ops run past their autograd kernels: the caller sees to gradients.

    Not where a graph is recorded: there the op's autograd kernel is what differentiates it.
    """
    if _len_torch_dispatch_stack():  # a mode, which may count FLOPs
        tell_counters()
    return _AutoDispatchBelowAutograd()


def asked_while_tracing(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, without importing dynamo (and triton) for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def too_old(device: torch.device) -> str | None:
    """Why an NVIDIA GPU cannot run the kernels, if its compute capability is too low."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    return f"needs compute capability 8.0 or newer, {device} has {'.'.join(map(str, capability))}"


@asked_while_tracing
def tf32_allowed() -> bool:
    """Whether the user allowed TF32 in products of fp32, in the old way or in the new."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
