"""What only the compiled CPU kernels promise: bits, threads, vector code, memory, refusals."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from command_lines import last_line_of
from contract_cases import assert_same_bits, over

from swin_kernels.backends import native
from swin_kernels.problem import Operands, Problem
from swin_kernels.testing import Case, call, check, make_grad_out, make_operands, run, with_grad

PLANE = Case(3, (11, 17), (4, 4), (2, 2), heads=3, bias="table", pads=True)
CASES = (
    PLANE,
    PLANE.but(cosine=True, packed=True),
    PLANE.but(bias="dense", mask="soft", value_dim=24, dtype=torch.float64),
    PLANE.but(bias="table+index", pad_order="roll-pad", dtype=torch.bfloat16),
    PLANE.but(dtype=torch.float16, dropout_p=0.2),
    Case(1, (9, 8, 7), (4, 4, 4), (2, 0, 1), bias="table", pads=True),
    Case(1, (30,), (64,), bias="dense", cosine=True, pads=True),
)
pytestmark = pytest.mark.usefixtures("cpu_kernels")


@over(*CASES)
def test_any_number_of_threads_gives_the_same_bits(case, threads):
    operands, grad_out = make_operands(case), make_grad_out(case)
    alone = run(case, operands, grad_out, "cpu")
    for count in (1, 2, 7):
        threads(count)
        assert_same_bits(run(case, operands, grad_out, "cpu"), alone)


@over(*CASES)
def test_an_image_does_not_depend_on_its_batch(case):
    case = case.but(dropout_p=0.0)  # a dropout mask counts windows over the whole batch
    operands = make_operands(case)
    whole = call(case, operands, "cpu")
    for image in range(case.batch):
        tokens = (None if x is None else x[image : image + 1] for x in operands[:3])
        alone = Operands(*tokens, *operands[3:])
        assert torch.equal(call(case.but(batch=1), alone, "cpu")[0], whole[image])


_CHECK_CAPABILITY = """
import torch
torch.set_num_threads(1)
from swin_kernels.backends import native
from swin_kernels.testing import Case, check
from swin_kernels.testing.attention_sublayer import SublayerCase, check_sublayer
from swin_kernels.testing.mlp import MlpCase, check_mlp
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for case in (
        Case(2, (11, 9), (4, 4), (2, 2), bias="table", pads=True),
        Case(2, (11, 9), (4, 4), (2, 1), bias="dense", mask="soft", cosine=True, packed=True),
        Case(2, (14, 10), (7, 7), (3, 3), head_dim=30, value_dim=10, dropout_p=0.2),
        Case(1, (5, 6, 7), (2, 3, 4), (1, 0, 2), head_dim=7, bias="table+index", pads=True),
        Case(1, (70,), (100,), head_dim=128, mask="holes"),
    ):
        check(case.but(dtype=dtype), "cpu")
    for case in (
        MlpCase(2, (9, 5), 40, 100, layer_scale=True, drop=True),
        MlpCase(2, (49,), 96, norm="post", activation="silu"),
    ):
        check_mlp(case.but(dtype=dtype), "cpu")
    for case in (
        SublayerCase(3, shift=(2, 1), layer_scale=True, drop=True, pad_order="roll-pad"),
        SublayerCase(2, (14, 14), (7, 7), (3, 3), 3, 96, norm="post", cosine=True),
    ):
        check_sublayer(case.but(dtype=dtype), "cpu")
print(native.cpu_capability())
"""


CAPABILITIES = ("default", "avx2", "avx512")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_vector_code_matches_float64_and_is_the_one_asked_for(capability):
    program = "from swin_kernels.backends import native; print(native.cpu_capability())"
    best = last_line_of(program, ATEN_CPU_CAPABILITY="")
    if capability not in CAPABILITIES[: CAPABILITIES.index(best) + 1]:
        pytest.skip(f"this processor has no {capability}")
    assert last_line_of(_CHECK_CAPABILITY, ATEN_CPU_CAPABILITY=capability) == capability


@over(
    Case(8, (9, 9), (8, 8), heads=2, head_dim=16, pads=True),
    Case(8, (33, 33), (16, 16), heads=2, head_dim=32, pads=True, bias="table"),
)
def test_rows_of_padding_that_are_all_alike_sum_without_a_drift(case):
    check(case, "cpu")


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, -1])
def test_a_nan_with_any_payload_stays_one(bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    case = Case(1, (4, 4), (4, 4), heads=1, head_dim=8)
    operands = make_operands(case)
    operands.key[0, 1, 1] = nan
    out = call(case, operands, "cpu")
    assert out.isnan().all()


def test_a_thousand_calls_do_not_grow_memory(threads):
    threads(1)
    case = Case(1, (8, 8), (4, 4), (2, 2), bias="table", pads=True, packed=True)
    operands, grad_out = with_grad(make_operands(case)), make_grad_out(case)
    leaves = [x for x in operands if x is not None]

    def step():
        torch.autograd.grad(call(case, operands, "cpu"), leaves, grad_out)

    def resident():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    for _ in range(200):
        step()
    before = resident()
    for _ in range(1000):
        step()
    assert resident() - before < 2**20


_MEASURE_PEAK = """
import json, resource, torch
torch.set_num_threads(2)
from swin_kernels.testing import Case, call, make_grad_out, make_operands, with_grad
case = Case(48, (48, 48), (12, 12), (6, 6), heads=2, head_dim=8, packed=True, bias="table")
small = case.but(batch=1)
for c in (small, case):
    operands, grad_out = with_grad(make_operands(c)), make_grad_out(c)
    leaves = [x for x in operands if x is not None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(call(c, operands, "cpu"), leaves, grad_out)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"growth": (after - before) * 1024, "tokens": operands[0].numel() * 4,
                  "logits": 48 * 16 * 2 * 144 * 144 * 4}))
"""


@pytest.mark.slow
def test_peak_memory_holds_no_logits():
    figures = json.loads(last_line_of(_MEASURE_PEAK))
    # out, its gradient and the packed gradient, and room for the scratch of two threads
    assert figures["growth"] < 2 * figures["tokens"] + 8 * 2**20
    assert figures["growth"] < 0.5 * figures["logits"]


def test_inference_allocates_the_output_and_nothing_else():
    case = Case(8, (48, 48), (12, 12), (6, 6), packed=True, bias="table")
    operands = make_operands(case)
    call(case, operands, "cpu")
    with torch.profiler.profile(profile_memory=True) as profile:
        out = call(case, operands, "cpu")
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated <= out.numel() * out.element_size() + 2**20


_GOOD = make_operands(PLANE)
_OPTIONS = Problem.checked(_GOOD, **PLANE.options).options
_BAD_OPERANDS = {
    "key of another size": {"key": _GOOD.key[:, 1:]},
    "key of another head dim": {"key": _GOOD.key[..., 1:]},
    "key of another rank": {"key": _GOOD.key[0]},
    "key of another dtype": {"key": _GOOD.key.double()},
    "key missing": {"key": None},
    "value missing": {"value": None},
    "value of another batch": {"value": _GOOD.value[1:]},
    "query of another rank": {"query": _GOOD.query[0, 0, 0]},
    "integer tokens": dict.fromkeys(("query", "key", "value"), _GOOD.query.long()),
    "packed without three": {"query": _GOOD.query[:, :, :, None], "key": None, "value": None},
    "table too short": {"bias_table": _GOOD.bias_table[1:]},
    "table of other heads": {"bias_table": _GOOD.bias_table[:, 1:]},
    "integer table": {"bias_table": _GOOD.bias_table.long()},
    "bias of another window": {"bias_table": None, "bias": torch.zeros(3, 15, 15)},
    "bias and table": {"bias": torch.zeros(3, 16, 16)},
    "index of another window": {"bias_index": torch.zeros(9, 9, dtype=torch.int64)},
    "float index": {"bias_index": torch.zeros(16, 16)},
    "index below the table": {"bias_index": torch.full((16, 16), -1, dtype=torch.int64)},
    "index beyond the table": {"bias_index": torch.full((16, 16), 49, dtype=torch.int64)},
    "int32 index beyond it": {"bias_index": torch.full((16, 16), 2**30, dtype=torch.int32)},
    "mask of other windows": {"mask": torch.zeros(14, 16, 16)},
    "mask of other tokens": {"mask": torch.zeros(15, 16, 15)},
    "pad_key of another head dim": {"pad_key": _GOOD.pad_key[:, 1:]},
    "pad_value of other heads": {"pad_value": _GOOD.pad_value[1:]},
    "logit_scale of other heads": {"logit_scale": torch.ones(2)},
    "seed of another dtype": {"dropout_seed": torch.zeros(1)},
    "empty seed": {"dropout_seed": torch.zeros(0, dtype=torch.int64)},
}


def _raw_forward(operands, options):
    return native.CpuBackend.ops.forward(*operands, *options, False)


def _raw_backward(grad_out, operands, options):
    return native.CpuBackend.ops.backward(grad_out, *operands, *options, False, 31)


def _assert_raw_ops_raise(operands, options):
    """By checks of their own: a call of too few arguments would raise as well."""
    with pytest.raises(RuntimeError, match="swin_kernels: "):
        _raw_forward(operands, options)
    with pytest.raises(RuntimeError, match="swin_kernels: "):
        _raw_backward(make_grad_out(PLANE), operands, options)


def test_good_operands_of_the_raw_ops_do_not_raise():
    assert torch.equal(_raw_forward(_GOOD, _OPTIONS), call(PLANE, _GOOD, "cpu"))
    assert _raw_backward(make_grad_out(PLANE), _GOOD, _OPTIONS)[0].shape == _GOOD.query.shape


@pytest.mark.parametrize("name", _BAD_OPERANDS)
def test_bad_operands_of_the_raw_ops_raise(name):
    options = _OPTIONS._replace(dropout_p=0.5 * ("seed" in name))
    _assert_raw_ops_raise(_GOOD._replace(**_BAD_OPERANDS[name]), options)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": ()},
        {"window_size": (4,)},
        {"window_size": (0, 4)},
        {"window_size": (4, 4, 4)},
        {"shift_size": (4, 0)},
        {"shift_size": (-1, 0)},
        {"shift_size": (1,)},
        {"periodic": (True,)},
    ],
    ids=str,
)
def test_bad_options_of_the_raw_ops_raise(changes):
    _assert_raw_ops_raise(_GOOD, _OPTIONS._replace(**changes))


@pytest.mark.parametrize(
    "grad_out",
    [
        torch.zeros(3, 11, 17, 3, 15),
        torch.zeros(2, 11, 17, 3, 16),
        torch.zeros(3, 11, 17, 3, 16, dtype=torch.float64),
        torch.zeros(16),
    ],
    ids=["head dim", "batch", "dtype", "rank"],
)
def test_gradient_that_does_not_fit_raises(grad_out):
    with pytest.raises(RuntimeError, match="swin_kernels: grad_out"):
        _raw_backward(grad_out, _GOOD, _OPTIONS)


def test_operands_may_overlap_and_be_offset():
    case = Case(1, (9,), (4,), (1,), heads=2, head_dim=8)

    def overlapping(operands):
        store = torch.cat([operands.query, operands.key[:, :2]], dim=1)
        return Operands(store[:, :9], store[:, 1:10], store[:, 2:11])

    check(case, "cpu", change=overlapping)


def test_more_threads_than_windows_is_no_error(threads):
    threads(8)
    check(Case(1, (4, 4), (4, 4), heads=1), "cpu")
