#!/usr/bin/env python3
"""One run on a GPU, with the Python that runs this: the tests, the benchmark, the counters and
the sanitizer.

    .ci/gpu.py [--seconds 570] [--tune] [--rehearse]

Nothing is fetched or installed. The CUDA object is built for this GPU, in place, where a toolkit
is found; without it a line says why its part is left out. While the tests run, other processes
compile what the benchmark will need. Logs and rows go to benchmarks/results, and to the folder OUT
names, if it does. A failure of the tests does not keep the benchmark from running; the exit code
tells of both.
The counters are Nsight Compute's; without it a line says so. `--tune` times layouts instead, for
the whole time, into benchmarks/results/gpu-tuned.json. `--rehearse` goes through the same steps
without a GPU, on toy sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TRY_AGAIN = 75  # of benchmarks.gpu: go on in another process
TEST_SHARE = 0.5  # of the seconds, at most
TEST_PROCESSES = 6
WARM_PROCESSES = 8
SHOWN_LINES = 10, 130  # of the logs of the tests and of the benchmark, which ends with its tables
COUNTERS = 75  # seconds for them, after the benchmark
SANITIZER = 60  # and for that, at the end
SANITIZERS = ("memcheck", "racecheck")
CUDA_PROCESSES = 4  # for the tests of the CUDA object
MARGIN = 15  # seconds for the end of processes and for copies


class Session:
    def __init__(self, seconds: float, rehearse: bool) -> None:
        self.ends = time.monotonic() + seconds
        self.rehearse = rehearse
        self.started = time.time()
        self.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        if rehearse:
            self.environment |= {"SWIN_KERNELS_REHEARSE": "1", "TRITON_INTERPRET": "1"}
        RESULTS.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line of a module."""
        if self.rehearse:
            return [
                sys.executable,
                "tests/support/interpreted.py",
                module,
                "--rehearse",
                *arguments,
            ]
        return [sys.executable, "-m", module, *arguments]

    def benchmark(self, *arguments: str) -> list[str]:
        return self.command("benchmarks.gpu", *arguments)

    def start(self, command: list[str], log: Path, **more: str) -> subprocess.Popen:
        """A process with a session of its own, so that its children end with it."""
        print(f"+ {' '.join(command)} > {log.relative_to(ROOT)}", flush=True)
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment | more,
                start_new_session=True,
            )

    def wait(self, process: subprocess.Popen, seconds: float) -> int:
        """Its exit code; 124 if it was ended after `seconds`. Results are copied meanwhile."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                return process.wait(min(5, max(0.1, ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                self.copy()
        self.stop(process)
        return 124

    @staticmethod
    def stop(process: subprocess.Popen) -> None:
        """Interrupted first, so that it may say what it has; then ended with its children."""
        if process.poll() is not None:
            return
        for how, whom in ((signal.SIGINT, os.kill), (signal.SIGTERM, os.killpg)):
            if process.poll() is not None:
                break
            try:
                whom(process.pid, how)
                process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        with contextlib.suppress(ProcessLookupError):  # children that outlast it, or it itself
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)

    def copy(self) -> None:
        """What this run wrote, to OUT."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for path in RESULTS.rglob("gpu-*"):
            if path.stat().st_mtime >= self.started - 1:
                copy = self.out / path.relative_to(RESULTS)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)


def show(log: Path, lines: int) -> None:
    text = log.read_text(errors="replace") if log.exists() else ""
    print("\n".join(text.splitlines()[-lines:]), flush=True)


def fresh(name: str) -> Path:
    path = RESULTS / name
    path.unlink(missing_ok=True)
    return path


# -v: a run that is cut short has named what it ran
PYTEST = [sys.executable, "-m", "pytest", "-v", "-ra", "--tb=short", "-p", "no:cacheprovider"]


def test_command(rehearse: bool, part: str) -> list[str]:
    command = [*PYTEST, "--part", part]
    return [*command, "tests/gpu"] if rehearse else [*command, "--device", "cuda"]


def cuda_test_command(rehearse: bool, part: str) -> list[str]:
    command = [*PYTEST, "--part", part]
    if rehearse:
        return [*command, "--emulate-cuda", "tests/contract/test_geometry.py"]
    return [*command, "--device", "cuda", "--backend", "cuda"]


def build_command(rehearse: bool) -> list[str]:
    """Builds `_C_cuda` for the GPU at hand; rehearsed, the program of the emulator's tests."""
    if rehearse:
        build = "import sys; sys.path.insert(0, 'tests'); import cuda_emulator; "
        return [sys.executable, "-c", f"{build}cuda_emulator.build_checks()"]
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def sanitizer_command(rehearse: bool, tool: str) -> list[str]:
    if rehearse:
        return [sys.executable, "tests/support/cuda_sanitized.py", "--emulate"]
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    return [program, *options, sys.executable, "tests/support/cuda_sanitized.py"]


def run(session: Session) -> int:
    warm_log, bench_log = fresh("gpu-warm.log"), fresh("gpu-benchmark.log")
    count = 1 if session.rehearse else WARM_PROCESSES
    parts = 2 if session.rehearse else TEST_PROCESSES
    warming = [
        # each compiles in its own process alone, as there are several
        session.start(
            session.benchmark("--warm", f"{i}/{count}"), warm_log, TORCHINDUCTOR_COMPILE_THREADS="1"
        )
        for i in range(count)
    ]
    tests: dict[Path, subprocess.Popen] = {}
    if not session.rehearse:
        for old in ROOT.glob("swin_kernels/_C_cuda*.so"):  # of other sources, or for another GPU
            old.unlink()
    building = session.start(
        build_command(session.rehearse), fresh("gpu-build.log"), **for_this_gpu(session)
    )
    try:
        test_ends = time.monotonic() + TEST_SHARE * session.left()
        for i in range(parts):
            log = fresh(f"gpu-tests-{i}.log")
            tests[log] = session.start(test_command(session.rehearse, f"{i}/{parts}"), log)
        build_code = session.wait(building, max(0.1, test_ends - time.monotonic()))
        if build_code:
            show(RESULTS / "gpu-build.log", SHOWN_LINES[0])
            print("the CUDA object was not built: its part is left out", flush=True)
        for i in range(0 if build_code else 1 if session.rehearse else CUDA_PROCESSES):
            log = fresh(f"gpu-cuda-tests-{i}.log")
            part = f"{i}/{1 if session.rehearse else CUDA_PROCESSES}"
            tests[log] = session.start(
                cuda_test_command(session.rehearse, part), log, TRITON_INTERPRET=""
            )
        codes = [session.wait(x, max(0.1, test_ends - time.monotonic())) for x in tests.values()]
        test_code = next(filter(None, codes), 0)
        for log in tests:
            show(log, SHOWN_LINES[0])
        print(f"tests: exit codes {codes}", flush=True)
        # no more: with cold caches too the benchmark has time for what matters most
        warm_ends = time.monotonic() + 0.3 * session.left()
        for process in warming:
            session.wait(process, max(0.1, warm_ends - time.monotonic()))
    finally:
        for process in (*warming, building, *tests.values()):
            session.stop(process)
    print(f"warm after {session.left():.0f} s before the end", flush=True)
    rows = rows_file(session)
    code, attempts, least = TRY_AGAIN, 0, 2 * MARGIN + COUNTERS + SANITIZER
    while (code == TRY_AGAIN or code < 0) and attempts < 4 and session.left() > least:
        budget = session.left() - MARGIN - COUNTERS - SANITIZER
        arguments = ["--budget", f"{budget:.0f}", "--csv", str(rows)]
        if attempts:
            arguments.append("--resume")
        process = session.start(session.benchmark(*arguments), bench_log)
        code = session.wait(process, budget + MARGIN / 2)
        attempts += 1
    if not attempts:
        print(f"benchmark: no time left for it, of {least} s that it takes at least", flush=True)
    show(bench_log, SHOWN_LINES[1])
    take_counters(session)
    faults = 0 if build_code else sanitize(session)
    session.copy()
    print(
        f"build: exit code {build_code}; tests: exit code {test_code}; "
        f"benchmark: exit code {code}; sanitizer: {faults} failed",
        flush=True,
    )
    return 1 if build_code or test_code or code or faults else 0


def for_this_gpu(session: Session) -> dict[str, str]:
    """What setup.py is told: to build the CUDA object or fail, for the architecture at hand."""
    if session.rehearse:
        return {}
    ask = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    answer = subprocess.run(
        [sys.executable, "-c", ask], check=False, capture_output=True, text=True
    )
    return {"SWIN_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": answer.stdout.strip() or "9.0"}


def sanitize(session: Session) -> int:
    """How many of compute-sanitizer's tools failed; where it is missing or refuses the device, that
    is no failure, and a line says so."""
    processes = {}
    for tool in SANITIZERS:
        command = sanitizer_command(session.rehearse, tool)
        if not session.rehearse and not os.path.exists(command[0]):
            print("sanitizer: compute-sanitizer is not there", flush=True)
            return 0
        log = fresh(f"gpu-{tool}.log")
        processes[log] = session.start(command, log, TRITON_INTERPRET="", PYTHONPATH=f"{ROOT}")
    faults = 0
    for log, process in processes.items():
        code = session.wait(process, max(0.1, session.left() - MARGIN / 2))
        show(log, SHOWN_LINES[0])
        print(f"sanitizer: {log.stem}: exit code {code}", flush=True)
        refused = "not supported" in log.read_text(errors="replace")
        faults += code != 0 and not refused
    return faults


def take_counters(session: Session) -> None:
    """What Nsight Compute counts; where it is missing or refused, that is no failure."""
    log = fresh("gpu-counters.log")
    process = session.start(session.command("benchmarks.gpu_tools.counters"), log)
    code = session.wait(process, max(0.1, session.left() - MARGIN / 2 - SANITIZER))
    show(log, SHOWN_LINES[0])
    print(f"counters: exit code {code}", flush=True)


def tune(session: Session) -> int:
    """Layouts, timed for as long as there is time."""
    log, table = fresh("gpu-tune.log"), fresh("gpu-tuned.json")
    arguments = ["--budget", f"{session.left() - 2 * MARGIN:.0f}", "--out", str(table)]
    process = session.start(session.command("benchmarks.gpu_tools.tune", *arguments), log)
    code = session.wait(process, session.left() - MARGIN / 2)
    session.copy()
    show(log, SHOWN_LINES[1])
    print(f"tuning: exit code {code}; layouts: {table.relative_to(ROOT)}", flush=True)
    return code


def rows_file(session: Session) -> Path:
    """Named after the device and the date by a process that has them."""
    device = "DryRunDevice" if session.rehearse else "Cuda"
    ask = (
        "from benchmarks.report.rows import facts_of, file_name; "
        f"from benchmarks.device import {device} as Device; print(file_name(facts_of(Device())))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=ROOT,
        env=session.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = answer.stdout.split()
    if answer.returncode or not lines:
        print(answer.stderr, flush=True)
    return RESULTS / (lines[-1] if lines else "gpu-unknown.csv")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=570, help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--tune", action="store_true", help="time layouts, and nothing else")
    options = parser.parse_args()
    session = Session(options.seconds, options.rehearse)
    try:
        return tune(session) if options.tune else run(session)
    finally:
        session.copy()


if __name__ == "__main__":
    raise SystemExit(main())
