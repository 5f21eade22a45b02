"""The MLP half of our own models' blocks: one operation where it can be, modules where not."""

from __future__ import annotations

import pytest
import torch

from swin_kernels.models import layers
from swin_kernels.models.layers import DropPath, Mlp, add_mlp
from swin_kernels.ops.sublayers import mlp_sublayer


@pytest.fixture
def fused(monkeypatch):
    """The calls of the operation."""
    calls = []

    def recording(*arguments, **options):
        calls.append(options)
        return mlp_sublayer(*arguments, **options)

    monkeypatch.setattr(layers, "mlp_sublayer", recording)
    return calls


def _parts(drop=0.0, drop_path=0.0):
    torch.manual_seed(0)
    return torch.nn.LayerNorm(24), Mlp(24, 96, drop), DropPath(drop_path)


@pytest.mark.parametrize("norm_last", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_half_equals_its_modules(norm_last, p, fused):
    parts, x = _parts(drop_path=p), torch.randn(6, 5, 5, 24)
    torch.manual_seed(1)
    ours = add_mlp(x, *parts, norm_last)
    assert len(fused) == 1
    parts[1].register_forward_hook(lambda *_: None)  # its modules are called now
    torch.manual_seed(1)
    torch.testing.assert_close(ours, add_mlp(x, *parts, norm_last))
    assert len(fused) == 1


def test_dropout_at_work_and_named_reference_call_the_modules(fused):
    x = torch.randn(2, 5, 5, 24)
    add_mlp(x, *_parts(drop=0.1), False)
    add_mlp(x, *_parts(), False, "reference")
    assert fused == []
    norm, mlp, drop_path = _parts(drop=0.1)
    add_mlp(x, norm, mlp.eval(), drop_path, False)
    assert len(fused) == 1


def test_norm_without_weight_and_hooks_on_all_modules_call_the_modules(fused):
    x, (_, mlp, drop_path) = torch.randn(2, 5, 5, 24), _parts()
    norm = torch.nn.LayerNorm(24, elementwise_affine=False)
    torch.testing.assert_close(add_mlp(x, norm, mlp, drop_path, False), x + mlp(norm(x)))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    add_mlp(x, *_parts(), False)
    handle.remove()
    assert fused == []
    add_mlp(x, *_parts(), False)
    assert len(fused) == 1
