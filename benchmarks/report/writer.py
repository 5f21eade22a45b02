"""Writes docs/performance.md, the README's figures and all images from benchmarks/results.

    python -m benchmarks.report

What no row says is in performance.md.in; what the suites name and no row has is listed as not
measured. In README.md the parts between markers are written (`benchmarks.report.readme`). Tests
hold both to what this writes.
"""

from __future__ import annotations

import argparse
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import models
from benchmarks.baselines.providers import DIRECTIONS
from benchmarks.baselines.runtimes import RUNTIMES
from benchmarks.cases import cpu_cases, other_cases, other_cpu_cases, swin_cases
from benchmarks.report import counted, headline, readme
from benchmarks.report.plots import (
    IMAGES,
    PANELS,
    Measured,
    draw,
    figures_of,
    image_of,
    in_order,
    measured,
)
from benchmarks.report.rows import RESULTS, ROOT, Row, base_of, markdown_table
from benchmarks.sweeps import GPU_IMAGES, UNITS, sweeps
from swin_kernels.cli.command import three_digits

PAGE = ROOT / "docs" / "performance.md"
TEMPLATE = Path(__file__).with_name("performance.md.in")
FIGURES = "[cg]pu-*.png"  # those of one file of rows
NO_GPU = """\
**Nothing on a GPU is measured yet.** The kernels' results are tested in Triton's interpreter and in
an emulator; no layout was timed, `tuned.json` is empty, and no speed is claimed. """
HEADLINE = "Speed of whole models and of attention beside peers, stock = 1"
WIDE = 0.4  # of a median, between the 20th and the 80th percentile
CAPTIONS = {
    "speed": "Times beside ours",
    "memory": "Peak memory",
    "error": "Errors beside the unfused path's",
} | {kind: f"Cost against {kind}" for kind in UNITS}


class Suite(NamedTuple):
    """What a command measures, by the names of its cases and models."""

    title: str
    command: str
    kind: str  # how the names of its files begin
    names: list[str]


def suites() -> list[Suite]:
    def swept(kind: str, images: int = 1) -> Iterator[Suite]:
        title, command = f"A {kind.upper()}, cost against", f"python -m benchmarks.{kind} --sweep"
        for what, cases in sweeps(images).items():
            yield Suite(f"{title} {what}", f"{command} {what}", kind, list(cases))

    cpu = "python -m benchmarks.cpu"
    stages = [*cpu_cases(), *other_cpu_cases(), *models.CPU_MODELS]
    return [
        Suite("A CPU, Swin-T's stages, other windows and whole models", cpu, "cpu", stages),
        *swept("cpu"),
        Suite("A GPU", "make gpu", "gpu", [*swin_cases(), *other_cases(), *models.MODELS]),
        *swept("gpu", GPU_IMAGES),
    ]


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 108, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def unmeasured(sources: Sequence[Measured]) -> Iterator[str]:
    """A line a suite: what of it no row has a time of ours for."""
    for suite in suites():
        timed = {
            r.case
            for source in sources
            if source.path.name.startswith(suite.kind) and source.dtype is None
            for r in source.rows
            if base_of(r, [r]) is not None
        }
        if missing := [name for name in suite.names if name not in timed]:
            which = "all of it" if len(missing) == len(suite.names) else "what is left"
            line = f"- {suite.title} (`{suite.command}`), {which}: {'; '.join(missing)}."
            yield _filled(line, "  ")


def _percent(x: float) -> str:
    return f"{x:.0%}".replace("%", " %")


def _time(row: Row, base: Row | None) -> str:
    if row.median_us is None:
        return "–"
    text = f"{three_digits(row.median_us * 1e-3)} ms"
    if None not in (row.p20_us, row.p80_us) and row.p80_us - row.p20_us > WIDE * row.median_us:
        text = f"≈ {text}"  # the machine did not hold still for it
    if row is base:
        shares = [x for x in (row.of_floor, row.of_matrix_rate) if x is not None]
        return text + (f" ({', '.join(map(_percent, shares))})" if shares else "")
    return text if base is None else f"{text}, **{row.median_us / base.median_us:.2f}×**"


def _memory(row: Row, base: Row | None) -> str:
    return "–" if row.peak_mb is None else f"{three_digits(row.peak_mb)} MB"


def _table(rows: Sequence[Row], cell: Callable[[Row, Row | None], str]) -> str:
    """A line a case and direction, a column a provider; a cell has its row and that of ours."""
    providers = in_order(rows)
    lines = [f"| case | | {' | '.join(providers)} |", "|---|---|" + "--:|" * len(providers)]
    for case, direction in dict.fromkeys((r.case, r.direction) for r in rows):
        of = {r.provider: r for r in rows if (r.case, r.direction) == (case, direction)}
        base = base_of(next(iter(of.values())), of.values())
        cells = (cell(of[p], base) if p in of else "" for p in providers)
        lines.append(f"| {case} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _untimed(rows: Iterable[Row]) -> Iterator[str]:
    """A line a provider and reason."""
    cases: dict[tuple[str, str], dict[str, None]] = {}
    for r in rows:
        if r.median_us is None:
            cases.setdefault((r.provider, r.note), {})[r.case] = None
    for (provider, note), names in cases.items():
        yield _filled(f"- No time of {provider} for {', '.join(names)}: {note}", "  ")


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    """The largest of our errors, in words."""
    for direction, what in (("forward", "of an output"), ("backward", "of a gradient")):
        ours = [r for r in rows if (r.provider, r.direction) == ("ours", direction)]
        if known := {r.case: r.error for r in ours if r.error is not None}:
            case = max(known, key=known.__getitem__)
            yield f"{what} {known[case]:.2f} times the unfused path's ({case})"


def _range(values: Sequence[float], digits: Callable[[float], str] = three_digits) -> str:
    return " to ".join(dict.fromkeys(digits(x) for x in (min(values), max(values))))


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    """Samples of a time, and what the machine reached beside them, in words."""
    counts = []
    for is_core, text in ((True, "{} samples"), (False, "{} of a whole model")):
        found = [r.samples for r in rows if (r.direction in DIRECTIONS) == is_core and r.samples]
        counts += [text.format(_range(found, str))] if found else []
    if counts:
        yield f"medians of {', '.join(counts)}"
    for values, text in (
        ([r.copy_gb_s for r in rows], "a copy moved {} GB/s"),
        ([r.matrix_tflop_s for r in rows], "a matrix product {} TFLOP/s"),
    ):
        if known := [x for x in values if x is not None]:
            yield text.format(_range(known))


def section(source: Measured) -> str:
    """What one file has: its facts, tables and figures."""
    facts, name = source.facts, source.path.name
    whole = any(r.direction not in DIRECTIONS for r in source.rows)
    stages = any(r.direction in DIRECTIONS for r in source.rows)
    title = f"Stages and {'whole models' if whole else 'other windows'}"
    title = title if stages else "Whole models"
    title = f"Cost against {' and '.join(source.sweeps)}" if source.sweeps else title
    title += f", {source.dtype}" if source.dtype else ""
    packages = ("torch", "triton", "timm") if whole else ("torch", "triton")
    versions = [f"{package} {facts.get(package, 'unknown')}" for package in packages]
    if any(r.provider in RUNTIMES for r in source.rows) and facts.get("peers"):
        versions.append(facts["peers"])
    parts = [
        f"## {title}: {facts['machine']}, {facts['date']}",
        _filled(
            f"`{facts.get('command', 'unknown')}`, commit {facts['commit']}, "
            f"{', '.join(versions)}; {'; '.join(_rates(source.rows))}. Rows: "
            f"[{name}](../benchmarks/results/{name})."
        ),
    ]
    shown = [r for r in source.rows if r.direction in sum(PANELS.values(), ())]
    groups = [[r for r in shown if (r.direction in PANELS) == core] for core in (True, False)]
    for rows in groups:
        if any(r.median_us is not None for r in rows):
            parts.append(_table(rows, _time))
    if found := list(_errors(source.rows)):
        parts.append(
            _filled(
                f"Our largest error against float64: {', '.join(found)}. The rule is twice, and "
                "one ulp of the largest value."
            )
        )
    for rows in groups:
        if held := [r for r in rows if r.peak_mb is not None]:
            parts += ["Peak memory that a call adds:", _table(held, _memory)]
    for kind in figures_of(source):
        parts.append(f"![{CAPTIONS[kind]}](images/{image_of(source.path, kind)})")
    if without := list(_untimed(source.rows)):
        parts.append("\n".join(without))
    return "\n\n".join(parts) + "\n"


def counted_in(folder: Path) -> Iterator[str]:
    """What a profiler counted, a section a file."""
    for path in sorted(folder.glob("*.csv")):
        if path.name.startswith("gpu-none"):  # of a rehearsal
            continue
        rows, facts = counted.read(path)
        header, lines = counted.table_of(rows)
        yield f"## Counted by Nsight Compute: {facts['machine']}, {facts['date']}\n"
        yield _filled(
            f"`python -m benchmarks.gpu_tools.counters`, commit {facts['commit']}, torch "
            f"{facts['torch']}, triton {facts['triton']}; each launch once, at the clocks as they "
            f"were. Rows: ["
            f"{path.name}](../benchmarks/results/counters/{path.name}).\n"
        )
        yield "\n".join(["", *markdown_table(header, lines, "l" * len(header)), ""])


def sources_in(folder: Path) -> list[Measured]:
    """Files that have rows, those of a rehearsal left out."""
    paths = (p for p in sorted(folder.glob("*.csv")) if not p.name.startswith("gpu-none"))
    return [source for source in map(measured, paths) if source.rows]


def page(sources: Sequence[Measured], counters: Iterable[str] = ()) -> str:
    on_gpu = any(source.path.name.startswith("gpu") for source in sources)
    sections = [*map(section, sources)] or ["No rows are kept yet.\n"]
    drawn = headline.headline(sources) is not None
    return string.Template(TEMPLATE.read_text()).substitute(
        headline=f"![{HEADLINE}](images/{headline.IMAGE})\n\n" if drawn else "",
        measured="\n".join([*sections, *counters]).rstrip("\n"),
        no_gpu="" if on_gpu else NO_GPU,
        unmeasured="\n".join(unmeasured(sources)) or "- Nothing that the suites name.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    sources = sources_in(RESULTS)
    PAGE.write_text(page(sources, counted_in(counted.COUNTED)))
    readme.README.write_text(readme.filled(readme.README.read_text(), sources))
    drawn = draw([source.path for source in sources], IMAGES)
    for path in set(IMAGES.glob(FIGURES)) - set(drawn):
        path.unlink()
    top = headline.draw([source.path for source in sources], IMAGES / headline.IMAGE)
    drawn += [] if top is None else [top]
    print(f"wrote {PAGE.relative_to(PAGE.parent.parent)} and {len(drawn)} figures")
