"""The gradients of one tile of logits, from what the forward saved of their rows: device code.

What the backward kernels for windows of several tiles share.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    add_bias,
    add_masks,
    dropout_keep_mask,
    exponential,
    logits_of,
)


@triton.jit
def load_stats(ptr, row, i, N: tl.constexpr):
    """What the forward's `store_stats` left of rows i; zeros, and so no probability, beyond."""
    row_max = tl.load(ptr + 2 * row + i, mask=i < N, other=0.0)
    return row_max, tl.load(ptr + 2 * row + N + i, mask=i < N, other=0.0)


@triton.jit
def tile_gradients(
    q, k, v, do, stats, delta, window, head, i, j, added, scalars, META: tl.constexpr
):
    """(BLOCK_M, BLOCK_N) each: P after dropout, dS = P∘(dP − Δ), P, and the products q·k.

    `stats` is what `load_stats` gives, `window` a number in the batch, in its image, and the seams
    that cut it, `added` pointers to bias, mask, seed and sides, `scalars` the factor of products,
    the value of the shift mask and the factor of what dropout keeps.
    """
    row_max, inverse_sum = stats
    number, in_image, crossed = window
    bias_ptr, mask_ptr, seed_ptr, sides_ptr = added
    factor, mask_value, kept_factor = scalars
    products = tl.dot(q, tl.trans(k), input_precision=META.PRECISION)
    s = products * logits_of(factor, META.LOG2)
    s = add_bias(s, bias_ptr, head, i, j, META)
    mask_value = logits_of(mask_value, META.LOG2)
    s = add_masks(s, i, j, None, sides_ptr, crossed, mask_value, mask_ptr, in_image, META)
    p = exponential(s - row_max[:, None], META.LOG2) * inverse_sum[:, None]
    dp = tl.dot(do, tl.trans(v), input_precision=META.PRECISION)
    weights = p
    if META.DROPOUT_THRESHOLD > 0:
        kept = dropout_keep_mask(seed_ptr, number, head, i, j, META)
        weights = tl.where(kept, p * kept_factor, 0.0)
        dp = tl.where(kept, dp * kept_factor, 0.0)
    ds = p * (dp - delta[:, None])
    if META.TOKENS == 1:  # the one probability is 1; dP and Δ are equal but for the order of sums
        ds = tl.zeros_like(p)
    return weights, ds, p, products
