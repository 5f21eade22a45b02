"""Figures of measurements, drawn from their CSV files alone.

Of cases: time beside ours, peak memory, error. Of a sweep: time and memory against what varies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.baselines.providers import DIRECTIONS
from benchmarks.report.rows import ROOT, Row, base_of, read
from benchmarks.sweeps import UNITS, varied
from swin_kernels.cli.command import three_digits

IMAGES = ROOT / "docs" / "images"
# Okabe and Ito's colours, which the colour-blind tell apart; a marker each, for print
STYLES = {
    "ours": ("#D55E00", "o"),
    "ours, graph": ("#CC79A7", "P"),
    "ours, CUDA C++": ("#A65628", "H"),
    "ours, CUDA C++, graph": ("#F0A030", "h"),
    "reference": ("#999933", "*"),
    "unfused": ("#0072B2", "s"),
    "sdpa": ("#009E73", "^"),
    "compiled unfused": ("#56B4E9", "D"),
    "flex": ("#882255", "<"),
    "xformers": ("#332288", "p"),
    "global": ("#000000", "X"),
    "linformer": ("#E69F00", "v"),
    "performer": ("#CC79A7", "P"),
    "routing": ("#7F7F7F", "d"),
    "patched": ("#D55E00", "o"),
    "patched, compiled": ("#CC79A7", "P"),
    "stock": ("#0072B2", "X"),
    "stock, compiled": ("#56B4E9", "d"),
    "ONNX Runtime": ("#009E73", "^"),
    "OpenVINO": ("#332288", "p"),
}
# a whole model's steps are beside the directions of attention that they run
PANELS = {
    "forward": ("forward", "inference"),
    "forward + backward": ("forward + backward", "training step"),
}


class Measured(NamedTuple):
    """One file of rows."""

    path: Path
    rows: list[Row]
    facts: dict[str, str]

    @property
    def dtype(self) -> str | None:
        """The dtype that the command named; None where it is that of the suite."""
        found = re.search(r"--dtype (\w+)", self.facts.get("command", ""))
        return None if found is None or found[1] == "fp32" else found[1]

    @property
    def cases(self) -> list[Row]:
        """The rows of no sweep."""
        return [r for r in self.rows if varied(r.case) is None]

    @property
    def sweeps(self) -> dict[str, list[Row]]:
        """The rows of each sweep, by what it varies."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if (what := varied(row.case)) is not None:
                found.setdefault(what[0], []).append(row)
        return found


def measured(path: Path) -> Measured:
    return Measured(path, *read(path))


def digest(path: Path) -> str:
    """What a figure keeps of the file that it was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Plain numbers: 1, 2 and 5 of each decade; where there are many decades, powers of ten."""
    few = limits[1] < 100 * limits[0]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    _plain(axis)


def _plain(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, source: Measured, title: str, providers: Sequence[str]) -> Figure:
    """Title, legend, and what the rows were measured with, in inches from the edges."""
    height = figure.get_figheight()
    facts = source.facts
    known = [facts.get("machine", ""), f"torch {facts.get('torch')}"]
    if "cuda" in facts.get("torch", "") or source.path.name.startswith("gpu"):
        known.append(f"triton {facts.get('triton')}")
    known += [f"commit {facts.get('commit')}", facts.get("date", "")]
    figure.text(0.01, 1 - 0.08 / height, title, va="top", fontweight="bold")
    figure.text(0.01, 0.08 / height, " · ".join(known), fontsize=7.5, color="#555555", va="bottom")
    handles = [
        Line2D([], [], color=STYLES[p][0], marker=STYLES[p][1], lw=1.5, label=p) for p in providers
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.003, 1 - 0.3 / height),
        ncols=min(len(providers), 8),
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.3,
    )
    figure.tight_layout(rect=(0, 0.24 / height, 1, 1 - 0.6 / height))
    return figure


def in_order(rows: Iterable[Row]) -> list[str]:
    found = {r.provider for r in rows}
    return [p for p in STYLES if p in found]


def _times(row: Row) -> tuple:
    return row.p20_us, row.median_us, row.p80_us


def _exactly(value: float | None) -> tuple | None:
    return (value,) * 3 if value else None


def _dots(
    source: Measured,
    title: str,
    unit: str,
    panels: dict[str, tuple[str, ...]],
    value: Callable[[Row], tuple | None],
    line: tuple[float, str] | None = None,
    log: bool = True,
) -> Figure | None:
    """A line a case, a mark a provider: `value` is a row's (low, middle, high); `line` x, style."""
    directions = sum(panels.values(), ())
    shown = [r for r in source.cases if r.direction in directions and value(r) is not None]
    if not shown:
        return None
    shown.sort(key=lambda r: r.direction not in DIRECTIONS)  # whole models last
    cases, providers = list(dict.fromkeys(r.case for r in shown)), in_order(shown)
    figure = Figure(figsize=(10.5, 0.36 * len(cases) + 1.7))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    spread = 0.62 / max(len(providers), 2)
    for place, (name, directions) in zip(axes, panels.items()):
        for y, case in enumerate(cases):
            for row in (r for r in shown if r.case == case and r.direction in directions):
                low, middle, high = value(row)
                colour, marker = STYLES[row.provider]
                at = y + (providers.index(row.provider) - (len(providers) - 1) / 2) * spread
                place.plot([low, high], [at, at], color=colour, lw=1.4)
                place.plot(middle, at, color=colour, marker=marker, ms=5)
            if y % 2:
                place.axhspan(y - 0.5, y + 0.5, color="#F3F3F3", lw=0, zorder=0)
        if line is not None:
            place.axvline(line[0], color="#555555", lw=0.9, ls=line[1], zorder=1)
        place.set_title(name, fontsize=10)
        place.set_xlabel(unit)
        place.grid(axis="x", which="both", color="#DDDDDD", lw=0.6)
        place.set_ylim(len(cases) - 0.5, -0.5)
    if log:
        axes[0].set_xscale("log")
        _ticks(axes[0].xaxis, axes[0].get_xlim())
    else:
        axes[0].set_xlim(left=0)
    axes[0].set_yticks(range(len(cases)), cases)
    return _finish(figure, source, title, providers)


def speed(source: Measured) -> Figure | None:
    """Times as multiples of ours."""

    def ratios(row: Row) -> tuple | None:
        base = base_of(row, source.rows)
        timed = base is not None and row.median_us is not None
        return tuple(x / base.median_us for x in _times(row)) if timed else None

    title = "Time of a call beside ours, whose median is on the right"
    unit = "time ÷ median of ours (median, p20 to p80)"
    figure = _dots(source, title, unit, PANELS, ratios, (1.0, "-"))
    if figure is None:
        return None
    low, high = figure.axes[0].get_xlim()
    figure.axes[0].set_xlim(low, high * (high / low) ** 0.25)  # room for our medians
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    words = {"ha": "right", "va": "center", "fontsize": 7.5, "color": STYLES["ours"][0]}
    for axes, directions in zip(figure.axes, PANELS.values()):
        for row in source.cases:
            if row.direction in directions and base_of(row, [row]) is not None:
                text, place = f"{three_digits(row.median_us * 1e-3)} ms", names.index(row.case)
                axes.text(0.99, place, text, transform=axes.get_yaxis_transform(), **words)
    return figure


def memory(source: Measured) -> Figure | None:
    """Peak memory of a call."""
    title = "Peak memory that a call adds"
    return _dots(source, title, "MB", PANELS, lambda row: _exactly(row.peak_mb))


def error(source: Measured) -> Figure | None:
    """Errors against float64."""
    panels = {
        "output": ("forward", "inference"),
        "gradient that is furthest off": ("backward", "training step"),
    }
    title = "Largest error against float64 (of whole models: root mean square); dashed: the rule"
    unit, rule = "error ÷ the unfused path's own", (2.0, "--")
    return _dots(source, title, unit, panels, lambda row: _exactly(row.error), rule, False)


def sweep(source: Measured, kind: str) -> Figure | None:
    """Time and memory against what varies, both logarithmic."""
    rows = [r for r in source.sweeps[kind] if r.median_us is not None]
    if not rows:
        return None
    panels = {
        "forward, ms": ("forward", _times, 1e-3),
        "forward + backward, ms": ("forward + backward", _times, 1e-3),
        "peak memory of forward, MB": ("forward", lambda row: _exactly(row.peak_mb), 1.0),
    }
    figure = Figure(figsize=(12, 4.6))
    for axes, (label, (direction, value, scale)) in zip(figure.subplots(1, 3), panels.items()):
        for provider in in_order(rows):
            points = sorted(
                (varied(r.case)[1], *(x * scale for x in value(r)))
                for r in rows
                if (r.provider, r.direction) == (provider, direction) and value(r)
            )
            if not points:
                continue
            x, low, middle, high = zip(*points)
            colour, marker = STYLES[provider]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(x, middle, color=colour, marker=marker, ms=5, lw=1.5, label=provider)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(UNITS[kind])
        axes.set_title(label, fontsize=10)
        axes.grid(which="major", color="#DDDDDD", lw=0.6)
        axes.set_xticks(sorted({varied(r.case)[1] for r in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain(axes.xaxis)
        if kind == "resolution" and label.startswith("forward, "):
            _slopes(axes)
        _ticks(axes.yaxis, axes.get_ylim())
    title = {
        "batch": "Cost against batch: Swin-T's first stage",
        "resolution": "Cost against resolution: windows of 7×7 tokens beside attention over all",
        "window": "Cost against the window: a map of 56×56 tokens",
    }[kind]
    return _finish(figure, source, f"{title} (median, p20 to p80)", in_order(rows))


def _slopes(axes: Axes) -> None:
    """What grows with the tokens from our first point, with their square from that of global."""
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    words = {"textcoords": "offset points", "fontsize": 8, "color": "#666666", "ha": "right"}
    for provider, power, name, points, side in (
        ("ours", 2, "∝ tokens", -13, "top"),
        ("global", 4, "∝ tokens²", 5, "bottom"),
    ):
        if provider not in lines:
            continue
        (first, start), (last, _) = lines[provider][[0, -1]]
        end = start * (last / first) ** power
        axes.plot([first, last], [start, end], color="#999999", lw=0.8, ls=":", zorder=1)
        axes.annotate(name, (last, end), (0, points), va=side, **words)
    axes.margins(y=0.1)


def figures_of(source: Measured) -> dict[str, Figure]:
    """Each figure that the rows suffice for, by its kind."""
    found = {draw.__name__: draw(source) for draw in (speed, memory, error)}
    found |= {kind: sweep(source, kind) for kind in source.sweeps}
    return {kind: figure for kind, figure in found.items() if figure is not None}


def image_of(path: Path, kind: str) -> str:
    return f"{path.stem}-{kind}.png"


def draw(paths: Iterable[Path], out: Path) -> list[Path]:
    """Writes the figures of each file; returns where they are."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in paths:
        for kind, figure in figures_of(measured(path)).items():
            written.append(out / image_of(path, kind))
            figure.savefig(written[-1], dpi=120, metadata={"Source": digest(path)})
    return written
