"""Backward kernels for windows of several tiles: the tokens, in two passes from what was saved.

`_tiled_dq_kernel` takes BLOCK_M queries of a window through its keys, and leaves Δ = rowsum(dO∘O)
for the other passes; `_tiled_dkv_kernel` takes BLOCK_N keys through the queries. (Dao et al.,
"FlashAttention", 2022, section 3.2, split so that every sum has one owner: no atomics.) The bias
has a pass of its own, in bias_grad.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.bwd_common import (
    load_stats,
    tile_gradients,
)
from swin_kernels.backends.triton.kernels.common import (
    fill_padding,
    load_tokens,
    store_partial,
    store_tokens,
    sum_over,
    through_unit,
    to_unit,
)
from swin_kernels.backends.triton.kernels.window import (
    seams_crossed,
    tile_of,
    token_places,
    token_positions,
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
    logit_scale_sums_ptr,
    grad_out_strides,
    out_strides,
    query_strides,
    key_strides,
    value_strides,
    grad_query_strides,
    key_start,
    value_start,
    sizes,
    counts,
    factors,
    shifts,
    periods,
    rolls,
    heads,
    windows,
    windows_at_once,
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
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tile, head, window = tile_of(tl.program_id(0), heads, windows, windows_at_once, TILES)
    if SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    image, number, place = window_place(window, counts, factors, shifts, PLANES)
    crossed = seams_crossed(place, counts, REGIONS)

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    places_i = token_places(i, WINDOW)
    x_i, real = token_positions(
        places_i, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
    )
    rows = real & (i < N)
    q = load_tokens(query_ptr, 0, image, head, x_i, rows, query_strides, HEAD_DIM, BLOCK_D, ALIGNED)
    do = load_tokens(
        grad_out_ptr, 0, image, head, x_i, rows, grad_out_strides, VALUE_DIM, BLOCK_DV, ALIGNED
    )
    out = load_tokens(out_ptr, 0, image, head, x_i, rows, out_strides, VALUE_DIM, BLOCK_DV, ALIGNED)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    row = (window.to(tl.int64) * heads + head) * N
    tl.store(delta_ptr + row + i, delta, mask=i < N)
    top, share = load_stats(stats_ptr, row, i, N)
    factor = scale
    if COSINE:
        q, q_norm = to_unit(q)
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    left = tl.zeros((BLOCK_M,), tl.float32)
    cosines = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=LOOP_STAGES):
        j = start + tl.arange(0, BLOCK_N)
        places_j = token_places(j, WINDOW)
        x_j, real_j = token_positions(
            places_j, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        keys = real_j & (j < N)
        padding = (j < N) & ~real_j
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
        if HAS_PAD_KEY:
            k = fill_padding(k, padding, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
        if HAS_PAD_VALUE:
            v = fill_padding(v, padding, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
        if COSINE:
            k = to_unit(k)[0]
        _, ds, p, products = tile_gradients(
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
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if COSINE:
            left += tl.sum(ds, 1)
            cosines += tl.sum(p * products, 1)

    if COSINE:
        dq, radial = through_unit(dq, factor, q, q_norm, query_ptr.dtype.element_ty)
        # rows of dS sum to zero but for the rounding of `out` in Δ, which a large scale would show
        radial -= left * cosines
        tl.store(logit_scale_sums_ptr + (window * heads + head) * TILES + tile, tl.sum(radial, 0))
    else:
        dq *= factor
    store_tokens(
        grad_query_ptr,
        0,
        image,
        head,
        x_i,
        rows,
        grad_query_strides,
        dq,
        HEAD_DIM,
        BLOCK_D,
        ALIGNED,
    )


@triton.jit
def _tiled_dkv_kernel(
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
    grad_key_ptr,
    grad_value_ptr,
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
    sizes,
    counts,
    factors,
    shifts,
    periods,
    rolls,
    heads,
    windows,
    windows_at_once,
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
    NEEDS_PAD_KEY: tl.constexpr,
    NEEDS_PAD_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, head, window = tile_of(tl.program_id(0), heads, windows, windows_at_once, TILES)
    if SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    image, number, place = window_place(window, counts, factors, shifts, PLANES)
    crossed = seams_crossed(place, counts, REGIONS)

    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    places_j = token_places(j, WINDOW)
    x_j, real_j = token_positions(
        places_j, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
    )
    keys = real_j & (j < N)
    padding = (j < N) & ~real_j
    k = load_tokens(
        key_ptr, key_start, image, head, x_j, keys, key_strides, HEAD_DIM, BLOCK_D, ALIGNED
    )
    v = load_tokens(
        value_ptr, value_start, image, head, x_j, keys, value_strides, VALUE_DIM, BLOCK_DV, ALIGNED
    )
    if HAS_PAD_KEY:
        k = fill_padding(k, padding, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
    if HAS_PAD_VALUE:
        v = fill_padding(v, padding, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
    factor = scale
    if COSINE:
        k, k_norm = to_unit(k)
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    row = (window.to(tl.int64) * heads + head) * N
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in tl.range(0, N, BLOCK_M, num_stages=LOOP_STAGES):
        i = start + tl.arange(0, BLOCK_M)
        places_i = token_places(i, WINDOW)
        x_i, real_i = token_positions(
            places_i, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        rows = real_i & (i < N)
        q = load_tokens(
            query_ptr, 0, image, head, x_i, rows, query_strides, HEAD_DIM, BLOCK_D, ALIGNED
        )
        do = load_tokens(
            grad_out_ptr, 0, image, head, x_i, rows, grad_out_strides, VALUE_DIM, BLOCK_DV, ALIGNED
        )
        top, share = load_stats(stats_ptr, row, i, N)
        delta = tl.load(delta_ptr + row + i, mask=i < N, other=0.0)
        if COSINE:
            q = to_unit(q)[0]
        weights, ds, _, _ = tile_gradients(
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
        dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)

    if COSINE:
        dk, _ = through_unit(dk, factor, k, k_norm, query_ptr.dtype.element_ty)
    else:
        dk *= factor
    share_row = (window * heads + head) * TILES + tile
    if NEEDS_PAD_KEY:
        store_partial(pad_key_sums_ptr, share_row, sum_over(padding, dk), HEAD_DIM, BLOCK_D)
    if NEEDS_PAD_VALUE:
        store_partial(pad_value_sums_ptr, share_row, sum_over(padding, dv), VALUE_DIM, BLOCK_DV)
    store_tokens(
        grad_key_ptr,
        grad_key_start,
        image,
        head,
        x_j,
        keys,
        grad_query_strides,
        dk,
        HEAD_DIM,
        BLOCK_D,
        ALIGNED,
    )
    store_tokens(
        grad_value_ptr,
        grad_value_start,
        image,
        head,
        x_j,
        keys,
        grad_value_strides,
        dv,
        VALUE_DIM,
        BLOCK_DV,
        ALIGNED,
    )
