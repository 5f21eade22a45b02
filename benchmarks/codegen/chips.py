"""GPUs by name, with what predictions ask of them.

NVIDIA's data sheets, and the CUDA programming guide's tables of compute capabilities.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.backends.triton.launch_spec import Gpu


@dataclass(frozen=True)
class Chip:
    """One GPU."""

    name: str  # part of what the driver calls it
    arch: str
    multiprocessors: int
    clock: float  # Hz, under load
    copy_rate: float  # bytes a second, read and written
    matrix: int  # FLOP of half precision summed in fp32, a clock and multiprocessor
    fp32: int  # lanes a clock and multiprocessor, of fp32
    arithmetic: int  # of integer, logical, comparing and converting instructions
    shared: int  # bytes that all programs of a multiprocessor have
    warps: int
    programs: int

    @property
    def gpu(self) -> Gpu:
        """What configurations ask of it."""
        return replace(KNOWN_GPUS[self.arch], multiprocessors=self.multiprocessors)


# a copy is taken to reach nine tenths of the data sheet's rate (H200: 4.3 of 4.8 TB/s; A100: 80 GB)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "sm_80", 108, 1.41e9, 0.9 * 2.04e12, 2048, 64, 64, 164 << 10, 64, 32),
        Chip("L40S", "sm_89", 142, 2.52e9, 0.9 * 0.864e12, 1024, 128, 64, 100 << 10, 48, 24),
        Chip("RTX 4090", "sm_89", 128, 2.52e9, 0.9 * 1.008e12, 512, 128, 64, 100 << 10, 48, 24),
        Chip("H100", "sm_90", 132, 1.755e9, 0.9 * 3.35e12, 4096, 128, 64, 228 << 10, 64, 32),
        Chip("H200", "sm_90", 132, 1.755e9, 4.3e12, 4096, 128, 64, 228 << 10, 64, 32),
        Chip("B200", "sm_100", 148, 1.85e9, 0.9 * 8.0e12, 8192, 128, 64, 228 << 10, 64, 32),
        Chip("RTX 5090", "sm_120", 170, 2.4e9, 0.9 * 1.79e12, 512, 128, 64, 100 << 10, 48, 24),
    )
}


def chip_named(device: str) -> Chip | None:
    """The chip that a device's name names, as the driver gives it; None if it is not known."""
    # a GH200 is no H200
    return next((c for c in CHIPS.values() if re.search(rf"\b{c.name}\b", device)), None)
