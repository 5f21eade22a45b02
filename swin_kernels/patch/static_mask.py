"""A block's static mask: whether it is the shift mask, which the operation computes by itself.

A mask that is compared once may be edited later, and an edit through `.data`, NumPy or a broadcast
of buffers (DDP) leaves no trace in its version.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TypeGuard
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from swin_kernels.geometry import Grid

STOCK_MASK_VALUE = -100.0

# the shift mask of a geometry, as long as a block whose mask equals it is there
_shift_masks: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def _shift_mask(grid: Grid, mask: Tensor) -> Tensor:
    key = (grid.padded, grid.window, grid.shift, mask.dtype, mask.device)
    if (found := _shift_masks.get(key)) is None:
        found = _shift_masks[key] = grid.shift_mask(STOCK_MASK_VALUE, mask.dtype, mask.device)
    return found


def can_be_read_now(mask: object) -> TypeGuard[Tensor]:
    """Whether this is a plain tensor with a version and with numbers that may be waited for."""
    return (
        type(mask) is Tensor
        and not mask.is_meta
        and not mask.is_inference()
        and not torch._C._are_functorch_transforms_active()  # a batch of masks has no one value
        and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def reads_each_time(mask: Tensor) -> bool:
    """Whether all numbers are compared on each call: on other devices that would wait for them."""
    return mask.device.type == "cpu"


# how often memory came to be watched: what was compared before may since have been written to, by
# way of another mask in the same memory
_times_watched = [0]
_lock = threading.Lock()  # making memory copy-on-write is not safe in two threads


def _is_watched(mask: Tensor) -> bool:
    return torch._C._is_cow_tensor(mask)  # type: ignore[attr-defined]


def _watch(mask: Tensor) -> bool:
    """Have a later write leave a trace, whatever it goes through; False where that cannot be.

    A lazy clone makes the memory copy-on-write, until someone asks for a pointer to write through;
    as the clone is gone by then, the memory stays where it is.
    """
    if not _is_watched(mask):
        try:
            mask._lazy_clone()
        except RuntimeError:  # memory of another process, a file or another library
            return False
        _times_watched[0] += 1
    return _is_watched(mask)


@dataclass(frozen=True, eq=False)
class CheckedMask:
    """A mask that was compared with the shift mask of a layout (padded size, window, shift)."""

    mask: Tensor
    version: int
    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    expected: Tensor | None  # the shift mask, where the mask equals it and can be relied on
    watched: int  # how often memory had come to be watched by then

    @classmethod
    def of(
        cls, mask: Tensor, padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
    ) -> CheckedMask:
        grid = Grid(padded, window, shift, (False,) * len(padded))
        expected: Tensor | None = None
        if mask.shape == (grid.windows, grid.tokens, grid.tokens):
            shift_mask = _shift_mask(grid, mask)
            with _lock:
                # watched before it is compared, so that no write falls between the two
                relied_on = reads_each_time(mask) or _watch(mask)
                if relied_on and torch.equal(mask, shift_mask):
                    expected = shift_mask
        return cls(mask, mask._version, (padded, window, shift), expected, _times_watched[0])

    def still(self, mask: Tensor | None) -> bool:
        """Whether the answer holds: `mask` is the one compared, and nothing has changed in it.

        On a CPU all numbers are compared again: 32 µs for 64 windows of 49 tokens (Zen 5, 2026-11),
        0.05 % of a Swin-T's time at batch 1. Elsewhere it costs 0.1 µs to see that nobody wrote.
        """
        if self.mask is not mask or self.version != mask._version:
            return False
        if self.expected is None:
            return True
        if reads_each_time(mask):
            return torch.equal(mask, self.expected)
        return self.watched == _times_watched[0] and _is_watched(mask)
