"""Calls of the Triton backend, as far as plans and layouts ask: facts without tensors."""

from __future__ import annotations

import torch

from swin_kernels.backends.triton.launch_spec import Call, TensorFacts
from swin_kernels.backends.triton.token_layout import contiguous_stride
from swin_kernels.problem import NEEDS, Options


def facts(*shape: int, dtype: torch.dtype, aligned: bool = True) -> TensorFacts:
    return TensorFacts(shape, contiguous_stride(shape), dtype, aligned)


def call_of(
    tokens: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    windows: int,
    heads: int,
    *,
    sums_bias: bool = False,
    cosine: bool = False,
    dropout: bool = False,
    explicit_mask: bool = False,
    fills_padding: bool = False,
    not_vectorizable: bool = False,
    tf32: bool = False,
) -> Call:
    """A call of so many windows, one an image, on a map of one axis."""
    size = max(1, tokens - fills_padding)
    tensors = {
        name: facts(windows, size, heads, dim, dtype=dtype, aligned=not not_vectorizable)
        for name, dim in (("query", head_dim), ("key", head_dim), ("value", value_dim))
    }
    if sums_bias:
        tensors["bias"] = facts(heads, tokens, tokens, dtype=torch.float32)
    if cosine:
        tensors["logit_scale"] = facts(heads, dtype=torch.float32)
    if explicit_mask:
        tensors["mask"] = facts(1, tokens, tokens, dtype=torch.float32)
    if fills_padding:
        tensors["pad_key"] = facts(heads, head_dim, dtype=dtype)
    options = Options((tokens,), (0,), (False,), False, -100.0, 1.0, 0.5 * dropout)
    return Call(tensors, options, tf32, NEEDS["bias"] * sums_bias)
