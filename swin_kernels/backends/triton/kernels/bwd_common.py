"""The gradients of one tile of logits, from what the forward saved of their rows: device code.

What the backward kernels for windows of several tiles share.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    add_bias,
    add_masks,
    exponential,
    kept_tile,
    logits_of,
)


@triton.jit
def load_stats(ptr, row, i, N: tl.constexpr):
    """What the forward's `store_stats` left of rows i; zeros, and so no probability, beyond."""
    top = tl.load(ptr + 2 * row + i, mask=i < N, other=0.0)
    return top, tl.load(ptr + 2 * row + N + i, mask=i < N, other=0.0)


@triton.jit
def tile_gradients(
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
    WINDOW: tl.constexpr,
    REGIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT_THRESHOLD: tl.constexpr,
    LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) each: P after dropout, dS = P∘(dP − Δ), P, and the products q·k."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = products * logits_of(factor, LOG2)
    s = add_bias(s, bias_ptr, head, i, j, HAS_BIAS, WINDOW, SPREAD)
    s = add_masks(
        s,
        i,
        j,
        None,
        sides_ptr,
        crossed,
        logits_of(mask_value, LOG2),
        mask_ptr,
        number,
        REGIONS,
        HAS_MASK,
        WINDOW,
    )
    N: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    p = exponential(s - top[:, None], LOG2) * share[:, None]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    weights = p
    if DROPOUT_THRESHOLD > 0:
        kept = kept_tile(seed_ptr, window, head, i, j, WINDOW, DROPOUT_THRESHOLD)
        weights = tl.where(kept, p * kept_factor, 0.0)
        dp = tl.where(kept, dp * kept_factor, 0.0)
    ds = p * (dp - delta[:, None])
    if N == 1:  # the one probability is 1; dP and Δ are equal but for the order of their sums
        ds = tl.zeros_like(p)
    return weights, ds, p, products
