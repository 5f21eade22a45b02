"""Fixtures of what only a GPU can show: the device, or one made up."""

from __future__ import annotations

import pytest
import torch
from gpu_dry_run import REHEARSED

from benchmarks.device import Cuda, DryRunDevice


@pytest.fixture
def device(mode):
    found = DryRunDevice() if REHEARSED else Cuda()
    found.backend = mode.fused
    yield found
    found.release()  # several processes may share the device


@pytest.fixture
def exact_products():
    """fp32 convolutions in fp32, as products are by default; undone afterwards."""
    assert torch.get_float32_matmul_precision() == "highest"
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
