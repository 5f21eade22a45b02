"""Both sublayers as the tests of what they share ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swin_kernels.attention_sublayer_problem import (
    ATTENTION_SUBLAYER_DIFFERENTIABLE,
    AttentionSublayerProblem,
)
from swin_kernels.backends.reference.attention_sublayer import attention_sublayer_backward
from swin_kernels.backends.reference.mlp import mlp_backward
from swin_kernels.mlp_problem import MLP_DIFFERENTIABLE, MlpProblem
from swin_kernels.ops.autograd import ATTENTION_SUBLAYER, MLP, Operation
from swin_kernels.testing import attention_sublayer as attention
from swin_kernels.testing import mlp


@dataclass(frozen=True)
class Sublayer:
    """An operation with its cases and what makes, runs and judges them."""

    operation: Operation
    differentiable: tuple[str, ...]
    case: Any
    make: Callable
    make_grad_out: Callable
    call: Callable
    run: Callable
    run_exact: Callable
    with_grad: Callable
    differentiate: Callable
    written_out: Callable

    @property
    def ops(self) -> Any:
        return self.operation.backends["cpu"].ops

    def arguments(self, case: Any) -> tuple[Any, Any]:
        """Operands and options of a case, as an op takes them."""
        operands = self.make(case)
        if self.operation is MLP:
            return operands, MlpProblem.checked(operands, **case.options).options
        sizes = (case.heads, case.window, case.shift)
        return operands, AttentionSublayerProblem.checked(operands, *sizes, **case.options).options

    def leaves(self, case: Any) -> tuple[Callable, list]:
        """A function of the differentiable operands, and those."""
        operands = self.with_grad(self.make(case))
        names = [name for name in self.differentiable if getattr(operands, name) is not None]

        def function(*leaves, backend=None):
            return self.call(case, operands._replace(**dict(zip(names, leaves))), backend)

        return function, [getattr(operands, name) for name in names]


SUBLAYERS = {
    "mlp": Sublayer(
        MLP,
        MLP_DIFFERENTIABLE,
        mlp.MlpCase,
        mlp.make_mlp_operands,
        mlp.make_mlp_grad_out,
        mlp.call_mlp,
        mlp.run_mlp,
        mlp.run_mlp_exact,
        mlp.mlp_with_grad,
        mlp.differentiate_mlp,
        mlp_backward,
    ),
    "attention": Sublayer(
        ATTENTION_SUBLAYER,
        ATTENTION_SUBLAYER_DIFFERENTIABLE,
        attention.SublayerCase,
        attention.make_sublayer_operands,
        attention.make_sublayer_grad_out,
        attention.call_sublayer,
        attention.run_sublayer,
        attention.run_sublayer_exact,
        attention.sublayer_with_grad,
        attention.differentiate_sublayer,
        attention_sublayer_backward,
    ),
}
