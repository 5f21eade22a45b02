"""The Triton backend: its ops, and what it can run. Imports Triton only when it runs."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from swin_kernels.backends import flops
from swin_kernels.backends.gpu import too_old
from swin_kernels.backends.native import Ops
from swin_kernels.backends.tracing import asked_while_tracing, backward_of, forward_of
from swin_kernels.backends.triton.config import LARGEST_HEAD_DIM, SMALLEST_BLOCK
from swin_kernels.backends.triton.launch_spec import LARGEST_INT32
from swin_kernels.backends.triton.launcher import gpu_of
from swin_kernels.backends.triton.plan_forward import kept_shape
from swin_kernels.problem import Operands, Options, Problem, split_arguments

# triton reads it when it is imported: kernels then run on the CPU, a NumPy call an operation
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_WINDOWS = 2**31 - 2**16  # a batch's windows are counted with 32 bits, a run at a time

# the gradients of an op's outputs, in order; those that cost extra work can be left out
GRADIENTS = (
    "query",
    "key",
    "value",
    "bias",
    "bias_table",
    "pad_key",
    "pad_value",
    "logit_scale",
)

_OPERANDS_SCHEMA = ", ".join(
    f"Tensor{'' if name == 'query' else '?'} {name}" for name in Operands._fields
)
_OPTIONS_SCHEMA = (
    "int[] window_size, int[] shift_size, bool[] periodic, bool roll_then_pad, float mask_value, "
    "float scale, float dropout_p"
)
_library = torch.library.Library("swin_kernels", "FRAGMENT")
# the output, and what the backward will want besides, if `differentiable`: empty if nothing
_library.define(
    f"triton_forward({_OPERANDS_SCHEMA}, {_OPTIONS_SCHEMA}, bool differentiable) "
    "-> (Tensor, Tensor)"
)
# GRADIENTS, empty where not needed
_library.define(
    f"triton_backward(Tensor grad_out, Tensor? out, Tensor? kept, {_OPERANDS_SCHEMA}, "
    f"{_OPTIONS_SCHEMA}, bool[] needed) -> ({', '.join(['Tensor'] * len(GRADIENTS))})"
)


def _forward(*arguments) -> tuple[Tensor, Tensor]:
    from swin_kernels.backends.triton import calls

    operands, options, (differentiable,) = split_arguments(arguments)
    out, kept = calls.forward(operands, options, differentiable)
    return out, out.new_empty(0) if kept is None else kept


def _backward(grad_out, out, kept, *arguments) -> tuple[Tensor, ...]:
    from swin_kernels.backends.triton import calls

    operands, options, (needed,) = split_arguments(arguments)
    wanted = dict(zip(Operands._fields, needed))
    needs = calls.Needs(
        wanted["bias"] or wanted["bias_table"], wanted["pad_key"], wanted["pad_value"]
    )
    grads = calls.backward(grad_out, operands, options, out, kept, needs)
    return tuple(grads.get(name, grad_out.new_empty(0)) for name in GRADIENTS)


for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    _library.impl("triton_forward", _forward, key)
    _library.impl("triton_backward", _backward, key)
FORWARD = torch.ops.swin_kernels.triton_forward.default
BACKWARD = torch.ops.swin_kernels.triton_backward.default
flops.count(FORWARD, BACKWARD, before_operands=3)


@torch.library.register_fake("swin_kernels::triton_forward")
def _forward_fake(*arguments) -> tuple[Tensor, Tensor]:
    operands, options, (differentiable,) = split_arguments(arguments)
    query, _, value = operands.unpacked()
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    shape = kept_shape(operands, options, gpu_of(query.device)) if differentiable else (0,)
    dtype = query.dtype if shape == (0,) else torch.float32
    return out, query.new_empty(shape, dtype=dtype)


@torch.library.register_fake("swin_kernels::triton_backward")
def _backward_fake(grad_out, out, kept, *arguments) -> tuple[Tensor, ...]:
    operands, _, (needed,) = split_arguments(arguments)
    wanted = dict(zip(Operands._fields, needed))
    grads = []
    for name in GRADIENTS:
        x = getattr(operands, name)
        always = name in ("query", "key", "value", "logit_scale")
        written = x is not None and (always or wanted[name])
        # each gradient that is absent is a tensor of its own: outputs of an op never alias
        grads.append(x.new_empty(x.shape) if written else grad_out.new_empty(0))
    return tuple(grads)


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


class TritonBackend:
    """The fused Triton kernels for NVIDIA GPUs, and AMD's where they compile."""

    name = "triton"
    ops = Ops(FORWARD, BACKWARD)

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
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, kept = forward_of(FORWARD, *operands, *options, differentiable)
        if kept.ndim == 1:  # nothing
            return out, ()
        # statistics (W, H, 2·N) go with its output; tiles (heads, sets, …) stand alone
        return out, (out, kept) if kept.ndim == 3 else (kept,)

    def backward(
        self,
        grad_out: Tensor,
        operands: Operands,
        options: Options,
        saved: tuple[Tensor, ...],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        out, kept = (None, None, *saved)[-2:]
        grads = backward_of(BACKWARD, grad_out, out, kept, *operands, *options, needed)
        wanted = {
            name: grad
            for name, grad in zip(GRADIENTS, grads)
            if getattr(operands, name) is not None and needed[Operands._fields.index(name)]
        }
        return tuple(wanted.get(name) for name in Operands._fields)
