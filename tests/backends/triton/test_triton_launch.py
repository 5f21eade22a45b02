"""The light launcher: Triton's own launch once, then straight to what it compiled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swin_kernels.backends.triton import launcher
from swin_kernels.backends.triton.config import Config
from swin_kernels.backends.triton.launch_spec import Buffer, Plan, Step
from swin_kernels.backends.triton.launcher import Launch, Run, arguments_of, gpu_of

STREAM = 7


class Compiled:
    """As Triton's CompiledKernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)


class Kernel:
    """As Triton's JITFunction."""

    arg_names = ("x_ptr", "y_ptr", "sizes", "scale", "BLOCK")

    def __init__(self):
        self.launches, self.compiled = [], Compiled()

    def __getitem__(self, grid):
        def launched(*arguments, **options):
            self.launches.append((grid, arguments, options))
            return self.compiled

        return launched


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(launcher, "kernel_of", lambda step: kernel)
    return kernel


@pytest.fixture
def hook(monkeypatch):
    """Triton's knob for a profiler's hook, without Triton."""
    runtime = SimpleNamespace(launch_enter_hook=None)
    monkeypatch.setattr(launcher, "_runtime", lambda: runtime)
    return runtime


STEP = Step(
    "fwd.kernel",
    12,
    {"x_ptr": "query", "y_ptr": None, "z_ptr": "not asked for"},
    {"BLOCK": 64, "sizes": (1, 2), "scale": 0.5, "more": 3},
    Config(64, 64, 4, 2),
)
TENSORS = {"query": torch.zeros(1), "key": torch.ones(1)}
ARGUMENTS = (TENSORS["query"], None, (1, 2), 0.5, 64)


def test_arguments_come_in_the_order_of_the_kernel(kernel):
    names = dict(zip(Kernel.arg_names, ("query", None, (1, 2), 0.5, 64)))
    assert list(arguments_of(STEP).items()) == list(names.items())


def test_first_launch_compiles_and_later_ones_run_what_it_compiled(kernel, hook):
    step = Launch(STEP)
    for _ in range(3):
        step(TENSORS, STREAM)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert kernel.launches == [((12,), ARGUMENTS, options)]
    direct = (12, 1, 1, STREAM, "function", "metadata", None, None, None, *ARGUMENTS)
    assert kernel.compiled.runs == [direct] * 2


def test_each_launch_takes_the_tensors_it_is_given(kernel, hook):
    step, other = Launch(STEP), torch.ones(2)
    step(TENSORS, STREAM)
    step({"query": other}, STREAM)
    assert kernel.compiled.runs[0][9] is other


@pytest.mark.parametrize("calls", [[print], SimpleNamespace(calls=[print])], ids=["3.5", "chain"])
def test_a_profiler_that_listens_gets_the_plain_launch(kernel, hook, calls):
    step = Launch(STEP)
    hook.launch_enter_hook = calls
    for _ in range(2):
        step(TENSORS, STREAM)
    assert len(kernel.launches) == 2
    hook.launch_enter_hook = SimpleNamespace(calls=[])
    step(TENSORS, STREAM)
    assert len(kernel.compiled.runs) == 1


def test_the_hook_is_found_where_triton_keeps_it():
    knobs = pytest.importorskip("triton.knobs")
    assert launcher._runtime() is knobs.runtime
    assert hasattr(knobs.runtime, "launch_enter_hook")


def test_without_a_stream_every_launch_is_plain(kernel):
    step = Launch(STEP)
    for _ in range(2):
        step(TENSORS, None)
    assert len(kernel.launches) == 2
    assert not kernel.compiled.runs


def test_a_run_makes_new_buffers_each_time(kernel):
    plan = Plan((STEP,), {"out": Buffer((2, 3), torch.float16)}, {})
    run, outs = Run(plan), []
    for _ in range(2):
        tensors = dict(TENSORS)
        run(tensors, torch.device("cpu"))
        outs.append(tensors["out"])
    assert outs[0].shape == (2, 3)
    assert outs[0].dtype == torch.float16
    assert outs[0].data_ptr() != outs[1].data_ptr()
    assert len(kernel.launches) == 2


def test_a_device_that_is_no_gpu_is_taken_for_the_interpreter():
    assert gpu_of(torch.device("cpu")).arch == "interpreter"
