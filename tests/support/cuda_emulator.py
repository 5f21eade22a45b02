"""The CUDA kernels on the host: built with the C++ compiler against tests/support/cuda/emulator.h.

The same sources as the compiled object `_C_cuda`, ops and all; only what they ask of the device is
emulated. It is built once for each state of the sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from command_lines import ROOT, run
from torch.utils import cpp_extension

from swin_kernels.backends.native import CudaBackend, Ops
from swin_kernels.ops.autograd import ATTENTION, register

SOURCES = ("csrc/cuda/**/*.cu", "csrc/arguments.cpp", "tests/support/cuda/emulator.cpp")
HEADERS = (
    "csrc/*.h",
    "csrc/cuda/**/*.h",
    "csrc/cuda/**/*.cuh",
    "tests/support/cuda/*.h",
)
CHECKS = ("tests/support/cuda/checks.cpp", "tests/support/cuda/emulator.cpp")


def _files(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def _flags() -> list[str]:
    includes = [
        ROOT / "csrc",
        ROOT / "tests" / "support" / "cuda",
        *map(Path, cpp_extension.include_paths()),
    ]
    return [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-O2",
        "-march=native",
        "-ffp-contract=fast",  # nvcc fuses too
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in includes),
    ]


def _built(name: str, patterns: tuple[str, ...], link: list[str]) -> Path:
    """`name`, made of these sources unless it is there for just this state of them."""
    sources, compiler = _files(patterns), shlex.split(os.environ.get("CXX", "c++"))
    contents = [path.read_bytes() for path in (*sources, *_files(HEADERS))]
    facts = [torch.__version__, *compiler, *_flags(), *link]
    key = hashlib.sha256("\0".join(facts).encode() + b"".join(contents)).hexdigest()[:16]
    built = ROOT / "build" / f"{key}-{name}"
    if built.exists():
        return built
    built.parent.mkdir(exist_ok=True)
    with (
        open(built.with_suffix(".lock"), "w") as lock,
        tempfile.TemporaryDirectory(dir=built.parent) as folder,
        ThreadPoolExecutor(2) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        if built.exists():
            return built

        def compiled(source: Path) -> str:
            made = f"{folder}/{source.name}.o"
            run(*compiler, *_flags(), "-x", "c++", "-c", source, "-o", made)
            return made

        objects = list(pool.map(compiled, sources))
        made = Path(folder) / name
        run(*compiler, *objects, *link, "-o", made)
        made.replace(built)
    return built


def build() -> Path:
    """The shared object of the emulated ops."""
    libraries = cpp_extension.library_paths()
    link = ["-shared", *(f"-L{path}" for path in libraries)]
    link += [*(f"-Wl,-rpath,{path}" for path in libraries), "-ltorch_cpu", "-lc10"]
    return _built("cuda_emulated.so", SOURCES, link)


def build_checks() -> Path:
    """The program of tests/support/cuda/checks.cpp."""
    return _built("cuda_checks", CHECKS, [])


def emulated_backend() -> CudaBackend:
    """The backend `cuda`, on CPU tensors."""
    torch.ops.load_library(str(build()))
    names = (
        f"swin_kernels_emulated::window_attention_{which}" for which in ("forward", "backward")
    )
    backend = CudaBackend()
    backend.ops, backend.device_types = Ops.named(*names), ("cpu",)
    register(ATTENTION, backend)
    return backend
