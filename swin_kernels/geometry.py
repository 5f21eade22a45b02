"""Windows on a grid: padding, cyclic shift, regions and the shift mask, for one to three axes.

The only place that knows how a map is cut into windows. An axis of `size` tokens is padded at its
end to a multiple of the window, rolled by -shift and split (Liu et al., ICCV 2021, section 3.2,
figure 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PAD_ORDERS = ("pad-roll", "roll-pad")
MAX_TOKENS = 1 << 15  # of a window: N² is then an int32, and no product of sizes overflows


def per_axis(value: int | Sequence[int], axes: int, name: str) -> tuple[int, ...]:
    """`value` once per axis; ValueError if it is neither an int nor a sequence of `axes` ints."""
    values: tuple = tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(
            f"{name}: expected one number or one for each of {axes} axes, got {value!r}"
        )
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise ValueError(
                f"{name}: expected whole numbers, got {value!r}, a {type(number).__name__} in it"
            )
    return values


@dataclass(frozen=True)
class Grid:
    """How one map of `size` tokens an axis is padded, rolled and cut.

    Coordinates named `rolled` run over the padded, rolled map that the windows tile; `source`
    coordinates run over the map as the caller holds it.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    periodic: tuple[bool, ...]
    pad_order: str = "pad-roll"

    @classmethod
    def checked(
        cls,
        size: Sequence[int],
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        periodic: bool | Sequence[bool] = False,
        pad_order: str = "pad-roll",
    ) -> Grid:
        """A grid from user input; ValueError says what does not fit."""
        axes = len(size)
        window = per_axis(window_size, axes, "window_size")
        shift = per_axis(shift_size, axes, "shift_size")
        wraps: tuple = (
            tuple(periodic) if isinstance(periodic, (list, tuple)) else (periodic,) * axes
        )
        if len(wraps) != axes or not all(isinstance(p, bool) for p in wraps):
            raise ValueError(
                f"periodic: expected a bool or one for each of {axes} axes, got {periodic!r}"
            )
        if pad_order not in PAD_ORDERS:
            raise ValueError(f"pad_order: expected one of {PAD_ORDERS}, got {pad_order!r}")
        if any(w < 1 for w in window):
            raise ValueError(f"window_size: expected at least 1 on each axis, got {window}")
        if math.prod(list(window)) > MAX_TOKENS:
            raise ValueError(
                f"window_size: expected at most {MAX_TOKENS} tokens in a window, got {window}"
            )
        for axis in range(axes):
            if not 0 <= shift[axis] < window[axis]:
                raise ValueError(
                    "shift_size: expected 0 <= shift < window on each axis, "
                    f"got shift {shift} with window {window}"
                )
            if size[axis] < 1:
                raise ValueError(
                    f"spatial size: expected at least 1 token on each axis, got {tuple(size)}"
                )
        return cls(tuple(size), window, shift, wraps, pad_order)

    @property
    def axes(self) -> int:
        return len(self.size)

    @property
    def padded(self) -> tuple[int, ...]:
        """Tokens an axis after padding."""
        return tuple(-(-s // w) * w for s, w in zip(self.size, self.window))

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows an axis."""
        return tuple(-(-s // w) for s, w in zip(self.size, self.window))

    @property
    def windows(self) -> int:
        """Windows of one map, nW."""
        return math.prod(self.counts)

    @property
    def tokens(self) -> int:
        """Tokens of one window, N."""
        return math.prod(self.window)

    @property
    def needs_padding(self) -> bool:
        return any(s % w != 0 for s, w in zip(self.size, self.window))

    def source(self, axis: int, rolled: int) -> int | None:
        """Where the token at `rolled` comes from on this axis; None if padding added it."""
        size, padded, shift = self.size[axis], self.padded[axis], self.shift[axis]
        if self.pad_order == "pad-roll":
            position = (rolled + shift) % padded
            return position if position < size else None
        return (rolled + shift) % size if rolled < size else None

    def region(self, axis: int, rolled: int) -> int:
        """0 in the body of the map, 1 and 2 on either side of the seam in its last window."""
        shift, padded = self.shift[axis], self.padded[axis]
        if shift == 0 or self.periodic[axis]:
            return 0
        return int(rolled >= padded - self.window[axis]) + int(rolled >= padded - shift)

    def region_map(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Region of every token of the rolled map: (*padded), int64. At most 3 regions an axis."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for axis in range(self.axes):
            codes = [self.region(axis, i) for i in range(self.padded[axis])]
            total = total[..., None] * 3 + torch.tensor(codes, dtype=torch.int64, device=device)
        return total

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *padded, ...) -> (B, nW, N, ...): windows and the tokens in them row-major."""
        batch, rest = x.shape[0], x.shape[1 + self.axes :]
        halves = itertools.chain.from_iterable(zip(self.counts, self.window))
        x = x.reshape(batch, *halves, *rest)
        x = x.movedim(tuple(range(1, 2 * self.axes, 2)), tuple(range(1, 1 + self.axes)))
        return x.reshape(batch, self.windows, self.tokens, *rest)

    def merge(self, windows: torch.Tensor) -> torch.Tensor:
        """(B, nW, N, ...) -> (B, *padded, ...): the inverse of `split`."""
        batch, rest = windows.shape[0], windows.shape[3:]
        x = windows.reshape(batch, *self.counts, *self.window, *rest)
        x = x.movedim(tuple(range(1, 1 + self.axes)), tuple(range(1, 2 * self.axes, 2)))
        return x.reshape(batch, *self.padded, *rest)

    def shift_mask(
        self,
        mask_value: float = -100.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """(nW, N, N): `mask_value` between tokens of different regions, 0 elsewhere."""
        regions = self.split(self.region_map(device)[None])[0]  # (nW, N)
        apart = regions[:, :, None] != regions[:, None, :]
        return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, mask_value)
