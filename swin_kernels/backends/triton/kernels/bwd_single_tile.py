"""Backward kernel for a window in one tile, without dropout: every gradient of docs/math.md.

The probabilities are computed again, with the tiles of bias and shift mask that the forward left.
With a whole row on chip Δ = rowsum(P∘dP), so that neither the output nor statistics of rows are
read. What is summed over windows (the gradients of the bias, of what padding holds, of logit_scale)
is summed on chip over a program's run of windows and written once, a row per program, to be summed
in a second pass: no atomics, and two runs give the same bits.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    add_masks,
    exponential,
    l2_normalize,
    l2_normalize_bwd,
    load_keys,
    load_tokens,
    logits_of,
    pad_keys,
    store_partial,
    store_tokens,
    sum_over,
    tile_pointers,
)
from swin_kernels.backends.triton.kernels.window import (
    locate,
    seam_sides,
    seams_crossed,
    token_places,
    window_place,
    window_place_by_image,
)


@triton.jit
def _single_tile_bwd_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    tiles_ptr,
    mask_ptr,
    pad_key_ptr,
    pad_value_ptr,
    logit_scale_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    bias_sums_ptr,
    pad_key_sums_ptr,
    pad_value_sums_ptr,
    logit_scale_sums_ptr,
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
    windows,
    windows_per_program,
    heads,
    tile_heads,
    scale,
    mask_value,
    META: tl.constexpr,
    SHARED_GRAD_STRIDES: tl.constexpr,
    HAS_TILES: tl.constexpr,
    TILES_PER_HEAD: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_PAD_KEY: tl.constexpr,
    NEEDS_PAD_VALUE: tl.constexpr,
    HOLDS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % heads
    first = program // heads * windows_per_program
    last = tl.minimum(first + windows_per_program, windows)
    if META.SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    if SHARED_GRAD_STRIDES:
        grad_query_strides = query_strides
        grad_value_strides = query_strides
    query, grad_out = (query_ptr, 0, query_strides), (grad_out_ptr, 0, grad_out_strides)
    key, value = (key_ptr, key_start, key_strides), (value_ptr, value_start, value_strides)
    pads = (pad_key_ptr, pad_value_ptr)
    grad_query = (grad_query_ptr, 0, grad_query_strides)
    grad_key = (grad_key_ptr, grad_key_start, grad_query_strides)
    grad_value = (grad_value_ptr, grad_value_start, grad_value_strides)

    N: tl.constexpr = META.TOKENS
    PRECISION: tl.constexpr = META.PRECISION
    n = tl.arange(0, BLOCK_N)
    places = token_places(n, META)
    sides = seam_sides(places, geometry.seams)
    factor = scale
    if META.COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    logit_factor = logits_of(factor, META.LOG2)
    mask_value = logits_of(mask_value, META.LOG2)

    # bias and shift mask: for each window, or until other seams cut one
    first_tile = head % tile_heads * TILES_PER_HEAD
    held = first_tile - 1
    added = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    if HAS_TILES and HOLDS_BIAS and TILES_PER_HEAD == 1:
        added = tl.load(tile_pointers(tiles_ptr, first_tile, BLOCK_N))
    bias_sum = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    pad_key_sum = tl.zeros((BLOCK_D,), tl.float32)
    pad_value_sum = tl.zeros((BLOCK_DV,), tl.float32)
    radial_sum = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        if HOLDS_BIAS:
            image, number, place = window_place_by_image(window, geometry, META)
        else:
            image, number, place = window_place(window, geometry, META)
        x, rows, padding = locate(n, places, place, geometry, META)
        at = (image, head, x, rows)
        tile = first_tile
        if TILES_PER_HEAD > 1:
            tile += seams_crossed(place, geometry, META)
            if HOLDS_BIAS:
                if tile != held:
                    added = tl.load(tile_pointers(tiles_ptr, tile, BLOCK_N))
                held = tile
        s = added
        if HAS_TILES and not HOLDS_BIAS:  # it is in the first cache
            s = tl.load(tile_pointers(tiles_ptr, tile, BLOCK_N), cache_modifier=".ca")
        q = load_tokens(query, at, META.HEAD_DIM, BLOCK_D, META)
        k, v = load_keys(key, value, at, BLOCK_D, BLOCK_DV, META)
        do = load_tokens(grad_out, at, META.VALUE_DIM, BLOCK_DV, META)
        k, v = pad_keys(k, v, pads, padding, head, BLOCK_D, BLOCK_DV, META)
        if META.COSINE:
            q, q_norm = l2_normalize(q)
            k, k_norm = l2_normalize(k)

        s = s + tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_factor
        if META.HAS_MASK:
            crossed = seams_crossed(place, geometry, META)
            s = add_masks(s, n, n, sides, None, crossed, mask_value, mask_ptr, number, META)
        row_max = tl.max(s, 1)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        e = exponential(s - row_max[:, None], META.LOG2)
        row_sum = tl.sum(e, 1)
        p = e * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]  # (BLOCK_N, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        # each gradient is stored before the next is computed: few registers are left
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        if NEEDS_PAD_VALUE:
            pad_value_sum += sum_over(padding, dv)
        store_tokens(grad_value, at, dv, META.VALUE_DIM, BLOCK_DV, META)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if NEEDS_BIAS:
            bias_sum += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
        if META.COSINE:
            dq, radial = l2_normalize_bwd(dq, factor, q, q_norm, query_ptr.dtype.element_ty)
            radial_sum += radial
        else:
            dq *= factor
        store_tokens(grad_query, at, dq, META.HEAD_DIM, BLOCK_D, META)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        if META.COSINE:
            dk = l2_normalize_bwd(dk, factor, k, k_norm, query_ptr.dtype.element_ty)[0]
        else:
            dk *= factor
        if NEEDS_PAD_KEY:
            pad_key_sum += sum_over(padding, dk)
        store_tokens(grad_key, at, dk, META.HEAD_DIM, BLOCK_D, META)

    # program is (run of windows, head), row-major
    if NEEDS_BIAS:
        start = bias_sums_ptr + program.to(tl.int64) * (N * N)
        within = (n < N)[:, None] & (n < N)[None, :]
        tl.store(start + n[:, None] * N + n[None, :], bias_sum, mask=within)
    if NEEDS_PAD_KEY:
        store_partial(pad_key_sums_ptr, program, pad_key_sum, META.HEAD_DIM, BLOCK_D)
    if NEEDS_PAD_VALUE:
        store_partial(pad_value_sums_ptr, program, pad_value_sum, META.VALUE_DIM, BLOCK_DV)
    if META.COSINE:
        tl.store(logit_scale_sums_ptr + program, tl.sum(radial_sum, 0))
