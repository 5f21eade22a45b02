"""Bytes that the Triton kernels load and store, counted lane by lane under the interpreter.

C is the channels of all heads, N the tokens of a window, T the tiles that N takes. In half
precision a pass over a map of C channels is 2C bytes a token.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from triton_calls import call_of
from triton_memory import guarded_launches

from swin_kernels.backends.triton.config import INTERPRETER, config_for
from swin_kernels.testing import Case, make_grad_out, make_operands, run

pytestmark = pytest.mark.interpreted

SHIFTS = pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=["unshifted", "shifted"])
HEADS, DIM = 2, 32
PASS = 2 * HEADS * DIM  # bytes a token


def _moved(counted):
    return sum(counted.distinct_loaded.values()) + sum(counted.stored.values())


def _traffic(case):
    """Traffic by kernel, of a forward and a backward."""
    traffic = {}
    operands, grad_out = make_operands(case), make_grad_out(case)
    with guarded_launches(traffic):
        run(case, operands, grad_out, "triton")
    return traffic


def _runs(case, kernel):
    windows = case.batch * case.grid.windows
    call = call_of(case.grid.tokens, DIM, DIM, case.dtype, windows, HEADS)
    config = config_for(kernel, call, INTERPRETER)
    return math.ceil(windows / config.windows_per_program(call, INTERPRETER))


def _swin(shift, **changes):
    case = Case(1, (28, 28), (7, 7), shift, HEADS, DIM, dtype=torch.float16, packed=True)
    return case.but(bias="dense", layout="contiguous", **changes)


@SHIFTS
def test_whole_windows_move_8_bytes_a_channel_forward_and_14_backward(shift):
    case = _swin(shift).but(batch=2, size=(21, 21))
    tokens, pairs = case.batch * math.prod(case.size), case.grid.tokens**2
    # what the forward leaves: bias and mask for each of the ways that the shift cuts a window
    tiles = HEADS * (4 if any(shift) else 1) * 64 * 64 * 4
    traffic = _traffic(case)
    forward, backward = (traffic[f"_single_tile_{name}_kernel"] for name in ("fwd", "bwd"))
    biases = {name: _runs(case, name) * HEADS * pairs for name in ("forward", "backward")}
    for counted, a_channel, shared in (
        (forward, 8, HEADS * pairs * 2 + tiles),
        (backward, 14, tiles + biases["backward"] * 4),  # partial sums are fp32
    ):
        expected = a_channel * HEADS * DIM * tokens + shared
        assert abs(_moved(counted) - expected) <= 0.05 * expected
        # no token is read or written twice
        assert counted.loaded["query"] == counted.distinct_loaded["query"] == 3 * PASS * tokens
        assert counted.stored == counted.distinct_stored
    assert forward.stored["out"] == PASS * tokens
    assert backward.loaded["grad_out"] == backward.distinct_loaded["grad_out"] == PASS * tokens
    assert backward.stored["grad_query"] == 3 * PASS * tokens
    # a head's bias is read once a run of windows, and its partial sum written once
    assert forward.loaded["bias"] == biases["forward"] * 2
    assert backward.stored["bias_sums"] == biases["backward"] * 4
    # the backward reads a tile again where other seams cut a window than the one before
    assert forward.stored["tiles"] == tiles
    assert backward.distinct_loaded["tiles"] == tiles
    assert backward.loaded["tiles"] == _tiles_read(case) * HEADS * 64 * 64 * 4


def _tiles_read(case):
    """By all runs of a head: one, and one more wherever the seams change, place by place."""
    rows, columns = case.grid.counts
    cut = [
        (y == rows - 1, x == columns - 1) if any(case.shift) else ()
        for y, x in itertools.product(range(rows), range(columns))
        for _ in range(case.batch)
    ]
    run = -(-len(cut) // _runs(case, "backward"))
    runs = (cut[first : first + run] for first in range(0, len(cut), run))
    return sum(1 + sum(a != b for a, b in itertools.pairwise(run)) for run in runs)


def test_128_tokens_move_8_bytes_a_channel_forward():
    case = Case(1, (4, 14, 14), (2, 7, 7), (1, 3, 3), HEADS, DIM, dtype=torch.float16, packed=True)
    case = case.but(bias="dense", layout="contiguous")
    tokens, pairs = math.prod(case.size), case.grid.tokens**2
    traffic = _traffic(case)
    forward = traffic["_single_tile_fwd_kernel"]
    expected = 8 * HEADS * DIM * tokens + 2 * HEADS * pairs + 8 * HEADS * tokens  # and `stats`
    assert abs(_moved(forward) - expected) <= 0.05 * expected
    assert forward.loaded["query"] == forward.distinct_loaded["query"] == 3 * PASS * tokens
    assert "_tiled_dkv_kernel" in traffic


def test_heads_of_64_channels_move_14_bytes_a_channel_backward():
    case = _swin((0, 0)).but(head_dim=64)
    tokens, pairs = math.prod(case.size), case.grid.tokens**2
    counted = _traffic(case)["_single_tile_bwd_kernel"]
    shared = HEADS * 64 * 64 * 4 + _runs(case, "backward") * HEADS * pairs * 4
    expected = 14 * HEADS * 64 * tokens + shared
    assert abs(_moved(counted) - expected) <= 0.05 * expected


def test_padding_moves_nothing():
    case = _swin((3, 3), pads=True).but(size=(26, 23))
    tokens = case.batch * math.prod(case.size)
    traffic = _traffic(case)
    assert traffic["_single_tile_fwd_kernel"].loaded["query"] == 3 * PASS * tokens
    assert traffic["_single_tile_fwd_kernel"].stored["out"] == PASS * tokens
    assert traffic["_single_tile_bwd_kernel"].stored["grad_query"] == 3 * PASS * tokens


@SHIFTS
def test_tiles_read_the_other_side_once_a_tile(shift):
    case = Case(1, (24, 12), (12, 12), (shift[0], 0), HEADS, DIM, dtype=torch.float16)
    case = case.but(bias="dense", layout="contiguous")
    n, tokens, windows = case.grid.tokens, math.prod(case.size), case.grid.windows
    call = call_of(n, DIM, DIM, case.dtype, windows, HEADS)
    blocks = {
        kernel: config_for(kernel, call, INTERPRETER)
        for kernel in ("tiled_forward", "dq", "dkv", "dbias")
    }
    tiles = {kernel: math.ceil(n / config.block_m) for kernel, config in blocks.items()}
    assert set(tiles.values()) == {3}
    a_pass, rows = PASS * tokens, 4 * HEADS * tokens  # rows: an fp32 number a token and head
    # of the bias, spread once in fp32 to whole tiles of 64, a program reads those that it needs
    assert {c.block_n for c in blocks.values()} == {64}
    added = {"expanded_bias": windows * HEADS * 192 * 192 * 4}
    # only the one window that the seam cuts reads on which sides of it the tokens of a tile lie
    added |= {"sides": HEADS * 3 * 3 * (64 + 64) * 4} if any(shift) else {}
    traffic = _traffic(case)

    # each tile of queries reads all keys and values
    forward, t = traffic["_tiled_fwd_kernel"], tiles["tiled_forward"]
    assert forward.loaded == added | {"query": a_pass, "key": t * a_pass, "value": t * a_pass}
    assert forward.stored == {"out": a_pass, "stats": 2 * rows}

    dq, t = traffic["_tiled_dq_kernel"], tiles["dq"]
    assert dq.loaded == added | {
        **dict.fromkeys(("query", "grad_out", "out"), a_pass),
        **dict.fromkeys(("key", "value"), t * a_pass),
        "stats": 2 * rows,
    }
    assert dq.stored == {"grad_query": a_pass, "delta": rows}

    # each tile of keys reads all queries, and what is saved of their rows
    dkv, t = traffic["_tiled_dkv_kernel"], tiles["dkv"]
    transposed = {name: size for name, size in added.items() if name != "expanded_bias"}
    transposed["transposed_bias"] = added["expanded_bias"]
    assert dkv.loaded == transposed | {
        **dict.fromkeys(("key", "value"), a_pass),
        **dict.fromkeys(("query", "grad_out"), t * a_pass),
        "stats": 2 * t * rows,
        "delta": t * rows,
    }
    assert dkv.stored == {"grad_key": a_pass, "grad_value": a_pass}

    # each tile of the bias reads its queries and its keys of all windows
    dbias, t = traffic["_tiled_dbias_kernel"], tiles["dbias"]
    for name in ("query", "key", "value", "grad_out"):
        assert dbias.loaded[name] == t * a_pass
    # and that tile of the bias once, for all windows of a run
    runs = dbias.stored["bias_sums"] // (HEADS * n * n * 4)
    assert dbias.loaded["expanded_bias"] == runs * HEADS * 192 * 192 * 4
    assert dbias.loaded["stats"] == 2 * t * rows
    assert dbias.loaded["delta"] == t * rows
    assert dbias.stored["bias_sums"] == dbias.distinct_stored["bias_sums"]
    assert dbias.stored["bias_sums"] % (HEADS * n * n * 4) == 0

    for counted in (forward, dq, dkv, dbias):  # distinct, it is one pass each
        for name in counted.loaded.keys() & {"query", "key", "value", "grad_out", "out"}:
            assert counted.distinct_loaded[name] == a_pass
        assert counted.stored == counted.distinct_stored


def test_cosine_attention_normalises_queries_and_keys_once():
    case = Case(1, (24, 12), (12, 12), heads=HEADS, head_dim=DIM, dtype=torch.float16)
    case = case.but(bias="dense", layout="contiguous", cosine=True)
    a_pass = PASS * math.prod(case.size)
    traffic = _traffic(case)
    dq, dkv, dbias = (traffic[f"_tiled_{name}_kernel"] for name in ("dq", "dkv", "dbias"))
    # 3 tiles of either side, as above
    assert dq.stored["unit_query"] == dkv.stored["unit_key"] == a_pass
    assert dkv.loaded["unit_query"] == 3 * a_pass
    assert "query" not in dkv.loaded
    assert dbias.loaded["unit_query"] == dbias.loaded["unit_key"] == 3 * a_pass
    assert not {"query", "key"} & set(dbias.loaded)
