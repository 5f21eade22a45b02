"""How a problem is laid on a GPU: block sizes, warps and stages, by a pure function of both.

A measured table, `tuned.json`, has the last word: `benchmarks/gpu_tools/tune.py` writes it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).with_name("tuned.json")
LARGEST_HEAD_DIM = 128
SMALLEST_BLOCK = 16  # of the matrix units
LARGEST_BLOCK = 64  # of tiles of a window, but for MOST_QUERIES of a forward
MOST_QUERIES = 128
REGISTERS = 65_536  # of a multiprocessor: CUDA programming guide, table of compute capabilities


@dataclass(frozen=True)
class Gpu:
    """What a configuration depends on of the device."""

    arch: str  # "sm_90", "gfx942"
    shared_memory: int  # bytes that one program may have
    multiprocessors: int
    warp_size: int = 32

    @property
    def multiplies_from_shared(self) -> bool:
        """Products of a warp group read shared memory; those of a warp take their registers."""
        # the interpreter runs what these have, and so most layouts
        return self.arch.startswith(("sm_9", "sm_10", "interpreter"))


# shared memory a program: CUDA programming guide, table of compute capabilities; AMD CDNA 3 guide
KB = 1024
KNOWN_GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_80", 163 * KB, 108),
        Gpu("sm_86", 99 * KB, 84),
        Gpu("sm_89", 99 * KB, 128),
        Gpu("sm_90", 227 * KB, 132),
        Gpu("sm_100", 227 * KB, 148),
        Gpu("sm_120", 99 * KB, 170),
        Gpu("gfx942", 64 * KB, 304, 64),
    )
}
INTERPRETER = Gpu("interpreter", 227 * KB, 2)


@dataclass(frozen=True)
class Shape:
    """What a configuration depends on of the problem."""

    tokens: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    windows: int  # of the batch
    heads: int
    sums_bias: bool = False  # backward: the gradient of the bias is wanted
    cosine: bool = False
    dropout: bool = False
    explicit_mask: bool = False
    fills_padding: bool = False  # with keys or values that are not zeros
    scattered: bool = False  # tokens whose channels are not loaded 16 bytes at a time
    tf32: bool = False  # fp32 whose products the user let be rounded

    @property
    def fp32(self) -> bool:
        return self.dtype == torch.float32

    @property
    def odd(self) -> bool:
        """Channels that no block of the matrix units divides: narrow loads, more offsets."""
        return self.head_dim % 16 != 0 or self.value_dim % 16 != 0

    @property
    def block_d(self) -> int:
        return block_of(self.head_dim)

    @property
    def block_dv(self) -> int:
        return block_of(self.value_dim)

    @property
    def largest_block(self) -> int:
        return max(self.block_d, self.block_dv)


@dataclass(frozen=True)
class Config:
    """One kernel's layout."""

    block_m: int  # queries of a tile; the window, padded for the matrix units, if it is whole
    block_n: int  # keys of a tile
    num_warps: int
    loop_stages: int  # of the software pipeline over windows or tiles
    programs_per_multiprocessor: int = 8  # how many runs of windows to cut, where there are runs
    registers: int = 0  # a thread's limit; 0 leaves it to the assembler, which at times spills

    @property
    def options(self) -> dict[str, Any]:
        """How Triton is to compile the kernel."""
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.loop_stages,
            "enable_fp_fusion": True,  # its default is not the same in every Triton
        }
        if self.registers:  # a limit above what a program of so many warps may have is none
            options["maxnreg"] = min(self.registers, REGISTERS // (32 * self.num_warps))
        return options

    def windows_per_program(self, shape: Shape, gpu: Gpu, tiles: int = 1) -> int:
        """Windows a run, so that the runs of all heads and tiles fill the device."""
        wanted = self.programs_per_multiprocessor * gpu.multiprocessors
        runs = max(1, wanted // (shape.heads * tiles))
        return max(1, -(-shape.windows // runs))


def block_of(length: int) -> int:
    """The power of two that holds `length`, and that the matrix units take."""
    return max(SMALLEST_BLOCK, 1 << (length - 1).bit_length())


def takes_whole_windows(kernel: str, shape: Shape, gpu: Gpu) -> bool:
    """Whether forward or backward holds a window in one tile: where registers allow.

    A backward that does so holds four tiles of tokens and three of logits. Forward and backward
    agree on it without knowing of TF32, which may change between the two, nor, where the backward
    takes whole windows, of strides, which a compiler does not promise.
    """
    adds = shape.explicit_mask or shape.fills_padding
    roomy = gpu.multiplies_from_shared
    if kernel == "forward":
        if shape.tokens <= 64:
            widest = 32 if shape.fp32 else 128
            return shape.largest_block <= widest and not (shape.fp32 and shape.cosine and adds)
        # the bias alone takes 64 registers
        crowded = shape.fp32 or shape.dropout or shape.odd or shape.scattered
        crowded = crowded or shape.explicit_mask or (shape.cosine and shape.fills_padding)
        fits = gpu.arch in ("sm_90", "interpreter") and shape.largest_block <= 32
        return shape.tokens <= 128 and fits and not crowded
    plain = not (shape.cosine or adds or shape.fp32)
    widest = 64 if plain and (roomy or gpu.warp_size == 64) else 32
    crowded = (
        (shape.cosine + shape.explicit_mask + shape.fills_padding > 1)
        or (shape.explicit_mask and (shape.fp32 or not roomy))
        or (shape.fills_padding and gpu.arch.startswith("sm_12"))
        or (shape.head_dim != shape.value_dim and shape.fp32 and gpu.arch.startswith("sm_10"))
    )
    fits = shape.tokens <= 64 and shape.largest_block <= widest
    return fits and not (shape.dropout or shape.odd or crowded)


def _whole_forward(shape: Shape, gpu: Gpu) -> Config:
    block = block_of(shape.tokens)
    warps, stages = block // 16, 1 if shape.fp32 else 2
    adds = shape.explicit_mask or shape.fills_padding
    if (
        shape.fp32
        or shape.dropout
        or (shape.explicit_mask and not gpu.multiplies_from_shared)
        or (shape.largest_block > 64 and (shape.cosine or adds))
    ):
        warps *= 2
    elif gpu.arch.startswith(("sm_10", "sm_12")) and (shape.scattered or shape.odd):
        warps, stages = 2 * warps, 1
    elif gpu.arch.startswith("sm_10") and shape.largest_block <= 64 and not adds:
        stages = 1
    return Config(block, block, warps, stages)


def _narrow_tf32(shape: Shape, gpu: Gpu) -> bool:
    """Whether a whole backward in TF32 takes no more warps than in half precision.

    Twice as many do 60 to 80 % more instructions, and spill as well where operands are registers.
    """
    if not shape.tf32 or shape.scattered or gpu.warp_size != 32:
        return False
    if gpu.arch.startswith("sm_9"):
        return not shape.cosine
    return not (gpu.multiplies_from_shared and (shape.cosine or shape.fills_padding))


def _whole_backward(shape: Shape, gpu: Gpu) -> Config:
    block = block_of(shape.tokens)
    warps = block // 16
    roomy = gpu.multiplies_from_shared
    if shape.fp32:
        hopper = gpu.arch.startswith("sm_9")
        crowded = shape.scattered or shape.fills_padding or (shape.cosine and hopper)
        if crowded and gpu.warp_size == 32 and not shape.tf32:
            warps *= 4
        elif not _narrow_tf32(shape, gpu):
            warps *= 2
        stages = 1
    else:
        older = gpu.arch.startswith("sm_8")
        stages = 2 if roomy or older or shape.cosine or shape.fills_padding else 1
        wide = shape.largest_block > 32
        if shape.explicit_mask or (wide and (shape.head_dim != shape.value_dim or shape.scattered)):
            stages = 1
        elif gpu.arch.startswith("sm_9") and not (wide or shape.scattered):
            stages = 3  # with two a tile is waited for as soon as it is asked for
        if shape.scattered:
            warps *= 2
    return Config(block, block, warps, stages, programs_per_multiprocessor=4)


def _tiled(kernel: str, shape: Shape, gpu: Gpu) -> Config:
    wide, widest = shape.largest_block > 32, shape.largest_block > 64
    adds = shape.explicit_mask or shape.fills_padding
    # two stages of 128 channels and a mask or a pad need more than 100 KB; with both, registers
    full = widest and (
        gpu.shared_memory < 128 * KB or (shape.explicit_mask and shape.fills_padding)
    )
    stages = 1 if shape.fp32 or kernel == "dbias" or full else 2
    if kernel == "tiled_forward" and shape.largest_block == 64 and gpu.arch.startswith("sm_8"):
        stages = 2
    crowded = shape.fp32 or shape.dropout or (shape.cosine and adds)
    if kernel == "tiled_forward" and not shape.fp32:
        block, warps = 64, 8 if crowded or widest else 4
    elif shape.fp32 and wide and kernel != "tiled_forward":
        block, warps = 16 if widest else 32, 4 if shape.tf32 and kernel != "dbias" else 8
    elif crowded or (wide and kernel != "dq"):
        block, warps = 32, 8 if widest else 4
    else:
        block, warps = 64, 8 if wide or kernel == "dbias" else 4
    keys = block
    if kernel == "dbias" and widest and shape.dropout and not shape.fp32:
        block, keys, warps = 16, 32, 8 if shape.cosine else 4
    if block == 64 and not gpu.multiplies_from_shared:
        if kernel == "dbias":
            keys, warps = 32, 4  # a quarter fewer instructions than a square tile
        elif kernel == "dq" and wide:
            keys = 32
    if kernel == "dq" and block == 64 and widest and adds:
        keys = 32
    # Triton 3.6 fails to compile more queries for sm_10x
    if kernel == "dq" and shape.cosine and (widest or gpu.arch.startswith("sm_10")):
        block = min(block, 32)
    if kernel == "dq" and shape.explicit_mask and not gpu.multiplies_from_shared:
        stages = 1
    if shape.scattered and not (shape.odd or shape.fp32):
        warps = max(warps, 8)
    plain = not (crowded or adds or wide or shape.odd or shape.scattered)
    if kernel == "tiled_forward" and plain and gpu.arch.startswith(("sm_9", "interpreter")):
        # a fifth fewer instructions, as keys are prepared half as often, if little more is padded
        tiles = -(-shape.tokens // block)
        block = MOST_QUERIES if tiles % 2 == 0 or tiles > 4 else block
    largest = block_of(shape.tokens)
    return Config(min(block, largest), min(keys, largest), warps, stages)


def _registers(kernel: str, shape: Shape, gpu: Gpu) -> int:
    """A limit where the assembler, left alone, spills a few registers to fit one program more."""
    return (
        _registers_fp32(kernel, shape, gpu) if shape.fp32 else _registers_half(kernel, shape, gpu)
    )


def _registers_fp32(kernel: str, shape: Shape, gpu: Gpu) -> int:
    older, consumer = gpu.arch.startswith("sm_8"), gpu.arch.startswith("sm_12")
    if kernel == "forward":
        return 0
    if kernel == "backward" and shape.tf32:
        return 255 if shape.cosine or shape.fills_padding else 0
    if kernel == "backward":
        cosine = shape.cosine and (consumer or gpu.arch.startswith("sm_9"))
        return 0 if shape.fills_padding or shape.scattered or cosine else 255
    if kernel == "tiled_forward":
        return 0 if shape.tf32 or (older and shape.largest_block == 64) else 168
    if kernel in ("dkv", "dbias"):
        return 0 if kernel == "dbias" and shape.dropout and consumer else 255
    if shape.largest_block > 32:
        return 0
    if shape.cosine:
        return 168 if shape.fills_padding and not older else 0
    return 128 if (older or shape.scattered) and not shape.tf32 else 0


def _registers_half(kernel: str, shape: Shape, gpu: Gpu) -> int:
    older, data_center = gpu.arch.startswith("sm_8"), gpu.arch.startswith("sm_10")
    adds = shape.explicit_mask or shape.fills_padding
    if kernel == "forward":
        free = shape.dropout or shape.largest_block > 32
        free = free or (shape.cosine and not shape.explicit_mask)
        return 224 if data_center and not free else 0
    if kernel == "backward":
        return 255 if data_center or shape.scattered else 0
    if kernel == "tiled_forward":
        if data_center and shape.cosine:
            return 168
        return 255 if older and shape.largest_block == 64 else 0
    if kernel == "dkv":
        masked = shape.explicit_mask and (shape.fills_padding or older)
        newer = data_center or gpu.arch.startswith("sm_12")
        return 255 if newer or shape.dropout or masked else 0
    if kernel == "dbias":
        if shape.dropout and shape.cosine and gpu.arch.startswith("sm_9"):
            return 0 if adds else 168
        return 255 if data_center or older else 0
    return 255 if data_center and shape.odd else 0


@functools.cache
def _tuned() -> dict[str, dict]:
    return json.loads(TUNED.read_text())["configs"]


def tuned_key(kernel: str, shape: Shape, gpu: Gpu) -> str:
    """The name of a problem's class in the table: all that a layout may depend on."""
    dtype = "tf32" if shape.tf32 else str(shape.dtype).removeprefix("torch.")
    extras = {
        "bias": shape.sums_bias,
        "cosine": shape.cosine,
        "dropout": shape.dropout,
        "mask": shape.explicit_mask,
        "pads": shape.fills_padding,
        "scattered": shape.scattered,
    }
    size = f"n{shape.tokens}-d{shape.head_dim}-{shape.value_dim}"
    return "-".join([kernel, gpu.arch, dtype, size, *(name for name, on in extras.items() if on)])


_forced: dict[str, Mapping[str, int]] = {}


@contextlib.contextmanager
def override(fields: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Inside it these fields, by `tuned_key`, win over the table; what was planned is forgotten."""
    from swin_kernels.backends.triton import calls, direct

    def forget() -> None:
        calls._forward_run.cache_clear()
        calls._backward_run.cache_clear()
        direct.forget()

    before = dict(_forced)
    _forced.update(fields)
    forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        forget()


def config_for(kernel: str, shape: Shape, gpu: Gpu) -> Config:
    """The layout of one kernel: forward, backward; tiled_forward, dq, dkv or dbias."""
    if kernel == "forward":
        config = _whole_forward(shape, gpu)
    elif kernel == "backward":
        config = _whole_backward(shape, gpu)
    else:
        config = _tiled(kernel, shape, gpu)
    if gpu.warp_size == 64:  # half as many warps have as many lanes
        config = replace(config, num_warps=max(1, config.num_warps // 2))
    if gpu.arch.startswith("sm_"):
        config = replace(config, registers=_registers(kernel, shape, gpu))
    key = tuned_key(kernel, shape, gpu)
    if tuned := {**_tuned().get(key, {}), **_forced.get(key, {})}:
        config = Config(**{**asdict(config), **tuned})
    return config
