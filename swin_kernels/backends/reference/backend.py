"""The reference as a backend."""

from __future__ import annotations

from torch import Tensor

from swin_kernels.backends.base import Backend, Needed, Saved
from swin_kernels.backends.reference.backward import backward
from swin_kernels.backends.reference.forward import forward
from swin_kernels.problem import Operands, Options, Problem


class ReferenceBackend(Backend[Problem, Operands, Options]):
    """Plain PyTorch: whatever torch runs on, differentiable to any order."""

    name = "reference"

    def why_not(self, problem: Problem) -> str | None:
        return None

    def forward(
        self, operands: Operands, options: Options, differentiable: bool
    ) -> tuple[Tensor, Saved]:
        return forward(operands, options), ()

    def backward(
        self, grad_out: Tensor, operands: Operands, options: Options, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        return backward(grad_out, operands, options)
