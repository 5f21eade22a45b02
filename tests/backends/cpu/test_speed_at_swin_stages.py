"""Swin-T's stages on the CPU kernels: never slower than the unfused path."""

from __future__ import annotations

import pytest

from benchmarks.baselines.providers import PROVIDERS
from benchmarks.cases import cpu_cases
from benchmarks.device import Cpu
from benchmarks.report.rows import ResultsFile
from benchmarks.suite import loops_of
from benchmarks.timing import Timed, sample_in_turn

pytestmark = pytest.mark.slow

ROUNDS, TRIES = 7, 4
PAIR = [p for p in PROVIDERS if p.name in ("ours", "unfused")]
STAGES = {name: case.but(batch=2) for name, case in cpu_cases().items()}


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_not_slower_than_unfused(cpu_kernels, name, tmp_path):
    device = Cpu()
    results_file = ResultsFile(tmp_path / "rows.csv", {})
    loops = loops_of(name, STAGES[name], device, PAIR, results_file)
    assert not results_file.rows, results_file.rows  # what broke the error rule
    timed = {
        who: Timed(x.loop, device, {"forward": 1, "forward + backward": 1})
        for who, x in loops.items()
    }
    for _ in range(TRIES):
        assert sample_in_turn(list(timed.values()), ROUNDS, 60) == [None, None]
        # the fastest of calls in turn: what a shared machine adds is not the code's
        fastest = {
            direction: [min(timed[who].samples[direction]) for who in ("ours", "unfused")]
            for direction in ("forward", "forward + backward")
        }
        if all(ours <= unfused for ours, unfused in fastest.values()):
            return
    pytest.fail(f"seconds of ours and unfused: {fastest}")
