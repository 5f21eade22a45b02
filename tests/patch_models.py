"""timm models for the tests of patch: small, with parameters at which attention matters, and what they compute."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock
from torch import Tensor, nn

from swin_kernels.patch.core import Fused
from swin_kernels.testing import assert_no_worse_than_eager

SMALL = dict(depths=(2, 2), embed_dim=32, num_heads=(2, 4), window_size=7, num_classes=10)
MODELS = {"v1": SwinTransformer, "v2": SwinTransformerV2, "cr": SwinTransformerV2Cr}
KINDS = tuple(MODELS)
BLOCKS = {"v1": SwinTransformerBlock, "v2": SwinTransformerV2Block, "cr": SwinTransformerV2CrBlock}
METHODS = {"v1": "_attn", "v2": "_attn", "cr": "_shifted_window_attn"}


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved away from its start, where biases are 0 and the norms of timm's Cr are 0 too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("logit_scale"):
                parameter.add_(0.5 * noise)
            else:
                parameter.add_(0.05 * noise)
    return model


def small_model(kind: str, img_size: int | tuple[int, int] = 56, **options) -> nn.Module:
    torch.manual_seed(0)
    return stirred(MODELS[kind](img_size=img_size, **(SMALL | options))).eval()


def full_model(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return stirred(timm.create_model(name, pretrained=False, **options)).eval()


def small_block(
    kind: str, size: tuple[int, int], window=7, shift=3, dim=16, heads=2, **options
) -> nn.Module:
    """One block; `size` is the resolution it is made for."""
    torch.manual_seed(0)
    if kind == "cr":
        window, shift = ((v, v) if isinstance(v, int) else v for v in (window, shift))
        block = BLOCKS[kind](dim, heads, size, window, shift, **options)
    else:
        block = BLOCKS[kind](dim, size, heads, window_size=window, shift_size=shift, **options)
    return stirred(block).eval()


def attend(block: nn.Module, x: Tensor) -> Tensor:
    """The method that patch replaces."""
    kind = next(kind for kind, cls in BLOCKS.items() if isinstance(block, cls))
    return getattr(block, METHODS[kind])(x)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, tuple(BLOCKS.values()))]


def fused_blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Fused)]


def image(*size: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


class Outcome(NamedTuple):
    out: Tensor
    grads: dict[str, Tensor]


def train_step(model: nn.Module, x: Tensor, seed: int = 0) -> Outcome:
    """Output, and the gradient of every parameter that has one, for one random gradient of the output."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    out.backward(grad.to(out.dtype))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return Outcome(out.detach(), grads | {"input": x.grad})


def double(model: nn.Module) -> nn.Module:
    """A stock copy in fp64: the numbers to be met."""
    exact = copy.deepcopy(model).double()
    assert not fused_blocks(exact)
    return exact


def _errors(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and mean error."""
    error = (x.double() - exact).abs()
    return float(error.max()), float(error.mean())


def _ulps(name: str, grads: dict[str, Tensor], eps: float) -> tuple[float, float]:
    """One ulp of the largest and of the mean value.

    A bias takes the larger of its own and its weight's: the terms of its sum are those, and cancel to nothing in the
    last layer of Cr's meta network, as softmax ignores what is the same for all keys.
    """
    terms = [grads[n].abs() for n in {name, re.sub(r"bias$", "weight", name)} if n in grads]
    return eps * max(float(t.max()) for t in terms), eps * max(float(t.mean()) for t in terms)


def assert_outcomes_no_worse(
    actual: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]
) -> None:
    """The error rule, error <= 2·(stock's own) + one ulp, for outputs and every gradient, over several inputs.

    Behind a whole model the error of one gradient is one draw: a token of small variance before a norm can amplify
    rounding fivefold, in stock as in ours. So the rule holds for the geometric mean over the inputs and over the same
    parameter of all blocks; and each single gradient stays within 15 times what the rule allows, where what is
    computed wrongly is off by thousands.
    """
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for ours, stock, best in zip(actual, eager, exact):
        assert ours.grads.keys() == stock.grads.keys() == best.grads.keys()
        assert_no_worse_than_eager(ours.out, stock.out, best.out, name="output")
        for name, grad in best.grads.items():
            x, bound = ours.grads[name], stock.grads[name]
            assert x.dtype == bound.dtype
            assert x.isfinite().all(), f"gradient of {name} is not finite"
            ulps = _ulps(name, best.grads, torch.finfo(x.dtype).eps)
            kinds = zip(("largest", "mean"), _errors(x, grad), _errors(bound, grad), ulps)
            for kind, error, allowed, ulp in kinds:
                ratio = error / (2 * allowed + ulp) if error > 0 else 0.0
                assert ratio <= 15, f"gradient of {name}: {ratio} of the error allowed"
                ratios[re.sub(r".*blocks\.\d+", "*", name), kind].append(ratio)
    for (name, kind), found in ratios.items():
        mean = math.exp(sum(math.log(max(ratio, 1e-3)) for ratio in found) / len(found))
        assert mean <= 1, f"gradient of {name}: {kind} errors {found} of those allowed"


def assert_same_training(
    model: nn.Module, patch_all: Callable, images: Sequence[Tensor], seed: int = 0
) -> list[Outcome]:
    """Stock fp64, stock fp32, then patched fp32: the error rule between them."""
    exact_model = double(model)
    exact = [train_step(exact_model, x.double(), seed) for x in images]
    eager = [train_step(model, x, seed) for x in images]
    patch_all(model)
    actual = [train_step(model, x, seed) for x in images]
    assert_outcomes_no_worse(actual, eager, exact)
    return actual
