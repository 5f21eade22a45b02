"""Runs the launches of a plan. A kernel is compiled at its first launch, then called directly.

`kernel[grid](...)` looks at every argument anew, some 9 µs; a plan is made for one set of facts, so
that what a launch compiled to fits every later call, and the driver is called with it in 2 µs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from swin_kernels.backends.base import tf32_allowed
from swin_kernels.backends.triton.config import INTERPRETER, KNOWN_GPUS
from swin_kernels.backends.triton.kernel_args import arguments_of
from swin_kernels.backends.triton.launch_spec import (
    STRIDED,
    Call,
    Gpu,
    LaunchSpec,
    Plan,
    TensorFacts,
    facts_of,
)
from swin_kernels.backends.triton.plan import backward_plan, forward_plan
from swin_kernels.problem import Operands, Options

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton reads it, when it is imported
BESIDE = ("grad_out", "out", "stats", "tiles")  # what a backward is given beside the operands
NAMES = Operands._fields + BESIDE


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


def kernel_of(spec: LaunchSpec) -> Any:
    """The Triton function that a launch names."""
    module, function = spec.kernel.split(".")
    kernels = importlib.import_module(f"swin_kernels.backends.triton.kernels.{module}")
    return getattr(kernels, function)


class Launch:
    """One launch, ready to run again and again."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.kernel = kernel_of(spec)
        self.grid = spec.grid
        self.options = spec.config.options
        arguments = arguments_of(spec, self.kernel.arg_names)
        self.tensors = [name for key, name in arguments.items() if key.endswith("_ptr")]
        self.scalars = tuple(arguments.values())[len(self.tensors) :]
        self.compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """As Triton launches: what it compiled."""
        return self.kernel[(self.grid,)](*arguments, **self.options)


@functools.cache
def _knobs() -> Any:
    """What Triton lets one set; found once, as an import costs each call."""
    from triton import knobs

    return knobs


def _watched() -> bool:
    """Whether a profiler is to be told of launches, or compiles kernels with its own code in them.

    Then Triton launches by itself.
    """
    knobs = _knobs()
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooks = getattr(before, "calls", before) or getattr(after, "calls", after)
    return bool(hooks or knobs.compilation.instrumentation_mode)


_NOWHERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside it that is the current device; mostly it is already, which costs nothing to see."""
    if device.type != "cuda" or torch._C._cuda_getDevice() == device.index:
        return _NOWHERE
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int | None:
    """The stream to launch on directly; None where Triton has to launch by itself."""
    # AMD's Triton also looks at the size of a tensor's storage, which no plan knows
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


class Run:
    """A plan, ready to run on tensors like those it was made for, in the order of `given`."""

    def __init__(self, plan: Plan, given: Sequence[str], device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.buffers = tuple(plan.buffers.values())
        names = (*given, *plan.buffers, None)  # an absent tensor is the last entry
        launches = [Launch(spec) for spec in plan.launches]
        self.launches: list[tuple[Launch, Callable]] = [
            (x, itemgetter(*(names.index(name) for name in x.tensors))) for x in launches
        ]

    def __call__(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """The plan's buffers, written."""
        made = [
            torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.buffers
        ]
        tensors = (*given, *made, None)
        with on_device(self.device):
            stream = current_stream(self.device)
            watched = stream is not None and _watched()
            for launch, pointers in self.launches:
                arguments = (*pointers(tensors), *launch.scalars)
                if (compiled := launch.compiled) is None or stream is None or watched:
                    compiled = launch(*arguments)
                    if not watched:  # else it may hold a profiler's code
                        launch.compiled = compiled
                    continue
                # a grid of three axes, then a hook for what it does not need: none of them
                at = (launch.grid, 1, 1, stream, compiled.function, compiled.packed_metadata)
                compiled.run(*at, None, None, None, *arguments)
        return made


Named = tuple[tuple[str, TensorFacts], ...]


def ordered(operands: Operands) -> Operands:
    """The operands with those of a few numbers contiguous, as kernels read them."""
    return Operands._make(
        x if x is None or name in STRIDED else x.contiguous()
        for name, x in zip(Operands._fields, operands)
    )


def named_facts(names: Iterable[str], tensors: Iterable[Tensor | None]) -> Named:
    """Facts of the tensors that are there, as a key of a cache."""
    return tuple((name, facts_of(x)) for name, x in zip(names, tensors) if x is not None)


@functools.lru_cache(maxsize=1024)
def _forward_run(
    facts: Named, options: Options, device: torch.device, tf32: bool, differentiable: bool
) -> Run:
    call = Call(dict(facts), options, tf32)
    plan = forward_plan(call, gpu_of(device), differentiable=differentiable)
    return Run(plan, Operands._fields, device)


@functools.lru_cache(maxsize=1024)
def _backward_run(
    facts: Named, options: Options, device: torch.device, tf32: bool, needs: int
) -> Run:
    call = Call(dict(facts), options, tf32, needs)
    return Run(backward_plan(call, gpu_of(device)), NAMES, device)


def forward_run(operands: Operands, options: Options, differentiable: bool) -> Run:
    """What a forward of these runs; they are `ordered`."""
    facts = named_facts(Operands._fields, operands)
    return _forward_run(facts, options, operands.query.device, tf32_allowed(), differentiable)


def backward_run(given: Sequence[Tensor | None], options: Options, needs: int) -> Run:
    """What a backward runs: `ordered` operands, then what `BESIDE` names."""
    facts = named_facts(NAMES, given)
    query = given[0]
    assert query is not None
    return _backward_run(facts, options, query.device, tf32_allowed(), needs)


def forget() -> None:
    """Plans are made anew."""
    _forward_run.cache_clear()
    _backward_run.cache_clear()
