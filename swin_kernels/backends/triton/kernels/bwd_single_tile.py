"""Backward kernel for a window in one tile: every gradient of docs/math.md in one pass.

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
    fill_padding,
    kept_tile,
    load_tokens,
    logits_of,
    store_partial,
    store_tokens,
    sum_over,
    through_unit,
    tile_pointers,
    to_unit,
)
from swin_kernels.backends.triton.kernels.window import (
    seam_sides,
    seams_crossed,
    token_places,
    token_positions,
    window_place,
)


@triton.jit
def _whole_window_bwd_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    tiles_ptr,
    mask_ptr,
    pad_key_ptr,
    pad_value_ptr,
    logit_scale_ptr,
    seed_ptr,
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
    SHARED_GRAD_STRIDES: tl.constexpr,
    HAS_TILES: tl.constexpr,
    TILES_PER_HEAD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAD_KEY: tl.constexpr,
    HAS_PAD_VALUE: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT_THRESHOLD: tl.constexpr,
    LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_PAD_KEY: tl.constexpr,
    NEEDS_PAD_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % heads
    first = program // heads * windows_per_program
    last = tl.minimum(first + windows_per_program, windows)
    if SHARED_STRIDES:
        key_strides = query_strides
        value_strides = query_strides
    if SHARED_GRAD_STRIDES:
        grad_query_strides = query_strides
        grad_value_strides = query_strides

    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    places = token_places(n, WINDOW)
    sides = seam_sides(places, seams)
    factor = scale
    if COSINE:
        factor = tl.load(logit_scale_ptr + head).to(tl.float32)

    logit_factor = logits_of(factor, LOG2)
    mask_value = logits_of(mask_value, LOG2)

    bias_sum = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    pad_key_sum = tl.zeros((BLOCK_D,), tl.float32)
    pad_value_sum = tl.zeros((BLOCK_DV,), tl.float32)
    radial_sum = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, last - first, num_stages=LOOP_STAGES):
        window = first + step
        image, number, place = window_place(window, counts, factors, shifts, PLANES)
        x, real = token_positions(
            places, place, sizes, periods, rolls, WINDOW, ROLLED, PADDED, PLANES, WIDE
        )
        rows = real & inside
        padding = inside & ~real
        # bias and shift mask are read again for each window: that hits L1, and leaves registers
        s = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        if HAS_TILES:
            tile = head % tile_heads * TILES_PER_HEAD
            if TILES_PER_HEAD > 1:
                tile += seams_crossed(place, counts, REGIONS)
            s = tl.load(tile_pointers(tiles_ptr, tile, BLOCK_N), cache_modifier=".ca")
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
        do = load_tokens(
            grad_out_ptr, 0, image, head, x, rows, grad_out_strides, VALUE_DIM, BLOCK_DV, ALIGNED
        )
        if HAS_PAD_KEY:
            k = fill_padding(k, padding, pad_key_ptr, head, HEAD_DIM, BLOCK_D)
        if HAS_PAD_VALUE:
            v = fill_padding(v, padding, pad_value_ptr, head, VALUE_DIM, BLOCK_DV)
        if COSINE:
            q, q_norm = to_unit(q)
            k, k_norm = to_unit(k)

        s = s + tl.dot(q, tl.trans(k), input_precision=PRECISION) * logit_factor
        if HAS_MASK:
            s = add_masks(
                s,
                n,
                n,
                sides,
                None,
                seams_crossed(place, counts, REGIONS),
                mask_value,
                mask_ptr,
                number,
                REGIONS,
                HAS_MASK,
                WINDOW,
            )
        top = tl.max(s, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        e = exponential(s - top[:, None], LOG2)
        total = tl.sum(e, 1)
        p = e * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # (BLOCK_N, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        weights = p
        if DROPOUT_THRESHOLD > 0:
            kept = kept_tile(seed_ptr, window, head, n, n, WINDOW, DROPOUT_THRESHOLD)
            weights = tl.where(kept, p * kept_factor, 0.0)
            dp = tl.where(kept, dp * kept_factor, 0.0)
        # each gradient is stored before the next is computed: few registers are left
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
        if NEEDS_PAD_VALUE:
            pad_value_sum += sum_over(padding, dv)
        store_tokens(
            grad_value_ptr,
            grad_value_start,
            image,
            head,
            x,
            rows,
            grad_value_strides,
            dv,
            VALUE_DIM,
            BLOCK_DV,
            ALIGNED,
        )
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if NEEDS_BIAS:
            bias_sum += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
        if COSINE:
            dq, radial = through_unit(dq, factor, q, q_norm, query_ptr.dtype.element_ty)
            radial_sum += radial
        else:
            dq *= factor
        store_tokens(
            grad_query_ptr,
            0,
            image,
            head,
            x,
            rows,
            grad_query_strides,
            dq,
            HEAD_DIM,
            BLOCK_D,
            ALIGNED,
        )
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        if COSINE:
            dk, _ = through_unit(dk, factor, k, k_norm, query_ptr.dtype.element_ty)
        else:
            dk *= factor
        if NEEDS_PAD_KEY:
            pad_key_sum += sum_over(padding, dk)
        store_tokens(
            grad_key_ptr,
            grad_key_start,
            image,
            head,
            x,
            rows,
            grad_query_strides,
            dk,
            HEAD_DIM,
            BLOCK_D,
            ALIGNED,
        )

    # program is (run of windows, head), row-major
    if NEEDS_BIAS:
        start = bias_sums_ptr + program.to(tl.int64) * (N * N)
        within = inside[:, None] & inside[None, :]
        tl.store(start + n[:, None] * N + n[None, :], bias_sum, mask=within)
    if NEEDS_PAD_KEY:
        store_partial(pad_key_sums_ptr, program, pad_key_sum, HEAD_DIM, BLOCK_D)
    if NEEDS_PAD_VALUE:
        store_partial(pad_value_sums_ptr, program, pad_value_sum, VALUE_DIM, BLOCK_DV)
    if COSINE:
        tl.store(logit_scale_sums_ptr + program, tl.sum(radial_sum, 0))
