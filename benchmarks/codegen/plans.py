"""The launches of a case, planned for a GPU that may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from swin_kernels.backends.triton.launch_spec import Call, Gpu, LaunchSpec, Plan
from swin_kernels.backends.triton.launcher import named_facts, ordered
from swin_kernels.backends.triton.plan import backward_plan, forward_plan
from swin_kernels.problem import NEEDS, Operands, Problem
from swin_kernels.testing import Case, make_grad_out, make_operands

EVERY_GRADIENT = sum(NEEDS.values())


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
        options = Problem.checked(operands, **case.options).options
        facts = dict(named_facts(Operands._fields, ordered(operands)))
        call = Call(facts, options, tf32)
        inference, forward = (
            forward_plan(call, gpu, differentiable=trained) for trained in (False, True)
        )
        kept = {name: x for name, x in forward.buffers.items() if name in ("stats", "tiles")}
        if "stats" in kept:
            kept["out"] = forward.buffers["out"]
        made = [torch.empty(shape, dtype=dtype) for shape, dtype in kept.values()]
        facts = facts | dict(named_facts(("grad_out", *kept), (make_grad_out(case), *made)))
    backward = backward_plan(Call(facts, options, tf32, EVERY_GRADIENT), gpu)
    return Plans(inference, forward, backward)


def launches_in(plan: Plan) -> Iterator[tuple[LaunchSpec, dict[str, torch.dtype]]]:
    """Every launch of a plan, with the dtypes of what it names."""
    yield from ((launch, plan.dtypes) for launch in plan.launches)


def launches_of(
    case: Case, gpu: Gpu, tf32: bool = False
) -> Iterator[tuple[LaunchSpec, dict[str, torch.dtype]]]:
    """Those of a training step."""
    for plan in plans_of(case, gpu, tf32)[1:]:
        yield from launches_in(plan)
