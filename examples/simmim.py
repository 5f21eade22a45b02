"""SimMIM on scikit-learn's digits: a Swin learns to fill in what is hidden, without labels.

    python -m examples.simmim --out out/simmim                 minutes on two cores
    python -m examples.digits --init out/simmim/model.pt

Leaves in --out the weights and reconstructed.png: what the encoder saw of digits that it was not
trained on, what it made of that, and the digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.data import augmented, digits
from examples.digits import SIZE, config
from examples.training import add_options, checked, device, made, processes, rank, say, train
from swin_kernels.models import SimMIM, SwinTransformer, random_masks

MASK_PATCH = 8  # pixels on a side: 16 squares an image, of which 60 % are hidden


def make_model(options: argparse.Namespace) -> SimMIM:
    torch.manual_seed(options.seed)
    changes = {} if options.drop_path is None else {"drop_path_rate": options.drop_path}
    # an encoder without a head: it would have no gradient
    encoder = SwinTransformer(config(options.embed_dim), num_classes=0, **changes)
    return SimMIM(encoder, MASK_PATCH, mask_ratio=0.6)


def loss_of(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return model(images, masks)


@torch.no_grad()
def hidden_error(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean error of the hidden pixels."""
    model.eval()
    return float(model(images.to(device()), masks.to(device())))


@torch.no_grad()
def draw(model: SimMIM, images: Tensor, masks: Tensor, path: Path) -> None:
    """Rows of what was seen, what was made of it, and what was there."""
    from matplotlib.figure import Figure

    hidden = masks.repeat_interleave(MASK_PATCH, 1).repeat_interleave(MASK_PATCH, 2)[:, None]
    made = model.reconstruct(images.to(device()), masks.to(device())).cpu()
    rows = {
        "seen": images.masked_fill(hidden, float("nan")),
        "made": torch.where(hidden, made, images),
        "there": images,
    }
    figure = Figure(figsize=(len(images), 3.2), dpi=100, layout="constrained")
    for axes, (name, row) in zip(figure.subplots(3, 1), rows.items()):
        strip = torch.cat(list(row[:, 0]), 1)
        axes.imshow(strip.numpy(), cmap="gray", vmin=-1, vmax=2)
        axes.set_facecolor("#7090c0")
        axes.set_ylabel(name)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SimMIM on handwritten digits.")
    add_options(parser, steps=1000, batch=64, lr=2e-3)
    parser.add_argument("--embed-dim", type=int, default=32, help="channels (32)")
    parser.add_argument("--drop-path", type=float, help="stochastic depth (0.05)")
    options = parser.parse_args(arguments)
    checked(parser, options)
    (images, _), (others, _) = digits(SIZE, getattr(torch, options.dtype))
    if options.batch > len(images):
        parser.error(f"--batch: expected at most the {len(images)} images, got {options.batch}")
    model = made(parser, make_model, options)
    grid = (SIZE // MASK_PATCH, SIZE // MASK_PATCH)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(options.seed * options.steps + step)
        chosen = torch.randperm(len(images), generator=generator)[: options.batch]
        masks = random_masks(options.batch, grid, generator=generator)
        return augmented(images[chosen], generator), masks

    masks = random_masks(len(others), grid, generator=torch.Generator().manual_seed(1))
    with processes():
        trained = train(model, loss_of, batch_at, options)
        error = hidden_error(trained, others, masks)
    say(f"mean error of hidden pixels of {len(others)} other digits: {error:.4f}")
    if rank() == 0:
        model = make_model(options).to(device(), getattr(torch, options.dtype)).eval()
        model.load_state_dict(torch.load(options.out / "model.pt", weights_only=True))
        draw(model, others[:10], masks[:10], options.out / "reconstructed.png")


if __name__ == "__main__":
    main()
