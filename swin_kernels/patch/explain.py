"""explain: what would run, and why nothing else does; in words."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
from typing import Any

import torch
from torch import Tensor, nn

from swin_kernels.attention_sublayer_problem import AttentionSublayerProblem
from swin_kernels.backends import native
from swin_kernels.mlp_problem import MlpProblem
from swin_kernels.ops.attention import (
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
)
from swin_kernels.ops.dispatch import (
    BACKENDS,
    DEFAULT_BACKEND,
    AnyProblem,
    backends_for,
    check_name,
    reasons_against,
)
from swin_kernels.patch.core import STOCK_CLASSES, grouped, report_on, survey
from swin_kernels.problem import Operands, Problem
from swin_kernels.version import __version__


def explain(*args: Any, **options: Any) -> str:
    """What would run and why nothing else does, as text for a person; nothing is computed or
    changed.

    - `explain()`: versions, the backends, whether the compiled objects loaded and if not why, the
      vector code in use.
    - `explain(model)`: what `patch(model)` would do with each block; for blocks already patched,
      what they do now.
    - `explain(query, key, value, window_size, …)` and `explain(qkv, window_size, …)`, the arguments
      of the public functions: which backend would run the call and the reason of each one that
      cannot.
    - `explain(problem)`: the same for a `swin_kernels.problem.Problem`, for a
      `swin_kernels.mlp_problem.MlpProblem` or for an
      `AttentionSublayerProblem` of `swin_kernels.attention_sublayer_problem`.

    Raises:
        ValueError: arguments that the operation itself refuses, or a subject that is none of these.
    """
    if not args and not options:
        return _environment()
    subject = args[0] if args else None
    if isinstance(subject, nn.Module):
        return _model(subject, *args[1:], **options)
    if isinstance(subject, (Problem, MlpProblem, AttentionSublayerProblem)):
        return _problem(subject, *args[1:], **options)
    if isinstance(subject, Tensor) or "query" in options or "qkv" in options:
        return _call(*args, **options)
    raise ValueError(
        "explain: expected nothing, a torch.nn.Module, a Problem, or the arguments of "
        f"shifted_window_attention, got {type(subject).__name__}"
    )


def _environment() -> str:
    lines = [
        f"swin_kernels {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"default backend (SWIN_KERNELS_BACKEND): {DEFAULT_BACKEND or 'the first that can'}",
        f"backends, in order of preference: {', '.join(BACKENDS)}",
    ]
    for loaded in (native.CPU_OBJECT, native.CUDA_OBJECT):
        state = (
            f"loaded from {loaded.path}" if loaded.error is None else f"not loaded: {loaded.error}"
        )
        lines.append(f"compiled object {loaded.name}: {state}")
    lines.append(f"vector code in use (ATEN_CPU_CAPABILITY lowers it): {native.cpu_capability()}")
    try:
        version = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    classes = ", ".join(name.rpartition(".")[2] for name in STOCK_CLASSES)
    lines += ["models that patch knows:", f"  timm ({version}): {classes}"]
    return "\n".join(lines)


def _model(model: nn.Module) -> str:
    try:
        found = survey(model)
    except ValueError as error:
        return f"patch would raise ValueError: {error}"
    name, report = type(model).__name__, report_on(found)
    fused = sum(f.reason is None for f in found)
    lines = [f"{name}: {fused} of {len(found)} blocks of window attention run fused once patched"]
    lines += [f"  {told}" for told in report.of_halves()]
    lines += grouped("would be replaced", dict.fromkeys(report.replaced, ""))
    lines += grouped("would be left", report.left)
    patched = [f for f in found if f.patched]
    backends = {f.name: f.block._swin_kernels.backend or "chosen per call" for f in patched}
    lines += grouped("patched", {name: f"backend {backend}" for name, backend in backends.items()})
    stock = {f.name: f.reason for f in patched if f.reason}
    lines += grouped("patched, on the stock path for now", stock)
    for half, left in report.halves_left.items():
        lines += grouped(f"{half} half not whole", left)
    lines += grouped("note", report.notes)
    return "\n".join(lines)


def _problem(problem: AnyProblem, backend: str | None = None) -> str:
    reasons, backends = reasons_against(problem), backends_for(problem)
    name = backend or DEFAULT_BACKEND
    if name is not None:
        check_name(name, backends)
    unasked = {n: b.why_not_unasked(problem) for n, b in backends.items() if reasons[n] is None}
    chosen = name or next((n for n, reason in unasked.items() if reason is None), None)
    if chosen is None:
        verdict = "nothing runs it"
    elif reasons[chosen] is None:
        verdict = f"{chosen} would run it" + ("" if name is None else ", as asked for")
    else:
        verdict = f"{name} was asked for and cannot: it would raise"
    lines = [f"{problem}: {verdict}"]
    for other, reason in reasons.items():
        state = reason or (
            "runs it" if other == chosen else f"could, when asked for as backend={other!r}"
        )
        if other != chosen and unasked.get(other):
            state += f": {unasked[other]}"
        lines.append(f"  {other}: {state}")
    return "\n".join(lines)


def _call(*args: Any, **options: Any) -> str:
    packed = "key" not in options and not (len(args) > 1 and isinstance(args[1], Tensor))
    function = shifted_window_attention_qkvpacked if packed else shifted_window_attention
    given = inspect.signature(function).bind(*args, **options).arguments
    backend = given.pop("backend", None)
    if "qkv" in given:
        given["query"] = given.pop("qkv")
    operands = Operands(**{name: given.pop(name) for name in Operands._fields if name in given})
    return _problem(Problem.checked(operands, **given), backend)
