"""timm models for the tests of patch, with parameters at which attention matters."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from own_models import stirred
from torch import Tensor, nn

pytest.importorskip("timm", reason="the patches are tested on timm's models")

from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock

from swin_kernels.patch.core import Fused, patch
from swin_kernels.testing import FEW, LEAST_INPUTS

SMALL = {
    "depths": (2, 2),
    "embed_dim": 32,
    "num_heads": (2, 4),
    "window_size": 7,
    "num_classes": 10,
}
MODELS = {"v1": SwinTransformer, "v2": SwinTransformerV2, "cr": SwinTransformerV2Cr}
KINDS = tuple(MODELS)
BLOCKS = {"v1": SwinTransformerBlock, "v2": SwinTransformerV2Block, "cr": SwinTransformerV2CrBlock}
kinds = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize("size", [(56, 56), (60, 76)], ids=["unpadded", "padded"])


def small_model(kind: str, img_size: int | tuple[int, int] = 56, **options) -> nn.Module:
    torch.manual_seed(0)
    return stirred(MODELS[kind](img_size=img_size, **(SMALL | options))).eval()


def small_block(
    kind: str, size: tuple[int, int], window=7, shift=3, dim=16, heads=2, **options
) -> nn.Module:
    """One block; `size` is the resolution it is made for."""
    torch.manual_seed(0)
    if kind == "cr":
        block = BLOCKS[kind](dim, heads, size, to_2tuple(window), to_2tuple(shift), **options)
    else:
        block = BLOCKS[kind](dim, size, heads, window_size=window, shift_size=shift, **options)
    return stirred(block).eval()


def attend(block: nn.Module, x: Tensor) -> Tensor:
    """The method that patch replaces."""
    return block._shifted_window_attn(x) if isinstance(block, BLOCKS["cr"]) else block._attn(x)


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
    """Output, and the gradient of the input and of every parameter that has one.

    The names of a compiled model are those of the model.
    """
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    out.backward(grad.to(out.dtype))
    grads = {
        name.removeprefix("_orig_mod."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert x.grad is not None
    return Outcome(out.detach(), grads | {"input": x.grad})


def train_steps(model: nn.Module, images: Sequence[Tensor], seed: int = 0) -> list[Outcome]:
    """`train_step` of each image, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    return [train_step(model, x.to(dtype), seed) for x in images]


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

    A bias takes the larger of its own and its weight's: the terms of its sum are those, and cancel
    to nothing in the last layer of Cr's meta network, as softmax ignores what is the same for all
    keys.
    """
    terms = [grads[n].abs() for n in {name, re.sub(r"bias$", "weight", name)} if n in grads]
    return eps * max(float(t.max()) for t in terms), eps * max(float(t.mean()) for t in terms)


def _like(name: str, in_model: bool) -> str:
    """Where errors are pooled: a parameter with itself in all blocks, and all others together."""
    if in_model:
        return re.sub(r".*blocks\.\d+", "*", name) if "blocks." in name else "outside the blocks"
    return "attn" if name.startswith("attn.") else "outside attn"


def assert_outcomes_no_worse(
    actual: Sequence[Outcome], eager: Sequence[Outcome], exact: Sequence[Outcome]
) -> None:
    """The error rule, error <= 2·(stock's own) + one ulp, for outputs and all gradients.

    Behind a whole model one error is one draw: a token of small variance before a norm can amplify
    rounding fivefold, in stock as in ours, and stock's own error in two numbers may be next to
    nothing. So the rule holds for the geometric mean over samples and over like parameters; and
    nothing, results of fewer than `FEW` numbers summed over such a pool, is off by more than 5
    times what the rule allows: what is computed wrongly is off by thousands. The measurement behind
    this is in docs/compatibility.md. Results of so few numbers take several inputs.
    """
    least = min(x.numel() for best in exact for x in (*best.out, *best.grads.values()))
    inputs = len(exact) if any(best.grads for best in exact) else sum(len(b.out) for b in exact)
    assert least >= FEW or inputs >= LEAST_INPUTS, f"{least} numbers of {inputs} inputs"
    pools: dict[tuple[str, str], list[tuple[str, float, float]]] = defaultdict(list)

    def compare(like: str, single: str, of: tuple[Tensor, Tensor, Tensor], ulps) -> None:
        x, bound, best = of
        assert x.dtype == bound.dtype, single
        assert x.isfinite().all(), f"{single} is not finite"
        kinds = zip(("largest", "mean"), _errors(x, best), _errors(bound, best), ulps)
        for kind, error, allowed, ulp in kinds:
            pools[like, kind].append((single, error, 2 * allowed + ulp))

    for call, (ours, stock, best) in enumerate(zip(actual, eager, exact)):
        assert ours.grads.keys() == stock.grads.keys() == best.grads.keys()
        eps = torch.finfo(ours.out.dtype).eps
        for sample, of in enumerate(zip(ours.out, stock.out, best.out, strict=True)):
            single = "output" if of[2].numel() < FEW else f"output {call}, {sample}"
            compare("output", single, of, _ulps("", {"": of[2]}, eps))
        in_model = any("blocks." in name for name in best.grads)
        for name, grad in best.grads.items():
            like, of = _like(name, in_model), (ours.grads[name], stock.grads[name], grad)
            ulps = _ulps(name, best.grads, torch.finfo(of[0].dtype).eps)
            compare(like, like if grad.numel() < FEW else f"gradient of {name}", of, ulps)
    for (like, kind), pool in pools.items():
        ratios = [error / bound if error > 0 else 0.0 for _, error, bound in pool]
        mean = math.exp(sum(math.log(max(ratio, 1e-3)) for ratio in ratios) / len(ratios))
        assert mean <= 1, f"{like}: {kind} errors {ratios} of those allowed"
        for single in {name for name, *_ in pool}:
            error, bound = (sum(e[i] for e in pool if e[0] == single) for i in (1, 2))
            assert error <= 5 * bound, f"{single}: {kind} {error=:.3e} {bound=:.3e}"


def assert_same_training(
    model: nn.Module, patch_all: Callable, images: Sequence[Tensor], seed: int = 0
) -> list[Outcome]:
    """Stock fp64, stock fp32, then patched fp32: the error rule between them.

    Returns what the patched model gave.
    """
    exact, eager = train_steps(double(model), images, seed), train_steps(model, images, seed)
    patch_all(model)
    actual = train_steps(model, images, seed)
    assert_outcomes_no_worse(actual, eager, exact)
    return actual


def assert_same_output(block: nn.Module, x: Tensor, patch_all: Callable) -> Tensor:
    """Output of the attention method: stock in fp32 and fp64 against patched, by the error rule."""
    with torch.no_grad():
        exact, eager = attend(double(block), x.double()), attend(block, x)
        patch_all(block)
        actual = attend(block, x)
    assert_outcomes_no_worse([Outcome(actual, {})], [Outcome(eager, {})], [Outcome(exact, {})])
    return actual


def patched_copy(model: nn.Module, **options) -> nn.Module:
    """A copy of the model, patched; the model stays stock."""
    twin = copy.deepcopy(model)
    patch(twin, **options)
    return twin
