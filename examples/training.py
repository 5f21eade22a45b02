"""The training loop of the examples, in one process or in those of torchrun: plain, DDP or FSDP2.

A step is a pure function of its number and of the weights: `batch_at(step)` gives the batch of all
processes, of which each takes its part, and torch's generator is seeded by the step. So a run that
was killed resumes from its last checkpoint to the very same weights, bit for bit, and two processes
reach those of one up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

Model = TypeVar("Model")
Batch = Sequence[Any]  # tensors and lists of one length, the batch
# all other options a resumed run must have in common with the one that it goes on with
MAY_CHANGE = ("out", "resume", "wrap", "save_every")
NOT_DECAYED = ("relative_position_bias_table", "cpb_mlp", "logit_scale", "token", "pos_embed")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def add_options(parser: argparse.ArgumentParser, steps: int, batch: int, lr: float) -> None:
    """Those of the loop, with the defaults of an example."""
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"steps of the optimizer ({steps})")
    add("--batch", type=int, default=batch, help=f"images a step, of all processes ({batch})")
    add("--lr", type=float, default=lr, help=f"largest learning rate ({lr})")
    add("--weight-decay", type=float, default=0.05, help="of AdamW (0.05)")
    add("--warmup", type=int, default=20, help="steps in which the rate rises (20)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout (0)")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--out", type=Path, default=Path("out"), help="checkpoint, weights, loss curve (out)")
    add("--save-every", type=int, default=100, metavar="STEPS", help="between checkpoints (100)")
    add("--resume", action="store_true", help="goes on from the checkpoint in --out")
    add(
        "--wrap",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: DistributedDataParallel, or FSDP2's fully_shard (ddp)",
    )


def checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where the loop's options do not fit each other."""
    for least, names in ((1, ("steps", "batch", "save_every")), (0, ("warmup", "weight_decay"))):
        for name in names:
            if not getattr(options, name) >= least:
                parser.error(f"{_option(name)}: expected at least {least}")
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr: expected a number above 0, got {options.lr}")
    if options.batch % world() != 0:
        parser.error(f"--batch: expected a multiple of {world()} processes, got {options.batch}")
    if options.resume and not (options.out / "checkpoint.pt").is_file():
        parser.error(f"--resume: there is no checkpoint.pt in {options.out}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")


def made(parser: argparse.ArgumentParser, make: Callable[..., Model], *arguments: Any) -> Model:
    """What `make` returns; ends the program with the reason where it cannot."""
    try:
        return make(*arguments)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def world() -> int:
    """Processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The group of torchrun's processes, where there are several: gloo on CPUs, NCCL on GPUs."""
    if world() == 1:
        yield
        return
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def say(message: str) -> None:
    """Printed once, whatever the number of processes."""
    if rank() == 0:
        print(message, flush=True)


def _wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if world() == 1:
        return model
    if wrap == "ddp":
        return DistributedDataParallel(model)
    for block in model.modules():
        if type(block).__name__.endswith("Block"):  # a Swin's or a ViT's
            fully_shard(block)
    fully_shard(model)
    return model


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or any(part in name for part in NOT_DECAYED)
        (others if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr)


def _rate(step: int, options: argparse.Namespace) -> float:
    """Linear to the largest, then down half a cosine."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


def _mine(x: Any) -> Any:
    """This process's part of a batch, on its device."""
    part = x[rank() :: world()]
    return part.to(device()) if isinstance(part, Tensor) else part


def _save(path: Path, content: object) -> None:
    """All or nothing: a process may be killed while it writes."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(content, unfinished)
        os.replace(unfinished, path)


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """What decides the weights that a run ends with."""
    chosen = {n: str(value) for n, value in vars(options).items() if n not in MAY_CHANGE}
    program = getattr(sys.modules["__main__"], "__file__", None) or ""  # none where it is no file
    return {"program": Path(program).stem} | chosen


def _resumed(path: Path, model, optimizer, options: argparse.Namespace) -> list[float]:
    """The losses of the steps that are done."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(saved["settings"])
    except Exception as error:  # of a damaged file: whatever its reader runs into
        sys.exit(f"--resume: {path} is no checkpoint of these examples: {error}")
    now = _settings(options)
    other = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    if other:
        was = ", ".join(f"{_option(name)} {before.get(name)}" for name in sorted(other))
        sys.exit(f"--resume: the run in {path.parent} was started with {was}")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=WHOLE,
    )
    return list(saved["losses"])


def train(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    batch_at: Callable[[int], Batch],
    options: argparse.Namespace,
) -> nn.Module:
    """Trains, and leaves in `options.out`: checkpoint.pt, model.pt, loss.csv and loss.png.

    `loss_of(model, *batch)` is the mean over a batch; `model` is wrapped by then. Returns it.
    """
    dtype = getattr(torch, options.dtype)
    model = _wrapped(model.to(device(), dtype), options.wrap).train()
    optimizer = _optimizer(model, options)
    path = options.out / "checkpoint.pt"
    losses = _resumed(path, model, optimizer, options) if options.resume else []
    if rank() == 0 and not options.resume:
        path.unlink(missing_ok=True)  # of another run
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=rank() != 0) as bar:
        task = bar.add_task("training", total=options.steps, completed=len(losses), loss=math.nan)
        for step in range(len(losses), options.steps):
            torch.manual_seed((options.seed * options.steps + step) * world() + rank())
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, options)
            loss = loss_of(model, *(_mine(x) for x in batch_at(step)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            shown = loss.detach().clone()
            if world() > 1:
                dist.all_reduce(shown)
            losses.append(float(shown) / world())
            bar.update(task, advance=1, loss=losses[-1])
            if (step + 1) % options.save_every == 0 and step + 1 < options.steps:
                state = get_state_dict(model, optimizer, options=WHOLE)
                content = {"model": state[0], "optimizer": state[1]}
                _save(path, content | {"losses": losses, "settings": _settings(options)})
    _save(options.out / "model.pt", get_model_state_dict(model, options=WHOLE))
    if rank() == 0:
        _draw(losses, options.out)
    return model


def _draw(losses: list[float], out: Path) -> None:
    """loss.csv and loss.png."""
    from matplotlib.figure import Figure

    with open(out / "loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss"))
        writer.writerows((i, repr(loss)) for i, loss in enumerate(losses))
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, linewidth=0.6, alpha=0.4, color="#3070b0")
    width = max(len(losses) // 30, 1)  # of a running mean, under which a trend is seen
    means = torch.tensor(losses).unfold(0, width, 1).mean(1)
    axes.plot(range(width - 1, len(losses)), means, color="#3070b0", label=f"mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png")
