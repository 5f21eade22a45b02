"""Whole models of timm, stock against patched, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import swin_kernels
from benchmarks.device import Device
from benchmarks.rows import Row, quantiles
from benchmarks.timing import reason_of
from swin_kernels.demo.measure import STEPS, Outcome, run_once

GATE_IMAGES = 8
COMPILED_FACTOR = 10  # of the error rule: a compiler rounds every layer its own way
JUDGED = {"inference": "logits", "training step": "gradients"}
FORMS = ("stock", "patched", "stock, compiled", "patched, compiled")


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def toy_model() -> nn.Module:
    """Shifted and unshifted blocks on a map of four windows."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=24, embed_dim=16, depths=(2,), num_heads=(1,), window_size=3, num_classes=10
    )


# how to make a model, images a batch, height and width
Made = tuple[Callable[[], nn.Module], int, int]
MODELS: dict[str, Made] = {
    "swin_tiny": (partial(timm_model, "swin_tiny_patch4_window7_224"), 128, 224),
    "swin_base": (partial(timm_model, "swin_base_patch4_window7_224"), 64, 224),
}
CPU_MODELS: dict[str, Made] = {
    "swin_tiny": (partial(timm_model, "swin_tiny_patch4_window7_224"), 8, 224)
}
TOYS: dict[str, Made] = {"toy model": (toy_model, 2, 24)}


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _flat(outcome: Outcome, sizes: dict[str, float]) -> Tensor:
    """Every gradient, relative to its own size."""
    return torch.cat([outcome.grads[n].double().flatten() / size for n, size in sizes.items()])


def check_errors(
    patched: Outcome, stock: Outcome, exact: Outcome, factor: float = 2.0
) -> dict[str, float]:
    """The error rule for root mean squares: of the logits, and of all gradients, each to its size.

    Behind a whole model the largest error is a throw of dice. Returns patched's errors as multiples
    of stock's.
    """
    eps = torch.finfo(patched.logits.dtype).eps
    sizes = {n: _rms(g) for n, g in exact.grads.items()}
    least = 1e-9 * max(sizes.values(), default=0.0)  # others are exactly zero
    sizes = {n: size for n, size in sizes.items() if size > least}
    compared = {"logits": [x.logits for x in (patched, stock, exact)]}
    if sizes:
        compared["gradients"] = [_flat(x, sizes) for x in (patched, stock, exact)]
    ratios = {}
    for what, (ours, theirs, best) in compared.items():
        error, allowed = _rms(ours.double() - best), _rms(theirs.double() - best)
        assert error <= factor * allowed + eps * _rms(best), f"{what}: {error=:.3e} {allowed=:.3e}"
        ratios[what] = error / allowed if allowed else 1.0
    return ratios


class Models:
    """The four forms of one model, each with why it may not be timed."""

    def __init__(self, name: str, device: Device, models: dict = MODELS) -> None:
        make, batch, size = models[name]
        torch.manual_seed(0)
        self.device = device
        stock = make().to(device.device, device.dtype).eval()
        self.exact = copy.deepcopy(stock).double()
        patched = copy.deepcopy(stock)
        swin_kernels.patch(patched, backend=device.backend)
        compiled = (device.compiled(module, fullgraph=False) for module in (stock, patched))
        self.forms = dict(zip(FORMS, (stock, patched, *compiled)))
        generator = torch.Generator(device.device).manual_seed(1)
        shape = (batch, 3, size, size)
        images = torch.randn(shape, device=device.device, generator=generator)
        self.images = images.to(device.dtype)

    def check(self, form: str) -> dict[str, float]:
        """Errors as multiples of stock's; AssertionError where outputs or gradients are wrong."""
        for each in self.forms.values():
            each.eval()  # a timed training step leaves stochastic depth on
        module, few = self.forms[form], self.images[:GATE_IMAGES]
        exact = run_once(self.exact, few)
        stock = run_once(self.forms["stock"], few)
        if not form.endswith("compiled"):
            return check_errors(run_once(module, few), stock, exact)
        # another batch would be compiled again: the logits of the whole one
        with torch.inference_mode():
            logits = module(self.images)[:GATE_IMAGES]
        outcomes = (Outcome(x, {}) for x in (logits, stock.logits, exact.logits))
        return check_errors(*outcomes, COMPILED_FACTOR)

    def warm(self, form: str) -> None:
        for step, function in STEPS.items():
            self.forms[form].train(step == "training step")
            function(self.forms[form], self.images)

    def sample(self, form: str, step: str) -> float:
        module, device = self.forms[form], self.device
        first = device.mark()
        STEPS[step](module, self.images)
        last = device.mark()
        device.wait()
        return device.seconds(first, last)


def rows_of(
    name: str,
    device: Device,
    forms: dict[str, str | None],
    rounds: int,
    models: dict = MODELS,
) -> Iterator[Row]:
    """Rows of the model; `forms` has a reason for each that is to be left out."""
    made = Models(name, device, models)
    label = f"{name}, batch {made.images.shape[0]}"
    wrong, errors = dict(forms), {}
    for form, reason in wrong.items():
        if reason is None:
            print(f"{label}: {form}", flush=True)
            try:
                errors[form] = made.check(form)
                made.warm(form)
            except Exception as error:  # one form's end is not that of the others
                wrong[form] = reason_of(error)
    running = [form for form, reason in wrong.items() if reason is None]
    for step in STEPS:
        samples: dict[str, list[float]] = {form: [] for form in running}
        peaks: dict[str, float] = {}
        for form in running:
            made.forms[form].train(step == "training step")
            peaks[form] = (
                device.peak_bytes(partial(STEPS[step], made.forms[form], made.images)) / 1e6
            )
        for _ in range(rounds):
            for form in running:
                samples[form].append(made.sample(form, step))
        # ours first, as the others' rows have their ratio to it
        for form, reason in sorted(wrong.items(), key=lambda item: item[0] != "patched"):
            if reason is not None:
                yield Row(label, form, step, note=reason)
                continue
            median, low, high = quantiles(samples[form])
            times = (median, low, high, rounds)
            error = errors[form].get(JUDGED[step])
            yield Row(label, form, step, *times, peak_mb=peaks[form], error=error)
