"""The pictures: what they draw of a grid, that they can be saved, the command."""

from __future__ import annotations

import re
import sys
from unittest.mock import ANY, Mock

import pytest
import torch
from command_lines import PNG_MAGIC, output_of, refusal

from swin_kernels.__main__ import main
from swin_kernels.geometry import Grid
from swin_kernels.models import SwinTransformer, SwinTransformerV2, state_dict_for
from swin_kernels.models.biases import learnt_bias
from swin_kernels.position_bias import bias_from_table, relative_position_index

pytest.importorskip("matplotlib")

from swin_kernels.cli import picture

CLASSIC = Grid.checked((6, 6), 3, 2)

GRIDS = {
    "6x6-w3-s2": CLASSIC,
    "14x14-w7-s3": Grid.checked((14, 14), 7, 3),
    "10x12-w4-s2-padded": Grid.checked((10, 12), 4, 2, pad_order="roll-pad"),
    "8x8-w4-s2-periodic": Grid.checked((8, 8), 4, 2, periodic=(False, True)),
    "8x8-w4-unshifted": Grid.checked((8, 8), 4, 0),
}


def _drawn_numbers(ax) -> list[list[int]]:
    """The digits that an axes shows, by row."""
    places = {(t.get_position()[1], t.get_position()[0]): int(t.get_text()) for t in ax.texts}
    rows = sorted({row for row, _ in places})
    return [[places[p] for p in sorted(places) if p[0] == row] for row in rows]


def _saved(figure, path) -> bytes:
    figure.savefig(path)
    return path.read_bytes()


def test_classic_regions_are_drawn_before_and_after_the_roll():
    regions = CLASSIC.region_map()  # the nine of the paper: contract/test_geometry.py
    before, after = (torch.tensor(_drawn_numbers(a)) for a in picture.region_figure(CLASSIC).axes)
    assert torch.equal(after, regions)
    assert torch.equal(before.roll((-2, -2), (0, 1)), regions)


def test_padding_gets_no_region_number():
    grid = GRIDS["10x12-w4-s2-padded"]
    before, after = picture.region_figure(grid).axes
    assert len(before.texts) == 10 * 12
    assert len(after.texts) == 10 * 12  # of 12 × 12 tokens


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("draw", [picture.region_figure, picture.mask_figure, picture.shift_figure])
def test_figures_of_a_grid_are_written_as_png(draw, grid, tmp_path):
    assert _saved(draw(grid), tmp_path / "x.png").startswith(PNG_MAGIC)


def test_mask_figure_draws_each_distinct_mask_once_and_counts_it():
    titles = [ax.get_title() for ax in picture.mask_figure(Grid.checked((28, 28), 7, 3)).axes]
    assert titles == [
        "window 0, 8 more alike",
        "window 3, 2 more alike",
        "window 12, 2 more alike",
        "window 15",
    ]


def test_mask_panel_is_dark_exactly_where_the_mask_is():
    from matplotlib.colors import to_rgb

    panels = picture.mask_figure(CLASSIC).axes
    dark = torch.tensor(to_rgb(picture.MASKED_COLOUR))
    for ax, mask in zip(panels, CLASSIC.shift_mask(), strict=True):
        image = torch.as_tensor(ax.images[0].get_array()).float()
        assert torch.equal((image - dark).abs().amax(-1) < 1e-6, mask != 0)


def test_photo_figure_is_written_and_shows_three_panels(tmp_path):
    grid = Grid.checked((14, 10), 7, 3, pad_order="roll-pad")
    photo = torch.randint(256, (14 * 8 + 3, 10 * 8, 3), dtype=torch.uint8).numpy()
    figure = picture.photo_figure(photo, grid, "a model")
    assert len(figure.axes) == 3
    assert _saved(figure, tmp_path / "x.png").startswith(PNG_MAGIC)


def test_rolled_photo_is_the_photo_rolled():
    grid = Grid.checked((4, 6), 2, 1)
    photo = torch.arange(8 * 18 * 3).view(8, 18, 3)
    rolled = picture._rolled(photo, grid, (2, 3))
    assert torch.equal(rolled, photo.roll((-2, -3), (0, 1)))


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_bias_figure_has_a_panel_a_head_on_one_scale(heads, tmp_path):
    figure = picture.bias_figure(torch.randn(heads, 9, 9, requires_grad=True))
    panels = [ax for ax in figure.axes if ax.get_title().startswith("head")]
    assert len(panels) == heads
    assert len({ax.images[0].get_clim() for ax in panels}) == 1
    assert _saved(figure, tmp_path / "x.png").startswith(PNG_MAGIC)


@pytest.mark.parametrize(
    ("draw", "drawn", "message"),
    [
        (picture.bias_figure, [torch.zeros(4, 9)], r"expected \(H, N, N\), got \(4, 9\)"),
        (picture.shift_figure, [Grid.checked((8,), 4, 2)], "expected a grid of 2 axes"),
        (picture.shift_figure, [Grid.checked((4, 4, 4), 4, 2)], "expected a grid of 2 axes"),
        (picture.photo_figure, [torch.zeros(4, 4, 3).numpy(), CLASSIC], "at least"),
    ],
    ids=["bias of another shape", "1d", "3d", "photo of too few pixels"],
)
def test_what_cannot_be_drawn_is_refused(draw, drawn, message):
    with pytest.raises(ValueError, match=message):
        draw(*drawn)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        picture.region_figure(CLASSIC)


@pytest.mark.parametrize(("only", "panels"), [("regions", 2), ("masks", 4)])
def test_picture_command_draws_one_of_the_two_as_svg(only, panels, tmp_path):
    path = tmp_path / "x.svg"
    assert main(["picture", "--only", only, "--out", str(path)]) == 0
    text = path.read_text()
    assert "<svg" in text
    assert len(re.findall(r'id="axes_\d+"', text)) == panels


BIASES = {
    "table": (SwinTransformer, "timm", None),
    "network": (SwinTransformerV2, "authors", None),
    "network, window given": (SwinTransformerV2, "transformers-old", 4),
}


@pytest.mark.parametrize("kind", BIASES)
def test_picture_command_draws_the_bias_of_a_checkpoint(kind, tmp_path, monkeypatch, capsys):
    cls, layout, window = BIASES[kind]
    torch.manual_seed(0)
    model = cls(embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=32)
    file = tmp_path / "weights.pt"
    torch.save({"model": state_dict_for(model, layout)}, file)
    bias_figure = Mock(wraps=picture.bias_figure)
    monkeypatch.setattr(picture, "bias_figure", bias_figure)
    command = ["picture", "--out", str(tmp_path / "x.png"), "--bias", str(file)]
    command += ["--block", "1", "1"]
    if window:
        assert "does not tell the window of its bias" in refusal(main, command, capsys)
        command += ["--window", str(window)]
    assert main(command) == 0
    attention = model.layers[1].blocks[1].attn
    if cls is SwinTransformer:
        table = attention.relative_position_bias_table
    else:
        table = 16 * torch.sigmoid(attention.cpb_mlp(attention.relative_coords_table))
    ((bias, title),) = (call.args for call in bias_figure.call_args_list)
    expected = bias_from_table(table, relative_position_index((4, 4)))
    torch.testing.assert_close(bias, expected.detach())
    assert title == "Stage 1, block 1 of weights.pt"
    command[command.index("--block") + 1] = "7"
    assert "block 1 of stage 7" in refusal(main, command, capsys)


def test_a_table_of_no_square_window_asks_for_its_window(tmp_path):
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    state = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), name: torch.randn(7 * 13, 2)}
    with pytest.raises(ValueError, match="table of 91 rows"):
        learnt_bias(state, 0, 0)
    with pytest.raises(ValueError, match="table of 91 rows"):
        learnt_bias(state, 0, 0, (5, 5))
    expected = bias_from_table(state[name], relative_position_index((4, 7)))
    assert torch.equal(learnt_bias(state, 0, 0, (4, 7)), expected)


@pytest.mark.parametrize("name", ["x", ".png", "x.PNG", "x.y.png", "new/x.png"])
def test_picture_command_writes_the_file_it_names(name, tmp_path, capsys):
    path = tmp_path / name
    grid = ["--size", "6", "6", "--window", "3", "--shift", "2"]
    assert output_of(capsys, main, ["picture", *grid, "--out", str(path)]) == f"{path}\n"
    assert [x for x in tmp_path.rglob("*") if x.is_file()] == [path]
    assert path.read_bytes().startswith(PNG_MAGIC)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--mask-value -inf", float("-inf")),
        ("--mask-value=-inf", float("-inf")),
        ("--mask -Infinity", float("-inf")),
        ("--mask-value -1e3", -1000.0),
        ("--mask-value -5", -5.0),
        ("--mask-value 0", 0.0),
    ],
)
def test_picture_command_draws_any_number_and_minus_infinity(
    arguments, expected, tmp_path, monkeypatch
):
    draw = Mock(wraps=picture.shift_figure)
    monkeypatch.setattr(picture, "shift_figure", draw)
    path = tmp_path / "x.png"
    assert main(["picture", *arguments.split(), "--out", str(path)]) == 0
    draw.assert_called_once_with(ANY, expected)
    assert path.read_bytes().startswith(PNG_MAGIC)
