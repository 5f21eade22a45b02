"""The CUDA kernels on the host: built with the C++ compiler against tests/cuda/emulator.h.

The same sources as the compiled object `_C_cuda`, ops and all; only what they ask of the device is
emulated. It is built once for each state of the sources.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

from swin_kernels.kernels.native import CudaBackend, Ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/cuda/*.cu", "csrc/arguments.cpp", "tests/cuda/emulator.cpp")
HEADERS = ("csrc/*.h", "csrc/cuda/*.h", "tests/cuda/*.h")


def _files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def flags() -> list[str]:
    """What the sources need to be compiled for the host."""
    includes = [ROOT / "csrc", ROOT / "tests" / "cuda", *map(Path, cpp_extension.include_paths())]
    return [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in includes),
    ]


def build() -> Path:
    """The shared object of the emulated ops."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    sources = _files(SOURCES)
    libraries = cpp_extension.library_paths()
    command = [
        *compiler,
        *("-O1", "-march=native", "-ffp-contract=fast"),  # nvcc fuses too
        *flags(),
        "-shared",
        *("-x", "c++", *map(str, sources), "-x", "none"),
        *(f"-L{path}" for path in libraries),
        *(f"-Wl,-rpath,{path}" for path in libraries),
        "-ltorch_cpu",
        "-lc10",
    ]
    contents = [path.read_bytes() for path in (*sources, *_files(HEADERS))]
    key = hashlib.sha256("\0".join([torch.__version__, *command]).encode() + b"".join(contents))
    built = ROOT / "build" / f"cuda-emulated-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        made = built.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], check=False, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        made.replace(built)  # several processes may build
    return built


def emulated_backend() -> CudaBackend:
    """The backend `cuda`, on CPU tensors."""
    torch.ops.load_library(str(build()))
    names = (f"swin_kernels_emulated::cuda_{which}" for which in ("forward", "backward"))
    backend = CudaBackend()
    backend.ops = Ops.named(*names)
    backend.device_type = "cpu"
    return backend
