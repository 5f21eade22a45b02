"""The driver of `make gpu`: its clock, and what is left of a run in which a stage goes wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_tools import driver as module
from benchmarks.gpu_tools.driver import MOST_CHARACTERS, STOPPING, Driver
from benchmarks.gpu_tools.stages import RUNS, SECONDS, Stage, Target

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"A": 240, "B": 420}


def python(body: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", body, *arguments)


# a row of a benchmark, by the program that writes them
ROW = """\
import sys
from pathlib import Path
from benchmarks.report.rows import ResultsFile, Row
file = ResultsFile(Path(sys.argv[1]), {"commit": "x"}, resume=True)
file.add(Row(sys.argv[2], "ours", "forward", 12.5, samples=3, error=0.5))
"""


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out, capsys):
    """Runs stages; the exit code, and what was printed."""

    def run(*stages: Stage, driver: Driver | None = None) -> tuple[int, str]:
        failed = (driver or Driver("A", out)).run(stages, {**os.environ, "PYTHONPATH": str(ROOT)})
        return failed, capsys.readouterr().out

    return run


def row(out: Path, case: str) -> tuple[str, ...]:
    return python(ROW, str(out / "rows.csv"), case)


def cases_of(out: Path) -> list[str]:
    with (out / "rows.csv").open(newline="") as file:
        return [line["case"] for line in csv.DictReader(file)]


def stages_of(out: Path) -> list[dict]:
    return json.loads((out / "stages.json").read_text())["stages"]


def test_rows_before_and_after_a_stage_that_crashes_are_there(run, out):
    crash = python("import os, signal; print('before'); os.kill(os.getpid(), signal.SIGSEGV)")
    failed, told = run(
        Stage("first", 60, (row(out, "one"),)),
        Stage("crashing", 61, (crash,)),
        Stage("last", 120, (row(out, "two"),)),
    )
    assert failed == 1
    assert cases_of(out) == ["one", "two"]
    assert [x["exit_codes"] for x in stages_of(out)] == [[0], [-signal.SIGSEGV], [0]]
    assert "one, forward: ours 12.5 (error 0.5)" in told
    assert "crashing: " in told
    assert "before" in (out / "log.txt").read_text()


def test_a_stage_that_may_fail_does_not_fail_the_run(run, out):
    failing = (python("raise SystemExit(3)"),)
    failed, told = run(Stage("TF32", 60, failing, may_fail=True), Stage("other", 90, failing))
    assert failed == 1
    assert [x["exit_codes"] for x in stages_of(out)] == [[3], [3]]
    assert "exit codes [3]" in told


def test_a_program_that_is_missing_fails_its_stage_alone(run, out):
    failed, _ = run(
        Stage("checked", 60, (("no-such-sanitizer", "--tool"), python("print('beside')"))),
        Stage("next", 90, (row(out, "after"),)),
    )
    assert failed == 1
    assert stages_of(out)[0]["exit_codes"] == [127, 0]
    assert cases_of(out) == ["after"]
    assert "no-such-sanitizer: not found" in (out / "log.txt").read_text()


def test_a_stage_that_hangs_ends_in_time_with_its_children(run, out, tmp_path):
    """Deaf to interrupts, with a child that is too."""
    deaf = (
        "import os, signal, time, sys\n"
        "for x in (signal.SIGINT, signal.SIGTERM): signal.signal(x, signal.SIG_IGN)\n"
        "while os.fork():\n"
        "    time.sleep(600)\n"
        "while True:\n"
        "    open(sys.argv[1], 'a').write('alive')\n"
        "    time.sleep(0.05)\n"
    )
    start = time.monotonic()
    failed, told = run(
        Stage("hanging", 5, (python(deaf, str(tmp_path / "child")),)),
        Stage("next", 60, (row(out, "after"),)),
    )
    assert failed == 1
    hanging, after = stages_of(out)
    assert hanging["out_of_time"]
    assert hanging["ended"] <= 5.5
    assert after["began"] <= 5.5
    assert cases_of(out) == ["after"]
    assert "hanging: 0.0 to " in told
    assert "OUT OF TIME" in told
    assert time.monotonic() - start < 60
    written = (tmp_path / "child").read_text()
    time.sleep(0.5)
    assert written == (tmp_path / "child").read_text()


def test_an_interrupted_stage_may_finish_what_it_writes(run, out):
    body = (
        "import time, sys\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: print('finished the row', flush=True)\n"
    )
    run(Stage("long", 5, (python(body),)))
    assert "finished the row" in (out / "log.txt").read_text()
    assert stages_of(out)[0]["ended"] < 4.5


def test_seconds_left_unused_go_to_the_next_stage(run, out):
    ends = {"first": 100, "second": 130}
    told = {name: python("import sys; print('given', sys.argv[1])", SECONDS) for name in ends}
    run(*(Stage(name, end, (told[name],)) for name, end in ends.items()))
    given = [
        float(line.split()[1])
        for line in (out / "log.txt").read_text().splitlines()
        if line.startswith("given")
    ]
    assert given[0] == pytest.approx(100 - 2 * STOPPING, abs=2)
    assert given[1] == pytest.approx(130 - 2 * STOPPING, abs=4)


def test_a_full_disk_leaves_what_was_printed(out):
    """No file takes a byte; the stages go on, and their rows are in the output."""
    program = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu_tools.driver import Driver\n"
        "from benchmarks.gpu_tools.stages import Stage\n"
        "out, row = Path(sys.argv[1]), sys.argv[2]\n"
        "driver = Driver('A', out)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "one = (sys.executable, '-c', row, str(out / 'rows.csv'), 'kept')\n"
        "two = (sys.executable, '-c', 'print(\"goes on\")')\n"
        "driver.run([Stage('first', 60, (one,)), Stage('second', 90, (two,))], dict(os.environ))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run(
        python(program, str(out), ROW),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "NOT WRITTEN: log.txt: File too large" in told
    assert "'case': 'kept', 'provider': 'ours', 'direction': 'forward', 'median_us': '12.5'" in told
    assert "goes on" in told


@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_cut_after_any_stage_leaves_what_was_measured(out, cut):
    """The driver itself is killed, as a machine that is taken away does it."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from benchmarks.gpu_tools.driver import Driver\n"
        "from benchmarks.gpu_tools.stages import Stage\n"
        "import os\n"
        f"out, row = Path({str(out)!r}), {ROW!r}\n"
        "one = lambda i: (sys.executable, '-c', row, str(out / 'rows.csv'), f'case {i}')\n"
        f"wait = (sys.executable, '-c', 'import time; print(7, flush=True); time.sleep(600)')\n"
        f"stages = [Stage(f'stage {{i}}', 60 + i, (one(i),)) for i in range({cut})]\n"
        "Driver('A', out).run([*stages, Stage('cut', 600, (wait,))], dict(os.environ))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        python(program), cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        ends = time.monotonic() + 120
        while not (out / "log.txt").exists() or "\n7\n" not in (out / "log.txt").read_text():
            assert time.monotonic() < ends, "the last stage was not reached"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert cases_of(out) == [f"case {i}" for i in range(cut)]
    assert [x["stage"] for x in stages_of(out)] == [f"stage {i}" for i in range(cut)]


def test_the_table_stays_within_what_comes_back(run, out, monkeypatch):
    monkeypatch.setattr(module, "summary_of", lambda *_: "first\n" + "x" * 50_000 + "\nlast")
    _, told = run(Stage("one", 60, (python("print('done')"),)))
    assert len(told) < MOST_CHARACTERS + 200
    assert told.rstrip().endswith("last")
    assert "characters more in log.txt]" in told


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rehearse", [False, True], ids=["real", "rehearsed"])
def test_stages_end_in_order_within_the_limit_and_name_what_is_there(name, rehearse, out):
    stages = RUNS[name](Target(out, rehearse))
    ends = [stage.ends for stage in stages]
    assert ends == sorted(set(ends))
    assert ends[-1] <= LIMITS[name] - 8  # the table, and the end of processes
    written = set()
    for stage in stages:
        for command in stage.commands:
            for place, word in enumerate(command):
                if word == "-m" and command[place + 1] != "pytest":
                    parts = command[place + 1].split(".")
                    assert (ROOT.joinpath(*parts).with_suffix(".py")).exists(), command
                if word.startswith("tests/"):
                    assert (ROOT / word).exists(), command
                if word.startswith(str(out)):
                    written.add(word)
    # log.txt and stages.json, and the rows of every layout
    assert len(written) + 2 + (name == "A") <= 8


@pytest.mark.parametrize("name", RUNS)
def test_nothing_runs_beside_what_is_timed(name, out):
    """Several commands at once only where all compile or test."""
    for stage in RUNS[name](Target(out, rehearse=False)):
        if len(stage.commands) > 1:
            words = [set(command) for command in stage.commands]
            untimed = {
                "--warm",
                "pytest",
                "benchmarks.gpu_tools.cuda_build",
                "racecheck",
                "memcheck",
            }
            assert all(command & untimed for command in words), stage


def test_an_object_that_is_missing_is_said_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["A", "--built", str(tmp_path)])
    assert "expected a folder with _C_cuda*.so in it" in capsys.readouterr().err
