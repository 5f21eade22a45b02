"""Backward kernel for the bias of windows of several tiles, after the pass of the queries.

A program takes one tile of a head's bias through a run of windows, and writes its sum once: no
atomics, and two runs give the same bits.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.bwd_common import load_stats, tile_gradients
from swin_kernels.backends.triton.kernels.common import fill_padding, load_tokens, to_unit
from swin_kernels.backends.triton.kernels.window import (
    seams_crossed,
    token_places,
    token_positions,
    window_place,
)


@triton.jit
def _tiled_dbias_kernel(
    grad_out_ptr,
    stats_ptr,
    delta_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    mask_ptr,
    pad_key_ptr,
    pad_value_ptr,
    logit_scale_ptr,
    seed_ptr,
    sides_ptr,
    bias_sums_ptr,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    key_start,
    value_start,
    sizes,
    counts,
    factors,
    shifts,
    periods,
    rolls,
    windows,
    windows_per_program,
    heads,
    scale,
    mask_value,
    kept_factor,
    WINDOW: tl.constexpr,
    REGIONS: tl.constexpr,
    ROLLED: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_STRIDES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAD_KEY: tl.constexpr,
    HAS_PAD_VALUE: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT_THRESHOLD: tl.constexpr,
    LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    ROWS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    column = tl.program_id(0) % COLUMNS
    tile_row = tl.program_id(0) // COLUMNS % ROWS
    head = tl.program_id(0) // (COLUMNS * ROWS) % heads
    run = tl.program_id(0) // (COLUMNS * ROWS) // heads
    first = run * windows_per_program
    last = tl.minimum(first + windows_per_program, windows)

    i = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    places_i = token_places(i, WINDOW)
    places_j = token_places(j, WINDOW)
    factor = scale
    if COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        image, number, place = window_place(window, counts, factors, shifts, PLANES)
        crossed = seams_crossed(place, counts, REGIONS)
        x_i, real_i = token_positions(
            places_i, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        x_j, real_j = token_positions(
            places_j, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        rows = real_i & (i < N)
        keys = real_j & (j < N)
        padding = (j < N) & ~real_j
        q = load_tokens(
            query_ptr, 0, image, head, x_i, rows, query_strides, HEAD_DIM, BLOCK_D, ALIGNED
        )
        k = load_tokens(
            key_ptr, key_start, image, head, x_j, keys, key_strides, HEAD_DIM, BLOCK_D, ALIGNED
        )
        v = load_tokens(
            value_ptr,
            value_start,
            image,
            head,
            x_j,
            keys,
            value_strides,
            VALUE_DIM,
            BLOCK_DV,
            ALIGNED,
        )
        do = load_tokens(
            grad_out_ptr, 0, image, head, x_i, rows, grad_out_strides, VALUE_DIM, BLOCK_DV, ALIGNED
        )
        row = (window.to(tl.int64) * heads + head) * N
        top, share = load_stats(stats_ptr, row, i, N)
        delta = tl.load(delta_ptr + row + i, mask=i < N, other=0.0)
        if HAS_PAD_KEY:
            k = fill_padding(k, padding, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
        if HAS_PAD_VALUE:
            v = fill_padding(v, padding, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
        if COSINE:
            q = to_unit(q)[0]
            k = to_unit(k)[0]
        _, ds, _, _ = tile_gradients(
            q,
            k,
            v,
            do,
            top,
            share,
            delta,
            window,
            number,
            head,
            heads,
            i,
            j,
            crossed,
            factor,
            mask_value,
            kept_factor,
            bias_ptr,
            mask_ptr,
            seed_ptr,
            sides_ptr,
            WINDOW,
            REGIONS,
            HAS_BIAS,
            SPREAD,
            HAS_MASK,
            DROPOUT_THRESHOLD,
            LOG2,
            PRECISION,
        )
        bias_sum += ds

    start = bias_sums_ptr + (run.to(tl.int64) * heads + head) * (N * N)
    within = (i < N)[:, None] & (j < N)[None, :]
    tl.store(start + i[:, None] * N + j[None, :], bias_sum, mask=within)
