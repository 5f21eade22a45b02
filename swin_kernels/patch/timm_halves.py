"""The two halves of timm's blocks as one operation each, where all that lies between is plain.

x + drop_path1(attn(norm1(x))) and x + drop_path2(mlp(norm2(x))), or with the norms behind: the
modules' own parameters, read on each call, and what they would draw for stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, Mlp, activations
from timm.layers import drop as timm_drop
from torch import Tensor, nn

from swin_kernels.ops.layers import (
    is_exporting,
    is_plain,
    is_plain_parameter,
    why_modules_are_watched,
)
from swin_kernels.ops.sublayers import (
    FUSED_ON,
    mlp_sublayer,
    why_attention_unfused,
    why_mlp_unfused,
    window_attention_sublayer,
)
from swin_kernels.patch.core import Fused
from swin_kernels.patch.source import fingerprint

KNOWN_SOURCES = {"2293f10db7de28a0": "timm 1.0.9 to 1.0.31"}


_ACTIVATIONS: dict[tuple[type, str | None], str] = {
    (nn.GELU, "none"): "gelu",
    (nn.GELU, "tanh"): "gelu_tanh",
    (activations.GELU, None): "gelu",
    (activations.GELUTanh, None): "gelu_tanh",
    (nn.ReLU, None): "relu",
    (nn.SiLU, None): "silu",
}


def activation_of(module: Any) -> str | None:
    """What `mlp_sublayer` calls the activation of a module, None if it knows none."""
    return _ACTIVATIONS.get((type(module), getattr(module, "approximate", None)))


def _why_module(name: str, module: Any, *kinds: type[nn.Module]) -> str | None:
    if is_plain(module, *kinds):
        return None
    if type(module) in kinds:
        return f"its {name} has hooks, or a forward of its own"
    return f"its {name} is a {type(module).__name__}"


def why_unknown() -> str | None:
    """Why the source of what the half stands for is not one that was tested, or None."""
    relied_on = (
        Mlp.forward,
        DropPath.forward,
        timm_drop.drop_path,
        activations.GELU.forward,
        activations.GELUTanh.forward,
    )
    found = fingerprint(relied_on)
    if found in KNOWN_SOURCES:
        return None
    what = "cannot be read" if found is None else f"has fingerprint {found}"
    return f"the source of timm's Mlp, DropPath or GELU {what} and is not one of those tested"


def _why_norm(name: str, norm: Any) -> str | None:
    if (reason := _why_module(name, norm, nn.LayerNorm)) is not None:
        return reason
    if norm.weight is None or len(norm.normalized_shape) != 1:
        return f"its {name} has no weight, or is over several axes"
    return _why_parameters(name, norm)


def _why_drop(name: str, drop: Any) -> str | None:
    if (reason := _why_module(name, drop, nn.Dropout, nn.Identity)) is not None:
        return reason
    if isinstance(drop, nn.Dropout) and drop.p > 0 and drop.training:
        return f"its {name} drops, being in training mode"
    return None


def _why_parameters(name: str, layer: Any) -> str | None:
    for parameter in ("weight", "bias"):
        if not is_plain_parameter(x := getattr(layer, parameter, None)):
            return f"its {name}.{parameter} is a {type(x).__name__}"
    return None


def why_mlp_stock(block: Any) -> str | None:
    """Why the MLP half of `block` must run its modules one by one, or None."""
    mlp = block.mlp
    if (reason := why_modules_are_watched() or _why_module("mlp", mlp, Mlp)) is not None:
        return reason
    reason = (
        _why_norm("norm2", block.norm2)
        or _why_module("mlp.fc1", mlp.fc1, nn.Linear)
        or _why_module("mlp.fc2", mlp.fc2, nn.Linear)
        or _why_module("mlp.norm", mlp.norm, nn.Identity)
        or _why_drop("mlp.drop1", mlp.drop1)
        or _why_drop("mlp.drop2", mlp.drop2)
        or _why_module("mlp.act", mlp.act, type(mlp.act))
        or _why_module("drop_path2", block.drop_path2, nn.Identity, DropPath)
        or _why_parameters("mlp.fc1", mlp.fc1)
        or _why_parameters("mlp.fc2", mlp.fc2)
    )
    if reason is None and activation_of(mlp.act) is None:
        return f"its mlp.act is a {type(mlp.act).__name__}"
    return reason


def why_attention_stock(block: Any) -> str | None:
    """Why norm, layers and stochastic depth of its attention run one by one round the op, or None.

    Of a block whose attention itself runs fused.
    """
    attn = block.attn
    if isinstance(getattr(attn, "scale", None), Tensor):
        return "its attn.scale is a tensor"
    if not block._qkv_is_plain():
        return _why_module("attn.qkv", attn.qkv, nn.Linear)
    if (reason := why_modules_are_watched() or _why_parameters("attn.qkv", attn.qkv)) is not None:
        return reason
    channels = attn.qkv.weight.shape[1]
    if attn.qkv.weight.shape[0] != 3 * channels:
        return "its heads have a width of their own, not together that of the map"
    return (
        _why_norm("norm1", block.norm1)
        or _why_module("attn.proj", attn.proj, nn.Linear)
        or _why_drop("attn.proj_drop", attn.proj_drop)
        or _why_module("drop_path1", block.drop_path1, nn.Identity, DropPath)
        or _why_parameters("attn.proj", attn.proj)
    )


def _why_dtype(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, its weights are {weight.dtype}"
    return None


def why_mlp_stock_on(block: Any, x: Tensor, backend: str | None) -> str | None:
    """Why the MLP half is not fused for `x`: no kernel there, or none that is faster."""
    weight = block.mlp.fc1.weight
    return _why_dtype(x, weight) or why_mlp_unfused(x, weight, backend)


def why_attention_stock_on(block: Any, x: Tensor, backend: str | None) -> str | None:
    """The same of the attention half; of anything but a map whatever the windows are."""
    weight, windows = block.attn.qkv.weight, None
    if x.ndim == 4 and not torch.compiler.is_compiling():
        windows = x.shape[0] * math.prod(
            -(-s // w) for s, w in zip(x.shape[1:3], block.window_size)
        )
    return _why_dtype(x, weight) or why_attention_unfused(x, weight, windows, backend)


def _as(block: Any, cls: type) -> Any:
    """A look at a block as one of this class, which it may become; nothing is copied or changed."""
    if isinstance(block, cls):
        return block
    view: Any = object.__new__(cls)
    view.__dict__ = block.__dict__
    return view


def residual_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factors (B,) that `drop_path` would draw for a branch of the shape of x."""
    if not isinstance(drop_path, DropPath) or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    factors = x.new_empty((x.shape[0],)).bernoulli_(keep)
    if keep > 0.0 and drop_path.scale_by_keep:
        factors.div_(keep)
    return factors


def mlp_half(block: Any, x: Tensor, norm: str, backend: str | None) -> Tensor:
    """x plus the block's MLP branch, in one operation."""
    mlp = block.mlp
    return mlp_sublayer(
        x,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        activation=activation_of(mlp.act) or "",
        norm=norm,
        norm_weight=block.norm2.weight,
        norm_bias=block.norm2.bias,
        norm_eps=block.norm2.eps,
        residual_scale=residual_scale(block.drop_path2, x),
        backend=backend,
    )


def attention_half(block: Any, x: Tensor, norm: str, backend: str | None, **options: Any) -> Tensor:
    """x plus the block's attention branch, in one operation; `options` are masks and biases."""
    attn = block.attn
    drop = attn.attn_drop
    return window_attention_sublayer(
        x,
        attn.qkv.weight,
        block._qkv_of_zeros(),
        attn.proj.weight,
        attn.proj.bias,
        attn.num_heads,
        tuple(block.window_size),
        tuple(block.shift_size),
        norm=norm,
        norm_weight=block.norm1.weight,
        norm_bias=block.norm1.bias,
        norm_eps=block.norm1.eps,
        residual_scale=residual_scale(block.drop_path1, x),
        dropout_p=drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0,
        pad_order="roll-pad",
        backend=backend,
        **options,
    )


class WholeHalves(Fused):
    """The forward of timm's blocks: each half one operation where it can be, its modules if not.

    Subclasses have the methods of `patch.timm` that tell when attention itself runs fused.
    """

    norm: ClassVar[str] = "post"  # where the norms of both halves are, as `mlp_sublayer` has it
    # of the stock block; the second is its attention, of the map
    block_methods: ClassVar[tuple[str, ...]]
    _scripted_forward: ClassVar[Callable]

    norm1: Any
    norm2: Any
    drop_path1: Any
    drop_path2: Any
    mlp: Any
    _masking: Callable[[tuple[int, int]], dict[str, Any] | str]
    _bias: Callable[[], dict[str, Any]]

    @classmethod
    def why_half_stock(cls, block: Any, half: str) -> str | None:
        memory = getattr(block, "_swin_kernels", None)
        if memory is not None and memory.level == "attention":
            return 'patched with level="attention"'
        if (reason := why_unknown()) is not None:
            return reason
        backend = None if memory is None else memory.backend
        if half == "MLP":
            return why_mlp_stock(block) or why_mlp_stock_on(block, block.mlp.fc1.weight, backend)
        # before the change of class the block has none of the methods that tell
        reason = cls.why_stock(block) or why_attention_stock(_as(block, cls))
        return reason or why_attention_stock_on(block, block.attn.qkv.weight, backend)

    def _branch(self, x: Tensor, module: Callable, norm: Any) -> Tensor:
        out: Tensor = module(norm(x)) if self.norm == "pre" else norm(module(x))
        return out

    def _with_attention(self, x: Tensor) -> Tensor:
        """The first half of the stock forward."""
        attention = getattr(self, self.block_methods[1])
        return x + self.drop_path1(self._branch(x, attention, self.norm1))

    def _with_mlp(self, x: Tensor) -> Tensor:
        """The second half of the stock forward."""
        tokens = x.flatten(1, 2)  # as stock hands them over
        out = tokens + self.drop_path2(self._branch(tokens, self.mlp, self.norm2))
        return out.reshape(x.shape)

    def _behind(self, x: Tensor) -> Tensor:
        """What the stock forward does behind both halves."""
        return x

    def _halves(self, x: Tensor) -> Tensor | None:
        """The stock forward, each half one operation where it can be; None where neither is."""
        memory = self._swin_kernels
        if memory.level == "attention" or memory.halves_unknown is not None or is_exporting(x):
            return None
        if x.device.type not in FUSED_ON:
            return None
        backend = memory.backend
        fuses_mlp = why_mlp_stock(self) is None and why_mlp_stock_on(self, x, backend) is None
        attended = self._attention_half(x)
        if attended is None and not fuses_mlp:
            return None
        if attended is None:
            attended = self._with_attention(x)
        if fuses_mlp:
            return self._behind(mlp_half(self, attended, self.norm, backend))
        return self._behind(self._with_mlp(attended))

    def _attention_half(self, x: Tensor) -> Tensor | None:
        """The first half as one operation; None where it cannot be."""
        backend = self._swin_kernels.backend
        if self.why_stock(self) is not None or why_attention_stock(self) is not None:
            return None
        if why_attention_stock_on(self, x, backend) is not None:
            return None
        masking = self._masking((x.shape[1], x.shape[2]))
        if isinstance(masking, str):
            return None
        return attention_half(self, x, self.norm, backend, **masking, **self._bias())

    def forward(self, x):
        if torch.jit.is_scripting():
            return self._scripted_forward(x)
        else:  # noqa: RET505  TorchScript compiles what follows a return, but not this branch
            out = self._halves(x)
            return super().forward(x) if out is None else out  # type: ignore[misc]
