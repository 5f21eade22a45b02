"""What only Triton's interpreter lets one see of the kernels: every store, every saved bit."""

from __future__ import annotations

import pytest
import torch
from contract_cases import TILES, assert_same_bits, over, saved_by_a_call

from swin_kernels import shifted_window_attention
from swin_kernels.backends.triton.config import INTERPRETER, config_for
from swin_kernels.backends.triton.launch_spec import Config
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import DIFFERENTIABLE, NEEDS, Operands, Problem
from swin_kernels.testing import Case, call, check, make_grad_out, make_operands, run

pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder
from triton_calls import call_of
from triton_interpreter import fast_interpreter
from triton_memory import Traffic, guarded
from triton_probes import atomic_kernel, copy_kernel

from swin_kernels.backends.triton import kernel_args, launch_spec, launcher, plan
from swin_kernels.backends.triton.kernels import common

pytestmark = pytest.mark.interpreted

WHOLE = Case(2, (7, 5), (4, 4), (2, 2), heads=2, head_dim=16, bias="table", pads=True)
REGIMES = pytest.mark.parametrize("case", [WHOLE, TILES], ids=["whole", "tiles"])
# whose backward keeps bias and shift mask from window to window
HELD = Case(3, (8, 10), (4, 5), (2, 2), heads=2, head_dim=16, bias="table", dtype=torch.float16)
HELD = HELD.but(layout="contiguous", packed=True)


def _run(case):
    return run(case, make_operands(case), make_grad_out(case), "triton")


@REGIMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_windows_do_not_depend_on_the_run_they_are_in(case, dtype, monkeypatch):
    results = []
    for number in (1, 3, 100):  # 3 divides neither number of windows
        monkeypatch.setattr(Config, "windows_per_program", lambda *args, n=number: n)
        launcher.forget()
        results.append(_run(case.but(dtype=dtype)))
    launcher.forget()
    for other in results[1:]:
        for name in ("query", "key", "value"):
            assert_same_bits(other.grads[name], results[0].grads[name])
        assert_same_bits(other.out, results[0].out)
        # sums over windows are cut elsewhere, and so rounded otherwise
        torch.testing.assert_close(other.grads, results[0].grads, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("number", [1, 3, 100])
@over(
    HELD,
    HELD.but(batch=1, bias="dense"),
    HELD.but(batch=2, size=(4, 8, 8), window=(2, 4, 4), shift=(1, 2, 2), heads=1),
    HELD.but(shift=(0, 0)),
    HELD.but(shift=(0, 2), bias="none", window=(4, 4), size=(8, 8)),
)
def test_a_bias_that_is_held_is_that_of_the_seams_that_cut_a_window(case, number, monkeypatch):
    monkeypatch.setattr(Config, "windows_per_program", lambda *args: number)
    asked = []
    monkeypatch.setattr(
        plan, "config_for", lambda *args: asked.append(config_for(*args)) or asked[-1]
    )
    launcher.forget()
    check(case, "triton")
    launcher.forget()
    assert any(config.holds_bias for config in asked)


@pytest.mark.parametrize("number", [1, 3, 100])
def test_tiles_do_not_depend_on_the_windows_worked_on_at_once(number, monkeypatch):
    """Every tile of every head and window has its program, also where the last ones are fewer."""
    case = TILES.but(heads=2)  # 4 windows
    usual = _run(case)
    tile_args = plan.tile_args
    monkeypatch.setattr(
        plan, "tile_args", lambda *args: tile_args(*args) | {"group_windows": number}
    )
    launcher.forget()
    assert_same_bits(_run(case), usual)
    launcher.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_each_pass_normalises_its_tokens_where_none_leaves_them(dtype, monkeypatch):
    monkeypatch.setattr(plan, "leaves_units", lambda *args: False)
    launcher.forget()
    case = Case(1, (130,), (75,), (30,), head_dim=24, bias="table", cosine=True, pads=True)
    check(case.but(dtype=dtype), "triton")
    launcher.forget()


def test_what_tf32_rounds_of_the_output_does_not_reach_the_gradient_of_logit_scale(monkeypatch):
    """Its rows of dS sum to zero; an output that is rounded would leave them a sum."""
    case = Case(1, (75,), (75,), heads=2, head_dim=16, bias="table", cosine=True)
    operands, grad_out = make_operands(case), make_grad_out(case)
    options = Problem.checked(operands, **case.options).options
    monkeypatch.setattr(launcher, "tf32_allowed", lambda: True)
    launcher.forget()
    ops = BACKENDS["triton"].ops
    out, stats = ops.forward(*operands, *options, True)
    rounded = (out.view(torch.int32) & ~0x1FFF).view(torch.float32)  # to the 10 bits of TF32
    assert not torch.equal(rounded, out)
    scale = DIFFERENTIABLE.index("logit_scale")
    found = [
        ops.backward(grad_out, x, stats, *operands, *options, NEEDS["logit_scale"])[scale]
        for x in (out, rounded)
    ]
    launcher.forget()
    error = (found[1] - found[0]).abs().max() / found[0].abs().max()
    assert error < 1e-4


@over(
    Case(1, (150,), (75,), (30,), heads=1, layout="contiguous"),
    Case(1, (4, 6, 6), (4, 6, 3), (1, 2, 1), heads=1, layout="contiguous"),
)
def test_seams_cut_windows_in_tiles_that_have_no_bias(case):
    check(case, "triton")


def test_a_forward_takes_128_queries_at_once():
    case = Case(1, (16, 20), (16, 16), (0, 8), heads=1, head_dim=16, dtype=torch.float16)
    case = case.but(bias="table", layout="contiguous")
    wide = call_of(256, 16, 16, case.dtype, 2, 1)
    assert config_for("tiled_forward", wide, INTERPRETER).block_m == 128
    check(case, "triton")


def test_numbers_of_plans_are_those_of_the_kernels():
    assert common.LARGEST_LOGIT.value == launch_spec.LARGEST_LOGIT
    kinds = (common.NO_BIAS, common.DENSE_BIAS, common.TABLE_BIAS, common.INDEXED_BIAS)
    assert [kind.value for kind in kinds] == list(kernel_args.BIAS_KINDS.values())


def test_backward_bias_sums_what_each_image_gives():
    """`backward_bias`, of a run that ends within an image, against a call for each image."""
    case = TILES.but(batch=3, bias="dense", cosine=False, pads=False, layout="contiguous")
    operands, grad_out = make_operands(case), make_grad_out(case)
    whole = run(case, operands, grad_out, "triton").grads["bias"]
    parts = []
    for image in range(3):
        one = [x[image : image + 1] for x in operands[:3]]
        few = operands._replace(query=one[0], key=one[1], value=one[2])
        parts.append(run(case.but(batch=1), few, grad_out[image : image + 1], "triton").grads)
    torch.testing.assert_close(whole, sum(p["bias"] for p in parts), rtol=1e-4, atol=1e-5)


def test_channels_more_than_32_bits_apart_are_found():
    apart = 2**24 + 2**20
    memory = torch.empty(127 * apart + 16, dtype=torch.float16)  # its pages come only when touched
    x = memory.as_strided((1, 16, 1, 128), (16, 1, 16, apart))
    x.copy_(torch.randn(1, 16, 1, 128, generator=torch.Generator().manual_seed(0)))
    out = shifted_window_attention(x, x, x, 16, backend="triton")
    near = x.contiguous()
    assert torch.equal(out, shifted_window_attention(near, near, near, 16, backend="triton"))


def test_an_index_beyond_32_bits_is_not_taken_for_a_row():
    x, table = torch.randn(1, 4, 1, 16), torch.randn(3, 1)
    index = torch.zeros(4, 4, dtype=torch.int64)
    index[2, 1] = 2**32 + 1
    operands = Operands(x, x, x, bias_table=table, bias_index=index)
    options = Problem.checked(operands._replace(bias_index=index * 0), 4).options
    out, _ = BACKENDS["triton"].forward(operands, options, False)
    assert out[0, 2].isnan().all()
    assert not out[0, [0, 1, 3]].isnan().any()


@REGIMES
def test_no_buffer_is_read_before_it_is_written(case, monkeypatch):
    filled_with_nan = _run(case)  # as all are in this session
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(7))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7))
    filled_with_numbers = _run(case)
    monkeypatch.undo()
    assert_same_bits(filled_with_nan, filled_with_numbers)
    assert all(grad.isfinite().all() for grad in filled_with_nan.grads.values())


@pytest.fixture
def tensors_of_launches(monkeypatch):
    """The tensors that the launches of a call were given, as they were before the first."""
    seen, launch = [], launcher.Launch.__call__

    def looked_at(self, *arguments):
        seen.append([x.clone() for x in arguments if isinstance(x, torch.Tensor)])
        launch(self, *arguments)

    monkeypatch.setattr(launcher.Launch, "__call__", looked_at)
    launcher.forget()
    return seen


def test_fresh_buffers_of_this_session_hold_nan(tensors_of_launches):
    out = call(WHOLE, make_operands(WHOLE), "triton")
    assert any(x.shape == out.shape and x.isnan().all() for x in tensors_of_launches[0])
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        # bias and mask of a head, for each of four ways that the shift cuts windows
        (WHOLE, [(2, 4, 16, 16)]),
        (TILES, [(2, 90, 1, 16), (4, 1, 2 * 70)]),
        # whole windows without bias, mask or idle lanes
        (Case(1, (8, 8), (4, 4)), []),
    ],
    ids=["whole", "tiles", "nothing"],
)
def test_a_few_tiles_are_saved_or_two_numbers_a_row_with_the_output(case, shapes):
    out, saved = saved_by_a_call(case, "triton")
    assert [tuple(x.shape) for x in saved] == shapes
    assert {x.dtype for x in saved} <= {torch.float32}
    if case is TILES:
        assert saved[0].data_ptr() == out.data_ptr()


@REGIMES
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_no_product_or_sum_of_integers_overflows(case, packed):
    with fast_interpreter(overflow_checked=True):
        _run(case.but(packed=packed, mask="soft", dropout_p=0.2))


@REGIMES
def test_without_gradients_nothing_is_kept(case, tensors_of_launches):
    out, saved = saved_by_a_call(case, "triton")
    kept = {x.shape for x in saved} - {out.shape}
    assert kept
    tensors_of_launches.clear()
    with torch.no_grad():
        call(case, make_operands(case), "triton")
    assert not kept & {x.shape for tensors in tensors_of_launches for x in tensors}


class TestGuard:
    """The guard itself: what it must let pass, and what it must not."""

    @staticmethod
    def _copied(x, y, count, step):
        """The traffic of a copy from x to y."""
        traffic = Traffic()
        with guarded({"x": x}, {"y": y}, traffic):
            copy_kernel[(1,)](x, y, count, step)
        return traffic

    def test_active_lanes_inside_are_counted(self):
        x, y = torch.arange(8.0), torch.empty(8)
        traffic = self._copied(x, y, 6, 1)
        assert torch.equal(y[:6], x[:6])
        assert traffic.loaded == {"x": 24}
        assert traffic.stored == {"y": 24}

    def test_a_second_read_is_not_distinct(self):
        traffic = self._copied(torch.arange(8.0), torch.empty(8), 8, 0)
        assert traffic.loaded == {"x": 32}
        assert traffic.distinct_loaded == {"x": 4}

    @pytest.mark.parametrize(
        ("x", "count", "step", "message"),
        [
            (torch.arange(8.0), 9, 1, "outside of all tensors"),
            (torch.arange(8.0), 8, 2, "outside of all tensors"),
            (torch.arange(8.0), 2, -1, "outside of all tensors"),
            (torch.zeros(4, 5)[:, :3], 4, 1, "between the elements of"),
        ],
        ids=["beyond", "far beyond", "before", "between rows"],
    )
    def test_a_lane_that_is_no_element_raises(self, x, count, step, message):
        with pytest.raises(Exception, match=message):
            self._copied(x, torch.empty(16), count, step)

    def test_a_store_to_an_operand_raises(self):
        x, y = torch.arange(8.0), torch.zeros(8)
        with (
            pytest.raises(Exception, match="store to y, which is read only"),
            guarded({"x": x, "y": y}, {}),
        ):
            copy_kernel[(1,)](x, y, 8, 1)
        assert not y.any()

    def test_an_atomic_raises(self):
        x = torch.zeros(8)
        with pytest.raises(Exception, match="an atomic"), guarded({}, {"x": x}):
            atomic_kernel[(1,)](x)

    def test_afterwards_the_interpreter_is_as_it_was(self):
        with guarded({}, {}):
            assert "create_masked_load" in vars(interpreter_builder)
        assert "create_masked_load" not in vars(interpreter_builder)
