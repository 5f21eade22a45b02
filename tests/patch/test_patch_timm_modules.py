"""What tools that wrap, watch or look for the modules of a patched block find there."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from patch_models import (
    BLOCKS,
    blocks_of,
    fused_blocks,
    image,
    kinds,
    patched_copy,
    sizes,
    small_block,
    small_model,
    train_step,
)
from torch import Tensor, nn

from swin_kernels import unpatch


def separate(model: nn.Module) -> nn.Module:
    """V2 blocks call their qkv layer only where its bias is added apart."""
    for block in blocks_of(model):
        block.attn.qkv_bias_separate = True
    return model


class _ByChannel(nn.Module):
    """An adapter of qkv that adds to queries and values, by their place among the channels."""

    def __init__(self, qkv: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        self.down = nn.ModuleList(nn.Linear(self.dim, rank, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(rank, self.dim, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        _, _, channels = tokens.shape
        assert channels == self.dim
        packed = self.qkv(tokens)
        packed[:, :, : self.dim] += self.up[0](self.down[0](tokens))
        packed[:, :, -self.dim :] += self.up[1](self.down[1](tokens))
        return packed


@kinds
@sizes
def test_adapter_that_counts_channels_trains_as_with_stock(kind, size):
    stock = separate(small_model(kind, size))
    torch.manual_seed(3)
    for block in blocks_of(stock):
        block.attn.qkv = _ByChannel(block.attn.qkv)
    ours = patched_copy(stock)
    expected, actual = train_step(stock, image(*size)), train_step(ours, image(*size))
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-3, atol=1e-4)


def second_moments(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, Tensor]]:
    """Of the inputs of each linear layer of a block: how many, and their mean x·xᵀ."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".attn." in name and "mlp" not in name:

            def watch(module, inputs, output, name=name):
                (x,) = inputs
                assert x.ndim == output.ndim == 3
                seen.setdefault(name, []).append(x.flatten(0, 1))

            module.register_forward_hook(watch)
    with torch.no_grad():
        model(image(*size))
    assert all(len(inputs) == 1 for inputs in seen.values()), "called more than once"
    return {name: (len(x), x.T @ x / len(x)) for name, (x,) in seen.items()}


@kinds
@sizes
def test_hooks_on_linear_layers_see_the_tokens_that_stock_shows(kind, size):
    stock = separate(small_model(kind, size))
    ours = patched_copy(stock)
    expected, actual = second_moments(stock, size), second_moments(ours, size)
    assert len(expected) == 8
    for name, (count, moment) in expected.items():
        assert actual[name][0] == count, name
        torch.testing.assert_close(actual[name][1], moment, rtol=1e-3, atol=1e-4)


@kinds
@pytest.mark.parametrize("separate_bias", [True, False], ids=["", "bias of qkv together"])
@pytest.mark.parametrize("wrapped", ["qkv", "proj", "proj_drop"])
def test_wrapped_layer_is_called_on_the_tokens_of_stock(kind, separate_bias, wrapped):
    """One that is not linear, so that each token of padding counts, and only in its own window.

    Stock V2 reads weights of qkv that an adapter passes on, unless their bias is added apart.
    """

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.tokens = layer, []

        @property
        def weight(self):
            return self.layer.weight

        def forward(self, x):
            self.tokens.append(x.shape[0] * x.shape[1])
            return torch.sin(3 * self.layer(x))

    block = small_block(kind, (12, 17)).double()
    x = torch.randn(2, 12, 17, 16, dtype=torch.float64)
    block.attn.qkv_bias_separate = separate_bias
    setattr(block.attn, wrapped, Wrapped(getattr(block.attn, wrapped)))
    ours = patched_copy(block)
    expected, actual = train_step(block, x), train_step(ours, x)
    assert getattr(ours.attn, wrapped).tokens == getattr(block.attn, wrapped).tokens
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_loss_on_hooked_outputs_has_the_gradients_of_stock():
    def step(model):
        penalties = []
        for block in blocks_of(model):
            block.attn.qkv.register_forward_hook(
                lambda m, x, out: penalties.append(out.square().mean())
            )
        out = model(image(60, 76))
        (out.square().sum() + sum(penalties)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    stock = small_model("v1", (60, 76))
    ours = patched_copy(stock)
    torch.testing.assert_close(step(ours), step(stock), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)], ids=["number", "one", "heads"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_scale_that_is_learnt_has_the_gradient_of_stock(shape, when):
    block, x = small_block("v1", (12, 17)), torch.randn(2, 12, 17, 16)

    def learning(block):
        factor = torch.linspace(0.7, 1.3, math.prod(shape)).reshape(shape)
        block.attn.scale = nn.Parameter(block.attn.scale * factor)
        return block

    stock = learning(copy.deepcopy(block))
    ours = patched_copy(stock, strict=True) if when == "before" else None
    ours = ours or learning(patched_copy(block, strict=True))
    expected, actual = train_step(stock, x), train_step(ours, x)
    assert expected.grads["attn.scale"].abs().max() > 1e-3
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.grads, expected.grads, rtol=1e-3, atol=1e-4)


@kinds
def test_patched_class_keeps_its_name_and_pickles(kind):
    stock = BLOCKS[kind]
    model = patched_copy(small_model(kind))
    for block in fused_blocks(model):
        cls = type(block)
        assert cls is not stock
        assert isinstance(block, stock)
        assert (cls.__name__, cls.__qualname__) == (stock.__name__, stock.__qualname__)
        assert cls.__module__ == "swin_kernels.patch.timm"
        assert "swin_kernels" in repr(block)
    assert sum(type(m).__name__ == stock.__name__ for m in model.modules()) == 4
    again = pickle.loads(pickle.dumps(model))
    for twin in (again, copy.deepcopy(model)):
        assert [type(b) for b in fused_blocks(twin)] == [type(b) for b in fused_blocks(model)]
    unpatch(model)
    assert "swin_kernels" not in repr(model)
