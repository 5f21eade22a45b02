"""The problems that benchmarks time: stages of published models, by name."""

from __future__ import annotations

from benchmarks.device import Cpu, Cuda, DryRunDevice
from swin_kernels.testing import Case


def _case(batch: int, size: int | tuple[int, ...], window, shift, heads, head_dim=32, **more):
    size = (size, size) if isinstance(size, int) else size
    window, shift = ((x,) * len(size) if isinstance(x, int) else tuple(x) for x in (window, shift))
    fixed = {"packed": True, "bias": "table", "layout": "contiguous", "dtype": Cuda.dtype}
    return Case(batch, size, window, shift, heads, head_dim, **fixed, **more)


def swin_cases() -> dict[str, Case]:
    """The stages of Swin-T, B and L at 224²; those of S are T's. The important ones first."""
    first_heads = {"T": 3, "B": 4, "L": 6}
    stages = {
        f"{model}{i + 1}": (56 >> i, heads << i)
        for model, heads in first_heads.items()
        for i in range(4)
    }
    cases = {
        f"{name} shift {shift}": _case(128, size, 7, shift, heads)
        for shift in (3, 0)
        for name, (size, heads) in stages.items()
        if size > 7 or not shift
    }
    first = [f"{name} shift 3" for name in ("T1", "B1", "L1")]
    return {name: cases[name] for name in (*first, *(n for n in cases if n not in first))}


def other_cases() -> dict[str, Case]:
    return {
        "V2 w8 stage 1": _case(128, 64, 8, 4, 3, cosine=True),
        "V2 w8 stage 2": _case(128, 32, 8, 4, 6, cosine=True),
        "V2 w16 stage 1": _case(64, 64, 16, 8, 3, cosine=True),
        "V2 w16 stage 2": _case(64, 32, 16, 8, 6, cosine=True),
        "V2 w24 stage 1": _case(32, 96, 24, 12, 4, cosine=True),
        "V2 w24 stage 2": _case(32, 48, 24, 12, 8, cosine=True),
        "3-D (8,7,7)": _case(8, (16, 56, 56), (8, 7, 7), (4, 3, 3), 3),
        "3-D (7,7,7)": _case(8, (14, 56, 56), 7, 3, 3),
        "SwinIR w8 d30": _case(32, 64, 8, 4, 6, 30),
    }


def check_cases() -> dict[str, Case]:
    """Those that a GPU is to have right before anything is timed: one for each set of kernels."""
    cases = swin_cases() | other_cases()
    names = ("T1 shift 3", "T4 shift 0", "V2 w8 stage 1", "V2 w16 stage 1")
    # more tokens than 64: a forward of whole windows by eight warps
    tokens98 = {"98 tokens": _case(128, (4, 14, 14), (2, 7, 7), (1, 3, 3), 3)}
    return {name: cases[name] for name in names} | tokens98


def cpu_cases() -> dict[str, Case]:
    """Swin-T's stages in fp32 at a batch of 8; of those that only one window fits, unshifted."""
    stages = [(56 >> i, 3 << i) for i in range(4)]
    return {
        f"T{i + 1} shift {shift}": _case(8, size, 7, shift, heads).but(dtype=Cpu.dtype)
        for i, (size, heads) in enumerate(stages)
        for shift in (3, 0)
        if size > 7 or not shift
    }


def other_cpu_cases() -> dict[str, Case]:
    """Larger windows, 3-D ones, cosine attention, and channels that no vector divides."""
    cases = {
        "w16": _case(2, 64, 16, 8, 3),
        "3-D (7,7,7)": _case(1, (14, 28, 28), 7, 3, 3),
        "3-D (8,7,7)": _case(1, (16, 28, 28), (8, 7, 7), (4, 3, 3), 3),
        "V2 w8": _case(8, 64, 8, 4, 3, cosine=True),
        "SwinIR w8 d30": _case(4, 64, 8, 4, 6, 30),
    }
    return {name: case.but(dtype=Cpu.dtype) for name, case in cases.items()}


def toy_cases() -> dict[str, Case]:
    """One for each way through the program and its kernels; with images for each draw of a gate."""
    cases = {
        "toy": _case(3, 6, 3, 1, 1, 16),
        "toy unshifted, d30": _case(3, 4, 4, 0, 1, 30),
        "toy tiles": _case(3, 9, 9, 0, 1, 16, cosine=True),
        "toy 3-D": _case(3, (2, 2, 4), (2, 2, 2), (0, 0, 1), 1, 16),
    }
    return {name: case.but(dtype=DryRunDevice.dtype) for name, case in cases.items()}
