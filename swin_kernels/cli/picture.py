"""Shift regions, window masks and position biases drawn with matplotlib.

Every function returns a Figure that belongs to no window and no global state; save it with
`figure.savefig(path)`. ValueError for a grid that has not 2 axes, ImportError without matplotlib.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swin_kernels.geometry import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# one colour a region, light enough for black digits; a map of two axes has at most nine
REGION_COLOURS = (
    "#a8c8e8",
    "#f6bd60",
    "#84c69b",
    "#f28482",
    "#c9a7eb",
    "#d4b483",
    "#f7b2d9",
    "#c3cf5a",
    "#7fd6d3",
)
PADDING_STYLE: dict[str, Any] = {"facecolor": "#ffffff", "edgecolor": "#999999", "hatch": "////"}
MASKED_COLOUR = "#3d3d46"
_MOST_LABELLED = 16  # cells an axis beyond which a digit in each is only noise


def _figure(width: float, height: float, title: str, fontsize: int = 11) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=fontsize)
    return figure


def _numbered(grid: Grid) -> Tensor:
    """Regions of the rolled map numbered 0, 1, … in the order in which they are met: (*padded)."""
    return torch.unique(grid.region_map(), return_inverse=True)[1]


def _sources(grid: Grid, axis: int) -> Tensor:
    """Where each token of the rolled map comes from on this axis; −1 if padding added it."""
    places = (grid.source(axis, rolled) for rolled in range(grid.padded[axis]))
    return torch.tensor([-1 if place is None else place for place in places])


def _source_map(grid: Grid) -> Tensor:
    """Region number of every token where the caller holds it: (*size)."""
    out = torch.zeros([size + 1 for size in grid.size], dtype=torch.int64)
    out[_sources(grid, 0)[:, None], _sources(grid, 1)] = _numbered(grid)
    return out[:-1, :-1]  # at −1 stands what padding added


def _padding_map(grid: Grid) -> Tensor:
    """(*padded) bool: tokens of the rolled map that padding added."""
    return (_sources(grid, 0) < 0)[:, None] | (_sources(grid, 1) < 0)


def _rgb(numbers: Tensor) -> NDArray[Any]:
    """Region numbers as colours: (..., 3) in [0, 1]."""
    from matplotlib.colors import to_rgb

    palette = torch.tensor([to_rgb(colour) for colour in REGION_COLOURS])
    return palette[numbers % len(REGION_COLOURS)].numpy()


def _draw_map(ax: Axes, numbers: Tensor, padding: Tensor) -> None:
    """Tokens in the colour of their region, numbered while they are few."""
    height, width = numbers.shape
    ax.imshow(_rgb(numbers), extent=(0, width, height, 0), interpolation="nearest")
    if max(height, width) <= _MOST_LABELLED:
        ax.set_xticks(range(width + 1), minor=True)
        ax.set_yticks(range(height + 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        for row, column in (~padding).nonzero().tolist():
            number = str(int(numbers[row, column]))
            ax.text(column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=8)
    _hatch(ax, padding)
    _ticks(ax, height, width)


def _hatch(ax: Axes, padding: Tensor, scale: tuple[float, float] = (1.0, 1.0)) -> None:
    """Marks the tokens that padding added."""
    from matplotlib.patches import Rectangle

    for row, column in padding.nonzero().tolist():
        corner = column * scale[1], row * scale[0]
        ax.add_patch(Rectangle(corner, scale[1], scale[0], **PADDING_STYLE))


def _draw_windows(ax: Axes, grid: Grid, scale: tuple[float, float] = (1.0, 1.0)) -> None:
    """The window grid of the rolled map."""
    for axis, line in ((0, ax.axhline), (1, ax.axvline)):
        for edge in range(0, grid.padded[axis] + 1, grid.window[axis]):
            line(edge * scale[axis], color="black", linewidth=1.8, clip_on=False)


def _draw_seams(ax: Axes, grid: Grid, scale: tuple[float, float] = (1.0, 1.0)) -> None:
    """The edges of the shifted windows where the caller holds the map."""
    for axis, line in ((0, ax.axhline), (1, ax.axvline)):
        window_of = {grid.source(axis, i): i // grid.window[axis] for i in range(grid.padded[axis])}
        for place in range(1, grid.size[axis]):
            if window_of[place] != window_of[place - 1]:
                line(place * scale[axis], color="black", linewidth=1.2, linestyle="--")


def _ticks(ax: Axes, height: int, width: int) -> None:
    step = max(1, max(height, width) // 8)
    for axis, length in ((ax.xaxis, width), (ax.yaxis, height)):
        shown = range(0, length, step)
        axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
    ax.tick_params(which="both", length=0, labelsize=7)


def _windows_alike(grid: Grid) -> dict[int, int]:
    """First window of each distinct mask -> how many windows share it."""
    first: dict[bytes, int] = {}
    masks = enumerate(grid.shift_mask())
    return Counter(first.setdefault(mask.numpy().tobytes(), window) for window, mask in masks)


def _size(values: Sequence[int]) -> str:
    return "×".join(map(str, values))


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−").replace("inf", "∞")


def _caption(grid: Grid) -> str:
    """The sizes of a grid in words; ValueError where it has not 2 axes."""
    if grid.axes != 2:
        raise ValueError(f"pictures: expected a grid of 2 axes, got {grid.axes} ({grid.size})")
    return f"map {_size(grid.size)}, window {_size(grid.window)}, shift {_size(grid.shift)}"


def _legend(figure: Figure, grid: Grid, mask_value: float) -> None:
    from matplotlib.patches import Patch

    same = "colour of a region: +0, its tokens attend to each other"
    apart = f"different regions: {_signed(mask_value)} on the logit"
    entries = [
        Patch(facecolor=REGION_COLOURS[0], label=same),
        Patch(facecolor=MASKED_COLOUR, label=apart),
    ]
    if grid.needs_padding:
        entries.append(Patch(**PADDING_STYLE, label="token added by padding"))
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False
    )


def region_figure(grid: Grid) -> Figure:
    """The regions of a shifted map before and after the cyclic shift (Liu et al. 2021, fig. 4)."""
    figure = _figure(8.4, 4.6, f"Shift regions · {_caption(grid)}")
    _draw_regions(figure, grid)
    return figure


def _draw_regions(figure: Any, grid: Grid) -> None:
    left, right = figure.subplots(1, 2)
    _draw_map(left, _source_map(grid), torch.zeros(grid.size, dtype=torch.bool))
    _draw_seams(left, grid)
    left.set_title("the map as it is; dashed: shifted windows", fontsize=9)
    _draw_map(right, _numbered(grid), _padding_map(grid))
    _draw_windows(right, grid)
    right.set_title("rolled by −shift; bold: windows", fontsize=9)


def mask_figure(grid: Grid, mask_value: float = -100.0) -> Figure:
    """The mask of each window; windows that share one are drawn once, and counted."""
    alike = _windows_alike(grid)
    figure = _figure(2.6 * len(alike) + 0.4, 3.5, f"Window masks · {_caption(grid)}")
    _draw_distinct_masks(figure, grid, alike, mask_value)
    _legend(figure, grid, mask_value)
    return figure


def _draw_distinct_masks(figure: Any, grid: Grid, alike: dict[int, int], mask_value: float) -> None:
    axes = figure.subplots(1, len(alike), squeeze=False)[0]
    for ax, (window, count) in zip(axes, alike.items()):
        _draw_mask(ax, grid, window, mask_value)
        others = f", {count - 1} more alike" if count > 1 else ""
        ax.set_title(f"window {window}{others}", fontsize=9)
    axes[0].set_ylabel("query token", fontsize=8)


def _draw_mask(ax: Axes, grid: Grid, window: int, mask_value: float) -> None:
    """One window's mask: coloured where two tokens share a region, else dark."""
    from matplotlib.colors import to_rgb

    regions = grid.split(_numbered(grid)[None])[0, window]
    image = _rgb(regions[:, None].expand(grid.tokens, grid.tokens))
    image[(grid.shift_mask(mask_value)[window] != 0).numpy()] = to_rgb(MASKED_COLOUR)
    ax.imshow(image, extent=(0, grid.tokens, grid.tokens, 0), interpolation="nearest")
    _ticks(ax, grid.tokens, grid.tokens)
    ax.set_xlabel("key token", fontsize=8)


def shift_figure(grid: Grid, mask_value: float = -100.0) -> Figure:
    """Regions and masks in one picture; 6×6, window 3, shift 2 is the classic."""
    alike = _windows_alike(grid)
    title = f"Shifted windows · {_caption(grid)}"
    figure = _figure(max(8.4, 2.6 * len(alike)), 7.6, title, fontsize=12)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.45, 1.0))
    _draw_regions(halves[0], grid)
    _draw_distinct_masks(halves[1], grid, alike, mask_value)
    _legend(figure, grid, mask_value)
    return figure


def photo_figure(
    photo: NDArray[Any], grid: Grid, title: str = "", mask_value: float = -100.0
) -> Figure:
    """A photograph (height, width, 3) of bytes under the windows of `grid`, and one border mask.

    The mask is that of the last window, where the most regions meet. ValueError if the photograph
    has less than one pixel a token.
    """
    caption = f"{title} · {_caption(grid)}" if title else _caption(grid)
    if photo.ndim != 3 or any(photo.shape[axis] < grid.size[axis] for axis in range(2)):
        raise ValueError(
            f"photo: expected (height, width, 3) of at least {grid.size} pixels, "
            f"got {tuple(photo.shape)}"
        )
    scale = photo.shape[0] // grid.size[0], photo.shape[1] // grid.size[1]  # pixels a token
    figure = _figure(12.6, 5.2, caption, fontsize=12)
    from matplotlib.patches import Rectangle  # known to be there by now

    left, middle, right = figure.subplots(1, 3)

    pixels = torch.tensor(photo[: grid.size[0] * scale[0], : grid.size[1] * scale[1]])
    _draw_photo(left, pixels, _source_map(grid), scale)
    _draw_seams(left, grid, scale)
    left.set_title("the photo; dashed: shifted windows", fontsize=9)

    _draw_photo(middle, _rolled(pixels, grid, scale), _numbered(grid), scale)
    _hatch(middle, _padding_map(grid), scale)
    _draw_windows(middle, grid, scale)
    height, width = (tokens * side for tokens, side in zip(grid.window, scale))
    corner = (grid.counts[1] - 1) * width, (grid.counts[0] - 1) * height
    line: dict[str, Any] = {"edgecolor": "#d00000", "linewidth": 3.5, "clip_on": False}
    middle.add_patch(Rectangle(corner, width, height, fill=False, zorder=3, **line))
    middle.set_title("rolled by −shift; bold: windows", fontsize=9)

    _draw_mask(right, grid, grid.windows - 1, mask_value)
    right.set_title(f"mask of window {grid.windows - 1}, outlined in red", fontsize=9)
    right.set_ylabel("query token", fontsize=8)
    _legend(figure, grid, mask_value)
    return figure


def _rolled(pixels: Tensor, grid: Grid, scale: tuple[int, int]) -> Tensor:
    """The photograph (height, width, 3) padded and rolled as its tokens are; padding is white."""
    for axis in range(2):
        cells = pixels.unflatten(axis, (grid.size[axis], scale[axis]))
        white = torch.full_like(cells.narrow(axis, 0, 1), 255)
        # white stands where −1 + 1 points
        cells = torch.cat((white, cells), axis).index_select(axis, _sources(grid, axis) + 1)
        pixels = cells.flatten(axis, axis + 1)
    return pixels


def _draw_photo(ax: Axes, pixels: Tensor, regions: Tensor, scale: tuple[int, int]) -> None:
    """A photograph under a tint of its regions."""
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(pixels.numpy(), extent=extent)
    ax.imshow(_rgb(regions), extent=extent, interpolation="nearest", alpha=0.45)
    ax.set_xticks([])
    ax.set_yticks([])


def bias_figure(bias: Tensor, title: str = "Relative position bias") -> Figure:
    """A learnt bias (H, N, N), one panel a head, on one scale; ValueError for another shape."""
    if bias.ndim != 3 or bias.shape[1] != bias.shape[2]:
        raise ValueError(f"bias: expected (H, N, N), got {tuple(bias.shape)}")
    heads = bias.shape[0]
    rows = -(-heads // 8)
    columns = -(-heads // rows)
    figure = _figure(1.7 * columns + 1.2, 1.8 * rows + 0.9, title)
    values = bias.detach().float().cpu()
    limit = float(values.abs().max()) or 1.0
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for head, ax in enumerate(panels):
        if head >= heads:
            ax.set_axis_off()
            continue
        image = ax.imshow(values[head].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(f"head {head}", fontsize=8)
        ax.tick_params(labelsize=6)
        if head % columns:
            ax.set_yticklabels([])
        else:
            ax.set_ylabel("query token", fontsize=7)
        if head >= heads - columns:
            ax.set_xlabel("key token", fontsize=7)
    figure.colorbar(image, ax=list(panels), shrink=0.9, label="added to the logit")
    return figure
