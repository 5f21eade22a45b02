"""The demo from its options to its table and picture."""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from swin_kernels.demo import command, inputs, measure
from swin_kernels.patch import PatchReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NEEDS = {"timm": "timm", "rich": "rich", "matplotlib": "matplotlib", "PIL": "pillow"}


class Prepared(NamedTuple):
    """Everything that a user can get wrong, got right."""

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
    parser.add_argument("--image", metavar="PATH", help="a photo of your own")
    parser.add_argument("--out", metavar="DIR", default="out", help="where the PNG goes (out)")


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
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    model = inputs.load_model(options.model)
    model = model._replace(module=model.module.to(device))
    images = inputs.make_batch(pixels, model, options.batch).to(device)
    patched, report, backend = measure.patched_copy(model.module, images[:1])
    picture = folder / f"{options.model}.png"
    return Prepared(
        options.model,
        photo,
        pixels,
        images,
        model,
        patched,
        report,
        backend,
        options.rounds,
        picture,
    )


def _cost_table(costs: dict[str, dict[str, float]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    table.add_column("cost")
    for title in ("stock", "patched", "stock ÷ patched"):
        table.add_column(title, justify="right")
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
    from swin_kernels import picture

    found = inputs.last_shifted_grid(p.model.module)
    if found is None:
        return "no picture: no block of this model shifts its windows"
    name, grid = found
    side = [-(-448 // tokens) * tokens for tokens in grid.size]  # whole pixels a token
    crop = inputs.central_crop(p.pixels, side[0], side[1], p.model.crop)
    pixels = (crop.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture.photo_figure(pixels, grid, f"{p.name} {name}").savefig(p.picture)
    return f"{p.picture}: shift regions of {name} on the photo, and the mask of its last window"


class Results(NamedTuple):
    differences: list[measure.Difference]
    costs: dict[str, dict[str, float]]  # by what is measured, then stock or patched
    remark: str | None


def _measure(p: Prepared, console: Console) -> Results:
    steps = 3 + len(measure.STEPS) * 2 * (p.rounds + 1) + 1
    modules = {"stock": p.model.module, "patched": p.patched}
    with command.progress(console, steps) as bar:
        outcomes = {}
        for name, module in modules.items():
            bar.say(f"gradients, {name}")
            outcomes[name] = measure.run_once(module, p.images)
            bar.tick()
        bar.say("gradients in float64")
        exact = measure.run_once(copy.deepcopy(p.model.module).double(), p.images)
        bar.tick()
        differences = measure.compare(outcomes["patched"], outcomes["stock"], exact)
        del outcomes, exact

        costs, remark = {}, None
        for step in measure.STEPS:
            bar.say(f"time, {step}")
            samples = measure.time_in_turn(step, modules, p.images, p.rounds, bar.tick)
            costs[step] = {name: statistics.median(x) for name, x in samples.items()}
        bar.say("peak memory")
        spec = measure.Spec.of(p.name, p.images)
        try:
            peaks = measure.peak_memory(spec, tuple(modules))
        except RuntimeError as error:
            remark = f"Peak memory could not be measured: {error}"
        else:
            for step in measure.STEPS:
                costs[f"peak memory, {step}"] = {x: float(peaks[x][step]) for x in modules}
    return Results(differences, costs, remark)


def run(p: Prepared) -> int:
    """Prints the comparison and writes the picture; 0, or 1 if the numbers break the error rule."""
    console = command.make_console()
    console.print(command.machine(p.images, p.backend), style="bold", soft_wrap=True)
    batch, _, *size = p.images.shape
    console.print(f"photo: {p.photo.name}, batch of {batch} crops, {size[0]}×{size[1]}, float32")
    console.print(f"model: {p.name}, {p.model.weights}", soft_wrap=True)
    console.print(f"patch: {str(p.report).partition(chr(10))[0]}")
    if "reference" in p.backend:
        console.print(
            "The reference backend ran: plain PyTorch, which fuses nothing and is not faster. "
            "`python -m swin_kernels explain` says what kept the others from running.",
            style="yellow",
        )
    differences, costs, remark = _measure(p, console)

    console.print("The same numbers", style="bold")
    console.print(command.numbers_table(differences))
    parameters = sum(1 for _ in p.patched.parameters())
    console.print(
        "Largest difference (relative to the largest value): of the logits; of the gradients of "
        f"all {parameters} parameters; of each gradient relative to its own largest value."
    )
    complaints = [d.complaint for d in differences if d.complaint]
    for complaint in complaints:
        console.print(f"beyond the error rule: {complaint}", style="bold red", soft_wrap=True)
    if not complaints:
        console.print(
            "Within the error rule: off float64 by at most twice what stock is, plus one ulp.",
            style="green",
        )
    console.print("\nWhat they cost", style="bold")
    console.print(_cost_table(costs))
    memory = "allocated on the device" if p.images.is_cuda else "resident, in a process of its own"
    console.print(
        f"Medians of {p.rounds} calls, stock and patched in turn. A training step is forward, loss "
        "and backward.\nPeak memory is what a step adds to the weights and images already there "
        f"({memory})."
    )
    if remark:
        console.print(remark, style="yellow", soft_wrap=True)
    if p.model.pretrained and p.model.module.num_classes == 1000:
        console.print("\nWhat it sees", style="bold")
        console.print("\n".join(_top_classes(p)))
    console.print()
    console.print(_draw(p), soft_wrap=True)
    return 1 if complaints else 0
