"""Weights as the CPU kernels read them, packed once for each version of a weight.

For inference alone: where a gradient is wanted weights change with every step. What is kept lies
beside a weight in no state_dict, as large as the weight itself, and goes when a weight is packed
after this one is gone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.multiprocessing.reductions import StorageWeakRef


class _Packed(NamedTuple):
    """A packed weight, and of what.

    Its storage: a weak reference to the tensor would keep torch from swapping it with another.
    """

    storage: StorageWeakRef
    facts: tuple
    packed: Tensor


_packed: dict[int, _Packed] = {}  # by the address of the weight


def _packed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    address = weight.data_ptr()
    facts = (weight._version, dtype, tuple(weight.shape), weight.stride())
    known = _packed.get(address)
    ops = torch.ops.swin_kernels
    # `weight.data` can be written to without a new version: a look at some numbers tells
    if (
        known is None
        or known.facts != facts
        or known.storage.expired()  # another weight lies there now
        or not ops.packed_weight_matches.default(weight, known.packed)
    ):
        forget_gone()
        packed = ops.pack_linear_weight.default(weight.detach().to(dtype))
        known = _Packed(StorageWeakRef(weight.untyped_storage()), facts, packed)
        _packed[address] = known
    return known.packed


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


def forget_gone() -> None:
    """Frees what was packed of weights that are there no more."""
    for address in [a for a, known in list(_packed.items()) if known.storage.expired()]:
        _packed.pop(address, None)


def forget() -> None:
    """Frees all packed weights."""
    _packed.clear()
