"""Forward kernels: softmax(scale·q·kᵀ + bias + mask)·v in windows of an unpartitioned map.

`_single_tile_fwd_kernel` holds a window in one tile. A program takes one head and a run of windows,
with the head's bias on chip for all of them. `_tiled_fwd_kernel` takes BLOCK_M queries of one
window and runs over its keys with a running softmax (Milakov & Gimelshein, "Online normalizer
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
    dropout_keep_mask,
    exponential,
    l2_normalize,
    load_keys,
    load_tokens,
    logits_of,
    pad_keys,
    shift_mask_tile,
    store_tokens,
    tile_pointers,
)
from swin_kernels.backends.triton.kernels.window import (
    decode_program_id,
    locate,
    seam_sides,
    seams_crossed,
    token_places,
    window_place,
)


@triton.jit
def store_stats(ptr, window, head, heads, i, row_max, row_sum, N: tl.constexpr):
    """Each row's largest logit and 1/Σexp(s − largest), 0 where no key is left.

    Apart, as their sum, the log-sum-exp, is rounded: a row that is masked whole has it near −100.
    """
    start = ptr + (window.to(tl.int64) * heads + head) * (2 * N)
    tl.store(start + i, tl.where(row_sum == 0.0, 0.0, row_max), mask=i < N)
    inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(start + N + i, tl.where(row_sum == 0.0, 0.0, inverse), mask=i < N)


@triton.jit
def _single_tile_fwd_kernel(
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
    geometry,
    windows,
    windows_per_program,
    heads,
    table_rows,
    tile_heads,
    scale,
    mask_value,
    kept_factor,
    META: tl.constexpr,
    BIAS: tl.constexpr,
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
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    query, out_side = (query_ptr, 0, query_strides), (out_ptr, 0, out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)

    n = tl.arange(0, BLOCK_N)
    places = token_places(n, META)
    sides = seam_sides(places, geometry.seams)
    mask_value = logits_of(mask_value, META.LOG2)
    bias = bias_tile(bias_ptr, index_ptr, head, heads, table_rows, n, n, places, places, BIAS, META)
    # (BLOCK_N, BLOCK_N)
    if KEEP_TILES:
        if (first == 0) & (head < tile_heads):
            for crossed in tl.static_range(TILES_PER_HEAD):
                tile = bias + shift_mask_tile(sides, sides, crossed, mask_value, META)
                number = head * TILES_PER_HEAD + crossed
                tl.store(tile_pointers(tiles_ptr, number, BLOCK_N), tile)
    factor = scale
    if META.COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)
    factor = logits_of(factor, META.LOG2)

    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        image, number, place = window_place(window, geometry, META)
        x, rows, padding = locate(n, places, place, geometry, META)
        at = (image, head, x, rows)
        q = load_tokens(query, at, META.HEAD_DIM, BLOCK_D, META)
        k, v = load_keys(key, value, at, BLOCK_D, BLOCK_DV, META)
        k, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
        if META.COSINE:
            q = l2_normalize(q)[0]
            k = l2_normalize(k)[0]

        s = tl.dot(q, tl.trans(k), input_precision=META.PRECISION) * factor + bias
        crossed = seams_crossed(place, geometry, META)
        s = add_masks(s, n, n, sides, None, crossed, mask_value, mask_ptr, number, META)
        row_max = tl.max(s, 1)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # no key is left
        e = exponential(s - row_max[:, None], META.LOG2)  # (BLOCK_N, BLOCK_N)
        row_sum = tl.sum(e, 1)
        if META.DROPOUT_THRESHOLD > 0:
            e = tl.where(dropout_keep_mask(seed_ptr, window, head, n, n, META), e, 0.0)
        out = tl.dot(e.to(v.dtype), v, input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_DV)
        out *= (kept_factor / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
        store_tokens(out_side, at, out, META.VALUE_DIM, BLOCK_DV, META)
        if KEEP_STATS:
            store_stats(stats_ptr, window, head, heads, n, row_max, row_sum, META.TOKENS)


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
    geometry,
    heads,
    windows,
    group_windows,
    scale,
    mask_value,
    kept_factor,
    META: tl.constexpr,
    KEEP_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    N: tl.constexpr = META.TOKENS
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    tile, head, window = decode_program_id(tl.program_id(0), heads, windows, group_windows, TILES)
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    query, out_side = (query_ptr, 0, query_strides), (out_ptr, 0, out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)
    image, number, place = window_place(window, geometry, META)
    crossed = seams_crossed(place, geometry, META)

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x_i, rows, _padding_i = locate(i, token_places(i, META), place, geometry, META)
    at_i = (image, head, x_i, rows)
    q = load_tokens(query, at_i, META.HEAD_DIM, BLOCK_D, META)
    factor = scale
    if META.COSINE:
        q = l2_normalize(q)[0]
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)
    factor = logits_of(factor, META.LOG2)
    mask_value = logits_of(mask_value, META.LOG2)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=LOOP_STAGES):
        j = start + tl.arange(0, BLOCK_N)
        x_j, keys, padding = locate(j, token_places(j, META), place, geometry, META)
        at_j = (image, head, x_j, keys)
        k, v = load_keys(key, value, at_j, BLOCK_D, BLOCK_DV, META)
        k, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
        if META.COSINE:
            k = l2_normalize(k)[0]

        s = tl.dot(q, tl.trans(k), input_precision=META.PRECISION) * factor
        s = add_bias(s, bias_ptr, head, i, j, META)
        s = add_masks(s, i, j, None, sides_ptr, crossed, mask_value, mask_ptr, number, META)
        higher = tl.maximum(row_max, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        alpha = exponential(row_max - base, META.LOG2)
        e = exponential(s - base[:, None], META.LOG2)  # (BLOCK_M, BLOCK_N)
        row_sum = row_sum * alpha + tl.sum(e, 1)
        if META.DROPOUT_THRESHOLD > 0:
            e = tl.where(dropout_keep_mask(seed_ptr, window, head, i, j, META), e, 0.0)
        out = out * alpha[:, None] + tl.dot(e.to(v.dtype), v, input_precision=META.PRECISION)
        row_max = higher

    out *= (kept_factor / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    store_tokens(out_side, at_i, out, META.VALUE_DIM, BLOCK_DV, META)
    if KEEP_STATS:
        store_stats(stats_ptr, window, head, heads, i, row_max, row_sum, N)
