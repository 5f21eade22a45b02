"""Both runs of `make gpu`, from end to end on a CPU: a device made up, kernels interpreted."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="what is rehearsed are Triton's kernels")
pytest.importorskip("timm", reason="whole models are timm's")

from benchmarks.baselines import providers
from benchmarks.gpu_tools import checks
from benchmarks.gpu_tools.driver import MOST_CHARACTERS
from benchmarks.gpu_tools.stages import RUNS, TOYS, Target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# what comes back from a borrowed machine
MOST_FILES, MOST_BYTES, DEEPEST = 8, 16 << 20, 2
FILES = {
    "A": {
        "checks.csv",
        "rows.csv",
        "counters.csv",
        "ncu-raw.csv",
        "tuned.json",
        "tuning/tuned.csv",
    },
    "B": {"rows.csv", "kernels.txt"},
}


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_of_a_run_ends_well_and_leaves_its_results(name, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "SWIN_KERNELS_BACKEND"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu_tools.driver",
            name,
            "--rehearse",
            "--commit",
            "abc",
        ],
        cwd=ROOT,
        env=environment | {"OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, log[-5000:] + done.stderr
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [x["stage"] for x in stages] == [x.name for x in RUNS[name](Target(tmp_path, True))]
    assert not any(x["failed"] or x["out_of_time"] for x in stages), stages

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(x.relative_to(tmp_path)) for x in files} == FILES[name] | {"log.txt", "stages.json"}
    assert len(files) <= MOST_FILES
    assert all(x.stat().st_size < MOST_BYTES for x in files)
    assert all(len(x.relative_to(tmp_path).parts) <= DEEPEST + 1 for x in files)

    rows = lines_of(tmp_path / "rows.csv")
    assert {row["commit"] for row in rows} == {"abc"}
    timed = {(row["case"], row["provider"]) for row in rows if row["median_us"]}
    table = done.stdout[-MOST_CHARACTERS:]
    assert "\n== stages, s\n" in table
    if name == "A":
        providers = ("ours", "ours, graph", "unfused", "sdpa")
        assert timed >= {(case, provider) for case in TOYS for provider in providers}
        assert timed >= {("toy model, batch 3", form) for form in ("stock", "patched")}
        checks = lines_of(tmp_path / "checks.csv")
        assert {row["provider"] for row in checks} == {"plain launch", "fast path"}
        assert all(float(row["error"]) <= 2.5 and not row["note"] for row in checks)
        assert "toy tiles, fast path, backward: error " in table
    else:
        forms = [f"{a}, {b}" for a in ("stock", "patched") for b in ("compiled", "max-autotune")]
        assert timed >= {("toy model, batch 3", form) for form in forms}
        assert (TOYS[0], "compiled unfused") in timed
        assert "25 cases ran, forward and backward" in log
        assert "\n== tests\n" in table
        assert " passed" in table
        kernels = (tmp_path / "kernels.txt").read_text()
        assert "toy model, batch 3: patched, compiled: training step" in kernels


def test_a_case_that_is_wrong_or_ends_its_process_is_a_row(tmp_path, monkeypatch):
    """Wrong results, other bits the second time, a process that dies; and one that is right."""
    calls: list[int] = []

    def ours(case, device):
        attend = providers.ours(case, SimpleNamespace(backend="cpu"))
        if case.cosine:
            os._exit(9)
        if len(case.size) == 3:
            return lambda *leaves: attend(*leaves) * 1.1
        if case.head_dim == 30:
            return lambda *leaves: (calls.append(1), attend(*leaves) + len(calls) * 1e-6)[1]
        return attend

    path = tmp_path / "checks.csv"
    monkeypatch.setattr(checks, "ours", ours)
    assert checks.main(["--rehearse", "--csv", str(path)]) == 1
    notes = {(row["case"], row["direction"]): row["note"] for row in lines_of(path)}
    assert notes["toy tiles", "forward"] == "the process ended with exit code 9"
    assert notes["toy 3-D", "forward"].startswith("AssertionError: ")
    assert notes["toy unshifted, d30", "forward"].startswith("run 2 gave other bits")
    assert notes["toy", "backward"] == ""
