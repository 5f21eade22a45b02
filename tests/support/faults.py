"""Ten faults, one at a time, in a copy of the tree: `make test` has to find each.

    python tests/support/faults.py [NAME …]     all of them, or those named

Each is a slip that compiles: in a kernel, a plan, a check, a patch. The run that should find it,
of the three of `.ci/tests`, is stopped at the first test that fails, whose name is printed. The
exit code is 1 if a fault is not found.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from command_lines import ROOT, run_python

RUNS = {
    "on_cpu": ([], {}),
    "interpreted": ([], {"TRITON_INTERPRET": "1"}),
    "emulated": (["--emulate-cuda"], {}),
}


class Fault(NamedTuple):
    """`right` stands once in `file`; `wrong` takes its place."""

    run: str  # which of RUNS should find it
    file: str
    right: str
    wrong: str


FAULTS = {
    "cpu kernel: a row whose keys are all masked": Fault(
        "on_cpu",
        "csrc/cpu/isa/softmax.inc",
        "const V factor = row_sum[v] == V{} ? V{} : 1 / row_sum[v];",
        "const V factor = 1 / row_sum[v];",
    ),
    "cpu kernel: dropout of queries beyond the first tile": Fault(
        "on_cpu",
        "csrc/cpu/isa/softmax.inc",
        "uint32_t((i0 + i) * tokens + j)",
        "uint32_t(i * tokens + j)",
    ),
    "triton kernel: padded values take the padded key": Fault(
        "interpreted",
        "swin_kernels/backends/triton/kernels/common.py",
        "v = fill_padding(v, padding, pads[1], head, META.VALUE_DIM, BLOCK_DV)",
        "v = fill_padding(v, padding, pads[0], head, META.VALUE_DIM, BLOCK_DV)",
    ),
    "triton kernel: tiled gradient of keys behind the norm": Fault(
        "interpreted",
        "swin_kernels/backends/triton/kernels/bwd_tiled.py",
        "dk = l2_normalize_bwd(dk, factor, k, k_norm, query_ptr.dtype.element_ty)[0]",
        "dk = dk * factor",
    ),
    "triton plan: windows that a program's share does not divide": Fault(
        "interpreted",
        "swin_kernels/backends/triton/plan.py",
        "-(-call.windows // run) * call.heads,",
        "max(1, call.windows // run) * call.heads,",
    ),
    "cuda kernel: the shift mask of the last axis alone": Fault(
        "emulated",
        "csrc/cuda/device/softmax.cuh",
        "if ((place.rows->sides[row] ^ place.columns->sides[column]) & seams) s += mask_value;",
        "if ((place.rows->sides[row] ^ place.columns->sides[column]) & seams & 1) s += mask_value;",
    ),
    "check: a shift as large as the window": Fault(
        "on_cpu",
        "swin_kernels/geometry.py",
        "if not 0 <= shift[axis] < window[axis]:",
        "if not 0 <= shift[axis] <= window[axis]:",
    ),
    "autograd: gradients of biases that nobody needs": Fault(
        "on_cpu",
        "swin_kernels/problem.py",
        "return sum(bit for name, bit in NEEDS.items() if needed[Operands._fields.index(name)])",
        "return sum(NEEDS.values())",
    ),
    "patch: the upper bound of Swin V2's logit scale": Fault(
        "on_cpu",
        "swin_kernels/patch/timm.py",
        '"logit_scale": attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp().flatten(),',
        '"logit_scale": attn.logit_scale.exp().flatten(),',
    ),
    "patch: a mask that was edited": Fault(
        "on_cpu",
        "swin_kernels/patch/static_mask.py",
        "return torch.equal(mask, self.expected)",
        "return True",
    ),
}


def applied(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    text = path.read_text()
    assert text.count(fault.right) == 1, f"{fault.file} does not have once: {fault.right}"
    path.write_text(text.replace(fault.right, fault.wrong))


def finder(fault: Fault, tree: Path) -> str | None:
    """The test that fails, None if none does."""
    arguments, variables = RUNS[fault.run]
    variables = {**variables, "SWIN_KERNELS_CUDA": "0"}
    if fault.file.startswith("csrc/cpu"):
        run_python("setup.py", "--quiet", "build_ext", "--inplace", cwd=tree, **variables)
    options = ["-q", "--tier", "standard", "-n", "2", "--dist", "worksteal", "-x", "--no-header"]
    # it holds every fault against the sources, and so would find each
    options += ["-rfE", "--deselect", "tests/tools/test_tiers.py::test_every_fault_can_be_put_in"]
    command = ("-m", "pytest", *options, *arguments)
    done = run_python(*command, code=None, cwd=tree, timeout=None, **variables)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed is None and done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return failed[1] if failed else None


def main() -> None:
    chosen = sys.argv[1:] or list(FAULTS)
    if unknown := [name for name in chosen if name not in FAULTS]:
        sys.exit(f"faults: no {unknown[0]!r}; there are: {'; '.join(FAULTS)}")
    missed = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            shutil.copytree(
                ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__")
            )
            applied(FAULTS[name], tree)
            found = finder(FAULTS[name], tree)
        missed += found is None
        print(f"{name}: {found or 'NOT FOUND'}", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
