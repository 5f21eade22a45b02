"""Inference runtimes beside PyTorch's forms of a model: checked, timed in turn, or told apart."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest
import torch
from command_lines import ROOT, output_of
from torch import nn

pytest.importorskip("timm", reason="whole models are timm's")

from benchmarks import models
from benchmarks.baselines import runtimes
from benchmarks.baselines.runtimes import PACKAGES, RUNTIMES, Runtime, versions
from benchmarks.cpu import CPU_FORMS, parse
from benchmarks.device import Cpu
from benchmarks.models import TOYS, Made, Models, rows_of, toy_model
from benchmarks.suite import Run, Suite

TOY = next(iter(TOYS))
BOTH = {"toy": Made(toy_model, 3, 24)}


class Stub(nn.Module):
    """A runtime that calls the stock model, off by `error`."""

    error = 0.0

    def __init__(self, path, dtype):
        super().__init__()
        self.model = torch.load(path, weights_only=False)

    def forward(self, images):
        return self.model(images) + self.error


@pytest.fixture
def stub(monkeypatch):
    """In place of OpenVINO; no package is needed."""

    def export(stock, images, folder):
        torch.save(stock, folder / "model.pt")
        return folder / "model.pt"

    monkeypatch.setattr(runtimes, "export", export)
    monkeypatch.setitem(RUNTIMES, "OpenVINO", Runtime(Stub, (), (torch.float32,)))


def rows(*forms: str) -> list:
    return list(rows_of("toy", Cpu(), dict.fromkeys(forms), 2, BOTH))


def test_runtime_is_timed_in_turn_for_inference_alone(cpu_kernels, stub, monkeypatch):
    sample = create_autospec(Models.sample, side_effect=Models.sample)
    monkeypatch.setattr(Models, "sample", sample)
    found = rows("stock", "patched", "OpenVINO")
    assert {(r.provider, r.direction) for r in found} == {
        *((form, step) for form in ("stock", "patched") for step in models.STEPS),
        ("OpenVINO", "inference"),
    }
    order = [call.args[1] for call in sample.call_args_list[:6]]
    assert order == ["stock", "patched", "OpenVINO", "patched", "OpenVINO", "stock"]
    (row,) = (r for r in found if r.provider == "OpenVINO")
    assert row.median_us > 0
    assert row.samples == 2
    assert row.error == pytest.approx(1, rel=0.5)  # a batch of another size is summed otherwise
    assert row.peak_mb is None  # torch's allocator does not see it


def test_runtime_that_breaks_the_error_rule_has_a_reason_and_no_time(
    cpu_kernels, stub, monkeypatch
):
    monkeypatch.setattr(Stub, "error", 1e-3)
    found = {(r.provider, r.direction): r for r in rows("stock", "OpenVINO")}
    wrong = found["OpenVINO", "inference"]
    assert wrong.median_us is None
    assert wrong.note.startswith("AssertionError: logits: ")
    assert found["stock", "inference"].median_us > 0


def test_model_for_inference_alone_has_no_training_step(cpu_kernels):
    made = {"toy": Made(toy_model, 3, 24, ("inference",))}
    found = list(rows_of("toy", Cpu(), dict.fromkeys(("stock", "patched")), 1, made))
    assert {r.direction for r in found} == {"inference"}


def test_missing_package_and_dtype_are_reasons_in_the_rows(
    cpu_kernels, stub, monkeypatch, tmp_path, capsys
):
    missing = Runtime(Stub, ("no_such_package", "nor_this"), (torch.float32,))
    monkeypatch.setitem(RUNTIMES, "ONNX Runtime", missing)
    options = parse(["--threads", "1", "--model-rounds", "1", "--csv", str(tmp_path / "a.csv")])
    suite = Suite(Cpu(torch.bfloat16), {}, {}, TOYS, (), ("stock", "patched", *RUNTIMES))
    told = output_of(capsys, Run(suite, options).measure)
    assert f"{TOY}: ONNX Runtime: not installed: pip install no_such_package nor_this" in told
    assert f"no time for {TOY}: OpenVINO: computes in float32, not in bfloat16" in told


def test_forms_of_a_cpu_end_with_the_runtimes():
    assert CPU_FORMS[-len(RUNTIMES) :] == tuple(RUNTIMES)


def test_versions_are_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(runtimes, "PACKAGES", ("pytest", "no_such_package"))
    assert versions() == f"pytest {pytest.__version__}"
    monkeypatch.setattr(runtimes, "PACKAGES", ())
    assert versions() == "none"


def test_extra_names_every_package():
    project = (ROOT / "pyproject.toml").read_text()
    (line,) = (x for x in project.splitlines() if x.startswith("peers = "))
    assert all(f'"{name}"' in line for name in PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RUNTIMES)
def test_runtime_agrees_with_stock(name, dtype, recwarn):
    if (reason := RUNTIMES[name].why_not(dtype)) is not None:
        pytest.skip(f"{name}: {reason}")
    made = Models(TOY, Cpu(dtype), TOYS)
    try:
        made.form(name)
    except RuntimeError as error:
        if "no bf16 on this CPU" in str(error):
            pytest.skip(str(error))
        raise
    errors = made.check(name)
    assert 0 < errors["logits"] < models.PEER_FACTOR
    made.warm(name)
    assert made.sample(name, "inference") > 0
