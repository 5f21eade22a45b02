"""Runs the steps of a plan. A kernel is compiled at its first launch, and then called directly.

`kernel[grid](...)` looks at every argument anew, some 9 µs; a plan is made for one set of facts, so
that what its step compiled to fits every later call, and the driver is called with it in 2 µs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swin_kernels.backends.triton.config import INTERPRETER, KNOWN_GPUS, Gpu
from swin_kernels.backends.triton.launch_spec import Plan, Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton reads it, when it is imported


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What configurations ask of a device."""
    if device.type != "cuda":
        return INTERPRETER
    facts: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some before 2.15
    if torch.version.hip is not None:
        arch, warp_size = facts.gcnArchName.split(":")[0], facts.warp_size
    else:
        arch, warp_size = f"sm_{facts.major}{facts.minor}", 32
    known = KNOWN_GPUS.get(arch)
    shared = known.shared_memory if known else facts.shared_memory_per_block_optin
    return Gpu(arch, shared, facts.multi_processor_count, warp_size)


def kernel_of(step: Step) -> Any:
    """The Triton function that a step names."""
    module, function = step.kernel.split(".")
    return getattr(
        importlib.import_module(f"swin_kernels.backends.triton.kernels.{module}"), function
    )


def arguments_of(step: Step) -> dict[str, Any]:
    """The arguments of a step's kernel in its order: names of tensors, None, and numbers."""
    return {
        name: step.pointers[name] if name.endswith("_ptr") else step.numbers[name]
        for name in kernel_of(step).arg_names
    }


class Launch:
    """One step, ready to run again and again."""

    def __init__(self, step: Step) -> None:
        self.kernel = kernel_of(step)
        self.grid = step.grid
        self.options = step.config.options
        arguments = arguments_of(step)
        self.tensors = [name for key, name in arguments.items() if key.endswith("_ptr")]
        self.numbers = tuple(arguments.values())[len(self.tensors) :]
        self.compiled: Any = None

    def __call__(self, tensors: dict[str, Tensor], stream: int | None) -> None:
        self.start([None if name is None else tensors[name] for name in self.tensors], stream)

    def start(self, pointers: Sequence[Tensor | None], stream: int | None) -> None:
        """Runs it on tensors in the order of `self.tensors`; without a stream as Triton does."""
        arguments = (*pointers, *self.numbers)
        compiled = self.compiled
        if compiled is None or stream is None or _watched():
            self.compiled = self.kernel[(self.grid,)](*arguments, **self.options)
            return
        # grid, stream, function, its metadata; no hooks and nothing for them
        compiled.run(
            self.grid,
            1,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *arguments,
        )


_NOWHERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside it that is the current device; mostly it is already, which costs nothing to see."""
    if torch._C._cuda_getDevice() == device.index:
        return _NOWHERE
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int | None:
    """The stream to launch on directly; None where Triton has to launch by itself."""
    # AMD's Triton also looks at the size of a tensor's storage, which no plan knows
    if torch.version.hip is not None:
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


@functools.cache
def _runtime() -> Any:
    """What Triton lets one set of its launches; found once, as an import costs each call."""
    from triton import knobs

    return knobs.runtime


def _watched() -> bool:
    """Whether a profiler asked Triton to tell it of launches: then it launches by itself."""
    hook = _runtime().launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Run:
    """A plan, ready to run on tensors like those it was made for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps = [Launch(step) for step in plan.steps]
        self.after = [Launch(step) for step in plan.after]

    def __call__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Adds the plan's buffers to `tensors`, written."""
        for name, (shape, dtype) in self.plan.buffers.items():
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        self.launch(self.steps, tensors, device)

    @staticmethod
    def launch(launches: list[Launch], tensors: dict[str, Tensor], device: torch.device) -> None:
        if device.type != "cuda":
            for launch in launches:
                launch(tensors, None)
            return
        with on_device(device):
            stream = current_stream(device)
            for launch in launches:
                launch(tensors, stream)
