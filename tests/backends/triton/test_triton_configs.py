"""Layouts of the Triton kernels: a function of problem and GPU, and a table that overrides it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from triton_calls import call_of

from benchmarks.gpu_tools.override import override
from swin_kernels.backends.triton import config
from swin_kernels.backends.triton.config import (
    INTERPRETER,
    KNOWN_GPUS,
    LARGEST_HEAD_DIM,
    config_for,
    fits_single_tile,
    tuned_key,
)
from swin_kernels.backends.triton.launch_spec import Config, Gpu, block_of

H100 = KNOWN_GPUS["sm_90"]
GPUS = [*KNOWN_GPUS.values(), INTERPRETER]
KERNELS = ("forward", "backward", "tiled_forward", "dq", "dkv", "dbias")


@pytest.mark.parametrize(
    ("length", "block"), [(1, 16), (16, 16), (17, 32), (49, 64), (64, 64), (65, 128), (200, 256)]
)
def test_blocks_are_powers_of_two_that_the_matrix_units_take(length, block):
    assert block_of(length) == block


def test_the_table_of_measured_configurations_has_the_last_word():
    call = call_of(49, 32, 32, torch.float16, 1000, 3)
    key = tuned_key("forward", call, H100)
    assert key == "forward-sm_90-float16-n49-d32-32"
    default = config_for("forward", call, H100)
    with override({key: {"num_warps": 16, "programs_per_multiprocessor": 2}}):
        measured = config_for("forward", call, H100)
        assert measured == replace(default, num_warps=16, programs_per_multiprocessor=2)
        for other in (
            config_for("backward", call, H100),
            config_for("forward", call, KNOWN_GPUS["sm_80"]),
        ):
            assert other.num_warps != 16


def test_a_backward_that_sums_the_bias_is_measured_apart():
    call = call_of(49, 32, 32, torch.float16, 1000, 3)
    biased = call_of(49, 32, 32, torch.float16, 1000, 3, sums_bias=True)
    assert tuned_key("backward", biased, H100) == tuned_key("backward", call, H100) + "-bias"


def test_shipped_table_of_measured_configurations_is_well_formed():
    table = json.loads(config.TUNED.read_text())
    assert table["measured"]
    assert config._tuned() == table["configs"]
    fields = set(Config.__dataclass_fields__)
    for key, entry in table["configs"].items():
        assert set(entry) <= fields, key
        kernel, arch, dtype, tokens, *_ = key.split("-")
        assert kernel in KERNELS
        assert arch in KNOWN_GPUS
        assert dtype == "tf32" or isinstance(getattr(torch, dtype), torch.dtype)
        assert tokens[0] == "n"


def test_known_gpus_are_named_by_their_architecture():
    assert all(name == gpu.arch for name, gpu in KNOWN_GPUS.items())
    assert INTERPRETER.arch not in KNOWN_GPUS


def test_wide_warps_are_half_as_many():
    call = call_of(49, 32, 32, torch.float16, 1000, 3)
    narrow = Gpu("gfx_narrow", H100.shared_memory, 100, warp_size=32)
    wide = Gpu("gfx_wide", H100.shared_memory, 100, warp_size=64)
    for kernel in ("forward", "backward", "dq"):
        warps = [config_for(kernel, call, gpu).num_warps for gpu in (narrow, wide)]
        assert warps[1] == max(1, warps[0] // 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [1, 32, 64, LARGEST_HEAD_DIM])
@pytest.mark.parametrize("tokens", [1, 4, 49, 64, 98, 144, 576])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_every_layout_is_one_that_triton_takes(gpu, tokens, dim, dtype):
    # every mixture of what a layout may depend on
    names = ("cosine", "dropout", "explicit_mask", "fills_padding", "not_vectorizable", "tf32")
    mixtures = [
        call_of(tokens, dim, dim, dtype, 100, 4, **dict(zip(names, flags)))
        for flags in itertools.product((False, True), repeat=len(names))
        if dtype == torch.float32 or not flags[-1]
    ]
    for call, kernel in itertools.product(mixtures, KERNELS):
        if kernel in ("forward", "backward") and not fits_single_tile(kernel, call, gpu):
            continue
        config = config_for(kernel, call, gpu)
        for number in (config.block_m, config.block_n, config.num_warps):
            assert number & (number - 1) == 0
        assert min(config.block_m, config.block_n) >= 16
        assert 1 <= config.num_warps <= 16
        assert config.num_warps * 32 * config.options.get("maxnreg", 0) <= 65_536
        if kernel in ("forward", "backward"):
            assert config.block_m == config.block_n >= tokens


def test_a_limit_of_registers_is_an_option_of_the_compiler_on_nvidia_alone():
    call = call_of(49, 32, 32, torch.float32, 1000, 3)
    limited, free = (config_for("backward", call, KNOWN_GPUS[arch]) for arch in ("sm_80", "gfx942"))
    assert limited.options["maxnreg"] == limited.registers == 255
    assert "maxnreg" not in free.options
    # as when a measured table changes the warps alone
    assert replace(limited, num_warps=16).options["maxnreg"] == 128
