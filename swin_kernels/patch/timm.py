"""The three window attention blocks of timm, fused at block level: no roll, no pad, no partition.

The model's own qkv layer runs on the unpadded, unshifted map, (B, tokens, C), then the operation,
then the model's own proj. Window, shift, bias and mask are read from the block on each call, as
`set_input_size` and users replace them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

from swin_kernels.backends.base import asked_while_tracing
from swin_kernels.ops.layers import (
    attention_of_map,
    has_hooks,
    is_exporting,
    is_plain,
    scale_fits,
    sum_of,
)
from swin_kernels.patch.static_mask import CheckedMask, can_be_read_now
from swin_kernels.patch.timm_halves import WholeHalves, why_unknown
from swin_kernels.problem import is_traced_by_mode

MAX_LOG_SCALE = math.log(1.0 / 0.01)  # timm multiplies cosines by 100 at most


def _named(name: str, function: Any) -> FunctionType:
    """The same function under another name: TorchScript finds methods by the name they carry."""
    if not isinstance(function, FunctionType):  # replaced by something else: never taken for stock
        return function
    return FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )


_blocks: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by the key of their memory


@asked_while_tracing
def _look_again(key: str) -> None:
    """Before a graph is traced: afterwards it does not ask."""
    block = _blocks.get(key)
    if block is not None and type(block.attn_mask) is Tensor and not is_traced_by_mode():
        block._look_again()


class _FusedBlock(WholeHalves):
    """What the three blocks share; subclasses say where qkv and bias come from."""

    stock_attention: ClassVar[type[nn.Module]]
    # replaced or relied on; the second is the one replaced
    block_methods: ClassVar[tuple[str, ...]] = ("forward", "_attn", "get_attn_mask")
    attention_methods: ClassVar[tuple[str, ...]]
    # submodules of attn that the fused path passes over
    watched: ClassVar[Mapping[str, type[nn.Module]]] = {
        "softmax": nn.Softmax,
        "attn_drop": nn.Dropout,
    }
    # the attribute with the size that the static mask is made for
    resolution: ClassVar[str] = "input_resolution"
    _scripted: ClassVar[Callable]  # the stock method

    # of the stock block
    attn: Any
    attn_mask: Tensor | None
    window_size: tuple[int, int]
    shift_size: tuple[int, int]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "stock" in vars(cls):
            cls._scripted = _named("_scripted", getattr(cls.stock, cls.block_methods[1]))
            cls._scripted_forward = _named("_scripted_forward", cls.stock.forward)

    @classmethod
    def relied_on(cls) -> tuple[Callable, ...]:
        module = sys.modules[cls.stock.__module__]
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
        if has_hooks(attn):
            return "its attn has hooks, which the fused path would not call"
        for name, kind in cls.watched.items():
            module = getattr(attn, name)
            if type(module) is not kind:
                return f"its attn.{name} is a {type(module).__name__}, not a {kind.__name__}"
            if not is_plain(module, kind):
                return f"its attn.{name} has hooks, which the fused path would not call"
        if "softmax" in cls.watched and attn.softmax.dim not in (-1, 3):
            return f"its attn.softmax is over axis {attn.softmax.dim}, not over keys"
        mask = block.attn_mask
        if mask is not None and mask.requires_grad and not getattr(block, "dynamic_mask", False):
            return "its attn_mask requires grad"
        scale, heads = getattr(attn, "scale", None), block.attn.num_heads
        if getattr(attn, "fused_attn", False):
            channels = getattr(block.attn.proj, "in_features", block.attn.dim)
            if scale != (channels // heads) ** -0.5:
                return "its attn.fused_attn is set, with which stock leaves attn.scale out"
        if isinstance(scale, Tensor) and not scale_fits(scale, heads):
            shape = tuple(scale.shape)
            return f"its attn.scale has shape {shape}, neither one number nor (heads, 1, 1)"
        for shift, window in zip(block.shift_size, block.window_size):
            if not 0 <= shift < window:
                shifts, windows = tuple(block.shift_size), tuple(block.window_size)
                return f"its shift {shifts} does not fit its window {windows}"
        return None

    def on_patch(self) -> None:
        _blocks[self._swin_kernels.key] = self
        self._swin_kernels.halves_unknown = why_unknown()
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
        mask = self.attn_mask
        if not can_be_read_now(mask):
            self._swin_kernels.checked = None
            return
        padded = self._padded(getattr(self, self.resolution))
        self._swin_kernels.checked = CheckedMask.of(
            mask, padded, tuple(self.window_size), tuple(self.shift_size)
        )

    def _look_again(self) -> None:
        """Have the static mask compared if it can have changed."""
        known = self._swin_kernels.checked
        if known is None or not known.still(self.attn_mask):
            self._check_mask()

    def _is_shift_mask(self, mask: Tensor, padded: tuple[int, ...]) -> bool:
        """Whether `mask` is known to be what the operation adds by itself at this padded size."""
        layout = (padded, tuple(self.window_size), tuple(self.shift_size))
        if torch.compiler.is_compiling():
            _look_again(self._swin_kernels.key)
        elif not is_traced_by_mode():
            known = self._swin_kernels.checked
            if known is None or known.mask is not mask or known.layout == layout:
                self._look_again()  # else it is no such mask, whatever it holds
        known = self._swin_kernels.checked
        return (
            known is not None
            and known.mask is mask
            and known.expected is not None
            and known.layout == layout
        )

    def _masking(self, size: tuple[int, int]) -> dict[str, Any] | str:
        """Arguments that add the mask that stock would add; where only stock knows, why."""
        # literals: as a global, dynamo would trace a float of dynamic value
        if getattr(self, "dynamic_mask", False):
            return {"mask_value": -100.0}
        mask = self.attn_mask
        if mask is None:
            return {"mask_value": 0.0}
        padded = self._padded(size)
        if self._is_shift_mask(mask, padded):
            return {"mask_value": -100.0}
        tokens = self.window_size[0] * self.window_size[1]
        windows = padded[0] * padded[1] // tokens
        if mask.shape != (windows, tokens, tokens):
            return "its attn_mask is for another number of windows than the map has"
        # 0: the shift moves tokens, the mask alone separates them
        return {"mask": mask, "mask_value": 0.0}

    def _qkv_is_plain(self) -> bool:
        return is_plain(self.attn.qkv, nn.Linear)

    def _qkv(self, tokens: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, tokens, 3·C)"""
        return self.attn.qkv(tokens)

    def _qkv_of_zeros(self) -> Tensor | None:
        """qkv of a token of zeros, which padding adds; None for zeros."""
        return self.attn.qkv.bias

    def _bias(self) -> dict[str, Any]:
        """The operation's bias and scale arguments."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor | None:
        """The stock method of (B, height, width, C), fused; None where stock must run it."""
        if is_exporting(x):
            return None
        masking = self.why_stock(self) or self._masking((x.shape[1], x.shape[2]))
        if isinstance(masking, str):
            self._swin_kernels.runs_stock(self.stock, masking)
            return None
        return attention_of_map(
            x,
            self.attn,
            tuple(self.window_size),
            tuple(self.shift_size),
            qkv=self._qkv,
            qkv_of_zeros=self._qkv_of_zeros,
            qkv_is_plain=self._qkv_is_plain(),
            pad_order="roll-pad",
            backend=self._swin_kernels.backend,
            **masking,
            **self._bias(),
        )

    def _attn(self, x):
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._fused(x)
            return super()._attn(x) if out is None else out  # type: ignore[misc]


class SwinTransformerBlock(_FusedBlock, swin_transformer.SwinTransformerBlock):
    """Swin: a table of biases, scaled products."""

    norm = "pre"
    stock = swin_transformer.SwinTransformerBlock
    stock_attention = swin_transformer.WindowAttention
    attention_methods = ("forward", "_get_rel_pos_bias")
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
            "scale": attn.scale if isinstance(attn.scale, Tensor) else float(attn.scale),
        }


class SwinTransformerV2Block(_FusedBlock, swin_transformer_v2.SwinTransformerV2Block):
    """Swin V2: cosine attention, biases from an MLP on log-spaced coordinates."""

    stock = swin_transformer_v2.SwinTransformerV2Block
    stock_attention = swin_transformer_v2.WindowAttention
    attention_methods = ("forward",)
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
        if type(attn.qkv) is nn.Linear and not has_hooks(attn.qkv):
            return None
        return (
            f"attn.qkv ({type(attn.qkv).__name__}) is not called, as in stock timm, which reads "
            "its weight only; attn.qkv_bias_separate = True has it called"
        )

    def _qkv_bias(self) -> Tensor | None:
        attn = self.attn
        return None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))

    def _qkv_is_called(self) -> bool:
        return self.attn.q_bias is None or self.attn.qkv_bias_separate

    def _qkv_is_plain(self) -> bool:
        return not self._qkv_is_called() or super()._qkv_is_plain()

    def _qkv(self, tokens: Tensor) -> Tensor:
        bias = self._qkv_bias()
        if not self._qkv_is_called():
            return F.linear(tokens, weight=self.attn.qkv.weight, bias=bias)
        qkv = super()._qkv(tokens)
        if bias is not None:
            qkv += bias
        return qkv

    def _qkv_of_zeros(self) -> Tensor | None:
        own = super()._qkv_of_zeros() if self._qkv_is_called() else None
        return sum_of(own, self._qkv_bias())

    def _bias(self) -> dict[str, Any]:
        attn = self.attn
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        return {
            "bias_table": 16 * torch.sigmoid(table),
            "bias_index": attn.relative_position_index,
            "logit_scale": attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp().flatten(),
        }


class SwinTransformerV2CrBlock(_FusedBlock, swin_transformer_v2_cr.SwinTransformerV2CrBlock):
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

    def _behind(self, x: Tensor) -> Tensor:
        return self.norm3(x.flatten(1, 2)).reshape(x.shape)  # as stock hands it over

    def _bias(self) -> dict[str, Any]:
        attn = self.attn
        return {
            "bias": attn._relative_positional_encodings()[0],
            "logit_scale": attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp(),
        }

    def _shifted_window_attn(self, x):
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._fused(x)
            return super()._shifted_window_attn(x) if out is None else out
