"""Sees to it that the CUDA object runs on this GPU: taken as it is where it loads, else built.

    python -m benchmarks.gpu_tools.cuda_build [--rehearse]

Exit code: 0; 1 where it neither loads nor builds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASK = """\
import torch
from swin_kernels.backends.native import CUDA_OBJECT
reason = CUDA_OBJECT.error
major, minor = torch.cuda.get_device_capability()
if reason is None and not torch.ops.swin_kernels.cuda_has_code_for(major, minor):
    reason = "no code for this GPU"
print(f"{major}.{minor}")
raise SystemExit(reason)
"""
EMULATED = """\
import sys
sys.path.insert(0, "tests/support")
from cuda_emulator import build_checks
build_checks()
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="the kernels for the CPU emulator")
    if parser.parse_args(arguments).rehearse:
        return subprocess.run([sys.executable, "-c", EMULATED], cwd=ROOT, check=False).returncode
    asked = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        print("the CUDA object loads, and has code for this GPU")
        return 0
    print(asked.stderr.strip(), "\nbuilding it", flush=True)
    told = {"SWIN_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": asked.stdout.strip() or "9.0"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return int(subprocess.run(build, cwd=ROOT, env=os.environ | told, check=False).returncode != 0)


if __name__ == "__main__":
    raise SystemExit(main())
