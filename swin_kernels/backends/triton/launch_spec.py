"""What one Triton call is made of: facts of its tensors, of the device, and what is launched on it.

Names and numbers, without tensors and without Triton. So a plan is made once for all calls alike,
can be compiled without the GPU it is for, and is tested on tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_kernels.backends.triton.token_layout import TokenLayout, alignment
from swin_kernels.problem import NEEDS, Options

STRIDED = ("query", "key", "value", "grad_out")  # kernels read these as they lie
SMALLEST_BLOCK = 16  # of the matrix units
REGISTERS = 65_536  # of a multiprocessor: CUDA programming guide, table of compute capabilities
LARGEST_LOGIT = 1.1e38  # as in kernels/common.py
MOST_WAVES = 4  # of programs that take runs of windows
_WHOLE: list[tuple[str, int | None]] = [("query", None), ("key", None), ("value", None)]


def block_of(length: int) -> int:
    """The power of two that holds `length`, and that the matrix units take."""
    return max(SMALLEST_BLOCK, 1 << (length - 1).bit_length())


class TensorFacts(NamedTuple):
    """What a launch depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # its first element, to 16 bytes


def facts_of(x: Tensor) -> TensorFacts:
    aligned = x.device.type == "meta" or x.data_ptr() % 16 == 0
    return TensorFacts(tuple(x.shape), x.stride(), x.dtype, aligned)


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


class Call:
    """A forward or a backward: what its launches, and their configurations, depend on."""

    def __init__(
        self,
        facts: Mapping[str, TensorFacts],
        options: Options,
        allow_tf32: bool = False,
        needs: int = 0,
    ) -> None:
        """`facts` by the names of `Operands`, and of what a backward reads.

        `needs`, of a backward, are bits of `swin_kernels.problem.NEEDS`.
        """
        query, biases = facts["query"], NEEDS["bias"] | NEEDS["bias_table"]
        self.facts, self.options, self.needs = facts, options, needs
        self.packed = "key" not in facts
        self.dtype = query.dtype
        self.fp32 = query.dtype == torch.float32
        self.tf32 = self.fp32 and allow_tf32
        self.batch = query.shape[0]
        self.heads, self.head_dim = query.shape[-2:]
        self.value_dim = facts["query" if self.packed else "value"].shape[-1]
        self.largest_block = max(block_of(self.head_dim), block_of(self.value_dim))
        # channels that no block of the matrix units divides: narrow loads, more offsets
        self.unaligned_head_dim = self.head_dim % 16 != 0 or self.value_dim % 16 != 0

        self.grid = options.grid(query.shape[1 : -3 if self.packed else -2])
        self.tokens = self.grid.tokens  # of a window
        self.windows = self.batch * self.grid.windows  # of the batch
        # of what a tiled forward keeps: each row's largest logit, then the shares of its sum
        self.stats_shape = self.windows, self.heads, 2 * self.tokens

        # query, key and value: a tensor, and which third of it
        self.parts = [("query", i) for i in range(3)] if self.packed else _WHOLE
        self.layouts = [
            TokenLayout.of(name, facts[name].shape, facts[name].stride, part)
            for name, part in self.parts
        ]
        # whether channels are not loaded 16 bytes at a time
        self.not_vectorizable = alignment(self.layouts) % (16 // self.dtype.itemsize) != 0 or any(
            x.strides[-1] != 1 or not facts[x.tensor].aligned for x in self.layouts
        )

        self.bias = "dense" if "bias" in facts else "none"
        if "bias_table" in facts:
            self.bias = "indexed" if "bias_index" in facts else "table"
        # whether a backward wants the gradient of the bias, or of its table
        self.sums_bias = self.bias != "none" and bool(needs & biases)
        self.cosine = "logit_scale" in facts
        self.dropout = options.dropout_p > 0
        self.explicit_mask = "mask" in facts
        self.fills_padding = self.fills("pad_key") or self.fills("pad_value")
        self.adds = self.explicit_mask or self.fills_padding
        # whether kernels keep logits in units of log2: see kernels/common.py
        self.logits_in_log2 = not (self.fp32 or self.explicit_mask)
        # of the shift mask; what is finite stays so in units of log2
        self.mask_value = float(options.mask_value)
        if self.logits_in_log2 and math.isfinite(self.mask_value):
            self.mask_value = max(-LARGEST_LOGIT, min(self.mask_value, LARGEST_LOGIT))

    def fills(self, pad: str) -> bool:
        """Whether padding has keys or values that are not zeros."""
        return pad in self.facts and self.grid.needs_padding


@dataclass(frozen=True)
class Config:
    """One kernel's layout."""

    block_m: int  # queries of a tile; the window, padded for the matrix units, if it is whole
    block_n: int  # keys of a tile
    num_warps: int
    loop_stages: int  # of the software pipeline over windows or tiles
    programs_per_multiprocessor: int = 2  # at once, where each takes a run of windows
    holds_bias: bool = False  # a backward of whole windows, in registers from window to window
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

    def windows_per_program(self, call: Call, gpu: Gpu, tiles: int = 1) -> int:
        """Windows a run, so that the runs of all heads and tiles fill the device, and end together.

        One wave of programs or a few, by which should end first: a run costs its windows, and about
        one more for what is done once.
        """
        at_once, parts = self.programs_per_multiprocessor * gpu.multiprocessors, call.heads * tiles

        def run_of(waves: int) -> int:
            runs = max(1, waves * at_once // parts)
            return max(1, -(-call.windows // runs))

        def cost(run: int) -> int:
            waves = -(-(-(-call.windows // run) * parts) // at_once)
            return waves * (run + 1)

        return min(map(run_of, range(1, MOST_WAVES + 1)), key=cost)


Pointers = dict[str, str | None]  # argument -> tensor


@dataclass(frozen=True)
class LaunchSpec:
    """One launch: names for pointers, numbers for the rest; by the names of the kernel's arguments.

    Tensors are named as in `Plan.buffers` and `Operands`.
    """

    kernel: str  # module.function
    grid: int
    pointers: Pointers
    scalars: dict[str, Any]
    config: Config


Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype


@dataclass(frozen=True)
class Plan:
    """Launches, in order, and the tensors they need."""

    launches: tuple[LaunchSpec, ...]
    buffers: Buffers  # besides the operands
    dtypes: dict[str, torch.dtype]  # of every tensor a launch names
    sums: dict[str, tuple[int, ...]] = field(default_factory=dict)  # axes of buffers, to sum over
