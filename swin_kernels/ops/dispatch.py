"""Which backend runs a problem: the first that can, or every reason why none does."""

from __future__ import annotations

import logging
import os

from swin_kernels.attention_sublayer_problem import AttentionSublayerProblem
from swin_kernels.backends import native
from swin_kernels.backends.base import Backend, asked_while_tracing
from swin_kernels.backends.reference.backend import ReferenceBackend
from swin_kernels.backends.sublayers import (
    AbsentSublayer,
    CpuAttentionSublayer,
    CpuMlp,
    attention_sublayer_reference,
    mlp_reference,
)
from swin_kernels.backends.triton.backend import TritonBackend
from swin_kernels.mlp_problem import MlpProblem
from swin_kernels.problem import Problem

AnyProblem = Problem | MlpProblem | AttentionSublayerProblem

_log = logging.getLogger("swin_kernels")
_already_logged: set[str] = set()

# read once: an environment look-up costs as much as an op call
DEFAULT_BACKEND = os.environ.get("SWIN_KERNELS_BACKEND") or None


Backends = dict[str, Backend]  # by name; the first that can, wins

REFERENCE = ReferenceBackend()
BACKENDS: Backends = {
    b.name: b for b in (native.CpuBackend(), TritonBackend(), native.CudaBackend(), REFERENCE)
}


def _sublayer(operation: str, cpu: Backend, reference: Backend) -> Backends:
    absent = [AbsentSublayer(name, operation) for name in ("triton", "cuda")]
    return {b.name: b for b in (cpu, *absent, reference)}


MLP_BACKENDS = _sublayer("mlp_sublayer", CpuMlp(), mlp_reference())
ATTENTION_SUBLAYER_BACKENDS = _sublayer(
    "window_attention_sublayer", CpuAttentionSublayer(), attention_sublayer_reference()
)


def backends_for(problem: AnyProblem) -> Backends:
    """The backends of the operation that `problem` is a call of."""
    if isinstance(problem, Problem):
        return BACKENDS
    return MLP_BACKENDS if isinstance(problem, MlpProblem) else ATTENTION_SUBLAYER_BACKENDS


def reasons_against(problem: AnyProblem) -> dict[str, str | None]:
    """Why each backend cannot run `problem`, None where it can, in order of preference."""
    return {name: backend.why_not(problem) for name, backend in backends_for(problem).items()}


def _listed(reasons: dict[str, str | None]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items() if reason)


def check_name(name: str, backends: Backends = BACKENDS) -> Backend:
    """The backend of that name; ValueError if there is none."""
    if not isinstance(name, str) or name not in backends:
        raise ValueError(f"backend: expected one of {', '.join(backends)} or None, got {name!r}")
    return backends[name]


def choose(problem: AnyProblem, name: str | None = None) -> Backend:
    """The backend called `name`, or the first that can run `problem`.

    Raises NotImplementedError, with the reason, if the one asked for by name (here, or in the
    environment variable SWIN_KERNELS_BACKEND) cannot; there is no fallback from a name. Without a
    name the choice of `reference` is logged once, with what kept the others from running.
    """
    if name is None:
        name = DEFAULT_BACKEND
    if name is not None:
        backend = check_name(name, backends_for(problem))
        if (reason := backend.why_not(problem)) is not None:
            raise NotImplementedError(f"backend {name!r} cannot run {problem}:\n  {name}: {reason}")
        return backend
    reasons: dict[str, str | None] = {}
    for backend in backends_for(problem).values():
        reason = backend.why_not(problem) or backend.why_not_unasked(problem)
        if reason is None:
            break
        reasons[backend.name] = reason
    else:
        raise NotImplementedError(f"no backend for {problem}:\n{_listed(reasons)}")
    if backend.name == "reference":
        listed = _listed(reasons)
        message = f"using the reference backend, which fuses nothing:\n{listed}"
        log_once(message, message)
    return backend


@asked_while_tracing
def log_once(key: str, message: str) -> None:
    """A warning in the log `swin_kernels`, unless there was one of this key."""
    if key not in _already_logged:
        _already_logged.add(key)
        _log.warning(message)
