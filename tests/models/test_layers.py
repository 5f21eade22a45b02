"""Modules of ours that others watch, wrap or replace: drop-in attention, Swin V1 and V2, ViT."""

from __future__ import annotations

import pytest
import torch
from own_models import SMALL, VIT, stirred
from torch import nn

from swin_kernels import WindowAttention, WindowAttentionV2
from swin_kernels.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from swin_kernels.ops import dispatch
from swin_kernels.ops.layers import WATCHED, attention_of_qkv


def _swin(cls):
    # windows do not divide the maps, 13×16 and 7×8
    return cls(img_size=56, window_size=7, drop_path_rate=0.0, **SMALL), torch.randn(2, 3, 50, 61)


SUBJECTS = {
    "WindowAttention": lambda: (WindowAttention(32, (7, 5), 2), torch.randn(4, 35, 32)),
    "WindowAttentionV2": lambda: (WindowAttentionV2(32, (7, 5), 2), torch.randn(4, 35, 32)),
    "swin": lambda: _swin(SwinTransformer),
    "swinv2": lambda: _swin(SwinTransformerV2),
    "vit": lambda: (VisionTransformer(img_size=32, **VIT), torch.randn(2, 3, 32, 32)),
}
# (windows, heads, tokens, tokens) of each layer
SHAPES = {
    "WindowAttention": [(4, 2, 35, 35)],
    "WindowAttentionV2": [(4, 2, 35, 35)],
    "swin": [(2 * 2 * 3, 1, 49, 49)] * 2 + [(2 * 1 * 2, 2, 49, 49)] * 2,
    "swinv2": [(2 * 2 * 3, 1, 49, 49)] * 2 + [(2 * 1 * 2, 2, 49, 49)] * 2,
    "vit": [(2, 2, 17, 17)] * 2,
}
over_subjects = pytest.mark.parametrize("name", SUBJECTS)
OVER_WATCHED = [
    (name, module)
    for name in SUBJECTS
    for module in ("softmax", "attn_drop")
    if (name, module) != ("vit", "softmax")  # which timm's and ours have not
]
over_watched = pytest.mark.parametrize(("name", "module"), OVER_WATCHED)


def subject(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A module in float64, its parameters stirred, and an input."""
    torch.manual_seed(0)
    module, x = SUBJECTS[name]()
    return stirred(module).double(), x.double()


def named(model: nn.Module, last: str) -> list[tuple[nn.Module, nn.Module]]:
    """The module of this name in each attention, and that attention."""
    return [(m.get_submodule(last), m) for m in model.modules() if hasattr(m, "attn_drop")]


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


@over_watched
def test_hook_sees_the_probabilities_and_changes_nothing(
    name, module, cpu_kernels, caplog, monkeypatch
):
    monkeypatch.setattr(dispatch, "_already_logged", set())
    model, x = subject(name)
    expected, seen = step(model, x), []
    assert not caplog.records
    for watched, _ in named(model, module):
        watched.register_forward_hook(lambda m, inputs, out: seen.append(out.detach()))
    actual = step(model, x)
    assert [tuple(out.shape) for out in seen] == SHAPES[name]
    for out in seen:
        torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]))
    torch.testing.assert_close(actual, expected)
    assert [record.getMessage() for record in caplog.records] == [WATCHED]


@over_watched
def test_module_in_another_place_is_called(name, module, cpu_kernels):
    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) / 2

    model, x = subject(name)
    before = model(x)
    for watched, owner in named(model, module):
        setattr(owner, module, Halved(watched))
    half, grads = step(model, x)
    assert not torch.allclose(half, before)
    # halved probabilities are halved values
    for watched, owner in named(model, module):
        setattr(owner, module, watched.inner)
    for _, owner in named(model, "attn_drop"):
        with torch.no_grad():
            owner.proj.weight /= 2
    torch.testing.assert_close(model(x), half)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_hook_leaves_a_row_without_keys_at_zero(cpu_kernels):
    module, x = subject("WindowAttention")
    mask = torch.zeros(2, 35, 35, dtype=torch.float64)
    mask[0, 2] = -torch.inf
    expected = module(x, mask)
    module.softmax.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(x, mask), expected)


def test_scale_of_each_channel_is_refused(cpu_kernels):
    module, x = subject("WindowAttention")
    module.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))  # as many as heads
    with pytest.raises(ValueError, match=r"expected one number or shape \(2, 1, 1\)"):
        module(x)


def test_empty_module_for_softmax_is_called_as_the_identity(cpu_kernels):
    outs = []
    for identity in (nn.Sequential(), nn.Identity()):
        module, x = subject("WindowAttention")
        module.softmax = identity
        outs.append(module(x))
    assert torch.equal(*outs)


def test_unknown_backend_is_an_error_where_nothing_is_fused(cpu_kernels):
    model, x = subject("swin")
    for watched, owner in named(model, "attn_drop"):
        watched.register_forward_hook(lambda *_: None)
        owner.backend = "nonsense"
    with pytest.raises(ValueError, match="expected one of cpu"):
        model(x)


def test_identity_for_dropout_stays_fused(backend):
    qkv = torch.randn(1, 4, 4, 3, 2, 8)
    out = attention_of_qkv(qkv, 2, attn_drop=nn.Identity(), backend=backend)
    dropping = nn.Dropout(0.5).eval()
    assert torch.equal(out, attention_of_qkv(qkv, 2, attn_drop=dropping, backend=backend))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
@pytest.mark.parametrize("pad_order", ["pad-roll", "roll-pad"])
@pytest.mark.parametrize("wrapped", ["qkv", "proj", "proj_drop"])
def test_wrapped_layer_sees_padding_once_and_changes_nothing(name, pad_order, wrapped, cpu_kernels):
    class Counted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.tokens = layer, []

        def forward(self, x):
            batch, tokens, _ = x.shape
            self.tokens.append(batch * tokens)
            return self.layer(x)

    model, x = subject(name)
    for _, owner in named(model, "attn_drop"):
        owner.pad_order = pad_order
    expected = step(model, x)
    for layer, owner in named(model, wrapped):
        setattr(owner, wrapped, Counted(layer))
    out, grads = step(model, x)
    # images of 2×3 and 1×2 windows of 49 tokens
    counted = [layer.tokens for layer, _ in named(model, wrapped)]
    assert counted == [[2 * 6 * 49]] * 2 + [[2 * 2 * 49]] * 2
    plain = {name.replace(f"{wrapped}.layer.", f"{wrapped}."): g for name, g in grads.items()}
    torch.testing.assert_close((out, plain), expected)


@over_subjects
def test_adapter_of_qkv_trains(name, cpu_kernels):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.more = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x) + self.more(x)

    model, x = subject(name)
    before = model(x)
    for layer, owner in named(model, "qkv"):
        owner.qkv = Adapter(layer)
    out, grads = step(model, x)
    assert not torch.allclose(out, before)
    learning = [grad for name, grad in grads.items() if "qkv.more.weight" in name]
    assert len(learning) == len(SHAPES[name])
    assert all(grad.abs().max() > 0 for grad in learning)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)], ids=["number", "one", "heads"])
@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "hooked"])
def test_scale_that_is_learnt_has_its_gradient(shape, hooked, cpu_kernels):
    module, x = subject("WindowAttention")
    factor = torch.tensor([0.8, 1.3]).reshape(2, 1, 1) if shape == (2, 1, 1) else torch.ones(shape)
    module.scale = nn.Parameter((module.scale * factor).double())
    if hooked:
        module.softmax.register_forward_hook(lambda *_: None)

    def loss(scale):
        return torch.func.functional_call(module, {"scale": scale}, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, module.scale, rtol=1e-5, atol=0)


@pytest.mark.slow
@over_subjects
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_records_plain_operators(name, cpu_kernels):
    model, x = subject(name)
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), x)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert not any("swin_kernels" in kind for kind in kinds)
        torch.testing.assert_close(traced(x + 0.1), model(x + 0.1))


@pytest.mark.slow
@over_subjects
def test_onnx_export_records_plain_operators(name, cpu_kernels, monkeypatch):
    model, x = subject(name)
    with torch.no_grad():
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = torch.export.export(model.eval(), (x,)).run_decompositions()
        monkeypatch.undo()
        assert "swin_kernels" not in str(program.graph)
        torch.testing.assert_close(program.module()(x), model(x))


@over_subjects
@pytest.mark.slow
def test_onnx_runtime_gives_the_same_numbers(name, cpu_kernels, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx exports with onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    model, x = subject(name)
    model, x = model.float().eval(), x.float()
    with torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)
