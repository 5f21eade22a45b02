"""Pictures for the examples: scikit-learn's digits, and shapes drawn on the fly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ("disc", "square", "triangle")


def digits(size: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 digits, 8×8, upscaled: 1,437 images and labels to train, 360 to test.

    Images are (N, 1, size, size), about 0 ± 1.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    parts = train_test_split(
        found.images, found.target, test_size=360, random_state=0, stratify=found.target
    )
    train, test, train_labels, test_labels = (torch.as_tensor(part) for part in parts)

    def scaled(images: Tensor) -> Tensor:
        images = F.interpolate(images[:, None], (size, size), mode="bicubic", align_corners=False)
        return ((images - 4.9) / 6.0).to(dtype)  # mean and deviation of the training pixels

    return (scaled(train), train_labels), (scaled(test), test_labels)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, size, size) turned by up to 12°, scaled and moved by up to a tenth."""
    turned, scale, right, down = (
        2 * torch.rand(4, len(images), generator=generator, dtype=images.dtype) - 1
    )
    angle, scale = turned * math.radians(12), 1 + 0.1 * scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack((cos, -sin, 0.2 * right, sin, cos, 0.2 * down), 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def shapes(
    number: int, size: int, generator: torch.Generator
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pictures (number, 3, size, size) of one to three discs, squares and triangles on noise.

    And for each picture what torchvision's detectors train on: boxes (n, 4) as x0, y0, x1, y1 in
    pixels, labels (n,) from 1, masks (n, size, size). What is drawn later lies on top.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = 0.3 * torch.randn(number, 3, size, size, generator=generator)
    targets = []
    for image in images:
        masks, labels = [], []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            radius, row, column = torch.rand(3, generator=generator)
            r = float(size * (0.1 + 0.12 * radius))
            cy, cx = (float(r + (size - 2 * r) * place) for place in (row, column))
            label = int(torch.randint(len(SHAPES), (), generator=generator))
            if label == 0:
                inside = (x - cx) ** 2 + (y - cy) ** 2 <= r**2
            elif label == 1:
                inside = ((x - cx).abs() <= 0.9 * r) & ((y - cy).abs() <= 0.9 * r)
            else:  # the tip above, the sides steep
                inside = ((x - cx).abs() <= (y - cy + r) / 2) & ((y - cy).abs() <= r)
            colour = torch.rand(3, generator=generator) + 0.5
            image[:, inside] = colour[:, None] * (1 + 0.1 * image[:, inside])
            masks = [mask & ~inside for mask in masks] + [inside]
            labels.append(label + 1)
        seen = [i for i, mask in enumerate(masks) if mask.sum() >= 16]
        kept = torch.stack([masks[i] for i in seen])
        boxes = []
        for mask in kept:
            rows, columns = mask.nonzero().unbind(1)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor([labels[i] for i in seen]),
                "masks": kept.to(torch.uint8),
            }
        )
    return images, targets
