"""The compiled objects: loaded once, with the reason kept when one is missing or fails to load."""

from __future__ import annotations

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_kernels.backends import flops
from swin_kernels.backends.gpu import tf32_allowed, too_old
from swin_kernels.backends.tracing import asked_while_tracing, backward_of, forward_of
from swin_kernels.problem import Operands, Options, Problem

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadedObject:
    """A shared object of ops, or why there is none."""

    name: str
    path: Path | None
    error: str | None


def _load(name: str, *operations: str) -> LoadedObject:
    """The object of this name, with these of its operations."""
    candidates = sorted(_PACKAGE.glob(f"{name}.abi3*")) + sorted(
        _PACKAGE.glob(f"{name}*{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}")
    )
    if not candidates:
        mend = "run `python setup.py build_ext --inplace` or install the package"
        return LoadedObject(name, None, f"{name} is not built: {mend}")
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        cause = f" / {error.__cause__}" if error.__cause__ else ""
        return LoadedObject(
            name, candidates[0], f"{candidates[0].name} did not load: {error}{cause}"
        )
    for operation in operations:
        if not hasattr(torch.ops.swin_kernels, operation):
            reason = f"{candidates[0].name} lacks swin_kernels::{operation}: build it again"
            return LoadedObject(name, candidates[0], reason)
    return LoadedObject(name, candidates[0], None)


CPU_OBJECT = _load(
    "_C_cpu", "window_attention_forward", "window_attention_backward", "cpu_capability"
)
CUDA_OBJECT = _load("_C_cuda", "cuda_forward", "cuda_backward", "cuda_has_code_for")


def cpu_capability() -> str:
    """The vector code in use: avx512, avx2 or default; ATEN_CPU_CAPABILITY lowers it."""
    if CPU_OBJECT.error is not None:
        return "none"
    return torch.ops.swin_kernels.cpu_capability()


# bits of the backward ops' `needs`: the gradients that cost extra work
NEEDS = {"bias": 1, "bias_table": 2, "pad_key": 4, "pad_value": 8, "logit_scale": 16}


def _forward_fake(*args) -> Tensor:
    query, _, value = Operands(*args[:11]).unpacked()
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _backward_fake(grad_out, *args) -> tuple[Tensor, ...]:
    operands, needs = Operands(*args[:11]), args[-1]
    # each gradient that is absent is a tensor of its own: outputs of an op never alias
    tokens = [grad_out.new_empty(0 if x is None else x.shape) for x in operands[:3]]
    extras = []
    for name, bit in NEEDS.items():
        x = getattr(operands, name)
        wanted = x is not None and needs & bit
        extras.append(x.new_empty(x.shape) if wanted else grad_out.new_empty(0))
    return (*tokens, *extras)


@dataclass(frozen=True)
class Ops:
    """The forward and the backward op of an object."""

    forward: Any
    backward: Any

    @classmethod
    def named(cls, forward: str, backward: str) -> Ops:
        """Those of these qualified names, after their object was loaded; traced from now on."""
        found = []
        for qualified, fake in ((forward, _forward_fake), (backward, _backward_fake)):
            torch.library.register_fake(qualified, fake)
            namespace, name = qualified.split("::")
            found.append(getattr(getattr(torch.ops, namespace), name).default)
        ops = cls(*found)
        flops.count(ops.forward, ops.backward, before_operands=1)
        return ops


class _NativeBackend:
    """The ops of a compiled object."""

    ops: Ops | None

    def _extra_arguments(self, query: Tensor) -> tuple:
        """What the ops take between options and `needs`."""
        return ()

    def forward(
        self, operands: Operands, options: Options, differentiable: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert self.ops is not None
        extra = self._extra_arguments(operands.query)
        return forward_of(self.ops.forward, *operands, *options, *extra), ()

    def backward(
        self,
        grad_out: Tensor,
        operands: Operands,
        options: Options,
        saved: tuple[Tensor, ...],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        assert self.ops is not None
        needs = sum(bit for name, bit in NEEDS.items() if needed[Operands._fields.index(name)])
        extra = self._extra_arguments(operands.query)
        d_query, d_key, d_value, *extras = backward_of(
            self.ops.backward, grad_out, *operands, *options, *extra, needs
        )
        grads: dict[str, Tensor | None] = {
            name: grad if needs & bit else None for (name, bit), grad in zip(NEEDS.items(), extras)
        }
        packed = operands.key is None
        return Operands(d_query, None if packed else d_key, None if packed else d_value, **grads)


class CpuBackend(_NativeBackend):
    """The fused C++ kernels for CPU tensors."""

    name = "cpu"
    ops = (
        Ops.named(
            "swin_kernels::window_attention_forward", "swin_kernels::window_attention_backward"
        )
        if CPU_OBJECT.error is None
        else None
    )

    def why_not(self, problem: Problem) -> str | None:
        if CPU_OBJECT.error is not None:
            return CPU_OBJECT.error
        if problem.device.type != "cpu":
            return f"runs on CPU tensors, got {problem.device}"
        return None


class CudaBackend(_NativeBackend):
    """The CUDA C++ kernels: where there is no Triton, and in programs without Python."""

    name = "cuda"
    device_type = "cuda"
    ops = (
        Ops.named("swin_kernels::cuda_forward", "swin_kernels::cuda_backward")
        if CUDA_OBJECT.error is None
        else None
    )

    def _extra_arguments(self, query: Tensor) -> tuple:
        return (query.dtype == torch.float32 and tf32_allowed(),)

    def why_not(self, problem: Problem) -> str | None:
        if self.ops is None:
            return CUDA_OBJECT.error
        if problem.device.type != self.device_type:
            return f"runs on CUDA tensors, got {problem.device}"
        if self.device_type == "cuda":
            return _why_not_on(problem.device)
        return None


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
