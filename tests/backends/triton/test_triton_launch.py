"""The light launcher: Triton's own launch once, then straight to what it compiled."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, Mock, call

import pytest
import torch

from swin_kernels.backends.triton import launcher
from swin_kernels.backends.triton.kernel_args import Geometry, Meta, arguments_of
from swin_kernels.backends.triton.launch_spec import Config, LaunchSpec, Plan
from swin_kernels.backends.triton.launcher import Run, gpu_of

STREAM = 7


ARG_NAMES = ("x_ptr", "y_ptr", "sizes", "scale", "BLOCK")


@pytest.fixture
def compiled():
    """As Triton's CompiledKernel."""
    return Mock(function="function", packed_metadata="metadata")


@pytest.fixture
def kernel(compiled, monkeypatch):
    """As Triton's JITFunction, which is indexed by a grid and then called."""
    kernel = MagicMock(arg_names=ARG_NAMES)
    kernel.__getitem__.return_value.return_value = compiled
    monkeypatch.setattr(launcher, "kernel_of", lambda step: kernel)
    return kernel


@pytest.fixture
def hook(monkeypatch):
    """Triton's knobs of a profiler, without Triton."""
    knobs = SimpleNamespace(
        runtime=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None),
        compilation=SimpleNamespace(instrumentation_mode=""),
    )
    monkeypatch.setattr(launcher, "_knobs", lambda: knobs)
    return knobs


SPEC = LaunchSpec(
    "fwd.kernel",
    12,
    {"x_ptr": "query", "y_ptr": None, "z_ptr": "not asked for"},
    {"BLOCK": 64, "sizes": (1, 2), "scale": 0.5, "more": 3},
    Config(64, 64, 4, 2),
)
QUERY = torch.zeros(1)
ARGUMENTS = (QUERY, None, (1, 2), 0.5, 64)
CPU = torch.device("cpu")


def run_of(buffers=None):
    return Run(Plan((SPEC,), buffers or {}, {}), ("query",), CPU)


@pytest.fixture
def stream(monkeypatch):
    """The CPU is taken for a device with a stream."""
    monkeypatch.setattr(launcher, "current_stream", lambda device: STREAM)


def test_arguments_come_in_the_order_of_the_kernel():
    names = dict(zip(ARG_NAMES, ("query", None, (1, 2), 0.5, 64)))
    assert list(arguments_of(SPEC, ARG_NAMES).items()) == list(names.items())


def test_geometry_and_constants_of_a_kernel_come_as_one_argument_each():
    scalars = dict.fromkeys((*Geometry._fields, *Meta._fields)) | {"sizes": (1, 2), "TOKENS": 49}
    spec = LaunchSpec("fwd.kernel", 1, {}, scalars, Config(64, 64, 4, 2))
    found = arguments_of(spec, ("geometry", "META"))
    assert found["geometry"].sizes == (1, 2)
    assert (found["META"].TOKENS, found["META"].COSINE) == (49, None)
    del scalars["COSINE"]
    with pytest.raises(KeyError, match="COSINE"):  # never taken for a flag that is off
        arguments_of(spec, ("META",))


def test_first_launch_compiles_and_later_ones_run_what_it_compiled(kernel, compiled, hook, stream):
    run = run_of()
    for _ in range(3):
        run((QUERY,))
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    kernel.__getitem__.assert_called_once_with((12,))
    kernel[(12,)].assert_called_once_with(*ARGUMENTS, **options)
    direct = call(12, 1, 1, STREAM, "function", "metadata", None, None, None, *ARGUMENTS)
    assert compiled.run.call_args_list == [direct] * 2


def test_each_launch_takes_the_tensors_it_is_given(kernel, compiled, hook, stream):
    run, other = run_of(), torch.ones(2)
    run((QUERY,))
    run((other,))
    assert compiled.run.call_args.args[9] is other


LISTENING, SILENT = SimpleNamespace(calls=[print]), SimpleNamespace(calls=[])


@pytest.mark.parametrize(
    "part, name, on, off",
    [
        ("runtime", "launch_enter_hook", LISTENING, SILENT),
        ("runtime", "launch_exit_hook", LISTENING, SILENT),
        ("compilation", "instrumentation_mode", "proton", ""),
    ],
)
@pytest.mark.parametrize("before", [0, 1], ids=["from the start", "after the first launch"])
def test_a_profiler_gets_the_plain_launch_and_leaves_no_code_of_its_own(
    kernel, compiled, hook, stream, part, name, on, off, before
):
    run = run_of()
    for _ in range(before):
        run((QUERY,))
    setattr(getattr(hook, part), name, on)
    watched = kernel.__getitem__.return_value.return_value = Mock()  # as a profiler compiles it
    for _ in range(2):
        run((QUERY,))
    assert kernel.__getitem__.call_count == before + 2
    kernel.__getitem__.return_value.return_value = compiled
    setattr(getattr(hook, part), name, off)
    for _ in range(2):
        run((QUERY,))
    assert compiled.run.call_count == 1 + before
    assert not watched.run.called


def test_the_hooks_are_found_where_triton_keeps_them():
    knobs = pytest.importorskip("triton.knobs")
    assert launcher._knobs() is knobs
    assert hasattr(knobs.runtime, "launch_enter_hook")
    assert hasattr(knobs.runtime, "launch_exit_hook")
    assert knobs.compilation.instrumentation_mode == ""


def test_without_a_stream_every_launch_is_plain(kernel, compiled, hook):
    run = run_of()
    for _ in range(2):
        run((QUERY,))
    assert kernel.__getitem__.call_count == 2
    assert not compiled.run.called


def test_a_run_makes_new_buffers_each_time(kernel, hook):
    run = run_of({"out": ((2, 3), torch.float16)})
    outs = [run((QUERY,))[0] for _ in range(2)]
    assert outs[0].shape == (2, 3)
    assert outs[0].dtype == torch.float16
    assert outs[0].data_ptr() != outs[1].data_ptr()
    assert kernel.__getitem__.call_count == 2


def test_a_device_that_is_no_gpu_is_taken_for_the_interpreter():
    assert gpu_of(CPU).arch == "interpreter"
