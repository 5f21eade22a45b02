"""Whole models on a GPU: patched, under autocast, compiled, and with an edited mask."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="whole models are timm's")

from gpu_dry_run import REHEARSED, gpu_only, sized
from patch_models import KINDS, Outcome, assert_outcomes_no_worse, double, small_model

import swin_kernels
from benchmarks.models import PEER_FACTOR, check_errors
from benchmarks.models import Outcome as Logits
from swin_kernels.backends.triton.backend import INTERPRETED

pytestmark = gpu_only


def model_of(kind: str, device) -> torch.nn.Module:
    with torch.device("cpu"):  # its numbers are drawn there
        size = {"embed_dim": 16, "window_size": 3, "num_heads": (1, 2)} if REHEARSED else {}
        return small_model(kind, sized(56, 24), **size).to(device.device)


def images_of(device, dtype: torch.dtype, count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, 3, *(sized(56, 24),) * 2)
    return [
        torch.randn(shape, generator=generator, device="cpu").to(device.device, dtype)
        for _ in range(sized(count, 4))
    ]


def train(model: torch.nn.Module, x: torch.Tensor) -> Outcome:
    """Output, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    out = model(x)
    generator = torch.Generator("cpu").manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device="cpu").to(out.device, out.dtype)
    out.backward(grad)
    return Outcome(out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_is_no_worse_than_stock(kind, dtype, device, exact_products):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter of Triton multiplies bfloat16 wrongly")
    model, images = model_of(kind, device).to(dtype), images_of(device, dtype)
    best = double(model)
    exact = [train(best, x.double()) for x in images]
    stock = [train(model, x) for x in images]
    assert swin_kernels.patch(model, backend=device.backend).left == {}
    patched = [train(model, x) for x in images]
    assert_outcomes_no_worse(patched, stock, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_under_autocast_is_no_worse_than_stock(kind, device, exact_products):
    model, images = model_of(kind, device), images_of(device, torch.float32)
    best = double(model)
    exact = [train(best, x.double()) for x in images]
    with torch.autocast(device.device.type, device.dtype):
        stock = [train(model, x) for x in images]
        swin_kernels.patch(model, backend=device.backend)
        patched = [train(model, x) for x in images]
    assert patched[0].out.dtype == device.dtype
    assert_outcomes_no_worse(patched, stock, exact)


@pytest.mark.parametrize("kind", sized(KINDS, KINDS[:1]))
def test_compiled_model_trains_as_the_patched_one(kind, device, exact_products):
    model, x = model_of(kind, device), torch.cat(images_of(device, torch.float32, 4))
    exact = train(double(model), x.double())
    swin_kernels.patch(model, backend=device.backend)
    eager = train(model, x)
    compiled = train(device.compiled(model, fullgraph=True), x)
    grads = {n.removeprefix("_orig_mod."): g for n, g in compiled.grads.items()}
    outcomes = (
        Logits(outcome.out, grads)
        for outcome, grads in ((compiled, grads), (eager, eager.grads), (exact, exact.grads))
    )
    check_errors(*outcomes, PEER_FACTOR)


@pytest.mark.parametrize("kind", sized(KINDS, KINDS[:1]))
def test_mask_edited_without_a_trace_is_used(kind, device, exact_products):
    model, x = model_of(kind, device), images_of(device, torch.float32)[0]
    swin_kernels.patch(model, backend=device.backend, strict=True)
    with torch.no_grad():
        before = model(x)
        for block in model.modules():
            if getattr(block, "attn_mask", None) is not None:
                block.attn_mask.data.zero_()
        edited = model(x)
        swin_kernels.unpatch(model)
        stock = model(x)
    assert (edited - before).abs().max() > 100 * (edited - stock).abs().max()
