"""kernels/common.py: unit vectors of rows, and the gradient behind them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_probes import normalize_kernel

from swin_kernels.backends.reference.forward import NORM_CLAMP

pytestmark = pytest.mark.interpreted

# of rows: nothing, below the clamp, of fp16's size, whose squares fp32 holds, and whose it does not
SIZES = {
    torch.float16: (0.0, 1.0, 1e4),
    torch.bfloat16: (0.0, 1e-20, 1.0, 1e18, 1e19, 3e38),
    torch.float32: (0.0, 1e-20, 1.0, 1e18),
}


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_rows_of_any_size_are_normalised_and_differentiated(dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor(SIZES[dtype], dtype=torch.float64)
    rows = torch.rand(len(sizes), 16, generator=generator, dtype=torch.float64) / 2 + 0.5
    x = torch.zeros(16, 16, dtype=dtype)
    x[: len(sizes)] = (rows * sizes[:, None]).to(dtype)
    grad = torch.randn(16, 16, generator=generator)
    norm, out = torch.empty(16), torch.empty(2, 16, 16)
    normalize_kernel[(1,)](x, grad, norm, out)

    exact = x.double()
    length = exact.norm(dim=1, keepdim=True)
    expected = length.clamp(min=NORM_CLAMP)
    expected[length > 1.8e19] = torch.inf  # their squares are beyond fp32
    unit = exact / expected
    # a gradient of the clamped is that of a division by the clamp
    through = torch.where(length > NORM_CLAMP, (unit * grad).sum(1, keepdim=True), 0.0)
    behind = (grad - unit * through) / expected
    if dtype == torch.float16:  # the clamped saturate
        behind = torch.where(length > NORM_CLAMP, behind, behind.clamp(-65504, 65504))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.double(), expected[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(out[0].double(), unit, rtol=eps, atol=eps)
    scale = (grad.abs().amax(1, keepdim=True) / expected).clamp(min=1e-30)
    torch.testing.assert_close((out[1] / scale).double(), behind / scale, rtol=0, atol=8 * eps)
