"""Peak memory of each step of a model, each variant of it in a process of its own: this module."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swin_kernels.cli import inputs
from swin_kernels.testing.timing import STEPS

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Spec(NamedTuple):
    """What another process needs to take the same steps."""

    model: str  # by timm's name
    size: tuple[int, int] | None  # height and width that it is made for; None: its own
    batch: int
    threads: int
    device: str
    dtype: str
    compiled: bool

    @classmethod
    def of(
        cls,
        model: str,
        images: Tensor,
        size: tuple[int, int] | None = None,
        compiled: bool = False,
    ) -> Spec:
        dtype = str(images.dtype).removeprefix("torch.")
        where = torch.get_num_threads(), str(images.device)
        return cls(model, size, len(images), *where, dtype, compiled)


def peak_memory(spec: Spec, variants: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes that each step of each variant adds, at its peak, to what its process held before.

    Each variant in a process of its own: what this one has freed and kept would hide part of the
    peak. RuntimeError with the last words of a process that failed.
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        # freed blocks go back to the system, so that the high-water mark is what was in use
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_WAIT_POLICY": "PASSIVE",  # they share the CPUs, and nothing is timed
    }

    def measured(variant: str) -> dict[str, int]:
        wanted = json.dumps([variant, *spec])
        command = [sys.executable, "-m", "swin_kernels.cli.memory", wanted]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(f"{variant}: {last[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(len(variants)) as pool:  # all are waited for before one is judged
        return dict(zip(variants, pool.map(measured, variants)))


def _resident(field: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_of(step: str, module: nn.Module, images: Tensor, first: Tensor) -> int:
    """Bytes that a step adds at its peak; OSError where the system does not tell.

    It is taken on `first` before: libraries load, and keep, what they need once.
    """
    module.train(step == "training step")
    STEPS[step](module, first)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        STEPS[step](module, images)
        return torch.cuda.max_memory_allocated(images.device) - before
    _CLEAR.write_text("5")  # the high-water mark starts again at what is held now
    before = _resident("VmRSS")
    STEPS[step](module, images)
    return max(_resident("VmHWM") - before, 0)


def main() -> None:
    import timm

    from swin_kernels.patch import patch

    variant, *wanted = json.loads(sys.argv[1])
    spec = Spec(*wanted)
    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.dtype)
    module = inputs.create(spec.model, spec.size).to(spec.device, dtype)
    if variant == "patched":
        patch(module)
    size = spec.size or timm.data.resolve_data_config(model=module)["input_size"][1:]
    images = torch.zeros(spec.batch, 3, *size, device=spec.device, dtype=dtype)
    if spec.compiled:
        module.compile()
    # another batch would be compiled again, or on a CPU have other weights packed
    first = images if spec.compiled or not images.is_cuda else images[:1]
    print(json.dumps({step: peak_of(step, module, images, first) for step in STEPS}))


if __name__ == "__main__":
    main()
