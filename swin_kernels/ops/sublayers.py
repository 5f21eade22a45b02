"""The halves of a block as operations: public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swin_kernels.attention_sublayer_problem import (
    AttentionSublayerOperands,
    AttentionSublayerProblem,
)
from swin_kernels.backends.base import asked_while_tracing, below_autograd
from swin_kernels.backends.sublayers import SublayerBackend
from swin_kernels.mlp_problem import MlpOperands, MlpProblem
from swin_kernels.ops.autograd import (
    ATTENTION_SUBLAYER,
    MLP,
    Operation,
    reference_under_transforms,
    transforms_active,
)
from swin_kernels.ops.dispatch import DEFAULT_BACKEND, choose
from swin_kernels.sublayer_problem import SublayerFacts


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products of `x`, None where it gives none."""
    if not isinstance(x, Tensor):  # the checks say so
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def mlp_sublayer(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    norm: str = "pre",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    residual_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + residual_scale·layer_scale·MLP(LayerNorm(x)), in one op.

    The second half of a transformer block, a block of rows at a time: what lies between x and the
    result is not written to memory, in the forward or in the backward, which computes it again.
    Liu et al., "Swin Transformer", ICCV 2021, eq. 3; with norm="post",
    x + residual_scale·layer_scale·LayerNorm(MLP(x)), "Swin Transformer V2", CVPR 2022, section 3.2.
    The full contract is docs/contract.md.

    Args:
        x: (B, *S, C); S has 1, 2 or 3 axes. fp16, bf16, fp32 or fp64.
        fc1_weight, fc1_bias: (K, C) and (K,) or None, as in `nn.Linear`; any K.
        fc2_weight, fc2_bias: (C, K) and (C,) or None.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        norm: "pre" or "post": LayerNorm of what the branch takes, or of what it gives.
        norm_weight, norm_bias, norm_eps: (C,), (C,) or None; no norm_weight is no LayerNorm.
        layer_scale: (C,), multiplies the branch.
        residual_scale: (B,), stochastic depth: a factor of each image's branch, which is not
            computed where that is 0. Not differentiable.
        backend: None chooses; a name ("cpu", "reference") never falls back.

    Returns:
        The shape and dtype of x, contiguous. Under autocast products take autocast's dtype; norms,
        activation and the sum with x stay as wide as x, or fp32.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, before anything is computed.
        NotImplementedError: the backend asked for cannot run this, with the reason.
    """
    operands = MlpOperands(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        residual_scale,
    )
    problem = MlpProblem.checked(
        operands,
        activation=activation,
        norm=norm,
        norm_eps=norm_eps,
        compute_dtype=_autocast_dtype(x),
    )
    return _run(MLP, operands, problem, ("fc1", "fc2"), backend)


def window_attention_sublayer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    norm: str = "pre",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    residual_scale: Tensor | None = None,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    pad_order: str = "pad-roll",
    periodic: bool | Sequence[bool] = False,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """x + residual_scale·layer_scale·proj(attention(qkv(LayerNorm(x)))), in one op.

    The first half of a Swin block, some windows at a time: rows are gathered where the roll would
    put them, and neither qkv nor the attention's result is written to memory, in the forward or in
    the backward, which computes them again. Liu et al., "Swin Transformer", ICCV 2021, eq. 3; with
    norm="post", x + residual_scale·layer_scale·LayerNorm(proj(attention(qkv(x)))), "Swin
    Transformer V2", CVPR 2022, section 3.2. The full contract is docs/contract.md.

    Args:
        x: (B, *S, C); S has 1, 2 or 3 axes. fp16, bf16, fp32 or fp64.
        qkv_weight, qkv_bias: (3·C, C) and (3·C,) or None, as in `nn.Linear`; query, key and value
            in this order, heads within. A token that padding adds has qkv_bias for its qkv.
        proj_weight, proj_bias: (C, C) and (C,) or None.
        num_heads: H, which divides C.
        norm, norm_weight, norm_bias, norm_eps, layer_scale, residual_scale: As in `mlp_sublayer`.
        window_size, shift_size and what follows: As in `shifted_window_attention`.
        backend: None chooses; a name ("cpu", "reference") never falls back.

    Returns:
        The shape and dtype of x, contiguous. Under autocast products take autocast's dtype; norms,
        softmax and the sum with x stay as wide as x, or fp32.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, before anything is computed.
        NotImplementedError: the backend asked for cannot run this, with the reason.
    """
    operands = AttentionSublayerOperands(
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        layer_scale,
        bias,
        bias_table,
        logit_scale,
        residual_scale,
        bias_index,
        mask,
    )
    problem = AttentionSublayerProblem.checked(
        operands,
        num_heads,
        window_size,
        shift_size,
        norm=norm,
        norm_eps=norm_eps,
        compute_dtype=_autocast_dtype(x),
        mask_value=mask_value,
        pad_order=pad_order,
        periodic=periodic,
        scale=scale,
        dropout_p=dropout_p,
    )
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        operands = operands._replace(dropout_seed=seed)
    return _run(ATTENTION_SUBLAYER, operands, problem, ("qkv", "proj"), backend)


def _run(
    operation: Operation, operands: Any, problem: Any, layers: tuple[str, str], backend: str | None
) -> Tensor:
    """A checked call of a sublayer."""
    if transforms_active():
        chosen = reference_under_transforms(operation, backend)
    else:
        chosen = choose(problem, backend)
    if chosen is operation.reference:
        # products are in autocast's dtype already
        with torch.autocast(problem.facts.device.type, enabled=False):
            operands = _cast(operands, layers, problem.facts.compute_dtype)
            return chosen.forward(operands, problem.options, True)[0]
    x = operands.x
    if x.stride(-1) != 1 and x.shape[-1] > 1:  # kernels read a row's channels side by side
        operands = operands._replace(x=x.contiguous())
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in operands
    )
    if not needs_grad:
        operands = chosen.prepared(operands, problem)
    operands = _cast(operands, layers, problem.facts.compute_dtype)
    if torch.compiler.is_compiling():  # a graph gets the op, whose autograd is its own
        return chosen.forward(operands, problem.options, needs_grad)[0]
    if needs_grad:
        return operation.function.apply(*operands, *problem.options, chosen.name)
    with below_autograd():
        return chosen.forward(operands, problem.options, False)[0]


def _cast(operands: Any, layers: tuple[str, str], dtype: torch.dtype) -> Any:
    """The operands with weights in the dtype of the products, but for packed ones."""
    changed = {}
    for layer in layers:
        weight = getattr(operands, f"{layer}_weight")
        if weight.dtype != dtype and getattr(operands, f"{layer}_packed") is None:
            changed[f"{layer}_weight"] = weight.to(dtype)
    return operands._replace(**changed) if changed else operands


# where any backend has fused sublayers: elsewhere nothing more need be asked
FUSED_ON = {
    device
    for operation in (MLP, ATTENTION_SUBLAYER)
    for backend in operation.backends.values()
    for device in backend.device_types
}


def why_mlp_unfused(x: Tensor, weight: Tensor, backend: str | None = None) -> str | None:
    """Why an MLP of these dtypes on this device is faster layer by layer, or must run so.

    None where a call of `mlp_sublayer` runs fused. A backend asked for by name is taken wherever it
    can run; `weight` stands for both weights.
    """
    return _why_unfused("mlp", *_facts(x, weight), None, backend or DEFAULT_BACKEND)


def why_attention_unfused(
    x: Tensor, weight: Tensor, windows: int | None, backend: str | None = None
) -> str | None:
    """The same of `window_attention_sublayer`, for so many windows of the whole batch, if known."""
    return _why_unfused("attention", *_facts(x, weight), windows, backend or DEFAULT_BACKEND)


def _facts(x: Tensor, weight: Tensor) -> tuple[torch.device, torch.dtype, torch.dtype]:
    return x.device, x.dtype, _autocast_dtype(x) or weight.dtype


@asked_while_tracing  # of constants alone: dynamo makes none of records
def _why_unfused(
    half: str,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    windows: int | None,
    name: str | None,
) -> str | None:
    operation = {"mlp": MLP, "attention": ATTENTION_SUBLAYER}[half]
    facts = SublayerFacts(device, dtype, compute_dtype, windows)
    reasons = []
    for backend in operation.backends.values():
        if backend.name == "reference" or name not in (None, backend.name):
            continue
        assert isinstance(backend, SublayerBackend)
        reason = backend.why_not_on(facts)
        if reason is None and name is None:
            reason = backend.why_slower_on(facts)
        if reason is None:
            return None
        reasons.append(f"{backend.name}: {reason}")
    return "; ".join(reasons) or f"{name} fuses nothing"
