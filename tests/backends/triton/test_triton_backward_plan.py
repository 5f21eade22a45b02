"""Plans of a backward: where gradients lie, what is summed and what one pass leaves to the next."""

from __future__ import annotations

import pytest
import torch
from triton_calls import PLANE, backward_of, forward_of, kernels_of

from swin_kernels.testing import Case


def test_gradients_of_packed_tokens_lie_in_one_buffer():
    case = PLANE.but(packed=True)
    plan = backward_of(case)
    shape = (2, 11, 9, 3, 2, 16)
    assert plan.buffers["grad_query"] == (shape, torch.float32)
    assert not {"grad_key", "grad_value"} & set(plan.buffers)
    step = plan.launches[0]
    pointers = {step.pointers[f"grad_{name}_ptr"] for name in ("query", "key", "value")}
    assert pointers == {"grad_query"}
    assert (step.scalars["grad_key_start"], step.scalars["grad_value_start"]) == (32, 64)
    # image, three axes (the first is missing), head, channel
    strides = (11 * 9 * 96, 0, 9 * 96, 96, 16, 1)
    assert step.scalars["grad_query_strides"] == step.scalars["grad_value_strides"] == strides


def test_gradients_of_separate_tokens_are_contiguous_whatever_the_operands_are():
    plan = backward_of(PLANE.but(layout="strided", value_dim=32))
    assert plan.buffers["grad_query"] == plan.buffers["grad_key"]
    assert plan.buffers["grad_key"] == ((2, 11, 9, 2, 16), torch.float32)
    assert plan.buffers["grad_value"] == ((2, 11, 9, 2, 32), torch.float32)
    numbers = plan.launches[0].scalars
    assert (numbers["grad_key_start"], numbers["grad_value_start"]) == (0, 0)
    assert numbers["grad_query_strides"] == (11 * 9 * 32, 0, 9 * 32, 32, 16, 1)
    assert numbers["grad_value_strides"] == (11 * 9 * 64, 0, 9 * 64, 64, 32, 1)


@pytest.mark.parametrize("tokens", [16, 100], ids=["whole", "tiles"])
def test_only_what_is_needed_is_summed(tokens):
    case = Case(2, (150,), (tokens,), bias="table", pads=True, cosine=tokens > 64)
    always = {"logit_scale_sums"} if case.cosine else set()
    assert set(backward_of(case).sums) == {"pad_key_sums", "pad_value_sums"} | always
    for name in ("bias_table", "pad_key", "pad_value"):
        plan, biased = backward_of(case, needed=[name]), name == "bias_table"
        assert set(plan.sums) == (always if biased else {f"{name}_sums"} | always)
        assert ("bias_sums" in plan.buffers) == ("grad_bias_table" in plan.buffers) == biased
        assert ("_table_grad_kernel" in kernels_of(plan)) == biased
        assert ("_tiled_dbias_kernel" in kernels_of(plan)) == (biased and tokens > 64)
    assert set(backward_of(case.but(size=(100 * tokens,))).sums) == always
    for plan in (backward_of(case), backward_of(case, needed=())):
        for name, axes in plan.sums.items():  # of a buffer, fp32, with its axes in front
            shape, dtype = plan.buffers[name]
            assert dtype == torch.float32
            assert max(axes) < len(shape)


@pytest.mark.parametrize(
    ("bias", "kernels", "buffers"),
    [
        ("dense", ["_bias_grad_kernel"], {"grad_bias": torch.float16}),
        ("table", ["_table_grad_kernel"], {"grad_bias_table": torch.float16}),
        (
            "table+index",
            ["_bias_grad_kernel", "_indexed_grad_kernel"],
            {"summed_bias": torch.float32, "grad_bias_table": torch.float16},
        ),
    ],
)
def test_a_bias_gradient_is_summed_over_runs_by_kernels_of_ours(bias, kernels, buffers):
    case = Case(64, (28, 28), (7, 7), heads=3, head_dim=32, bias=bias, dtype=torch.float16)
    plan = backward_of(case.but(extras_dtype=torch.float16))
    assert kernels_of(plan)[-len(kernels) :] == kernels
    runs, *shape = plan.buffers["bias_sums"][0]
    assert shape == [3, 49, 49]
    sums = [x for x in plan.launches if "bias_sums" in x.pointers.values()]
    assert [x.scalars.get("runs") for x in sums[1:]] == [runs]
    assert {name: dtype for name, (_, dtype) in plan.buffers.items() if name in buffers} == buffers


def test_normalised_tokens_are_left_to_passes_that_follow_and_only_keys_as_rows_turn_the_bias():
    case = Case(1, (100,), (100,), bias="dense", cosine=True)
    plan, shape = backward_of(case), (1, 2, 100, 16)
    for name in ("unit_query", "unit_key"):
        assert plan.buffers[name] == (shape, torch.float32)
        assert name not in backward_of(case.but(cosine=False)).buffers
    unbiased = backward_of(case, needed=()).buffers
    assert "unit_query" in unbiased
    assert "unit_key" not in unbiased  # which the gradient of the bias alone would read
    turned = {
        launch.kernel: (launch.scalars["TRANSPOSED"], launch.pointers["bias_ptr"])
        for launch in plan.launches
        if "_tiled_" in launch.kernel
    }
    assert turned == {
        "bwd_tiled._tiled_dq_kernel": (False, "expanded_bias"),
        "bwd_tiled._tiled_dkv_kernel": (True, "transposed_bias"),
        "bwd_tiled._tiled_dbias_kernel": (False, "expanded_bias"),
    }


@pytest.mark.parametrize("tokens", [16, 100], ids=["whole", "tiles"])
def test_an_empty_batch_launches_nothing_but_the_sum_of_the_table(tokens):
    case = Case(0, (150,), (tokens,), bias="table", pads=True)
    for plan in (forward_of(case), backward_of(case)):
        assert not set(kernels_of(plan)) - {"_expand_bias_kernel", "_table_grad_kernel"}
    assert forward_of(case).buffers["out"][0] == (0, 150, 2, 16)
    plan = backward_of(case)
    assert plan.launches[-1].scalars["runs"] == 0  # a sum of none: zeros
    for name, axes in plan.sums.items():
        shape, _ = plan.buffers[name]
        assert any(shape[axis] == 0 for axis in axes)  # its sum is zeros
