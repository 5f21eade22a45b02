"""The dropout mask every backend regenerates: Philox4x32-10, one word per probability.

The counter is (i·N + j, head, window, window >> 32) for query i, key j and the window's number in
the batch (image · nW + window); the key is the 64-bit seed. Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_first_word(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> Tensor:
    """First 32-bit word of each block, as int64 in [0, 2^32); the counters broadcast."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # the product of two 32-bit words wraps in int64, yet its 64 bits are right
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0


def dropout_factor(
    seed: Tensor,
    p: float,
    batch: int,
    windows: int,
    heads: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, nW, H, N, N): 0 where a probability is dropped, 1/(1−p) where it is kept."""

    def axis(length: int, position: int) -> Tensor:
        return torch.arange(length, device=seed.device).view(
            [-1 if i == position else 1 for i in range(5)]
        )

    pair = axis(tokens, 3) * tokens + axis(tokens, 4)
    window = axis(batch, 0) * windows + axis(windows, 1)
    word = philox_first_word(pair, axis(heads, 2), window & _LOW, window >> 32, seed.reshape(()))
    return (word >= int(p * 2**32)).to(dtype) * (1 / (1 - p) if p < 1 else 0.0)
