"""Kernels between a bias table and the dense bias (H, N, N) that it stands for."""

import triton
import triton.language as tl

from swin_kernels.kernels.triton.tile import INDEXED_BIAS, TABLE_BIAS
from swin_kernels.kernels.triton.window import geometric_row, token_places


@triton.jit
def _table_to_dense_kernel(
    table_ptr,
    index_ptr,
    dense_ptr,
    heads,
    table_rows,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dense[h, i, j] = table[index[i, j], h]; a program has BLOCK pairs of one head."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head = tl.program_id(0) % heads
    pair = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    inside = pair < N * N
    if BIAS == TABLE_BIAS:
        row = geometric_row(token_places(pair // N, WINDOW), token_places(pair % N, WINDOW), WINDOW)
    else:
        row = tl.load(index_ptr + pair, mask=inside, other=0).to(tl.int32)
    known = (row >= 0) & (row < table_rows)
    value = tl.load(table_ptr + row * heads + head, mask=inside & known, other=float("nan"))
    tl.store(dense_ptr + head.to(tl.int64) * (N * N) + pair, value, mask=inside)


@triton.jit
def _table_grad_kernel(
    dense_ptr,
    index_ptr,
    grad_ptr,
    heads,
    table_rows,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad[t, h] = Σ dense[h, i, j] over the pairs that meet in row t, always in one order.

    A geometric table has at most one key for a row and a query, so it runs over queries; for an
    index of any other kind it compares every pair.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dense = dense_ptr + head.to(tl.int64) * (N * N)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    if BIAS == INDEXED_BIAS:
        for start in tl.range(0, N * N, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            row = tl.load(index_ptr + pair, mask=pair < N * N, other=-1).to(tl.int32)
            grad = tl.load(dense + pair, mask=pair < N * N, other=0.0)
            total += tl.where(row[None, :] == t[:, None], grad[None, :], 0.0)
    else:
        # Δ on each axis: place of the query minus place of the key
        delta0 = t // ((2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1)) - (WINDOW[0] - 1)
        delta1 = t // (2 * WINDOW[2] - 1) % (2 * WINDOW[1] - 1) - (WINDOW[1] - 1)
        delta2 = t % (2 * WINDOW[2] - 1) - (WINDOW[2] - 1)
        for start in tl.range(0, N, BLOCK):
            i = start + tl.arange(0, BLOCK)
            places = token_places(i, WINDOW)
            y0 = places[0][None, :] - delta0[:, None]
            y1 = places[1][None, :] - delta1[:, None]
            y2 = places[2][None, :] - delta2[:, None]
            meets = (y0 >= 0) & (y0 < WINDOW[0]) & (y1 >= 0) & (y1 < WINDOW[1])
            meets = meets & (y2 >= 0) & (y2 < WINDOW[2]) & (i < N)[None, :]
            j = (y0 * WINDOW[1] + y1) * WINDOW[2] + y2
            total += tl.load(dense + i[None, :] * N + j, mask=meets, other=0.0)
    grad = tl.sum(total, 1)
    grad = grad.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + t * heads + head, grad, mask=t < table_rows)
