"""Builds the compiled objects; the rest of the package's facts are in pyproject.toml.

`_C_cpu` always. `_C_cuda` wherever there is a CUDA toolkit to build it with, GPU or not:
SWIN_KERNELS_CUDA=auto (the default), 0 never, 1 or fail. TORCH_CUDA_ARCH_LIST names the
architectures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import setup

OLDEST_TORCH = (2, 11)
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # where TORCH_CUDA_ARCH_LIST names none
OLDEST_ARCHITECTURE = 8.0


def fail(message: str) -> NoReturn:
    sys.exit(f"swin_kernels: {message}")


def toolkits() -> list[Path]:
    """Where a CUDA toolkit may be: CUDA_HOME, that of nvcc, the usual place, PyPI's packages."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper that lies elsewhere: it knows where its toolkit is
        told = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], check=False, capture_output=True, text=True
        ).stderr
        top = re.search(r"TOP=(\S+)", told)
        places.append(Path(top[1]) if top else Path(nvcc).resolve().parent.parent)
    places.append(Path("/usr/local/cuda"))
    for packages in map(Path, sys.path):
        places += sorted(packages.glob("nvidia/cu[0-9]*"), reverse=True)
    return [place.resolve() for place in places if (place / "bin" / "nvcc").exists()]


# what the sources include and link, and which of NVIDIA's packages has it
PARTS = {
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "include/cuda_bf16.h": "nvidia-cuda-runtime",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/nv/target|include/cccl/nv/target": "nvidia-cuda-cccl",
    "lib*/libcudart_static.a": "nvidia-cuda-runtime",
}


def lacks(place: Path) -> list[str]:
    """Parts of a toolkit that are not there, as files; conda has them under targets/."""
    return [
        f"{part} ({package})"
        for part, package in PARTS.items()
        if not any(
            next(at.glob(pattern), None)
            for at in (place, *place.glob("targets/*"))
            for pattern in part.split("|")
        )
    ]


CUDA = os.environ.get("SWIN_KERNELS_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    fail(f"SWIN_KERNELS_CUDA: expected auto, 0 or 1, got {CUDA!r}")
TOOLKITS = toolkits() if CUDA != "0" else []
HOME = next((place for place in TOOLKITS if not lacks(place)), None)
if HOME is not None:
    os.environ["CUDA_HOME"] = str(HOME)  # before torch.utils.cpp_extension looks for one

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    fail(
        f"building needs torch >= 2.11, which this Python cannot import ({error}). "
        "Install torch first, or build without --no-build-isolation."
    )

# major and minor only: vendors ship 2.11.0a0+… builds that are 2.11 in all but name
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    fail(f"building needs torch >= 2.11, found {torch.__version__}")

# the stable ABI of torch 2.11, packed in bytes: one build loads on every later torch
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
WARNINGS = ["-Wall", "-Wextra"]
STANDARD = "-std=c++20"  # torch 2.11 takes C++17 by itself
CXX_FLAGS = [STANDARD, "-O3", "-g0", "-fvisibility=hidden", TORCH_TARGET]


def files(*patterns: str) -> list[str]:
    """What matches, relative to this file, in an order that does not depend on the file system."""
    root = Path(__file__).parent
    return sorted(
        str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)
    )


def why_no_cuda() -> str | None:
    """What keeps `_C_cuda` from being built; never that no GPU is present."""
    if CUDA == "0":
        return "SWIN_KERNELS_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if TOOLKITS and HOME is None:
        return f"the toolkit in {TOOLKITS[0]} lacks {', '.join(lacks(TOOLKITS[0]))}"
    if HOME is None:
        return (
            "no CUDA toolkit found: set CUDA_HOME, put nvcc on PATH, or `pip install "
            "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl`"
        )
    ours, torchs = nvcc_version().split(".")[0], torch.version.cuda.split(".")[0]
    if ours != torchs:
        return f"the toolkit in {HOME} is CUDA {ours}, torch is built with {torchs}"
    return None


def nvcc_version() -> str:
    told = subprocess.run(
        [str(HOME / "bin" / "nvcc"), "--version"], check=False, capture_output=True, text=True
    ).stdout
    release = re.search(r"release (\d+\.\d+)", told)
    return release[1] if release else "unknown"


# names that torch's own extensions take
FAMILIES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def architectures() -> tuple[list[str], list[str]]:
    """What to build for, and what of it this nvcc or these kernels do not know.

    Where the last is left out and had PTX, which later GPUs compile, the last that is kept gets it.
    """
    told = subprocess.run(
        [str(HOME / "bin" / "nvcc"), "--list-gpu-arch"], check=False, capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"compute_(\d+)", told))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES
    for family, members in FAMILIES.items():
        listed = re.sub(rf"\b{family}\b", members, listed)
    kept, left = [], []
    for name in filter(None, re.split(r"[;, ]+", listed)):
        number = re.fullmatch(r"(\d+\.\d+)a?(\+PTX)?", name)
        fits = (
            number is not None
            and number[1].replace(".", "") in known
            and float(number[1]) >= OLDEST_ARCHITECTURE
        )
        (kept if fits else left).append(name)
    if kept and any("+PTX" in name for name in left) and not any("+PTX" in x for x in kept):
        kept[-1] += "+PTX"
    return kept, left


def cuda_extension() -> CUDAExtension:
    extension = CUDAExtension(
        "swin_kernels._C_cuda",
        ["csrc/arguments.cpp", *files("csrc/cuda/**/*.cu")],
        include_dirs=[str(Path("csrc").resolve())],
        depends=["setup.py", *files("csrc/*.h", "csrc/cuda/**/*.h", "csrc/cuda/**/*.cuh")],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *WARNINGS, "-DUSE_CUDA"],
            "nvcc": [STANDARD, "-O3", "-DUSE_CUDA", TORCH_TARGET, "-Xcompiler=-fvisibility=hidden"],
        },
    )
    # a library that every program has: torch's own would tie the object to its version
    extension.libraries = [name for name in extension.libraries if name != "cudart"]
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    # of toolkits from PyPI torch looks in lib64, where they have lib
    targets = list(HOME.glob("targets/*"))
    folders = [HOME / "lib64", HOME / "lib", *(target / "lib" for target in targets)]
    extension.library_dirs += [str(folder) for folder in folders if folder.exists()]
    extension.include_dirs += [str(target / "include") for target in targets]
    return extension


extensions = [
    CppExtension(
        "swin_kernels._C_cpu",
        files("csrc/*.cpp", "csrc/cpu/**/*.cpp"),
        include_dirs=[str(Path("csrc").resolve())],  # ninja compiles from another directory
        depends=["setup.py", *files("csrc/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.inc")],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, *WARNINGS, "-ffp-contract=fast"],
    )
]
reason = why_no_cuda()
told = f"without _C_cuda: {reason}"
if reason is None:
    kept, left = architectures()
    if kept:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(kept)
        extensions.append(cuda_extension())
        told = f"with _C_cuda (CUDA {nvcc_version()}) for {' '.join(kept)}"
        if left:
            told += (
                f", not for {' '.join(left)}: not known to it, older than 8.0, or no such number"
            )
    else:
        told = (
            f"without _C_cuda: TORCH_CUDA_ARCH_LIST: expected numbers from 8.0 to what CUDA "
            f"{nvcc_version()} knows, as 9.0 or 12.0+PTX, got {' '.join(left)}"
        )
if CUDA == "1" and len(extensions) == 1:
    fail(f"SWIN_KERNELS_CUDA=1, but {told}")
if shutil.which("ccache"):
    os.environ.setdefault("CXX", "ccache c++")
    if HOME is not None:
        os.environ.setdefault("PYTORCH_NVCC", f"ccache {HOME}/bin/nvcc")


def readme() -> str:
    """README with links that hold outside the repository."""
    text = Path("README.md").read_text(encoding="utf-8")
    blob = "https://github.com/swin-kernels/swin_kernels/blob/main"
    text = re.sub(r"(!\[[^]]*\])\((?!http)([^)]+)\)", rf"\1({blob}/\2?raw=true)", text)
    return re.sub(r"(?<!!)(\[[^]]*\])\((?!http|#)([^)]+)\)", rf"\1({blob}/\2)", text)


class Build(BuildExtension):
    """BuildExtension, with a line of what is built, and why not more."""

    def run(self) -> None:
        print(f"swin_kernels: building _C_cpu {told}", flush=True)
        super().run()


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
