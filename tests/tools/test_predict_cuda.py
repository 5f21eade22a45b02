"""What the CUDA C++ kernels should take: the model, on machine code made up and built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the tool that reads machine code comes with Triton")

from sass_listing import parse

from benchmarks.codegen import predict_cuda
from swin_kernels.backends import native

KERNEL = (
    "S2R R0, SR_TID.X",
    "LDG.E R1, [R2.64]",  # 0x10: the bias is gathered
    "STS [R3], R1",
    "@P0 BRA 0x10",
    "LDGSTS.E.128 [R4], [R6.64]",  # 0x40: a trip
    "LDGDEPBAR",
    "DEPBAR.LE SB0, 0x0",
    "@P1 BRA 0xa0",
    "@P2 FADD R1, R1, R2",  # 0x80: the shift mask
    "BRA 0xa0",
    "@P3 BRA 0xd0",  # 0xa0
    "LDG.E.U16 R5, [R6.64]",  # 0xb0: an explicit mask
    "FADD R1, R1, R5",
    "FMUL R1, R1, R1",  # 0xd0
    "STG.E.128 [R8.64], R12",
    "@P4 BRA 0x40",
    "EXIT",
)


def test_a_trip_skips_what_the_options_of_a_call_leave_out():
    body = predict_cuda.body_of(parse(*KERNEL), 100, "sm_90")
    inside, border = ([x.address for x in t.instructions] for t in (body.inside, body.border))
    assert inside == [0x40, 0x50, 0x60, 0x70, 0xA0, 0xD0, 0xE0, 0xF0]
    assert border == [0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xA0, 0xD0, 0xE0, 0xF0]
    assert dict(body.once)["STS", 1] == predict_cuda.BIAS_TRIPS


@pytest.mark.parametrize(("place", "pending", "held"), [(2, 0, 6 / 8), (6, 0, 2 / 8), (2, 1, 0)])
def test_tokens_are_held_from_their_wait_to_where_the_next_are_asked_for(place, pending, held):
    trip = ["LDGSTS.E.128 [R4], [R6.64]", "LDGDEPBAR", *["FMUL R0, R0, R0"] * 4, "@P0 BRA 0x10"]
    trip.insert(place, f"DEPBAR.LE SB0, 0x{pending}")
    body = predict_cuda.body_of(parse("S2R R0, SR_TID.X", *trip, "EXIT"), 100, "sm_90")
    assert len(body.inside) == 8
    assert body.held == held


@pytest.mark.slow
@pytest.mark.skipif(native.CUDA_OBJECT.path is None, reason=f"{native.CUDA_OBJECT.error}")
def test_swins_stages_are_predicted_from_the_built_object():
    path = native.CUDA_OBJECT.path
    for kernel, products in (("single_tile_forward", 32), ("single_tile_backward", 80)):
        body = predict_cuda.bodies(path)[kernel, "sm_90"]
        names = [x.name for x in body.border.instructions]
        assert names.count("HMMA.16816.F32.BF16") == products  # of 64 keys and 32 channels
    page = "\n".join(predict_cuda.table(["T4 shift 0"], ["H200"], path))
    assert "| H200 | T4 shift 0 | forward | 8 | 384 |" in page


def test_a_gpu_that_the_object_has_no_code_for_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "CUDA_OBJECT", replace(native.CUDA_OBJECT, path=Path("object.so")))
    monkeypatch.setattr(predict_cuda, "bodies", lambda path: {("single_tile_forward", "sm_90"): 0})
    monkeypatch.setattr("sys.argv", ["predict_cuda", "--gpu", "A100"])
    with pytest.raises(SystemExit, match="has no code for sm_80, only for sm_90: build it with"):
        predict_cuda.main()
