"""The README's figure and figures: from the newest rows, losses and gaps included."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib")
image_files = pytest.importorskip("PIL.Image", reason="matplotlib brings it")

from report_rows import timed, written

from benchmarks.cases import cpu_cases
from benchmarks.report import headline, plots, readme, writer
from benchmarks.report.rows import Row

README = readme.README
PEERS = {"timm": "1.0", "peers": "onnx 1, onnxruntime 2, openvino 3"}
BF16 = {"command": "python -m benchmarks.cpu --dtype bf16"}
MARKED = "a\n<!-- rows: {} -->\nold\n<!-- end of rows -->\nb"
BATCH_8, BATCH_1 = "swin_tiny, batch 8", "swin_tiny, batch 1"


STAGES = [
    timed(case, provider, direction, median)
    for i, case in enumerate(cpu_cases())
    for direction in ("forward", "forward + backward")
    for provider, median in (("ours", 10.0 if i else 5.0), ("unfused", 40.0), ("sdpa", 50.0))
]
MODELS = [
    timed(BATCH_8, "stock", "inference", 600e3),
    timed(BATCH_8, "patched", "inference", 500e3),
    timed(BATCH_8, "OpenVINO", "inference", 400e3),
    Row(BATCH_8, "ONNX Runtime", "inference", note="AssertionError: logits: error=1"),
    timed(BATCH_8, "stock", "training step", 2000e3),
    timed(BATCH_8, "patched", "training step", 1600e3),
]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_speeds_are_beside_stock_with_losses_and_reasons(tmp_path):
    source = written(tmp_path, "cpu-a.csv", STAGES + MODELS, **PEERS)
    figure, files = headline.headline([source])
    assert [source.path.name for source in files] == ["cpu-a.csv"]
    inference, training, forward, backward = figure.axes  # none of batch 1 was measured
    assert inference.get_title(loc="left") == "inference, batch 8\n(stock: 600 ms)"
    labels = [label.get_text() for label in inference.get_yticklabels()]
    assert list(zip(labels, texts(inference), strict=True)) == [
        ("timm (stock)", "1.00×"),
        ("torch.compile", "not measured"),
        ("ONNX Runtime", "breaks the error rule"),
        ("OpenVINO", "1.50×"),
        ("swin_kernels", "1.20×"),
        ("+ torch.compile", "not measured"),
    ]
    assert texts(training)[2:4] == ["inference only"] * 2
    mean = 4 * 2 ** (1 / 7)
    assert texts(forward) == ["1.00×", "0.80×", "not measured", "not measured", f"{mean:.2f}×"]
    assert "no backward on a CPU" in texts(backward)
    caption = figure.texts[-1].get_text()
    told = ("A CPU", "torch 2.11", "timm 1.0", "OpenVINO 3", "ONNX Runtime 2", "2000-01-01")
    assert all(fact in caption for fact in told)


def test_newest_rows_in_fp32_are_drawn_and_both_files_named(tmp_path):
    old = written(tmp_path, "cpu-a.csv", STAGES + MODELS)
    newer = [*MODELS, timed(BATCH_1, "stock", "inference", 60e3)]
    models = written(tmp_path, "cpu-models-b.csv", newer, date="2001-01-01", machine="B CPU")
    bf16 = written(tmp_path, "cpu-bf16-c.csv", STAGES + MODELS, date="2002-01-01", **BF16)
    few = written(tmp_path, "cpu-d.csv", STAGES[:4], date="2002-01-01")
    figure, files = headline.headline([old, models, bf16, few])
    assert files == [models, old]
    assert [a.get_title(loc="left").partition("\n")[0] for a in figure.axes[:3]] == [
        "inference, batch 8",
        "inference, batch 1",
        "training step, batch 8",
    ]
    assert len(figure.texts[-1].get_text().splitlines()) == 2


@pytest.mark.parametrize("rows", [[], STAGES, MODELS], ids=["none", "no model", "no stage"])
def test_rows_that_do_not_suffice_make_no_figure_and_no_text(rows, tmp_path):
    source = written(tmp_path, "cpu-a.csv", rows)
    assert headline.headline([source]) is None
    assert readme.filled(MARKED.format("gains"), [source]) == MARKED.format("gains")
    assert headline.draw([source.path], tmp_path / "a.png") is None


def test_readme_tells_gains_losses_and_gaps(tmp_path):
    sources = [written(tmp_path, "cpu-a.csv", STAGES + MODELS)]
    text = readme.filled(MARKED.format("gains"), sources)
    assert text.startswith("a\n<!-- rows: gains -->\n**Gains, on a CPU** (A CPU, 2 threads, avx2).")
    assert text.endswith("\n<!-- end of rows -->\nb")
    words = " ".join(text.split())
    assert "old" not in words
    assert "4.0 to 8.0 times faster than timm's own steps in the forward" in words
    assert "inference at batch 8 runs at 1.20 times stock's speed, a training step at" in words
    assert "Faster still: for inference at batch 8 OpenVINO (1.50)." in words
    assert "Not yet measured in the same run: ONNX Runtime." in words


def test_readme_has_a_table_of_speeds_with_those_of_bf16_and_where_they_are_from(tmp_path):
    sources = [
        written(tmp_path, "cpu-a.csv", STAGES + MODELS),
        written(tmp_path, "cpu-bf16-a.csv", MODELS[:2], **BF16),
    ]
    text = readme.filled(MARKED.format("table"), sources)
    header, _, *lines = [x for x in text.splitlines() if x.startswith("|")]
    assert "| inference, batch 8 | training step, batch 8 | bf16 inference, batch 8 |" in header
    of = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines}
    assert of["OpenVINO"][:3] == ["1.50", "inference only", "not measured"]
    assert of["**swin_kernels**"][:3] == ["**1.20**", "**1.25**", "**1.20**"]
    words = " ".join(text.split())
    assert "`python -m benchmarks.cpu --threads 2`: [rows](benchmarks/results/cpu-a.csv)" in words
    assert "`python -m benchmarks.cpu --dtype bf16`: [rows](benchmarks/results/cpu-bf16" in words


def test_readme_states_what_the_rows_have():
    text = README.read_text()
    assert set(re.findall("<!-- rows: (.*?) -->", text)) == {"gains", "table"}
    sources = writer.sources_in(writer.RESULTS)
    assert text == readme.filled(text, sources), "run `python -m benchmarks.report`"


def test_figure_of_the_readme_is_drawn_from_the_rows_that_are_kept():
    assert f"(docs/images/{headline.IMAGE})" in README.read_text()
    _, files = headline.headline(writer.sources_in(writer.RESULTS))
    with image_files.open(writer.IMAGES / headline.IMAGE) as image:
        digests = " ".join(plots.digest(source.path) for source in files)
        assert image.text["Source"] == digests, "run `python -m benchmarks.report`"
        assert image.width == 1600
