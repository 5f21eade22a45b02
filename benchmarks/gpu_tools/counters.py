"""What Nsight Compute counts of our kernels on a GPU: the first stages of Swin-T, B and L.

    python -m benchmarks.gpu_tools.counters [--cases "T1 shift 3"] [--csv FILE] [--ncu PATH]
                                            [--raw FILE] [--rehearse]

Each kernel of a training step's attention is profiled once, after warm-up, at the clocks as they
are: bytes and the share of the memory's rate, instructions and the share of issue slots, and why
warps waited. Rows are written case by case. Exit code: 0; 1 where the profiler gave nothing; 2
without a GPU or a profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from benchmarks.baselines.providers import ours
from benchmarks.cases import other_cases, swin_cases, toy_cases
from benchmarks.device import Cuda, Device, DryRunDevice
from benchmarks.report.counted import COUNTED, Counted, table_of, write
from benchmarks.report.rows import ROOT, facts_of, file_name, print_table
from benchmarks.timing import Loop, make_inputs
from swin_kernels.backends.triton.launcher import Run
from swin_kernels.testing import Case

FIRST = ("T1 shift 3", "B1 shift 3", "L1 shift 3")
# sections of a profile, so that no name of a counter has to be known to this GPU
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
)
_STALLED = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3}  # base units of time, by version


# of these the first that a profile has
COUNTERS = {
    "microseconds": ("gpu__time_duration.sum", "gpu__time_duration.avg"),
    "memory_percent": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "memory_bytes": ("dram__bytes.sum",),
    "l1_hit_percent": ("l1tex__t_sector_hit_rate.pct",),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "bank_conflicts": (
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
        "l1tex__data_bank_conflicts_pipe_lsu.sum",
    ),
    "instructions": ("smsp__inst_executed.sum", "sm__inst_executed.sum"),
    "issued_per_clock": ("smsp__issue_active.avg.per_cycle_active",),
    "registers": ("launch__registers_per_thread",),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * _MICROSECONDS.get(unit, 1.0)
    except ValueError:  # "n/a"
        return None


def read_profile(text: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and counters of each launch, from what `ncu --csv --page raw` writes."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 2:
        return
    names, units = table[0], table[1]
    for row in table[2:]:
        values = {n: _number(x, u) for n, u, x in zip(names, units, row)}
        yield (
            row[names.index("Kernel Name")].split("(")[0],
            {name: x for name, x in values.items() if x is not None},
        )


def _stalls(values: dict[str, float]) -> str:
    start, end = _STALLED
    found = {
        name[len(start) : -len(end)]: x
        for name, x in values.items()
        if name.startswith(start) and name.endswith(end) and "not_issued" not in name
    }
    most = sorted((name for name in found if name != "selected"), key=lambda name: -found[name])
    return ", ".join(f"{name.replace('_', ' ')} {found[name]:.2f}" for name in most[:3])


def counted(case: str, direction: str, kernel: str, values: dict[str, float]) -> Counted:
    """One row, of what a profile says of a launch."""
    known = {
        field: next((values[name] for name in names if name in values), None)
        for field, names in COUNTERS.items()
    }
    if known["memory_bytes"] is None and known["microseconds"] is not None:
        rate = values.get("dram__bytes.sum.per_second")
        known["memory_bytes"] = None if rate is None else rate * known["microseconds"] * 1e-6
    return Counted(case, direction, kernel, **known, stalls=_stalls(values))


# the process that is profiled


@contextlib.contextmanager
def _profiled(device: Device) -> Iterator[None]:
    """Only what runs inside it is profiled."""
    if device.name != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    yield
    device.wait()
    torch.cuda.profiler.stop()


def run_once(cases: dict[str, Case], device: Device) -> list[tuple[str, str, str]]:
    """Case, direction and kernel of every launch, in order, of one profiled step a case."""
    launched: list[tuple[str, str, str]] = []
    for name, case in cases.items():
        loop = Loop(ours(case, device), [make_inputs(case, device, 0)])
        loop.warm()
        for direction, step in (
            ("forward", loop.training_forward),
            ("backward", loop.training_backward),
        ):
            with _recorded() as kernels, _profiled(device):
                step()
            launched += [(name, direction, kernel) for kernel in kernels]
        del loop
        device.release()
    return launched


@contextlib.contextmanager
def _recorded() -> Iterator[list[str]]:
    """The names of our kernels that are launched inside it."""
    names: list[str] = []
    run = Run.__call__

    def ran(self, given):
        names.extend(launch.kernel.__name__ for launch, _ in self.launches)
        return run(self, given)

    with mock.patch.object(Run, "__call__", ran):
        yield names


# the process that profiles it


def profiler(path: Path | None) -> str | None:
    """Where Nsight Compute is."""
    if path is not None:
        return str(path)
    newest_last = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"))
    places = ["/usr/local/cuda/bin/ncu", *reversed(newest_last)]
    return shutil.which("ncu") or next((x for x in places if Path(x).exists()), None)


def profile(command: Sequence[str], ncu: str, log: Path) -> str:
    """What the profiler writes of our kernels in a run of `command`."""
    options = ["--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    options += ["--clock-control", "none", "--kernel-name", "regex:^_.*_kernel$"]
    options += [x for section in SECTIONS for x in ("--section", section)]
    options += ["--target-processes", "all", "--log-file", str(log)]
    done = subprocess.run(
        [ncu, *options, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    text = log.read_text() if log.exists() else ""
    if done.returncode or '"Kernel Name"' not in text:
        said = [x for x in (done.stdout + done.stderr + text).splitlines() if x.strip()]
        raise RuntimeError(f"{ncu} gave no profile (exit code {done.returncode}): {said[-3:]}")
    return text


def joined(launched: Sequence[Sequence[str]], text: str) -> list[Counted]:
    """Rows: the n-th launch that was profiled is the n-th that the run recorded."""
    profiles = list(read_profile(text))
    ran, seen = [kernel for *_, kernel in launched], [kernel for kernel, _ in profiles]
    if ran != seen:
        raise RuntimeError(f"{len(ran)} launches ran, {ran}, but the profile has {seen}")
    return [counted(*launch, values) for launch, (_, values) in zip(launched, profiles)]


def count(name: str, ncu: str, rehearse: bool, raw: Path | None) -> list[Counted]:
    """The rows of a case, run in a process of its own; the profiler's page goes to `raw`."""
    with tempfile.TemporaryDirectory() as folder:
        launches = Path(folder) / "launches.json"
        start = [sys.executable, "-m", "benchmarks.gpu_tools.counters"]
        if rehearse:
            start = [
                sys.executable,
                "tests/support/interpreted.py",
                "benchmarks.gpu_tools.counters",
                "--rehearse",
            ]
        command = [*start, "--cases", name, "--launches", str(launches)]
        text = profile(command, ncu, Path(folder) / "profile.csv")
        if raw is not None:
            with raw.open("a") as file:
                file.write(f"{name}\n{text}\n")
        return joined(json.loads(launches.read_text()), text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    known = swin_cases() | other_cases() | toy_cases()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=known, metavar="NAME")
    parser.add_argument(
        "--csv", type=Path, help="where the rows go; else benchmarks/results/counters"
    )
    parser.add_argument("--raw", type=Path, help="where the profiler's own pages go, one by one")
    parser.add_argument("--ncu", type=Path, help="Nsight Compute; else where it mostly is")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--launches", type=Path, help=argparse.SUPPRESS)  # the profiled process
    options = parser.parse_args(arguments)
    names = options.cases or (list(toy_cases())[:1] if options.rehearse else FIRST)
    options.cases = {name: known[name] for name in names}
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device: Device = DryRunDevice() if options.rehearse else Cuda()
    if options.launches is not None:
        options.launches.write_text(json.dumps(run_once(options.cases, device)))
        return 0
    ncu = profiler(options.ncu)
    if ncu is None:
        print("no Nsight Compute: give --ncu its path", file=sys.stderr)
        return 2
    facts = facts_of(device)
    path, rows = options.csv or COUNTED / file_name(facts), []
    for name in options.cases:
        try:
            rows += count(name, ncu, options.rehearse, options.raw)
        except (OSError, RuntimeError) as error:
            print(f"{name}: nothing was counted: {error}", file=sys.stderr)
            return 1
        write(path, rows, facts)
    print_table(*table_of(rows))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
