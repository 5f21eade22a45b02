"""Calls that are launched at once: which ones, and what one costs, with a driver made up."""

from __future__ import annotations

import contextlib
import time
from collections import deque

import pytest
import torch
from frames import frames_open_at
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

from benchmarks.gpu_tools.override import forget, override
from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.backends.triton import launcher
from swin_kernels.ops import repeated
from swin_kernels.problem import Operands
from swin_kernels.testing import Case, call, make_operands

pytestmark = pytest.mark.interpreted  # there the ops of Triton's kernels take CPU tensors
STREAM = 7


class Driver:
    """In the place of what Triton compiled: keeps what it is launched with."""

    function, packed_metadata = "function", ()

    def __init__(self):
        self.launches = deque(maxlen=8)  # more would keep memory from being used again

    def run(self, *arguments):
        self.launches.append(arguments)


@pytest.fixture
def interpreter(monkeypatch):
    """CPU tensors are taken for a GPU's, and kernels are interpreted."""
    monkeypatch.setattr(repeated, "DEVICES", ("cpu",))
    forget()
    yield
    forget()


@pytest.mark.parametrize(
    "case",
    [
        Case(1, (7, 5), (4, 4), (2, 2), 2, 16, bias="table", pads=True),
        Case(1, (8, 4), (4, 4), (2, 0), 1, 16, bias="dense", mask="soft", packed=True),
        Case(1, (90,), (70,), (20,), 1, 16, bias="table+index", cosine=True),
    ],
    ids=["whole", "masked", "tiles"],
)
def test_what_is_launched_at_once_gives_the_bits_of_the_long_way(case, interpreter, ran):
    case = case.but(layout="contiguous", dtype=torch.float16)
    with torch.no_grad():
        first, other = make_operands(case), make_operands(case, seed=1)
        call(case, first, "triton")
        out = call(case, other, "triton")
        assert len(ran) == 1
        repeated.forget()
        expected = call(case, other, "triton")
    assert len(ran) == 1
    assert torch.equal(out, expected)


@pytest.fixture
def driver(interpreter, monkeypatch):
    """As `interpreter`, but kernels are launched, and write nothing."""
    made, prepare = Driver(), launcher.Launch.__init__

    def prepared(self, spec):
        prepare(self, spec)
        self.compiled = made

    monkeypatch.setattr(launcher.Launch, "__init__", prepared)
    monkeypatch.setattr(launcher.Run, "__call__", launcher.Run.__call__.__wrapped__)  # not poisoned
    monkeypatch.setattr(launcher, "current_stream", lambda device: STREAM)
    return made


@pytest.fixture
def ran(monkeypatch):
    """How many calls were launched at once."""
    calls, find = [], repeated.find

    def counted(key):
        if (run := find(key)) is not None:
            calls.append(run)
        return run

    monkeypatch.setattr(repeated, "find", counted)
    return calls


def packed(dtype=torch.float16, size=14):
    return torch.randn(2, size, size, 3, 3, 32, dtype=dtype)


TABLE = torch.randn(169, 3, dtype=torch.float16)


def attend(qkv, table=TABLE, window=7, shift=3, **options):
    options = {"bias_table": table, "backend": "triton"} | options
    return shifted_window_attention_qkvpacked(qkv, window, shift, **options)


def test_the_second_call_is_launched_as_the_first_on_its_own_tensors(driver, ran):
    first, second = packed(), packed()
    attend(first)
    assert not ran
    out = attend(second)
    assert len(ran) == 1
    assert out.shape == (2, 14, 14, 3, 32)
    assert out.dtype == torch.float16
    (a, b) = driver.launches
    tensors = [(x, y) for x, y in zip(a, b) if isinstance(x, torch.Tensor)]
    same = [x is y for x, y in tensors]
    assert len(a) == len(b)
    assert sum(same) == 1  # the table: query, key and value are the other qkv, and the output
    assert {y.data_ptr() for x, y in tensors if x is not y} == {second.data_ptr(), out.data_ptr()}
    assert [x for x in a if not isinstance(x, torch.Tensor)] == [
        y for y in b if not isinstance(y, torch.Tensor)
    ]


CHANGES = {
    "size": {"qkv": packed(size=21)},
    "dtype": {"qkv": packed(torch.float32)},
    "strides": {"qkv": packed().transpose(1, 2)},
    "alignment": {"qkv": torch.randn(packed().numel() + 1).half()[1:].view_as(packed())},
    "table's dtype": {"table": TABLE.float()},
    "no table": {"table": None},
    "shift": {"shift": 2},
    "mask": {"mask_value": -200.0},
    "scale": {"scale": 0.5},
    "wraps": {"periodic": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_call_that_differs_is_checked_anew(change, driver, ran):
    qkv = packed()
    attend(qkv)
    attend(**{"qkv": qkv} | change)
    assert not ran
    attend(qkv)
    assert len(ran) == 1


class Seen(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_output_is_never_a_constant_of_a_trace(driver, ran):
    """TorchScript knows no lists of bools, as the op has: an error, and nothing wrong."""
    qkv = packed()
    attend(qkv)
    with pytest.raises(RuntimeError, match="Tracing a list of bool"):
        torch.jit.trace(attend, qkv, check_trace=False)
    assert not ran


def test_what_would_see_the_op_gets_it(driver, ran):
    qkv = packed()
    attend(qkv)
    attend(qkv.as_subclass(Seen))
    attend(qkv.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True), contextlib.suppress(Exception):
        attend(qkv)
    with torch.profiler.profile():
        attend(qkv)
    with BaseTorchDispatchMode():
        attend(qkv)
    with BaseTorchFunctionMode():
        attend(qkv)
    assert not ran
    with torch.no_grad():
        attend(qkv.clone().requires_grad_())
    assert len(ran) == 1


def test_a_view_that_negates_is_not_taken_for_its_memory(driver, ran):
    numbers = torch.randn(2, 14, 14, 3, 3, 32, dtype=torch.complex64)
    plain, negated = numbers.imag, numbers.conj().imag
    assert plain.stride() == negated.stride()
    attend(plain, table=TABLE.float())
    attend(negated, table=TABLE.float())
    assert not ran
    attend(plain, table=TABLE.float())
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("equal", "wrong"),
    [
        ({"window": 7}, {"window": 7.0}),
        ({"window": (7, 7)}, {"window": (7.0, 7)}),
        ({"shift": 1}, {"shift": True}),
        ({"periodic": False}, {"periodic": 0}),
        ({"mask_value": 1}, {"mask_value": True}),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_checked_though_it_is_equal(equal, wrong, driver, ran):
    attend(packed(), **equal)
    with pytest.raises(ValueError):
        attend(packed(), **wrong)
    assert not ran


def test_a_sparse_bias_is_still_named(driver, ran):
    bias = torch.zeros(3, 49, 49).half()
    attend(packed(), table=None, bias=bias)
    with pytest.raises(ValueError, match="dense"):
        attend(packed(), table=None, bias=bias.to_sparse())


def test_a_list_for_an_option_dropout_and_strided_tables_go_the_long_way(driver, ran):
    qkv, strided = packed(), torch.randn(3, 169).half().t()
    for _ in range(2):
        attend(qkv, window=[7, 7])
        attend(qkv, dropout_p=0.1)
        attend(qkv, table=strided)
    assert not ran


def test_bad_input_is_still_named_before_anything_runs(driver, ran):
    attend(packed())
    with pytest.raises(ValueError, match="qkv"):
        attend(torch.randn(2, 14, 14, 2, 3, 32).half())
    with pytest.raises(ValueError, match="query"):
        shifted_window_attention(3, TABLE, TABLE, 7)


def test_kept_launches_are_bounded_and_forgotten_with_the_layouts(driver, ran, monkeypatch):
    monkeypatch.setattr(repeated, "_MOST", 2)
    for shift in range(5):
        attend(packed(), shift=shift)
        assert len(repeated._ready) <= 2
    with override({}):
        assert not repeated._ready


def test_a_repeated_call_costs_little_beside_its_launch(driver):
    """Beside an allocation of the output, which any call needs, as machines differ in speed."""
    qkv = packed()
    attend(qkv)
    (run,) = repeated._ready.values()
    ((launch, pointers),) = run.launches
    tensors = (*Operands(qkv, bias_table=TABLE), attend(qkv), None)
    at = (launch.grid, 1, 1, STREAM, launch.compiled.function, launch.compiled.packed_metadata)
    asked = (
        lambda: torch.empty((2, 14, 14, 3, 32), dtype=torch.float16),
        lambda: launch.compiled.run(*at, *(None,) * 3, *pointers(tensors), *launch.scalars),
        lambda: shifted_window_attention_qkvpacked(qkv, 7, 3, bias_table=TABLE, backend="triton"),
    )
    rounds: list[list[float]] = []
    for _ in range(30):  # in turn, as the clock of a machine wanders
        rounds.append([])
        for function in asked:
            start = time.perf_counter()
            for _ in range(200):
                function()
            rounds[-1].append((time.perf_counter() - start) / 200)
    empty, launched, called = map(min, zip(*rounds))
    times = f"{called * 1e6:.1f} µs, a launch {launched * 1e6:.1f}, an allocation {empty * 1e6:.1f}"
    print(f"a call takes {times}")
    # 10 µs of Python on the machine of docs/design/triton.md, where an allocation takes 1.7
    assert called - launched - empty < 6 * empty, times


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_a_kernel_is_at_most_six_frames_away(driver, trained):
    qkv = packed().requires_grad_(trained)
    for most in (6, 6 if trained else 3):  # the second inference is a repeated one
        frames = frames_open_at("run", lambda: attend(qkv))
        assert frames[0] == "shifted_window_attention_qkvpacked"
        assert len(frames) <= most, frames
