"""A patched timm Swin as a package that C++ runs without Python: model.pt2, tensors.pt.

    python export.py --model swin_tiny_patch4_window7_224 --out build

torch.export records the graph with our operation in it, AOTInductor compiles the rest. The
operation itself is in the package's compiled objects, `_C_cpu` and `_C_cuda`, which the program
loads: on a GPU that has to be backend `cuda`, as Triton's kernels are launched from Python.
tensors.pt holds inputs, the stock model's logits of them, and those in float64: as many inputs as
make a thousand logits, since the largest of fewer errors is dominated by sampling noise.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import timm
import torch

import swin_kernels
from swin_kernels.backends import native
from swin_kernels.testing import FEW

# the first defines the operation, each has its kernels for one device
OBJECTS = {"cpu": (native.CPU_OBJECT,), "cuda": (native.CPU_OBJECT, native.CUDA_OBJECT)}


def compiled_objects(device: str) -> str:
    """The shared objects that a program for this device loads; exits where one is missing."""
    for found in OBJECTS[device]:
        if found.error is not None:
            sys.exit(f"export: the operation for {device} is not there: {found.error}")
    return ":".join(str(found.path) for found in OBJECTS[device])


def make_model(name: str, size: int | None) -> torch.nn.Module:
    """A Swin of timm with random weights; exits where there is none of that name and size."""
    torch.manual_seed(0)
    try:
        return timm.create_model(name, **({} if size is None else {"img_size": size})).eval()
    except (RuntimeError, TypeError) as error:
        sys.exit(f"export: timm makes no {name} of that size: {error}")


def package(model: torch.nn.Module, shape: tuple[int, ...], device: str, out: Path) -> None:
    """Writes model.pt2, tensors.pt and, in `library`, where the operation is, to a folder.

    `shape` is (B, 3, height, width); the package takes any batch from 1 to 64 where B is above 1.
    """
    libraries = compiled_objects(device)
    image = torch.randn(shape)
    with torch.no_grad():
        inputs = -(-FEW // model(image).numel())
        images = torch.cat([image[None], torch.randn(inputs - 1, *shape)])
        best = copy.deepcopy(model).double()
        exact = torch.stack([best(x.double()) for x in images])
        model, image = model.to(device), image.to(device)
        stock = torch.stack([model(x.to(device)) for x in images])
    print(swin_kernels.patch(model, backend=device))
    batch = {0: torch.export.Dim("batch", min=1, max=64)} if len(image) > 1 else {}
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=(batch,))
    out.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(out / "model.pt2"))
    torch.save([images, stock.cpu(), exact], out / "tensors.pt")
    (out / "library").write_text(f"{libraries}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="of timm")
    parser.add_argument("--size", type=int, help="of the square input; default: the model's own")
    parser.add_argument("--batch", type=int, default=2, help="free in the package if above 1")
    parser.add_argument("--device", choices=OBJECTS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "build")
    options = parser.parse_args()
    if options.batch < 1:
        parser.error(f"--batch: expected at least 1, got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    model = make_model(options.model, options.size)
    height, width = model.patch_embed.img_size
    package(model, (options.batch, 3, height, width), options.device, options.out)


if __name__ == "__main__":
    main()
