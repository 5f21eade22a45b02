"""Arithmetic of offsets on the host: divisions that kernels do by multiplying."""

from __future__ import annotations

import pytest

from swin_kernels.backends.triton.token_layout import divisor


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 255, 641, 65_535, 65_536, 2**30 + 1, 2**31 - 1])
def test_multiplying_and_shifting_divides_every_31_bit_number(n):
    factor, shift = divisor(n)
    assert -(2**31) <= factor < 2**31  # as a kernel's argument of 32 bits
    multiples = {k * n for k in (0, 1, 2, 3, (2**31 - 1) // n)}
    near = {m + d for m in multiples for d in (-1, 0, 1)} | {2**31 - 1, 2**30, 12_345_678}
    for x in (x for x in near if 0 <= x < 2**31):
        assert ((2 * x * (factor % 2**32)) >> 32) >> shift == x // n
