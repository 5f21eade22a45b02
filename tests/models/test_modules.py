"""The modules against an unfused form of the Swin authors' window attention, keys and all."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import swin_kernels
from swin_kernels import WindowAttention, WindowAttentionV2
from swin_kernels.ops import dispatch
from swin_kernels.testing import LEAST_INPUTS, Result, assert_within_error_rule

V1_KEYS = {
    "relative_position_bias_table": (13 * 9, 4),
    "relative_position_index": (35, 35),
    "qkv.weight": (192, 64),
    "qkv.bias": (192,),
    "proj.weight": (64, 64),
    "proj.bias": (64,),
}
V2_KEYS = {
    "logit_scale": (4, 1, 1),
    "q_bias": (64,),
    "v_bias": (64,),
    "relative_coords_table": (1, 13, 9, 2),
    "relative_position_index": (35, 35),
    "cpb_mlp.0.weight": (512, 2),
    "cpb_mlp.0.bias": (512,),
    "cpb_mlp.2.weight": (4, 512),
    "qkv.weight": (192, 64),
    "proj.weight": (64, 64),
    "proj.bias": (64,),
}
KEYS = {WindowAttention: V1_KEYS, WindowAttentionV2: V2_KEYS}
BUFFERS = {"relative_position_index", "relative_coords_table"}
both = pytest.mark.parametrize("cls", [WindowAttention, WindowAttentionV2], ids=["v1", "v2"])


def _make(cls, seed=0, **options):
    """A module of 64 channels, 4 heads and a 7×5 window, its parameters stirred."""
    torch.manual_seed(seed)
    module = cls(64, (7, 5), 4, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or "logit" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def _unfused(module, x, mask=None, drop=None):
    """The forward as the authors' code states it, in its own words, from the module's state."""
    windows, tokens, dim = x.shape
    heads, state = module.num_heads, dict(module.named_parameters())
    cosine = "logit_scale" in state
    bias = state.get("qkv.bias")
    if cosine and state.get("q_bias") is not None:
        bias = torch.cat((state["q_bias"], torch.zeros_like(state["q_bias"]), state["v_bias"]))
    qkv = F.linear(x, state["qkv.weight"], bias)
    q, k, v = qkv.view(windows, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    if cosine:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * state["logit_scale"].clamp(max=math.log(100)).exp()
        hidden = F.linear(
            module.relative_coords_table, state["cpb_mlp.0.weight"], state["cpb_mlp.0.bias"]
        )
        table = F.linear(hidden.relu(), state["cpb_mlp.2.weight"]).view(-1, heads)
        table = 16 * table.sigmoid()
    else:
        logits = q * module.scale @ k.transpose(-2, -1)
        table = state["relative_position_bias_table"]
    index = module.relative_position_index.flatten()
    logits = logits + table[index].view(tokens, tokens, heads).permute(2, 0, 1)
    if mask is not None:
        images = windows // mask.shape[0]
        logits = logits.view(images, -1, heads, tokens, tokens) + mask[:, None]
        logits = logits.flatten(0, 1)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, dim)
    return F.linear(out, state["proj.weight"], state["proj.bias"])


def _measured(module, function, x, mask, grad_out):
    x = x.detach().requires_grad_()
    names, parameters = zip(*module.named_parameters())
    out = function(x, mask)
    grads = torch.autograd.grad(out, [x, *parameters], grad_out)
    return Result(out.detach(), dict(zip(("x", *names), grads)))


def _check(module, with_mask, images=3, windows=4):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    results = []
    # the gradients behind logit_scale and the bias network come from a few numbers a head
    few = hasattr(module, "logit_scale")
    for _ in range(48 // module.num_heads if few else LEAST_INPUTS):
        x = torch.randn(images * windows, 35, 64, generator=generator)
        grad_out = torch.randn(x.shape, generator=generator)
        mask = None
        if with_mask:
            away = torch.rand(windows, 35, 35, generator=generator) < 0.3
            mask = torch.zeros(away.shape).masked_fill(away, -100.0)
        wide = copy.deepcopy(module).double()
        exact = (x.double(), None if mask is None else mask.double(), grad_out.double())
        results.append(
            (
                _measured(module, module, x, mask, grad_out),
                _measured(module, lambda *a: _unfused(module, *a), x, mask, grad_out),
                _measured(wide, lambda *a, wide=wide: _unfused(wide, *a), *exact),
            )
        )
    assert_within_error_rule(*zip(*results))


@pytest.fixture
def default_backend(backend, monkeypatch):
    """Runs the modules on each backend, and proves that they reached it."""
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", backend)


@pytest.mark.slow_emulator
@both
@pytest.mark.parametrize("with_mask", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no bias"])
def test_output_and_all_gradients_match_the_unfused_form(cls, with_mask, qkv_bias, default_backend):
    _check(_make(cls, qkv_bias=qkv_bias), with_mask)


def test_scale_given_is_used(default_backend):
    _check(_make(WindowAttention, qk_scale=0.5), True)


@pytest.mark.slow_interpreter
def test_coordinates_of_the_pretraining_window_are_used(default_backend):
    module = _make(WindowAttentionV2, pretrained_window_size=[12, 12])
    plain = _make(WindowAttentionV2)
    assert not torch.equal(module.relative_coords_table, plain.relative_coords_table)
    _check(module, True)


def test_logit_scale_is_clamped_at_a_hundred(default_backend):
    module = _make(WindowAttentionV2)
    with torch.no_grad():
        module.logit_scale[:2] = 10.0
    x = torch.randn(4, 35, 64)
    torch.testing.assert_close(module(x), _unfused(module, x), rtol=1e-4, atol=1e-4)
    module(x).sum().backward()
    assert not module.logit_scale.grad[:2].any()
    assert module.logit_scale.grad[2:].all()


@both
def test_state_dict_has_the_keys_and_shapes_of_the_authors(cls):
    state = cls(64, (7, 5), 4).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == KEYS[cls]
    assert {name for name, _ in cls(64, (7, 5), 4).named_buffers()} == KEYS[cls].keys() & BUFFERS


@both
def test_state_dict_without_qkv_bias_has_no_bias(cls):
    state = cls(64, (7, 5), 4, qkv_bias=False).state_dict()
    assert state.keys() == KEYS[cls].keys() - {"qkv.bias", "q_bias", "v_bias"}


@both
def test_state_dict_loads_and_gives_the_same_output(cls):
    first, second = _make(cls, seed=0), _make(cls, seed=1)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 35, 64)
    assert torch.equal(first(x), second(x))


@both
def test_state_dicts_of_timm_load(cls):
    version = "_v2" if cls is WindowAttentionV2 else ""
    timm = pytest.importorskip(f"timm.models.swin_transformer{version}")
    stock = timm.WindowAttention(64, window_size=(7, 5), num_heads=4).eval()
    module = cls(64, (7, 5), 4).eval()
    missing, unexpected = module.load_state_dict(stock.state_dict(), strict=False)
    assert set(missing) <= BUFFERS
    assert not unexpected
    x, mask = torch.randn(6, 35, 64), torch.randn(3, 35, 35)
    torch.testing.assert_close(module(x, mask), stock(x, mask), rtol=1e-5, atol=1e-5)


def test_parameters_start_as_the_authors_start_them():
    torch.manual_seed(0)
    table = WindowAttention(64, (7, 7), 4).relative_position_bias_table
    assert table.abs().max() < 2.0
    assert abs(float(table.std()) - 0.02) < 2e-3
    second = WindowAttentionV2(64, (7, 7), 4)
    torch.testing.assert_close(second.logit_scale, torch.full((4, 1, 1), math.log(10)))
    assert not second.q_bias.any()
    assert not second.v_bias.any()


@both
def test_square_window_may_be_given_as_one_number(cls):
    assert cls(64, 7, 4).window_size == (7, 7)


@both
def test_positional_arguments_stand_in_the_order_of_the_authors(cls):
    if cls is WindowAttention:
        module = cls(64, (7, 5), 4, False, 0.3, 0.1, 0.2)
        assert module.scale == 0.3
    else:
        module = cls(64, (7, 5), 4, False, 0.1, 0.2, [8, 8])
        assert tuple(module.pretrained_window_size) == (8, 8)
    assert (module.attn_drop.p, module.proj_drop.p) == (0.1, 0.2)


@both
def test_attention_dropout_is_for_training_and_follows_the_seed(cls, default_backend):
    module, x = _make(cls, attn_drop=0.5), torch.randn(4, 35, 64)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(module(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    plain = _make(cls)
    assert torch.equal(module.eval()(x), plain(x))


@both
def test_projection_dropout_is_applied(cls):
    module, x = _make(cls, proj_drop=0.5), torch.randn(4, 35, 64)
    share = (module(x) == 0).float().mean()
    assert 0.4 < share < 0.6


@both
def test_hooks_on_the_layers_are_called(cls):
    module, x, seen = _make(cls), torch.randn(4, 35, 64), []
    expected = module(x)
    for name in ("qkv", "proj"):
        getattr(module, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(module(x), expected)
    assert seen == ["qkv", "proj"]


@both
def test_module_survives_deepcopy_and_pickle(cls):
    module, x = _make(cls), torch.randn(4, 35, 64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_module_runs_in_other_dtypes(cls, dtype):
    module = _make(cls).to(dtype)
    out = module(torch.randn(4, 35, 64, dtype=dtype), torch.zeros(2, 35, 35, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


@both
def test_module_runs_under_autocast_and_trains_in_fp32(cls):
    module, x = _make(cls), torch.randn(4, 35, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out - module(x)).abs().max() < 0.1
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@both
def test_empty_input_gives_empty_output(cls):
    module = _make(cls)
    for mask in (None, torch.zeros(4, 35, 35)):
        out = module(torch.zeros(0, 35, 64), mask)
        assert out.shape == (0, 35, 64)


@both
def test_module_compiles_without_a_break(cls, cpu_kernels, fresh_dynamo):
    module, x, mask = _make(cls), torch.randn(6, 35, 64), torch.randn(3, 35, 35)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), module(x, mask))


@both
@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        ((8, 36, 64), None, r"x: expected \(B·nW, 35, 64\).*got \(8, 36, 64\)"),
        ((8, 35, 32), None, r"x: expected \(B·nW, 35, 64\).*got \(8, 35, 32\)"),
        ((8, 64), None, r"x: expected .* got \(8, 64\)"),
        ((2, 7, 5, 64), None, r"x: expected .* got \(2, 7, 5, 64\)"),
        ((8, 35, 64), (4, 35, 34), r"mask: expected \(nW, 35, 35\).*got \(4, 35, 34\)"),
        ((8, 35, 64), (35, 35), r"mask: expected \(nW, 35, 35\).*got \(35, 35\)"),
        ((8, 35, 64), (0, 35, 35), r"mask: expected \(nW, 35, 35\).*got \(0, 35, 35\)"),
        ((8, 35, 64), (3, 35, 35), "x holds 8 windows, which is no multiple of the 3 of the mask"),
    ],
)
def test_input_that_does_not_fit_raises(cls, shape, mask_shape, message):
    mask = None if mask_shape is None else torch.zeros(mask_shape)
    with pytest.raises(ValueError, match=message):
        _make(cls)(torch.zeros(shape), mask)


@both
def test_mask_of_another_kind_raises(cls):
    module, x = _make(cls), torch.zeros(8, 35, 64)
    with pytest.raises(ValueError, match=r"mask: expected a floating dtype, got torch\.bool"):
        module(x, torch.zeros(4, 35, 35, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask requires grad"):
        module(x, torch.zeros(4, 35, 35, requires_grad=True))


@both
@pytest.mark.parametrize(
    ("dim", "window", "heads", "message"),
    [
        (64, (7, 5), 3, "dim: expected a positive multiple of num_heads, got 64 with 3 heads"),
        (64, (7, 5), 0, "dim: expected .* got 64 with 0 heads"),
        (0, (7, 5), 4, "dim: expected .* got 0 with 4 heads"),
        (64, (7, 0), 4, r"window_size: expected at least 1 on each axis, got \(7, 0\)"),
        (64, (7, 5, 3), 4, "window_size: expected one number or one for each of 2 axes"),
        (64, 7.0, 4, "window_size: expected whole numbers"),
    ],
)
def test_sizes_that_do_not_fit_raise(cls, dim, window, heads, message):
    with pytest.raises(ValueError, match=message):
        cls(dim, window, heads)


@both
def test_flops_count_the_products_of_one_window(cls):
    # qkv 3·N·C², projection N·C², QKᵀ and AV N²·C each
    assert cls(64, (7, 5), 4).flops(35) == 4 * 35 * 64 * 64 + 2 * 35 * 35 * 64


def test_modules_are_public():
    assert {"WindowAttention", "WindowAttentionV2"} <= set(swin_kernels.__all__)
