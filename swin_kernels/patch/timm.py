"""The three window attention blocks of timm, fused at block level: no roll, no pad, no partition.

The model's own qkv layer runs on the unpadded, unshifted map, then the operation, then the model's
own proj. Window, shift, bias and mask are read from the block on each call, as `set_input_size` and
users replace them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

from swin_kernels.geometry import Grid
from swin_kernels.ops.window_attention import shifted_window_attention_qkvpacked
from swin_kernels.patch.core import Fused

STOCK_MASK_VALUE = -100.0
MAX_LOG_SCALE = math.log(1.0 / 0.01)  # timm multiplies cosines by 100 at most


def _has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _graph_is_for_others(x: object) -> bool:
    """Whether this call is recorded for a runtime without our op: TorchScript, FX, ONNX."""
    if not isinstance(x, Tensor) or torch.jit.is_tracing():
        return True
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _named(name: str, function: Any) -> FunctionType:
    """The same function under another name: TorchScript finds methods by the name they carry."""
    if not isinstance(function, FunctionType):  # replaced by something else: never taken for stock
        return function
    return FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )


def _of_zeros(linear: nn.Module, x: Tensor) -> Tensor | None:
    """`linear` of one token of zeros, 3·C numbers, None for zeros: the qkv of a padded token."""
    if type(linear) is nn.Linear and not _has_hooks(linear) and "forward" not in linear.__dict__:
        return linear.bias
    return linear(x.new_zeros((1, 1, 1, x.shape[-1])))


@dataclass(frozen=True, eq=False)
class _CheckedMask:
    """A mask that was compared, and of which (padded size, window, shift) it is the shift mask."""

    mask: Tensor
    version: int
    shift_mask_of: tuple | None


class _FusedBlock(Fused):
    """What the three blocks share; subclasses say where qkv and bias come from."""

    stock_attention: ClassVar[type[nn.Module]]
    block_methods: ClassVar[tuple[str, ...]]  # replaced or relied on
    attention_methods: ClassVar[tuple[str, ...]]
    # submodules of attn that the fused path passes over
    watched: ClassVar[Mapping[str, type[nn.Module]]]
    resolution: ClassVar[str]  # the attribute with the size that the static mask is made for

    # of the stock block
    attn: Any
    attn_mask: Tensor | None
    window_size: tuple[int, int]
    shift_size: tuple[int, int]

    @classmethod
    def relied_on(cls) -> tuple[Callable, ...]:
        module = {
            m.__name__: m for m in (swin_transformer, swin_transformer_v2, swin_transformer_v2_cr)
        }[cls.stock.__module__]
        return (
            *(getattr(cls.stock, name) for name in cls.block_methods),
            *(getattr(cls.stock_attention, name) for name in cls.attention_methods),
            module.window_partition,
            module.window_reverse,
        )

    @classmethod
    def why_stock(cls, block: Any) -> str | None:
        attn = block.attn
        if type(attn) is not cls.stock_attention:
            return (
                f"its attn is a {type(attn).__name__}, not the stock {cls.stock_attention.__name__}"
            )
        for name in cls.block_methods:
            if name in block.__dict__:
                return f"its {name} was replaced on the instance"
        for name in cls.attention_methods:
            if name in attn.__dict__:
                return f"its attn.{name} was replaced on the instance"
        if _has_hooks(attn):
            return "its attn has hooks, which the fused path would not call"
        for name, kind in cls.watched.items():
            module = getattr(attn, name)
            if type(module) is not kind:
                return f"its attn.{name} is a {type(module).__name__}, not a {kind.__name__}"
            if _has_hooks(module) or "forward" in module.__dict__:
                return f"its attn.{name} has hooks, which the fused path would not call"
        for shift, window in zip(block.shift_size, block.window_size):
            if not 0 <= shift < window:
                shifts, windows = tuple(block.shift_size), tuple(block.window_size)
                return f"its shift {shifts} does not fit its window {windows}"
        return None

    def on_patch(self) -> None:
        self._check_mask()

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        self._check_mask()
        return self

    def set_input_size(self, *args, **kwargs):
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        self._check_mask()

    def _padded(self, size: tuple[int, int]) -> tuple[int, ...]:
        return tuple(-(-s // w) * w for s, w in zip(size, self.window_size))

    def _check_mask(self) -> None:
        """Find out whether the static mask is what stock built: once a mask, as it reads it all."""
        mask, shift_mask_of = self.attn_mask, None
        if (
            type(mask) is not Tensor
            or mask.is_meta
            or mask.is_inference()  # has no version
            or torch._C._are_functorch_transforms_active()  # may have no one value
        ):
            self._swin_kernels.checked = None
            return
        window, shift = tuple(self.window_size), tuple(self.shift_size)
        padded = self._padded(getattr(self, self.resolution))
        grid = Grid(padded, window, shift, (False, False))
        if mask.shape == (grid.windows, grid.tokens, grid.tokens):
            expected = grid.shift_mask(STOCK_MASK_VALUE, mask.dtype, mask.device)
            if torch.equal(mask, expected):
                shift_mask_of = (padded, window, shift)
        self._swin_kernels.checked = _CheckedMask(mask, mask._version, shift_mask_of)

    def _is_shift_mask(self, mask: Tensor, padded: tuple[int, ...]) -> bool:
        """Whether `mask` is known to be what the operation adds by itself at this padded size."""
        if not torch.compiler.is_compiling():
            known = self._swin_kernels.checked
            if known is None or known.mask is not mask or known.version != mask._version:
                self._check_mask()
        known = self._swin_kernels.checked
        return (
            known is not None
            and known.mask is mask
            and known.shift_mask_of == (padded, tuple(self.window_size), tuple(self.shift_size))
        )

    def _masking(self, height: int, width: int) -> dict[str, Any] | None:
        """Arguments that add the mask that stock would add; None where only stock knows."""
        # literals: as a global, dynamo would trace a float of dynamic value
        if getattr(self, "dynamic_mask", False):
            return {"mask_value": -100.0}
        mask = self.attn_mask
        if mask is None:
            return {"mask_value": 0.0}
        if mask.requires_grad:
            return None
        padded = self._padded((height, width))
        if self._is_shift_mask(mask, padded):
            return {"mask_value": -100.0}
        tokens = self.window_size[0] * self.window_size[1]
        windows = padded[0] * padded[1] // tokens
        if mask.shape != (windows, tokens, tokens):
            return None
        # 0: the shift moves tokens, the mask alone separates them
        return {"mask": mask, "mask_value": 0.0}

    def _qkv(self, x: Tensor, padded: bool) -> tuple[Tensor, Tensor | None]:
        """qkv of the map and, where it is padded, of a token of zeros."""
        qkv = self.attn.qkv
        return qkv(x), _of_zeros(qkv, x) if padded else None

    def _bias(self) -> dict[str, Any]:
        """The operation's bias and scale arguments."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor | None:
        """The stock method of (B, height, width, C), fused; None where stock must run it."""
        if _graph_is_for_others(x) or self.why_stock(self) is not None:
            return None
        height, width = x.shape[1], x.shape[2]
        masking = self._masking(height, width)
        if masking is None:
            return None
        attn = self.attn
        window = tuple(self.window_size)
        packed = (3, attn.num_heads, -1)
        qkv, token = self._qkv(x, padded=bool(height % window[0] or width % window[1]))
        if token is not None:
            _, pad_key, pad_value = token.reshape(packed).unbind(0)
            masking |= {"pad_key": pad_key, "pad_value": pad_value}
        out = shifted_window_attention_qkvpacked(
            qkv.unflatten(-1, packed),
            window,
            tuple(self.shift_size),
            pad_order="roll-pad",
            dropout_p=attn.attn_drop.p if attn.attn_drop.training else 0.0,
            backend=self._swin_kernels.backend,
            **masking,
            **self._bias(),
        )
        return attn.proj_drop(attn.proj(out.flatten(-2)))


class FusedSwinTransformerBlock(_FusedBlock, swin_transformer.SwinTransformerBlock):
    """Swin: a table of biases, scaled products."""

    stock = swin_transformer.SwinTransformerBlock
    stock_attention = swin_transformer.WindowAttention
    block_methods = ("forward", "_attn", "get_attn_mask")
    attention_methods = ("forward", "_get_rel_pos_bias")
    watched: ClassVar[Mapping[str, type[nn.Module]]] = {
        "softmax": nn.Softmax,
        "attn_drop": nn.Dropout,
    }
    resolution = "input_resolution"
    known_sources: ClassVar[Mapping[str, str]] = {
        "6608065702c3fc10": "timm 1.0.31",
        "876aa8f7011b5d41": "timm 1.0.22 to 1.0.30",
        "82532d67d5377160": "timm 1.0.9 to 1.0.19",
    }

    def _bias(self) -> dict[str, Any]:
        attn = self.attn
        return {
            "bias_table": attn.relative_position_bias_table,
            "bias_index": attn.relative_position_index,
            "scale": attn.scale,
        }

    _scripted = _named("_scripted", swin_transformer.SwinTransformerBlock._attn)

    def _attn(self, x):
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._fused(x)
            return super()._attn(x) if out is None else out


class FusedSwinTransformerV2Block(_FusedBlock, swin_transformer_v2.SwinTransformerV2Block):
    """Swin V2: cosine attention, biases from an MLP on log-spaced coordinates."""

    stock = swin_transformer_v2.SwinTransformerV2Block
    stock_attention = swin_transformer_v2.WindowAttention
    block_methods = ("forward", "_attn", "get_attn_mask")
    attention_methods = ("forward",)
    watched: ClassVar[Mapping[str, type[nn.Module]]] = {
        "softmax": nn.Softmax,
        "attn_drop": nn.Dropout,
    }
    resolution = "input_resolution"
    known_sources: ClassVar[Mapping[str, str]] = {
        "6ff1a93d1cfecff1": "timm 1.0.31",
        "66eb5a69881a05f9": "timm 1.0.22 to 1.0.30",
        "9fe6653d14ccfcbf": "timm 1.0.9 to 1.0.19",
    }

    @classmethod
    def note(cls, block: Any) -> str | None:
        attn = block.attn
        if attn.q_bias is None or attn.qkv_bias_separate:
            return None
        if type(attn.qkv) is nn.Linear and not _has_hooks(attn.qkv):
            return None
        return (
            f"attn.qkv ({type(attn.qkv).__name__}) is not called, as in stock timm, which reads "
            "its weight only; attn.qkv_bias_separate = True has it called"
        )

    def _qkv(self, x: Tensor, padded: bool) -> tuple[Tensor, Tensor | None]:
        attn = self.attn
        if attn.q_bias is None:
            return super()._qkv(x, padded)
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if not attn.qkv_bias_separate:
            return F.linear(x, weight=attn.qkv.weight, bias=bias), bias if padded else None
        qkv, token = super()._qkv(x, padded)
        qkv += bias
        if padded:
            token = bias if token is None else token + bias
        return qkv, token

    def _bias(self) -> dict[str, Any]:
        attn = self.attn
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        return {
            "bias_table": 16 * torch.sigmoid(table),
            "bias_index": attn.relative_position_index,
            "logit_scale": attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp().flatten(),
        }

    _scripted = _named("_scripted", swin_transformer_v2.SwinTransformerV2Block._attn)

    def _attn(self, x):
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._fused(x)
            return super()._attn(x) if out is None else out


class FusedSwinTransformerV2CrBlock(_FusedBlock, swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    """Christoph Reich's Swin V2: cosine attention, dense biases from a network with dropout."""

    stock = swin_transformer_v2_cr.SwinTransformerV2CrBlock
    stock_attention = swin_transformer_v2_cr.WindowMultiHeadAttention
    block_methods = ("forward", "_shifted_window_attn", "get_attn_mask")
    attention_methods = ("forward", "_relative_positional_encodings")
    watched: ClassVar[Mapping[str, type[nn.Module]]] = {"attn_drop": nn.Dropout}
    resolution = "feat_size"
    known_sources: ClassVar[Mapping[str, str]] = {
        "11470b57f80f55a3": "timm 1.0.31",
        "4f7d9af03b92d308": "timm 1.0.22 to 1.0.30",
        "37ee1d6bdcc43a66": "timm 1.0.9 to 1.0.19",
    }

    def _bias(self) -> dict[str, Any]:
        attn = self.attn
        return {
            "bias": attn._relative_positional_encodings()[0],
            "logit_scale": attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp(),
        }

    _scripted = _named(
        "_scripted", swin_transformer_v2_cr.SwinTransformerV2CrBlock._shifted_window_attn
    )

    def _shifted_window_attn(self, x):
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._fused(x)
            return super()._shifted_window_attn(x) if out is None else out


FUSED: dict[str, type[_FusedBlock]] = {
    f"{cls.stock.__module__}.{cls.stock.__qualname__}": cls
    for cls in (
        FusedSwinTransformerBlock,
        FusedSwinTransformerV2Block,
        FusedSwinTransformerV2CrBlock,
    )
}
