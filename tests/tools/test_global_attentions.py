"""The attentions that cost is compared with: each against what its paper says it equals."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from benchmarks.baselines import global_attentions
from benchmarks.baselines.global_attentions import centroids, directions, projection

FORMS = {
    "global": global_attentions.global_attention,
    "linformer": lambda qkv: global_attentions.linformer(qkv, projection(qkv[0].numel() // 48, 8)),
    "performer": lambda qkv: global_attentions.performer(qkv, directions(qkv.shape[-1], 32)),
    "routing": lambda qkv: global_attentions.routing(qkv, centroids(qkv.shape[-1], 3), 7),
}
forms = pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS)


def _qkv(*size, heads=2, head_dim=8, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, *size, 3, heads, head_dim, generator=generator, dtype=dtype)


def _softmax_attention(qkv):
    q, k, v = qkv.flatten(1, -4).unbind(2)  # (B, T, H, D)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).view_as(qkv[..., 0, :, :])


@forms
@pytest.mark.parametrize("size", [(20,), (4, 5), (2, 3, 4)], ids=str)
def test_output_is_a_map_and_every_token_can_learn(attend, size):
    qkv = _qkv(*size).requires_grad_()
    out = attend(qkv)
    assert out.shape == (2, *size, 2, 8)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    "attend",
    [
        global_attentions.global_attention,
        lambda qkv: global_attentions.linformer(qkv, torch.eye(20)),
        lambda qkv: global_attentions.routing(qkv, centroids(8, 1), 20),
    ],
    ids=["global", "linformer, nothing projected away", "routing, one cluster of all tokens"],
)
def test_attention_is_the_softmax_over_all_tokens(attend):
    qkv = _qkv(4, 5)
    assert_close(attend(qkv), _softmax_attention(qkv))


def test_linformer_sees_as_many_keys_as_its_projection_has_rows():
    qkv = _qkv(4, 5)
    mean = torch.full((1, 20), 1 / 20)
    values = qkv[..., 2, :, :].mean((1, 2), keepdim=True)
    assert_close(global_attentions.linformer(qkv, mean), values.expand(2, 4, 5, 2, 8))


def test_performer_comes_near_the_softmax_with_more_features():
    qkv = _qkv(6, 6, scale=0.5, dtype=torch.float64)
    exact = _softmax_attention(qkv)
    errors = []
    for features in (16, 256, 4096):
        near = (
            global_attentions.performer(qkv, directions(8, features, seed).double())
            for seed in range(5)
        )
        errors.append(sum(float((x - exact).square().mean()) for x in near) / 5)
    # a mean over features: the squared error falls as their number grows
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1] / 4


def test_directions_of_a_block_are_orthogonal():
    drawn = directions(8, 12)
    assert drawn.shape == (12, 8)
    products = torch.nn.functional.normalize(drawn[:8], dim=-1)
    assert_close(products @ products.T, torch.eye(8), atol=1e-5, rtol=0)


def test_routing_keeps_to_clusters():
    qkv = torch.zeros(1, 8, 3, 1, 2)
    qkv[:, :4, :2, :, 0] = qkv[:, 4:, :2, :, 1] = 1.0  # two kinds of tokens
    qkv[:, :4, 2], qkv[:, 4:, 2] = 3.0, 5.0
    out = global_attentions.routing(qkv, torch.eye(2), 4)
    assert_close(out, qkv[:, :, 2])  # the values of one's own kind alone
    few = global_attentions.routing(qkv, torch.eye(2)[:1], 4)
    assert_close(few[:, :4], qkv[:, :4, 2])
    assert not few[:, 4:].any()  # in no cluster


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: global_attentions.global_attention(x[..., 0, :]), "expected qkv"),
        (lambda x: global_attentions.linformer(x, torch.eye(3)), r"projection \(k, 20\)"),
        (lambda x: global_attentions.performer(x, torch.eye(3)), r"directions \(m, 8\)"),
        (lambda x: global_attentions.routing(x, torch.eye(3)), r"centroids \(c, 8\)"),
    ],
    ids=FORMS,
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(_qkv(4, 5))
