"""Kernels for tests: two that the guard must stop, and two around device code of the backward."""

import triton
import triton.language as tl

from swin_kernels.backends.triton.kernels.bwd_common import load_stats, tile_gradients
from swin_kernels.backends.triton.kernels.common import l2_normalize, l2_normalize_bwd


@triton.jit
def copy_kernel(x_ptr, y_ptr, count, step):
    """y[i] = x[step·i] for i < count, at most 16."""
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i * step, mask=i < count)
    tl.store(y_ptr + i, x, mask=i < count)


@triton.jit
def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 8), 1.0)


@triton.jit
def tile_gradients_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, delta_ptr, out_ptr, scale, row, META: tl.constexpr
):
    """Writes what `tile_gradients` gives of a tile of 16 × 16, four times that, one by one.

    A row of each is a query, also of what is TRANSPOSED.
    """
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    q = tl.load(q_ptr + at)
    k = tl.load(k_ptr + at)
    v = tl.load(v_ptr + at)
    do = tl.load(do_ptr + at)
    stats = load_stats(stats_ptr, row, i, META.TOKENS)
    delta = tl.load(delta_ptr + i)
    window, head = (row, row, 0), tl.program_id(0)
    added, scalars = (None, None, None, None), (scale, 0.0, 1.0)
    weights, ds, e, products = tile_gradients(
        q, k, v, do, stats, delta, window, head, i, i, None, added, scalars, META
    )
    if META.TRANSPOSED:
        at = i[:, None] + i[None, :] * 16
    tl.store(out_ptr + at, weights)
    tl.store(out_ptr + 256 + at, ds)
    tl.store(out_ptr + 512 + at, e)
    tl.store(out_ptr + 768 + at, products)


@triton.jit
def normalize_kernel(x_ptr, grad_ptr, norm_ptr, out_ptr):
    """Of 16 rows of 16 channels: norms, unit vectors, and the gradient behind them."""
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    unit, norm = l2_normalize(tl.load(x_ptr + at))
    grad, _ = l2_normalize_bwd(tl.load(grad_ptr + at), 1.0, unit, norm, x_ptr.dtype.element_ty)
    tl.store(norm_ptr + i, norm)
    tl.store(out_ptr + at, unit.to(tl.float32))
    tl.store(out_ptr + 256 + at, grad)
