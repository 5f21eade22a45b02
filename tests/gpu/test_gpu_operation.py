"""What only a GPU can show of the operation: sizes beyond 2^31, graphs, streams, TF32, memory.

The contract itself runs there by `pytest --device cuda`, with `--backend cuda` for the kernels of
CUDA C++. With SWIN_KERNELS_REHEARSE=1, and TRITON_INTERPRET=1 or `--emulate-cuda`, the tests of
this folder run on a CPU at toy sizes, so that a typing error is found where no GPU is.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict

import pytest
import torch
from contract_cases import GEOMETRIES, OPTIONS
from gpu_dry_run import REHEARSED, gpu_only, sized

from benchmarks.baselines.providers import ours
from benchmarks.gpu_tools.checks import plain_launches
from benchmarks.timing import Gate, Inputs, Loop, Replayed, make_inputs
from swin_kernels.backends.triton import launcher
from swin_kernels.backends.triton.backend import INTERPRETED
from swin_kernels.ops import repeated
from swin_kernels.ops.dispatch import BACKENDS, choose
from swin_kernels.problem import Operands, Problem
from swin_kernels.testing import (
    LEAST_INPUTS,
    Case,
    Result,
    assert_within_error_rule,
    call,
    check,
    make_grad_out,
    make_operands,
    run,
    run_exact,
    run_unfused,
)

pytestmark = gpu_only


def bare_launch(run, operands, out):
    """The one launch of a run, on an output that is there, as `Run` does it."""
    ((launch, pointers),) = run.launches
    arguments = (*pointers((*operands, out, None)), *launch.scalars)
    stream, compiled = launcher.current_stream(out.device), launch.compiled
    if stream is None:
        return lambda: launch(*arguments)
    at = (launch.grid, 1, 1, stream, compiled.function, compiled.packed_metadata)
    return lambda: compiled.run(*at, None, None, None, *arguments)


def packed(size, window, shift=0, heads=2, head_dim=32, batch=2, **more) -> Case:
    """A square map, qkv packed, a table of biases, contiguous."""
    fixed = {"packed": True, "bias": "table", "layout": "contiguous", "dtype": torch.float16}
    pairs = ((x, x) for x in (size, window, shift))
    return Case(batch, *pairs, heads, head_dim, **(fixed | more))


# one for each set of kernels: whole windows, tiles, cosine attention
CASES = {
    "whole": packed(*sized((56, 7, 3), (6, 3, 1)), heads=sized(3, 1)),
    "tiles": packed(*sized((48, 12, 6), (9, 9, 0)), heads=sized(3, 1)),
    "cosine": packed(*sized((64, 16, 8), (6, 3, 1)), heads=sized(3, 1), cosine=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_default_backend_is_triton(device):
    if device.backend != "triton":
        pytest.skip("asks for another")
    problem = Problem.checked(Operands(torch.zeros(1, 4, 3, 1, 8, device=device.device)), 2)
    assert choose(problem, "triton").name == "triton"
    if device.name == "cuda":
        assert choose(problem).name == "triton"


def inputs_of(case: Case, device, seed: int = 0) -> Inputs:
    """In the dtype of the case, as leaves."""
    made = make_inputs(case, device, seed)
    return Inputs(*(None if x is None else x.detach().to(case.dtype) for x in made)).with_grad()


def results(case: Case, inputs: Inputs, device) -> list[torch.Tensor]:
    out = ours(case, device)(*inputs[:3])
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_two_runs_give_the_same_bits(case, dtype, device):
    if REHEARSED and dtype != torch.float16:
        pytest.skip("once is enough to rehearse")
    case = case.but(dtype=dtype, batch=sized(16, 1))
    inputs = inputs_of(case, device)
    first = results(case, inputs, device)
    for _ in range(sized(5, 1)):
        for a, b in zip(results(case, inputs, device), first):
            assert torch.equal(a, b)


@cases
def test_compiled_operation_gives_the_bits_of_the_eager_one(case, device):
    inputs = inputs_of(case, device)
    attend = ours(case, device)
    compiled = device.compiled(lambda *leaves: attend(*leaves) * 2)
    out = compiled(*inputs[:3])
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out / 2)
    expected = results(case, inputs, device)
    assert torch.equal(out, expected[0] * 2)
    # halving and doubling round nothing but what is subnormal in fp16
    for a, b in zip(grads, expected[1:]):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)


@cases
def test_graph_replays_are_the_launches_on_new_inputs_too(case, device):
    sets = [inputs_of(case, device, seed) for seed in (0, 10)]
    replayed = Replayed(Loop(ours(case, device), sets), device)  # compares with launches
    other = inputs_of(case, device, 20)
    with torch.no_grad():
        for x, new in zip(sets[1], other):
            if x is not None:
                x.copy_(new)
    replayed.training_forward()
    replayed.training_backward()
    device.wait()
    for a, b in zip(replayed.latest()[1], results(case, other, device)):
        assert torch.equal(a, b)


def test_graph_replays_draw_new_dropout(device):
    case = CASES["whole"].but(dropout_p=0.5)
    loop = Loop(ours(case, device), [inputs_of(case, device)])
    (replay,) = device.capture(loop.forward)
    outs = []
    for _ in range(2):
        replay()
        device.wait()
        outs.append(loop.results[0][0].clone())
    assert not torch.equal(*outs)


@cases
def test_another_stream_gives_the_same(case, device):
    inputs = inputs_of(case, device)
    expected = results(case, inputs, device)
    with device.other_stream():
        found = results(case, inputs, device)
    device.wait()
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_tensors_of_another_device_than_the_current_one(device):
    if device.name == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = copy.copy(device)
    other.device = torch.device(device.name, sized(1, 0))
    case = CASES["whole"]
    inputs = inputs_of(case, other)
    Gate(case, other, inputs).check(ours(case, other), 2.0)


def test_a_repeated_forward_costs_ten_microseconds_more_than_its_launch(device, monkeypatch):
    """Wall clock of calls that nothing waits for, against that of the bare launches."""
    if device.backend != "triton":
        pytest.skip("the bare launches are Triton's")
    case = packed(*sized((14, 7, 3), (6, 3, 1)), batch=1)
    qkv, table, _ = inputs_of(case, device).plain
    attend = ours(case, device)
    if REHEARSED:
        monkeypatch.setattr(repeated, "DEVICES", ("cpu",))
    repeated.forget()
    attend(qkv, table, None)
    (run,) = repeated._ready.values()
    bare = bare_launch(run, Operands(qkv, bias_table=table), attend(qkv, table, None))

    def fastest(function) -> float:
        times, calls = [], sized(200, 1)
        for _ in range(sized(20, 1)):
            device.wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
        return min(times)

    launched = fastest(bare)
    called = fastest(lambda: attend(qkv, table, None))
    print(f"a launch takes {launched * 1e6:.1f} µs, a call {called * 1e6:.1f} µs")
    assert called - launched < sized(10e-6, 1.0)


@cases
def test_a_thousand_calls_do_not_grow_memory(case, device):
    inputs = inputs_of(case, device)
    used = []
    for i in range(sized(1003, 3)):
        results(case, inputs, device)
        if i in (2, sized(1002, 2)):
            used.append(device.used_bytes())
    assert used[0] == used[-1]


def test_autocast_is_the_cast_of_query_key_and_value(device):
    case = CASES["whole"].but(dtype=torch.float32, extras_dtype=torch.float32)
    inputs = inputs_of(case, device)
    attend = ours(case, device)
    with torch.autocast(device.device.type, device.dtype):
        found = attend(*inputs[:3])
    expected = attend(inputs.qkv.to(device.dtype), *inputs[1:3])
    assert found.dtype == device.dtype
    assert torch.equal(found, expected)


# kernels of several warp groups, one of which may run ahead, at batches that fill a GPU

WIDE = {
    "98 tokens": packed(*sized((14, 7, 3), (6, 3, 1))).but(
        size=sized((4, 14, 14), (2, 4, 4)),
        window=sized((2, 7, 7), (2, 2, 2)),
        shift=sized((1, 3, 3), (0, 1, 1)),
    ),
    "dropout": CASES["whole"].but(dropout_p=0.25),
    "128 channels": CASES["whole"].but(head_dim=sized(128, 32)),
    "not vectorizable": packed(*sized((64, 8, 4), (6, 3, 1)), head_dim=30),
    "tiles": CASES["cosine"],
}


@pytest.mark.parametrize("name", WIDE)
def test_a_large_batch_gives_the_same_bits_twenty_times_however_it_is_launched(name, device):
    case = WIDE[name].but(batch=sized(128, 1), dtype=device.dtype)
    inputs = inputs_of(case, device)
    if not case.dropout_p:  # whose draws the unfused path does not make
        Gate(case, device, inputs).check(ours(case, device), 2.0)
    torch.manual_seed(0)
    first = results(case, inputs, device)
    for launched in (plain_launches(), contextlib.nullcontext()):
        with launched:
            for _ in range(sized(20, 1)):
                torch.manual_seed(0)
                for a, b in zip(results(case, inputs, device), first):
                    assert torch.equal(a, b)


# sizes


def large_case(name: str) -> Case:
    return {
        # 128 bits a load, three heads, and offsets beyond 2^31 from image to image
        "2^31 elements": packed(*sized((56, 7, 3), (6, 3, 1)), heads=3, batch=sized(2400, 1)),
        "70,000 windows": packed(*sized((7, 7), (3, 3)), heads=1, batch=sized(70_000, 3)),
        "70,000 tiled windows": packed(
            *sized((12, 12), (9, 9)), heads=1, head_dim=16, batch=sized(70_000, 1)
        ),
    }[name]


@pytest.mark.parametrize("name", ["2^31 elements", "70,000 windows", "70,000 tiled windows"])
def test_large_batch_is_right_at_its_ends(name, device):
    case = large_case(name)
    inputs = inputs_of(case, device)
    if not REHEARSED:
        assert inputs.qkv.numel() > 2**31 or case.batch * case.grid.windows > 65_535
    Gate(case, device, inputs).check(ours(case, device), 2.0)


@pytest.mark.parametrize("window", [7, 12])
def test_image_beyond_32_bits_is_right_at_its_end(window, device):
    """2.4 billion elements in one image; windows do not know of each other, so a slice will do."""
    rows = 2 * window
    side = sized(window * (7200 // window), 2 * window)
    case = packed(side, window, heads=1, head_dim=sized(16, 16), batch=1)
    few = case.but(size=(rows, rows))
    last = (slice(None), slice(-rows, None), slice(-rows, None))
    results = []
    for seed in range(LEAST_INPUTS):
        inputs = inputs_of(case, device, seed)
        if not REHEARSED:
            assert inputs.qkv.numel() > 2**31
        grad_out = torch.zeros_like(inputs.grad_out)
        grad_out[last] = inputs.grad_out[last]
        out = ours(case, device)(*inputs[:3])
        d_qkv, d_table = torch.autograd.grad(out, inputs.leaves, grad_out)
        actual = Result(out.detach()[last], {"query": d_qkv[last], "bias_table": d_table})
        qkv, table = inputs.qkv.detach()[last].contiguous(), inputs.table.detach()
        small = (few, Operands(qkv, bias_table=table), grad_out[last].contiguous())
        results.append((actual, run_unfused(*small), run_exact(*small)))
    assert_within_error_rule(*zip(*results))


# precision of fp32


@contextlib.contextmanager
def tf32(how: str):
    """The two ways to allow it."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if how == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


@cases
@pytest.mark.parametrize("how", ["fp32_precision", "set_float32_matmul_precision"])
def test_tf32_is_used_where_it_is_allowed_and_only_there(case, how, device):
    case = case.but(dtype=torch.float32, batch=1)
    inputs = [
        (make_operands(case, device.device, seed), make_grad_out(case, device.device, seed + 1))
        for seed in range(0, 2 * LEAST_INPUTS, 2)
    ]

    def measured():
        ours = [run(case, *given, device.backend) for given in inputs]
        return ours, [run_unfused(case, *given) for given in inputs]

    exact = [run_exact(case, *given) for given in inputs]
    fine, fine_eager = measured()
    with tf32(how):
        rough, rough_eager = measured()
    few = {"logit_scale"}  # a number a head, which check judges over as many inputs as it takes

    def judged(results):
        return [
            r._replace(grads={n: g for n, g in r.grads.items() if n not in few}) for r in results
        ]

    assert_within_error_rule(*map(judged, (fine, fine_eager, exact)))
    emulated = device.name != "cuda" and device.backend == "cuda"
    if not emulated:  # there the unfused path knows no TF32
        assert_within_error_rule(*map(judged, (rough, rough_eager, exact)))
    if device.name == "cuda" or emulated:  # Triton's interpreter knows none either
        small, large = (
            sum(float((x.out.double() - best.out).abs().mean()) for x, best in zip(results, exact))
            for results in (fine, rough)
        )
        assert large > 8 * small, f"{large=:.3e} {small=:.3e}"
    again = call(case, inputs[0][0], device.backend)
    assert torch.equal(again, fine[0].out), "what TF32 was allowed for is kept after it"


# heads of each width, whole windows and tiles, beside the contract's small cases
WIDER = [
    CASES[name].but(head_dim=head_dim, batch=1)
    for name in ("whole", "tiles", "cosine")
    for head_dim in (16, 64, 128)
]


@pytest.mark.parametrize("case", sized([*GEOMETRIES, *OPTIONS, *WIDER], WIDER[:4:3]), ids=str)
def test_contract_holds_with_tf32(case, device):
    if device.name != "cuda" and device.backend == "cuda":
        pytest.skip("the unfused path that sets the bound knows no TF32 on a CPU")
    with tf32("fp32_precision"):
        check(case.but(dtype=torch.float32), device.backend)


# two implementations

AGREE = {
    **CASES,
    "dropout": CASES["whole"].but(dropout_p=0.25, mask="soft"),
    "tiles, 3-D": Case(
        1, sized((8, 14, 14), (3, 5, 5)), sized((8, 7, 7), (3, 5, 5)), (0, 0, 0), 1, 16
    ),
}


@pytest.fixture
def both(device):
    """The backends of Triton and of CUDA C++; rehearsed, those on the CPU."""
    if REHEARSED:
        if device.backend != "triton":
            pytest.skip("rehearsed once, under Triton's interpreter")
        from cuda_emulator import emulated_backend

        BACKENDS["cuda"] = emulated_backend()
    elif device.backend != "cuda":
        pytest.skip("runs among the tests of the CUDA kernels, once those are built")
    return "triton", "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", AGREE.values(), ids=AGREE)
def test_both_kernels_agree_within_what_the_error_rule_allows_them(case, dtype, device, both):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter of Triton multiplies bfloat16 wrongly")
    case = case.but(dtype=dtype)
    for backend in both:
        check(case, backend, device.device)
    apart, allowed = defaultdict(float), defaultdict(float)
    for seed in range(0, 2 * LEAST_INPUTS, 2):
        operands = make_operands(case, device.device, seed)
        grad_out = make_grad_out(case, device.device, seed + 1)
        first, second = (run(case, operands, grad_out, backend) for backend in both)
        eager, exact = (f(case, operands, grad_out) for f in (run_unfused, run_exact))
        for name, best in {"output": exact.out, **exact.grads}.items():
            a, b, rough = (
                r.out if name == "output" else r.grads[name] for r in (first, second, eager)
            )
            # each is allowed twice eager's error and an ulp
            ulp = torch.finfo(a.dtype).eps * float(best.abs().max())
            bound = 2 * (2 * float((rough.double() - best).abs().max()) + ulp)
            apart[name] = max(apart[name], float((a.double() - b.double()).abs().max()))
            allowed[name] = max(allowed[name], bound)
    assert all(apart[name] <= allowed[name] for name in allowed), (apart, allowed)
