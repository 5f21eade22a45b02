"""The cases of the benchmarks under pytest-benchmark: checked, then timed.

    python -m pytest benchmarks --benchmark-only [-k "T1 and sdpa"] [--benchmark-json FILE]

On a GPU where there is one, else on the CPU; SWIN_KERNELS_REHEARSE=1 takes toy sizes. A round is a
call for each of several sets of inputs, which caches do not hold together: `calls` of extra_info
says how many, and `error` how far off float64 beside the unfused path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from benchmarks.baselines.providers import GPU_PROVIDERS
from benchmarks.cases import cpu_cases, other_cases, other_cpu_cases, swin_cases, toy_cases
from benchmarks.cpu import CPU_PROVIDERS
from benchmarks.device import Cpu, Cuda, Device, keep_freed_memory
from benchmarks.timing import Gate, Inputs, Loop, Replayed, make_sets
from swin_kernels.cli.command import keep_compiled_apart

keep_compiled_apart()
ROUNDS = 25  # of a backward, before each of which there is a forward
DEVICE: Device
if os.environ.get("SWIN_KERNELS_REHEARSE"):
    DEVICE, CHOSEN = Cpu(), tuple(p for p in CPU_PROVIDERS if not p.slow)
    CASES = {name: case.but(dtype=Cpu.dtype) for name, case in toy_cases().items()}
    DEVICE.cache_bytes = 1e3  # else there are thousands of sets
elif torch.cuda.is_available():
    DEVICE, CASES, CHOSEN = Cuda(), swin_cases() | other_cases(), GPU_PROVIDERS
else:
    keep_freed_memory()
    DEVICE, CASES, CHOSEN = Cpu(), cpu_cases() | other_cpu_cases(), CPU_PROVIDERS


@lru_cache(maxsize=1)  # those of one case at a time
def gate_of(name: str) -> tuple[Gate, list[Inputs]]:
    torch._dynamo.reset()
    case = CASES[name]
    sets = make_sets(case, DEVICE)
    return Gate(case, DEVICE, sets[0]), sets


@lru_cache(maxsize=1)
def loop_of(name: str, provider: str) -> tuple[Loop | Replayed, dict[str, float]]:
    """Checked and warm, with its errors."""
    gate, sets = gate_of(name)
    chosen = next(p for p in CHOSEN if p.name == provider)
    attend = chosen.make(CASES[name], DEVICE)
    errors = gate.check(attend, chosen.factor, chosen.backward)
    loop: Loop | Replayed = Loop(attend, sets, chosen.directions)
    loop = Replayed(loop, DEVICE) if chosen.graph else loop
    loop.warm()
    return loop, errors


WANTED = [(c, p.name, d) for c in CASES for p in CHOSEN for d in p.directions]


@pytest.mark.parametrize(("case", "provider", "direction"), WANTED, ids=map("-".join, WANTED))
def test_attention(benchmark, case, provider, direction):
    loop, errors = loop_of(case, provider)
    benchmark.group = f"{case}, {direction}"
    benchmark.extra_info |= {"calls": len(loop.sets), "error": errors.get(direction)}

    def run(*steps: Callable[[], None]) -> None:
        for step in steps:
            step()
        DEVICE.wait()

    forward, backward = loop.training_forward, loop.training_backward
    if direction == "forward":
        benchmark(run, loop.forward)
    elif direction == "backward":
        benchmark.pedantic(run, [backward], setup=lambda: run(forward), rounds=ROUNDS)
    else:
        benchmark(run, forward, backward)
