"""Rows of what Nsight Compute counted of our kernels: one file a run, in results/counters."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.report.rows import RESULTS
from benchmarks.report.rows import read as read_rows
from swin_kernels.cli.command import three_digits

COUNTED = RESULTS / "counters"


class Counted(NamedTuple):
    """What was counted of one launch; None where this profiler or GPU has no such counter."""

    case: str
    direction: str
    kernel: str
    microseconds: float | None = None
    memory_percent: float | None = None  # of the peak rate of device memory
    memory_bytes: float | None = None
    l1_hit_percent: float | None = None
    l2_hit_percent: float | None = None
    bank_conflicts: float | None = None  # of accesses to shared memory
    instructions: float | None = None  # warp-instructions
    issued_per_clock: float | None = None  # by a scheduler, 1 at most
    registers: float | None = None
    warps_percent: float | None = None  # of those that a multiprocessor can hold
    stalls: str = ""  # warps that wait, for each that issues, by reason: the three most frequent


def read(path: Path) -> tuple[list[Counted], dict[str, str]]:
    """The rows of a file, and what all of them are kept with."""
    return read_rows(path, Counted)


def write(path: Path, rows: Sequence[Counted], facts: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Counted._fields, *facts])
        for row in rows:
            cells = ["" if x is None else f"{x:.5g}" if isinstance(x, float) else x for x in row]
            writer.writerow([*cells, *facts.values()])


def table_of(rows: Sequence[Counted]) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    header = ["case", "direction", "kernel", "µs", "of memory's rate", "MB", "L1 hits", "L2 hits"]
    header += ["instructions", "issued a clock", "registers", "warps", "waits an issue"]
    lines = []
    for row in rows:
        megabytes = None if row.memory_bytes is None else row.memory_bytes * 1e-6
        shares = [row.memory_percent, row.l1_hit_percent, row.l2_hit_percent, row.warps_percent]
        memory, l1, l2, warps = ("–" if x is None else f"{x:.0f} %" for x in shares)
        numbers = [row.microseconds, megabytes, row.issued_per_clock]
        time, moved, issued = ("–" if x is None else three_digits(x) for x in numbers)
        counts = [row.instructions, row.registers]
        executed, registers = ("–" if x is None else f"{x:,.0f}" for x in counts)
        cells = [time, memory, moved, l1, l2, executed, issued, registers, warps, row.stalls or "–"]
        lines.append([row.case, row.direction, row.kernel, *cells])
    return header, lines
