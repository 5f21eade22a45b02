"""Shifted-window attention as one operation: exact, fused, differentiable; and its patches.

Importing this imports neither triton nor any model library.
"""

from swin_kernels.modules import WindowAttention, WindowAttentionV2
from swin_kernels.ops.attention import (
    ShiftedWindowAttentionFunction,
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
)
from swin_kernels.ops.sublayers import mlp_sublayer, window_attention_sublayer
from swin_kernels.patch import explain, patch, patched, unpatch
from swin_kernels.version import __version__ as __version__

__all__ = [
    "ShiftedWindowAttentionFunction",
    "WindowAttention",
    "WindowAttentionV2",
    "explain",
    "mlp_sublayer",
    "patch",
    "patched",
    "shifted_window_attention",
    "shifted_window_attention_qkvpacked",
    "unpatch",
    "window_attention_sublayer",
]
