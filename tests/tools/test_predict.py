"""What the Triton kernels should take: the model, on machine code made up and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the Triton kernels cannot be compiled without Triton")

from benchmarks.cases import swin_cases
from benchmarks.codegen import predict
from benchmarks.codegen.aot import Code
from benchmarks.codegen.chips import CHIPS, chip_named
from benchmarks.codegen.plans import plans_of
from benchmarks.codegen.predict import Launch, demands, programs_at_once, tables
from benchmarks.codegen.sass import Histogram, Kind
from benchmarks.report.rows import ResultsFile, Row
from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.testing import Case

pytestmark = pytest.mark.slow

H200 = CHIPS["H200"]
CASE = swin_cases()["T1 shift 3"]
TILES = 128 * 64 * 3  # windows, heads


def counted(*rows: tuple) -> Histogram:
    """Of rows (name, how often, clocks of the path to memory)."""
    return tuple((Kind(name, *clocks), count) for name, count, *clocks in rows)


def test_each_instruction_is_charged_to_its_unit():
    code = counted(
        ("FFMA", 8),
        ("LOP3.LUT", 4),
        ("MUFU.EX2", 2),
        ("LDS.128", 3, 4),
        ("LDSM.16.M88.4", 1, 4),
        ("HGMMA.64x64x16.F32.BF16", 1, 8),
        ("UMOV", 5),
    )
    found = demands(code, 4, H200)
    assert found["issue"] == 24  # 96 instructions at four a clock
    assert found["fp32"] == 4 * 8 * 32 / 128
    assert found["arithmetic"] == 4 * 4 * 32 / 64
    assert found["exp"] == 4 * 2 * 32 / 16
    assert found["shared"] == 4 * (3 * 4 + 4 + 8)
    assert found["matrix"] == 2 * 64 * 64 * 16 / 4096  # four warps share an instruction
    assert demands(counted(("IMAD.WIDE", 8)), 4, H200)["fp32"] == 4 * 8 * 32 / 64  # half as fast
    assert demands(counted(("HMMA.16816.F32.BF16", 1)), 1, H200)["matrix"] == 2 * 16 * 8 * 16 / 4096


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_chip_is_known_by_what_the_driver_calls_the_device(device, name):
    assert chip_named(device) == (name and CHIPS[name])


def test_configurations_see_the_multiprocessors_of_the_chip():
    one, other = CHIPS["L40S"].gpu, CHIPS["RTX 4090"].gpu
    assert (one.arch, one.multiprocessors) == ("sm_89", 142)
    assert (other.arch, other.multiprocessors) == ("sm_89", 128)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 28_672, 4, 4), (129, 28_672, 4, 3), (32, 100_000, 4, 2), (32, 0, 8, 8), (16, 0, 1, 32)],
    ids=["registers", "registers are given out by eight", "shared memory", "warps", "programs"],
)
def test_programs_at_once_are_bound_by_what_runs_out_first(registers, shared, warps, programs):
    code = Code(registers, 0, 0, shared, 1000, 6)
    assert programs_at_once(code, warps, H200) == programs


(PRODUCT,) = counted(("HGMMA.64x64x16.F32.BF16", 1))


def launch(code: Code, kernel: str = "_fwd_", case: Case = CASE, **config) -> Launch:
    plans = plans_of(case, KNOWN_GPUS["sm_90"])
    step = next(s for plan in plans for s in plan.launches if kernel in s.kernel)
    step = replace(step, config=replace(step.config, **config))
    return predict.predict(step, code, H200, predict._sizes(case, plans), 2)


def test_memory_is_every_tensor_once_and_seams_cut_their_share_of_windows():
    trip = tuple((*counted(("MUFU.EX2", n)), PRODUCT) for n in (32, 64))
    found = launch(Code(128, 0, 0, 28_672, 65, 6, *trip))
    tokens = 128 * 56 * 56 * 96 * 2
    read_and_written = 4 * tokens + 169 * 3 * 2  # map and table
    assert found.seconds["memory"] == pytest.approx(read_and_written / 4.3e12)
    border = 1 - (7 / 8) ** 2
    clocks = TILES / 132 * 4 * 2 * (32 * (1 - border) + 64 * border)
    assert found.seconds["exp"] == pytest.approx(clocks / 1.755e9, rel=0.05)  # programs are whole
    assert found.in_flight == 4 * 49 * 32 * 2 * 3  # programs, tokens of q, k and v of one window
    assert (found.inside, found.border) == (132, 260)


def test_a_loop_of_two_stages_waits_for_each_of_its_loads():
    trip = *counted(("FADD", 1755)), PRODUCT
    code = Code(128, 0, 0, 28_672, 1756, 6, trip, trip)
    found = {stages: launch(code, loop_stages=stages) for stages in (1, 2, 3)}
    assert found[1] == found[2]
    assert found[3].in_flight == 2 * found[2].in_flight
    waits = found[2].seconds["latency"] / found[3].seconds["latency"]
    assert waits == pytest.approx(2 * (0.7e-6 + 1756 / 1.755e9) / 0.7e-6)


def test_packed_tokens_are_counted_by_the_parts_that_a_pass_takes():
    case = CASE.but(size=(48, 48), window=(16, 16), cosine=True)
    plans = plans_of(case, KNOWN_GPUS["sm_90"])
    sizes = predict._sizes(case, plans)
    part = 128 * 48 * 48 * 96 * 2  # of queries, keys or values, in bytes
    stats, delta, bias = (sizes[name] for name in ("stats", "delta", "expanded_bias"))
    small = sizes["logit_scale"] + sizes["sides"]
    passes = {s.kernel.split("_")[-2]: s for s in plans.backward.launches if "_tiled_" in s.kernel}
    found = {name: predict.bytes_of(step, sizes) for name, step in passes.items()}
    # q, k, v, dO, out; dq, and normalised queries
    assert found["dq"] == 7 * part + stats + delta + bias + small + sizes["logit_scale_sums"]
    # normalised queries, k, v, dO; dk, dv, and normalised keys
    assert found["dkv"] == 7 * part + stats + delta + bias + small
    # both normalised, v, dO
    assert found["dbias"] == 4 * part + stats + delta + bias + small + sizes["bias_sums"]


@pytest.mark.parametrize(
    ("bias", "kernels"),
    [
        ("dense", ["_bias_grad_kernel"]),
        ("table+index", ["_bias_grad_kernel", "_indexed_grad_kernel"]),
    ],
)
def test_sums_of_a_bias_wait_for_their_loads(bias, kernels):
    case = CASE.but(batch=8, bias=bias)
    sums = [x for x in predict.launches_of(case, H200)["backward"] if x.kernel in kernels]
    assert [x.kernel for x in sums] == kernels
    assert all(x.seconds["latency"] >= 0.3e-6 for x in sums)


def test_no_more_programs_are_in_flight_than_there_are():
    few = CASE.but(batch=1, size=(7, 7), shift=(0, 0))
    found = launch(Code(128, 0, 0, 28_672, 65, 6, (PRODUCT,), (PRODUCT,)), case=few)
    assert found.programs == 1
    assert found.in_flight == 49 * 32 * 2 * 3


def test_the_bound_is_what_takes_longest():
    trip = *counted(("FADD", 9000)), PRODUCT
    found = launch(Code(250, 0, 0, 28_672, 9001, 6, trip, trip), "_bwd_")
    assert found.bound == "issue"
    assert found.predicted == found.seconds["issue"] > found.seconds["memory"]


@pytest.mark.parametrize("trip", [(), counted(("SYNCS", 6))], ids=["unrolled", "a loop that waits"])
def test_what_no_loop_tells_is_left_out(trip):
    found = launch(Code(128, 0, 0, 28_672, 500, 6, trip, trip))
    assert found.seconds.keys() == {"memory", "issue", "latency"}
    assert (found.inside, found.border) == (0, 0)
    assert found.seconds["issue"] > 0
    page = "\n".join(tables({("T1 shift 3", "H200"): {"forward": [found]}}))
    assert "| – | – | – | – | – | memory |" in page


def test_measured_medians_stand_beside_what_was_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "RESULTS", tmp_path)
    found = launch(Code(128, 0, 0, 28_672, 64, 6))
    key = ("T1 shift 3", "H200")
    assert "| – | – |" in "\n".join(tables({key: {"forward": [found]}}))
    results_file = ResultsFile(tmp_path / "gpu-h200.csv", {"machine": "NVIDIA H200"})
    results_file.add(Row("T1 shift 3", "ours", "forward", 500.0))
    results_file.add(Row("T1 shift 3", "ours, graph", "forward", found.predicted * 2e6))
    page = "\n".join(tables({key: {"forward": [found]}}))
    assert "| -50% |" in page
    for name, machine, date in (
        ("gpu-a.csv", "NVIDIA H200", "2027-01-01"),
        ("gpu-z.csv", "NVIDIA H200", "2026-01-01"),
        ("gpu-gh200.csv", "NVIDIA GH200 480GB", "2028-01-01"),
    ):
        other = ResultsFile(tmp_path / name, {"machine": machine, "date": date})
        other.add(Row("T1 shift 3", "ours, graph", "forward", float(date[:4])))
    assert predict.measured_seconds("T1 shift 3", H200, "forward") == pytest.approx(2027e-6)
    other = "\n".join(tables({("T1 shift 3", "A100"): {"forward": [found]}}))
    assert "| – | – |" in other  # another GPU's


def test_the_first_stage_is_predicted_from_compiled_code(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict", "--gpu", "H200", "--case", "T1 shift 3"])
    predict.main()
    page = capsys.readouterr().out
    assert "### H200 (sm_90)" in page
    assert page.count("_single_tile_") == 2
