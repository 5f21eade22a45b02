"""Where the tokens of a query, key or value lie in the tensor that holds them."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

LARGEST_INT32 = 2**31 - 1


def pad_to_3d(values, filler) -> tuple:
    """Values of one to three axes as three: those that are missing lead."""
    return (filler,) * (3 - len(values)) + tuple(values)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]


def needs_wide_offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether an element of one image lies 2^31 elements or more from its first: (B, *S, H, D).

    Kernels find image and head with 64 bits; the rest is 32 bits wherever that is enough.
    """
    reach = sum((n - 1) * abs(s) for n, s in zip(shape[1:-2], stride[1:-2]))
    return reach + (shape[-1] - 1) * abs(stride[-1]) > LARGEST_INT32


class TokenLayout(NamedTuple):
    """query, key or value, or a gradient of one, inside the tensor that holds it."""

    tensor: str
    strides: tuple[int, ...]  # image, three axes, head, channel
    start: int
    wide: bool

    @classmethod
    def of(cls, tensor: str, shape, stride, part: int | None = None) -> TokenLayout:
        start = 0
        if part is not None:  # (B, *S, 3, H, D)
            start = part * stride[-3]
            shape, stride = shape[:-3] + shape[-2:], stride[:-3] + stride[-2:]
        strides = (stride[0], *pad_to_3d(stride[1:-2], 0), stride[-2], stride[-1])
        return cls(tensor, strides, start, needs_wide_offsets(shape, stride))

    @classmethod
    def contiguous(
        cls, tensor: str, shape: tuple[int, ...], part: int | None = None
    ) -> TokenLayout:
        return cls.of(tensor, shape, contiguous_stride(shape), part)


def alignment(tokens: Iterable[TokenLayout]) -> int:
    """The largest power of two, up to 16, that divides where every head of every token begins."""
    return math.gcd(16, *(n for t in tokens for n in (*t.strides[:-1], t.start)))


def divisor(n: int) -> tuple[int, int]:
    """A factor, as the bits of a signed number, and a shift: x // n = (2x·factor >> 32) >> shift.

    For 0 ≤ x < 2³¹ (Granlund & Montgomery, "Division by invariant integers using multiplication",
    1994, theorem 4.2).
    """
    shift = (n - 1).bit_length()
    factor = -(-(1 << (31 + shift)) // n)
    return factor - (1 << 32), shift
