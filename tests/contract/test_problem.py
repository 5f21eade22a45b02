"""What bad input gets: a ValueError that says what came and what was expected, and no work."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch

from swin_kernels import shifted_window_attention, shifted_window_attention_qkvpacked
from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.problem import Operands, Options, Problem
from swin_kernels.testing import Case, make_operands

CASE = Case(2, (8, 8), (4, 4), (2, 2), heads=3, head_dim=16, layout="contiguous")
GOOD = make_operands(CASE)


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch):
    for backend in BACKENDS.values():
        for method in ("forward", "backward"):
            never = Mock(side_effect=AssertionError(f"{backend.name} was called"))
            monkeypatch.setattr(backend, method, never)


def _zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


TOKENS = (
    ({"key": _zeros(2, 8, 7, 3, 16)}, r"key: expected the shape of query, \(2, 8, 8, 3, 16\), got"),
    ({"key": _zeros(2, 8, 8, 3, 8)}, r"key: expected the shape of query.*got \(2, 8, 8, 3, 8\)"),
    ({"value": _zeros(2, 8, 8, 2, 16)}, r"value: expected .*'Dv'.* got \(2, 8, 8, 2, 16\)"),
    ({"value": _zeros(2, 8, 8, 3, 4, 4)}, r"value: expected .* got \(2, 8, 8, 3, 4, 4\)"),
    (
        {"value": _zeros(2, 8, 8, 3, 0)},
        "at least one head and one channel, got 3 heads of 16 and 0",
    ),
    ({"query": _zeros(8, 3, 16)}, r"query: expected \(B, \*S, H, D\) .* got \(8, 3, 16\)"),
    ({"query": _zeros(2, 2, 2, 2, 2, 3, 16)}, r"query: expected .* with 1, 2 or 3 axes S, got"),
    ({"query": _zeros(2, 8, 8, 3, 16).long()}, "query: expected float16, .* got torch.int64"),
    ({"key": _zeros(2, 8, 8, 3, 16).double()}, "key is torch.float64, query torch.float32: cast"),
    ({"value": _zeros(2, 8, 8, 3, 16).half()}, "value is torch.float16, query torch.float32: cast"),
    ({"key": _zeros(2, 8, 8, 3, 16, device="meta")}, "key is on meta, query on cpu: move"),
    ({"query": [1.0]}, "expected a tensor.*, got list"),
    ({"query": None}, "query: expected a tensor, got NoneType"),
    ({"key": None}, "key and value: expected tensors.*qkvpacked"),
    ({"value": None}, "key and value: expected tensors.*qkvpacked"),
)


@pytest.mark.parametrize(("changes", "message"), TOKENS)
def test_tokens_that_do_not_fit_raise(changes, message):
    query, key, value, *_ = GOOD._replace(**changes)
    with pytest.raises(ValueError, match=message):
        shifted_window_attention(query, key, value, 4, 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 8, 9, 16), r"qkv: expected \(B, \*S, 3, H, D\) .* got \(2, 8, 8, 9, 16\)"),
        ((2, 8, 8, 144), "unflatten"),
        ((2, 2, 2, 2, 2, 3, 3, 16), r"with 1, 2 or 3 axes S.* got \(2, 2, 2, 2, 2, 3, 3, 16\)"),
        ((2, 8, 3, 0, 16), "at least one head and one channel, got 0 heads"),
        ((2, 0, 8, 3, 2, 8), r"at least 1 token on each axis, got \(0, 8\)"),
    ],
)
def test_packed_tokens_that_do_not_fit_raise(shape, message):
    with pytest.raises(ValueError, match=message):
        shifted_window_attention_qkvpacked(torch.zeros(shape), 2)


_INDEX = torch.zeros(16, 16, dtype=torch.int64)


def _indexed(index):
    return {"bias_table": _zeros(9, 3), "bias_index": index}


EXTRAS = (
    ({"bias": _zeros(3, 15, 16)}, r"bias: expected shape \(3, 16, 16\).*got \(3, 15, 16\)"),
    ({"bias": _zeros(2, 16, 16)}, r"bias: expected shape \(3, 16, 16\).*got \(2, 16, 16\)"),
    ({"bias": _zeros(16, 16)}, r"bias: expected shape \(3, 16, 16\).*got \(16, 16\)"),
    ({"bias": _zeros(3, 16, 16).long()}, "bias: expected a floating dtype, got torch.int64"),
    ({"bias": _zeros(3, 16, 16, device="meta")}, "bias is on meta, query on cpu"),
    (
        {"bias": _zeros(3, 16, 16), "bias_table": _zeros(49, 3)},
        r"both bias \(3, 16, 16\) and bias_table \(49, 3\) were given: pass one",
    ),
    ({"bias_table": _zeros(48, 3)}, r"bias_table: expected shape \(49, 3\).*got \(48, 3\)"),
    ({"bias_table": _zeros(49, 2)}, r"bias_table: expected \(T, 3\).*got \(49, 2\)"),
    ({"bias_table": _zeros(49)}, r"bias_table: expected \(T, 3\).*got \(49,\)"),
    ({"bias_index": _INDEX}, r"bias_index \(16, 16\) came without a bias_table"),
    (_indexed(_INDEX[:15]), r"bias_index: expected shape \(16, 16\).*got \(15, 16\)"),
    (_indexed(_INDEX.float()), "bias_index: expected int32 or int64, got torch.float32"),
    (_indexed(_INDEX.bool()), "bias_index: expected int32 or int64, got torch.bool"),
    (_indexed(_INDEX + 9), "bias_index: expected rows of the table, 0 to 8, got 9 to 9"),
    (_indexed(_INDEX - 1), "bias_index: expected rows of the table, 0 to 8, got -1 to -1"),
    ({"mask": _zeros(3, 16, 16)}, r"mask: expected shape \(4, 16, 16\).*got \(3, 16, 16\)"),
    ({"mask": _zeros(16, 16)}, r"mask: expected shape \(4, 16, 16\).*got \(16, 16\)"),
    ({"mask": _zeros(4, 16, 16).to_sparse()}, r"mask: expected a dense tensor, got torch\.sparse_"),
    ({"mask": _zeros(4, 16, 16).bool()}, "mask: expected a floating dtype, got torch.bool"),
    ({"mask": _zeros(4, 16, 16, requires_grad=True)}, "mask requires grad, but has no gradient"),
    ({"pad_key": _zeros(3, 8)}, r"pad_key: expected shape \(3, 16\), \(H, D\), got \(3, 8\)"),
    ({"pad_key": _zeros(48)}, r"pad_key: expected shape \(3, 16\), \(H, D\), got \(48,\)"),
    (
        {"pad_value": _zeros(2, 16)},
        r"pad_value: expected shape \(3, 16\), \(H, Dv\), got \(2, 16\)",
    ),
    ({"pad_value": _zeros(3, 16).int()}, "pad_value: expected a floating dtype, got torch.int32"),
    ({"logit_scale": _zeros(2)}, r"logit_scale: expected shape \(3,\).*got \(2,\)"),
    ({"logit_scale": _zeros(3, 1, 1)}, r"logit_scale: expected shape \(3,\).*got \(3, 1, 1\)"),
    ({"logit_scale": _zeros(3), "scale": 0.5}, "scale=0.5 came together with logit_scale"),
)


@pytest.mark.parametrize(("extras", "message"), EXTRAS)
def test_extras_that_do_not_fit_raise(extras, message):
    with pytest.raises(ValueError, match=message):
        shifted_window_attention(*GOOD[:3], 4, 2, **extras)
    packed = torch.zeros(2, 8, 8, 3, 3, 16)
    with pytest.raises(ValueError, match=message):
        shifted_window_attention_qkvpacked(packed, 4, 2, **extras)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, r"window_size: expected at least 1 on each axis, got \(0, 0\)"),
        ({"window_size": (4, -1)}, r"window_size: expected at least 1 .* got \(4, -1\)"),
        ({"window_size": (4, 4, 4)}, "window_size: expected one number or one for each of 2 axes"),
        ({"window_size": 4.0}, "window_size: expected whole numbers, got 4.0"),
        ({"shift_size": 4}, r"0 <= shift < window on each axis, got shift \(4, 4\) with window"),
        ({"shift_size": (0, -1)}, r"0 <= shift < window on each axis, got shift \(0, -1\)"),
        ({"shift_size": (1,)}, "shift_size: expected one number or one for each of 2 axes"),
        ({"periodic": (True,)}, r"periodic: expected a bool or .* 2 axes, got \(True,"),
        ({"periodic": 1}, "periodic: expected a bool or one for each of 2 axes, got 1"),
        ({"pad_order": "roll"}, "pad_order: expected one of .*'roll-pad'.* got 'roll'"),
        ({"mask_value": float("nan")}, "mask_value: expected a finite number or -inf, got nan"),
        ({"mask_value": float("inf")}, "mask_value: expected a finite number or -inf, got inf"),
        ({"dropout_p": -0.1}, "dropout_p: expected a probability between 0 and 1, got -0.1"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability between 0 and 1, got 1.5"),
        ({"dropout_p": float("nan")}, "dropout_p: expected a probability between 0 and 1, got nan"),
        ({"window_size": 2**31}, "at most 32768 tokens in a window"),
        ({"window_size": (2**10, 2**10)}, "at most 32768 tokens in a window"),
        ({"scale": torch.tensor(0.1)}, "scale: expected a number, got Tensor"),
        ({"scale": [1]}, "scale: expected a number, got list"),
        ({"scale": math.nan}, "scale: expected a finite number, got nan"),
        ({"mask_value": "x"}, "mask_value: expected a number, got str"),
        ({"mask_value": None}, "mask_value: expected a number, got NoneType"),
        ({"dropout_p": "0.1"}, "dropout_p: expected a number, got str"),
        ({"backend": "fast"}, "backend: expected one of cpu, .*reference or None, got 'fast'"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    arguments = {"window_size": 4, "shift_size": 2} | options
    with pytest.raises(ValueError, match=message):
        shifted_window_attention(*GOOD[:3], **arguments)


def test_problem_holds_the_facts_of_the_call():
    case = CASE.but(size=(7, 9), bias="table", mask="soft", cosine=True, value_dim=24, pads=True)
    problem = Problem.checked(make_operands(case), **case.options)
    assert (problem.batch, problem.heads, problem.head_dim, problem.value_dim) == (2, 3, 16, 24)
    assert problem.grid == case.grid
    assert (problem.dtype, problem.device) == (torch.float32, torch.device("cpu"))
    assert not problem.packed
    assert problem.bias == "table"
    assert problem.has_mask
    assert problem.cosine
    assert problem.options == Options((4, 4), (2, 2), (False, False), False, -100.0, 0.25, 0.0)


def test_problem_reads_as_one_line():
    case = CASE.but(bias="dense", mask="soft", cosine=True, value_dim=24, dropout_p=0.1)
    text = str(Problem.checked(make_operands(case), **case.options))
    assert text == (
        "B=2 map=8×8 window=4×4 shift=2×2 H=3 D=16 Dv=24 float32 cpu, dense bias, mask, cosine, "
        "dropout 0.1"
    )
    packed = CASE.but(packed=True, shift=(0, 0))
    text = str(Problem.checked(make_operands(packed), **packed.options))
    assert text == "B=2 map=8×8 window=4×4 shift=0×0 H=3 D=16 float32 cpu, packed"


def test_operands_unpack_to_views():
    qkv = torch.randn(2, 8, 3, 2, 4)
    for part, view in enumerate(Operands(qkv).unpacked()):
        assert view.data_ptr() == qkv[:, :, part].data_ptr()
    assert Operands(*GOOD[:3]).unpacked() == tuple(GOOD[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 4.0},
        {"window_size": (4, 4.0)},
        {"shift_size": False},
        {"shift_size": (2, 0.0)},
        {"periodic": 0},
        {"periodic": (0, False)},
    ],
    ids=str,
)
def test_checks_do_not_depend_on_the_calls_before(options):
    good = {"window_size": (4, 4), "shift_size": (2, 0), "periodic": (False, False)}
    for first in (good, {"window_size": 4, "shift_size": 0, "periodic": False}):
        Problem.checked(GOOD, **first)
        with pytest.raises(ValueError, match=next(iter(options))):
            Problem.checked(GOOD, **first | options)


def test_index_that_was_changed_is_checked_again():
    index = _INDEX.clone()
    operands = GOOD._replace(**_indexed(index))
    Problem.checked(operands, 4)
    index[3, 3] = 9
    with pytest.raises(ValueError, match="expected rows of the table, 0 to 8, got 0 to 9"):
        Problem.checked(operands, 4)
    Problem.checked(operands._replace(bias_table=torch.zeros(10, 3)), 4)


def test_index_made_in_inference_mode_is_checked():
    with torch.inference_mode():
        index = torch.full((16, 16), -1)
    operands = GOOD._replace(**_indexed(index))
    with pytest.raises(ValueError, match="got -1 to -1"):
        Problem.checked(operands, 4)
