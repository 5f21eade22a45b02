"""What to launch for a call, and on what: names and numbers, without tensors and without Triton.

So a plan is made once for all calls alike, can be compiled for a GPU that is not there, and is
tested on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.backends.triton.config import Config

LARGEST_INT32 = 2**31 - 1
STRIDED = ("query", "key", "value", "grad_out")  # kernels read these as they lie


class TensorFacts(NamedTuple):
    """What a launch depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # its first element, to 16 bytes


def facts_of(x: Tensor) -> TensorFacts:
    aligned = x.device.type == "meta" or x.data_ptr() % 16 == 0
    return TensorFacts(tuple(x.shape), x.stride(), x.dtype, aligned)


class Buffer(NamedTuple):
    """A tensor that a plan needs besides its operands."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One launch: names for pointers, numbers for the rest; by the names of the kernel's arguments.

    Tensors are named as in `Plan.buffers` and `Operands`.
    """

    kernel: str  # module.function
    grid: int
    pointers: dict[str, str | None]
    numbers: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Plan:
    """Launches, in order, and the tensors they need."""

    steps: tuple[Step, ...]
    buffers: dict[str, Buffer]
    dtypes: dict[str, torch.dtype]  # of every tensor a step names
    # after the steps: sums over these axes of buffers, then the launches that use them
    sums: dict[str, tuple[int, ...]] = field(default_factory=dict)
    after: tuple[Step, ...] = ()
