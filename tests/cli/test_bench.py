"""`python -m swin_kernels bench`: a model at a size of the user's, checked before it is timed."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest
import torch
from command_lines import output_of, refusal
from tiers import thorough

pytest.importorskip("rich")
pytest.importorskip("timm")

from patch_models import small_model

from swin_kernels.__main__ import main
from swin_kernels.cli import bench, inputs, memory
from swin_kernels.testing import timing

NAME = "swin_tiny_patch4_window7_224"


@pytest.fixture
def small(monkeypatch):
    """A Swin of one stage in the place of every model, and peaks without other processes."""

    def create(name, size=None):
        size = size or (24, 24)
        module = small_model("v1", size, depths=(2,), num_heads=(1,), patch_size=2, window_size=3)
        module.pretrained_cfg = {"input_size": (3, *size)}
        return module

    def peak_memory(spec, variants):
        return {variant: dict.fromkeys(timing.STEPS, 3_000_000) for variant in variants}

    monkeypatch.setattr(inputs, "create", create)
    monkeypatch.setattr(memory, "peak_memory", peak_memory)


def _rows(text: str) -> dict[str, list[str]]:
    lines = (line.strip("| ").split("|") for line in text.splitlines() if line.count("|") > 3)
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.slow
def test_model_at_a_size_is_checked_and_timed(cpu_kernels, capsys):
    arguments = ["--size", "32x64", "--batch", "1", "--rounds", "2", "--threads", "1"]
    out = output_of(capsys, main, ["bench", "--model", NAME, *arguments])
    assert "batch of 1, 32×64, float32" in out
    assert "backend cpu" in out
    assert "replaced in 12 of 12 blocks" in out
    assert "Within the error rule" in out
    rows = _rows(out)
    assert {"logits", "gradients", "each gradient", *timing.STEPS} <= rows.keys()
    for step in timing.STEPS:
        stock, patched, ratio, *peaks = rows[step]
        assert float(stock.split()[0]) / float(patched.split()[0]) == pytest.approx(
            float(ratio), abs=0.02
        )
        assert all(float(peak) > 0 for peak in peaks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_what_is_checked_and_timed(cpu_kernels, small, monkeypatch, dtype, capsys):
    inference = Mock(wraps=timing.STEPS["inference"])
    monkeypatch.setitem(timing.STEPS, "inference", inference)
    out = output_of(capsys, main, ["bench", "--dtype", dtype, "--batch", "6", "--rounds", "1"])
    assert f"batch of 6, 24×24, {dtype}" in out
    for (module, images), _ in inference.call_args_list:
        assert {x.dtype for x in (images, *module.parameters())} == {getattr(torch, dtype)}
    inference.assert_called()


@pytest.mark.parametrize(
    "compiler",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=thorough(
                "test_bench.py::test_compiled_models_are_judged_by_their_logits_and_timed",
                "test_patch_timm_running.py::test_compile_with_inductor_trains_as_eager",
            ),
        ),
    ],
)
def test_compiled_models_are_judged_by_their_logits_and_timed(
    compiler, cpu_kernels, small, monkeypatch, capsys
):
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiling(module, backend=compiler))
    out = output_of(capsys, main, ["bench", "--compile", "--batch", "2", "--rounds", "1"])
    assert "float32, compiled" in out
    assert "logits, compiled" in _rows(out)


def test_wrong_results_are_not_timed_and_are_the_exit_code(cpu_kernels, small, monkeypatch, capsys):
    make = timing.patched_copy

    def wrong(module, images):
        patched, report, backend = make(module, images)
        with torch.no_grad():
            patched.head.fc.bias += 1
        return patched, report, backend

    monkeypatch.setattr(timing, "patched_copy", wrong)
    monkeypatch.setattr(timing, "time_in_turn", lambda *_: pytest.fail("was timed"))
    out = output_of(capsys, main, ["bench", "--rounds", "1"], code=1)
    assert "beyond the error rule: logits: largest error" in out
    assert "÷ patched" not in out


def test_without_a_known_peak_the_times_are_told(cpu_kernels, small, monkeypatch, capsys):
    failing = Mock(side_effect=RuntimeError("stock: out of memory"))
    monkeypatch.setattr(memory, "peak_memory", failing)
    out = output_of(capsys, main, ["bench", "--rounds", "1", "--batch", "1"])
    assert _rows(out)["inference"][-2:] == ["–", "–"]
    assert "Peak memory could not be measured: stock: out of memory" in out


def test_calls_alternate_and_few_images_are_checked(cpu_kernels, small, monkeypatch):
    options = bench.argparse.ArgumentParser()
    bench.add_options(options)
    prepared = bench.prepare(options.parse_args(["--batch", "6", "--rounds", "2"]))
    run_once = Mock(wraps=timing.run_once)
    monkeypatch.setattr(timing, "run_once", run_once)
    assert bench.run(prepared) == 0
    assert [len(call.args[1]) for call in run_once.call_args_list] == [bench.CHECKED] * 3


def test_models_without_a_working_kernel_say_so(small, monkeypatch, capsys):
    make = timing.patched_copy
    monkeypatch.setattr(timing, "patched_copy", lambda *x: (*make(*x)[:2], "none"))
    assert "no window of" in refusal(main, ["bench"], capsys)


OWN = """
import timm

def make():
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=24, patch_size=2, window_size=3, embed_dim=16, depths=(2,), num_heads=(1,),
        num_classes=10)
    model.head.fc.bias.data.fill_(3.0)
    return model
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:swin_kernels.patch")
def test_a_model_of_the_users_own_keeps_its_weights(cpu_kernels, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_swin.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)  # of the peaks' processes
    seen, prepare = [], bench.prepare
    monkeypatch.setattr(bench, "prepare", lambda x: seen.append(prepare(x)) or seen[-1])
    arguments = ["--size", "24", "--batch", "1", "--rounds", "2", "--threads", "1"]
    out = output_of(capsys, main, ["bench", "--model", "own_swin:make", *arguments])
    assert "own_swin:make" in out
    assert "replaced in 2 of 2 blocks" in out
    assert "Within the error rule" in out
    assert all("–" not in _rows(out)[step][4] for step in timing.STEPS)
    assert (seen[0].modules["stock"].head.fc.bias == 3).all()
