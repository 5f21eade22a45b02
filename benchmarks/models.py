"""Whole models of timm: stock against patched, eager and compiled, and stock in other runtimes."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import swin_kernels
from benchmarks.baselines import runtimes
from benchmarks.device import Device
from benchmarks.report.rows import Row
from benchmarks.timing import reason_of
from swin_kernels.testing import FEW, LEAST_INPUTS
from swin_kernels.testing.timing import STEPS, Outcome, loss_of, quantiles, run_once

GATE_IMAGES = 8
PEER_FACTOR = 10  # of the error rule: a runtime rounds every layer its own way
JUDGED = {"inference": "logits", "training step": "gradients"}
FORMS = ("stock", "patched", "stock, compiled", "patched, compiled")
AUTOTUNED = ("stock, max-autotune", "patched, max-autotune")
PAUSE = 0.02  # seconds before a sample: the threads of another runtime spin for milliseconds


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def toy_model() -> nn.Module:
    """Shifted and unshifted blocks on a map of four windows."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=24, embed_dim=16, depths=(2,), num_heads=(1,), window_size=3, num_classes=10
    )


class Made(NamedTuple):
    """A model, and the images that it is timed on."""

    make: Callable[[], nn.Module]
    batch: int
    size: int  # height and width
    steps: tuple[str, ...] = tuple(STEPS)


SWIN_TINY = partial(timm_model, "swin_tiny_patch4_window7_224")
SWIN_BASE = partial(timm_model, "swin_base_patch4_window7_224")
SWIN_V2_TINY = partial(timm_model, "swinv2_tiny_window8_256")
MODELS = {
    "swin_tiny, batch 128": Made(SWIN_TINY, 128, 224),
    "swin_base, batch 64": Made(SWIN_BASE, 64, 224),
}
CPU_MODELS = {
    "swin_tiny, batch 8": Made(SWIN_TINY, 8, 224),
    "swin_tiny, batch 1": Made(SWIN_TINY, 1, 224, ("inference",)),
    "swinv2_tiny, batch 4": Made(SWIN_V2_TINY, 4, 256, ("inference",)),
    "swin_base, batch 4": Made(SWIN_BASE, 4, 224, ("inference",)),
}
TOYS = {"toy model, batch 3": Made(toy_model, 3, 24)}


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _flat(outcome: Outcome, sizes: dict[str, float]) -> Tensor:
    """Every gradient, relative to its own size."""
    return torch.cat([outcome.grads[n].double().flatten() / size for n, size in sizes.items()])


def check_errors(
    patched: Outcome, stock: Outcome, exact: Outcome, factor: float = 2.0
) -> dict[str, float]:
    """The error rule for root mean squares: of the logits, and of all gradients, each to its size.

    The largest error of a whole model is dominated by sampling noise. Returns patched's errors as
    multiples of stock's. Raises ValueError for few logits of few images, as the error rule does.
    """
    images, numbers = len(exact.logits), exact.logits.numel()
    if numbers < FEW and images < LEAST_INPUTS:
        raise ValueError(
            f"expected {FEW} logits or {LEAST_INPUTS} images, got {numbers} logits of {images}"
        )
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
    """The forms of one model, each made when it is first asked for."""

    def __init__(self, name: str, device: Device, models: Mapping[str, Made] = MODELS) -> None:
        made = models[name]
        torch.manual_seed(0)
        self.device, self.steps = device, made.steps
        stock = made.make().to(device.device, device.dtype).eval()
        self.forms = {"stock": stock}
        generator = torch.Generator(device.device).manual_seed(1)
        shape = (made.batch, 3, made.size, made.size)
        images = torch.randn(shape, device=device.device, generator=generator)
        self.images = images.to(device.dtype)

    def form(self, name: str) -> nn.Module:
        if name not in self.forms:
            self.forms[name] = self._make(name)
        return self.forms[name]

    def _make(self, name: str) -> nn.Module:
        if name in runtimes.RUNTIMES:
            return runtimes.RUNTIMES[name].make(self._onnx_file, self.device.dtype)
        eager, _, how = name.partition(", ")
        if how:
            mode = None if how == "compiled" else how
            return self.device.compiled(self.form(eager), fullgraph=False, mode=mode)
        assert name == "patched", name
        patched = copy.deepcopy(self.forms["stock"])
        # all, or an error; on a CPU as users have it, where the choice among ours is by call
        backend = None if self.device.backend == "cpu" else self.device.backend
        swin_kernels.patch(patched, backend=backend, strict=True)
        return patched

    @cached_property
    def _onnx_file(self) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="swin_kernels-")  # while self is there
        stock = copy.deepcopy(self.forms["stock"])
        return runtimes.export(stock, self.images, Path(self._folder.name))

    @cached_property
    def _references(self) -> tuple[Outcome, Outcome]:
        """Of stock and of stock in float64, for a few images."""
        stock, few = self.forms["stock"], self.images[:GATE_IMAGES]
        return run_once(stock, few), run_once(copy.deepcopy(stock).double(), few)

    def steps_of(self, form: str) -> tuple[str, ...]:
        return tuple(s for s in self.steps if s == "inference" or form not in runtimes.RUNTIMES)

    def check(self, form: str) -> dict[str, float]:
        """Errors as multiples of stock's; AssertionError where outputs or gradients are wrong."""
        module = self.form(form)
        for each in self.forms.values():
            each.eval()  # a timed training step leaves stochastic depth on
        stock, exact = self._references
        factor = 2.0 if form.startswith("patched") else PEER_FACTOR
        if form in ("stock", "patched"):
            return check_errors(run_once(module, self.images[:GATE_IMAGES]), stock, exact)
        # another batch would be compiled again: the first logits of the whole one
        with torch.inference_mode():
            logits = module(self.images)[:GATE_IMAGES]
        if form in runtimes.RUNTIMES or "training step" not in self.steps:
            outcomes = (Outcome(x, {}) for x in (logits, stock.logits, exact.logits))
            return check_errors(*outcomes, factor)
        loss_of(module(self.images)[:GATE_IMAGES]).backward()
        eager = self.form(form.partition(",")[0])  # whose parameters a compiled module has
        grads = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
        eager.zero_grad(set_to_none=True)
        return check_errors(Outcome(logits, grads), stock, exact, factor)

    def warm(self, form: str) -> None:
        for step in self.steps_of(form):
            self.form(form).train(step == "training step")
            STEPS[step](self.form(form), self.images)

    def peak_mb(self, form: str, step: str) -> float | None:
        """None of a runtime, whose memory torch's allocator does not see."""
        if form in runtimes.RUNTIMES:
            return None
        call = partial(STEPS[step], self.form(form), self.images)
        return self.device.peak_bytes(call) / 1e6

    def sample(self, form: str, step: str) -> float:
        module, device = self.form(form), self.device
        time.sleep(PAUSE)
        first = device.mark()
        STEPS[step](module, self.images)
        last = device.mark()
        device.wait()
        return device.seconds(first, last)


def rows_of(
    name: str,
    device: Device,
    forms: Mapping[str, str | None],
    rounds: int,
    models: Mapping[str, Made] = MODELS,
) -> Iterator[Row]:
    """Rows of the model; `forms` has a reason for each that is to be left out."""
    made = Models(name, device, models)
    wrong, errors = dict(forms), {}
    for form, reason in wrong.items():
        if reason is None:
            print(f"{name}: {form}", flush=True)
            try:
                errors[form] = made.check(form)
                made.warm(form)
            except Exception as error:  # one form's end is not that of the others
                wrong[form] = reason_of(error)
    for step in made.steps:
        timed = [form for form in forms if step in made.steps_of(form)]
        running = [form for form in timed if wrong[form] is None]
        samples: dict[str, list[float]] = {form: [] for form in running}
        peaks: dict[str, float | None] = {}
        for form in running:
            made.form(form).train(step == "training step")
            peaks[form] = made.peak_mb(form, step)
        for turn in range(rounds):
            for place in range(len(running)):
                form = running[(turn + place) % len(running)]  # none always follows the same other
                samples[form].append(made.sample(form, step))
        # ours first, as the others' rows have their ratio to it
        for form in sorted(timed, key=lambda form: form != "patched"):
            if (reason := wrong[form]) is not None:
                yield Row(name, form, step, note=reason)
                continue
            median, low, high = quantiles(samples[form], 1e-6)
            times = (median, low, high, rounds)
            error = errors[form].get(JUDGED[step])
            yield Row(name, form, step, *times, peak_mb=peaks[form], error=error)
