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


def acts(values: dict[str, Any]) -> bool:
    """Whether no value is without effect beside the others, as far as they are chosen.

    The order of padding and roll shows where there are both; an axis wraps round where it is
    shifted; a mask value is added at a seam, which a shifted axis has that does not wrap round.
    """
    shift, periodic = values.get("shift"), values.get("periodic", "none")
    if values.get("pad_order") == "roll-pad" and (
        shift == "none" or values.get("size") == "divided"
    ):
        return False
    if periodic != "none" and shift == "none":
        return False
    axes = values.get("axes")
    if periodic == "last axis" and shift == "first axis" and axes in (2, 3):
        return False
    no_seam = shift == "none" or periodic == "all axes" or (periodic == "last axis" and axes == 1)
    no_seam |= periodic == "last axis" and shift == "first axis"  # so of one axis
    return not (no_seam and values.get("mask_value", -100.0) != -100.0)


def _pairs(row: dict[str, Any]) -> set[tuple]:
    return set(itertools.combinations(row.items(), 2))


def wanted_pairs(options: dict[str, tuple[Any, ...]]) -> set[tuple]:
    """Every pair of values that act beside each other."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(options, 2)
        for x, y in itertools.product(options[a], options[b])
        if acts({a: x, b: y})
    }


def rows(dtypes: tuple[torch.dtype, ...]) -> list[dict[str, Any]]:
    """The covering array: values by the name of the option."""
    options = {"dtype": dtypes, **OPTIONS}

    def kept(row: list[Any]) -> bool:  # the first few options of a row, in order
        return acts(dict(zip(options, row)))

    array = [dict(zip(options, row)) for row in AllPairs(list(options.values()), filter_func=kept)]
    # allpairspy gives up a pair that its next options do not go with: rows that have these instead
    lacking = wanted_pairs(options) - set().union(*map(_pairs, array))
    while lacking:
        pair = dict(min(lacking, key=str))
        free = {name: values for name, values in options.items() if name not in pair}
        changed = [
            row | pair | {name: value}
            for row in array
            for name, values in free.items()
            for value in values
        ]
        best = max(filter(acts, changed), key=lambda row: len(lacking & _pairs(row)))
        array.append(best)
        lacking -= _pairs(best)
    return array


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
def test_the_array_has_every_pair_of_values_that_act(dtypes):
    array = rows(dtypes)
    assert all(acts(row) for row in array)
    found = set().union(*map(_pairs, array))
    assert found == wanted_pairs({"dtype": dtypes, **OPTIONS})
