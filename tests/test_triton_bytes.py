"""Bytes that the Triton kernels load and store, counted lane by lane under the interpreter.

C is the channels of all heads, N the tokens of a window, T the tiles that N takes. In half
precision a pass over a map of C channels is 2C bytes a token.
"""

from __future__ import annotations

import math

import pytest
import torch

from swin_kernels.kernels.triton.configs import INTERPRETER, Shape, config_for
from swin_kernels.testing import Case, make_grad_out, make_operands, run

pytestmark = pytest.mark.interpreted

SHIFTS = pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=["unshifted", "shifted"])
HEADS, DIM = 2, 32
PASS = 2 * HEADS * DIM  # bytes a token


def _traffic(case):
    """Traffic by kernel, of a forward and a backward."""
    from triton_memory import guarded_launches

    traffic = {}
    operands, grad_out = make_operands(case), make_grad_out(case)
    with guarded_launches(traffic):
        run(case, operands, grad_out, "triton")
    return traffic


def _runs(case, kernel):
    shape = Shape(case.grid.tokens, DIM, DIM, case.dtype, case.batch * case.grid.windows, HEADS)
    return math.ceil(
        shape.windows
        / config_for(kernel, shape, INTERPRETER).windows_per_program(shape, INTERPRETER)
    )


def _swin(shift, **changes):
    case = Case(2, (28, 28), (7, 7), shift, HEADS, DIM, dtype=torch.float16, packed=True)
    return case.but(bias="dense", layout="contiguous", **changes)


@SHIFTS
def test_whole_windows_move_8_bytes_a_channel_forward_and_14_backward(shift):
    case = _swin(shift)
    tokens, pairs = case.batch * math.prod(case.size), case.grid.tokens**2
    traffic = _traffic(case)
    forward, backward = (traffic[f"_whole_window_{name}_kernel"] for name in ("fwd", "bwd"))
    for kernel, counted, a_channel in (("forward", forward, 8), ("backward", backward, 14)):
        moved = sum(counted.loaded.values()) + sum(counted.stored.values())
        biases = _runs(case, kernel) * HEADS * pairs
        shared = biases * (2 if kernel == "forward" else 2 + 4)  # partial sums are fp32
        expected = a_channel * HEADS * DIM * tokens + shared
        assert abs(moved - expected) <= 0.05 * expected
    # no token is read or written twice
    assert forward.loaded["query"] == forward.distinct_loaded["query"] == 3 * PASS * tokens
    assert forward.stored == forward.distinct_stored == {"out": PASS * tokens}
    assert backward.loaded["query"] == backward.distinct_loaded["query"] == 3 * PASS * tokens
    assert backward.loaded["grad_out"] == backward.distinct_loaded["grad_out"] == PASS * tokens
    assert backward.stored["grad_query"] == 3 * PASS * tokens
    assert backward.stored == backward.distinct_stored
    # a head's bias is read once a run of windows, and its partial sum written once
    assert forward.loaded["bias"] == _runs(case, "forward") * HEADS * pairs * 2
    assert backward.loaded["bias"] == _runs(case, "backward") * HEADS * pairs * 2
    assert backward.stored["bias_sums"] == _runs(case, "backward") * HEADS * pairs * 4


def test_padding_moves_nothing():
    case = _swin((3, 3), pads=True).but(size=(26, 23))
    tokens = case.batch * math.prod(case.size)
    traffic = _traffic(case)
    assert traffic["_whole_window_fwd_kernel"].loaded["query"] == 3 * PASS * tokens
    assert traffic["_whole_window_fwd_kernel"].stored == {"out": PASS * tokens}
    assert traffic["_whole_window_bwd_kernel"].stored["grad_query"] == 3 * PASS * tokens


@SHIFTS
def test_tiles_read_the_other_side_once_a_tile(shift):
    case = Case(1, (24, 12), (12, 12), (shift[0], 0), HEADS, DIM, dtype=torch.float16)
    case = case.but(bias="dense", layout="contiguous")
    n, tokens, windows = case.grid.tokens, math.prod(case.size), case.grid.windows
    shape = Shape(n, DIM, DIM, case.dtype, windows, HEADS)
    tiles = {
        kernel: math.ceil(n / config_for(kernel, shape, INTERPRETER).block_m)
        for kernel in ("tiled_forward", "dq", "dkv", "dbias")
    }
    assert set(tiles.values()) == {3}
    a_pass, rows = PASS * tokens, 4 * HEADS * tokens  # rows: an fp32 number a token and head
    biases = windows * HEADS * n * n * 2
    traffic = _traffic(case)

    # each tile of queries reads all keys and values
    forward, t = traffic["_tiled_fwd_kernel"], tiles["tiled_forward"]
    assert forward.loaded == {
        "query": a_pass,
        "key": t * a_pass,
        "value": t * a_pass,
        "bias": biases,
    }
    assert forward.stored == {"out": a_pass, "log_sum_exp": rows}

    dq, t = traffic["_tiled_dq_kernel"], tiles["dq"]
    assert dq.loaded == {
        "query": a_pass,
        "grad_out": a_pass,
        "out": a_pass,
        "log_sum_exp": rows,
        "key": t * a_pass,
        "value": t * a_pass,
        "bias": biases,
    }
    assert dq.stored == {"grad_query": a_pass, "delta": rows}

    # each tile of keys reads all queries, and what is saved of their rows
    dkv, t = traffic["_tiled_dkv_kernel"], tiles["dkv"]
    assert dkv.loaded == {
        "key": a_pass,
        "value": a_pass,
        "query": t * a_pass,
        "grad_out": t * a_pass,
        "log_sum_exp": t * rows,
        "delta": t * rows,
        "bias": biases,
    }
    assert dkv.stored == {"grad_key": a_pass, "grad_value": a_pass}

    # each tile of the bias reads its queries and its keys of all windows
    dbias, t = traffic["_tiled_dbias_kernel"], tiles["dbias"]
    for name in ("query", "key", "value", "grad_out"):
        assert dbias.loaded[name] == t * a_pass
    for name in ("log_sum_exp", "delta"):
        assert dbias.loaded[name] == t * rows
    assert dbias.stored["bias_sums"] == dbias.distinct_stored["bias_sums"]
    assert dbias.stored["bias_sums"] % (HEADS * n * n * 4) == 0

    for counted in (forward, dq, dkv, dbias):  # distinct, it is one pass each
        for name in counted.loaded.keys() & {"query", "key", "value", "grad_out", "out"}:
            assert counted.distinct_loaded[name] == a_pass
        assert counted.stored == counted.distinct_stored
