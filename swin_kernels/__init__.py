"""Shifted-window attention as one operation: exact, fused, differentiable; and patches for the models in use.

Importing this imports neither triton nor any model library.
"""

from swin_kernels.ops.window_attention import (
    ShiftedWindowAttentionFunction,
    shifted_window_attention,
    shifted_window_attention_qkvpacked,
)

__version__ = "0.1.0"

__all__ = [
    "ShiftedWindowAttentionFunction",
    "shifted_window_attention",
    "shifted_window_attention_qkvpacked",
]
