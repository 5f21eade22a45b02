"""Calls of the Triton backend, and their plans, from facts alone."""

from __future__ import annotations

import torch

from swin_kernels.backends.triton.config import KNOWN_GPUS
from swin_kernels.backends.triton.launch_spec import Call, TensorFacts, facts_of
from swin_kernels.backends.triton.plan import backward_plan, forward_plan
from swin_kernels.backends.triton.token_layout import contiguous_stride
from swin_kernels.problem import NEEDS, Operands, Options, Problem
from swin_kernels.testing import Case, make_grad_out, make_operands

H100 = KNOWN_GPUS["sm_90"]
PLANE = Case(2, (11, 9), (4, 4), (2, 2), bias="table", pads=True, layout="contiguous")
EVERYTHING = ("bias", "bias_table", "pad_key", "pad_value", "logit_scale")


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


def plain_call(operands, tf32=False, **options):
    """The call of these operands, which may be on meta."""
    facts = {n: facts_of(x) for n, x in zip(Operands._fields, operands) if x is not None}
    return Call(facts, Problem.checked(operands, **options).options, tf32)


def forward_of(case, gpu=H100, device="meta", tf32=False, differentiable=False):
    """The plan of a case's forward."""
    call = plain_call(make_operands(case, device), tf32, **case.options)
    return forward_plan(call, gpu, differentiable=differentiable)


def backward_of(case, gpu=H100, device="meta", needed=EVERYTHING):
    """The plan of a case's backward, with every gradient or those `needed`."""
    call = plain_call(make_operands(case, device), **case.options)
    facts = {**call.facts, "grad_out": facts_of(make_grad_out(case, device))}
    needs = sum(NEEDS[name] for name in needed)
    return backward_plan(Call(facts, call.options, needs=needs), gpu)


def kernels_of(plan):
    """What a plan launches, by the kernels' names."""
    return [launch.kernel.split(".")[1] for launch in plan.launches]
