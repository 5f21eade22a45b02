"""Relative position: index, table, log-spaced coordinates, and a table moved to another window."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from swin_kernels.position_bias import (
    bias_from_table,
    log_coordinates,
    relative_position_index,
    resize_table,
    table_length,
)

WINDOWS = ((5,), (1, 1), (7, 7), (3, 5), (2, 3, 4))
over_windows = pytest.mark.parametrize("window", WINDOWS, ids=str)


@over_windows
def test_index_is_the_row_major_offset_of_query_from_key(window):
    index = relative_position_index(window)
    places = list(itertools.product(*map(range, window)))
    assert index.shape == (len(places), len(places))
    assert index.dtype == torch.int64
    for (i, query), (j, key) in itertools.product(enumerate(places), enumerate(places)):
        row = 0
        for axis, w in enumerate(window):
            row = row * (2 * w - 1) + query[axis] - key[axis] + w - 1
        assert index[i, j] == row


@over_windows
def test_index_names_every_row_of_the_table(window):
    index = relative_position_index(window)
    assert index.unique().tolist() == list(range(table_length(window)))


def test_index_is_a_copy_that_may_be_changed():
    relative_position_index((3, 3)).fill_(0)
    assert relative_position_index((3, 3)).max() == 24


def test_index_goes_to_the_device_asked_for():
    assert relative_position_index((2, 2), "meta").device.type == "meta"


def test_index_equals_that_of_timm():
    swin = pytest.importorskip("timm.models.swin_transformer")
    expected = swin.get_relative_position_index(7, 5)
    assert torch.equal(relative_position_index((7, 5)), expected)


def test_bias_gathers_the_table_per_head():
    table, index = torch.randn(10, 3), torch.randint(10, (4, 4))
    bias = bias_from_table(table, index)
    assert bias.shape == (3, 4, 4)
    for i, j in itertools.product(range(4), range(4)):
        assert torch.equal(bias[:, i, j], table[index[i, j]])


@over_windows
def test_log_coordinates_follow_the_formula(window):
    coordinates = log_coordinates(window)
    assert coordinates.shape == (*(2 * w - 1 for w in window), len(window))
    assert coordinates.dtype == torch.float32
    for place in itertools.product(*(range(2 * w - 1) for w in window)):
        for axis, w in enumerate(window):
            delta = (place[axis] - (w - 1)) / max(w - 1, 1) * 8
            expected = math.copysign(math.log2(1 + abs(delta)) / 3, delta) if delta else 0.0
            assert math.isclose(float(coordinates[(*place, axis)]), expected, abs_tol=1e-6)


def test_log_coordinates_scale_by_the_pretraining_window():
    fine, trained = log_coordinates((16, 16), (8, 8)), log_coordinates((8, 8))
    torch.testing.assert_close(fine[8:-8, 8:-8], trained)
    torch.testing.assert_close(log_coordinates((8, 8), (0, 0)), trained)
    assert fine.max() > trained.max()
    assert math.isclose(trained.max(), math.log2(9) / 3, rel_tol=1e-6)


def test_log_coordinates_equal_those_of_timm():
    swin_v2 = pytest.importorskip("timm.models.swin_transformer_v2")
    attention = swin_v2.WindowAttention(32, (8, 6), 2, pretrained_window_size=(12, 12))
    expected = attention.relative_coords_table[0]
    torch.testing.assert_close(log_coordinates((8, 6), (12, 12)), expected)


def test_resized_table_is_bicubic_on_the_grid_of_offsets():
    table = torch.randn(5 * 7, 2)
    expected = torch.nn.functional.interpolate(
        table.T.reshape(1, 2, 5, 7), size=(9, 11), mode="bicubic"
    )
    actual = resize_table(table, (3, 4), (5, 6))
    torch.testing.assert_close(actual, expected.reshape(2, -1).T)


def test_resized_table_keeps_the_dtype():
    table = torch.randn(9, 2).bfloat16()
    assert resize_table(table, (2, 2), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "window", "new_window", "message"),
    [
        (168, (7, 7), (8, 8), r"expected .*\(169, heads\) .* got \(168, 2\)"),
        (7, (4,), (8,), r"expected 2-D windows, got \(4,\) and \(8,\)"),
    ],
)
def test_table_of_another_window_raises(rows, window, new_window, message):
    with pytest.raises(ValueError, match=message):
        resize_table(torch.zeros(rows, 2), window, new_window)
