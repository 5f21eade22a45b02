"""What the CUDA C++ kernels compile to: registers, shared memory and instructions, without a GPU.

    python -m benchmarks.codegen.cuda_object      writes build/cuda-machine-code.md

Reads the built object `_C_cuda` with the cuobjdump that comes with Triton, and asks a program of
the tests, which has the same headers, for the shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.codegen import aot
from benchmarks.report.rows import ROOT, markdown_table
from swin_kernels.backends import native
from swin_kernels.backends.triton.launch_spec import REGISTERS

REPORT = ROOT / "build" / "cuda-machine-code.md"
# unit, element as in a mangled name: precision
PRECISIONS = {
    ("0", "6__half"): "fp16",
    ("0", "13__nv_bfloat16"): "bf16",
    ("1", "f"): "tf32",
    ("2", "f"): "fp32",
    ("2", "d"): "fp64",
}
ON_MATRIX_UNITS = ("fp16", "bf16", "tf32")
SHARED = 99 << 10  # bytes that every GPU from sm_80 on lets a program have
THREADS = 128
_FUNCTION = re.compile(r"^\s*Function\s?:?\s?(\S+?):?$")
NAME = re.compile(
    r"cuda\d+([a-z_]+?)INS0_9PrecisionI(6__half|13__nv_bfloat16|f|d)[fd]LNS0_4UnitE(\d)EEELi(\d+)E"
)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
COLUMNS = ("precision", "kernel", "channels", "registers", "shared", "instructions", "matrix")
HEADER = """\
# The machine code of the CUDA C++ kernels

`make aot-report`, CUDA {cuda}, torch {torch}: the built object, read with cuobjdump. Nothing here
was run or timed. Registers are a thread's, 128 of which are a program; shared memory is a
program's in bytes, an explicit mask aside; instructions, and matrix instructions among them, are
those of the whole kernel, whose loops over channels and tokens are not unrolled. Nothing spills to
memory. Sums of partial sums and the gathering of a table's gradient, which multiply nothing, are
left out.\
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel of the object, for one architecture."""

    arch: str
    name: str
    precision: str
    channels: int  # that a tile holds
    registers: int
    stack: int
    instructions: int
    matrix: int
    spills: int

    def defects(self) -> list[str]:
        """What a built object must not have."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if 2 * THREADS * -(-self.registers // 8) * 8 > REGISTERS:
            found.append(f"{self.registers} registers: one program alone on a multiprocessor")
        if (self.matrix > 0) != (self.precision in ON_MATRIX_UNITS):
            found.append(f"{self.matrix} matrix instructions")
        return found


def dump(path: Path, flag: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, function, line) of what cuobjdump prints."""
    command = [aot.CUOBJDUMP, flag, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag} {path}: exit code {done.returncode}")
    arch = function = ""
    for line in done.stdout.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := _FUNCTION.match(line):
            function = match[1]
        elif function:
            yield arch, function, line


def kernels_of(path: Path) -> list[Kernel]:
    """Every kernel of the object that multiplies."""
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    for arch, function, line in dump(path, "--dump-resource-usage"):
        if found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[arch, function] = int(found[1]), int(found[2])
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arch, function, line in dump(path, "--dump-sass"):
        if (found := _INSTRUCTION.match(line)) and found[1] != "NOP":
            names[arch, function].append(found[1])
    kernels = []
    for (arch, function), cost in usage.items():
        if name := NAME.search(function):
            kernel, element, unit, channels = name.groups()
            of = (arch, kernel, PRECISIONS[unit, element], int(channels), *cost)
            kernels.append(Kernel(*of, *aot.counts_of(names[arch, function])))
    order = list(PRECISIONS.values())
    return sorted(kernels, key=lambda k: (k.arch, order.index(k.precision), k.name, k.channels))


def check(name: str, given: str = "") -> str:
    """What the program of the tests, which has the headers of the kernels, prints for `name`."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from cuda_emulator import build_checks

    return subprocess.check_output([build_checks(), name], input=given, text=True)


@cache
def shared_memory() -> dict[tuple[str, str, int], int]:
    """Bytes of each (kernel, precision, channels), by the headers that the kernels include."""
    rows = (line.split() for line in check("shared memory").splitlines() if line)
    return {(kernel, precision, int(ch)): int(size) for kernel, precision, ch, size in rows}


def report(kernels: Iterable[Kernel], shared: dict[tuple[str, str, int], int], cuda: str) -> str:
    """The page: a table per architecture."""
    lines = [HEADER.format(cuda=cuda, torch=torch.__version__)]
    rows = list(kernels)
    for arch in dict.fromkeys(row.arch for row in rows):
        figures: dict[tuple, list[str]] = {}  # precisions whose code costs the same share a line
        for row in (row for row in rows if row.arch == arch):
            size = shared[row.name, row.precision, row.channels]
            costs = (row.registers, f"{size:,}", f"{row.instructions:,}", row.matrix)
            figures.setdefault((f"`{row.name}`", row.channels, *costs), []).append(row.precision)
        cells = ((", ".join(names), *line) for line, names in figures.items())
        lines += ["", f"## {arch}", "", *markdown_table(COLUMNS, cells, "llrrrrr")]
    return "\n".join(lines) + "\n"


def main() -> None:
    loaded = native.CUDA_OBJECT
    if loaded.path is None:
        sys.exit(f"cuda_object: {loaded.error}")
    kernels = kernels_of(loaded.path)
    nvcc = subprocess.run(["nvcc", "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", nvcc)
    REPORT.write_text(report(kernels, shared_memory(), release[1] if release else "unknown"))
    print(f"wrote {REPORT.relative_to(ROOT)}")
    defects = [
        f"{k.arch}, {k.precision}, {k.name}, {k.channels}: {'; '.join(found)}"
        for k in kernels
        if (found := k.defects())
    ]
    sys.exit("\n".join(defects) or 0)


if __name__ == "__main__":
    main()
