"""What a profiler counts of our launches: read from its page, joined with what was launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import ROOT, run_python

pytest.importorskip("triton", reason="what is profiled are Triton's kernels")

from ncu_stand_in import page
from tiers import thorough

from benchmarks.gpu_tools import counters
from benchmarks.report.counted import read

pytestmark = pytest.mark.slow

STAND_IN = ROOT / "tests" / "support" / "ncu_stand_in.py"


def test_counters_are_read_with_their_units():
    ((kernel, values),) = counters.read_profile(page("_single_tile_fwd_kernel"))
    row = counters.counted("T1 shift 3", "forward", kernel, values)
    assert kernel == "_single_tile_fwd_kernel"
    assert row.microseconds == pytest.approx(80)
    assert row.memory_percent == 61.5
    assert row.memory_bytes == pytest.approx(320e6)
    assert row.instructions == 1234567
    assert row.stalls == "long scoreboard 5.50, wait 2.00, barrier 1.25"
    assert row.l2_hit_percent is None


def test_a_profile_of_other_launches_is_refused():
    launched = [("T1 shift 3", "forward", "_single_tile_fwd_kernel")]
    with pytest.raises(RuntimeError, match=r"1 launches ran.*_table_grad_kernel"):
        counters.joined(launched, page("_table_grad_kernel"))
    assert len(counters.joined(launched, page("_single_tile_fwd_kernel"))) == 1


def profiler(folder: Path, body: str) -> Path:
    path = folder / "ncu"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return path


def rehearsed(ncu: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = ("-m", "benchmarks.gpu_tools.counters", "--rehearse", "--ncu", ncu)
    return run_python(*command, *arguments, code=code, OMP_NUM_THREADS="1")


@thorough(
    "test_counters.py::test_counters_are_read_with_their_units",
    "test_counters.py::test_a_profiler_that_gives_nothing_is_quoted",
)
def test_rehearsal_counts_every_launch_of_a_training_step(tmp_path):
    path, raw = tmp_path / "rows.csv", tmp_path / "raw.csv"
    cases = ("--cases", "toy", "toy tiles")
    done = rehearsed(STAND_IN, *cases, "--csv", path, "--raw", raw)
    rows, facts = read(path)
    ran = {row[:3] for row in rows}
    assert ("toy", "forward", "_single_tile_fwd_kernel") in ran
    assert ("toy", "backward", "_single_tile_bwd_kernel") in ran
    assert ("toy tiles", "backward", "_tiled_dbias_kernel") in ran
    assert all(row.microseconds == 80 for row in rows)
    assert {"machine", "torch", "triton", "commit", "date"} <= facts.keys()
    assert "long scoreboard" in done.stdout
    pages = raw.read_text().split("toy tiles\n")
    assert sum(len(list(counters.read_profile(x))) for x in pages) == len(rows)


def test_a_profiler_that_gives_nothing_is_quoted(tmp_path):
    failing = profiler(tmp_path, "print('==ERROR== LibraryNotLoaded')\nraise SystemExit(9)")
    told = rehearsed(failing, code=1).stderr
    assert all(x in told for x in ("nothing was counted", "exit code 9", "LibraryNotLoaded"))


def test_without_a_profiler_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    monkeypatch.setattr(counters.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(counters.Path, "exists", lambda self: False)
    assert counters.main(["--rehearse"]) == 2
    assert "--ncu" in capsys.readouterr().err
