"""What the CUDA kernels are built from, on the host, and what the emulator refuses.

The emulator is what stands in for a GPU in the tests of the contract (`--emulate-cuda`): it has to
find what a GPU would punish. Index arithmetic and products are held against plain loops.
"""

from __future__ import annotations

import subprocess
from random import Random

import pytest
from command_lines import run
from cuda_emulator import build_checks


@pytest.fixture(scope="module")
def check():
    """What a check of tests/support/cuda/checks.cpp prints."""
    program = build_checks()
    return lambda name: run(program, name).stdout.strip()


@pytest.mark.parametrize(
    "misuse, complaint",
    [
        ("too much shared memory", "101377 bytes of shared memory"),
        ("half a warp", "a block of 48 threads"),
        ("a thread that leaves", "threads of a block wait for each other at different places"),
        ("a lane that leaves", "threads of a block wait for each other at different places"),
        ("lanes apart", "lanes of a warp wait in"),
        ("a lane at the block's barrier", "threads of a block wait for each other"),
        ("a copy off its address", "a copy of 16 bytes is not aligned to them"),
        ("a matrix off its address", "a row of a matrix is not aligned to 16 bytes"),
        ("nothing wrong", "no error"),
    ],
)
def test_what_a_gpu_would_punish_is_an_error(check, misuse, complaint):
    assert complaint in check(misuse)


def test_a_copy_is_nan_until_its_group_was_waited_for(check):
    assert check("copies") == "NaN NaN, 1.000000 NaN, 1.000000 5.000000"


def test_what_lacks_a_barrier_gives_other_numbers(check):
    assert check("with a barrier") == "1.000000 1.000000"
    # shared memory begins as NaN; odd blocks run their threads in reverse
    assert check("without a barrier") == "NaN 1.000000"
    one, two = "1.000000", "2.000000"
    assert check("overwritten after a barrier") == f"{one} {one} {one} {one}"
    # in the first block one warp runs ahead of the other
    assert check("overwritten without") == f"{one} {two} {one} {one}"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32", "fp64"])
def test_products_by_the_layouts_of_the_matrix_units_are_exact(check, precision):
    assert float(check(f"products {precision}")) == 0


def test_index_arithmetic_is_that_of_pad_roll_and_partition(check):
    assert check("geometry") == "0 of 300 problems differ"


def run_lengths(*problems: tuple[int, int, int]) -> list[int]:
    """What the launcher chooses for (windows, programs of a run, programs at once)."""
    given = "\n".join(" ".join(map(str, problem)) for problem in problems)
    told = subprocess.check_output([build_checks(), "run lengths"], input=given, text=True)
    return [int(line) for line in told.split()]


@pytest.mark.parametrize(
    ("problem", "length"),
    [
        ((8192, 3, 396), 63),  # Swin-T's stages on 132 multiprocessors of 3 programs: one round
        ((512, 12, 396), 16),
        ((128, 24, 396), 8),
        ((128, 48, 216), 15),  # 4 runs would leave a ninth idle: 2 rounds of 9
        ((1, 3, 396), 1),
        ((64, 3, 396), 1),  # as many programs as windows
        ((0, 3, 396), 1),
        ((100, 500, 396), 34),  # more heads than programs at once: 4 rounds of 3 runs
    ],
)
def test_runs_fill_the_device_a_whole_number_of_times(problem, length):
    assert run_lengths(problem) == [length]


def test_no_run_is_empty_and_none_costs_more_than_one_round_would():
    random = Random(5)
    problems = [
        (random.randint(1, 5000), random.randint(1, 64), random.randint(1, 600)) for _ in range(200)
    ]
    for (windows, programs, at_once), length in zip(problems, run_lengths(*problems)):
        runs = -(-windows // length)
        assert 1 <= length <= windows
        assert (runs - 1) * length < windows

        def cost(length, windows=windows, programs=programs, at_once=at_once):
            rounds = -(-(-(-windows // length) * programs) // at_once)
            return rounds * (length + 1)

        fewest = -(-programs // at_once)
        one_round = -(-windows // min(windows, fewest * at_once // programs))
        assert cost(length) <= cost(one_round)
