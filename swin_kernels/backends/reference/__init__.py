"""The contract in plain PyTorch: any device, any dtype, one to three axes."""

from swin_kernels.backends.reference.backward import backward
from swin_kernels.backends.reference.forward import forward, forward_through

__all__ = ["backward", "forward", "forward_through"]
