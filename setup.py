"""Builds the compiled objects; the rest of the package's facts are in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 11)

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"swin_kernels: building needs torch >= 2.11, which this Python cannot import ({error}). "
        "Install torch first, or build without --no-build-isolation."
    )

# major and minor only: vendors ship 2.11.0a0+… builds that are 2.11 in all but name
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"swin_kernels: building needs torch >= 2.11, found {torch.__version__}")

# the stable ABI of torch 2.11, packed in bytes: one build loads on every later torch
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def files(*patterns: str) -> list[str]:
    """What matches, relative to this file, in an order that does not depend on the file system."""
    root = Path(__file__).parent
    return sorted(
        str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)
    )


setup(
    ext_modules=[
        CppExtension(
            "swin_kernels._C_cpu",
            files("csrc/*.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(Path("csrc").resolve())],  # ninja compiles from another directory
            depends=["setup.py", *files("csrc/**/*.h")],
            py_limited_api=True,
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-ffp-contract=fast",
                "-Wall",
                "-Wextra",
                TORCH_TARGET,
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
