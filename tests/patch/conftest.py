"""What a test of the patches may ask for: calls recorded, and a patch that is seen to run fused."""

from __future__ import annotations

import pytest

from swin_kernels.ops import layers
from swin_kernels.patch.core import patch
from swin_kernels.testing.timing import counted_backends


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the operation that a patched block makes."""
    op, recorded = layers.shifted_window_attention_qkvpacked, []

    def recording(qkv, window, shift, **options):
        recorded.append({"size": tuple(qkv.shape[1:3]), "window": window, "shift": shift} | options)
        return op(qkv, window, shift, **options)

    monkeypatch.setattr(layers, "shifted_window_attention_qkvpacked", recording)
    return recorded


@pytest.fixture
def on_cpu_kernels(cpu_kernels):
    """`patch` for the C++ backend, which never falls back; fails unless calls arrived there."""

    def patch_all(model):
        report = patch(model, backend="cpu")
        assert report.left == {}
        assert report.replaced

    with counted_backends() as calls:
        yield patch_all
    assert calls["cpu"], "no call reached the C++ kernels"
