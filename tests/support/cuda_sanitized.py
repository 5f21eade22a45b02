"""A small set of calls of the CUDA kernels, one for each of them, to run under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/support/cuda_sanitized.py
    python tests/support/cuda_sanitized.py --emulate      here, in tests/support/cuda/emulator.h

Every tensor is an allocation of its own, so that what lies beside it is nobody's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package where it lies
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from swin_kernels.ops.dispatch import BACKENDS
from swin_kernels.testing import Case, make_grad_out, make_operands, run

PLANE = Case(1, (11, 9), (4, 4), (2, 2), bias="table", pads=True)
TILES = Case(1, (10, 9), (9, 9), (4, 4), bias="table", pads=True)
SHAPES = (
    PLANE,  # a padded map; rows of 16 channels, gathered by copies of 16 bytes
    PLANE.but(head_dim=30, layout="strided", mask="soft", bias="dense"),  # one by one
    PLANE.but(cosine=True, packed=True, bias="table+index", dropout_p=0.25),
    TILES,
    TILES.but(head_dim=70, value_dim=40, mask="regions", cosine=True),  # in several turns
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def main() -> None:
    device = torch.device("cuda")
    if sys.argv[1:] == ["--emulate"]:
        from cuda_emulator import emulated_backend

        device, BACKENDS["cuda"] = torch.device("cpu"), emulated_backend()
    count = 0
    for tf32 in (False, True):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for dtype in (torch.float32,) if tf32 else DTYPES:
            for shape in SHAPES:
                case = shape.but(dtype=dtype)
                found = run(case, make_operands(case, device), make_grad_out(case, device), "cuda")
                assert all(x.isfinite().all() for x in (found.out, *found.grads.values())), case
                count += 1
    print(f"{count} cases ran, forward and backward")


if __name__ == "__main__":
    main()
