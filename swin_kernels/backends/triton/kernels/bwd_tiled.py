"""Backward kernels for windows of several tiles, in three passes from what was saved.

`_tiled_dq_kernel` takes BLOCK_M queries of a window through its keys, and leaves Δ = rowsum(dO∘O)
for the other passes; `_tiled_dkv_kernel` takes BLOCK_N keys through the queries; and
`_tiled_dbias_kernel` a tile of a head's bias through a run of windows. What cosine attention
normalises, the first two leave to those behind them. (Dao et al.,
"FlashAttention", 2022, section 3.2, split so that every sum has one owner: no atomics, and two runs
give the same bits.)
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.bwd_common import (
    load_stats,
    load_units,
    store_units,
    tile_gradients,
)
from swin_kernels.backends.triton.kernels.common import (
    l2_normalize,
    l2_normalize_bwd,
    load_bias,
    load_keys,
    load_tokens,
    pad_keys,
    store_partial,
    store_tokens,
    sum_over,
)
from swin_kernels.backends.triton.kernels.window import (
    decode_program_id,
    locate,
    seams_crossed,
    token_places,
    window_place,
)


@triton.jit
def _tiled_dq_kernel(
    grad_out_ptr,
    out_ptr,
    stats_ptr,
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
    grad_query_ptr,
    delta_ptr,
    unit_query_ptr,
    logit_scale_sums_ptr,
    grad_out_strides,
    out_strides,
    query_strides,
    key_strides,
    value_strides,
    grad_query_strides,
    key_start,
    value_start,
    geometry,
    heads,
    windows,
    group_windows,
    scale,
    mask_value,
    kept_factor,
    META: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    SUMS_KEYS: tl.constexpr,
):
    N: tl.constexpr = META.TOKENS
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tile, head, window = decode_program_id(tl.program_id(0), heads, windows, group_windows, TILES)
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    query, grad_out = (query_ptr, 0, query_strides), (grad_out_ptr, 0, grad_out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)
    image, in_image, place = window_place(window, geometry, META)
    here = (window, in_image, seams_crossed(place, geometry, META))
    added = (bias_ptr, mask_ptr, seed_ptr, sides_ptr)

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_i, rows, _padding_i = locate(i, token_places(i, META), place, geometry, META)
    at_i = (image, head, x_i, rows)
    q = load_tokens(query, at_i, META.HEAD_DIM, BLOCK_D, META)
    do = load_tokens(grad_out, at_i, META.VALUE_DIM, BLOCK_DV, META)
    out = load_tokens((out_ptr, 0, out_strides), at_i, META.VALUE_DIM, BLOCK_DV, META)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    row = (window.to(tl.int64) * heads + head) * N
    stats = load_stats(stats_ptr, row, i, N)
    factor = scale
    if META.COSINE:
        q, q_norm = l2_normalize(q)
        if unit_query_ptr is not None:
            store_units(unit_query_ptr, row, i, q, BLOCK_D, META)
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # rows of dS sum to zero but for the rounding of `out` in Δ, which a large scale would show;
    # products of exact fp32 leave none
    CORRECTS: tl.constexpr = META.COSINE and META.PRECISION != "ieee"
    left = tl.zeros((BLOCK_M,), tl.float32)
    mean_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # P·k̂
    cosines = tl.zeros((BLOCK_M,), tl.float32)  # its product with q̂, if that is all that is summed
    for start in tl.range(0, N, BLOCK_N, num_stages=LOOP_STAGES):
        j = start + tl.arange(0, BLOCK_N)
        x_j, keys, padding = locate(j, token_places(j, META), place, geometry, META)
        at_j = (image, head, x_j, keys)
        k, v = load_keys(key, value, at_j, BLOCK_D, BLOCK_DV, META)
        k, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
        if META.COSINE:
            k = l2_normalize(k)[0]
        scalars = (factor, mask_value, kept_factor)
        _, ds, e, products = tile_gradients(
            q, k, v, do, stats, delta, here, head, i, j, None, added, scalars, META
        )
        dq += tl.dot(ds.to(k.dtype), k, input_precision=META.PRECISION)
        if CORRECTS:
            left += tl.sum(ds, 1)
            if SUMS_KEYS:
                mean_key += tl.dot(e.to(k.dtype), k, input_precision=META.PRECISION)
            else:
                cosines += tl.sum(e * products, 1)

    if CORRECTS:
        delta += left
        left *= stats[1]
        dq -= left[:, None] * mean_key
    tl.store(delta_ptr + row + i, delta, mask=i < N)
    if META.COSINE:
        dq, radial = l2_normalize_bwd(dq, factor, q, q_norm, query_ptr.dtype.element_ty)
        radial -= left * cosines
        tl.store(logit_scale_sums_ptr + (window * heads + head) * TILES + tile, tl.sum(radial, 0))
    else:
        dq *= factor
    store_tokens((grad_query_ptr, 0, grad_query_strides), at_i, dq, META.HEAD_DIM, BLOCK_D, META)


@triton.jit
def _tiled_dkv_kernel(
    grad_out_ptr,
    stats_ptr,
    delta_ptr,
    unit_query_ptr,
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
    grad_key_ptr,
    grad_value_ptr,
    unit_key_ptr,
    pad_key_sums_ptr,
    pad_value_sums_ptr,
    grad_out_strides,
    query_strides,
    key_strides,
    value_strides,
    grad_query_strides,
    grad_value_strides,
    key_start,
    value_start,
    grad_key_start,
    grad_value_start,
    geometry,
    heads,
    windows,
    group_windows,
    scale,
    mask_value,
    kept_factor,
    META: tl.constexpr,
    NEEDS_PAD_KEY: tl.constexpr,
    NEEDS_PAD_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    N: tl.constexpr = META.TOKENS
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, head, window = decode_program_id(tl.program_id(0), heads, windows, group_windows, TILES)
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    query, grad_out = (query_ptr, 0, query_strides), (grad_out_ptr, 0, grad_out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)
    grad_key = (grad_key_ptr, grad_key_start, grad_query_strides)
    grad_value = (grad_value_ptr, grad_value_start, grad_value_strides)
    image, in_image, place = window_place(window, geometry, META)
    here = (window, in_image, seams_crossed(place, geometry, META))
    added = (bias_ptr, mask_ptr, seed_ptr, sides_ptr)

    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_j, keys, padding = locate(j, token_places(j, META), place, geometry, META)
    at_j = (image, head, x_j, keys)
    k, v = load_keys(key, value, at_j, BLOCK_D, BLOCK_DV, META)
    k, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
    factor = scale
    row = (window.to(tl.int64) * heads + head) * N
    if META.COSINE:
        k, k_norm = l2_normalize(k)
        if unit_key_ptr is not None:
            store_units(unit_key_ptr, row, j, k, BLOCK_D, META)
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in tl.range(0, N, BLOCK_M, num_stages=LOOP_STAGES):
        i = start + tl.arange(0, BLOCK_M)
        x_i, rows, _padding_i = locate(i, token_places(i, META), place, geometry, META)
        at_i = (image, head, x_i, rows)
        if unit_query_ptr is not None:
            q = load_units(unit_query_ptr, row, i, BLOCK_D, META)
        else:
            q = load_tokens(query, at_i, META.HEAD_DIM, BLOCK_D, META)
        do = load_tokens(grad_out, at_i, META.VALUE_DIM, BLOCK_DV, META)
        stats = load_stats(stats_ptr, row, i, N)
        delta = tl.load(delta_ptr + row + i, mask=i < N, other=0.0)
        if META.COSINE and unit_query_ptr is None:
            q = l2_normalize(q)[0]
        scalars = (factor, mask_value, kept_factor)
        weights, ds, _, _ = tile_gradients(
            q, k, v, do, stats, delta, here, head, i, j, None, added, scalars, META
        )
        dv += tl.dot(weights.to(do.dtype), do, input_precision=META.PRECISION)
        dk += tl.dot(ds.to(q.dtype), q, input_precision=META.PRECISION)

    if META.COSINE:
        dk = l2_normalize_bwd(dk, factor, k, k_norm, query_ptr.dtype.element_ty)[0]
    else:
        dk *= factor
    row = (window * heads + head) * TILES + tile
    if NEEDS_PAD_KEY:
        store_partial(pad_key_sums_ptr, row, sum_over(padding, dk), META.HEAD_DIM, BLOCK_D)
    if NEEDS_PAD_VALUE:
        store_partial(pad_value_sums_ptr, row, sum_over(padding, dv), META.VALUE_DIM, BLOCK_DV)
    store_tokens(grad_key, at_j, dk, META.HEAD_DIM, BLOCK_D, META)
    store_tokens(grad_value, at_j, dv, META.VALUE_DIM, BLOCK_DV, META)


@triton.jit
def _tiled_dbias_kernel(
    grad_out_ptr,
    stats_ptr,
    delta_ptr,
    unit_query_ptr,
    unit_key_ptr,
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
    geometry,
    windows,
    windows_per_program,
    heads,
    scale,
    mask_value,
    kept_factor,
    META: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    N: tl.constexpr = META.TOKENS
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
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    query, grad_out = (query_ptr, 0, query_strides), (grad_out_ptr, 0, grad_out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)
    added = (bias_ptr, mask_ptr, seed_ptr, sides_ptr)
    places_i = token_places(i, META)
    places_j = token_places(j, META)
    factor = scale
    if META.COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    bias = load_bias(bias_ptr, head, i, j, META)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        image, in_image, place = window_place(window, geometry, META)
        here = (window, in_image, seams_crossed(place, geometry, META))
        x_i, rows, _padding_i = locate(i, places_i, place, geometry, META)
        x_j, keys, padding = locate(j, places_j, place, geometry, META)
        at_i, at_j = (image, head, x_i, rows), (image, head, x_j, keys)
        row = (window.to(tl.int64) * heads + head) * N
        if unit_key_ptr is not None:
            q = load_units(unit_query_ptr, row, i, BLOCK_D, META)
            k = load_units(unit_key_ptr, row, j, BLOCK_D, META)
            v = load_tokens(value, at_j, META.VALUE_DIM, BLOCK_DV, META)
        else:
            q = load_tokens(query, at_i, META.HEAD_DIM, BLOCK_D, META)
            k, v = load_keys(key, value, at_j, BLOCK_D, BLOCK_DV, META)
        do = load_tokens(grad_out, at_i, META.VALUE_DIM, BLOCK_DV, META)
        stats = load_stats(stats_ptr, row, i, N)
        delta = tl.load(delta_ptr + row + i, mask=i < N, other=0.0)
        filled, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
        if unit_key_ptr is None:  # else the pass before left keys filled
            k = filled
            if META.COSINE:
                q, k = l2_normalize(q)[0], l2_normalize(k)[0]
        scalars = (factor, mask_value, kept_factor)
        _, ds, _, _ = tile_gradients(
            q, k, v, do, stats, delta, here, head, i, j, bias, added, scalars, META
        )
        bias_sum += ds

    start = bias_sums_ptr + (run.to(tl.int64) * heads + head) * (N * N)
    within = (i < N)[:, None] & (j < N)[None, :]
    tl.store(start + i[:, None] * N + j[None, :], bias_sum, mask=within)
