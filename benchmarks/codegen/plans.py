"""The launches of a case, planned for a GPU that may not be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from swin_kernels.backends.triton.config import Gpu
from swin_kernels.backends.triton.launch_spec import STRIDED, Plan, Step, TensorFacts, facts_of
from swin_kernels.backends.triton.plan_backward import Needs, backward_plan
from swin_kernels.backends.triton.plan_forward import forward_plan
from swin_kernels.problem import Operands, Problem
from swin_kernels.testing import Case, make_grad_out, make_operands


def _facts(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, TensorFacts]:
    return {
        name: facts_of(x if name in STRIDED else x.contiguous())
        for name, x in tensors
        if x is not None
    }


class Plans(NamedTuple):
    """What a case launches."""

    inference: Plan
    forward: Plan  # of a training step, and its backward with every gradient
    backward: Plan


def plans_of(case: Case, gpu: Gpu, tf32: bool = False) -> Plans:
    """Those of a case, on a GPU that may not be there."""
    with torch.device("meta"):
        operands = make_operands(case)
        if case.dropout_p > 0:
            operands = operands._replace(dropout_seed=torch.empty(1, dtype=torch.int64))
        problem = Problem.checked(operands, **case.options)
        facts = _facts(zip(Operands._fields, operands))
        inference, forward = (
            forward_plan(facts, problem.options, gpu, tf32=tf32, differentiable=trained)
            for trained in (False, True)
        )
        kept = [
            (name, torch.empty(buffer.shape, dtype=buffer.dtype))
            for name, buffer in forward.buffers.items()
            if name in ("stats", "tiles")
        ]
        if "stats" in forward.buffers:
            kept.append(("out", torch.empty(forward.buffers["out"].shape, dtype=case.dtype)))
        grad_out = make_grad_out(case)
    facts |= _facts([("grad_out", grad_out), *kept])
    needs = Needs(True, True, True)
    backward = backward_plan(facts, problem.options, gpu, needs, tf32=tf32)
    return Plans(inference, forward, backward)


def steps_of(
    case: Case, gpu: Gpu, tf32: bool = False
) -> Iterator[tuple[Step, dict[str, torch.dtype]]]:
    """Every launch of a training step, with the dtypes of what it names."""
    for plan in plans_of(case, gpu, tf32)[1:]:
        for step in (*plan.steps, *plan.after):
            yield step, plan.dtypes
