"""The ways to run the tests, and cases cut to what Triton's interpreter can afford.

By themselves the tests run the CPU backends. With TRITON_INTERPRET=1 in the environment they run
the Triton kernels on CPU tensors, with `--emulate-cuda` the CUDA kernels on CPU tensors, and with
`--device cuda` either kind on a GPU: there only tests of a backend are kept, those with one of
`BACKEND_FIXTURES`, and those marked for that way.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from swin_kernels.backends.triton.backend import INTERPRETED
from swin_kernels.testing import DTYPE_NAMES, Case

BACKEND_FIXTURES = {"backend", "backend_name", "fused"}


@dataclass(frozen=True)
class Mode:
    """What a session of tests runs on."""

    name: str
    backends: tuple[str, ...]
    lacks: dict[torch.dtype, str]  # dtypes that are deselected, and why
    examples: int = 40  # of a property
    marks: tuple[str, ...] = ()  # of the tests that some modes alone run, those that this one runs

    @property
    def fused(self) -> str:
        """The backend of fused kernels."""
        return self.backends[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for dtype in DTYPE_NAMES if dtype not in self.lacks)


_NO_FP64 = {torch.float64: "Triton's kernels have no fp64"}
CPU = Mode("cpu", ("cpu", "reference"), {})
INTERPRETER = Mode(
    "interpreter",
    ("triton",),
    _NO_FP64 | {torch.bfloat16: "Triton's interpreter multiplies bf16 wrongly"},
    4,
    ("interpreted", "gpu_dry_run"),
)
EMULATOR = Mode("emulator", ("cuda",), {}, 20, ("gpu_dry_run",))
CUDA = Mode("cuda", ("triton",), _NO_FP64, marks=("gpu",))
CUDA_CPP = Mode("cuda", ("cuda",), {}, marks=("gpu",))

MODE = pytest.StashKey[Mode]()  # of the session

# where tests marked with these are deselected, and why
TOO_COSTLY = {
    "slow_emulator": (
        (INTERPRETER, EMULATOR),
        "takes minutes there; what it tests, other tests do too",
    ),
    "slow_interpreter": ((INTERPRETER,), "takes a minute there; a case much like it is tested"),
}


def cut(case: Case) -> Case:
    """`case`; under the interpreter at most two windows an axis, the last as full as it was."""
    if not INTERPRETED:
        return case
    return case.but(
        size=tuple(s if s <= 2 * w else 2 * w - -s % w for s, w in zip(case.size, case.window))
    )


def sized(case: Case) -> Case:
    """`case` for `check`; under the interpreter with as many numbers in fewer windows.

    There a window of a head takes 15 to 60 ms, whatever its channels, and `check` repeats a case
    until each gradient has 48 numbers and the output 16384. So: channels, which cost nothing; where
    a gradient has one number a head, heads rather than images and windows.
    """
    if not INTERPRETED:
        return case
    case = cut(case)
    if case.value_dim is not None:
        case = case.but(value_dim=max(10, case.value_dim))
    if case.head_dim == Case.head_dim:  # the default, so not what this case is about
        case = case.but(head_dim=32)
    if not case.cosine:
        return case.but(heads=max(4, case.heads))
    axes = list(zip(case.size, case.window))[1:]  # on these one window, padded where it was
    others = [min(s, w - 1 if s % w and w > 1 else w) for s, w in axes]
    return case.but(batch=1, heads=24, size=(case.size[0], *others))
