"""Forward kernels: softmax(scale·q·kᵀ + bias + mask)·v in windows of an unpartitioned map.

`_whole_window_fwd_kernel` holds a window in one tile. A program takes one head and a run of
windows, with the head's bias on chip for all of them. `_tiled_fwd_kernel` takes BLOCK_M queries of
one window and runs over its keys with a running softmax (Milakov & Gimelshein, "Online normalizer
calculation for softmax", 2018).

For the backward one leaves, if that holds whole windows as well, the sum of bias and shift mask: a
tile per head and per set of seams that can cut a window; else two numbers of each row's softmax.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    add_bias,
    add_masks,
    bias_tile,
    exponential,
    fill_padding,
    kept_tile,
    load_tokens,
    logits_of,
    shift_mask_tile,
    store_tokens,
    tile_pointers,
    to_unit,
)
from swin_kernels.backends.triton.kernels.window import (
    seam_sides,
    seams_crossed,
    tile_of,
    token_places,
    token_positions,
    window_place,
)


@triton.jit
def store_stats(ptr, window, head, heads, i, top, total, N: tl.constexpr):
    """Each row's largest logit and 1/Σexp(s − largest), 0 where no key is left.

    Apart, as their sum, the log-sum-exp, is rounded: a row that is masked whole has it near −100.
    """
    start = ptr + (window.to(tl.int64) * heads + head) * (2 * N)
    tl.store(start + i, tl.where(total == 0.0, 0.0, top), mask=i < N)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(start + N + i, tl.where(total == 0.0, 0.0, share), mask=i < N)


@triton.jit
def _whole_window_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    index_ptr,
    mask_ptr,
    pad_key_ptr,
    pad_value_ptr,
    logit_scale_ptr,
    seed_ptr,
    out_ptr,
    stats_ptr,
    tiles_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    key_start,
    value_start,
    sizes,
    counts,
    factors,
    shifts,
    periods,
    rolls,
    seams,
    windows,
    windows_per_program,
    heads,
    table_rows,
    tile_heads,
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
    BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAD_KEY: tl.constexpr,
    HAS_PAD_VALUE: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT_THRESHOLD: tl.constexpr,
    LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEEP_STATS: tl.constexpr,
    KEEP_TILES: tl.constexpr,
    TILES_PER_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    # heads are neighbours in launch order: they share the cache lines of a token
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * windows_per_program
    last = tl.minimum(first + windows_per_program, windows)
    if SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides

    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    places = token_places(n, WINDOW)
    sides = seam_sides(places, seams)
    mask_value = logits_of(mask_value, LOG2)
    bias = bias_tile(
        bias_ptr, index_ptr, head, heads, table_rows, n, n, places, places, BIAS, WINDOW, LOG2
    )  # (BLOCK_N, BLOCK_N)
    if KEEP_TILES:
        if (first == 0) & (head < tile_heads):
            for crossed in tl.static_range(TILES_PER_HEAD):
                tile = bias + shift_mask_tile(sides, sides, crossed, mask_value)
                number = head * TILES_PER_HEAD + crossed
                tl.store(tile_pointers(tiles_ptr, number, BLOCK_N), tile)
    factor = scale
    if COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)
    factor = logits_of(factor, LOG2)

    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        image, number, place = window_place(window, counts, factors, shifts, PLANES)
        x, real = token_positions(
            places, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        rows = real & inside
        q = load_tokens(
            query_ptr, 0, image, head, x, rows, query_strides, HEAD_DIM, BLOCK_D, ALIGNED
        )
        k = load_tokens(
            key_ptr, key_start, image, head, x, rows, key_strides, HEAD_DIM, BLOCK_D, ALIGNED
        )
        v = load_tokens(
            value_ptr,
            value_start,
            image,
            head,
            x,
            rows,
            value_strides,
            VALUE_DIM,
            BLOCK_DV,
            ALIGNED,
        )
        if HAS_PAD_KEY:
            k = fill_padding(k, inside & ~real, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
        if HAS_PAD_VALUE:
            v = fill_padding(v, inside & ~real, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
        if COSINE:
            q, _ = to_unit(q)
            k, _ = to_unit(k)

        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        crossed = seams_crossed(place, counts, REGIONS)
        s = add_masks(
            s,
            n,
            n,
            sides,
            None,
            crossed,
            mask_value,
            mask_ptr,
            number,
            REGIONS,
            HAS_MASK,
            WINDOW,
        )
        top = tl.max(s, 1)
        top = tl.where(top == float("-inf"), 0.0, top)  # a row whose keys are all at −inf
        e = exponential(s - top[:, None], LOG2)  # (BLOCK_N, BLOCK_N)
        total = tl.sum(e, 1)
        if DROPOUT_THRESHOLD > 0:
            kept = kept_tile(seed_ptr, window, head, n, n, WINDOW, DROPOUT_THRESHOLD)
            e = tl.where(kept, e, 0.0)
        out = tl.dot(e.to(v.dtype), v, input_precision=PRECISION)  # (BLOCK_N, BLOCK_DV)
        out *= (kept_factor / tl.where(total == 0.0, 1.0, total))[:, None]
        store_tokens(
            out_ptr, 0, image, head, x, rows, out_strides, out, VALUE_DIM, BLOCK_DV, ALIGNED
        )
        if KEEP_STATS:
            store_stats(stats_ptr, window, head, heads, n, top, total, N)


@triton.jit
def _tiled_fwd_kernel(
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
    out_ptr,
    stats_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
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
    KEEP_STATS: tl.constexpr,
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
    factor = scale
    if COSINE:
        q, _ = to_unit(q)
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)
    factor = logits_of(factor, LOG2)
    mask_value = logits_of(mask_value, LOG2)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=LOOP_STAGES):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < N
        places_j = token_places(j, WINDOW)
        x_j, real_j = token_positions(
            places_j, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        keys = real_j & inside
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
            k = fill_padding(k, inside & ~real_j, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
        if HAS_PAD_VALUE:
            v = fill_padding(v, inside & ~real_j, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
        if COSINE:
            k = to_unit(k)[0]

        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        s = add_bias(s, bias_ptr, head, i, j, HAS_BIAS, WINDOW, SPREAD)
        s = add_masks(
            s,
            i,
            j,
            None,
            sides_ptr,
            crossed,
            mask_value,
            mask_ptr,
            number,
            REGIONS,
            HAS_MASK,
            WINDOW,
        )
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = exponential(top - base, LOG2)
        e = exponential(s - base[:, None], LOG2)  # (BLOCK_M, BLOCK_N)
        total = total * shrink + tl.sum(e, 1)
        if DROPOUT_THRESHOLD > 0:
            kept = kept_tile(seed_ptr, window, head, i, j, WINDOW, DROPOUT_THRESHOLD)
            e = tl.where(kept, e, 0.0)
        out = out * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        top = higher

    out *= (kept_factor / tl.where(total == 0.0, 1.0, total))[:, None]
    store_tokens(out_ptr, 0, image, head, x_i, rows, out_strides, out, VALUE_DIM, BLOCK_DV, ALIGNED)
    if KEEP_STATS:
        store_stats(stats_ptr, window, head, heads, i, top, total, N)
