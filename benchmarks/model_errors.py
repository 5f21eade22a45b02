"""How far a patched model is off float64, beside how far stock is.

    python -m benchmarks.model_errors [--images 6] [--models NAME …]

Behind a whole model the error of a gradient of three numbers is sampling noise. So this prints,
for each kind of parameter, the geometric mean over blocks and images of the ratio of root mean
square errors, patched ÷ stock, and how often one gradient breaks the error rule by itself.
"""

from __future__ import annotations

import argparse
import collections
import copy
import math
import re

import torch

import swin_kernels
from swin_kernels.backends.native import cpu_capability
from swin_kernels.cli.command import processor
from swin_kernels.cli.inputs import load_model
from swin_kernels.testing.timing import run_once

MODELS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")


def errors_of(name: str, images: int) -> dict[str, list[tuple[float, bool]]]:
    """For each kind of parameter: (log of the ratio of errors, whether it breaks the rule)."""
    model = load_model(name)
    stock, patched = model.module, copy.deepcopy(model.module)
    exact = copy.deepcopy(stock).double()
    swin_kernels.patch(patched, backend="cpu")
    found = collections.defaultdict(list)
    for seed in range(images):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(1, 3, model.height, model.width, generator=generator)
        ours, theirs, best = (run_once(m, image).grads for m in (patched, stock, exact))
        for parameter, grad in best.items():
            kind = re.sub(r".*attn\.", "attn.", parameter) if "attn." in parameter else "all others"
            e, f = ((g[parameter].double() - grad).abs() for g in (ours, theirs))
            allowed = 2 * f.max() + torch.finfo(torch.float32).eps * grad.abs().max()
            ratio = float(e.square().mean() / f.square().mean().clamp_min(1e-60)) ** 0.5
            found[kind].append((math.log(max(ratio, 1e-6)), bool(e.max() > allowed)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    print(f"{processor()}, {cpu_capability()}, torch {torch.__version__}, {options.images} images")
    print("\n| model | gradients of | patched ÷ stock | single draws over the rule |")
    print("|---|---|---|---|")
    for name in options.models:
        for kind, draws in sorted(errors_of(name, options.images).items()):
            ratio = math.exp(sum(log for log, _ in draws) / len(draws))
            broken = sum(over for _, over in draws)
            print(f"| {name} | {kind} | {ratio:.2f} | {broken} of {len(draws)} |")


if __name__ == "__main__":
    main()
