"""Prints the peak memory of each step of one model; a process for `measure.peak_memory`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from swin_kernels.cli import inputs
from swin_kernels.testing.timing import STEPS, Spec

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_of(step: str, module: nn.Module, images: Tensor, first: Tensor) -> int:
    """Bytes that a step adds at its peak; OSError where the system does not tell.

    It is taken on `first` before: libraries load, and keep, what they need once.
    """
    module.train(step == "training step")
    STEPS[step](module, first)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        STEPS[step](module, images)
        return torch.cuda.max_memory_allocated(images.device) - before
    _CLEAR.write_text("5")  # the high-water mark starts again at what is held now
    before = _resident("VmRSS")
    STEPS[step](module, images)
    return max(_resident("VmHWM") - before, 0)


def main() -> None:
    import timm

    from swin_kernels.patch import patch

    variant, *wanted = json.loads(sys.argv[1])
    spec = Spec(*wanted)
    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.dtype)
    module = inputs.create(spec.model, spec.size).to(spec.device, dtype)
    if variant == "patched":
        patch(module)
    size = spec.size or timm.data.resolve_data_config(model=module)["input_size"][1:]
    images = torch.zeros(spec.batch, 3, *size, device=spec.device, dtype=dtype)
    if spec.compiled:
        module.compile()
    # another batch would be compiled again
    first = images if spec.compiled else images[:1]
    print(json.dumps({step: peak_of(step, module, images, first) for step in STEPS}))


if __name__ == "__main__":
    main()
