"""How a call is laid on a GPU: blocks, warps, stages and registers, by a pure function of both.

A row of the tables was found by compiling for each architecture (`python -m
benchmarks.codegen.machine_code`): without it the kernel keeps registers in memory, or takes more
instructions. A measured table, `tuned.json`, has the last word:
`benchmarks/gpu_tools/tune.py` writes it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from swin_kernels.backends.triton.launch_spec import Call, Config, Gpu, block_of

TUNED = Path(__file__).with_name("tuned.json")
LARGEST_HEAD_DIM = 128
LARGEST_BLOCK = 64  # of tiles of a window, but for MOST_QUERIES of a forward
MOST_QUERIES = 128

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

# Rows of (condition, value, why). A condition is words of `_features`: all must hold; of words with
# | between them one, and a word behind - must not. The first row that holds counts.
Table = tuple[tuple[str, Any, str], ...]


def _features(call: Call, gpu: Gpu) -> frozenset[str]:
    """What rows may ask: of the call, of its widest tile of channels, and of the device."""
    high_register_pressure = call.fp32 or call.dropout or (call.cosine and call.adds)
    holds = {
        "fp32": call.fp32,
        "tf32": call.tf32,
        "cosine": call.cosine,
        "dropout": call.dropout,
        "mask": call.explicit_mask,
        "pads": call.fills_padding,
        "adds": call.adds,  # mask or pads
        "high_register_pressure": high_register_pressure,  # much beside the logits
        "not_vectorizable": call.not_vectorizable,
        "unaligned": call.unaligned_head_dim,
        "two_widths": call.head_dim != call.value_dim,
        "up_to_16_tokens": call.tokens <= 16,
        "full_block": call.tokens == block_of(call.tokens),
        "over_64_tokens": call.tokens > 64,
        "over_128_tokens": call.tokens > 128,
        "over_32": call.largest_block > 32,
        "over_64": call.largest_block > 64,
        "of_64": call.largest_block == 64,
        "ampere": gpu.arch.startswith("sm_8"),
        "hopper": gpu.arch.startswith("sm_9"),
        "blackwell": gpu.arch.startswith("sm_10"),
        "consumer": gpu.arch.startswith("sm_12"),
        "h100": gpu.arch in ("sm_90", "interpreter"),
        "from_shared": gpu.multiplies_from_shared,
        "warps_of_64": gpu.warp_size == 64,
        "small_shared": gpu.shared_memory < 128 * KB,
    }
    return frozenset(name for name, held in holds.items() if held)


def _first(table: Table, features: frozenset[str], otherwise: Any) -> Any:
    def holds(word: str) -> bool:
        return (word.lstrip("-") in features) != word.startswith("-")

    for condition, value, _ in table:
        if all(any(map(holds, word.split("|"))) for word in condition.split()):
            return value
    return otherwise


# Why a kernel does not hold a window in one tile: registers. Forward and backward agree on it for
# the backward without knowing of TF32, which may change between the two, nor of strides, which a
# compiler does not promise.
WHY_TILED: dict[str, Table] = {
    "forward": (
        ("over_128_tokens", True, "a row of logits is a whole thread's registers"),
        ("over_64_tokens -h100", True, "the bias takes 64 registers, the logits as many"),
        ("over_64_tokens over_32|fp32|dropout|mask", True, "beside them there is no room"),
        ("over_64_tokens not_vectorizable|unaligned", True, "an offset for each channel"),
        ("over_64_tokens cosine pads", True, "norms, and what fills the padding"),
        ("fp32 over_32", True, "an element takes a register"),
        ("fp32 cosine adds", True, "norms, and what is added"),
    ),
    "backward": (
        ("over_64_tokens|over_64", True, "four tiles of tokens and three of logits"),
        ("over_32 cosine|adds|fp32", True, "each takes as much as the channels beyond 32"),
        ("over_32 -from_shared -warps_of_64", True, "operands are registers"),
        ("dropout", True, "random numbers"),
        ("unaligned over_32|fp32|cosine|adds", True, "an offset for each channel, and beside it"),
        ("unaligned ampere -full_block", True, "an offset for each channel, and what is no token"),
        ("unaligned warps_of_64", True, "an offset for each channel"),
        ("cosine adds", True, "norms, and what is added"),
        ("mask pads|fp32", True, "two things that are added; four bytes"),
        ("mask -from_shared", True, "operands are registers, and so is the mask"),
        ("pads consumer", True, "operands are registers, and so is what fills the padding"),
        ("two_widths fp32 blackwell", True, "offsets of both widths"),
    ),
}

# of kernels that hold a window: (warps for each 16 of its tokens, stages)
SINGLE_TILE: dict[str, Table] = {
    "forward": (
        ("fp32", (2, 1), "an element takes a register"),
        ("dropout", (2, 2), "random numbers beside the logits"),
        ("mask -from_shared", (2, 2), "operands are registers, and so is the mask"),
        ("over_64 cosine|adds", (2, 2), "128 channels, and what is beside the logits"),
        ("blackwell|consumer not_vectorizable|unaligned", (2, 1), "an offset for each channel"),
        ("blackwell -over_64 -adds", (1, 1), "a second stage takes the registers of a tile"),
        ("consumer pads -mask", (1, 1), "a second stage spills, or leaves one program less"),
        ("", (1, 2), "a window is on its way while one is worked on"),
    ),
    "backward": (
        ("fp32 -tf32 -warps_of_64 not_vectorizable|pads", (4, 1), "beside seven tiles of fp32"),
        ("fp32 -tf32 cosine hopper", (4, 1), "norms beside seven tiles of fp32"),
        ("tf32 hopper -not_vectorizable -cosine", (1, 1), "as below"),
        ("tf32 from_shared -hopper -not_vectorizable -cosine -pads", (1, 1), "as below"),
        (
            "tf32 -from_shared -warps_of_64 -not_vectorizable",
            (1, 1),
            "twice the warps take 60 to 80 % more instructions, and spill as well",
        ),
        ("fp32", (2, 1), "an element takes a register"),
        ("not_vectorizable mask|over_32", (2, 1), "an offset for each channel"),
        ("mask", (1, 1), "the mask's tile"),
        ("unaligned", (1, 1), "an offset for each channel, of two windows with two stages"),
        ("over_32 two_widths", (1, 1), "offsets of both widths"),
        ("blackwell pads -not_vectorizable", (1, 1), "a second stage spills more"),
        ("hopper -over_32 -not_vectorizable", (1, 3), "with two, a tile is waited for at once"),
        ("not_vectorizable from_shared|ampere|cosine|pads", (2, 2), "an offset for each channel"),
        ("not_vectorizable", (2, 1), "an offset for each channel, and operands are registers"),
        ("-from_shared -ampere -cosine -pads", (1, 1), "operands are registers"),
        ("", (1, 2), "a window is on its way while one is worked on"),
    ),
}

# warps that a multiprocessor holds at once of kernels that hold a window, by their registers: 16
# with up to 128 a thread, 12 with 168, 8 with 255
WARPS_AT_ONCE: dict[str, Table] = {
    "forward": (
        ("over_64 consumer", 4, "104 KB of shared memory are not there twice"),
        ("unaligned full_block hopper", 12, "148 registers"),
        ("unaligned full_block blackwell", 16, "122 registers"),
        ("fp32|dropout|over_64_tokens|over_64|unaligned", 8, "170 to 255 registers"),
        ("up_to_16_tokens", 20, "56 to 79 registers"),
        ("over_32|mask cosine|adds -hopper", 8, "174 to 250 registers"),
        ("over_32 cosine|adds", 8, "175 to 199 registers"),
        ("mask cosine|pads", 8, "208 to 216 registers"),
        ("over_32|mask|cosine|not_vectorizable hopper", 12, "126 to 168 registers"),
        ("over_32|mask|not_vectorizable", 8, "158 to 240 registers"),
        ("cosine ampere", 8, "173 registers"),
        ("ampere|consumer|blackwell", 12, "106 to 168 registers"),
        ("", 16, "up to 128 registers"),
    ),
    "backward": (
        ("up_to_16_tokens -fp32", 16, "80 to 120 registers"),
        ("", 8, "208 to 255 registers"),
    ),
}

# whether a backward of whole windows keeps bias and shift mask in registers while the same seams
# cut its windows; else it reads them for each, through shared memory
HOLDS_BIAS: Table = (
    ("fp32", False, "an element takes a register"),
    ("unaligned full_block hopper|blackwell", True, "there is room without a second stage"),
    ("cosine|pads|mask", False, "norms, a filler and the mask's tile take those"),
    ("not_vectorizable|unaligned", False, "offsets of channels take those"),
    ("ampere", False, "operands are registers, and addresses take more than elsewhere"),
    ("over_32 two_widths", False, "offsets of both widths"),
    ("", True, "256 of some 800 wavefronts of shared memory"),
)

# of kernels that work in tiles: (queries, keys, warps)
TILED: dict[str, Table] = {
    "tiled_forward": (
        ("fp32 over_64", (32, 32, 8), "128 channels of four bytes"),
        ("fp32", (32, 32, 4), "an element takes a register"),
        ("high_register_pressure|over_64", (64, 64, 8), "what is beside the logits"),
        ("", (64, 64, 4), "the largest tile of a warp group"),
    ),
    "dq": (
        ("fp32 over_64 tf32", (16, 16, 4), "128 channels of four bytes"),
        ("fp32 over_64", (16, 16, 8), "128 channels of four bytes"),
        ("fp32 over_32 -tf32", (32, 32, 8), "64 channels of four bytes"),
        ("high_register_pressure -fp32 over_64", (32, 32, 8), "what is beside the logits"),
        ("high_register_pressure", (32, 32, 4), "what is beside the logits"),
        ("cosine over_64 from_shared", (32, 64, 8), "norms of 128 channels"),
        ("cosine over_64", (32, 32, 8), "norms of 128 channels, and operands are registers"),
        ("cosine blackwell over_32", (32, 64, 8), "Triton 3.6 compiles no more queries there"),
        ("cosine blackwell", (32, 64, 4), "Triton 3.6 compiles no more queries there"),
        ("over_32 -from_shared", (64, 32, 8), "operands are registers"),
        ("over_64 adds", (64, 32, 8), "128 channels, and what is added"),
        ("over_32", (64, 64, 8), "64 channels"),
        ("", (64, 64, 4), "the largest tile of a warp group"),
    ),
    "dkv": (
        ("fp32 over_64 tf32", (16, 16, 4), "two sums of 128 channels of four bytes"),
        ("fp32 over_64", (16, 16, 8), "two sums of 128 channels of four bytes"),
        ("fp32 over_32 -tf32", (32, 32, 8), "two sums of 64 channels of four bytes"),
        ("-fp32 over_64", (32, 32, 8), "two sums of 128 channels"),
        (
            "high_register_pressure|over_32",
            (32, 32, 4),
            "two sums of 64 channels, or what is beside the logits",
        ),
        ("ampere|consumer mask", (32, 64, 4), "operands are registers, and so is the mask"),
        ("cosine small_shared", (32, 64, 4), "operands are registers, and norms beside them"),
        ("", (64, 64, 4), "the largest tile of a warp group"),
    ),
    "dbias": (
        ("fp32 over_64", (16, 16, 8), "128 channels of four bytes"),
        ("fp32 over_32", (32, 32, 8), "64 channels of four bytes"),
        ("over_64 dropout cosine", (16, 32, 8), "random numbers and norms beside the logits"),
        ("over_64 dropout", (16, 32, 4), "random numbers beside the logits"),
        ("over_64", (32, 32, 8), "128 channels"),
        (
            "high_register_pressure|over_32",
            (32, 32, 4),
            "64 channels, or what is beside the logits",
        ),
        ("hopper|ampere -adds", (64, 64, 4), "a quarter fewer instructions than by 8 warps"),
        ("from_shared", (64, 64, 8), "the largest tile"),
        ("", (64, 32, 4), "a quarter fewer instructions than a square tile"),
    ),
}

# the kernel's name is a word here
TILED_STAGES: Table = (
    ("tiled_forward of_64 ampere", 2, "there is room, in fp32 too"),
    ("dq mask -from_shared", 1, "operands are registers, and so is the mask"),
    (
        "dkv|dbias hopper|ampere -small_shared -fp32 -over_32 -high_register_pressure -adds",
        3,
        "with two, a tile is waited for at once",
    ),
    ("dbias", 1, "its loop is over windows, whose tiles are not neighbours"),
    ("fp32", 1, "tiles of four bytes"),
    ("over_64 small_shared", 1, "two stages of 128 channels need more than 100 KB"),
    ("over_64 mask pads", 1, "128 channels, and two things that are added"),
    ("", 2, "a tile is on its way while one is worked on"),
)

# whether the passes of a tiled backward leave normalised queries and keys to those behind
LEAVES_UNITS: Table = (
    ("-cosine", False, "nothing is normalised"),
    ("small_shared", False, "GPUs whose memory binds: norms cost less than the bytes"),
    ("", True, "each pass would normalise a tile as often as it is read"),
)

# A thread's limit of registers where the assembler, left alone, spills a few to fit one program
# more: with 255 one of 8 warps, 168 three of 4 warps, 128 four of 4 warps; 0 leaves it alone.
REGISTERS_FP32: dict[str, Table] = {
    "forward": (),
    "backward": (
        ("tf32 -cosine -pads", 0, "fits"),
        ("tf32", 255, "spills"),
        ("pads|not_vectorizable", 0, "has twice the warps"),
        ("cosine consumer", 0, "fits"),
        ("", 255, "spills"),
    ),
    "tiled_forward": (("tf32", 0, "fits"), ("ampere of_64", 0, "fits"), ("", 168, "spills")),
    "dq": (
        ("over_32", 0, "fits"),
        ("cosine pads -ampere", 168, "spills"),
        ("cosine", 0, "fits"),
        ("pads ampere", 0, "fits"),
        ("ampere|not_vectorizable -tf32", 128, "spills"),
    ),
    "dkv": (("", 255, "spills"),),
    "dbias": (("dropout consumer", 0, "fits"), ("", 255, "spills")),
}
REGISTERS_HALF: dict[str, Table] = {
    "forward": (
        ("dropout|over_32", 0, "fits"),
        ("cosine -mask", 0, "fits"),
        ("blackwell", 224, "spills"),
    ),
    "backward": (
        ("blackwell pads -not_vectorizable", 0, "spills less"),
        ("blackwell|not_vectorizable", 255, "spills"),
    ),
    "tiled_forward": (("blackwell cosine", 168, "spills"), ("ampere of_64", 255, "spills")),
    "dq": (("blackwell unaligned", 255, "spills"),),
    "dkv": (
        ("blackwell|consumer|dropout", 255, "spills"),
        ("mask pads|ampere", 255, "spills"),
    ),
    "dbias": (
        ("dropout cosine hopper adds", 0, "fits"),
        ("dropout cosine hopper", 168, "spills"),
        ("blackwell|ampere", 255, "spills"),
    ),
}


def fits_single_tile(kernel: str, call: Call, gpu: Gpu) -> bool:
    """Whether forward or backward holds a window in one tile."""
    return not _first(WHY_TILED[kernel], _features(call, gpu), False)


def leaves_units(call: Call, gpu: Gpu) -> bool:
    """Whether a backward in tiles writes normalised queries and keys, to be read again."""
    return _first(LEAVES_UNITS, _features(call, gpu), False)


def _in_tiles(kernel: str, call: Call, features: frozenset[str]) -> Config:
    queries, keys, warps = _first(TILED[kernel], features, None)
    if not features & {"unaligned", "fp32"} and call.not_vectorizable:
        warps = max(warps, 8)
    if (
        kernel == "tiled_forward"
        and not features
        & {"high_register_pressure", "adds", "over_32", "unaligned", "not_vectorizable"}
        and features & {"hopper", "h100"}
    ):
        # a fifth fewer instructions, as keys are prepared half as often, if little more is padded
        tiles = -(-call.tokens // queries)
        queries = MOST_QUERIES if tiles % 2 == 0 or tiles > 4 else queries
    largest = block_of(call.tokens)
    stages = _first(TILED_STAGES, features | {kernel}, None)
    return Config(min(queries, largest), min(keys, largest), warps, stages)


@functools.cache
def _tuned() -> dict[str, dict]:
    return json.loads(TUNED.read_text())["configs"]


def tuned_key(kernel: str, call: Call, gpu: Gpu) -> str:
    """The name of a problem's class in the table: all that a layout may depend on."""
    dtype = "tf32" if call.tf32 else str(call.dtype).removeprefix("torch.")
    extras = {
        "bias": call.sums_bias,
        "cosine": call.cosine,
        "dropout": call.dropout,
        "mask": call.explicit_mask,
        "pads": call.fills_padding,
        "not_vectorizable": call.not_vectorizable,
    }
    size = f"n{call.tokens}-d{call.head_dim}-{call.value_dim}"
    return "-".join([kernel, gpu.arch, dtype, size, *(name for name, on in extras.items() if on)])


def config_for(kernel: str, call: Call, gpu: Gpu) -> Config:
    """The layout of one kernel: forward, backward; tiled_forward, dq, dkv or dbias."""
    features = _features(call, gpu)
    if kernel in SINGLE_TILE:
        block = block_of(call.tokens)
        warps, stages = _first(SINGLE_TILE[kernel], features, None)
        warps *= block // 16
        programs = max(1, _first(WARPS_AT_ONCE[kernel], features, None) // warps)
        config = Config(block, block, warps, stages, programs)
        if kernel == "backward":
            config = replace(config, holds_bias=_first(HOLDS_BIAS, features, False))
    else:
        config = _in_tiles(kernel, call, features)
    if gpu.warp_size == 64:  # half as many warps have as many lanes
        config = replace(config, num_warps=max(1, config.num_warps // 2))
    if gpu.arch.startswith("sm_"):
        limits = REGISTERS_FP32 if call.fp32 else REGISTERS_HALF
        config = replace(config, registers=_first(limits[kernel], features, 0))
    return replace(config, **_tuned().get(tuned_key(kernel, call, gpu), {}))
