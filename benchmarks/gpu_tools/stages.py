"""The stages of the two runs on a GPU: what each runs, and the second by which it is ended."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SECONDS = "{seconds}"  # in a command: those that its stage has, less what it takes to end it
Command = tuple[str, ...]


class Stage(NamedTuple):
    name: str
    ends: int  # seconds after the run began
    commands: tuple[Command, ...]  # side by side: more than one only where nothing is timed
    may_fail: bool = False  # a failure is in the table, and the run's exit code stays 0


class Target(NamedTuple):
    """Where a run writes, and on what it runs."""

    out: Path
    rehearse: bool

    def module(self, name: str, *arguments: str) -> Command:
        if self.rehearse:
            return (
                sys.executable,
                "tests/support/interpreted.py",
                name,
                "--rehearse",
                *arguments,
            )
        return (sys.executable, "-m", name, *arguments)

    def benchmark(self, *arguments: str) -> Command:
        rows = ("--csv", str(self.out / "rows.csv"), "--resume", "--budget", SECONDS)
        return self.module("benchmarks.gpu", *rows, *arguments)

    def named(self, *real: str, toys: tuple[str, ...] = ("toy",)) -> tuple[str, ...]:
        """Names of cases or models; rehearsed, those of toys."""
        return toys if self.rehearse else real

    def tests(self, *arguments: str) -> Command:
        """-v: a run that is cut short has named what it ran."""
        pytest = (
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-ra",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        )
        if self.rehearse:
            return ("env", "TRITON_INTERPRET=1", *pytest, *arguments)
        return (*pytest, "--device", "cuda", *arguments)


STAGES_OF_T = ("T1 shift 3", "T2 shift 3", "T3 shift 3", "T4 shift 0", "B1 shift 3")
TOYS = ("toy 3-D", "toy tiles")  # whole windows, and tiles with cosine attention


def run_a(target: Target) -> list[Stage]:
    """Right and fast in four minutes: attention, its counters, one model, eager."""
    out = target.out
    eager = ("--providers", "ours", "ours, graph", "unfused", "sdpa")
    counters = ("--csv", str(out / "counters.csv"), "--raw", str(out / "ncu-raw.csv"))
    counted = target.named("T1 shift 3", "V2 w16 stage 1", "T4 shift 0", toys=TOYS[:1])
    if target.rehearse:
        counters += ("--ncu", "tests/support/ncu_stand_in.py")
    fields = ("--fields", "programs_per_multiprocessor", "loop_stages")
    table = ("--out", str(out / "tuned.json"), "--budget", SECONDS)
    return [
        Stage(
            "correctness",
            35,  # 20, and as much again for imports from a disk that is cold
            (target.module("benchmarks.gpu_tools.checks", "--csv", str(out / "checks.csv")),),
        ),
        Stage(
            "attention, eager and replayed",
            105,
            (
                target.benchmark(
                    "--cases", *target.named(*STAGES_OF_T, toys=TOYS), "--models", *eager
                ),
            ),
        ),
        Stage(
            "counters",
            140,
            (target.module("benchmarks.gpu_tools.counters", *counters, "--cases", *counted),),
        ),
        Stage(
            "swin_tiny, eager",
            185,
            (
                target.benchmark(
                    *("--cases", "--models", *target.named("swin_tiny")),
                    *("--forms", "stock", "patched"),
                ),
            ),
        ),
        Stage(
            "layouts",
            230,
            (
                target.module(
                    "benchmarks.gpu_tools.tune",
                    *("--cases", *target.named("T1 shift 3", "T4 shift 0", toys=TOYS[:1])),
                    *fields,
                    *table,
                ),
            ),
        ),
    ]


def run_b(target: Target) -> list[Stage]:
    """Compiled models and peers, then the contract, in seven minutes."""
    compiled = ("--forms", "stock, compiled", "patched, compiled")
    autotuned = ("--forms", "stock, max-autotune", "patched, max-autotune")
    models = target.named("swin_tiny", "swin_base")
    peers = ("--providers", "ours, CUDA C++", "ours, CUDA C++, graph", "compiled unfused", "flex")
    warm = [
        target.benchmark("--warm", "--cases", "--models", *target.named(model), "--forms", form)
        for form in (*compiled[1:], *autotuned[1:])
        for model in (("swin_tiny",) if "max" in form else ("swin_tiny", "swin_base"))
    ]
    warm.append(
        target.benchmark(
            "--warm", "--cases", *target.named("T1 shift 3", toys=TOYS[:1]), "--models", *peers
        )
    )
    one_at_a_time = "large or beyond_32_bits"
    everything = f"not {one_at_a_time.replace(' or ', ' and not ')} and not tf32"
    if target.rehearse:  # all of them take minutes there, and are tests of their own
        contract = (target.tests("tests/gpu", "-k", "default_backend or autocast"),)
        alone = (target.tests("tests/gpu", "-k", "large_batch"),)
        tf32 = (target.tests("tests/gpu", "-k", "tf32 and whole"),)
    else:
        contract = (
            target.tests("-n", "8", "-k", everything),
            target.tests("-n", "4", "-k", everything, "--backend", "cuda"),
        )
        alone = (target.tests("tests/gpu", "-k", one_at_a_time),)
        tf32 = (target.tests("-n", "8", "-k", "tf32"),)
    return [
        Stage(
            "compilation, side by side",
            95,
            (*warm, target.module("benchmarks.gpu_tools.cuda_build")),
        ),
        Stage(
            "models, compiled",
            165,
            (target.benchmark("--cases", "--models", *models, *compiled),),
        ),
        Stage(
            "swin_tiny, max-autotune",
            190,
            (target.benchmark("--cases", "--models", *target.named("swin_tiny"), *autotuned),),
        ),
        Stage(
            "one step by kernel",
            205,
            (
                target.module(
                    "benchmarks.gpu_tools.model_kernels", "--out", str(target.out / "kernels.txt")
                ),
            ),
        ),
        Stage(
            "peers and CUDA C++",
            260,
            (
                target.benchmark(
                    "--cases",
                    *target.named("T1 shift 3", "T4 shift 0", toys=TOYS[:1]),
                    "--models",
                    *peers,
                ),
            ),
        ),
        Stage("the contract, side by side", 375, contract),
        Stage("large tensors", 390, alone),
        Stage("TF32", 400, tf32, may_fail=True),
        Stage("memcheck and racecheck", 412, tuple(_sanitizers(target))),
    ]


def _sanitizers(target: Target) -> Iterator[Command]:
    cases = (sys.executable, "tests/support/cuda_sanitized.py")
    if target.rehearse:
        yield (*cases, "--emulate")
        return
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--error-exitcode", "9", "--target-processes", "application-only")
    for tool in ("memcheck", "racecheck"):
        yield (program, "--tool", tool, *options, *cases)


RUNS: dict[str, Callable[[Target], list[Stage]]] = {"A": run_a, "B": run_b}
