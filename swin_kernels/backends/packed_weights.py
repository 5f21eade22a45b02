"""Weights as the CPU kernels read them, packed once for each version of a weight.

For inference alone: where a gradient is wanted weights change with every step. What is kept lies
beside a weight in no state_dict, as large as the weight itself, and goes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils.weak import WeakIdKeyDictionary

# weight -> (what it was when it was packed, packed)
_packed = WeakIdKeyDictionary()


def _packed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    was = (weight._version, weight.data_ptr(), dtype, tuple(weight.shape), weight.stride())
    known = _packed.get(weight)
    ops = torch.ops.swin_kernels
    # `weight.data` can be written to without a new version: a look at some numbers tells
    if known is None or known[0] != was or not ops.packed_weight_matches.default(weight, known[1]):
        known = was, ops.pack_linear_weight.default(weight.detach().to(dtype))
        _packed[weight] = known
    return known[1]


def packed_for_inference(operands: Any, layers: tuple[str, str], dtype: torch.dtype) -> Any:
    """The operands with packed weights, where those are plain tensors of an eager call.

    `operands` has fields `…_weight` and `…_packed` of each of the layers.
    """
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return operands
    weights = [getattr(operands, f"{layer}_weight") for layer in layers]
    if any(type(w) not in (Tensor, torch.nn.Parameter) or w.is_inference() for w in weights):
        return operands  # an inference tensor has no version
    packed = {f"{layer}_packed": _packed_weight(w, dtype) for layer, w in zip(layers, weights)}
    return operands._replace(**packed)


def forget() -> None:
    """Frees all packed weights."""
    _packed.clear()
