"""No kernel of ours writes to shared memory what HGMMA of another warp group may still read."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="what is read are Triton's kernels")

import triton
from gluon_probes import compiled_reuse
from tiers import thorough

from benchmarks.codegen import aot, sass
from benchmarks.codegen.hazards import WARPS_OF_A_GROUP, buffers, hazards, unguarded_stores
from benchmarks.codegen.layouts import CASES, RARE
from benchmarks.codegen.plans import launches_of
from swin_kernels.backends.triton.config import KNOWN_GPUS

HOPPER = KNOWN_GPUS["sm_90"]
MENDED = (3, 9)  # of Triton: since then a barrier follows such a wait


def parse(*lines: str) -> list[sass.Instruction]:
    return sass.parse("".join(f"        /*{16 * i:04x}*/   {x} ;\n" for i, x in enumerate(lines)))


WAIT, STORE, BARRIER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "STS [R2+0x400], R4", "BAR.SYNC 0x0"


@pytest.mark.parametrize(
    "lines, found",
    [
        ((WAIT, "FADD R0, R0, R1", STORE, "EXIT"), [0x20]),
        ((WAIT, BARRIER, STORE, "EXIT"), []),
        ((STORE, WAIT, "EXIT"), []),
        ((STORE, WAIT, "@P0 BRA 0x0", "EXIT"), [0x0]),  # of the next trip
        ((STORE, WAIT, BARRIER, "@P0 BRA 0x0", "EXIT"), []),
        ((WAIT, "@P0 BRA 0x30", BARRIER, STORE, "EXIT"), [0x30]),  # by one of two ways
        ((WAIT, "BRA 0x30", STORE, BARRIER, STORE, "EXIT"), []),  # never reached
        ((WAIT, "LDGSTS.E.128 [R1], desc[UR4][R2.64]", "EXIT"), [0x10]),
        ((WAIT, "LDS R1, [R2]", "STG.E [R2.64], R4", "EXIT"), []),
    ],
)
def test_a_store_that_a_wait_reaches_without_a_barrier_is_found(lines, found):
    assert [x.address for x in unguarded_stores(parse(*lines))] == found


@pytest.mark.slow
@pytest.mark.parametrize("warps", [4, 8])
def test_a_kernel_with_the_hazard_is_found(warps):
    """By versions of Triton that leave the barrier out; one warp group waits for itself."""
    kernel = compiled_reuse(warps)
    assert sum(buffers(kernel).values()) == 3  # each of them an operand's
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    found = hazards(kernel)
    assert bool(found) == (warps == 8 and version < MENDED), found
    assert all("STS" in x for x in found)


def wide_kernels(case, tf32=False):
    """Those of several warp groups."""
    for spec, dtypes in launches_of(case, HOPPER, tf32):
        if spec.config.num_warps > WARPS_OF_A_GROUP:
            yield spec.kernel, aot.compile_launch(spec, dtypes, HOPPER)


EXPOSED = (
    *("video swin, window 2", "dropout", "head dim 128"),
    *("98 tokens, strided", "98 tokens, masked"),  # a tiled backward's
)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPOSED)
def test_kernels_of_several_warp_groups_have_no_hazard(name):
    kernels = dict(wide_kernels((CASES | RARE)[name].but(dtype=torch.bfloat16)))
    assert any("HGMMA" in aot.listing_of(kernel) for kernel in kernels.values())
    assert {kernel: hazards(code) for kernel, code in kernels.items() if hazards(code)} == {}


# (case, kernel): what the reader, which knows no order of products, takes for a hazard
READ_BY_HAND = {
    # the output goes where the query's tile was (bytes 0 to 16,383), which the first product of a
    # trip reads: barriers follow its wait before the trip ends
    ("144 tokens, head dim 128, padded, masked", "bwd_tiled._tiled_dq_kernel"),
}


@thorough(
    "test_hazards.py::test_kernels_of_several_warp_groups_have_no_hazard",
    "test_hazards.py::test_a_kernel_with_the_hazard_is_found",
)
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES | RARE)
def test_no_kernel_of_any_case_has_a_hazard(name, dtype):
    case = (CASES | RARE)[name].but(dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    kernels = [x for x in wide_kernels(case, dtype == "tf32") if (name, x[0]) not in READ_BY_HAND]
    found = {kernel: hazards(code) for kernel, code in kernels}
    assert not any(found.values()), found
