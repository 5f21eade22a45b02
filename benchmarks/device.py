"""What a benchmark asks of a device: marks in time, graphs, memory, rates.

`DryRunDevice` is the twin of `Cuda` with the same methods, so that a benchmark runs from end to end
where there is no GPU; there the Triton kernels run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from swin_kernels.backends.native import cpu_capability
from swin_kernels.cli.command import processor


class Cuda:
    name = "cuda"
    backend = "triton"
    dtype = torch.bfloat16
    copied_bytes, matrix_size = 2**31, 8192  # what the rates are measured on
    shortest_sample = 1e-3  # seconds, so that the latency of the first launch does not matter

    def __init__(self) -> None:
        """SystemExit with a line and code 2 where there is no GPU."""
        try:
            self.device = torch.device("cuda", torch.cuda.current_device())
        except (RuntimeError, AssertionError) as error:
            cause = str(error).partition(". ")[0]
            print(f"no GPU: {cause}; --rehearse runs toy sizes on a CPU", file=sys.stderr)
            raise SystemExit(2) from error
        facts = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = float(getattr(facts, "L2_cache_size", 60e6))

    def machine(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def mark(self) -> Any:
        """A point on the stream's own clock."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, *functions: Callable[[], object]) -> list[Callable[[], None]]:
        """Each function as a replay; they share memory and are to be replayed in this order."""
        gc.collect()  # what is garbage is freed now, not during the capture
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for function in functions * 2:
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.wait()
        replays: list[Callable[[], None]] = []
        pool = None
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                function()
            pool = graph.pool()
            replays.append(graph.replay)
        return replays

    def compiled(
        self, function: Callable, fullgraph: bool = True, mode: str | None = None
    ) -> Callable:
        return torch.compile(function, dynamic=False, fullgraph=fullgraph, mode=mode)

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """What a call adds, at its peak, to the memory that was in use before."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def used_bytes(self) -> int:
        self.wait()
        return torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Give back what is no longer used."""
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()

    def broken(self) -> bool:
        """Whether an error stays: after an illegal access every later call fails."""
        try:
            self.wait()
        except Exception:  # of any class, by the version of torch
            return True
        return False

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        """Inside it work goes to another stream than the current one; both wait for each other."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)


class DryRunDevice:
    """The twin of `Cuda` on a CPU: a clock on the wall, calls for graphs, kernels interpreted."""

    name = "cpu"
    backend = "triton"
    dtype = torch.float16  # Triton's interpreter multiplies bfloat16 wrongly
    cache_bytes = 1e3
    copied_bytes, matrix_size = 2**16, 64
    shortest_sample = 0.0
    compiler = "aot_eager"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def machine(self) -> str:
        return f"none, {platform.machine()} interpreting"

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        return last - first

    def wait(self) -> None:
        pass

    def capture(self, *functions: Callable[[], object]) -> list[Callable[[], None]]:
        return [lambda f=function: (f(), None)[1] for function in functions]  # type: ignore[misc]

    def compiled(
        self, function: Callable, fullgraph: bool = True, mode: str | None = None
    ) -> Callable:
        """A `mode` is for GPUs alone, and left out."""
        return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=self.compiler)

    def peak_bytes(self, function: Callable[[], object]) -> int:
        self.release()
        function()
        return 0

    def used_bytes(self) -> int:
        return 0

    def release(self) -> None:
        gc.collect()

    def broken(self) -> bool:
        return False

    def other_stream(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class Cpu(DryRunDevice):
    """A CPU with its own kernels."""

    backend = "cpu"
    dtype: torch.dtype = torch.float32
    cache_bytes = 2e6  # of a core: what lies in a shared cache between layers stays there
    copied_bytes, matrix_size = 2**29, 2048
    shortest_sample = 2e-3
    compiler = "inductor"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def machine(self) -> str:
        threads, vector_code = torch.get_num_threads(), cpu_capability()
        return f"{processor()}, {threads} threads, {vector_code}"

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """What a call adds, at its peak, by the allocator's own record."""
        self.release()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        events = profiler.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        held = itertools.accumulate(size for _, size in sorted(changes, key=lambda x: x[0]))
        return max(held, default=0)


Device = Cuda | DryRunDevice


def keep_freed_memory() -> bool:
    """Tells glibc to give no page back, so that no call pays for fresh ones; False elsewhere.

    Else the same call takes up to twice as long where calls before it moved a threshold.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


class MachinePeaks:
    """What the device can do: a copy in its memory and a square product of its dtype, timed."""

    def __init__(self, device: Device) -> None:
        self.device, size = device, device.matrix_size
        source = torch.randn(device.copied_bytes // 4, device=device.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=device.device).to(device.dtype) for _ in "ab")
        self.calls: tuple[Callable[[], object], ...] = (
            lambda: target.copy_(source),
            lambda: a @ b,
        )
        self.work = 2 * device.copied_bytes, 2 * size**3
        self.samples: tuple[list[float], ...] = [], []
        for call in self.calls:
            call(), call()  # to warm up

    def sample(self) -> None:
        """One more time of each."""
        for call, seconds in zip(self.calls, self.samples):
            first = self.device.mark()
            call()
            last = self.device.mark()
            self.device.wait()
            seconds.append(self.device.seconds(first, last))

    def rates(self) -> tuple[float, float]:
        """Bytes a second, read and written, of the copy; FLOP a second of the product."""
        copy, product = (work / statistics.median(x) for work, x in zip(self.work, self.samples))
        return copy, product


def random(shape: tuple[int, ...], device: Device, seed: int) -> Tensor:
    """Normal numbers drawn on the device itself, in its half precision."""
    generator = torch.Generator(device.device).manual_seed(seed)
    return torch.randn(shape, device=device.device, generator=generator).to(device.dtype)
