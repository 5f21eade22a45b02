"""Kernels before and after those of attention: a bias expanded for tiles, and its gradient.

A backward leaves the gradient of the bias as one (H, N, N) a run of windows, `sums`.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    DENSE_BIAS,
    NO_BIAS,
    TABLE_BIAS,
    bias_logits,
)
from swin_kernels.backends.triton.kernels.window import geometric_row, seam_sides, token_places


@triton.jit
def _expand_bias_kernel(
    bias_ptr,
    index_ptr,
    expanded_ptr,
    transposed_ptr,
    sides_ptr,
    seams,
    heads,
    table_rows,
    META: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bias of any kind as tiles want it: (H, EXPANDED, EXPANDED) fp32, for blocks of all sizes.

    In the units of logits, −inf for keys beyond the window. A program has BLOCK pairs of one head.
    At `transposed_ptr`, if any, once more with keys as rows. With it the sides of the seams on
    which tokens lie, (EXPANDED,), if any axis has two regions.
    """
    N: tl.constexpr = META.TOKENS
    EXPANDED: tl.constexpr = META.EXPANDED
    head = tl.program_id(0) % heads
    pair = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    i, j = pair // EXPANDED, pair % EXPANDED
    if META.REGIONS[0] or META.REGIONS[1] or META.REGIONS[2]:
        sides = seam_sides(token_places(j, META), seams)
        tl.store(sides_ptr + j, sides, mask=i + head == 0)
    if BIAS != NO_BIAS:
        inside = (i < N) & (j < N)
        if BIAS == DENSE_BIAS:
            start = bias_ptr + head.to(tl.int64) * (N * N)
            value = tl.load(start + i * N + j, mask=inside, other=0.0).to(tl.float32)
        else:
            if BIAS == TABLE_BIAS:
                places_i, places_j = token_places(i, META), token_places(j, META)
                row = geometric_row(places_i, places_j, META)
            else:
                row = tl.load(index_ptr + i * N + j, mask=inside, other=0)
            known = (row >= 0) & (row < table_rows)
            row = tl.where(known, row, 0).to(tl.int32)
            value = tl.load(bias_ptr + row * heads + head, mask=inside & known, other=0.0)
            # only the device sees an index that the table lacks: let the user see it too
            value = tl.where(inside & ~known, float("nan"), value.to(tl.float32))
        value = tl.where(j < N, bias_logits(value, META.LOG2), float("-inf"))
        start, within = head.to(tl.int64) * (EXPANDED * EXPANDED), pair < EXPANDED * EXPANDED
        tl.store(expanded_ptr + start + pair, value, mask=within)
        if transposed_ptr is not None:
            tl.store(transposed_ptr + start + j * EXPANDED + i, value, mask=within)


@triton.jit
def _add_runs(total, sums, runs, r, at, mask, BLOCK_RUNS: tl.constexpr, META: tl.constexpr):
    """total plus what runs r, r + BLOCK_RUNS, … left `at` places of one head's (N, N)."""
    ptr, heads, head = sums
    for first in tl.range(0, runs, BLOCK_RUNS):
        start = ptr + ((first + r).to(tl.int64) * heads + head) * (META.TOKENS * META.TOKENS)
        total += tl.load(start + at, mask=(first + r < runs) & mask, other=0.0)
    return total


@triton.jit
def _bias_grad_kernel(
    sums_ptr,
    grad_ptr,
    heads,
    runs,
    META: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """grad[h, i, j] = Σ sums[run, h, i, j] over the runs of windows."""
    N: tl.constexpr = META.TOKENS
    head = tl.program_id(0) % heads
    pair = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    r, at = tl.arange(0, BLOCK_RUNS)[:, None], pair[None, :]
    total = tl.zeros((BLOCK_RUNS, BLOCK), tl.float32)
    total = _add_runs(total, (sums_ptr, heads, head), runs, r, at, at < N * N, BLOCK_RUNS, META)
    grad = tl.sum(total, 0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + head.to(tl.int64) * (N * N) + pair, grad, mask=pair < N * N)


@triton.jit
def _table_grad_kernel(
    sums_ptr,
    grad_ptr,
    heads,
    runs,
    table_rows,
    META: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """grad[t, h] = Σ sums[run, h, i, j] over runs of windows and the pairs that meet in row t.

    A geometric table has at most one key for a row and a query: it goes over queries.
    """
    N: tl.constexpr = META.TOKENS
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Δ on each axis: place of the query minus place of the key
    delta0 = t // ((2 * META.WINDOW[1] - 1) * (2 * META.WINDOW[2] - 1)) - (META.WINDOW[0] - 1)
    delta1 = t // (2 * META.WINDOW[2] - 1) % (2 * META.WINDOW[1] - 1) - (META.WINDOW[1] - 1)
    delta2 = t % (2 * META.WINDOW[2] - 1) - (META.WINDOW[2] - 1)
    r = tl.arange(0, BLOCK_RUNS)[:, None, None]
    total = tl.zeros((BLOCK_RUNS, BLOCK, BLOCK_ROWS), tl.float32)
    # queries that meet a row: only those whose key is in the window on the first axis
    delta, length, step = delta1, META.WINDOW[1], META.WINDOW[2]
    if META.WINDOW[0] > 1:
        delta, length, step = delta0, META.WINDOW[0], META.WINDOW[1] * META.WINDOW[2]
    begin = tl.maximum(tl.min(delta), 0) * step
    end = (length + tl.minimum(tl.max(delta), 0)) * step
    for start in tl.range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        places = token_places(i, META)
        y0 = places[0][:, None] - delta0[None, :]
        y1 = places[1][:, None] - delta1[None, :]
        y2 = places[2][:, None] - delta2[None, :]
        meets = (y0 >= 0) & (y0 < META.WINDOW[0]) & (y1 >= 0) & (y1 < META.WINDOW[1])
        meets = meets & (y2 >= 0) & (y2 < META.WINDOW[2]) & (i < N)[:, None]
        j = (y0 * META.WINDOW[1] + y1) * META.WINDOW[2] + y2  # neighbours in t are in memory
        at, meets = (i[:, None] * N + j)[None, :, :], meets[None, :, :]
        total = _add_runs(total, (sums_ptr, heads, head), runs, r, at, meets, BLOCK_RUNS, META)
    grad = tl.sum(tl.sum(total, 0), 0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + t * heads + head, grad, mask=t < table_rows)


@triton.jit
def _indexed_grad_kernel(
    summed_ptr,
    index_ptr,
    grad_ptr,
    heads,
    table_rows,
    META: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad[t, h] = Σ summed[h, i, j] over the pairs whose index is t, always in one order."""
    N: tl.constexpr = META.TOKENS
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    summed = summed_ptr + head.to(tl.int64) * (N * N)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in tl.range(0, N * N, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        row = tl.load(index_ptr + pair, mask=pair < N * N, other=-1)
        grad = tl.load(summed + pair, mask=pair < N * N, other=0.0)
        total += tl.where(row[None, :] == t[:, None], grad[None, :], 0.0)
    grad = tl.sum(total, 1).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + t * heads + head, grad, mask=t < table_rows)
