"""Models in use, patched: their window attention runs as the fused operation, with the same
numbers.

The only place that imports model libraries, each when a model built from it is patched.
"""

from swin_kernels.patch.core import PatchReport, patch, patched, unpatch
from swin_kernels.patch.explain import explain

__all__ = ["PatchReport", "explain", "patch", "patched", "unpatch"]
