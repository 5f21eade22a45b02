"""The table at the end of a run: what came back, by the standard library alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

Line = dict[str, str]
MOST_FAILURES = 40  # of tests, by name
_END_OF_TESTS = re.compile(r"=+ (.*(?:passed|failed|skipped|error|no tests ran).* in \S+s.*?) =+")


def _read(path: Path) -> list[Line]:
    """The rows of a file, as many as are whole; none where there is none."""
    try:
        with path.open(newline="", errors="replace") as file:
            return [x for x in csv.DictReader(file) if None not in x.values()]
    except OSError:
        return []


def _times(rows: Sequence[Line]) -> Iterable[str]:
    """A line a case and direction: the floor, then each provider's time, microseconds."""
    for case, direction in dict.fromkeys((x["case"], x["direction"]) for x in rows):
        found = [x for x in rows if (x["case"], x["direction"]) == (case, direction)]
        floor = next((x["floor_us"] for x in found if x["floor_us"]), None)
        cells = [f"floor {floor}"] if floor else []
        for row in found:
            error = f" (error {row['error']})" if row["error"] else ""
            cells.append(f"{row['provider']} {row['median_us'] or row['note'][:60]}{error}")
        yield f"{case}, {direction}: " + "; ".join(cells)


def _checks(rows: Sequence[Line]) -> Iterable[str]:
    for row in rows:
        verdict = row["note"] or f"{row['samples']} repeats the same"
        error = (
            f"error {row['error']} of the unfused path's own" if row["error"] else "no error known"
        )
        yield f"{row['case']}, {row['provider']}, {row['direction']}: {error}; {verdict}"


def _counters(rows: Sequence[Line]) -> Iterable[str]:
    names = ("microseconds", "memory_percent", "memory_bytes", "l2_hit_percent", "l1_hit_percent")
    names += ("bank_conflicts", "instructions", "issued_per_clock", "registers", "stalls")
    for row in rows:
        cells = (f"{name} {row[name]}" for name in names if row.get(name))
        yield f"{row['case']}, {row['kernel']}: " + ", ".join(cells)


def _layouts(rows: Sequence[Line]) -> Iterable[str]:
    """For each kernel the layout it has, and the fastest three."""
    for kernel in dict.fromkeys(x["case"] for x in rows):
        timed = [x for x in rows if x["case"] == kernel and x["median_us"]]
        ranked = sorted(timed, key=lambda x: float(x["median_us"]))
        for what, row in [("now", x) for x in timed[:1]] + [("best", x) for x in ranked[:3]]:
            yield f"{kernel}: {what}: {row['median_us']}: {row['provider']}"


def _tests(log: Path) -> Iterable[str]:
    """What pytest says at its end: failures, and how many."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return
    yield from [x for x in lines if x.startswith(("FAILED ", "ERROR "))][:MOST_FAILURES]
    yield from (found[1] for x in lines if (found := _END_OF_TESTS.fullmatch(x)))


def summary_of(out: Path, stages: Sequence[dict[str, object]]) -> str:
    """What matters most last, where a reader of the end of the output finds it."""
    sections = {
        "layouts, µs": _layouts(_read(out / "tuning" / "tuned.csv")),
        "counters of Nsight Compute": _counters(_read(out / "counters.csv")),
        "medians, µs": _times(_read(out / "rows.csv")),
        "tests": _tests(out / "log.txt"),
        "correctness": _checks(_read(out / "checks.csv")),
        "stages, s": (
            f"{x['stage']}: {x['began']} to {x['ended']}: exit codes {x['exit_codes']}"
            f"{', OUT OF TIME' if x['out_of_time'] else ''}"
            for x in stages
        ),
    }
    parts = ((f"== {name}", *lines) for name, lines in sections.items())
    return "\n".join("\n".join(part) for part in parts if len(part) > 1)
