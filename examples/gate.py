"""A module of one's own inside every Swin block: a gate on the channels, before window attention.

    SwinTransformer(before_attention=ChannelGate)

A module that `before_attention` makes of a block's channels gets the map that attention would get,
(B, height, width, channels), normalised in Swin V1, and returns what attention shall see.
"""

from __future__ import annotations

from torch import Tensor, nn


class ChannelGate(nn.Module):
    """x times a sigmoid for each channel, from convolutions of x pooled over the map.

    Depthwise 3×3, pointwise, batch norm, GELU, global average pool, pointwise, sigmoid. The last
    layer starts at 0 with a bias of `open_at`: the gate is nearly open, and a pretrained model
    begins with what it was.
    """

    def __init__(self, channels: int, open_at: float = 4.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.gate = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, open_at)

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, channels) -> the same."""
        weights = self.gate(self.features(x.permute(0, 3, 1, 2))).sigmoid()  # (B, channels, 1, 1)
        return x * weights.permute(0, 2, 3, 1)
