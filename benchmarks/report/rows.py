"""Rows of measurements: kept in a CSV file as they come, shown as a table at the end."""

from __future__ import annotations

import csv
import datetime
import importlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from benchmarks.baselines import runtimes
from benchmarks.device import Device


class Row(NamedTuple):
    case: str
    provider: str
    direction: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    floor_us: float | None = None  # the bytes that must move, at the rate of a copy timed in turn
    of_floor: float | None = None  # floor ÷ median
    of_matrix_rate: float | None = None  # of a product timed in turn
    peak_mb: float | None = None
    error: float | None = None  # against float64, as a multiple of the unfused path's own
    note: str = ""  # why there is no time, or what to know of it
    copy_gb_s: float | None = None  # of the copy and the product that were timed with the case
    matrix_tflop_s: float | None = None


ROOT = Path(__file__).resolve().parents[2]  # whatever folder a benchmark is run from
RESULTS = ROOT / "benchmarks" / "results"
# what can change a time
TIMED = ("swin_kernels", "csrc", "setup.py", "pyproject.toml", "benchmarks/*.py")
RATIO = "ratio_to_ours"  # median ÷ that of our row, in the file alone: it follows from the rows
# what one file's rows share
WHERE = ("machine", "torch", "triton", "timm", "peers", "python", "commit")


def base_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row of ours that `row` is compared with, if it was timed."""
    key = (row.case, row.direction)
    ours = (r for r in rows if r.provider in ("ours", "patched"))
    found = (r for r in ours if (r.case, r.direction) == key and r.median_us is not None)
    return next(found, None)


def commit(root: Path = ROOT) -> str:
    """That of the code; "-dirty" where what can change a time has changed since."""
    if known := os.environ.get("SWIN_KERNELS_COMMIT"):
        return known

    def git(*arguments: str) -> subprocess.CompletedProcess:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    try:
        name = git("describe", "--always").stdout.strip()
        changed = git("status", "--porcelain", "--", *TIMED).stdout
    except OSError:  # no git
        return "unknown"
    return name + ("-dirty" if changed else "") if name else "unknown"


def command_of(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command line that measures the same, without the file of its rows."""
    parts = list(sys.argv[1:] if arguments is None else arguments)
    while (place := next((i for i, x in enumerate(parts) if x == "--csv"), None)) is not None:
        del parts[place : place + 2]
    kept = (x for x in parts if x != "--resume" and not x.startswith("--csv="))
    return shlex.join(["python", "-m", module, *kept])


def facts_of(device: Device) -> dict[str, str]:
    """What every row is kept with."""
    versions = {}
    for name in ("triton", "timm"):
        installed = importlib.util.find_spec(name) is not None
        versions[name] = importlib.import_module(name).__version__ if installed else "none"
    return {
        "machine": device.machine(),
        "torch": torch.__version__,
        **versions,
        "peers": runtimes.versions(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def file_name(facts: dict[str, str], kind: str = "gpu") -> str:
    machine = re.sub("[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    return f"{kind}-{machine}-{facts['date']}.csv"


class ResultsFile:
    """Rows in memory and, each as soon as it is known, in a file."""

    def __init__(self, path: Path, facts: dict[str, str], resume: bool = False) -> None:
        self.path, self.facts = path, facts
        self.rows: list[Row] = []
        self.columns = [*Row._fields, RATIO, *facts]
        if resume and path.exists():
            self.rows, before = read(path)
            for name in WHERE:
                if before.get(name, facts.get(name)) != facts.get(name):
                    raise ValueError(
                        f"{path} has rows of {name} {before[name]}, this is {facts.get(name)}: "
                        "measure into another file"
                    )
            with path.open(newline="") as file:
                columns = next(csv.reader(file), None)
            if columns is not None:
                self.columns = columns  # an older file has fewer
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._append(dict(zip(self.columns, self.columns)))

    def _append(self, cells: dict[str, Any]) -> None:
        """A line of the file; where the disk is full, of the output."""
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(cells)
        except OSError as error:
            print(f"{self.path}: {error.strerror}: {cells}", flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        base = base_of(row, self.rows)
        timed = base is not None and row.median_us is not None
        ratio = row.median_us / base.median_us if timed else None
        shown = {
            name: "" if x is None else f"{x:.4g}" if isinstance(x, float) else x
            for name, x in (row._asdict() | {RATIO: ratio}).items()
        }
        self._append(shown | self.facts)

    def has(self, case: str, provider: str) -> bool:
        return any((r.case, r.provider) == (case, provider) for r in self.rows)


Kept = TypeVar("Kept", bound=tuple)


def read(path: Path, kind: type[Kept] = Row) -> tuple[list[Kept], dict[str, str]]:
    """The rows of a file and what all of them are kept with; a column it lacks is None."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    types = get_type_hints(kind)
    facts = {k: v for k, v in lines[0].items() if k not in (*types, RATIO)} if lines else {}
    return [
        kind(**{name: _value(line.get(name), of) for name, of in types.items()}) for line in lines
    ], facts


def _value(text: str | None, kind: Any) -> str | float | None:
    if kind in (str, int):
        return kind(text)
    return float(text) if text else None


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.1f}"


def table_of(rows: Sequence[Row], providers: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line a case and direction, a column a provider, microseconds."""
    lines = []
    for case, direction in dict.fromkeys((r.case, r.direction) for r in rows):
        of = {r.provider: r for r in rows if (r.case, r.direction) == (case, direction)}
        floor = next((r.floor_us for r in of.values() if r.floor_us is not None), None)
        cells = []
        for provider in providers:
            row = of.get(provider)
            text = "" if row is None else _number(row.median_us)
            if row is not None and row.of_floor is not None:
                text += f" ({row.of_floor:.0%})"
            cells.append(text)
        lines.append([case, direction, _number(floor), *cells])
    return ["case", "direction", "floor µs", *providers], lines


def markdown_table(
    header: Sequence[str], lines: Iterable[Sequence[str]], columns: str
) -> Iterator[str]:
    """A table in Markdown; `columns` has a letter for each: l for words, r for numbers."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join({'l': '---', 'r': '--:'}[x] for x in columns)}|"
    for line in lines:
        yield f"| {' | '.join(map(str, line))} |"


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """With rich where it is there."""
    if importlib.util.find_spec("rich") is None:
        print_plain(header, lines)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    Console(width=200).print(table)


def print_plain(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    for line in [header, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
