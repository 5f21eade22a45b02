"""Fixtures shared by the tests: the backends that every CPU machine must run."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import Operands, Problem

CPU_BACKENDS = ("cpu", "reference")

# inductor's own key leaves the vector code out: it would run here what it made for another
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"swin_kernels_inductor_{_CAPABILITY}_{torch.__version__}"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """On small problems threads mostly wait for each other; on a busy machine, for seconds."""
    torch.set_num_threads(1)


def _require(name: str) -> None:
    """Fail, rather than skip, where a backend that should be there cannot run."""
    problem = Problem.checked(Operands(torch.zeros(1, 4, 3, 1, 8)), 2)
    if reason := BACKENDS[name].why_not(problem):
        pytest.fail(f"backend {name!r} cannot run: {reason}", pytrace=False)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request, monkeypatch):
    """The name of each CPU backend; the test fails unless a call of it reached that backend."""
    _require(request.param)
    chosen, calls = BACKENDS[request.param], []
    forward = chosen.forward

    def counted(*args):
        calls.append(request.param)
        return forward(*args)

    monkeypatch.setattr(chosen, "forward", counted)
    yield request.param
    assert calls, f"no call reached backend {request.param!r}"


@pytest.fixture(params=CPU_BACKENDS)
def backend_name(request):
    """The name of each CPU backend, where nothing may be wrapped or no call needs to be reached."""
    _require(request.param)
    return request.param


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


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the operation that a patched block makes."""
    from patch_models import recorded_calls  # imports timm, which most tests do without

    return recorded_calls(monkeypatch)


@pytest.fixture
def on_cpu_kernels(cpu_kernels, monkeypatch):
    """`patch` for the compiled kernels; the test fails unless they were reached."""
    from patch_models import patching_for_cpu_kernels

    yield from patching_for_cpu_kernels(monkeypatch)
