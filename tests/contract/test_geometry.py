"""Windows on a grid: padding, shift, regions and masks, against loops over positions."""

from __future__ import annotations

import itertools

import pytest
import torch

from swin_kernels.geometry import Grid, per_axis

GRIDS = (
    Grid.checked((8,), 4),
    Grid.checked((9,), 4, 1),
    Grid.checked((9,), 4, 3, pad_order="roll-pad"),
    Grid.checked((6, 6), 3, 2),
    Grid.checked((7, 10), (4, 5), (2, 0)),
    Grid.checked((7, 10), (4, 5), (1, 4), pad_order="roll-pad"),
    Grid.checked((3, 5), 7, 3),
    Grid.checked((6, 8), (3, 4), (1, 2), periodic=(False, True)),
    Grid.checked((4, 5, 6), (2, 3, 4), (1, 0, 3)),
)


def _id(grid):
    sizes = ("x".join(map(str, part)) for part in (grid.size, grid.window, grid.shift))
    wraps = "-periodic" if any(grid.periodic) else ""
    return "{}-w{}-s{}".format(*sizes) + f"-{grid.pad_order}{wraps}"


over_grids = pytest.mark.parametrize("grid", GRIDS, ids=_id)


def test_per_axis_repeats_a_number_and_keeps_a_sequence():
    assert per_axis(3, 2, "window_size") == (3, 3)
    assert per_axis([3, 4], 2, "window_size") == (3, 4)
    assert per_axis(torch.Size([3, 4]), 2, "window_size") == (3, 4)


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), 1.5, "77", True, (1, None), (2.0, 2)], ids=str)
def test_per_axis_refuses_what_is_no_number_for_each_axis(value):
    with pytest.raises(ValueError, match="window_size: expected"):
        per_axis(value, 2, "window_size")


@over_grids
def test_sizes_follow_from_the_window(grid):
    for axis, (size, window) in enumerate(zip(grid.size, grid.window)):
        assert grid.padded[axis] % window == 0
        assert 0 <= grid.padded[axis] - size < window
        assert grid.counts[axis] * window == grid.padded[axis]
    assert grid.needs_padding == (grid.padded != grid.size)
    assert grid.windows * grid.tokens == torch.tensor(grid.padded).prod()


@over_grids
def test_source_is_where_pad_and_roll_put_a_token(grid):
    for axis, (size, padded, shift) in enumerate(zip(grid.size, grid.padded, grid.shift)):
        line, tail = torch.arange(size), torch.full((padded - size,), -1)
        if grid.pad_order == "pad-roll":
            rolled = torch.cat((line, tail)).roll(-shift)
        else:
            rolled = torch.cat((line.roll(-shift), tail))
        sources = [grid.source(axis, i) for i in range(padded)]
        assert [-1 if s is None else s for s in sources] == rolled.tolist()


@over_grids
def test_split_is_row_major_over_windows_and_tokens(grid):
    x = torch.arange(2 * torch.tensor(grid.padded).prod()).view(2, *grid.padded, 1)
    windows = grid.split(x)
    assert windows.shape == (2, grid.windows, grid.tokens, 1)
    places = itertools.product(*map(range, grid.counts))
    for number, place in enumerate(places):
        slices = tuple(slice(p * w, (p + 1) * w) for p, w in zip(place, grid.window))
        block = x[(slice(None), *slices)]
        assert torch.equal(windows[:, number].flatten(), block.flatten())


@over_grids
def test_merge_is_the_inverse_of_split(grid):
    x = torch.randn(2, *grid.padded, 3, 5)
    assert torch.equal(grid.merge(grid.split(x)), x)


def _regions_by_slices(grid):
    """Regions numbered as the Swin authors do it: three slices an axis that is shifted."""
    regions = torch.zeros(grid.padded, dtype=torch.int64)
    axes = []
    for window, shift, wraps in zip(grid.window, grid.shift, grid.periodic):
        whole = [slice(None)]
        cuts = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
        axes.append(whole if shift == 0 or wraps else cuts)
    for number, slices in enumerate(itertools.product(*axes)):
        regions[slices] = number
    return regions


@over_grids
@pytest.mark.parametrize("mask_value", [-100.0, -200.0, -torch.inf])
def test_mask_separates_the_regions_that_slices_draw(grid, mask_value):
    regions = grid.split(_regions_by_slices(grid)[None])[0]
    expected = torch.zeros(grid.windows, grid.tokens, grid.tokens, dtype=torch.float64)
    for window, i, j in itertools.product(*map(range, expected.shape)):
        if regions[window, i] != regions[window, j]:
            expected[window, i, j] = mask_value
    assert torch.equal(grid.shift_mask(mask_value, torch.float64), expected)


def test_classic_map_of_six_with_window_three_and_shift_two_has_nine_regions():
    regions = Grid.checked((6, 6), 3, 2).region_map()
    assert regions.tolist() == [
        [0, 0, 0, 1, 2, 2],
        [0, 0, 0, 1, 2, 2],
        [0, 0, 0, 1, 2, 2],
        [3, 3, 3, 4, 5, 5],
        [6, 6, 6, 7, 8, 8],
        [6, 6, 6, 7, 8, 8],
    ]


def test_unshifted_map_has_one_region_and_no_mask():
    grid = Grid.checked((7, 9), 4)
    assert not grid.region_map().any()
    assert not grid.shift_mask().any()


def test_mask_takes_dtype_and_device():
    mask = Grid.checked((8,), 4, 2).shift_mask(dtype=torch.bfloat16, device="meta")
    assert mask.dtype == torch.bfloat16
    assert mask.device.type == "meta"
