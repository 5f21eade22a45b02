"""Kernels before and after the tiled ones: a bias expanded for them, the gradient of a table."""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    DENSE_BIAS,
    INDEXED_BIAS,
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
    With it the sides of the seams on which tokens lie, (EXPANDED,), if any axis has two regions.
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
        start = expanded_ptr + head.to(tl.int64) * (EXPANDED * EXPANDED)
        tl.store(start + pair, value, mask=pair < EXPANDED * EXPANDED)


@triton.jit
def _table_grad_kernel(
    dense_ptr,
    index_ptr,
    grad_ptr,
    heads,
    table_rows,
    META: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad[t, h] = Σ dense[h, i, j] over the pairs that meet in row t, always in one order.

    A geometric table has at most one key for a row and a query, so it runs over queries; for an
    index of any other kind it compares every pair.
    """
    N: tl.constexpr = META.TOKENS
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dense = dense_ptr + head.to(tl.int64) * (N * N)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    if BIAS == INDEXED_BIAS:
        for start in tl.range(0, N * N, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            row = tl.load(index_ptr + pair, mask=pair < N * N, other=-1)
            grad = tl.load(dense + pair, mask=pair < N * N, other=0.0)
            total += tl.where(row[None, :] == t[:, None], grad[None, :], 0.0)
    else:
        # Δ on each axis: place of the query minus place of the key
        delta0 = t // ((2 * META.WINDOW[1] - 1) * (2 * META.WINDOW[2] - 1)) - (META.WINDOW[0] - 1)
        delta1 = t // (2 * META.WINDOW[2] - 1) % (2 * META.WINDOW[1] - 1) - (META.WINDOW[1] - 1)
        delta2 = t % (2 * META.WINDOW[2] - 1) - (META.WINDOW[2] - 1)
        for start in tl.range(0, N, BLOCK):
            i = start + tl.arange(0, BLOCK)
            places = token_places(i, META)
            y0 = places[0][None, :] - delta0[:, None]
            y1 = places[1][None, :] - delta1[:, None]
            y2 = places[2][None, :] - delta2[:, None]
            meets = (y0 >= 0) & (y0 < META.WINDOW[0]) & (y1 >= 0) & (y1 < META.WINDOW[1])
            meets = meets & (y2 >= 0) & (y2 < META.WINDOW[2]) & (i < N)[None, :]
            j = (y0 * META.WINDOW[1] + y1) * META.WINDOW[2] + y2
            total += tl.load(dense + i[None, :] * N + j, mask=meets, other=0.0)
    grad = tl.sum(total, 1)
    grad = grad.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + t * heads + head, grad, mask=t < table_rows)
