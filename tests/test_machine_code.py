"""Every shipped layout, compiled for GPUs that are not there: no spill, room, matrix units."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

pytest.importorskip("triton", reason="the Triton kernels cannot be compiled without Triton")

from benchmarks import machine_code, predict
from benchmarks.cases import swin_cases
from benchmarks.layouts import CASES, RARE
from benchmarks.machine_code import ARCHS, DTYPES, Row, compile_case, report
from benchmarks.plans import plans_of, steps_of
from benchmarks.predict import CHIPS
from swin_kernels.kernels.triton import ahead
from swin_kernels.kernels.triton.configs import KNOWN_GPUS

# minutes of two cores; `make aot-report` goes through the rest
FULL = ("sm_80", "sm_90")  # the architectures that most users have
# one of each kind of kernel: a whole window, tiles, cosine attention
KINDS = ("swin", "swin, window 12", "swin v2, window 8")
JOBS = [(case, "bf16", "sm_90") for case in CASES]
JOBS += [(case, "bf16", arch) for arch in ARCHS if arch != "sm_90" for case in KINDS]
JOBS += [(case, dtype, arch) for arch in FULL for dtype in ("fp32", "tf32") for case in KINDS]
JOBS += [("swin", dtype, "sm_100") for dtype in DTYPES if dtype != "bf16"]
JOBS += [("swin", "fp16", arch) for arch in FULL]
JOBS += [(case, "bf16", "sm_90") for case in ("dense, masked", "window 12, everything")]
JOBS += [("everything", dtype, "sm_90") for dtype in ("bf16", "fp32")]


@pytest.fixture(scope="module")
def compiled(request):
    """The rows of a job, compiled in processes that are started for all selected tests at once."""
    specs = (
        getattr(x, "callspec", None) for x in request.session.items if x.module is request.module
    )
    wanted = [spec.params["job"] for spec in specs if spec is not None and "job" in spec.params]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        futures = {job: pool.submit(compile_case, *job) for job in wanted}
        yield lambda job: futures[job].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", JOBS, ids=["-".join(job).replace(", ", "-") for job in JOBS])
def test_compiled_kernels_spill_nothing_fit_and_use_matrix_units(job, compiled):
    rows = compiled(job)
    kernels = {row.kernel for row in rows}
    assert any(kernel.endswith("fwd_kernel") for kernel in kernels)
    assert kernels & {"_whole_window_bwd_kernel", "_tiled_dkv_kernel"}
    defects = {row.kernel: row.defects() for row in rows}
    assert not any(defects.values()), defects


# warp-instructions a tile of window 7, head dim 32, shifted: forward of a window that no seam cuts,
# forward of one that two cut, backward with the gradient of the bias. What keeps an H200 below what
# its schedulers issue while the bytes move is 2,703 forward and 4,731 backward
BUDGETS = {"sm_80": (1_750, 2_150, 3_400), "sm_90": (1_750, 2_150, 3_400)}
# what was reached elsewhere: to be lowered, never raised
REACHED = {"sm_100": (1_304, 1_720, 2_888), "sm_120": (1_592, 2_000, 3_276)}
# the same of a forward without grad, which keeps no statistics: ptxas copies S in that of sm_100
REACHED_INFERENCE = {"sm_100": (1_416, 1_952), "sm_120": (1_592, 2_000)}


@pytest.mark.parametrize("arch", [*BUDGETS, *REACHED])
def test_instructions_of_a_tile_stay_within_their_budget(arch):
    inside, border, backward = (BUDGETS | REACHED)[arch]
    ways = {row.kernel: row.per_tile for row in compile_case("swin", "bf16", arch)}
    found = (*ways["_whole_window_fwd_kernel"], ways["_whole_window_bwd_kernel"][1])
    assert found[0] <= inside
    assert found[1] <= border
    assert found[2] <= backward
    if arch in REACHED:
        assert found == REACHED[arch], "lower REACHED, so that it stays so"


@pytest.mark.parametrize("arch", [*BUDGETS, *REACHED])
def test_instructions_of_a_tile_without_grad_stay_within_their_budget(arch):
    plan = plans_of(CASES["swin"].but(dtype=DTYPES["bf16"]), KNOWN_GPUS[arch]).inference
    step = plan.steps[0]
    code = ahead.read(ahead.compile_step(step, plan.dtypes, KNOWN_GPUS[arch]))
    row = Row("swin", "bf16", arch, step.kernel, "", step.config.num_warps, code)
    inside, border, *_ = (BUDGETS | REACHED_INFERENCE)[arch]
    assert row.per_tile[0] <= inside
    assert row.per_tile[1] <= border
    assert row.defects() == []
    if arch in REACHED_INFERENCE:
        assert row.per_tile == REACHED_INFERENCE[arch], "lower it, so that it stays so"


# the others of the speed table, whose heads and maps give other numbers; as many windows a program
SHIFTED = [name for name in swin_cases() if name.endswith("shift 3") and name != "T1 shift 3"]


@pytest.mark.parametrize("arch", BUDGETS)
def test_every_shifted_case_of_the_speed_table_is_within_the_budget(arch):
    inside, border, backward = BUDGETS[arch]
    seen = {}
    for name in SHIFTED:
        for direction, launches in predict.launches_of(swin_cases()[name], CHIPS[arch]).items():
            seen[name, direction] = launches[0]
    over = {
        key: (launch.inside, launch.border, launch.in_flight)
        for key, launch in seen.items()
        if launch.inside > (inside if key[1] == "forward" else backward)
        or launch.border > (border if key[1] == "forward" else backward)
    }
    assert len(seen) == 2 * len(SHIFTED) == 16
    assert not over


# bytes of tokens on their way, forward without grad and backward; what was reached elsewhere: to be
# raised, never lowered
ENOUGH = {"sm_80": (23 * 1024, 23 * 1024), "sm_90": (23 * 1024, 23 * 1024)}
REACHED_BYTES = {"sm_100": (18_816, 25_088), "sm_120": (18_816, 25_088)}


@pytest.mark.parametrize("arch", [*ENOUGH, *REACHED_BYTES])
def test_enough_bytes_are_in_flight_to_keep_memory_busy(arch):
    """4.3 TB/s for 0.7 µs are 23 KB on each of 132 multiprocessors."""
    found = predict.launches_of(swin_cases()["T1 shift 3"], CHIPS[arch])
    for launches, least in zip(found.values(), (ENOUGH | REACHED_BYTES)[arch]):
        assert launches[0].in_flight >= least


CODE = ahead.Code(168, 0, 0, 28672, 1000, 6, (("FFMA", 300),), (("FFMA", 400),))


def _row(arch: str = "sm_90", dtype: str = "bf16", warps: int = 4, **changes) -> Row:
    code = ahead.Code(**{**CODE.__dict__, **changes})
    return Row("swin", dtype, arch, "_whole_window_fwd_kernel", "64×64", warps, code)


@pytest.mark.parametrize(
    ("row", "defect"),
    [
        (_row(spills=2), "2 spills"),
        (_row(stack=8), "8 bytes of stack"),
        (_row(registers=255, warps=16), "131072 registers a program"),
        (_row("sm_120", shared=100 * 1024), "shared memory"),
        (_row(matrix=0), "no matrix instruction"),
    ],
    ids=["spill", "stack", "registers", "shared", "matrix"],
)
def test_a_defect_is_named(row, defect):
    assert defect in "; ".join(row.defects())


def test_a_sound_row_has_no_defect_and_exact_fp32_needs_no_matrix_unit():
    assert _row().defects() == []
    assert _row(dtype="fp32", matrix=0).defects() == []


def test_known_spills_are_no_defect_until_they_grow_and_are_told_all_the_same(monkeypatch):
    key = ("swin", "bf16", "sm_90", "_whole_window_fwd_kernel")
    monkeypatch.setitem(machine_code.KNOWN_SPILLS, key, 2)
    assert _row(spills=2, stack=8).defects() == []
    assert "3 spills" in _row(spills=3, stack=8).defects()[0]
    assert "lower KNOWN_SPILLS" in _row(spills=1, stack=8).defects()[0]
    assert "swin, bf16, sm_90, `_whole_window_fwd_kernel`: 2 inst" in report([_row(spills=2)])


def test_the_report_has_a_table_for_each_architecture():
    page = report([_row("sm_80"), _row("sm_90")])
    assert page.index("## sm_80") < page.index("## sm_90")
    assert "| 168 | 28,672 | 1,000 | 1,200 to 1,600 | 6 |" in page
    assert "Nothing here was run or timed" in page


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_has_launches_for_every_architecture(arch, dtype):
    gpu = KNOWN_GPUS[arch]
    for case in (CASES | RARE).values():
        launches = steps_of(case.but(dtype=DTYPES[dtype]), gpu, tf32=dtype == "tf32")
        steps = [step for step, _ in launches]
        assert len(steps) >= 2
        for step in steps:
            assert 0 < step.grid < 2**31
            assert step.config.num_warps * gpu.warp_size <= 1024


def test_one_kernel_compiles_for_every_architecture():
    for arch in ARCHS:
        gpu = KNOWN_GPUS[arch]
        step, dtypes = next(steps_of(CASES["window 4"].but(dtype=DTYPES["fp16"]), gpu))
        code = ahead.read(ahead.compile_step(step, dtypes, gpu))
        assert code.registers > 0
        assert code.matrix > 0
        assert code.spills == code.stack == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_what_does_not_fit_the_registers_is_seen(arch):
    gpu = KNOWN_GPUS[arch]
    step, dtypes = next(steps_of(CASES["head dim 128"].but(dtype=DTYPES["bf16"]), gpu))
    crowded = replace(step, config=replace(step.config, num_warps=1))
    code = ahead.read(ahead.compile_step(crowded, dtypes, gpu))
    assert code.spills > 10
    assert code.stack > 0


@pytest.mark.parametrize("arch", ["sm_89", "sm_120"])
def test_wide_heads_fit_where_shared_memory_is_small(arch):
    gpu = KNOWN_GPUS[arch]
    assert gpu.shared_memory < 100 * 1024
    case = CASES["swin, window 12"].but(
        head_dim=128, mask="soft", pads=True, size=(100, 100), dtype=DTYPES["bf16"]
    )
    for step, dtypes in steps_of(case, gpu):
        assert ahead.compile_step(step, dtypes, gpu).metadata.shared <= gpu.shared_memory


def test_every_known_gpu_has_a_target():
    for gpu in KNOWN_GPUS.values():
        target = ahead.target_of(gpu)
        assert target.backend == ("hip" if gpu.arch.startswith("gfx") else "cuda")
        assert target.warp_size == gpu.warp_size
