"""A Swin at a user's own size, patched against stock: checked, then timed in turn."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from swin_kernels.cli import command, inputs, memory
from swin_kernels.patch import PatchReport
from swin_kernels.testing import LEAST_INPUTS, timing

if TYPE_CHECKING:
    from rich.table import Table

NEEDS = {"timm": "timm", "rich": "rich"}
DTYPES = ("float32", "bfloat16", "float16")
CHECKED = 4  # images at most: the exact result is in float64


class Prepared(NamedTuple):
    """The options, checked, and what they stand for."""

    spec: memory.Spec
    images: Tensor  # (B, 3, height, width)
    modules: dict[str, nn.Module]  # stock and patched
    timed: dict[str, nn.Module]  # these two, or what the compiler made of them
    report: PatchReport
    backend: str  # the one that ran
    rounds: int


def _size(text: str) -> tuple[int, int]:
    """`224` or `256x192`, height first."""
    sides = [int(side) for side in text.split("x")] if re.fullmatch(r"\d+(x\d+)?", text) else [0]
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(
            f"expected N or HxW, whole numbers of at least 1, got {text!r}"
        )
    return sides[0], sides[-1]


def add_options(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, ", or module:function that returns one of your own")
    parser.add_argument(
        "--size", type=_size, metavar="N|HxW", help="of the images (default: the model's)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"(default: {DTYPES[0]})"
    )
    parser.add_argument("--compile", action="store_true", help="time both under torch.compile")


def prepare(options: argparse.Namespace) -> Prepared:
    """Checks every option, makes the model, patches a copy and runs both once.

    ValueError, ImportError or NotImplementedError says what is wrong and how to mend it.
    """
    command.check_packages(NEEDS, "bench")
    import timm

    if not inputs.is_own(options.model):
        inputs.check_name(options.model)
    elif options.size is None:
        raise ValueError("--size: expected one, N or HxW, with a model of your own")
    device = command.usable_device(options.device)
    if options.size is not None:
        command.check_batch(options.batch, options.size[0], options.size[1], device)
    if options.threads:
        torch.set_num_threads(options.threads)
    stock = inputs.fresh_model(options.model, options.size)
    size = options.size or timm.data.resolve_data_config(model=stock)["input_size"][1:]
    stock = stock.to(device, getattr(torch, options.dtype)).eval()
    generator = torch.Generator().manual_seed(1)
    command.check_batch(options.batch, size[0], size[1], device)
    images = torch.randn(options.batch, 3, *size, generator=generator)
    images = images.to(device, getattr(torch, options.dtype))
    try:
        patched, report, backend = timing.patched_copy(stock, images[:1])
        modules = timed = {"stock": stock, "patched": patched}
        if options.compile:
            command.keep_compiled_apart()
            timed = {x: cast(nn.Module, torch.compile(module)) for x, module in modules.items()}
        for module in timed.values():
            timing.check_logits(timing.inference_step(module, images), options.model)
    # a map too small, no memory, no compiler
    except (RuntimeError, AssertionError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{options.model} cannot run on {options.batch}×3×{size[0]}×{size[1]} {options.dtype}"
            f"{', compiled' if options.compile else ''}: {cause}"
        ) from error
    if backend == "none":
        raise ValueError(
            f"--size: at {size[0]}×{size[1]} no window of {options.model} holds a token; "
            "expected a larger one"
        )
    spec = memory.Spec.of(options.model, images, options.size, options.compile)
    return Prepared(spec, images, modules, timed, report, backend, options.rounds)


def _check(p: Prepared, bar: command.Bar) -> list[timing.Difference]:
    """Logits and gradients of a few images; of compiled models the logits as well."""
    few = p.images[:CHECKED]
    if len(few) < LEAST_INPUTS:  # whose logits may be too few to be judged
        few = torch.cat([few, *(torch.randn_like(few) for _ in range(LEAST_INPUTS - 1))])
    differences, exact = command.judged(p.modules, few, bar)
    if p.spec.compiled:
        # a batch of another size would be compiled again
        batches = few.split(len(p.images)) if len(p.images) < len(few) else [p.images]
        with torch.inference_mode():
            logits = {
                name: torch.cat([module(x) for x in batches])[: len(few)]
                for name, module in p.timed.items()
            }
        pair = logits["patched"], logits["stock"]
        differences.append(
            timing.difference("logits, compiled", *pair, exact.logits, by_image=True)
        )
    return differences


def _cost_table(
    times: dict[str, dict[str, list[float]]], peaks: dict[str, dict[str, int]]
) -> Table:
    """Medians with their 20th and 80th percentile, and peaks, by step."""
    titles = ("stock, ms", "patched, ms", "stock ÷ patched", "stock, MB", "patched, MB")
    table = command.make_table("step", *titles, no_wrap=True)
    for step, of in times.items():
        levels = {name: timing.quantiles(seconds, 1e-3) for name, seconds in of.items()}
        cells = ["{} ({}–{})".format(*map(command.three_digits, x)) for x in levels.values()]
        cells.append(f"{levels['stock'][0] / levels['patched'][0]:.2f}")
        cells += [command.three_digits(peaks[x][step] / 1e6) if peaks else "–" for x in of]
        table.add_row(step, *cells)
    return table


def run(p: Prepared) -> int:
    """Prints the comparison; 0, or 1 without any times if the numbers break the error rule."""
    console = command.make_console()
    console.print(command.machine(p.images, p.backend), style="bold", soft_wrap=True)
    batch, _, height, width = p.images.shape
    form = ", compiled" if p.spec.compiled else ""
    console.print(
        f"{p.spec.model}, random weights, batch of {batch}, {height}×{width}, {p.spec.dtype}{form}"
    )
    console.print(f"patch: {p.report.in_short()}")
    times: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, dict[str, int]] = {}
    remarks: list[str] = []
    with command.progress(console, p.rounds) as bar:
        differences = _check(p, bar)
        if not any(d.complaint for d in differences):
            for step in timing.STEPS:
                bar.say(f"time, {step}")
                times[step] = timing.time_in_turn(step, p.timed, p.images, p.rounds, bar.tick)
            peaks, remarks = command.peaks_of(p.spec, bar)
    console.print(command.numbers_table(differences))
    if not command.tell_verdict(console, differences):
        console.print("Timings omitted: the results break the error rule.")
        return 1
    console.print(_cost_table(times, peaks))
    console.print(
        f"Times are medians of {p.rounds} calls (20th to 80th percentile), stock and patched "
        "alternating. A training step is forward, loss and backward. MB: what a step adds to "
        "weights and input at its peak."
    )
    for remark in remarks:
        console.print(remark, style="yellow", soft_wrap=True)
    return 0
