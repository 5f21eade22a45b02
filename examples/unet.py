"""A U-Net on a Swin's four maps: which pixel belongs to a disc, a square or a triangle.

    python -m examples.unet            minutes on two cores

Pictures are drawn on the fly. Prints the mean intersection over union of the four classes on
pictures it has not seen, before and after, and leaves unet.png in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import SHAPES, shapes
from examples.training import add_options, checked, device, processes, rank, say, train
from swin_kernels.models import SwinTransformer

CLASSES = 1 + len(SHAPES)  # the ground, and the shapes


class Up(nn.Module):
    """A map twice as large, joined with the encoder's of that size."""

    def __init__(self, channels: int, skipped: int, out: int) -> None:
        super().__init__()
        self.join = nn.Sequential(
            nn.Conv2d(channels + skipped, out, 3, padding=1, bias=False),
            nn.GroupNorm(4, out),
            nn.GELU(),
        )

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        """(B, channels, h, w) and (B, skipped, H, W) -> (B, out, H, W)."""
        x = F.interpolate(x, skipped.shape[2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat((x, skipped), 1))


class SwinUNet(nn.Module):
    """Logits of each pixel (B, classes, height, width), for images of any size."""

    def __init__(self, backbone: SwinTransformer, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [backbone.config.embed_dim << i for i in range(len(backbone.config.depths))]
        self.ups = nn.ModuleList(
            Up(widths[i + 1], widths[i], widths[i]) for i in reversed(range(len(widths) - 1))
        )
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU())
        self.last = Up(widths[0], 16, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, classes, height, width)."""
        *others, x = self.backbone(image)
        for up, skipped in zip(self.ups, reversed(others)):
            x = up(x, skipped)
        return self.head(self.last(x, self.stem(image)))


def pictures(number: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (number, 3, size, size) and the class of each pixel (number, size, size)."""
    images, targets = shapes(number, size, torch.Generator().manual_seed(seed))
    classes = torch.zeros(number, size, size, dtype=torch.int64)
    for i, target in enumerate(targets):
        for mask, label in zip(target["masks"], target["labels"]):
            classes[i][mask.bool()] = label
    return images, classes


def loss_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(images), classes)


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(x.to(device())).argmax(1).cpu() for x in images.split(16)])


def overlap(found: Tensor, classes: Tensor) -> float:
    """Mean intersection over union of the classes."""
    scores = []
    for c in range(CLASSES):
        both, either = (found == c) & (classes == c), (found == c) | (classes == c)
        scores.append(float(both.sum() / either.sum().clamp(min=1)))
    return sum(scores) / CLASSES


def draw(images: Tensor, classes: Tensor, found: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(images), 5), dpi=100, layout="constrained")
    panels = figure.subplots(3, len(images))
    for column, image in enumerate(images):
        panels[0, column].imshow(image.permute(1, 2, 0).add(0.5).div(2.5).clamp(0, 1).numpy())
        for row, of in ((1, classes), (2, found)):
            panels[row, column].imshow(of[column].numpy(), cmap="tab10", vmin=0, vmax=9)
    for row, name in enumerate(("image", "drawn", "found")):
        panels[row, 0].set_ylabel(name)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.savefig(path)


def make_model(options: argparse.Namespace) -> SwinUNet:
    torch.manual_seed(options.seed)
    backbone = SwinTransformer(
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        img_size=options.size,
        features_only=True,
    )
    return SwinUNet(backbone, CLASSES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A U-Net on a Swin learns to tell shapes apart.")
    add_options(parser, steps=500, batch=16, lr=2e-3)
    parser.add_argument("--size", type=int, default=96, help="pixels on a side (96)")
    options = parser.parse_args(arguments)
    checked(parser, options)
    if options.size < 32:
        parser.error(f"--size: expected at least 32, got {options.size}")
    test = pictures(48, options.size, seed=10_000_000 + options.seed)

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        return pictures(options.batch, options.size, options.seed * options.steps + step)

    with processes():
        model: nn.Module = make_model(options)
        before = overlap(predicted(model.to(device()), test[0]), test[1])
        model = train(model, loss_of, batch_at, options)
        found = predicted(model, test[0])
    say(f"mean intersection over union {before:.3f} -> {overlap(found, test[1]):.3f}")
    if rank() == 0:
        draw(test[0][:6], test[1][:6], found[:6], options.out / "unet.png")


if __name__ == "__main__":
    main()
