"""Fixtures shared by the tests, and which tests each way to run them keeps (support/modes.py)."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch
from modes import (
    BACKEND_FIXTURES,
    CPU,
    CUDA,
    CUDA_CPP,
    EMULATOR,
    INTERPRETER,
    MODE,
    TOO_COSTLY,
    Mode,
)
from tiers import TIERS, all_but_one_dtype, left_out

import swin_kernels
from swin_kernels.backends.triton.backend import INTERPRETED
from swin_kernels.cli.command import inductor_cache
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import Operands, Problem
from swin_kernels.testing import Case
from swin_kernels.testing.timing import counted_backends

_PLANS = Path(swin_kernels.__file__).parent / "backends" / "triton"

# the shapes that an op's fake gives are no part of inductor's key either
_FAKES = zlib.crc32(b"".join(x.read_bytes() for x in sorted(_PLANS.glob("*.py"))))
os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache(f"{_FAKES:x}")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the Triton kernels on a GPU, the tests of a backend and those marked gpu",
    )
    parser.addoption(
        "--backend",
        choices=("triton", "cuda"),
        help="with --device cuda: whose kernels, Triton's (the default) or those of CUDA C++",
    )
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="the CUDA kernels on the host (support/cuda/emulator.h), as under the interpreter",
    )
    parser.addoption("--tier", choices=TIERS, default="all", help="how much: support/tiers.py")


def pytest_configure(config):
    mode = INTERPRETER if INTERPRETED else CPU
    on_gpu = config.getoption("--device") == "cuda"
    if config.getoption("--backend") and not on_gpu:
        raise pytest.UsageError("--backend: chooses what runs on a GPU, so give --device cuda too")
    if config.getoption("--emulate-cuda"):
        if on_gpu or INTERPRETED:
            raise pytest.UsageError(
                "--emulate-cuda: runs by itself, neither with --device cuda nor TRITON_INTERPRET=1"
            )
        from cuda_emulator import emulated_backend

        mode = EMULATOR
        BACKENDS["cuda"] = emulated_backend()
    if on_gpu:
        if INTERPRETED:
            raise pytest.UsageError("--device cuda: TRITON_INTERPRET=1 runs on the CPU; unset it")
        if not torch.cuda.is_available():
            raise pytest.UsageError(
                f"--device cuda: torch {torch.__version__} finds no CUDA device "
                "(torch.cuda.is_available() is False)"
            )
        mode = CUDA_CPP if config.getoption("--backend") == "cuda" else CUDA
        torch.set_default_device("cuda")  # before the tests are imported: some hold tensors
    config.stash[MODE] = mode
    hypothesis.settings.register_profile(mode.name, max_examples=mode.examples)
    hypothesis.settings.load_profile(mode.name)  # before the tests are imported, which take it up


def pytest_report_header(config):
    mode = config.stash[MODE]
    if mode is not CPU:
        lacks = "; ".join(sorted(mode.lacks.values()))
        return f"swin_kernels: {mode.name}, backend {mode.fused} alone ({lacks})"
    return None


def pytest_generate_tests(metafunc):
    for name in ("backend", "backend_name"):
        if name in metafunc.fixturenames:
            backends = metafunc.config.stash[MODE].backends
            metafunc.parametrize(name, backends, indirect=True)


def _deselected(item, mode: Mode) -> str | None:
    """Why a mode that runs the Triton kernels leaves a test out."""
    if any(item.get_closest_marker(mark) for mark in mode.marks):
        return None
    if not BACKEND_FIXTURES & set(item.fixturenames):
        return "tests no backend"
    if item.get_closest_marker("float64") and torch.float64 in mode.lacks:
        return mode.lacks[torch.float64]
    for mark, (modes, reason) in TOO_COSTLY.items():
        if mode in modes and item.get_closest_marker(mark):
            return reason
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    dtypes = [p.dtype if isinstance(p, Case) else p for p in parameters]
    return next((why for dtype, why in mode.lacks.items() if dtype in dtypes), None)


def pytest_collection_modifyitems(config, items):
    mode = config.stash[MODE]
    elsewhere = {
        "gpu": "needs a GPU: pytest --device cuda",
        "interpreted": "needs TRITON_INTERPRET=1 in the environment",
        "gpu_dry_run": "needs TRITON_INTERPRET=1 in the environment, or --emulate-cuda",
    }
    for item in items:
        for mark, reason in elsewhere.items():
            if mark not in mode.marks and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
    kept = [item for item in items if mode is CPU or not _deselected(item, mode)]
    of_a_backend = [
        item.nodeid
        for item in kept
        if BACKEND_FIXTURES & set(item.fixturenames)
        and not (mode is CPU and item.get_closest_marker("every_dtype"))
    ]
    tier, slow_kernels = config.getoption("--tier"), mode in (INTERPRETER, EMULATOR)
    beyond = left_out(tier, kept, all_but_one_dtype(of_a_backend), slow_kernels)
    if mode is INTERPRETER:  # fp16 takes the path of fp32 there, with operands rounded
        beyond |= all_but_one_dtype(of_a_backend)
    kept = [item for item in kept if item.nodeid not in beyond]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """On small problems threads mostly wait for each other; on a busy machine, for seconds."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _watched_launches():
    """Interpreted kernels stay within their tensors, and find NaN in what nobody wrote."""
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            from triton_interpreter import fast_interpreter
            from triton_memory import guarded_launches, poisoned_buffers

            stack.enter_context(fast_interpreter())
            stack.enter_context(guarded_launches())
            stack.enter_context(poisoned_buffers())
        yield


@pytest.fixture
def fresh_dynamo():
    """No graphs of other tests, before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _require(name: str) -> None:
    """Fail, rather than skip, where a backend that should be there cannot run."""
    problem = Problem.checked(Operands(torch.zeros(1, 4, 3, 1, 8)), 2)
    if reason := BACKENDS[name].why_not(problem):
        pytest.fail(f"backend {name!r} cannot run: {reason}", pytrace=False)


@pytest.fixture
def backend(request):
    """The name of each backend of the mode; the test fails unless a call reached that backend."""
    _require(request.param)
    with counted_backends() as calls:
        yield request.param
    assert calls[request.param], f"no call reached backend {request.param!r}"


@pytest.fixture
def backend_name(request):
    """The name of each backend of the mode, where nothing is wrapped or no call need be reached."""
    _require(request.param)
    return request.param


@pytest.fixture
def mode(request):
    """What this session of tests runs on."""
    return request.config.stash[MODE]


@pytest.fixture
def fused(mode):
    """The name of the mode's backend of fused kernels."""
    _require(mode.fused)
    return mode.fused


@pytest.fixture
def cpu_kernels():
    """Fails where the compiled CPU object is missing."""
    _require("cpu")


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
