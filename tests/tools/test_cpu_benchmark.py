"""The benchmarks of a CPU, at toy sizes."""

from __future__ import annotations

import json
import os
import platform

import pytest
import torch
from command_lines import ROOT, refusal, run_python

pytest.importorskip("timm", reason="whole models are timm's")

from tiers import thorough

from benchmarks import cpu
from benchmarks.baselines import providers
from benchmarks.cases import cpu_cases, other_cpu_cases, toy_cases
from benchmarks.device import Cpu, MachinePeaks
from benchmarks.models import TOYS
from benchmarks.report.rows import read
from benchmarks.timing import DIRECTIONS, Gate, make_inputs


@pytest.fixture
def toys(monkeypatch):
    """Small cases and a small model in place of the real ones; nothing is compiled."""
    small = {name: case.but(dtype=torch.float32) for name, case in toy_cases().items()}
    monkeypatch.setattr(cpu, "cpu_cases", lambda: {"toy": small["toy"]})
    monkeypatch.setattr(cpu, "other_cpu_cases", lambda: {"toy tiles": small["toy tiles"]})
    monkeypatch.setattr(cpu.models, "CPU_MODELS", TOYS)
    monkeypatch.setattr(cpu, "CPU_FORMS", ("stock", "patched"))
    monkeypatch.setattr(Cpu, "copied_bytes", 2**16)
    monkeypatch.setattr(Cpu, "matrix_size", 64)
    monkeypatch.setattr(Cpu, "cache_bytes", 1e3)
    kept = tuple(p for p in cpu.CPU_PROVIDERS if not p.slow)
    monkeypatch.setattr(cpu, "CPU_PROVIDERS", kept)
    return [p.name for p in kept]


@pytest.mark.slow
def test_every_case_has_times_errors_checked_and_peaks(cpu_kernels, toys, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = ["--rounds", "2", "--model-rounds", "1", "--threads", "1", "--csv", str(path)]
    assert cpu.main(options) == 0
    rows, facts = read(path)
    assert not any(row.note for row in rows), [row.note for row in rows]
    assert "1 threads" in facts["machine"]
    assert facts["command"].startswith("python -m benchmarks.cpu --rounds 2")
    expected = {(c, p, d) for c in ("toy", "toy tiles") for p in toys for d in DIRECTIONS}
    steps = ("inference", "training step")
    expected |= {("toy model, batch 3", f, s) for f in ("stock", "patched") for s in steps}
    assert {row[:3] for row in rows} == expected
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        if row.direction == "backward":
            assert row.peak_mb is None  # what it adds is not told from what the forward keeps
        else:
            assert row.peak_mb > 0
        if row.direction == "forward + backward":
            assert row.error is None
        else:
            limit = 2.5 if row.provider in ("ours", "patched") else 10  # an ulp more than 2
            assert 0.1 < row.error < limit
    assert "toy tiles" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "toy",
        pytest.param(
            "toy unshifted, d30",
            marks=thorough(
                "test_cpu_benchmark.py::test_flex_attention_compiles_for_a_cpu_and_agrees"
            ),
        ),
    ],
)
def test_flex_attention_compiles_for_a_cpu_and_agrees(name):
    case, device = toy_cases()[name].but(dtype=torch.float32), Cpu()
    torch._dynamo.reset()
    gate = Gate(case, device, make_inputs(case, device, 0))
    try:
        found = gate.check(providers.flex(case, device), 10, backward=False)
    except torch._inductor.exc.InductorError as error:
        reason = str(error)
        if "Unsupported for now if query, key, value are the same buffer" not in reason:
            raise
        pytest.skip(f"FlexAttention of torch {torch.__version__} takes no views of one buffer")
    assert found.keys() == {"forward"}


@pytest.fixture
def suites(monkeypatch):
    """What would have been measured."""
    made = []
    monkeypatch.setattr(cpu.Run, "measure", lambda run: made.append(run.suite) or 0)
    return made


def test_another_dtype_is_that_of_every_case_and_model(cpu_kernels, toys, tmp_path, suites):
    path = tmp_path / "rows.csv"
    assert cpu.main(["--dtype", "bf16", "--threads", "1", "--csv", str(path)]) == 0
    (suite,) = suites
    dtypes = {case.dtype for case in (suite.cases | suite.others).values()}
    assert dtypes == {torch.bfloat16} == {suite.device.dtype}
    assert suite.models == TOYS


def test_models_alone_are_measured_without_cases_in_a_file_of_their_own(
    cpu_kernels, toys, tmp_path, suites, monkeypatch
):
    monkeypatch.setattr(cpu, "RESULTS", tmp_path)
    name = next(iter(TOYS))
    for chosen in ([], [name]):
        assert cpu.main(["--threads", "1", "--models", *chosen]) == 0
    assert all(not s.cases and not s.others and s.models == TOYS for s in suites)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-models-")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cases", "T9"], "expected of ['T1 shift 3'"),
        (["--models", "swin_huge"], "expected of ['swin_tiny, batch 8', 'swin_tiny, batch 1',"),
        (["--threads", "0"], "at least 1, got '0'"),
        (["--rounds", "0"], "at least 1, got '0'"),
        (["--budget", "-1"], "expected seconds, 0 or more, got '-1'"),
        (["--limit", "soon"], "expected seconds, 0 or more, got 'soon'"),
    ],
)
def test_wrong_options_end_with_one_line_before_anything_runs(arguments, complaint, capsys):
    assert complaint in refusal(cpu.main, arguments, capsys)


def test_cases_are_the_stages_and_two_larger_windows_in_fp32():
    cases = cpu_cases()
    assert [(c.size[0], c.heads) for c in cases.values() if not any(c.shift)] == [
        (56, 3),
        (28, 6),
        (14, 12),
        (7, 24),
    ]
    assert len(cases) == 7
    assert [c.grid.tokens for c in other_cpu_cases().values()] == [256, 343, 392, 64, 64]
    assert {c.dtype for c in (cases | other_cpu_cases()).values()} == {torch.float32}


def test_peak_is_of_what_is_held_at_once():
    def allocate():
        first = torch.empty(1_000_000)
        second = torch.empty(2_000_000)
        del first
        return second, torch.empty(1_000_000)

    assert Cpu().peak_bytes(allocate) == 12_000_000


def test_machine_peaks_are_bytes_and_flop_a_second_of_the_median_sample(monkeypatch):
    monkeypatch.setattr(Cpu, "copied_bytes", 1024)
    monkeypatch.setattr(Cpu, "matrix_size", 8)
    ends = iter([0.5, 8.0, 0.25, 2.0, 1.0, 4.0])  # seconds of copy, product, copy, …
    monkeypatch.setattr(Cpu, "seconds", lambda self, first, last: next(ends))
    peaks = MachinePeaks(Cpu())
    for _ in range(3):
        peaks.sample()
    assert peaks.rates() == (2 * 1024 / 0.5, 2 * 8**3 / 4.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_not_asked_for_again():
    code = """if True:
        import resource, sys
        import torch
        from benchmarks.device import keep_freed_memory

        assert keep_freed_memory()
        before = 0
        for call in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(16 << 20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    assert int(run_python("-c", code).stdout) < 100  # of the 16,384 pages that a call writes


@pytest.mark.slow
def test_every_case_provider_and_direction_is_timed(cpu_kernels, tmp_path):
    """`pytest benchmarks --benchmark-only`, in a process of its own."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "times.json"
    options = ["--benchmark-json", str(path), "--benchmark-max-time", "1e-3"]
    options += ["--benchmark-min-rounds", "1", "-p", "no:cacheprovider"]
    # a run shared by processes times nothing, and neither would its children
    unshared = {name: None for name in os.environ if name.startswith("PYTEST_XDIST")}
    variables = {"SWIN_KERNELS_REHEARSE": "1", "OMP_NUM_THREADS": "1"} | unshared
    run_python("-m", "pytest", "-q", "benchmarks", "--benchmark-only", *options, **variables)
    found = {x["param"]: x for x in json.loads(path.read_text())["benchmarks"]}
    providers = [p for p in cpu.CPU_PROVIDERS if not p.slow]
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
