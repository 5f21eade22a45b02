"""What a test of the patches may ask for: calls recorded, and a patch that is seen to run fused."""

from __future__ import annotations

import pytest

from swin_kernels.ops import layers
from swin_kernels.patch import timm_halves
from swin_kernels.patch.core import patch
from swin_kernels.testing.timing import counted_backends


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of attention, alone or in its sublayer, by a patched block."""
    op, recorded = layers.shifted_window_attention_qkvpacked, []
    sublayer = timm_halves.window_attention_sublayer

    def record(size, window, shift, padded, options):
        facts = {"size": tuple(size), "window": window, "shift": shift, "padded": padded}
        recorded.append(facts | options)

    def recording(qkv, window, shift, **options):
        record(qkv.shape[1:3], window, shift, "pad_key" in options, options)
        return op(qkv, window, shift, **options)

    def recording_sublayer(x, *arguments, **options):
        *_, window, shift = arguments
        padded = any(s % w for s, w in zip(x.shape[1:3], window))
        record(x.shape[1:3], window, shift, padded, options)
        return sublayer(x, *arguments, **options)

    monkeypatch.setattr(layers, "shifted_window_attention_qkvpacked", recording)
    monkeypatch.setattr(timm_halves, "window_attention_sublayer", recording_sublayer)
    return recorded


@pytest.fixture
def on_cpu_kernels(cpu_kernels):
    """`patch` for the C++ backend, which never falls back; fails unless calls arrived there."""

    def patch_all(model, level="block"):
        report = patch(model, backend="cpu", level=level)
        assert report.left == {}
        assert report.replaced

    with counted_backends() as calls:
        yield patch_all
    assert calls["cpu"], "no call reached the C++ kernels"
