"""The figure at the top of the README: speed beside peers, stock = 1, from the rows that are kept.

Whole models come from the newest file of fp32 rows that has them, attention from the newest that
has every stage of Swin-T.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import models
from benchmarks.baselines.runtimes import RUNTIMES
from benchmarks.cases import cpu_cases
from benchmarks.report.plots import Measured, digest, measured
from benchmarks.report.rows import Row
from swin_kernels.cli.command import three_digits

IMAGE = "headline.png"
OURS, OURS_COMPILED, STOCK, PEER = "#D55E00", "#F0A878", "#7F7F7F", "#8FB4CF"
FORMS = {
    "stock": "timm (stock)",
    "stock, compiled": "torch.compile",
    **{name: name for name in RUNTIMES},
    "patched": "swin_kernels",
    "patched, compiled": "+ torch.compile",
}
PROVIDERS = {
    "unfused": "timm's steps (stock)",
    "sdpa": "SDPA",
    "compiled unfused": "torch.compile",
    "flex": "FlexAttention",
    "ours": "swin_kernels",
}
COLOURS = {
    "swin_kernels": OURS,
    "+ torch.compile": OURS_COMPILED,
    "timm (stock)": STOCK,
    "timm's steps (stock)": STOCK,
}


class Bar(NamedTuple):
    """How many times as fast as stock, or why that is not known."""

    label: str
    speed: float | None = None
    least: float | None = None  # of the cases that `speed` is the geometric mean of
    most: float | None = None
    reason: str = ""


class Panel(NamedTuple):
    title: str
    bars: list[Bar]


def newest(
    sources: Sequence[Measured], has: Callable[[Measured], bool], dtype: str | None = None
) -> Measured | None:
    found = [s for s in sources if s.path.name.startswith("cpu") and s.dtype == dtype and has(s)]
    return max(found, key=lambda s: (s.facts.get("date", ""), s.path.name), default=None)


def _timed(source: Measured, case: str, provider: str, direction: str) -> Row | None:
    key = (case, provider, direction)
    found = (r for r in source.rows if (r.case, r.provider, r.direction) == key)
    return next((r for r in found if r.median_us is not None), None)


def of_models(sources: Sequence[Measured], dtype: str | None = None) -> Measured | None:
    first = next(iter(models.CPU_MODELS))
    return newest(sources, lambda s: _timed(s, first, "patched", "inference") is not None, dtype)


def of_stages(sources: Sequence[Measured]) -> Measured | None:
    cases = cpu_cases()
    return newest(sources, lambda s: all(_timed(s, case, "ours", "forward") for case in cases))


def _reason(source: Measured, case: str, provider: str, step: str) -> str:
    if provider in RUNTIMES and step != "inference":
        return "inference only"
    rows = (r for r in source.rows if (r.case, r.provider) == (case, provider))
    note = next((r.note for r in rows if r.note), "")
    if note.startswith("AssertionError"):
        return "breaks the error rule"
    return note.partition(":")[0] or "not measured"


def model_panel(source: Measured, case: str, step: str) -> Panel | None:
    base = _timed(source, case, "stock", step)
    if base is None:
        return None
    bars = []
    for provider, label in FORMS.items():
        row = _timed(source, case, provider, step)
        speed = None if row is None else base.median_us / row.median_us
        reason = _reason(source, case, provider, step) if row is None else ""
        bars.append(Bar(label, speed, reason=reason))
    batch = case.partition(", ")[2]
    return Panel(f"{step}, {batch}\n(stock: {three_digits(base.median_us / 1e3)} ms)", bars)


def model_panels(source: Measured) -> list[Panel]:
    """Inference of each batch, then the training step."""
    names = [name for name in models.CPU_MODELS if name.startswith("swin_tiny")]
    wanted = [*((name, "inference") for name in names), (names[0], "training step")]
    found = (model_panel(source, case, step) for case, step in wanted)
    return [panel for panel in found if panel is not None]


def step_of(panel: Panel) -> str:
    return panel.title.partition("\n")[0]


def stage_panel(source: Measured, direction: str) -> Panel:
    bars = []
    for provider, label in PROVIDERS.items():
        pairs = [
            [_timed(source, case, name, direction) for name in ("unfused", provider)]
            for case in cpu_cases()
        ]
        if all(base and row for base, row in pairs):
            ratios = [base.median_us / row.median_us for base, row in pairs]
            bars.append(Bar(label, statistics.geometric_mean(ratios), min(ratios), max(ratios)))
        else:
            forward_alone = provider == "flex" and direction != "forward"
            reason = "no backward on a CPU" if forward_alone else "not measured"
            bars.append(Bar(label, reason=reason))
    return Panel(direction, bars)


def stage_panels(source: Measured) -> list[Panel]:
    return [stage_panel(source, d) for d in ("forward", "forward + backward")]


def is_ours(bar: Bar) -> bool:
    return COLOURS.get(bar.label) in (OURS, OURS_COMPILED)


def _draw(axes: Axes, panel: Panel, labels: bool, limit: float) -> None:
    words = {"va": "center", "zorder": 4}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the dashes
    for y, bar in enumerate(panel.bars):
        if bar.speed is None:
            axes.text(0.03 * limit, y, bar.reason, fontsize=8, color="#777777", **words)
            continue
        axes.barh(y, bar.speed, height=0.7, color=COLOURS.get(bar.label, PEER), zorder=2)
        if bar.most is not None and bar.least != bar.most:
            axes.plot([bar.least, bar.most], [y, y], color="#444444", lw=0.9, zorder=3)
        end = (bar.most or bar.speed) + 0.025 * limit
        text, weight = f"{bar.speed:.2f}×", "bold" if is_ours(bar) else "normal"
        axes.text(end, y, text, fontsize=8.5, fontweight=weight, color="#222222", **words)
    axes.axvline(1, color="#444444", lw=0.8, ls=(0, (3, 3)), zorder=1)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(panel.bars) - 0.45, -0.55)
    axes.set_yticks(range(len(panel.bars)), [b.label for b in panel.bars] if labels else [])
    for text, bar in zip(axes.get_yticklabels(), panel.bars):
        text.set_fontweight("bold" if is_ours(bar) else "normal")
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_title(panel.title, fontsize=9, loc="left", color="#222222")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#BBBBBB")


def _limit(panels: Sequence[Panel]) -> float:
    """One scale a row, with room for the labels."""
    ends = [bar.most or bar.speed or 0 for panel in panels for bar in panel.bars]
    return 1.3 * max([1.0, *ends])


def facts_of(source: Measured) -> str:
    facts = source.facts
    known = [facts.get("machine", ""), f"torch {facts.get('torch')}", f"timm {facts.get('timm')}"]
    peers = facts.get("peers") or ""
    for package, name in (("onnxruntime ", "ONNX Runtime "), ("openvino ", "OpenVINO ")):
        if package in peers and any(r.provider == name.strip() for r in source.rows):
            known.append(name + peers.partition(package)[2].partition(",")[0])
    return " · ".join([*known, f"commit {facts.get('commit')}", facts.get("date", "")])


def headline(sources: Sequence[Measured]) -> tuple[Figure, list[Measured]] | None:
    """The figure and the files that it was drawn from; None where the rows do not suffice."""
    whole, stages = of_models(sources), of_stages(sources)
    if whole is None or stages is None:
        return None
    top, bottom = model_panels(whole), stage_panels(stages)
    figure = Figure(figsize=(8, 5.15), facecolor="white")
    left, right, gap = 0.2, 0.985, 0.022

    def row(panels: Sequence[Panel], low: float, height: float) -> None:
        width = (right - left - gap * (len(panels) - 1)) / len(panels)
        for i, panel in enumerate(panels):
            axes = figure.add_axes((left + i * (width + gap), low, width, height))
            _draw(axes, panel, i == 0, _limit(panels))

    title = {"fontsize": 10.5, "fontweight": "bold", "va": "top", "color": "#111111"}
    aside = {"fontsize": 8.2, "va": "top", "ha": "right", "color": "#555555"}
    figure.text(0.012, 0.985, "Whole model: timm's Swin-T, 224×224, fp32", **title)
    figure.text(right, 0.981, "speed on a CPU, stock = 1; longer is faster", **aside)
    row(top, 0.5, 0.36)
    figure.text(0.012, 0.452, "Attention alone: Swin-T's stages, batch 8, fp32", **title)
    figure.text(right, 0.448, "geometric mean; line: from least to greatest case", **aside)
    row(bottom, 0.075, 0.295)
    files = [whole] if whole.path == stages.path else [whole, stages]
    lines = list(dict.fromkeys(facts_of(source) for source in files))
    figure.text(0.012, 0.012, "\n".join(lines), fontsize=7.2, color="#555555", va="bottom")
    return figure, files


def draw(paths: Sequence[Path], out: Path) -> Path | None:
    """Writes the figure; returns its path, or None where the rows do not suffice."""
    drawn = headline([*map(measured, paths)])
    if drawn is None:
        return None
    figure, files = drawn
    out.parent.mkdir(parents=True, exist_ok=True)
    source = " ".join(digest(source.path) for source in files)
    figure.savefig(out, dpi=200, metadata={"Source": source})
    return out
