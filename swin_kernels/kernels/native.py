"""The compiled objects: loaded once, with the reason kept when one is missing or fails to load."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swin_kernels.problem import Operands, Options, Problem

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LoadedObject:
    """A shared object of ops, or why there is none."""

    name: str
    path: Path | None
    error: str | None


def _load(name: str) -> LoadedObject:
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
    return LoadedObject(name, candidates[0], None)


CPU_OBJECT = _load("_C_cpu")


def cpu_capability() -> str:
    """The vector code in use: avx512, avx2 or default; ATEN_CPU_CAPABILITY lowers it."""
    if CPU_OBJECT.error is not None:
        return "none"
    return torch.ops.swin_kernels.cpu_capability()


# bits of the backward op's `needs`: the gradients that cost extra work
NEEDS = {"bias": 1, "bias_table": 2, "pad_key": 4, "pad_value": 8, "logit_scale": 16}


if CPU_OBJECT.error is None:
    FORWARD = torch.ops.swin_kernels.window_attention_forward.default
    BACKWARD = torch.ops.swin_kernels.window_attention_backward.default

    @torch.library.register_fake("swin_kernels::window_attention_forward")
    def _forward_fake(*args) -> Tensor:
        query, _, value = Operands(*args[:11]).unpacked()
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    @torch.library.register_fake("swin_kernels::window_attention_backward")
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


class CpuBackend:
    """The fused C++ kernels for CPU tensors."""

    name = "cpu"

    def why_not(self, problem: Problem) -> str | None:
        if CPU_OBJECT.error is not None:
            return CPU_OBJECT.error
        if problem.device.type != "cpu":
            return f"runs on CPU tensors, got {problem.device}"
        return None

    def forward(
        self, operands: Operands, options: Options, differentiable: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return FORWARD(*operands, *options), ()

    def backward(
        self,
        grad_out: Tensor,
        operands: Operands,
        options: Options,
        saved: tuple[Tensor, ...],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        needs = sum(bit for name, bit in NEEDS.items() if needed[Operands._fields.index(name)])
        d_query, d_key, d_value, *extras = BACKWARD(grad_out, *operands, *options, needs)
        grads: dict[str, Tensor | None] = {
            name: grad if needs & bit else None for (name, bit), grad in zip(NEEDS.items(), extras)
        }
        packed = operands.key is None
        return Operands(d_query, None if packed else d_key, None if packed else d_value, **grads)
