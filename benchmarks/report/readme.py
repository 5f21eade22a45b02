"""The figures that README.md states, written between its markers from the rows that are kept.

`python -m benchmarks.report` writes them. A marker is a comment, `<!-- rows: NAME -->`, and what
follows up to `<!-- end of rows -->` is replaced.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from benchmarks.baselines.runtimes import RUNTIMES
from benchmarks.report import headline
from benchmarks.report.headline import Bar, Panel
from benchmarks.report.plots import Measured
from benchmarks.report.rows import ROOT, markdown_table
from swin_kernels.cli.command import three_digits

README = ROOT / "README.md"
PART = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
# a line of the table: its label, and what the panels of models and of stages call it
LINES = {
    "timm, eager (stock)": ("timm (stock)", "timm's steps (stock)"),
    "`torch.compile`": ("torch.compile", "torch.compile"),
    "SDPA": (None, "SDPA"),
    "FlexAttention": (None, "FlexAttention"),
    "ONNX Runtime": ("ONNX Runtime", None),
    "OpenVINO": ("OpenVINO", None),
    "**swin_kernels**": ("swin_kernels", "swin_kernels"),
    "**swin_kernels and `torch.compile`**": ("+ torch.compile", None),
}


def _bar(panel: Panel, label: str) -> Bar:
    return next(bar for bar in panel.bars if bar.label == label)


def _wrapped(text: str) -> str:
    """In lines of 100 columns, none of which ends within `code`."""
    text = re.sub("`.*?`", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _in_words(panel: Panel) -> str:
    step, _, batch = headline.step_of(panel).partition(", ")
    return f"{'a training step' if step == 'training step' else step} at {batch}"


def _losses(panels: Sequence[Panel]) -> Iterator[str]:
    """What is faster than the better of our two forms, and what was not measured."""
    faster = []
    for panel in panels:
        ours = max(_bar(panel, x).speed or 0 for x in ("swin_kernels", "+ torch.compile"))
        others = [bar for bar in panel.bars if bar.label in (*RUNTIMES, "torch.compile")]
        found = [f"{b.label} ({b.speed:.2f})" for b in others if b.speed and b.speed > ours]
        if found:
            faster.append(f"for {_in_words(panel)} {_listed(found)}")
    if faster:
        yield f"Faster still: {', '.join(faster)}."
    missing = {b.label for p in panels for b in p.bars if b.reason and b.reason != "inference only"}
    if missing := [name for name in RUNTIMES if name in missing]:
        yield f"Not yet measured in the same run: {_listed(missing)}."


def gains(whole: Measured, stages: Measured) -> str:
    """Our gains and losses in a few sentences."""
    panels = headline.model_panels(whole)
    alone = {panel.title: _bar(panel, "swin_kernels") for panel in headline.stage_panels(stages)}
    ranges = {name: f"{bar.least:.1f} to {bar.most:.1f}" for name, bar in alone.items()}
    text = [
        f"**Gains, on a CPU** ({whole.facts['machine']}). Attention alone is {ranges['forward']} "
        f"times faster than timm's own steps in the forward, {ranges['forward + backward']} times "
        "in forward and backward together. A whole Swin-T, each block two operations:",
    ]
    speeds: list[str] = []
    for panel in panels:
        eager, compiled = (_bar(panel, x).speed for x in ("swin_kernels", "+ torch.compile"))
        if eager is not None:
            of_stock, under = ("", "") if speeds else (" stock's speed", " under `torch.compile`")
            also = "" if compiled is None else f" ({compiled:.2f}{under})"
            speeds.append(f"{_in_words(panel)} runs at {eager:.2f} times{of_stock}{also}")
    text.append(", ".join(speeds) + ".")
    return _wrapped(" ".join([*text, *_losses(panels)]))


def _cell(bar: Bar) -> str:
    if bar.speed is None:
        return bar.reason
    return f"**{bar.speed:.2f}**" if headline.is_ours(bar) else f"{bar.speed:.2f}"


def table(whole: Measured, stages: Measured, bf16: Measured | None) -> str:
    """Speeds beside stock's, a line a peer, and what they were measured with."""
    kinds: list[tuple[str, int, Panel]] = []
    for source, dtype in ((whole, ""), (bf16, "bf16 ")):
        if source is not None:
            kinds += [(dtype + headline.step_of(p), 0, p) for p in headline.model_panels(source)]
    kinds += [(f"attention, {p.title}", 1, p) for p in headline.stage_panels(stages)]
    cells = (
        [line, *("–" if labels[i] is None else _cell(_bar(p, labels[i])) for _, i, p in kinds)]
        for line, labels in LINES.items()
    )
    header = ["times as fast as stock", *(name for name, _, _ in kinds)]
    files = dict.fromkeys(_described(x) for x in (whole, bf16, stages) if x is not None)
    about = _wrapped(
        "Whole models: timm's Swin-T, 224×224, random weights. Attention: the geometric mean "
        f"over Swin-T's seven stage cases at batch 8. {' '.join(files)} Peak memory of a "
        f"training step: {_peaks(whole)}."
    )
    return "\n".join([*markdown_table(header, cells, "l" + "r" * len(kinds)), "", about])


def _described(source: Measured) -> str:
    name = source.path.name
    return (
        f"{headline.facts_of(source)}, `{source.facts.get('command')}`: "
        f"[rows](benchmarks/results/{name})."
    )


def _peaks(whole: Measured) -> str:
    peaks = {
        r.provider: three_digits(r.peak_mb)
        for r in whole.rows
        if r.direction == "training step" and r.peak_mb is not None
    }
    return f"{peaks.get('stock', '–')} MB stock, {peaks.get('patched', '–')} MB patched"


def filled(text: str, sources: Sequence[Measured]) -> str:
    """README's text with its parts written anew; as it was where the rows do not suffice."""
    whole, stages = headline.of_models(sources), headline.of_stages(sources)
    if whole is None or stages is None:
        return text
    bf16 = headline.of_models(sources, "bf16")
    parts = {"gains": gains(whole, stages), "table": table(whole, stages, bf16)}
    return PART.sub(lambda found: f"{found[1]}{parts[found[2]]}\n{found[3]}", text)
