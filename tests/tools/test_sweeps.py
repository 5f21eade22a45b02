"""Sweeps at toy sizes, with the attentions over all tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from command_lines import refusal

from benchmarks import cpu, gpu
from benchmarks.baselines import global_attentions
from benchmarks.baselines.providers import DIRECTIONS
from benchmarks.device import Cpu, DryRunDevice
from benchmarks.report.rows import read
from benchmarks.suite import OTHER_FUNCTION
from benchmarks.sweeps import ALTERNATIVES, RESOLUTIONS, UNITS, sweeps, varied
from swin_kernels.testing import Case

pytestmark = pytest.mark.slow

TOY = Case(1, (6, 6), (3, 3), (1, 1), 2, 8, packed=True, bias="table", layout="contiguous")


@pytest.mark.parametrize("kind", UNITS)
def test_one_size_varies_and_names_tell_it(kind):
    cases = sweeps()[kind]
    sizes = {
        "batch": lambda c: c.batch,
        "resolution": lambda c: c.size[0],
        "window": lambda c: c.window[0],
    }
    assert [varied(name) for name in cases] == [(kind, sizes[kind](c)) for c in cases.values()]
    for other in UNITS.keys() - {kind}:
        assert len({sizes[other](c) for c in cases.values()}) == 1
    for case in cases.values():
        assert case.dtype == torch.float32
        assert not case.grid.needs_padding
        assert any(case.shift)


def test_resolutions_reach_from_one_stage_to_four_times_another():
    assert (RESOLUTIONS[0], RESOLUTIONS[-1]) == (28, 112)
    first = sweeps()["resolution"]["resolution 28"]
    assert (first.batch, first.heads, first.head_dim) == (1, 3, 32)


def test_sweep_of_resolution_times_alternatives_forward_and_says_they_have_no_gate(
    cpu_kernels, monkeypatch, tmp_path
):
    cases = {f"resolution {n}": TOY.but(size=(n, n)) for n in (6, 9)}
    monkeypatch.setattr(cpu, "sweeps", lambda: {"resolution": cases})
    kept = tuple(p for p in cpu.CPU_PROVIDERS if p.name in ("ours", "unfused"))
    monkeypatch.setattr(cpu, "CPU_PROVIDERS", kept)
    for name, value in (("copied_bytes", 2**16), ("matrix_size", 64), ("cache_bytes", 1e3)):
        monkeypatch.setattr(Cpu, name, value)
    path = tmp_path / "rows.csv"
    options = ["--sweep", "resolution", "--rounds", "2", "--threads", "1", "--csv", str(path)]
    assert cpu.main(options) == 0
    rows, facts = read(path)
    assert "--sweep resolution" in facts["command"]
    others = {p.name for p in ALTERNATIVES}
    assert {(r.case, r.provider, r.direction) for r in rows} == {
        *((c, p, d) for c in cases for p in ("ours", "unfused") for d in DIRECTIONS),
        *((c, p, "forward") for c in cases for p in others),
    }
    for row in rows:
        assert row.median_us is not None, row
        assert (row.note == OTHER_FUNCTION) == (row.provider in others)
        assert (row.error is None) == (
            row.provider in others or row.direction == "forward + backward"
        )
        assert (row.of_matrix_rate is None) == (row.provider in others)


@pytest.mark.parametrize("provider", ALTERNATIVES, ids=lambda p: p.name)
def test_alternative_takes_a_map_of_a_case_and_gives_its_output(provider):
    case = sweeps()["resolution"]["resolution 28"].but(size=(9, 8))
    out = provider.make(case, Cpu())(torch.randn(1, 9, 8, 3, 3, 32), None, None)
    assert out.shape == (1, 9, 8, 3, 32)
    assert provider.directions == ("forward",)


def test_routing_has_as_many_clusters_as_a_cluster_has_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(global_attentions, "routing", lambda *arguments: seen.append(arguments))
    case = sweeps()["resolution"]["resolution 28"]
    next(p for p in ALTERNATIVES if p.name == "routing").make(case, Cpu())(None, None, None)
    ((_, centroids, cluster),) = seen
    assert len(centroids) == cluster == math.isqrt(28 * 28)


def test_sweep_and_cases_exclude_each_other(capsys):
    arguments = ["--sweep", "batch", "--cases", "w16"]
    assert "not allowed with" in refusal(cpu.main, arguments, capsys)


@pytest.mark.parametrize("kind", UNITS)
def test_a_gpu_has_the_same_sweeps_of_more_images(kind, monkeypatch):
    monkeypatch.setattr(gpu, "Cuda", lambda: SimpleNamespace(dtype=torch.bfloat16))
    suite = gpu.suite_of(gpu.parse(["--sweep", kind]))
    on_cpu = list(sweeps()[kind].values())
    for ours, theirs in zip(suite.cases.values(), on_cpu, strict=True):
        assert ours == theirs.but(batch=16 * theirs.batch, dtype=torch.bfloat16)
    assert all(varied(name)[0] == kind for name in suite.cases)
    extra = {p.name for p in suite.providers} - {p.name for p in gpu.GPU_PROVIDERS}
    assert extra == ({p.name for p in ALTERNATIVES} if kind == "resolution" else set())
    assert (suite.others, suite.models) == ({}, {})


def test_rows_of_a_gpu_sweep_are_in_a_file_of_their_own(tmp_path, monkeypatch):
    """The program from end to end, a CPU in the GPU's place and peers alone."""
    monkeypatch.setattr(DryRunDevice, "dtype", torch.float32)
    monkeypatch.setattr(gpu, "Cuda", DryRunDevice)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "sweeps", lambda images: {"resolution": {"resolution 6": TOY}})
    kept = tuple(p for p in gpu.GPU_PROVIDERS if p.name in ("reference", "unfused"))
    monkeypatch.setattr(gpu, "GPU_PROVIDERS", kept)
    assert gpu.main(["--sweep", "resolution", "--rounds", "2"]) == 0
    (path,) = tmp_path.glob("gpu-resolution-*.csv")
    rows, facts = read(path)
    assert {r.provider for r in rows} == {"reference", "unfused", *(p.name for p in ALTERNATIVES)}
    assert all(r.median_us is not None for r in rows), rows
    assert "--sweep resolution" in facts["command"]
