"""What the tests of tests/gpu share: whether they are rehearsed, and at which sizes."""

from __future__ import annotations

import os

import pytest

REHEARSED = bool(os.environ.get("SWIN_KERNELS_REHEARSE"))
gpu_only = pytest.mark.gpu_dry_run if REHEARSED else pytest.mark.gpu


def sized(real, toy):
    return toy if REHEARSED else real
