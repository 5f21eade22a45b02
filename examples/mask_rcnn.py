"""torchvision's Mask R-CNN with a feature pyramid on a Swin's four maps.

    python -m examples.mask_rcnn       minutes on two cores

Pictures of discs, squares and triangles are drawn on the fly. Prints, for pictures it has not seen,
the share of shapes that it finds (a box of the right class with an overlap of one half), before and
after, and leaves mask_rcnn.png in --out.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from examples.data import SHAPES, shapes
from examples.training import add_options, checked, device, processes, rank, say, train
from swin_kernels.models import SwinTransformer


class SwinFPN(nn.Module):
    """Maps of one width at strides 4, 8, 16, 32 and 64, by name, as torchvision's detectors ask."""

    def __init__(self, backbone: SwinTransformer, out_channels: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [backbone.config.embed_dim << i for i in range(len(backbone.config.depths))]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, height, width) -> the maps, "0" to "3" and "pool"."""
        maps = self.backbone(image)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


def make_model(size: int, seed: int) -> MaskRCNN:
    torch.manual_seed(seed)
    backbone = SwinTransformer(
        embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), img_size=size, features_only=True
    )
    sides = [(8 << level,) for level in range(5)]  # of anchors, a size for each map
    return MaskRCNN(
        SwinFPN(backbone, out_channels=64),
        num_classes=1 + len(SHAPES),
        min_size=size,
        max_size=size,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_detections_per_img=10,
    )


def loss_of(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    """The sum of the five losses: proposals, boxes, classes, masks."""
    there = [{name: t.to(device()) for name, t in target.items()} for target in targets]
    return sum(model(list(images), there).values(), torch.zeros((), device=device()))


@torch.no_grad()
def detections(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    model.eval()
    found = [d for x in images.split(8) for d in model(list(x.to(device())))]
    return [{name: t.cpu() for name, t in d.items()} for d in found]


def recall(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> float:
    """The share of shapes that some detection of their class covers by one half."""
    hits = shapes_in_all = 0
    for detected, target in zip(found, targets):
        sure = detected["scores"] >= 0.5
        boxes, labels = detected["boxes"][sure], detected["labels"][sure]
        same = labels[:, None] == target["labels"]
        close = (box_iou(boxes, target["boxes"]) >= 0.5) & same
        hits += int(close.any(0).sum())
        shapes_in_all += len(target["labels"])
    return hits / shapes_in_all


def draw(images: Tensor, found: list[dict[str, Tensor]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.2 * len(images), 2.4), dpi=100, layout="constrained")
    for axes, image, detected in zip(figure.subplots(1, len(images)), images, found):
        axes.imshow(image.permute(1, 2, 0).add(0.5).div(2.5).clamp(0, 1).numpy())
        parts = (detected[name] for name in ("boxes", "labels", "scores", "masks"))
        for box, label, score, mask in zip(*parts):
            if score < 0.5:
                continue
            x0, y0, x1, y1 = box.tolist()
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white"))
            axes.text(x0, y0 - 2, f"{SHAPES[label - 1]} {score:.2f}", color="white", fontsize=7)
            axes.contour(mask[0].numpy(), levels=[0.5], colors="red", linewidths=1)
        axes.set_axis_off()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A Mask R-CNN on a Swin learns to find shapes.")
    add_options(parser, steps=150, batch=4, lr=1e-3)
    parser.add_argument("--size", type=int, default=128, help="pixels on a side (128)")
    options = parser.parse_args(arguments)
    checked(parser, options)
    if options.size < 48:
        parser.error(f"--size: expected at least 48, got {options.size}")
    if options.dtype != "float32":
        parser.error("--dtype: torchvision's detectors compute in float32")
    test = shapes(32, options.size, torch.Generator().manual_seed(10_000_000 + options.seed))

    def batch_at(step: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(options.seed * options.steps + step)
        return shapes(options.batch, options.size, generator)

    with processes():
        model: nn.Module = make_model(options.size, options.seed)
        before = recall(detections(model.to(device()), test[0]), test[1])
        model = train(model, loss_of, batch_at, options)
        found = detections(model, test[0])
    say(f"shapes found {100 * before:.1f} % -> {100 * recall(found, test[1]):.1f} %")
    if rank() == 0:
        draw(test[0][:6], found[:6], options.out / "mask_rcnn.png")


if __name__ == "__main__":
    main()
