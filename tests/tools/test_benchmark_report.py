"""The page and the figures of what was measured: from rows alone, and never stale."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib")
image_files = pytest.importorskip("PIL.Image", reason="matplotlib brings it")

from report_rows import FACTS, timed, written

from benchmarks.baselines.providers import PROVIDERS
from benchmarks.cpu import CPU_FORMS
from benchmarks.report import counted, headline, plots, writer
from benchmarks.report.rows import Row
from benchmarks.sweeps import ALTERNATIVES, sweeps

pytestmark = pytest.mark.slow

FIGURES = {"cpu-a-speed.png", "cpu-a-memory.png", "cpu-a-error.png"}  # of `stages`
TIMES = {"ours": 1000.0, "unfused": 2500.0}


@pytest.fixture
def stages(tmp_path):
    """Two cases, one of which a peer failed, and a model."""
    rows = [
        timed(
            case,
            provider,
            direction,
            median,
            peak_mb=median / 100,
            of_floor=0.25,
            copy_gb_s=10.0 if case == "w16" else 12.0,
            matrix_tflop_s=0.1,
        )
        for case in ("T1 shift 3", "w16")
        for direction in ("forward", "forward + backward")
        for provider, median in TIMES.items()
        if (case, provider) != ("w16", "unfused")
    ]
    rows += [Row("w16", "unfused", "forward", note="RuntimeError: no memory")]
    rows += [Row("T1 shift 3", "ours", "backward", 1.0, 1.0, 1.0, 1, error=1.5)]
    rows += [
        timed("swin_tiny, batch 8", form, step, median, peak_mb=1234.5)
        for step in ("inference", "training step")
        for form, median in (("stock", 300e3), ("patched", 200e3))
    ]
    return written(tmp_path, "cpu-a.csv", rows)


@pytest.fixture
def resolution(tmp_path):
    rows = [
        timed(name, provider, "forward", median * case.size[0] ** 2, peak_mb=3.0)
        for name, case in sweeps()["resolution"].items()
        for provider, median in (TIMES | {"global": 9000.0}).items()
    ]
    return written(tmp_path, "cpu-resolution-a.csv", rows)


# the page


def test_counters_have_a_section_of_their_own(tmp_path):
    rows = [
        counted.Counted("T1 shift 3", "forward", "_single_tile_fwd_kernel", 81.25, 61.0, 231e6),
        counted.Counted("T1 shift 3", "backward", "_single_tile_bwd_kernel", stalls="wait 2.00"),
    ]
    counted.write(tmp_path / "gpu-a.csv", rows, FACTS)
    page = writer.page([], writer.counted_in(tmp_path))
    start = page.index("## Counted by Nsight Compute: A CPU, 2 threads, avx2, 2000-01-01")
    assert "| T1 shift 3 | forward | _single_tile_fwd_kernel | 81.2 | 61 % | 231 |" in page[start:]
    assert "| – | – | – | – | – | – | – | – | wait 2.00 |" in page[start:]


def test_page_is_what_the_generator_writes():
    assert writer.PAGE.read_text() == writer.page(
        writer.sources_in(writer.RESULTS), writer.counted_in(counted.COUNTED)
    ), "run `python -m benchmarks.report`"


def test_figures_of_the_page_are_drawn_from_the_rows_that_are_kept():
    linked = set(re.findall(r"\(images/(.*?)\)", writer.PAGE.read_text()))
    assert {p.name for p in writer.IMAGES.glob(writer.FIGURES)} == linked - {headline.IMAGE}
    for source in writer.sources_in(writer.RESULTS):
        for kind in plots.figures_of(source):
            with image_files.open(writer.IMAGES / plots.image_of(source.path, kind)) as image:
                assert image.text["Source"] == plots.digest(source.path), source.path.name


def test_section_has_facts_tables_and_figures(stages):
    text = writer.section(stages)
    assert text.startswith("## Stages and whole models: A CPU, 2 threads, avx2, 2000-01-01\n")
    words = " ".join(text.split())
    assert "medians of 1 to 7 samples, 7 of a whole model; a copy" in words
    for fact in ("`python -m benchmarks.cpu --threads 2`", "commit c0ffee", "torch 2.11"):
        assert fact in words
    assert "a copy moved 10.0 to 12.0 GB/s; a matrix product 0.100 TFLOP/s" in words
    assert "| T1 shift 3 | forward | 1.00 ms (25 %) | 2.50 ms, **2.50×** |" in text
    assert "| w16 | forward | 1.00 ms (25 %) | – |" in text
    assert "| swin_tiny, batch 8 | inference | 200 ms | 300 ms, **1.50×** |" in text
    assert "| T1 shift 3 | forward | 10.0 MB | 25.0 MB |" in text
    assert "| swin_tiny, batch 8 | training step | 1234 MB | 1234 MB |" in text
    assert "- No time of unfused for w16: RuntimeError: no memory" in text
    assert "of a gradient 1.50 times the unfused path's (T1 shift 3)" in words
    assert "(images/cpu-a-speed.png)" in text
    assert "| backward |" not in text  # alone it is left to the rows


def test_whole_models_alone_have_a_section_with_the_versions_of_their_peers(tmp_path):
    rows = [
        timed("swin_tiny, batch 1", form, "inference", median)
        for form, median in (("patched", 200e3), ("stock", 300e3), ("OpenVINO", 150e3))
    ]
    rows.append(Row("swin_tiny, batch 1", "ONNX Runtime", "inference", note="not installed: pip"))
    peers = {"timm": "1.0", "peers": "openvino 2026.4"}
    text = writer.section(written(tmp_path, "cpu-models-a.csv", rows, **peers))
    assert text.startswith("## Whole models: A CPU, 2 threads, avx2, 2000-01-01\n")
    words = " ".join(text.split())
    assert "timm 1.0, openvino 2026.4; medians of 7 of a whole model. Rows" in words
    assert "| 200 ms | 300 ms, **1.50×** | – | 150 ms, **0.75×** |" in text
    assert "- No time of ONNX Runtime for swin_tiny, batch 1: not installed: pip" in text


def test_what_the_suites_name_and_no_row_has_is_not_measured(stages, resolution, tmp_path):
    nothing = "\n".join(writer.unmeasured([]))
    assert nothing.count("all of it") == 8
    some = " ".join("\n".join(writer.unmeasured([stages, resolution])).split())
    assert "Swin-T's stages, other windows and whole models" in some
    assert "what is left: T1 shift 0; T2 shift 3" in some
    on_cpu, _, on_gpu = some.partition("A GPU")
    assert "swin_tiny, batch 8" not in on_cpu
    assert "swin_tiny, batch 1" in on_cpu
    assert "resolution 28" not in on_cpu
    assert "--sweep resolution`), all of it: resolution 28" in on_gpu
    assert "A GPU (`make gpu`), all of it: T1 shift 3" in some  # which a CPU has rows of


def test_rows_in_another_dtype_say_so_and_do_not_stand_for_the_suite(stages, tmp_path):
    command = "python -m benchmarks.cpu --dtype bf16"
    other = written(tmp_path, "cpu-bf16-none.csv", stages.rows, command=command)
    assert "whole models, bf16: " in writer.section(other).splitlines()[0]
    assert list(writer.unmeasured([other])) == list(writer.unmeasured([]))


def test_page_claims_nothing_of_a_gpu_until_there_are_rows(stages, tmp_path):
    assert "Nothing on a GPU is measured yet" in writer.page([stages])
    on_gpu = written(tmp_path, "gpu-a.csv", [timed("T1 shift 3", "ours", "forward", 1.0)])
    page = writer.page([on_gpu])
    assert "Nothing on a GPU is measured yet" not in page
    assert "whole models (`python -m benchmarks.cpu`), all of it" in " ".join(page.split())


def test_rows_of_a_rehearsal_and_empty_files_are_no_sources(stages, tmp_path):
    written(tmp_path, "gpu-none-rehearsed.csv", [timed("toy", "ours", "forward", 1.0)])
    written(tmp_path, "cpu-b.csv", [])
    assert [s.path.name for s in writer.sources_in(tmp_path)] == ["cpu-a.csv"]
    assert writer.sources_in(tmp_path / "none") == []


def test_report_writes_page_and_figures_and_removes_those_of_rows_that_went(
    stages, tmp_path, monkeypatch
):
    images = tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    (images / "cpu-old-speed.png").write_bytes(b"")
    (images / "shift.png").write_bytes(b"")  # of the README
    monkeypatch.setattr(writer, "RESULTS", tmp_path)
    monkeypatch.setattr(writer, "IMAGES", images)
    monkeypatch.setattr(writer, "PAGE", tmp_path / "docs" / "performance.md")
    monkeypatch.setattr(writer.readme, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# A package\n")
    writer.main([])
    linked = set(re.findall(r"\(images/(.*?)\)", writer.PAGE.read_text()))
    assert {path.name for path in images.iterdir()} == linked | {"shift.png"}
    assert linked == FIGURES


# the figures


def test_figures_have_axes_with_units_legends_and_a_caption(stages, resolution):
    figures = plots.figures_of(stages) | plots.figures_of(resolution)
    assert list(figures) == ["speed", "memory", "error", "resolution"]
    for kind, figure in figures.items():
        assert all(axes.get_xlabel() for axes in figure.axes)
        caption = figure.texts[-1].get_text()
        assert caption == "A CPU, 2 threads, avx2 · torch 2.11 · commit c0ffee · 2000-01-01", kind
        (legend,) = figure.legends
        assert legend.get_texts()
    assert [a.get_title() for a in figures["resolution"].axes] == [
        "forward, ms",
        "forward + backward, ms",
        "peak memory of forward, MB",
    ]


def test_speed_is_beside_ours_with_percentiles(stages):
    axes = plots.speed(stages).axes[0]
    places = {round(float(x), 3) for line in axes.lines for x in line.get_xdata()}
    assert {0.9, 1.0, 1.2, 2.25, 2.5, 3.0, 1.5} <= places  # 1.5: stock ÷ patched
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "T1 shift 3",
        "w16",
        "swin_tiny, batch 8",
    ]


def test_resolution_goes_from_the_first_size_to_the_last_on_logarithmic_axes(resolution):
    axes = plots.sweep(resolution, "resolution").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    ours = next(line for line in axes.lines if line.get_label() == "ours")
    assert list(ours.get_xdata()) == [28, 42, 56, 70, 84, 98, 112]
    assert ours.get_ydata()[0] == pytest.approx(28**2)


def test_rows_without_times_make_no_figure(tmp_path):
    source = written(tmp_path, "cpu-a.csv", [Row("T1 shift 3", "ours", "forward", note="none")])
    assert plots.figures_of(source) == {}


def test_every_provider_and_form_has_a_style_of_its_own_on_a_figure():
    core = [p.name for p in PROVIDERS]
    windows = [n for n in core if n != "ours, graph"]  # on a CPU
    for names in (core, [*windows, *(p.name for p in ALTERNATIVES)], CPU_FORMS):
        assert len({plots.STYLES[name] for name in names}) == len(names)


def test_plots_are_png_files_that_keep_what_they_were_drawn_from(stages, tmp_path):
    out = tmp_path / "images"
    drawn = plots.draw([stages.path], out)
    assert {path.name for path in out.iterdir()} == {path.name for path in drawn} == FIGURES
    for path in out.iterdir():
        with image_files.open(path) as image:
            assert image.format == "PNG"
            assert image.text["Source"] == plots.digest(stages.path)


def test_range_of_samples_and_times_that_wavered_are_told(tmp_path):
    steady = timed("T1 shift 3", "ours", "forward", 1000.0)
    wavering = steady._replace(case="w16", p80_us=1400.0, samples=21)
    text = writer.section(written(tmp_path, "cpu-a.csv", [steady, wavering]))
    assert "medians of 7 to 21 samples. Rows" in " ".join(text.split())
    assert "| T1 shift 3 | forward | 1.00 ms |" in text
    assert "| w16 | forward | ≈ 1.00 ms |" in text
