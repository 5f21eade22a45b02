"""What both kinds of GPU kernels ask of the device and of torch's settings."""

from __future__ import annotations

import torch

from swin_kernels.backends.tracing import asked_while_tracing

OLDEST_CAPABILITY = (8, 0)


def too_old(device: torch.device) -> str | None:
    """Why an NVIDIA GPU cannot run the kernels, if its compute capability is too low."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    return f"needs compute capability 8.0 or newer, {device} has {'.'.join(map(str, capability))}"


@asked_while_tracing
def tf32_allowed() -> bool:
    """Whether the user allowed TF32 in products of fp32, in the old way or in the new."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
