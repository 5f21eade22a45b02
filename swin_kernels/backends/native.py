"""The compiled objects: loaded once, with the reason kept when one is missing or fails to load."""

from __future__ import annotations

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swin_kernels.backends.base import (
    Backend,
    Needed,
    Ops,
    Saved,
    asked_while_tracing,
    tf32_allowed,
    too_old,
)
from swin_kernels.problem import DIFFERENTIABLE, Operands, Options, Problem, needs_of

_PACKAGE = Path(__file__).resolve().parent.parent
_ATTENTION = ("window_attention_forward", "window_attention_backward")


@dataclass(frozen=True)
class LoadedObject:
    """A shared object of ops, or why there is none."""

    name: str
    path: Path | None
    error: str | None


def _load(name: str, device: str, *operations: str) -> LoadedObject:
    """The object of this name, with kernels for this kind of device of these operations."""
    candidates = sorted(_PACKAGE.glob(f"{name}.abi3*")) + sorted(
        _PACKAGE.glob(f"{name}*{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}")
    )
    if not candidates:
        mend = "run `python setup.py build_ext --inplace` or install the package"
        return LoadedObject(name, None, f"{name} is not built: {mend}")
    return LoadedObject(name, candidates[0], _why_not_loaded(candidates[0], device, operations))


def _why_not_loaded(path: Path, device: str, operations: tuple[str, ...]) -> str | None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = f" / {error.__cause__}" if error.__cause__ else ""
        return f"{path.name} did not load: {error}{cause}"
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for operation in operations:
        found = f"swin_kernels::{operation}"
        known = hasattr(torch.ops.swin_kernels, operation) and has_kernel(found, device)
        if known and operation in _ATTENTION:  # sources may have had other arguments
            schema = getattr(torch.ops.swin_kernels, operation).default._schema
            known = "allow_tf32" in {x.name for x in schema.arguments}
        if not known:
            return f"{path.name} lacks {found}: build it again"
    return None


CPU_OBJECT = _load("_C_cpu", "CPU", *_ATTENTION, "cpu_capability")
CUDA_OBJECT = _load("_C_cuda", "CUDA", *_ATTENTION, "cuda_has_code_for")


def cpu_capability() -> str:
    """The vector code in use: avx512, avx2 or default; ATEN_CPU_CAPABILITY lowers it."""
    if CPU_OBJECT.error is not None:
        return "none"
    return torch.ops.swin_kernels.cpu_capability()


@functools.cache
def _native_ops() -> Ops:
    """The ops that the objects share: _C_cpu defines them, each has kernels for its device."""
    forward, backward = (f"swin_kernels::{name}" for name in _ATTENTION)
    return Ops.named(forward, backward)


class _NativeBackend(Backend[Problem, Operands, Options]):
    """The ops of a compiled object."""

    def why_not(self, problem: Problem) -> str | None:
        if self.ops is None:
            return CPU_OBJECT.error or CUDA_OBJECT.error  # the former defines the ops
        if problem.device.type not in self.device_types:
            return f"runs on {self.name.upper()} tensors, got {problem.device}"
        return _why_not_on(problem.device) if problem.device.type == "cuda" else None

    def _allow_tf32(self, query: Tensor) -> bool:
        return False

    def forward(
        self, operands: Operands, options: Options, differentiable: bool
    ) -> tuple[Tensor, Saved]:
        assert self.ops is not None
        tf32 = self._allow_tf32(operands.query)
        return self.ops.forward(*operands, *options, tf32), ()

    def backward(
        self, grad_out: Tensor, operands: Operands, options: Options, saved: Saved, needed: Needed
    ) -> tuple[Tensor | None, ...]:
        assert self.ops is not None
        tf32, needs = self._allow_tf32(operands.query), needs_of(needed)
        grads = self.ops.backward(grad_out, *operands, *options, tf32, needs)
        return Operands(**dict(zip(DIFFERENTIABLE, grads)))


class CpuBackend(_NativeBackend):
    """The fused C++ kernels for CPU tensors."""

    name = "cpu"
    device_types = ("cpu",)
    ops = _native_ops() if CPU_OBJECT.error is None else None


class CudaBackend(_NativeBackend):
    """The CUDA C++ kernels: where there is no Triton, and in programs without Python."""

    name = "cuda"
    device_types = ("cuda",)
    ops = _native_ops() if CPU_OBJECT.error is None and CUDA_OBJECT.error is None else None

    def _allow_tf32(self, query: Tensor) -> bool:
        return query.dtype == torch.float32 and tf32_allowed()


@asked_while_tracing
def _why_not_on(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "is built for NVIDIA GPUs, this torch is for AMD's"
    if reason := too_old(device):
        return reason
    return _lacks_code_for(device)


@functools.cache
def _lacks_code_for(device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.ops.swin_kernels.cuda_has_code_for(index):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"_C_cuda has no code for it: build with TORCH_CUDA_ARCH_LIST={major}.{minor}"
