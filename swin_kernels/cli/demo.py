"""The demo from its options to its table and picture."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from swin_kernels.cli import command, inputs, memory
from swin_kernels.patch import PatchReport
from swin_kernels.testing import timing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNSTEADY = 1.25  # differences of the size that the demo shows drown in more
NEEDS = {"timm": "timm", "rich": "rich", "matplotlib": "matplotlib", "PIL": "pillow"}


class Prepared(NamedTuple):
    """The options, checked, and what they stand for."""

    name: str
    photo: Path
    pixels: Tensor  # (3, height, width) in [0, 1]
    images: Tensor  # (B, 3, height, width), normalised
    model: inputs.Model
    patched: torch.nn.Module
    report: PatchReport
    backend: str  # the one that ran
    rounds: int
    picture: Path


def add_options(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser)
    parser.add_argument("--image", metavar="FILE", help="photo (default: one of scikit-image's)")
    parser.add_argument(
        "--out", metavar="DIR", default="out", help="folder for the picture (default: out)"
    )


def _writable(name: str) -> Path:
    """The folder of that name, made if need be; ValueError where no file can be written in it."""
    if not name:
        raise ValueError("--out: expected a folder, got an empty name")
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=name).close()
    except OSError as error:
        raise ValueError(
            f"--out: cannot write into {name!r}: {error.strerror}; expected a folder"
        ) from error
    return Path(name)


def prepare(options: argparse.Namespace) -> Prepared:
    """Checks every option, loads photo and model, patches a copy and runs it once.

    ValueError, OSError, ImportError or NotImplementedError says what is wrong and how to mend it.
    """
    command.check_packages(NEEDS, "the demo")
    inputs.check_name(options.model)
    device = command.usable_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    photo = inputs.find_photo(options.image)
    pixels = inputs.read_photo(photo)
    model = inputs.load_model(options.model)
    model = model._replace(module=model.module.to(device))
    command.check_batch(options.batch, model.height, model.width, device)
    images = inputs.make_batch(pixels, model, options.batch).to(device)
    copied = timing.patched_copy(model.module, images[:1])
    picture = _writable(options.out) / f"{options.model}.png"
    return Prepared(options.model, photo, pixels, images, model, *copied, options.rounds, picture)


Costs = dict[str, dict[str, float]]  # by what is measured, then stock or patched


def _cost_table(title: str, costs: Costs) -> Table:
    table = command.make_table(title, "stock", "patched", "stock ÷ patched")
    for name, values in costs.items():
        scale, unit = (1e-6, "MB") if "memory" in name else (1e3, "ms")
        stock, patched = values["stock"], values["patched"]
        cells = [f"{x * scale:.0f} {unit}" for x in (stock, patched)]
        table.add_row(name, *cells, f"{stock / patched:.2f}" if patched else "–")
    return table


def _top_classes(p: Prepared) -> list[str]:
    """Five classes of the central crop, stock's and patched's probability of each."""
    from timm.data import ImageNetInfo

    with torch.inference_mode():
        stock, patched = (m(p.images[:1])[0].softmax(-1) for m in (p.model.module, p.patched))
    names = ImageNetInfo()
    return [
        f"  {names.index_to_description(i)}: stock {stock[i]:.4f}, patched {patched[i]:.4f}"
        for i in stock.topk(5).indices.tolist()
    ]


def _draw(p: Prepared) -> str:
    """Writes the picture; returns what it shows, in words."""
    from swin_kernels.cli import picture

    found = inputs.last_shifted_grid(p.model.module)
    if found is None:
        return "no picture: no block of this model shifts its windows"
    name, grid = found
    side = [-(-448 // tokens) * tokens for tokens in grid.size]  # whole pixels a token
    crop = inputs.central_crop(p.pixels, side[0], side[1], p.model.crop)
    pixels = (crop.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture.photo_figure(pixels, grid, f"{p.name} {name}").savefig(p.picture)
    return f"picture: {p.picture} (shift regions of {name} on the photo, mask of its last window)"


def _measure(p: Prepared, console: Console) -> tuple[list[timing.Difference], Costs, list[str]]:
    """Differences, costs and remarks."""
    modules = {"stock": p.model.module, "patched": p.patched}
    with command.progress(console, p.rounds) as bar:
        differences, _ = command.judged(modules, p.images, bar)
        costs: Costs = {}
        spread = 1.0
        for step in timing.STEPS:
            bar.say(f"time, {step}")
            with contextlib.ExitStack() as stack:
                attention: dict[str, list[float]] = {}
                if step == "inference" and not p.images.is_cuda:
                    for name, module in modules.items():
                        attention[name] = stack.enter_context(timing.attention_clock(module))
                samples = timing.time_in_turn(step, modules, p.images, p.rounds, bar.tick)
            levels = {name: timing.quantiles(x) for name, x in samples.items()}
            costs[step] = {name: median for name, (median, _, _) in levels.items()}
            spread = max(spread, *(high / low for _, low, high in levels.values()))
            if attention:
                parts = {name: timing.quantiles(x[1:]) for name, x in attention.items()}
                costs["attention alone"] = {name: median for name, (median, _, _) in parts.items()}
        peaks, remarks = command.peaks_of(memory.Spec.of(p.name, p.images), bar)
    for step in timing.STEPS if peaks else ():
        costs[f"peak memory, {step}"] = {name: float(of[step]) for name, of in peaks.items()}
    if spread > _UNSTEADY:
        remarks.append(
            f"Unreliable times: calls of one step differ by {spread - 1:.0%}; is the machine busy?"
        )
    return differences, costs, remarks


def run(p: Prepared) -> int:
    """Prints the comparison and writes the picture; 0, or 1 if the numbers break the error rule."""
    console = command.make_console()
    console.print(command.machine(p.images, p.backend), style="bold", soft_wrap=True)
    batch, _, *size = p.images.shape
    console.print(f"model: {p.name}, {p.model.weights}", soft_wrap=True)
    console.print(
        f"input: {p.photo.name}, batch of {batch} crops, {size[0]}×{size[1]}, float32",
        soft_wrap=True,
    )
    console.print(f"patch: {p.report.in_short()}")
    if "reference" in p.backend:
        console.print(
            "The reference backend ran: plain PyTorch, nothing fused, so it is not faster. "
            "`python -m swin_kernels explain` gives the reasons.",
            style="yellow",
        )
    differences, costs, remarks = _measure(p, console)

    console.print(command.numbers_table(differences))
    parameters = sum(1 for _ in p.patched.parameters())
    console.print(
        "In brackets: relative to the largest value. Each gradient: the worst of "
        f"{parameters} parameters, relative to its own largest."
    )
    within = command.tell_verdict(console, differences)
    console.print(_cost_table(f"batch of {batch}", costs))
    memory = "allocated on the GPU" if p.images.is_cuda else "resident set"
    attention = "Attention alone: inference without the linear layers, norms and MLPs. "
    console.print(
        f"Medians of {p.rounds} calls, stock and patched alternating; a training step is forward, "
        f"loss and backward. {attention if 'attention alone' in costs else ''}"
        f"Peak memory: what a step adds to weights and input ({memory})."
    )
    for remark in remarks:
        console.print(remark, style="yellow", soft_wrap=True)
    if p.model.pretrained and p.model.module.num_classes == 1000:
        console.print("\nTop classes of the first crop", style="bold")
        console.print("\n".join(_top_classes(p)))
    console.print(_draw(p), soft_wrap=True)
    return 0 if within else 1
