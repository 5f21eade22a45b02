"""Prints the peak memory of each step of one model; a process for `measure.peak_memory`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from swin_kernels.demo.measure import STEPS

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_of(step: str, module: nn.Module, images: Tensor) -> int:
    """Bytes that a step adds at its peak; OSError where the system does not tell."""
    module.train(step == "training step")
    STEPS[step](module, images[:1])  # libraries load, and keep, what they need once
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

    name, variant, batch, threads, device = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    module = timm.create_model(name, pretrained=False).to(device)
    if variant == "patched":
        patch(module)
    _, height, width = timm.data.resolve_data_config(model=module)["input_size"]
    images = torch.zeros(batch, 3, height, width, device=device)
    print(json.dumps({step: peak_of(step, module, images) for step in STEPS}))


if __name__ == "__main__":
    main()
