"""One run on a borrowed GPU: stages in turn, none past its end, results on disk as they come.

    python -m benchmarks.gpu_tools.driver A [--built FOLDER] [--commit NAME] [--out FOLDER]
    python -m benchmarks.gpu_tools.driver B …                 [--rehearse]

The stages are those of `stages.py`. Nothing is fetched or installed; the standard library is all
that this process imports. A stage that is done early leaves its seconds to the next; one that
hangs is ended, one that crashes is noted, and the next begins in a process of its own. What it
prints goes to log.txt, its rows to rows.csv, in --out (else in the folder that OUT names, else in
benchmarks/results/gpu-run-A, rehearsed in build); the table, from those rows, comes last. Where
nothing can be written any more, what the stages printed is shown instead. Exit code: 0; 1 where a
stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_tools.stages import RUNS, SECONDS, Stage, Target
from benchmarks.gpu_tools.summary import summary_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results/gpu-run"
REHEARSED = 10.0  # times as long as on a GPU each stage may take on a CPU
STOPPING = 3.0  # seconds, of those of a stage, to end what does not end by itself
MOST_CHARACTERS = 11_500  # of the table: 12,000 come back
KEPT_LINES = 400  # of what the stages print, in memory


class Log:
    """What the stages print: at the end of a file, and its last lines in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.failure = path, deque[str](maxlen=KEPT_LINES), ""
        self.lock = threading.Lock()

    def write(self, line: str) -> None:
        with self.lock:
            self.lines.append(line)
            try:
                with self.path.open("a") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk ends no stage
                self.failure = f"{self.path.name}: {error.strerror}"

    def follow(self, process: subprocess.Popen[str]) -> threading.Thread:
        """Writes the lines of a process until it and its children have closed their end."""
        assert process.stdout is not None
        stream = process.stdout

        def copy() -> None:
            for line in stream:
                self.write(line.rstrip("\n"))

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread


def stop(processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Interrupts them, so that each may finish its row; then ends them with their children."""
    for how in (signal.SIGINT, signal.SIGTERM):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, how)
        ends = time.monotonic() + seconds / 3
        while time.monotonic() < ends and any(p.poll() is None for p in processes):
            time.sleep(0.05)
    for process in processes:  # children that outlast it, or it itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits in a driver stays
            process.wait(seconds / 6)


class Driver:
    """Runs stages; `slower` is by how much more time each has, where there is no GPU."""

    def __init__(self, name: str, out: Path, slower: float = 1.0) -> None:
        self.name, self.out, self.slower = name, out, slower
        self.started = time.monotonic()
        self.done: list[dict[str, object]] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = Log(out / "log.txt")

    def elapsed(self) -> float:
        return (time.monotonic() - self.started) / self.slower

    def run(self, stages: Sequence[Stage], environment: dict[str, str]) -> int:
        """The stages, then the table; how many stages failed."""
        for stage in stages:
            self._run(stage, environment)
            self._note()
        table = self.table()
        self.log.write(table)
        print(table, flush=True)
        return sum(bool(x["failed"]) for x in self.done)

    def _run(self, stage: Stage, environment: dict[str, str]) -> None:
        begun = self.elapsed()
        print(f"{begun:5.1f} s: {stage.name}", flush=True)
        self.log.write(f"=== {stage.name}, {begun:.1f} to {stage.ends} s")
        left = (stage.ends - begun) * self.slower
        ends = time.monotonic() + max(0.0, left - STOPPING)
        processes = [self._start(command, environment, left) for command in stage.commands]
        threads = [self.log.follow(process) for process in processes]
        while time.monotonic() < ends and any(p.poll() is None for p in processes):
            time.sleep(0.05)
        late = any(p.poll() is None for p in processes)
        stop(processes, STOPPING)
        for thread in threads:
            thread.join(0.5)
        codes = [process.returncode for process in processes]
        record = {"stage": stage.name, "began": round(begun, 1), "ended": round(self.elapsed(), 1)}
        failed = (late or any(codes)) and not stage.may_fail
        self.done.append(record | {"exit_codes": codes, "out_of_time": late, "failed": failed})

    def _start(
        self, command: Sequence[str], environment: dict[str, str], left: float
    ) -> subprocess.Popen[str]:
        """In a session of its own, so that its children end with it."""
        seconds = f"{max(1.0, left - 2 * STOPPING):.0f}"
        command = [seconds if x == SECONDS else x for x in command]
        self.log.write("+ " + shlex.join(command))
        if shutil.which(command[0]) is None:
            self.log.write(f"{command[0]}: not found")
            command = [sys.executable, "-c", "raise SystemExit(127)"]  # as a shell ends
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _note(self) -> None:
        """After each stage, so that a run cut short says how far it came."""
        with contextlib.suppress(OSError):
            text = json.dumps({"run": self.name, "stages": self.done}, indent=1)
            (self.out / "stages.json").write_text(text + "\n")

    def table(self) -> str:
        text = summary_of(self.out, self.done)
        if self.log.failure:
            said = "\n".join(self.log.lines)
            text = f"NOT WRITTEN: {self.log.failure}; the last lines instead\n{said}\n{text}"
        if len(text) > MOST_CHARACTERS:
            left_out = len(text) - MOST_CHARACTERS
            text = f"[{left_out} characters more in log.txt]\n{text[-MOST_CHARACTERS:]}"
        return text


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if options.commit:
        own["SWIN_KERNELS_COMMIT"] = options.commit
    if options.rehearse:
        own |= {"SWIN_KERNELS_REHEARSE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=RUNS, help="A, of 240 s at most, or B, of 420")
    parser.add_argument("--built", type=Path, help="folder of _C_cpu and _C_cuda, built before")
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--out", type=Path, help="folder of the results; else OUT's")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    options = parser.parse_args(arguments)
    if options.built is not None and not list(options.built.glob("_C_cuda*.so")):
        parser.error(f"--built {options.built}: expected a folder with _C_cuda*.so in it")
    where = f"build/gpu-rehearsal-{options.run}" if options.rehearse else f"{RESULTS}-{options.run}"
    out = (options.out or Path(os.environ.get("OUT") or ROOT / where)).resolve()
    for old in (out / "rows.csv", out / "log.txt"):
        old.unlink(missing_ok=True)
    if options.built is not None:
        for built in options.built.glob("_C_*.so"):
            shutil.copy(built, ROOT / "swin_kernels" / built.name)
    target = Target(out, options.rehearse)
    driver = Driver(options.run, out, slower=REHEARSED if options.rehearse else 1.0)
    if options.rehearse:
        print(f"rehearsed on a CPU: one second below is {REHEARSED:.0f} of the clock's", flush=True)
    return int(driver.run(RUNS[options.run](target), environment_of(options)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
