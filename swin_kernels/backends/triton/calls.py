"""A call on tensors: its plan, found or made; its buffers; what comes out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from swin_kernels.backends.gpu import tf32_allowed
from swin_kernels.backends.reference.forward import NORM_CLAMP
from swin_kernels.backends.triton.config import Gpu
from swin_kernels.backends.triton.launch_spec import STRIDED, TensorFacts, facts_of
from swin_kernels.backends.triton.launcher import Run, gpu_of
from swin_kernels.backends.triton.plan_backward import Needs, backward_plan
from swin_kernels.backends.triton.plan_forward import forward_plan
from swin_kernels.problem import Operands, Options

Named = tuple[tuple[str, TensorFacts], ...]


def _tensors(operands: Operands) -> dict[str, Tensor]:
    """The operands that are there; a few numbers that do not lie in order are copied."""
    return {
        name: x if name in STRIDED else x.contiguous()
        for name, x in zip(Operands._fields, operands)
        if x is not None
    }


def _named(tensors: dict[str, Tensor]) -> Named:
    return tuple((name, facts_of(x)) for name, x in tensors.items())


@functools.lru_cache(maxsize=1024)
def _forward_run(
    facts: Named,
    options: Options,
    gpu: Gpu,
    device: torch.device,
    tf32: bool,
    differentiable: bool,
) -> Run:
    return Run(forward_plan(dict(facts), options, gpu, tf32=tf32, differentiable=differentiable))


def forward(
    operands: Operands, options: Options, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """The output, and what else the backward will want of it: see `forward_plan`."""
    tensors = _tensors(operands)
    run = _run_of(tensors, options, differentiable)
    run(tensors, operands.query.device)
    return tensors["out"], tensors.get("stats", tensors.get("tiles"))


def forward_run(operands: Operands, options: Options, differentiable: bool) -> Run:
    """What `forward` runs."""
    return _run_of(_tensors(operands), options, differentiable)


def _run_of(tensors: dict[str, Tensor], options: Options, differentiable: bool) -> Run:
    device = tensors["query"].device
    return _forward_run(
        _named(tensors), options, gpu_of(device), device, tf32_allowed(), differentiable
    )


@functools.lru_cache(maxsize=1024)
def _backward_run(
    facts: Named, options: Options, gpu: Gpu, device: torch.device, tf32: bool, needs: Needs
) -> Run:
    return Run(backward_plan(dict(facts), options, gpu, needs, tf32=tf32))


def backward(
    grad_out: Tensor,
    operands: Operands,
    options: Options,
    out: Tensor | None,
    kept: Tensor | None,
    needs: Needs,
) -> dict[str, Tensor]:
    """The gradients by the names of their operands, each in its dtype; those of tokens always."""
    tensors = _tensors(operands) | {"grad_out": grad_out}
    if out is not None and kept is not None:
        tensors |= {"out": out, "stats": kept}
    elif kept is not None:
        tensors["tiles"] = kept
    device = operands.query.device
    run = _backward_run(_named(tensors), options, gpu_of(device), device, tf32_allowed(), needs)
    run(tensors, device)
    summed = {name: tensors[name].sum(axes) for name, axes in run.plan.sums.items()}
    grads = {
        name: tensors[f"grad_{name}"]
        for name in ("query", "key", "value")
        if f"grad_{name}" in tensors
    }
    if "bias_sums" in summed:
        bias_grad = summed["bias_sums"]
        if operands.bias is not None:
            grads["bias"] = bias_grad.to(operands.bias.dtype)
        else:
            assert operands.bias_table is not None
            tensors |= {
                "bias_grad": bias_grad,
                "table_grad": torch.empty_like(tensors["bias_table"]),
            }
            run.launch(run.after, tensors, device)
            grads["bias_table"] = tensors["table_grad"]
    for name in ("pad_key", "pad_value", "logit_scale"):
        if f"{name}_sums" in summed:
            grad = summed[f"{name}_sums"]
            if name == "pad_key" and operands.logit_scale is not None:
                grad = _held(grad, tensors["pad_key"])
            grads[name] = grad.to(tensors[name].dtype)
    for name, needed in zip(Needs._fields[1:], needs[1:]):
        if needed and name not in grads:  # nothing is padded
            grads[name] = torch.zeros_like(tensors[name])
    return grads


def _held(grad: Tensor, pad_key: Tensor) -> Tensor:
    """As `through_unit`: the gradient of a zero vector held within what fp16 can store."""
    limit = min(torch.finfo(pad_key.dtype).max, torch.finfo(grad.dtype).max)
    clamped = torch.linalg.vector_norm(pad_key.float(), dim=-1, keepdim=True) <= NORM_CLAMP
    return torch.where(clamped, grad.clamp(-limit, limit), grad)
