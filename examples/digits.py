"""A small Swin that reads handwritten digits: 1,797 of them, which scikit-learn ships.

    python -m examples.digits                                  minutes on two cores
    python -m examples.digits --init out/simmim/model.pt       from the weights of examples.simmim
    torchrun --nproc-per-node 2 -m examples.digits --wrap fsdp

Prints the share of the 360 digits of the test set that it reads right. `--gate` puts a module of
one's own (gate.py) before the attention of every block.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import augmented, digits
from examples.gate import ChannelGate
from examples.training import (
    add_options,
    checked,
    device,
    made,
    processes,
    rank,
    say,
    train,
    world,
)
from swin_kernels.models import SwinConfig, SwinTransformer, load

SIZE = 32  # pixels on a side, upscaled from 8


def config(embed_dim: int) -> SwinConfig:
    """Patches of 4², windows of 4²: maps of 8² and 4² tokens."""
    return SwinConfig(
        embed_dim=embed_dim,
        depths=(2, 4),
        num_heads=(2, 4),
        window_size=4,
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        drop_path_rate=0.05,
    )


def make_model(options: argparse.Namespace) -> SwinTransformer:
    torch.manual_seed(options.seed)
    gate = ChannelGate if options.gate else None
    changes = {} if options.drop_path is None else {"drop_path_rate": options.drop_path}
    model = SwinTransformer(config(options.embed_dim), before_attention=gate, **changes)
    if options.init is not None:
        loaded = load(model, options.init, head=False)
        say(f"{options.init}: {len(loaded.missing)} tensors stay as they were")
    return model


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that `model` reads right."""
    model.eval()
    right = [
        (model(x.to(device())).argmax(1).cpu() == y).sum()
        for x, y in zip(images.split(120), labels.split(120))
    ]
    return float(sum(right)) / len(labels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A small Swin learns handwritten digits.")
    add_options(parser, steps=2000, batch=64, lr=4e-3)
    parser.add_argument("--init", type=Path, metavar="FILE", help="model.pt of simmim.py")
    parser.add_argument("--gate", action="store_true", help="gate.py in every block")
    parser.add_argument("--embed-dim", type=int, default=32, help="channels (32)")
    parser.add_argument("--drop-path", type=float, help="stochastic depth (0.05)")
    options = parser.parse_args(arguments)
    checked(parser, options)
    if options.gate and world() > 1:
        parser.error("--gate: its batch norm sees the part of one process: start one process")
    (images, labels), test = digits(SIZE, getattr(torch, options.dtype))
    if options.batch > len(images):
        parser.error(f"--batch: expected at most the {len(images)} images, got {options.batch}")
    model = made(parser, make_model, options)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(options.seed * options.steps + step)
        chosen = torch.randperm(len(images), generator=generator)[: options.batch]
        return augmented(images[chosen], generator), labels[chosen]

    with processes():
        model = train(model, loss_of, batch_at, options)
        share = accuracy(model, *test)
    say(f"test accuracy {100 * share:.2f} % of {len(test[1])} digits")
    if rank() == 0:
        (options.out / "accuracy.txt").write_text(f"{share:.6f}\n")


if __name__ == "__main__":
    main()
