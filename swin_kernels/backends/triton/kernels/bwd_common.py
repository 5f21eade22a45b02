"""The gradients of one tile of logits, from what the forward saved of their rows: device code.

What the backward kernels for windows of several tiles share.
"""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.common import (
    add_bias,
    add_masks,
    along_queries,
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
def _units(ptr, row, i, BLOCK_D: tl.constexpr, META: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (i < META.TOKENS)[:, None] & (d < META.HEAD_DIM)[None, :]
    return ptr + row * META.HEAD_DIM + (i[:, None] * META.HEAD_DIM + d[None, :]), inside


@triton.jit
def load_units(ptr, row, i, BLOCK_D: tl.constexpr, META: tl.constexpr):
    """(BLOCK, BLOCK_D): what `store_units` left of tokens i of the window that begins at `row`."""
    pointers, inside = _units(ptr, row, i, BLOCK_D, META)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_units(ptr, row, i, x, BLOCK_D: tl.constexpr, META: tl.constexpr):
    """Leaves normalised queries or keys to the passes behind, window by window."""
    pointers, inside = _units(ptr, row, i, BLOCK_D, META)
    tl.store(pointers, x, mask=inside)


@triton.jit
def tile_gradients(
    q, k, v, do, stats, delta, window, head, i, j, bias, added, scalars, META: tl.constexpr
):
    """(BLOCK_M, BLOCK_N) each: P after dropout, dS = P∘(dP − Δ), P over `inverse_sum`, and q·k.

    (BLOCK_N, BLOCK_M) if TRANSPOSED, so that products that sum over queries find P and dS in
    registers. `stats` is what `load_stats` gives, `window` a number in the batch, in its image, and
    the seams that cut it, `bias` what `load_bias` gives, or None if that is to be loaded, `added`
    pointers to bias, mask, seed and sides, `scalars` the factor of products, the value of the shift
    mask and the factor of what dropout keeps.
    """
    row_max, inverse_sum = stats
    number, in_image, crossed = window
    bias_ptr, mask_ptr, seed_ptr, sides_ptr = added
    factor, mask_value, kept_factor = scalars
    if META.TRANSPOSED:
        products = tl.dot(k, tl.trans(q), input_precision=META.PRECISION)
    else:
        products = tl.dot(q, tl.trans(k), input_precision=META.PRECISION)
    s = products * logits_of(factor, META.LOG2)
    if bias is None:
        s = add_bias(s, bias_ptr, head, i, j, META)
    else:
        s += bias
    mask_value = logits_of(mask_value, META.LOG2)
    s = add_masks(s, i, j, None, sides_ptr, crossed, mask_value, mask_ptr, in_image, META)
    e = exponential(s - along_queries(row_max, META), META.LOG2)
    if META.TRANSPOSED:
        dp = tl.dot(v, tl.trans(do), input_precision=META.PRECISION)
    else:
        dp = tl.dot(do, tl.trans(v), input_precision=META.PRECISION)
    p = e * along_queries(inverse_sum, META)
    weights = p
    if META.DROPOUT_THRESHOLD > 0:
        kept = dropout_keep_mask(seed_ptr, number, head, i, j, META)
        weights = tl.where(kept, p * kept_factor, 0.0)
        dp = tl.where(kept, dp * kept_factor, 0.0)
    if META.TRANSPOSED:
        ds = p * (dp - along_queries(delta, META))
    else:  # where P itself is not asked for, an instruction less
        ds = e * (dp * inverse_sum[:, None] - (delta * inverse_sum)[:, None])
    if META.TOKENS == 1:  # the one probability is 1; dP and Δ are equal but for the order of sums
        ds = tl.zeros_like(e)
    return weights, ds, e, products
