"""`pytest benchmarks --benchmark-only`, at toy sizes and in a process of its own."""

from __future__ import annotations

import json
import os

import pytest
from command_lines import ROOT, run_python

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import toy_cases
from benchmarks.cpu import CPU_PROVIDERS

pytestmark = pytest.mark.slow


def test_every_case_provider_and_direction_is_timed(cpu_kernels, tmp_path):
    path = tmp_path / "times.json"
    options = ["--benchmark-json", str(path), "--benchmark-max-time", "1e-3"]
    options += ["--benchmark-min-rounds", "1", "-p", "no:cacheprovider"]
    # a run shared by processes times nothing, and neither would its children
    unshared = {name: None for name in os.environ if name.startswith("PYTEST_XDIST")}
    variables = {"SWIN_KERNELS_REHEARSE": "1", "OMP_NUM_THREADS": "1"} | unshared
    run_python("-m", "pytest", "-q", "benchmarks", "--benchmark-only", *options, **variables)
    found = {x["param"]: x for x in json.loads(path.read_text())["benchmarks"]}
    providers = [p for p in CPU_PROVIDERS if not p.slow]
    expected = [(c, p.name, d) for c in toy_cases() for p in providers for d in p.directions]
    assert list(found) == ["-".join(x) for x in expected]
    for case, _, direction in expected:
        x = found[f"{case}-ours-{direction}"]
        assert x["group"] == f"{case}, {direction}"
        assert x["extra_info"]["calls"] >= 2
        assert (x["extra_info"]["error"] is None) == (direction == "forward + backward")
        assert x["stats"]["median"] > 0


def test_plain_pytest_collects_no_benchmark(request):
    assert request.config.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))
    assert "bench_*.py" in request.config.getini("python_files")
