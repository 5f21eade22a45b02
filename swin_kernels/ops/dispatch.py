"""Which backend runs a problem: the first that can, or every reason why none does."""

from __future__ import annotations

import logging
import os

from swin_kernels.backends import native
from swin_kernels.backends.base import Backend, asked_while_tracing
from swin_kernels.backends.reference.backend import ReferenceBackend
from swin_kernels.backends.triton.backend import TritonBackend
from swin_kernels.problem import Problem

_log = logging.getLogger("swin_kernels")
_already_logged: set[str] = set()

# read once: an environment look-up costs as much as an op call
DEFAULT_BACKEND = os.environ.get("SWIN_KERNELS_BACKEND") or None


REFERENCE = ReferenceBackend()
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (native.CpuBackend(), TritonBackend(), native.CudaBackend(), REFERENCE)
}  # the first that can, wins


def reasons_against(problem: Problem) -> dict[str, str | None]:
    """Why each backend cannot run `problem`, None where it can, in order of preference."""
    return {name: backend.why_not(problem) for name, backend in BACKENDS.items()}


def _listed(reasons: dict[str, str | None]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items() if reason)


def check_name(name: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return BACKENDS[name]


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The backend called `name`, or the first that can run `problem`.

    Raises NotImplementedError, with the reason, if the one asked for by name (here, or in the
    environment variable SWIN_KERNELS_BACKEND) cannot; there is no fallback from a name. Without a
    name the choice of `reference` is logged once, with what kept the others from running.
    """
    if name is None:
        name = DEFAULT_BACKEND
    if name is not None:
        backend = check_name(name)
        if (reason := backend.why_not(problem)) is not None:
            raise NotImplementedError(f"backend {name!r} cannot run {problem}:\n  {name}: {reason}")
        return backend
    for backend in BACKENDS.values():
        if backend.why_not(problem) is None:
            break
    else:
        raise NotImplementedError(f"no backend for {problem}:\n{_listed(reasons_against(problem))}")
    if backend is REFERENCE:
        reasons = _listed(reasons_against(problem))
        message = f"using the reference backend, which fuses nothing:\n{reasons}"
        log_once(message, message)
    return backend


@asked_while_tracing
def log_once(key: str, message: str) -> None:
    """A warning in the log `swin_kernels`, unless there was one of this key."""
    if key not in _already_logged:
        _already_logged.add(key)
        _log.warning(message)
