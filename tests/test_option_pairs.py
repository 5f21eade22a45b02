"""Every pair of kinds of options, each backend: a covering array instead of the full product.

Two options that are each right alone and wrong together are found here: each value of one meets
each value of every other, in some row of the array. The rows run on every backend, so with
TRITON_INTERPRET=1 on the Triton kernels and with --emulate-cuda on those of CUDA C++.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from modes import INTERPRETER, MODE

from swin_kernels.testing import BIASES, DTYPE_NAMES, LAYOUTS, MASKS, Case, check

AllPairs = pytest.importorskip("allpairspy", reason="makes the covering array").AllPairs

# tokens of a window: one tile, whole forward but tiled backward in Triton, tiles in both
WINDOWS = {
    "one tile": ((33,), (6, 7), (3, 4, 5)),
    "65 to 128": ((70,), (9, 8), (3, 5, 5)),
    "tiles": ((130,), (11, 12), (3, 4, 11)),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "axes": (1, 2, 3),
    "tokens": tuple(WINDOWS),
    "size": ("divided", "padded", "padded with pads", "smaller than a window"),
    "shift": ("none", "first axis", "all axes"),
    "pad_order": ("pad-roll", "roll-pad"),
    "periodic": ("none", "last axis", "all axes"),
    "bias": BIASES,
    "logits": ("scaled", "own scale", "cosine"),
    "mask": MASKS,
    "mask_value": (-100.0, -200.0, -math.inf),
    "head_dim": (32, 10, 40),
    "operands": ("packed", "separate", "wider values"),
    "layout": LAYOUTS,
    "dropout_p": (0.0, 0.3),
    "extras": ("same dtype", "fp32"),
}


def rows(dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    """The covering array: values by the name of the option."""
    options = {"dtype": dtypes, **OPTIONS}
    return [dict(zip(options, row)) for row in AllPairs(list(options.values()))]


def _size(kind: str, windows: int, window: tuple[int, ...]) -> tuple[int, ...]:
    """`windows` on the first axis, one on the others; the last one on each as full as `kind`."""
    if kind == "smaller than a window":
        return tuple((w + 1) // 2 for w in window)
    lacking = 0 if kind == "divided" else 1
    return (windows * window[0] - lacking, *(w - lacking for w in window[1:]))


def case_of(row: dict[str, Any]) -> Case:
    axes = row["axes"]
    window = WINDOWS[row["tokens"]][axes - 1]
    last_axis = tuple(axis == axes - 1 for axis in range(axes))
    head_dim = row["head_dim"]
    # the gradient of logit_scale is one number a head: heads instead of images and windows
    batch, heads = (1, 16) if row["logits"] == "cosine" else (2, 2)
    windows = 2 if row["tokens"] == "one tile" and batch == 2 else 1
    return Case(
        batch=batch,
        size=_size(row["size"], windows, window),
        window=window,
        shift=tuple(
            w // 2 if row["shift"] == "all axes" or (row["shift"] == "first axis" and not i) else 0
            for i, w in enumerate(window)
        ),
        heads=heads,
        head_dim=head_dim,
        value_dim=head_dim + 6 if row["operands"] == "wider values" else None,
        dtype=row["dtype"],
        packed=row["operands"] == "packed",
        bias=row["bias"],
        cosine=row["logits"] == "cosine",
        mask=row["mask"],
        mask_value=row["mask_value"],
        pads=row["size"] == "padded with pads",
        pad_order=row["pad_order"],
        periodic={"none": None, "last axis": last_axis, "all axes": (True,) * axes}[
            row["periodic"]
        ],
        scale=0.17 if row["logits"] == "own scale" else None,
        dropout_p=row["dropout_p"],
        layout=row["layout"],
        extras_dtype=torch.float32 if row["extras"] == "fp32" else None,
    )


def pytest_generate_tests(metafunc):
    if "pair_case" in metafunc.fixturenames:
        cases = [case_of(row) for row in rows(metafunc.config.stash[MODE].dtypes)]
        metafunc.parametrize("pair_case", cases, ids=str)


def test_every_pair_of_options_matches_float64(pair_case, backend):
    check(pair_case, backend)


@pytest.mark.parametrize("dtypes", [tuple(DTYPE_NAMES), INTERPRETER.dtypes], ids=len)
def test_the_array_has_every_pair_of_values(dtypes):
    options = {"dtype": dtypes, **OPTIONS}
    found = {pair for row in rows(dtypes) for pair in itertools.combinations(row.items(), 2)}
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(options, 2)
        for x, y in itertools.product(options[a], options[b])
    }
    assert found == wanted
