"""Rows of measurements made up for the tests of the reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.report import plots
from benchmarks.report.rows import ResultsFile, Row

FACTS = {
    "machine": "A CPU, 2 threads, avx2",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "c0ffee",
    "date": "2000-01-01",
    "command": "python -m benchmarks.cpu --threads 2",
}


def timed(case: str, provider: str, direction: str, median: float, **more) -> Row:
    return Row(case, provider, direction, median, 0.9 * median, 1.2 * median, 7, **more)


def written(folder: Path, name: str, rows: Iterable[Row], **facts: str) -> plots.Measured:
    """A file of these rows, kept with `FACTS` but for those given, read again."""
    results_file = ResultsFile(folder / name, FACTS | facts)
    for row in rows:
        results_file.add(row)
    return plots.measured(results_file.path)
