"""A case on a backend, unfused, or exactly: its output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swin_kernels.ops.attention import (
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
)
from swin_kernels.problem import DIFFERENTIABLE, Operands
from swin_kernels.testing.cases import Case
from swin_kernels.testing.unfused import unfused


class Result(NamedTuple):
    """An output and the gradient of every differentiable operand that is present."""

    out: Tensor  #: (B, *S, H, Dv)
    grads: dict[str, Tensor]  #: by the name of the operand


def call(case: Case, operands: Operands, backend: str | None = None) -> Tensor:
    """The public function of the case, packed or not, on these operands."""
    arguments = dict(zip(Operands._fields[3:10], operands[3:10])) | case.options
    if operands.key is None or operands.value is None:
        return shifted_window_attention_qkvpacked(operands.query, backend=backend, **arguments)
    query, key, value = operands.unpacked()
    return shifted_window_attention(query, key, value, backend=backend, **arguments)


def with_grad(operands: Operands) -> Operands:
    """The same memory, as leaves that require grad where the operation is differentiable."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in zip(Operands._fields, operands)
        if x is not None and name in DIFFERENTIABLE
    }
    return operands._replace(**leaves)


def differentiate(
    function: Callable[[Operands], Tensor], operands: Operands, grad_out: Tensor
) -> Result:
    """`function` of the operands and its gradients at `grad_out`."""
    leaves = with_grad(operands)
    out = function(leaves)
    names = [name for name in DIFFERENTIABLE if getattr(leaves, name) is not None]
    # what the output does not depend on, such as pad_key where nothing is padded, has gradient 0
    grads = torch.autograd.grad(
        out,
        [getattr(leaves, name) for name in names],
        grad_out.to(out.dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return Result(out.detach(), dict(zip(names, grads)))


def run(
    case: Case, operands: Operands, grad_out: Tensor, backend: str | None = None, seed: int = 0
) -> Result:
    """The operation and its gradients on `backend`; `seed` fixes the dropout."""
    torch.manual_seed(seed)
    return differentiate(lambda leaves: call(case, leaves, backend), operands, grad_out)


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    """Every floating operand in `dtype`; pads are rounded to the tokens' dtype first."""
    tokens_dtype = operands.query.dtype
    cast = {
        name: (x.to(tokens_dtype) if name.startswith("pad_") else x).to(dtype)
        for name, x in zip(Operands._fields, operands)
        if x is not None and x.is_floating_point()
    }
    return operands._replace(**cast)


def run_exact(case: Case, operands: Operands, grad_out: Tensor, seed: int = 0) -> Result:
    """The reference in fp64, differentiated by autograd."""
    return run(case, _cast(operands, torch.float64), grad_out.double(), "reference", seed)


def run_unfused(case: Case, operands: Operands, grad_out: Tensor, seed: int = 0) -> Result:
    """The unfused path in the dtype of the case: the bound that the error rule names.

    fp64 has no wider type to be measured in, so its error is that of fp32, scaled by the ratio of
    their roundings, and doubled, as `run_exact` errs as well.
    """
    if case.dtype != torch.float64:
        torch.manual_seed(seed)
        return differentiate(lambda leaves: unfused(case, leaves), operands, grad_out)
    exact = run_exact(case, operands, grad_out, seed)
    single = case.but(dtype=torch.float32, extras_dtype=torch.float32)
    rough = run_unfused(single, _cast(operands, torch.float32), grad_out.float(), seed)
    ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def scaled(rough: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
        return (exact + (rough.double() - exact) * ratio).to(dtype)

    return Result(
        scaled(rough.out, exact.out, torch.float64),
        {
            name: scaled(rough.grads[name], exact.grads[name], getattr(operands, name).dtype)
            for name in exact.grads
        },
    )
