"""The benchmark of a GPU and its tuner, rehearsed where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import pytest
import torch

pytest.importorskip("triton", reason="what is rehearsed are Triton's kernels")
pytest.importorskip("timm", reason="whole models are timm's")

from command_lines import refusal, run_python
from tiers import thorough
from triton_calls import call_of

from benchmarks import gpu, models, suite
from benchmarks.baselines import providers
from benchmarks.baselines.providers import PROVIDERS
from benchmarks.cases import other_cases, swin_cases, toy_cases
from benchmarks.device import Cuda, DryRunDevice
from benchmarks.gpu_tools.override import override
from benchmarks.gpu_tools.targets import verdicts
from benchmarks.report.rows import ResultsFile, Row, print_plain, read, table_of
from benchmarks.timing import DIRECTIONS, Gate, Loop, Replayed, make_inputs, sample_in_turn
from swin_kernels.backends.triton import config
from swin_kernels.backends.triton.config import INTERPRETER
from swin_kernels.backends.triton.launch_spec import Config
from swin_kernels.testing import Case

pytestmark = pytest.mark.slow

FACTS = {"machine": "none", "torch": "0", "triton": "0", "commit": "unknown", "date": "2000-01-01"}


def interpreted(*arguments: object) -> subprocess.CompletedProcess:
    """A module of benchmarks in a process under Triton's interpreter."""
    # threads of a busy machine wait for each other
    variables = {"SWIN_KERNELS_BACKEND": None, "OMP_NUM_THREADS": "1"}
    return run_python("tests/support/interpreted.py", *arguments, **variables)


@thorough(
    "test_gpu_rehearsal.py::test_every_stage_of_a_run_ends_well_and_leaves_its_results",
    "test_gpu_benchmark.py::test_peers_agree_on_every_toy_case",
    "test_cpu_benchmark.py::test_every_case_has_times_errors_checked_and_peaks",
)
def test_rehearsal_times_every_case_from_end_to_end(tmp_path):
    path = tmp_path / "rows.csv"
    done = interpreted("benchmarks.gpu", "--rehearse", "--budget", "1000", "--csv", path)
    rows, facts = read(path)
    untimed = {(row.provider, row.direction) for row in rows if row.note}
    assert untimed == {("flex", d) for d in DIRECTIONS}, done.stderr  # which has no CPU backward
    expected = {
        *((case, p.name, d) for case in toy_cases() for p in gpu.GPU_PROVIDERS for d in DIRECTIONS),
        *(
            ("toy model, batch 3", form, step)
            for form in models.FORMS
            for step in ("inference", "training step")
        ),
    }
    assert {row[:3] for row in rows} == expected
    assert all(row.median_us > 0 for row in rows if not row.note)
    assert {"machine", "torch", "triton", "commit", "date"} <= facts.keys()
    interpreted("benchmarks.gpu", "--rehearse", "--resume", "--csv", path)
    assert read(path) == (rows, facts)


def test_warming_compiles_the_chosen_part_and_times_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    chosen = ("--cases", "toy 3-D", "--models", "--providers", "flex")
    done = interpreted("benchmarks.gpu", "--rehearse", "--warm", *chosen, "--csv", path)
    assert [x.partition(": ")[0] for x in done.stdout.splitlines()] == ["toy 3-D"]
    assert done.stdout.startswith("toy 3-D: flex: ")
    assert not path.exists()


@pytest.mark.parametrize(
    "options, cases, others, chosen, providers, forms",
    [
        ([], len(swin_cases()), 9, 2, 7, models.FORMS),
        (["--cases", "T1", "V2 w8", "--models"], 2, 2, 0, 7, models.FORMS),
        (["--cases", "--models", "swin_tiny", "--forms", "stock"], 0, 0, 1, 7, ("stock",)),
        (["--providers", "ours", "sdpa"], len(swin_cases()), 9, 2, 2, models.FORMS),
    ],
    ids=["everything", "cases", "models", "providers"],
)
def test_options_leave_a_part_of_the_suite(options, cases, others, chosen, providers, forms):
    whole = suite.Suite(
        DryRunDevice(), swin_cases(), other_cases(), models.MODELS, PROVIDERS, models.FORMS
    )
    left = whole.only(gpu.parse(options))
    counts = len(left.cases), len(left.others), len(left.models), len(left.providers)
    assert counts == (cases, others, chosen, providers)
    assert tuple(left.forms) == forms


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cases", "T1", "nope"], "--cases nope: no such name; there are ['T1 shift 3'"),
        (["--models", "nope"], "--models nope: no such name; there are ['swin_tiny, batch 128'"),
        (["--providers", "nope"], "invalid choice: 'nope'"),
    ],
)
def test_names_that_are_unknown_are_refused(options, message, capsys):
    whole = suite.Suite(DryRunDevice(), swin_cases(), other_cases(), models.MODELS, PROVIDERS)
    with pytest.raises(SystemExit) as stopped:
        whole.only(gpu.parse(options))
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"


def rehearsed(*command: str, **variables: str) -> str:
    """What a command prints that is for a GPU, at toy sizes."""
    return run_python(*command, SWIN_KERNELS_REHEARSE="1", **variables).stdout


@thorough(
    "test_option_pairs.py::test_every_pair_of_options_matches_float64",
    "test_patch_timm.py::test_small_model_trains_as_stock",
)
def test_tests_of_a_gpu_pass_rehearsed():
    """Each of their lines."""
    rehearsed("-m", "pytest", "-q", "tests/gpu", TRITON_INTERPRET="1")


@thorough("test_option_pairs.py::test_every_pair_of_options_matches_float64")
def test_tests_of_a_gpu_pass_rehearsed_with_the_cuda_kernels():
    rehearsed("-m", "pytest", "-q", "--emulate-cuda", "tests/gpu")


def test_what_the_sanitizer_watches_is_a_program():
    rehearsed("-c", "import sys; sys.path.insert(0, 'tests/support'); import cuda_sanitized")


@thorough(
    "test_option_pairs.py::test_every_pair_of_options_matches_float64",
    "test_gpu_benchmark.py::test_what_the_sanitizer_watches_is_a_program",
)
def test_what_the_sanitizer_watches_runs():
    told = rehearsed("tests/support/cuda_sanitized.py", "--emulate")
    assert told == "25 cases ran, forward and backward\n"


@thorough("test_gpu_benchmark.py::test_tuner_writes_what_was_found_beside_what_was_known")
def test_tuner_rehearsal_writes_a_table(tmp_path):
    path = tmp_path / "tuned.json"
    cases = ("--cases", "toy tiles", "toy 3-D")
    done = interpreted("benchmarks.gpu_tools.tune", "--rehearse", *cases, "--out", path)
    for kernel in ("forward", "backward", "dq", "dkv", "dbias"):
        assert f"\n{kernel}-interpreter-float16" in done.stdout
    rows, facts = read(tmp_path / "tuning" / "tuned.csv")
    assert {row.case.partition("-")[0] for row in rows} >= {"forward", "backward", "dq", "dkv"}
    assert all("num_warps=" in row.provider and (row.median_us or row.note) for row in rows)
    assert {"machine", "torch", "triton", "date", "commit"} <= facts.keys()
    table = json.loads(path.read_text())
    for key, fields in table["configs"].items():
        assert Config(**fields)
        assert {"machine", "torch", "triton", "date", "commit"} <= table["measured"][key].keys()


def test_tuner_writes_what_was_found_beside_what_was_known(tmp_path, monkeypatch):
    from benchmarks.gpu_tools import tune

    known = {"measured": {"a": FACTS}, "configs": {"a": {"num_warps": 1}}}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(known))
    monkeypatch.setattr(config, "TUNED", path)
    tune.write(path, {"b": {"num_warps": 2}}, FACTS)
    table = json.loads(path.read_text())
    assert table["configs"] == {"a": {"num_warps": 1}, "b": {"num_warps": 2}}
    assert table["measured"] == {"a": FACTS, "b": FACTS}


def test_override_wins_until_it_ends():
    call = call_of(49, 32, 32, torch.float16, 64, 3)
    key = config.tuned_key("forward", call, INTERPRETER)
    plain = config.config_for("forward", call, INTERPRETER)
    with override({key: {"num_warps": 16}}):
        inner = {key: {"loop_stages": 5}}
        with override(inner):
            assert config.config_for("forward", call, INTERPRETER).loop_stages == 5
        assert config.config_for("forward", call, INTERPRETER).num_warps == 16
    assert config.config_for("forward", call, INTERPRETER) == plain


def test_spent_budget_skips_and_says_so(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert gpu.main(["--rehearse", "--budget", "1e-9", "--csv", str(path)]) == 0
    rows, _ = read(path)
    assert {row.provider for row in rows} >= {"ours", "flex", "patched, compiled"}
    assert all(row.note.startswith("skipped: ") for row in rows)
    assert "no time for toy: ours: skipped" in capsys.readouterr().out


DEVICE = DryRunDevice()
DEVICE.dtype = torch.float32
TOYS = {name: case.but(dtype=torch.float32) for name, case in toy_cases().items()}
TOY = TOYS["toy"]


def gate_of(case: Case) -> Gate:
    return Gate(case, DEVICE, make_inputs(case, DEVICE, 0))


def test_peers_agree_on_every_toy_case():
    for case in TOYS.values():
        gate = gate_of(case)
        for make in (providers.unfused, providers.sdpa):
            gate.check(make(case, DEVICE), 10)
        gate.check(providers.reference(case, DEVICE), 2)
        # FlexAttention has no CPU backward
        found = gate.check(providers.flex(case, DEVICE), 10, backward=False)
        assert found.keys() == {"forward"}


def test_xformers_is_given_what_its_attention_takes(monkeypatch):
    def attention(q, k, v, attn_bias, scale):
        """(B, N, H, D), and a bias (B, H, N, N) whose rows begin at multiples of eight numbers."""
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.stride(-2) % 8 == 0
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + attn_bias
        return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)

    ops = SimpleNamespace(memory_efficient_attention=attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    for case in TOYS.values():
        found = gate_of(case).check(providers.xformers(case, DEVICE), 10)
        assert found.keys() == {"forward", "backward"}


def test_gate_tells_the_errors_as_multiples_of_the_unfused_path():
    gate, attend = gate_of(TOY), providers.unfused(TOY, DEVICE)
    found = gate.check(attend, 2)
    assert 0.2 < found["forward"] <= 2
    assert 0.2 < found["backward"] <= 2.5
    again = gate.check(lambda *leaves: attend(*leaves) * (1 + 1e-6), 100)
    assert again["forward"] > 2 * found["forward"]


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (lambda out, leaf: out * 1.01, "output"),
        (lambda out, leaf: out + 0 * leaf.sum() + leaf.sum() - leaf.sum().detach(), "images"),
    ],
    ids=["output", "gradient"],
)
def test_gate_refuses_what_breaks_the_rule(wrong, complaint):
    case = TOY.but(batch=5)
    attend = providers.unfused(case, DEVICE)
    with pytest.raises(AssertionError, match=complaint):
        gate_of(case).check(lambda q, t, s: wrong(attend(q, t, s), q), 10)


def test_failed_provider_is_a_row_and_others_go_on(tmp_path):
    failing = Mock(side_effect=RuntimeError("no such\nkernel"))
    results_file = ResultsFile(tmp_path / "rows.csv", FACTS)
    wanted = [providers.Provider("bad", failing), providers.Provider("good", providers.unfused)]
    suite.measure_case("toy", TOY, DEVICE, wanted, results_file, 1, 1.0)
    assert {r.note for r in results_file.rows if r.provider == "bad"} == {
        "RuntimeError: no such kernel"
    }
    assert all(r.median_us for r in results_file.rows if r.provider == "good")
    resumed = ResultsFile(results_file.path, FACTS, resume=True)
    assert [r[:3] for r in resumed.rows] == [r[:3] for r in results_file.rows]
    assert resumed.has("toy", "bad")


def test_error_while_timing_ends_one_provider_only():
    failing = Mock(sample=Mock(side_effect=RuntimeError("late")))
    assert sample_in_turn([failing, Mock()], 3, 0.0) == ["RuntimeError: late", None]


def test_device_beyond_use_asks_for_another_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DryRunDevice, "broken", lambda self: True)
    monkeypatch.setattr(gpu, "GPU_PROVIDERS", (providers.Provider("peer", providers.unfused),))
    refusal(gpu.main, ["--rehearse", "--csv", tmp_path / "rows.csv"], capsys, gpu.TRY_AGAIN)


def test_interrupted_run_shows_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "measure_case", Mock(side_effect=KeyboardInterrupt))
    assert gpu.main(["--rehearse", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert "interrupted" in capsys.readouterr().out


def test_cuda_twin_calls_what_torch_has(monkeypatch):
    """Every method of `Cuda`, on functions that check their arguments and do nothing."""
    names = (
        *("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "synchronize"),
        *("current_device", "get_device_name", "get_device_properties", "empty_cache"),
        *("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"),
    )
    for name in names:
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    torch.cuda.current_device.return_value = 0
    torch.cuda.get_device_properties.return_value = SimpleNamespace(L2_cache_size=60)
    torch.cuda.memory_allocated.return_value = 1
    torch.cuda.max_memory_allocated.return_value = 3
    device, calls = Cuda(), []
    assert device.cache_bytes == 60
    device.machine()
    device.seconds(device.mark(), device.mark())
    replays = device.capture(lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert torch.cuda.graph.call_args.kwargs["pool"] is not None
    for replay in replays:
        replay()
    assert device.peak_bytes(lambda: None) == 2
    assert device.used_bytes() == 1
    with device.other_stream():
        pass
    assert not device.broken()
    torch.cuda.synchronize.side_effect = RuntimeError("an illegal memory access")
    assert device.broken()
    assert device.compiled(lambda x: x + 1, fullgraph=False)


def test_failure_of_ours_is_the_exit_code(tmp_path, monkeypatch):
    failing = Mock(side_effect=RuntimeError("wrong"))
    monkeypatch.setattr(gpu, "GPU_PROVIDERS", (providers.Provider("ours", failing),))
    monkeypatch.setattr(suite.Run, "model", lambda *_: None)
    assert gpu.main(["--rehearse", "--csv", str(tmp_path / "rows.csv")]) == 1


def test_error_of_a_case_or_a_model_itself_is_in_its_rows(tmp_path, monkeypatch):
    failing = Mock(side_effect=RuntimeError("no memory"))
    monkeypatch.setattr(suite, "make_sets", failing)
    monkeypatch.setattr(models, "Models", failing)
    path = tmp_path / "rows.csv"
    assert gpu.main(["--rehearse", "--csv", str(path)]) == 1
    assert {row.note for row in read(path)[0]} == {"RuntimeError: no memory"}


def test_replay_that_differs_is_refused():
    attend, calls = providers.unfused(TOY, DEVICE), []

    def drifting(*leaves):
        calls.append(1)
        return attend(*leaves) + len(calls)

    with pytest.raises(AssertionError, match="replay"):
        Replayed(Loop(drifting, [make_inputs(TOY, DEVICE, 0)]), DEVICE)


def test_model_that_breaks_the_rule_is_refused():
    exact = models.Outcome(torch.ones(3, 3, dtype=torch.float64), {})
    stock = models.Outcome(torch.ones(3, 3), {})
    models.check_errors(stock, stock, exact)
    with pytest.raises(AssertionError, match="logits"):
        models.check_errors(models.Outcome(torch.ones(3, 3) * 1.01, {}), stock, exact)
    few = (models.Outcome(x.logits[:2], {}) for x in (stock, stock, exact))
    with pytest.raises(ValueError, match="3 images, got 6 logits of 2"):
        models.check_errors(*few)


def test_table_without_rich(capsys):
    rows = [Row("a", "ours", "forward", 2.0, floor_us=1.0, of_floor=0.5), Row("a", "x", "forward")]
    print_plain(*table_of(rows, ["ours", "x"]))
    assert capsys.readouterr().out.splitlines() == [
        "case  direction  floor µs  ours       x",
        "a     forward    1.0       2.0 (50%)  –",
    ]


def test_cases_have_the_sizes_of_the_papers():
    cases = swin_cases()
    assert len(cases) == 21
    assert list(cases)[:3] == ["T1 shift 3", "B1 shift 3", "L1 shift 3"]
    assert {c.heads * c.head_dim for n, c in cases.items() if n[0] == "T"} == {96, 192, 384, 768}
    for case in (cases | other_cases()).values():
        assert not case.grid.needs_padding


def test_targets_of_the_cuda_kernels_are_held_against_rows():
    def timed(provider: str, us: float, direction: str = "forward") -> Row:
        return Row("T1 shift 3", provider, direction, us)

    rows = [timed("ours, CUDA C++", 150.0), timed("unfused", 500.0), timed("ours", 100.0)]
    rows += [timed("ours, CUDA C++", 150.0, "backward"), timed("unfused", 400.0, "backward")]
    (line,) = verdicts(rows)  # nothing where one of the three was not timed
    assert "T1 shift 3, forward: 3.33 times as fast" in line
    assert line.endswith(": reached")
    (line,) = verdicts([timed("ours, CUDA C++", 170.0), *rows[1:]])
    assert "1.70 times the time of ours" in line
    assert line.endswith("NOT reached")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "module", ["benchmarks.gpu", "benchmarks.gpu_tools.tune", "benchmarks.gpu_tools.counters"]
)
def test_without_a_gpu_there_is_one_line_and_exit_code_2(module):
    said = run_python("-m", module, code=2).stderr
    assert "no GPU: " in said
    assert "Traceback" not in said
