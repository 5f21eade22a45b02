"""kernels/bwd_common.py: P, dS and the products of one tile, from saved statistics of its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_probes import tile_gradients_kernel

from swin_kernels.backends.triton.kernel_args import Meta

pytestmark = pytest.mark.interpreted

SCALE, ROW = 0.3, 2  # ROW: what lies before the statistics, in tokens


def exact(tokens: int) -> tuple[list[Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v and dO of a window, its statistics, Δ, and in float64 what is expected."""
    generator = torch.Generator().manual_seed(tokens)
    tensors = [torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(4)]
    q, k, v, do = (x[:tokens] for x in tensors)
    products = q @ k.T
    s = (products * SCALE).requires_grad_()
    p = s.softmax(1)
    (ds,) = torch.autograd.grad(p, s, do @ v.T)
    row_max = s.amax(1)
    stats = torch.cat([row_max, 1 / (s - row_max[:, None]).exp().sum(1)]).detach()
    delta = torch.zeros(16, dtype=torch.float64)
    delta[:tokens] = (do * (p @ v)).sum(1).detach()
    e = (s - row_max[:, None]).exp().detach()
    expected = {"weights": p.detach(), "ds": ds, "e": e, "products": products}
    return tensors, stats, delta, expected


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("log2", [False, True], ids=["e", "2"])
@pytest.mark.parametrize("tokens", [16, 13, 1])
def test_tile_gradients_are_those_of_softmax(tokens, log2, transposed):
    tensors, stats, delta, expected = exact(tokens)
    if log2:  # the forward keeps logits in these units, and its statistics with them
        stats[:tokens] /= torch.log(torch.tensor(2.0))
    meta = Meta(*(None,) * len(Meta._fields))._replace(
        TOKENS=tokens,
        EXPANDED=16,
        REGIONS=(False,) * 3,
        HAS_BIAS=False,
        HAS_MASK=False,
        DROPOUT_THRESHOLD=0,
        LOG2=log2,
        PRECISION="ieee",
        TRANSPOSED=transposed,
    )
    before = torch.full((2 * ROW,), float("nan"))  # of other rows
    saved = torch.cat([before, stats.float()])
    out = torch.empty(4, 16, 16)
    tile_gradients_kernel[(1,)](
        *(x.float() for x in tensors), saved, delta.float(), out, SCALE, ROW, META=meta
    )
    for (name, of_window), found in zip(expected.items(), out):
        torch.testing.assert_close(
            found[:tokens, :tokens],
            of_window.float(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    weights, ds, e, _ = out
    for x in (weights, ds):  # no probability beyond the window: nothing is added to its sums
        assert not x[tokens:].any()
        assert not x[:, tokens:].any()
    assert not e[:, tokens:].any()
    if tokens == 1:
        assert not ds.any()
