"""Which kernels a step of a compiled model spends its time in: patched beside stock.

python -m benchmarks.gpu_tools.model_kernels --out FILE [--rehearse]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Cuda, Device, DryRunDevice
from benchmarks.models import MODELS, TOYS, Models
from swin_kernels.testing.timing import STEPS

FORMS = ("patched, compiled", "stock, compiled")
MOST_KERNELS = 30
NAME_WIDTH = 70


def kernels_of(models: Models, form: str, step: str) -> str:
    """A table: the kernels of one step, the longest first."""
    models.form(form).train(step == "training step")
    call, on_gpu = STEPS[step], models.device.name == "cuda"
    for _ in range(3):
        call(models.form(form), models.images)
    models.device.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call(models.form(form), models.images)
        models.device.wait()
    return profiler.key_averages().table(
        sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total",
        row_limit=MOST_KERNELS,
        max_name_column_width=NAME_WIDTH,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the tables go")
    parser.add_argument("--rehearse", action="store_true", help="a toy on a CPU")
    options = parser.parse_args(arguments)
    device: Device = DryRunDevice() if options.rehearse else Cuda()
    known = TOYS if options.rehearse else MODELS
    name = next(iter(known))
    models = Models(name, device, known)
    with options.out.open("w") as file:
        for form in FORMS:
            for step in ("training step", "inference"):
                torch._dynamo.reset()
                file.write(f"{name}: {form}: {step}\n{kernels_of(models, form, step)}\n")
                file.flush()
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
