"""Tiles of tokens and of logits, as device code: what the forward and backward kernels share.

Logits are in units of log2 for exp2 where tokens have half precision (LOG2) and no explicit mask is
added; else only their differences are: at −100 logits of fp32 tokens would be rounded more than
those allow, and a mask would cost more than it spares. Strides are tuples of (image, axis 0,
axis 1, axis 2, head, channel), in elements.
"""

import triton
import triton.language as tl

from swin_kernels.backends.reference.forward import NORM_CLAMP as _NORM_CLAMP
from swin_kernels.backends.triton.kernels.window import geometric_row

LOG2_E = tl.constexpr(1.4426950408889634)
# as in launch_spec: in log2 the sum of a bias and of a shift mask as large is still finite
LARGEST_LOGIT = tl.constexpr(1.1e38)
NORM_CLAMP = tl.constexpr(_NORM_CLAMP)

# the kinds of BIAS
NO_BIAS = tl.constexpr(0)
DENSE_BIAS = tl.constexpr(1)  # (H, N, N)
TABLE_BIAS = tl.constexpr(2)  # (T, H), by the geometric index
INDEXED_BIAS = tl.constexpr(3)  # (T, H), by an index (N, N)


@triton.jit
def logits_of(x, LOG2: tl.constexpr):
    """What is added to logits, or multiplies products to them, in their units."""
    return x * LOG2_E if LOG2 else x


@triton.jit
def bias_logits(bias, LOG2: tl.constexpr):
    """A bias in the units of logits; what is finite stays so, up to the lowest fp32 number."""
    if LOG2:
        size = tl.abs(bias)
        beyond = (size > LARGEST_LOGIT) & (size < float("inf"))
        bias = tl.where(beyond, tl.where(bias < 0, -LARGEST_LOGIT, LARGEST_LOGIT), bias)
    return logits_of(bias, LOG2)


@triton.jit
def exponential(difference, LOG2: tl.constexpr):
    """exp of differences of logits."""
    return tl.exp2(difference if LOG2 else difference * LOG2_E)


@triton.jit
def _pointers(side, at, d, META: tl.constexpr):
    ptr, first, strides = side
    image, head, positions, _ = at
    # 64 bits to find one head of one image, as a batch may hold more than 2^31 elements
    start = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4] + first
    rows = positions[0] * strides[1] + positions[1] * strides[2] + positions[2] * strides[3]
    # Triton sees by itself that 16 divides a stride, but not that 2, 4 or 8 do
    ALIGNED: tl.constexpr = META.ALIGNED
    start, rows = tl.multiple_of(start, ALIGNED), tl.multiple_of(rows, ALIGNED)
    columns = d.to(positions[0].dtype) * strides[5]  # 64 bits where positions have them
    return ptr + start + (rows[:, None] + columns[None, :])


@triton.jit
def _within(rows, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    mask = rows[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (d < DIM)[None, :]
    return mask


@triton.jit
def load_tokens(side, at, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, META: tl.constexpr):
    """(BLOCK, BLOCK_DIM): tokens of one head of one image; zeros outside its rows and beyond DIM.

    `side` is a pointer, where the tokens begin behind it, and strides; `at` is image, head,
    positions on the map, and the rows that lie there.
    """
    d = tl.arange(0, BLOCK_DIM)
    mask = _within(at[3], d, DIM, BLOCK_DIM)
    return tl.load(_pointers(side, at, d, META), mask=mask, other=0.0)


@triton.jit
def store_tokens(side, at, x, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, META: tl.constexpr):
    """Writes x (BLOCK, BLOCK_DIM) where `load_tokens` would read it."""
    d = tl.arange(0, BLOCK_DIM)
    mask = _within(at[3], d, DIM, BLOCK_DIM)
    tl.store(_pointers(side, at, d, META), x.to(side[0].dtype.element_ty), mask=mask)


@triton.jit
def load_keys(key, value, at, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, META: tl.constexpr):
    """Keys (BLOCK, BLOCK_D) and values (BLOCK, BLOCK_DV)."""
    k = load_tokens(key, at, META.HEAD_DIM, BLOCK_D, META)
    return k, load_tokens(value, at, META.VALUE_DIM, BLOCK_DV, META)


@triton.jit
def pad_keys(
    k, v, pads, padding, head, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, META: tl.constexpr
):
    """Keys and values with what padding holds; apart, as loads that wait go before."""
    if META.HAS_PAD_KEY:
        k = fill_padding(k, padding, pads[0], head, META.HEAD_DIM, BLOCK_D)
    if META.HAS_PAD_VALUE:
        v = fill_padding(v, padding, pads[1], head, META.VALUE_DIM, BLOCK_DV)
    return k, v


@triton.jit
def fill_padding(x, padding, pad_ptr, head, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """x with row `head` of (H, DIM) where padding added a token, rounded as a token is."""
    d = tl.arange(0, BLOCK_DIM)
    filler = tl.load(pad_ptr + head * DIM + d, mask=d < DIM, other=0.0)
    return tl.where(padding[:, None], filler.to(x.dtype)[None, :], x)


@triton.jit
def sum_over(rows, x):
    """(BLOCK_DIM,): the sum of the `rows` of x."""
    return tl.sum(tl.where(rows[:, None], x, 0.0), 0)


@triton.jit
def store_partial(ptr, row, x, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """One row of a buffer (rows, DIM) of sums."""
    d = tl.arange(0, BLOCK_DIM)
    tl.store(ptr + row.to(tl.int64) * DIM + d, x, mask=d < DIM)


@triton.jit
def l2_normalize(x):
    """x/max(‖x‖, ε) in the dtype of x, and the clamped norm: (BLOCK, BLOCK_DIM) and (BLOCK,)."""
    wide = x.to(tl.float32)
    square = tl.sum(wide * wide, 1)
    if x.dtype == tl.float32:
        norm = tl.maximum(tl.sqrt_rn(square), NORM_CLAMP)
        unit = wide / norm[:, None]
    else:  # by an approximate reciprocal for each row: its error is far below what is rounded then
        inverse = tl.rsqrt(tl.maximum(square, NORM_CLAMP * NORM_CLAMP))
        # beyond 1.8e19, of bf16, a square is infinite: as its norm then is, and no gradient left
        norm = tl.where(inverse == 0.0, float("inf"), tl.maximum(square * inverse, NORM_CLAMP))
        unit = (wide * inverse[:, None]).to(x.dtype)
    return unit, norm


@triton.jit
def l2_normalize_bwd(grad, factor, unit, norm, dtype: tl.constexpr):
    """The gradient behind `l2_normalize` of one still to be scaled by `factor`; rowsum(x̂∘dx̂).

    dx = (dx̂ − x̂·(x̂·dx̂))/‖x‖, and dx̂/ε where the clamp holds. fp16 cannot hold that: it saturates.
    """
    unit = unit.to(tl.float32)
    radial = tl.sum(unit * grad, 1)
    clamped = norm <= NORM_CLAMP
    grad = (grad - unit * tl.where(clamped, 0.0, radial)[:, None]) * (factor / norm)[:, None]
    if dtype == tl.float16:
        held = tl.minimum(tl.maximum(grad, -65504.0), 65504.0)
        grad = tl.where(clamped[:, None], held, grad)
    return grad, radial


@triton.jit
def bias_tile(
    bias_ptr,
    index_ptr,
    head,
    heads,
    table_rows,
    i,
    j,
    places_i,
    places_j,
    BIAS: tl.constexpr,
    META: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) to add to the logits of one head: −inf for keys beyond the window."""
    N: tl.constexpr = META.TOKENS
    inside = (i < N)[:, None] & (j < N)[None, :]
    dense = i[:, None] * N + j[None, :]
    bias = tl.zeros(inside.shape, tl.float32)
    if BIAS == DENSE_BIAS:
        start = bias_ptr + head.to(tl.int64) * (N * N)
        bias = tl.load(start + dense, mask=inside, other=0.0).to(tl.float32)
    if BIAS == TABLE_BIAS:
        queries = places_i[0][:, None], places_i[1][:, None], places_i[2][:, None]
        keys = places_j[0][None, :], places_j[1][None, :], places_j[2][None, :]
        row = geometric_row(queries, keys, META)
        bias = tl.load(bias_ptr + row * heads + head, mask=inside, other=0.0).to(tl.float32)
    if BIAS == INDEXED_BIAS:
        row = tl.load(index_ptr + dense, mask=inside, other=0)
        known = (row >= 0) & (row < table_rows)
        row = tl.where(known, row, 0).to(tl.int32)
        value = tl.load(bias_ptr + row * heads + head, mask=inside & known, other=0.0)
        # only the device sees an index that the table lacks: let the user see it too
        bias = tl.where(inside & ~known, float("nan"), value.to(tl.float32))
    return tl.where((j < N)[None, :], bias_logits(bias, META.LOG2), float("-inf"))


@triton.jit
def along_queries(x, META: tl.constexpr):
    """What belongs to the queries of a tile of logits, to be broadcast along its keys."""
    return x[None, :] if META.TRANSPOSED else x[:, None]


@triton.jit
def along_keys(x, META: tl.constexpr):
    """What belongs to the keys of a tile of logits, to be broadcast along its queries."""
    return x[:, None] if META.TRANSPOSED else x[None, :]


@triton.jit
def load_bias(expanded_ptr, head, i, j, META: tl.constexpr):
    """A tile of a bias (H, EXPANDED, EXPANDED) that was expanded before; −inf beyond the window.

    Its rows are those of the tile: keys, if TRANSPOSED. It goes through the first cache, where the
    programs beside this one find it too.
    """
    start = expanded_ptr + head.to(tl.int64) * (META.EXPANDED * META.EXPANDED)
    rows, columns = (j, i) if META.TRANSPOSED else (i, j)
    pairs = rows[:, None] * META.EXPANDED + columns[None, :]
    return tl.load(start + pairs, cache_modifier=".ca")


@triton.jit
def add_bias(s, expanded_ptr, head, i, j, META: tl.constexpr):
    """Logits plus a tile of bias, if there is one; −inf beyond the window."""
    if META.HAS_BIAS:
        s += load_bias(expanded_ptr, head, i, j, META)
    elif META.TOKENS != META.EXPANDED:
        s = tl.where(along_keys(j < META.TOKENS, META), s, float("-inf"))
    return s


@triton.jit
def tile_pointers(ptr, tile, BLOCK_N: tl.constexpr):
    """Where tile number `tile` of (…, BLOCK_N, BLOCK_N) lies."""
    n = tl.arange(0, BLOCK_N)
    start = ptr + tile.to(tl.int64) * (BLOCK_N * BLOCK_N)
    return start + n[:, None] * BLOCK_N + n[None, :]


@triton.jit
def mask_tile(mask_ptr, number, i, j, META: tl.constexpr):
    """A tile of an explicit mask (nW, N, N); zeros outside the window."""
    N: tl.constexpr = META.TOKENS
    inside = along_queries(i < N, META) & along_keys(j < N, META)
    start = mask_ptr + number.to(tl.int64) * (N * N)
    pairs = along_queries(i, META) * N + along_keys(j, META)
    return tl.load(start + pairs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def shift_mask_tile(sides_i, sides_j, crossed, mask_value, META: tl.constexpr):
    """A tile of the shift mask, where the seams of `crossed` cut."""
    apart = (along_queries(sides_i, META) ^ along_keys(sides_j, META)) & crossed
    return tl.where(apart != 0, mask_value, 0.0)


@triton.jit
def add_masks(s, i, j, sides, sides_ptr, crossed, mask_value, mask_ptr, number, META: tl.constexpr):
    """Logits plus the shift mask, computed only where a window holds two regions, and `mask`.

    The sides of seams on which tokens lie: `sides`, of i and of j as well, or read at `sides_ptr`.
    What is masked by −100 twice is summed first: a row that is masked whole is rounded there.
    """
    if META.HAS_MASK:
        mask = mask_tile(mask_ptr, number, i, j, META)
        if META.REGIONS[0] or META.REGIONS[1] or META.REGIONS[2]:
            if crossed != 0:
                sides_i, sides_j = _sides_of(i, j, sides, sides_ptr)
                mask += shift_mask_tile(sides_i, sides_j, crossed, mask_value, META)
        s += mask
    elif META.REGIONS[0] or META.REGIONS[1] or META.REGIONS[2]:
        if crossed != 0:
            sides_i, sides_j = _sides_of(i, j, sides, sides_ptr)
            s += shift_mask_tile(sides_i, sides_j, crossed, mask_value, META)
    return s


@triton.jit
def _sides_of(i, j, sides, sides_ptr):
    sides_i, sides_j = sides, sides
    if sides_ptr is not None:  # it spares windows that a seam cuts the divisions
        sides_i, sides_j = tl.load(sides_ptr + i), tl.load(sides_ptr + j)
    return sides_i, sides_j


@triton.jit
def dropout_keep_mask(seed_ptr, window, head, i, j, META: tl.constexpr):
    """Which probabilities dropout keeps: Philox4x32-10, one word each (docs/contract.md)."""
    pair = (along_queries(i, META) * META.TOKENS + along_keys(j, META)).to(tl.uint32)
    zero = pair & 0
    word, _, _, _ = tl.philox(
        tl.load(seed_ptr), pair, zero + head.to(tl.uint32), zero + window.to(tl.uint32), zero
    )
    THRESHOLD: tl.constexpr = META.DROPOUT_THRESHOLD
    return word >= tl.full((), THRESHOLD, tl.uint32)
