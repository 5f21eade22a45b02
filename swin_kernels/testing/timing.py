"""A stock model beside its patched copy: errors against float64, and times in turn."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_kernels.ops.dispatch import ATTENTION_SUBLAYER_BACKENDS, BACKENDS
from swin_kernels.patch import PatchReport, patch
from swin_kernels.testing import Several, assert_no_worse_than_eager


class Outcome(NamedTuple):
    """Logits (B, classes) of a model and the gradient of each of its parameters."""

    logits: Tensor
    grads: dict[str, Tensor]


class Difference(NamedTuple):
    """Largest absolute differences in one quantity, and the largest value they are relative to."""

    name: str
    patched_stock: float
    stock_exact: float
    patched_exact: float
    largest: float
    complaint: str | None  # how it breaks the error rule, None if it keeps it


def loss_of(logits: Tensor) -> Tensor:
    """Cross-entropy against fixed classes, so that every run has the same gradients."""
    target = torch.arange(logits.shape[0], device=logits.device) * 7 % logits.shape[1]
    return F.cross_entropy(logits, target)


def run_once(module: nn.Module, images: Tensor) -> Outcome:
    """Forward and backward in the dtype of the module; its gradients are cleared afterwards."""
    dtype = next(module.parameters()).dtype
    logits = module(images.to(dtype))
    loss_of(logits).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return Outcome(logits.detach(), grads)


@contextlib.contextmanager
def counted_backends() -> Iterator[Counter[str]]:
    """Counts the calls of attention, alone or in its sublayer, that reach each backend."""
    calls: Counter[str] = Counter()

    def counting(name: str, forward: Callable) -> Callable:
        def counted(*args: object) -> object:
            calls[name] += 1
            return forward(*args)

        return counted

    counted = [*BACKENDS.items(), *ATTENTION_SUBLAYER_BACKENDS.items()]
    for name, backend in counted:
        backend.__dict__["forward"] = counting(name, backend.forward)
    try:
        yield calls
    finally:
        for _, backend in counted:
            del backend.__dict__["forward"]


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _complaint(name: str, patched: Several, stock: Several, exact: Several) -> str | None:
    try:
        assert_no_worse_than_eager(patched, stock, exact, name=name)
    except AssertionError as error:
        return str(error)
    return None


def difference(
    name: str, patched: Tensor, stock: Tensor, exact: Tensor, *, by_image: bool = False
) -> Difference:
    """Of one quantity; logits are judged by image."""
    return Difference(
        name,
        _largest(patched.double() - stock.double()),
        _largest(stock.double() - exact),
        _largest(patched.double() - exact),
        _largest(exact),
        _complaint(name, *(list(x) if by_image else x for x in (patched, stock, exact))),
    )


def _flat(grads: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    return torch.cat([grads[name].flatten() * scale for name, scale in scales.items()])


def _relative(patched: Outcome, stock: Outcome, exact: Outcome) -> Difference:
    """Differences of each gradient relative to the largest value of that gradient."""
    sizes = {name: _largest(grad) for name, grad in exact.grads.items()}
    floor = 1e-12 * max(sizes.values())
    sizes = {name: size for name, size in sizes.items() if size > floor}  # others are exactly zero

    def worst(a: Outcome, b: Outcome) -> float:
        return max(
            _largest(a.grads[name].double() - b.grads[name].double()) / size
            for name, size in sizes.items()
        )

    # powers of two, so that scaling rounds nothing
    scales = {name: 2.0 ** -math.frexp(size)[1] for name, size in sizes.items()}
    name = "each gradient"
    flat = (_flat(outcome.grads, scales) for outcome in (patched, stock, exact))
    return Difference(
        name,
        worst(patched, stock),
        worst(stock, exact),
        worst(patched, exact),
        1.0,
        _complaint(name, *flat),
    )


def compare(patched: Outcome, stock: Outcome, exact: Outcome) -> list[Difference]:
    """Differences of the logits, of all gradients, and of each gradient on its own scale.

    The last finds an error in a parameter whose gradients are small beside the others'.
    """
    grads = (_flat(x.grads, dict.fromkeys(exact.grads, 1.0)) for x in (patched, stock, exact))
    return [
        difference("logits", patched.logits, stock.logits, exact.logits, by_image=True),
        difference("gradients", *grads),
        _relative(patched, stock, exact),
    ]


def patched_copy(module: nn.Module, images: Tensor) -> tuple[nn.Module, PatchReport, str]:
    """A patched copy, its report and the name of the backend that ran when it saw the images."""
    patched = copy.deepcopy(module)
    with warnings.catch_warnings():  # the report says what the warning does
        warnings.simplefilter("ignore", UserWarning)
        report = patch(patched)
    with counted_backends() as calls:
        inference_step(patched, images)
    return patched, report, " and ".join(calls) or "none"


def inference_step(module: nn.Module, images: Tensor) -> Any:
    with torch.inference_mode():
        return module(images)


def check_logits(out: Any, model: str) -> None:
    """ValueError if what a model gave are no logits, (B, classes)."""
    if not isinstance(out, Tensor) or out.ndim != 2:
        came = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{model}: expected a model that gives logits (B, classes), got {came}")


def training_step(module: nn.Module, images: Tensor) -> None:
    """Forward, loss and backward; what the optimiser adds is the same for every model."""
    loss_of(module(images)).backward()
    module.zero_grad(set_to_none=True)


STEPS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "inference": inference_step,
    "training step": training_step,
}


def _now(images: Tensor) -> float:
    """Seconds on a clock, once all is done that the device of the images was given."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def quantiles(seconds: Sequence[float], unit: float = 1.0) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, in units of so many seconds."""
    x = torch.tensor(seconds, dtype=torch.float64) / unit
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, low, high = torch.quantile(x, levels).tolist()
    return median, low, high


def time_in_turn(
    step: str,
    modules: Mapping[str, nn.Module],
    images: Tensor,
    rounds: int,
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of each call of a step, by module: A B A B …, after one call of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    for module in modules.values():
        module.train(step == "training step")
    for turn in range(rounds + 1):
        for name, module in modules.items():
            start = _now(images)
            STEPS[step](module, images)
            if turn > 0:
                times[name].append(_now(images) - start)
            tick()
    for module in modules.values():
        module.eval()
    return times


@contextlib.contextmanager
def attention_clock(module: nn.Module) -> Iterator[list[float]]:
    """Seconds that each forward pass on a CPU spends in window attention, while it is open.

    That is what the blocks do before their first residual addition, without norm, qkv and proj:
    shift, padding, partition, attention, and what undoes them.
    """
    seconds: list[float] = []

    def clock(sign: int) -> Callable[..., None]:
        def add(*_: object) -> None:
            seconds[-1] += sign * time.perf_counter()

        return add

    block: Any
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(module.register_forward_pre_hook(lambda *_: seconds.append(0.0)))
        for block in module.modules():
            if hasattr(block, "attn") and hasattr(block, "drop_path1"):
                hooks.enter_context(block.register_forward_pre_hook(clock(-1)))
                hooks.enter_context(block.drop_path1.register_forward_pre_hook(clock(+1)))
                for part in (block.norm1, block.attn.qkv, block.attn.proj):
                    hooks.enter_context(part.register_forward_pre_hook(clock(+1)))
                    hooks.enter_context(part.register_forward_hook(clock(-1)))
        yield seconds
