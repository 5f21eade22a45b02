"""Plans of the Triton backend: what would be launched, from facts alone, without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from command_lines import last_line_of
from contract_cases import over
from triton_calls import H100, PLANE, backward_of, call_of, forward_of, kernels_of, plain_call

from benchmarks.gpu_tools.override import override
from swin_kernels.backends.triton.config import (
    INTERPRETER,
    KNOWN_GPUS,
    config_for,
    fits_single_tile,
    tuned_key,
)
from swin_kernels.backends.triton.launch_spec import facts_of
from swin_kernels.backends.triton.plan import forward_plan
from swin_kernels.backends.triton.token_layout import needs_wide_offsets
from swin_kernels.problem import Operands
from swin_kernels.testing import Case, make_operands


def _meta(*shape):
    return torch.empty(shape, device="meta")


def _of_shape(*shape, window):
    """The forward's launch for a query, key and value of this shape, which may be of any size."""
    x = _meta(*shape).half()
    return forward_plan(plain_call(Operands(x, x, x), window_size=window), H100).launches[-1]


@over(
    PLANE,
    PLANE.but(packed=True, pad_order="roll-pad", cosine=True, dropout_p=0.5),
    PLANE.but(layout="strided", bias="table+index", mask="soft", value_dim=24),
    Case(1, (30,), (100,), bias="dense", pads=True),
    Case(1, (8, 7, 12), (8, 7, 7), bias="table", cosine=True, dtype=torch.float16),
)
def test_a_plan_depends_on_facts_alone(case):
    for plan in (forward_of, backward_of):
        assert plan(case) == plan(case)
        assert plan(case) == plan(case, device="cpu")  # the values of tensors are not looked at


def test_plans_need_no_triton():
    program = """
import sys
sys.modules["triton"] = None
sys.path[:0] = ["tests/support"]
import triton_calls as t
print(len(t.forward_of(t.PLANE).launches), len(t.backward_of(t.PLANE).launches))
"""
    assert last_line_of(program) == "1 2"


# tokens of a window, channels, dtype; whether forward and backward hold it whole
REGIMES = (
    (16, 32, torch.float16, True, True),
    (49, 32, torch.float16, True, True),
    (64, 64, torch.bfloat16, True, True),
    (64, 65, torch.float16, True, False),
    (64, 128, torch.float16, True, False),
    (65, 32, torch.float16, True, False),
    (128, 32, torch.bfloat16, True, False),
    (128, 64, torch.bfloat16, False, False),
    (100, 30, torch.float16, False, False),
    (129, 32, torch.float16, False, False),
    (576, 32, torch.float16, False, False),
    (64, 32, torch.float32, True, True),
    (64, 33, torch.float32, False, False),
    (49, 30, torch.float16, True, True),  # narrow loads
    (49, 34, torch.float16, True, False),
    (64, 65, torch.float32, False, False),
    (65, 32, torch.float32, False, False),
)
GPUS = [*KNOWN_GPUS.values(), INTERPRETER]


@pytest.mark.parametrize(("tokens", "dim", "dtype", "forward", "backward"), REGIMES)
def test_tokens_channels_and_dtype_decide_between_whole_windows_and_tiles(
    tokens, dim, dtype, forward, backward
):
    case = Case(1, (tokens,), (tokens,), head_dim=dim, dtype=dtype, bias="table")
    case = case.but(layout="contiguous")
    call = call_of(tokens, dim, dim, dtype, 1, 2)
    assert fits_single_tile("forward", call, H100) == forward
    assert fits_single_tile("backward", call, H100) == backward
    spread = [] if forward else ["_expand_bias_kernel"]
    kernel = "_single_tile_fwd_kernel" if forward else "_tiled_fwd_kernel"
    assert kernels_of(forward_of(case)) == [*spread, kernel]
    if backward:
        expected = ["_single_tile_bwd_kernel", "_table_grad_kernel"]
    else:
        expected = ["_expand_bias_kernel", "_tiled_dq_kernel", "_tiled_dkv_kernel"]
        expected += ["_tiled_dbias_kernel", "_table_grad_kernel"]
    assert kernels_of(backward_of(case)) == expected
    # the forward keeps what the backward will read, and nothing when nobody differentiates
    kept = forward_of(case, differentiable=True)
    assert ("stats" in kept.buffers) == kept.launches[-1].scalars["KEEP_STATS"] == (not backward)
    assert ("tiles" in kept.buffers) == backward
    assert set(forward_of(case).buffers) == {"out"} | ({"expanded_bias"} if spread else set())


def test_128_tokens_are_held_whole_only_where_channels_lie_together_and_no_mask_is_read():
    case = Case(1, (98,), (98,), head_dim=32, dtype=torch.float16, bias="dense")
    assert kernels_of(forward_of(case.but(layout="contiguous"))) == ["_single_tile_fwd_kernel"]
    for changes in ({"layout": "strided"}, {"layout": "contiguous", "mask": "soft"}):
        for gpu in (H100, INTERPRETER):
            assert "_tiled_fwd_kernel" in kernels_of(forward_of(case.but(**changes), gpu))


def test_heads_of_30_channels_are_held_whole_where_registers_allow():
    case = Case(1, (64, 64), (8, 8), head_dim=30, dtype=torch.float16, layout="contiguous")
    for gpu, smaller in ((H100, True), (KNOWN_GPUS["sm_80"], False), (KNOWN_GPUS["gfx942"], None)):
        whole = "_single_tile_bwd_kernel" in kernels_of(backward_of(case, gpu))
        assert whole == (smaller is not None)
        # what of a tile is no token takes registers as well
        whole = "_single_tile_bwd_kernel" in kernels_of(backward_of(case.but(window=(7, 7)), gpu))
        assert whole == bool(smaller)
    for changes in ({"cosine": True}, {"mask": "soft"}, {"dropout_p": 0.1}, {"head_dim": 40}):
        assert "_tiled_dq_kernel" in kernels_of(backward_of(case.but(**changes)))


def test_the_wider_of_keys_and_values_decides():
    case = Case(1, (7, 7), (7, 7), head_dim=32, value_dim=96)
    assert kernels_of(forward_of(case)) == ["_tiled_fwd_kernel"]
    assert kernels_of(forward_of(case.but(value_dim=32))) == ["_single_tile_fwd_kernel"]
    step = forward_of(case).launches[0]
    assert (step.scalars["BLOCK_D"], step.scalars["BLOCK_DV"]) == (32, 128)


@pytest.mark.parametrize(
    ("x", "wide"),
    [
        # 16 channels: an image of n tokens of one head has elements up to 16n − 1
        (_meta(1, 2**27, 1, 16), False),
        (_meta(1, 2**27 + 1, 1, 16), True),
        # heads are found with 64 bits: the last token begins at 64·(n − 1), its last head lies
        # 48 elements further
        (_meta(1, 2**25, 4, 16), False),
        (_meta(1, 2**25 + 1, 4, 16), True),
        # a batch of any size
        (_meta(2**20, 8, 8, 4, 32), False),
        # all axes add up
        (_meta(1, 2**11, 2**10, 2**6, 1, 16), False),
        (_meta(1, 2**11 + 1, 2**10, 2**6, 1, 16), True),
        # channels outside of tokens
        (_meta(1, 256, 2**23, 1).permute(0, 2, 3, 1), False),
        (_meta(1, 256, 2**23 + 1, 1).permute(0, 2, 3, 1), True),
        # expanded axes have no reach
        (_meta(1, 1, 1, 16).expand(1, 2**30, 1, 16), False),
        (_meta(1, 2**27 + 1, 1, 1).expand(1, -1, 1, 16), False),
    ],
)
def test_offsets_are_wide_where_the_last_element_of_an_image_needs_more_than_31_bits(x, wide):
    assert needs_wide_offsets(tuple(x.shape), x.stride()) == wide
    if x.is_contiguous():  # as the output is
        assert _of_shape(*x.shape, window=8).scalars["WIDE"] == wide


def test_one_tensor_that_is_wide_makes_the_call_wide():
    narrow, wide = _meta(1, 2**27 + 1, 1, 1).expand(1, -1, 1, 16), _meta(1, 2**27 + 1, 1, 16)
    for tensors in ((narrow, narrow, wide), (narrow, wide, narrow), (wide, narrow, narrow)):
        plan = forward_plan(plain_call(Operands(*tensors), window_size=64), H100)
        assert plan.launches[0].scalars["WIDE"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tiles"])
def test_grids_have_one_axis_that_holds_any_number_of_windows(whole):
    window, windows, heads = 49 if whole else 200, 100_000, 3  # the other axes end at 65,535
    step = _of_shape(windows, window, heads, 32, window=window)
    assert isinstance(step.grid, int)
    if whole:
        run = step.scalars["windows_per_program"]
        assert step.grid == math.ceil(windows / run) * heads
        assert step.grid * run >= windows * heads
    else:
        assert step.grid == windows * heads * math.ceil(window / step.config.block_m)
        assert step.grid > 65_535


def test_packed_operands_are_parts_of_one_tensor():
    step = forward_of(PLANE.but(packed=True)).launches[0]
    assert {step.pointers[f"{n}_ptr"] for n in ("query", "key", "value")} == {"query"}
    assert (step.scalars["key_start"], step.scalars["value_start"]) == (32, 64)
    assert step.scalars["SHARED_STRIDES"]
    assert not forward_of(PLANE.but(value_dim=24)).launches[0].scalars["SHARED_STRIDES"]


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        # four ways for a shift on two axes to cut a window, two on one, one on none
        (PLANE, (2, 4, 16, 16)),
        (PLANE.but(shift=(2, 0)), (2, 4, 16, 16)),
        (PLANE.but(shift=(0, 2)), (2, 2, 16, 16)),
        (PLANE.but(periodic=(True, True)), (2, 1, 16, 16)),
        (Case(1, (4, 4, 4), (2, 2, 2), (1, 1, 1), bias="dense"), (2, 8, 16, 16)),
        # without a bias heads share them; where nothing is to be added there are none
        (PLANE.but(bias="none"), (1, 4, 16, 16)),
        (Case(1, (9,), (3,)), (1, 1, 16, 16)),
        (Case(1, (16, 16), (8, 8)), None),
    ],
    ids=str,
)
def test_tiles_that_a_forward_leaves_do_not_grow_with_the_map(case, shape):
    for size in (case.size, tuple(s + w for s, w in zip(case.size, case.window))):
        plan = forward_of(case.but(size=size), differentiable=True)
        assert plan.buffers.get("tiles", (None,))[0] == shape


SLIM = Case(1, (3, 10), (7, 4), (5, 1))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        pytest.param(
            Case(1, (10,), (4,), (1,), bias="table"),
            {
                "WINDOW": (1, 1, 4),
                "sizes": (1, 1, 10),
                "counts": (1, 1, 3),
                "seams": (1, 1, 3),
                "REGIONS": (False, False, True),
            },
            id="missing axes lead",
        ),
        pytest.param(SLIM, {"periods": (1, 7, 12), "rolls": (0, 5, 1)}, id="rolls what is padded"),
        pytest.param(
            SLIM.but(pad_order="roll-pad"),
            {"periods": (1, 3, 10), "rolls": (0, 2, 1)},
            id="rolls the map",
        ),
        pytest.param(
            PLANE.but(periodic=(True, False)),
            {"REGIONS": (False, False, True), "ROLLED": True},
            id="a periodic axis has no regions",
        ),
        pytest.param(
            PLANE.but(size=(12, 12)),
            {"HAS_PAD_KEY": False, "HAS_PAD_VALUE": False, "PADDED": False},
            id="pads without padding are not read",
        ),
        # a threshold of 32 bits
        (PLANE, {"DROPOUT_THRESHOLD": 0, "kept_factor": 1.0}),
        (PLANE.but(dropout_p=0.5), {"DROPOUT_THRESHOLD": 2**31, "kept_factor": 2.0}),
        (PLANE.but(dropout_p=1.0), {"DROPOUT_THRESHOLD": 2**32 - 1, "kept_factor": 0.0}),
    ],
    ids=str,
)
def test_scalars_of_a_forward(case, expected):
    scalars = forward_of(case).launches[0].scalars
    assert {name: scalars[name] for name in expected} == expected


def test_a_measured_configuration_is_the_one_of_the_plan():
    case = Case(1, (7, 7), (7, 7), heads=3, head_dim=32, dtype=torch.float16, layout="contiguous")
    assert forward_of(case).launches[0].config.num_warps != 16
    key = tuned_key("forward", call_of(49, 32, 32, torch.float16, 1, 3), H100)
    with override({key: {"num_warps": 16}}):
        assert forward_of(case).launches[0].config.num_warps == 16


def test_tf32_changes_layouts_and_products_but_not_what_is_kept():
    """It may be allowed between a forward and its backward, or after a model was compiled."""
    case = PLANE.but(cosine=True, pads=False)
    exact, rounded = (forward_of(case, tf32=tf32, differentiable=True) for tf32 in (False, True))
    assert exact.launches[0].scalars["PRECISION"] == "ieee"
    assert rounded.launches[0].scalars["PRECISION"] == "tf32"
    assert exact.buffers == rounded.buffers
    for gpu, tokens, dim in itertools.product(GPUS, (16, 49, 98, 144), (16, 32, 64, 128)):
        calls = [call_of(tokens, dim, dim, torch.float32, 100, 4, tf32=x) for x in (False, True)]
        for kernel in ("forward", "backward"):
            exact, rounded = (fits_single_tile(kernel, call, gpu) for call in calls)
            assert exact == rounded
    fine, rough = (call_of(49, 32, 32, torch.float32, 100, 4, tf32=tf32) for tf32 in (False, True))
    assert tuned_key("forward", fine, H100) == "forward-sm_90-float32-n49-d32-32"
    assert tuned_key("forward", rough, H100) == "forward-sm_90-tf32-n49-d32-32"
    assert config_for("backward", fine, H100) != config_for("backward", rough, H100)


@pytest.mark.parametrize(
    ("case", "not_vectorizable"),
    [
        (PLANE, False),
        (PLANE.but(packed=True), False),
        (PLANE.but(layout="strided"), True),
        (PLANE.but(layout="channels-inside"), True),
        (PLANE.but(head_dim=6), True),
        (PLANE.but(head_dim=20), False),  # 80 bytes a head
        (PLANE.but(head_dim=20, dtype=torch.float16), True),  # 40 bytes
    ],
    ids=str,
)
def test_channels_that_16_bytes_do_not_load_have_layouts_of_their_own(case, not_vectorizable):
    assert plain_call(make_operands(case), **case.options).not_vectorizable == not_vectorizable


def test_an_address_that_16_does_not_divide_scatters_channels():
    memory, numbers = torch.empty(2**13, dtype=torch.float16), 2 * 11 * 9 * 2 * 16
    aligned, shifted = (memory[i : i + numbers].view(2, 11, 9, 2, 16) for i in (0, 1))
    assert [facts_of(x).aligned for x in (aligned, shifted)] == [True, False]
    layouts = [
        forward_plan(plain_call(Operands(q, aligned, aligned), window_size=4), KNOWN_GPUS["sm_120"])
        for q in (aligned, shifted)
    ]
    assert layouts[0].launches[0].config != layouts[1].launches[0].config
