"""The operation as a layer calls it: between modules that others wrap, watch and replace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from swin_kernels.backends.base import asked_while_tracing
from swin_kernels.backends.reference.windows import crop, pad_ends, roll
from swin_kernels.geometry import Grid
from swin_kernels.ops.attention import (
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
    unfused_attention_qkvpacked,
)
from swin_kernels.ops.dispatch import check_name, log_once

WATCHED = (
    "attention is not fused where a module's attn_drop or softmax has hooks, or is another module: "
    "it is called then"
)


def has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of these classes, and nobody sees how often and on what it is called."""
    return type(module) in kinds and not has_hooks(module) and "forward" not in module.__dict__


_OWN_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout)}


@asked_while_tracing
def why_modules_are_watched() -> str | None:
    """Why modules that stand for themselves must be called, or None."""
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    for kind, forward in _OWN_FORWARDS.items():
        if kind.forward is not forward:
            return f"{kind.__name__}.forward was replaced"
    return None


def is_plain_parameter(x: object) -> bool:
    """Whether a parameter is of torch's own class, or there is none."""
    # a program that is exported has stand-ins without data
    return x is None or type(x) in (nn.Parameter, FakeTensor)


def is_exporting(x: object) -> bool:
    """Whether a call is recorded for a runtime without our op: TorchScript, symbolic FX, ONNX."""
    if not isinstance(x, Tensor) or torch.jit.is_tracing():
        return True
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, None for zeros."""
    return b if a is None else a if b is None else a + b


def scale_fits(scale: Tensor, heads: int) -> bool:
    """Whether unfused layers, which multiply (windows, H, N, D) by it, scale whole heads."""
    return scale.numel() == 1 or (scale.numel() == heads and scale.shape[-3:] == (heads, 1, 1))


def attention_of_qkv(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    attn_drop: nn.Module,
    softmax: nn.Module | None = None,
    scale: float | Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """`shifted_window_attention_qkvpacked` in place of the modules `softmax` and `attn_drop`.

    Where one of them has hooks, or is another than `nn.Softmax` and `nn.Dropout`, it is called, on
    (windows, H, N, N), and nothing is fused. `scale` may be a tensor that is learnt, of one number
    or one for each head: it is multiplied into the query, as in unfused layers. A call that is
    recorded for a runtime without our op leaves plain operators.
    """
    if backend is not None:
        check_name(backend)
    watched = not is_plain(attn_drop, nn.Dropout, nn.Identity)
    if softmax is not None:
        watched |= not is_plain(softmax, nn.Softmax) or softmax.dim not in (-1, 3)
    operation: Callable[..., Tensor] = functools.partial(shifted_window_attention_qkvpacked, qkv)
    if isinstance(scale, Tensor):
        if not scale_fits(scale, qkv.shape[-2]):
            raise ValueError(
                f"scale: expected one number or shape ({qkv.shape[-2]}, 1, 1), one number a head, "
                f"got {tuple(scale.shape)}"
            )
        query, key, value = qkv.unbind(-3)
        # (), (1, 1) or (H, 1)
        query = query * (scale if scale.ndim == 0 else scale.reshape(-1, 1))
        operation = functools.partial(shifted_window_attention, query, key, value)
        if watched:
            qkv = torch.stack((query, key, value), -3)
        scale = 1.0
    if watched:
        log_once(WATCHED, WATCHED)
        operation = functools.partial(unfused_attention_qkvpacked, qkv)
        options["softmax"] = nn.Softmax(-1) if softmax is None else softmax
        options["attn_drop"] = attn_drop
    else:
        dropping = isinstance(attn_drop, nn.Dropout) and attn_drop.training
        options["dropout_p"] = attn_drop.p if dropping else 0.0
        options["backend"] = "reference" if is_exporting(qkv) else backend
    return operation(window_size, shift_size, scale=scale, **options)


def _put_in_padding(x: Tensor, grid: Grid) -> Tensor:
    """(B, height, width, C) -> (B, *padded, C), padded where the operation would do it.

    Padded after the roll and rolled back, it is a map that is cut into the very same windows.
    """
    if grid.pad_order == "pad-roll":
        return pad_ends(x, grid)
    return roll(pad_ends(roll(x, grid, -1), grid), grid, 1)


def _take_out_padding(x: Tensor, grid: Grid) -> Tensor:
    """(B, *padded, C) -> (B, height, width, C)"""
    if grid.pad_order == "pad-roll":
        return crop(x, grid)
    return roll(crop(roll(x, grid, -1), grid), grid, 1)


def attention_of_map(
    x: Tensor,
    attn: Any,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    *,
    qkv: Callable[[Tensor], Tensor],
    qkv_of_zeros: Callable[[], Tensor | None],
    qkv_is_plain: bool,
    pad_order: str,
    **options: Any,
) -> Tensor:
    """`qkv`, attention, `proj` and `proj_drop` of a map (B, height, width, C) -> the same.

    `qkv` and the layers are called once, on (B, tokens, C). If one of them is wrapped or watched,
    the tokens that padding adds are among those, as in unfused layers; else `qkv_of_zeros` gives
    what qkv makes of such a token, 3·C numbers or None for zeros.
    """
    packed = (3, attn.num_heads, -1)
    padding = None  # what is in the map
    if x.shape[1] % window[0] or x.shape[2] % window[1]:
        plain = (
            qkv_is_plain
            and is_plain(attn.proj, nn.Linear)
            and is_plain(attn.proj_drop, nn.Dropout, nn.Identity)
        )
        if not plain:  # they could tell that padding did not come
            padding = Grid(tuple(x.shape[1:3]), window, shift, (False, False), pad_order)
            x = _put_in_padding(x, padding)
        elif (token := qkv_of_zeros()) is not None:
            _, pad_key, pad_value = token.reshape(packed).unbind(0)
            options |= {"pad_key": pad_key, "pad_value": pad_value}
    size = x.shape[1:3]
    out = attention_of_qkv(
        qkv(x.flatten(1, 2)).unflatten(-1, packed).unflatten(1, size),
        window,
        shift,
        pad_order=pad_order,
        attn_drop=attn.attn_drop,
        **options,
    )
    out = attn.proj_drop(attn.proj(out.flatten(3).flatten(1, 2))).unflatten(1, size)
    return out if padding is None else _take_out_padding(out, padding)
