"""What the Triton backend refuses, and how it says so."""

from __future__ import annotations

import torch

from swin_kernels.backends.triton import backend
from swin_kernels.backends.triton.backend import MOST_WINDOWS, TritonBackend
from swin_kernels.backends.triton.config import LARGEST_HEAD_DIM
from swin_kernels.problem import Operands, Problem


def _why_not(x, window=4, value=None):
    operands = Operands(x, x, x if value is None else value)
    return TritonBackend().why_not(Problem.checked(operands, window))


def test_reasons_say_what_came(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "INTERPRETED", False)

    def empty(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta")

    assert "no float64" in _why_not(empty(1, 8, 1, 8, dtype=torch.float64))
    most = LARGEST_HEAD_DIM
    assert _why_not(empty(1, 8, 1, most + 1)) == (
        f"takes up to {most} channels a head, got {most + 1} and {most + 1}"
    )
    wide = empty(1, 8, 1, most + 1)
    assert f"channels a head, got 8 and {most + 1}" in _why_not(empty(1, 8, 1, 8), value=wide)
    assert f"got {MOST_WINDOWS + 1}" in _why_not(empty(1, MOST_WINDOWS + 1, 1, 8), 1)
    assert "windows" not in _why_not(empty(1, MOST_WINDOWS, 1, 8), 1)
    assert "split the batch" in _why_not(empty(2**29, 1, 4, 1), 1)
    assert "tokens an axis" in _why_not(empty(1, 2**31 - 8, 1, 1), 64)
    assert "got meta" in _why_not(empty(1, 8, 1, most))
    assert _why_not(torch.empty(1, 8, 1, 8)) == "runs on CUDA tensors, got cpu"
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in _why_not(torch.empty(1, 8, 1, 8))


def test_the_interpreter_refuses_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert "bfloat16" in _why_not(torch.empty(1, 8, 1, 8, dtype=torch.bfloat16))
    assert _why_not(torch.empty(1, 8, 1, 8, dtype=torch.float16)) is None
    assert _why_not(torch.empty(1, 8, 1, 8)) is None
