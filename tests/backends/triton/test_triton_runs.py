"""How many windows a program of the Triton backend takes, where it takes a run of them."""

from __future__ import annotations

import math

import pytest
import torch
from triton_calls import H100, call_of

from swin_kernels.backends.triton.config import INTERPRETER, KNOWN_GPUS
from swin_kernels.backends.triton.launch_spec import MOST_WAVES, Config


@pytest.mark.parametrize("windows", [0, 1, 2, 7, 64, 1000, 12345])
@pytest.mark.parametrize("heads", [1, 3, 24, 5000])
@pytest.mark.parametrize("gpu", [H100, INTERPRETER, KNOWN_GPUS["gfx942"]], ids=lambda g: g.arch)
def test_runs_cover_all_windows_and_no_more_programs_than_wanted(windows, heads, gpu):
    call = call_of(49, 32, 32, torch.float16, windows, heads)
    config = Config(64, 64, 4, 1, programs_per_multiprocessor=4)
    run = config.windows_per_program(call, gpu)
    runs = math.ceil(windows / run)
    assert run >= 1
    assert (runs - 1) * run < max(1, windows)
    assert runs * heads <= max(heads, MOST_WAVES * 4 * gpu.multiprocessors)
    if windows * heads <= 4 * gpu.multiprocessors // 2:
        assert run == 1  # a device that is not full has no reason for runs


@pytest.mark.parametrize(
    ("windows", "heads", "run"),
    [
        (8192, 3, 94),  # Swin-T at 224², batch 128: 88 runs a head
        (2048, 6, 47),
        (512, 12, 24),  # one wave of 264 programs
        (128, 24, 12),
        (128, 40, 10),  # 6 runs would leave 24 places empty; two waves of 13 fill them
        (1, 3, 1),
    ],
)
def test_runs_end_together(windows, heads, run):
    call = call_of(49, 32, 32, torch.float16, windows, heads)
    assert Config(64, 64, 4, 1).windows_per_program(call, H100) == run
