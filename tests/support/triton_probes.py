"""Two kernels that the tests of the guard break."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, count, step):
    """y[i] = x[step·i] for i < count, at most 16."""
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i * step, mask=i < count)
    tl.store(y_ptr + i, x, mask=i < count)


@triton.jit
def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 8), 1.0)
