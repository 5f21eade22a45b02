"""The Triton backend: its ops, and what it can run. Imports Triton only when it runs."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from swin_kernels.backends.base import (
    Backend,
    Needed,
    Ops,
    Repeat,
    Saved,
    asked_while_tracing,
    backward_fake,
    forward_fake,
    too_old,
)
from swin_kernels.backends.reference.backward import saturated_at_zero
from swin_kernels.backends.triton.config import LARGEST_HEAD_DIM
from swin_kernels.backends.triton.launch_spec import SMALLEST_BLOCK, Call, TensorFacts
from swin_kernels.backends.triton.launcher import (
    INTERPRETED,
    backward_run,
    forward_run,
    gpu_of,
    ordered,
)
from swin_kernels.backends.triton.plan import kept_shape
from swin_kernels.backends.triton.token_layout import LARGEST_INT32
from swin_kernels.problem import (
    DIFFERENTIABLE,
    NEEDS,
    Operands,
    Options,
    Problem,
    needs_of,
    split_arguments,
)

MOST_WINDOWS = 2**31 - 2**16  # a batch's windows are counted with 32 bits, a run at a time

_ARGUMENTS_SCHEMA = (
    ", ".join(f"Tensor{'' if name == 'query' else '?'} {name}" for name in Operands._fields)
    + ", int[] window_size, int[] shift_size, bool[] periodic, bool roll_then_pad, "
    "float mask_value, float scale, float dropout_p"
)
_library = torch.library.Library("swin_kernels", "FRAGMENT")
# the output, and what the backward will want besides, if `differentiable`: empty if nothing
_library.define(
    f"triton_forward({_ARGUMENTS_SCHEMA}, bool differentiable) -> (Tensor, Tensor)",
)
# gradients as those of the native ops
_library.define(
    f"triton_backward(Tensor grad_out, Tensor? out, Tensor? kept, {_ARGUMENTS_SCHEMA}, "
    f"int needs) -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
)


def _forward(*arguments) -> tuple[Tensor, Tensor]:
    operands, options, (differentiable,) = split_arguments(arguments)
    operands = ordered(operands)
    run = forward_run(operands, options, differentiable)
    made = dict(zip(run.plan.buffers, run(operands)))
    kept = made.get("stats", made.get("tiles"))
    return made["out"], made["out"].new_empty(0) if kept is None else kept


def _backward(grad_out, out, kept, *arguments) -> tuple[Tensor, ...]:
    operands, options, (needs,) = split_arguments(arguments)
    operands = ordered(operands)
    # statistics go with the output
    beside = (None, None, kept) if out is None else (out, kept, None)
    given = (*operands, grad_out, *beside)
    run = backward_run(given, options, needs)
    made = dict(zip(run.plan.buffers, run(given)))
    grads = {name: made.get(f"grad_{name}") for name in ("query", "key", "value")}
    sums = {name: made[name].sum(axes) for name, axes in run.plan.sums.items()}
    for name, bit in NEEDS.items():
        x = getattr(operands, name)
        if x is None or not needs & bit:
            continue
        if name in ("bias", "bias_table"):
            grads[name] = made[f"grad_{name}"]
        elif (grad := sums.get(f"{name}_sums")) is None:  # nothing is padded
            grads[name] = torch.zeros_like(x)
        else:
            if name == "pad_key" and operands.logit_scale is not None:
                grad = saturated_at_zero(grad, x)
            grads[name] = grad.to(x.dtype)
    # each gradient that is absent is a tensor of its own: outputs of an op never alias
    return tuple(
        grad_out.new_empty(0) if (grad := grads.get(name)) is None else grad
        for name in DIFFERENTIABLE
    )


def _forward_fake(*arguments) -> tuple[Tensor, Tensor]:
    operands, options, (differentiable,) = split_arguments(arguments)
    out: Tensor = forward_fake(*arguments)
    shape: tuple[int, ...] = (0,)
    if differentiable:
        facts = {
            name: TensorFacts(x.shape, (0,) * x.ndim, x.dtype, True)
            for name, x in zip(Operands._fields, operands)
            if x is not None
        }
        shape = kept_shape(Call(facts, options), gpu_of(out.device))
    dtype = out.dtype if shape == (0,) else torch.float32
    return out, out.new_empty(shape, dtype=dtype)


def _backward_fake(grad_out, out, kept, *arguments) -> tuple[Tensor, ...]:
    return backward_fake(grad_out, *arguments)


for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    _library.impl("triton_forward", _forward, key)
    _library.impl("triton_backward", _backward, key)


@asked_while_tracing
def _why_not_here(device: torch.device) -> str | None:
    """What keeps Triton from running on this device, whatever the problem."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` where it exists for this platform"
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return f"runs on CUDA tensors, got {device}"
    return too_old(device) if torch.version.hip is None else None


class TritonBackend(Backend[Problem, Operands, Options]):
    """The fused Triton kernels for NVIDIA GPUs, and AMD's where they compile."""

    name = "triton"
    device_types = repeats_on = ("cuda",)
    ops = Ops.named(
        "swin_kernels::triton_forward",
        "swin_kernels::triton_backward",
        before_operands=3,
        fakes=(_forward_fake, _backward_fake),
    )

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype == torch.float64:
            return 'has no float64: use backend="reference"'
        if INTERPRETED and problem.dtype == torch.bfloat16:
            return "the interpreter of Triton multiplies bfloat16 wrongly"
        if max(problem.head_dim, problem.value_dim) > LARGEST_HEAD_DIM:
            return (
                f"takes up to {LARGEST_HEAD_DIM} channels a head, got {problem.head_dim} and "
                f"{problem.value_dim}"
            )
        grid = problem.grid
        windows = problem.batch * grid.windows
        if windows > MOST_WINDOWS:
            return f"takes up to {MOST_WINDOWS} windows, got {windows}"
        programs = windows * problem.heads * -(-grid.tokens // SMALLEST_BLOCK)
        if programs > LARGEST_INT32:
            return (
                f"takes up to {LARGEST_INT32} programs, {programs} may be needed: split the batch"
            )
        if max(s + w for s, w in zip(grid.padded, grid.window)) > LARGEST_INT32:
            return f"takes maps of less than 2^31 tokens an axis, got {grid.size}"
        return _why_not_here(problem.device)

    def forward(
        self, operands: Operands, options: Options, differentiable: bool
    ) -> tuple[Tensor, Saved]:
        out, kept = self.ops.forward(*operands, *options, differentiable)
        if kept.ndim == 1:  # nothing
            return out, ()
        # statistics (W, H, 2·N) go with its output; tiles (heads, sets, …) stand alone
        return out, (out, kept) if kept.ndim == 3 else (kept,)

    def backward(
        self, grad_out: Tensor, operands: Operands, options: Options, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        out, kept = (None, None, *saved)[-2:]
        needs = needs_of(needed)
        grads = self.ops.backward(grad_out, out, kept, *operands, *options, needs)
        return Operands(**dict(zip(DIFFERENTIABLE, grads)))

    def repeat(self, operands: Operands, options: Options) -> Repeat | None:
        if any(x is not y for x, y in zip(operands, ordered(operands))):
            return None
        return forward_run(operands, options, False)
