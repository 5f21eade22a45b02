"""Shift regions, window masks and position biases drawn with matplotlib.

Every function returns a Figure that belongs to no window and no global state; save it with
`figure.savefig(path)`. ValueError for a grid that has not 2 axes, ImportError without matplotlib.
"""

from __future__ import annotations

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
PADDING_COLOUR = "#ffffff"
MASKED_COLOUR = "#3d3d46"
_MOST_LABELLED = 16  # cells an axis beyond which a digit in each is only noise


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _two_axes(grid: Grid) -> None:
    if grid.axes != 2:
        raise ValueError(f"pictures: expected a grid of 2 axes, got {grid.axes} ({grid.size})")


def _numbered(grid: Grid) -> Tensor:
    """Regions of the rolled map numbered 0, 1, … in the order in which they are met: (*padded)."""
    return torch.unique(grid.region_map(), return_inverse=True)[1]


def _source_map(grid: Grid) -> Tensor:
    """Region number of every token where the caller holds it: (*size)."""
    regions, out = _numbered(grid), torch.zeros(grid.size, dtype=torch.int64)
    for row in range(grid.padded[0]):
        for column in range(grid.padded[1]):
            place = grid.source(0, row), grid.source(1, column)
            if None not in place:
                out[place] = regions[row, column]
    return out


def _padding_map(grid: Grid) -> Tensor:
    """(*padded) bool: tokens of the rolled map that padding added."""
    rows, columns = (
        torch.tensor([grid.source(axis, i) is None for i in range(grid.padded[axis])])
        for axis in range(2)
    )
    return rows[:, None] | columns[None, :]


def _rgb(numbers: Tensor) -> NDArray[Any]:
    """Region numbers as colours: (..., 3) in [0, 1]."""
    from matplotlib.colors import to_rgb

    palette = torch.tensor([to_rgb(colour) for colour in REGION_COLOURS])
    return palette[numbers % len(REGION_COLOURS)].numpy()


def _draw_map(ax: Axes, numbers: Tensor, padding: Tensor | None = None) -> None:
    """Tokens in the colour of their region, numbered while they are few."""
    height, width = numbers.shape
    ax.imshow(_rgb(numbers), extent=(0, width, height, 0), interpolation="nearest")
    if max(height, width) <= _MOST_LABELLED:
        ax.set_xticks(range(width + 1), minor=True)
        ax.set_yticks(range(height + 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        for row in range(height):
            for column in range(width):
                if padding is None or not padding[row, column]:
                    ax.text(
                        column + 0.5,
                        row + 0.5,
                        str(int(numbers[row, column])),
                        ha="center",
                        va="center",
                        fontsize=8,
                    )
    if padding is not None:
        _hatch(ax, padding)
    ax.tick_params(which="both", length=0)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)


def _hatch(ax: Axes, padding: Tensor, scale: tuple[float, float] = (1.0, 1.0)) -> None:
    """Marks the tokens that padding added."""
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"facecolor": PADDING_COLOUR, "edgecolor": "#999999", "hatch": "////"}
    for row, column in padding.nonzero().tolist():
        corner = column * scale[1], row * scale[0]
        ax.add_patch(Rectangle(corner, scale[1], scale[0], **style))


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
    ax.set_xticks([i + 0.5 for i in range(0, width, step)], [str(i) for i in range(0, width, step)])
    ax.set_yticks(
        [i + 0.5 for i in range(0, height, step)], [str(i) for i in range(0, height, step)]
    )
    ax.tick_params(which="both", length=0, labelsize=7)


def _draw_mask(ax: Axes, regions: Tensor, mask: Tensor) -> None:
    """One window's (N, N) mask: coloured where two tokens share a region, else dark."""
    from matplotlib.colors import to_rgb

    tokens = mask.shape[0]
    image = _rgb(regions[:, None].expand(tokens, tokens)).copy()
    image[(mask != 0).numpy()] = to_rgb(MASKED_COLOUR)
    ax.imshow(image, extent=(0, tokens, tokens, 0), interpolation="nearest")
    _ticks(ax, tokens, tokens)


def _windows_alike(grid: Grid) -> dict[int, int]:
    """First window of each distinct pattern of regions -> how many windows share it."""
    regions = grid.split(_numbered(grid)[None])[0]
    alike: dict[int, int] = {}
    for window in range(grid.windows):
        # region numbers differ between windows that have the same mask
        pattern = regions[window][:, None] != regions[window][None, :]
        for first in alike:
            if torch.equal(pattern, regions[first][:, None] != regions[first][None, :]):
                alike[first] += 1
                break
        else:
            alike[window] = 1
    return alike


def _size(values: Sequence[int]) -> str:
    return "×".join(map(str, values))


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−").replace("inf", "∞")


def _caption(grid: Grid) -> str:
    return f"map {_size(grid.size)}, window {_size(grid.window)}, shift {_size(grid.shift)}"


def _legend(figure: Figure, grid: Grid, mask_value: float) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(
            facecolor=REGION_COLOURS[0],
            label="colour of a region: +0, its tokens attend to each other",
        ),
        Patch(
            facecolor=MASKED_COLOUR, label=f"different regions: {_signed(mask_value)} on the logit"
        ),
    ]
    if grid.needs_padding:
        entries.append(
            Patch(
                facecolor=PADDING_COLOUR,
                edgecolor="#999999",
                hatch="////",
                label="token added by padding",
            )
        )
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False
    )


def region_figure(grid: Grid) -> Figure:
    """The regions of a shifted map before and after the cyclic shift (Liu et al. 2021, fig. 4)."""
    _two_axes(grid)
    figure = _figure(8.4, 4.6)
    figure.suptitle(f"Shift regions · {_caption(grid)}", fontsize=11)
    left, right = figure.subplots(1, 2)
    _draw_regions(left, right, grid)
    return figure


def _draw_regions(left: Axes, right: Axes, grid: Grid) -> None:
    _draw_map(left, _source_map(grid))
    _draw_seams(left, grid)
    _ticks(left, *grid.size)
    left.set_title("the map as it is; dashed: shifted windows", fontsize=9)
    _draw_map(right, _numbered(grid), _padding_map(grid))
    _draw_windows(right, grid)
    _ticks(right, *grid.padded)
    right.set_title("rolled by −shift; bold: windows", fontsize=9)


def mask_figure(grid: Grid, mask_value: float = -100.0) -> Figure:
    """The mask of each window; windows that share one are drawn once, and counted."""
    _two_axes(grid)
    alike = _windows_alike(grid)
    figure = _figure(2.6 * len(alike) + 0.4, 3.5)
    figure.suptitle(f"Window masks · {_caption(grid)}", fontsize=11)
    _draw_masks(list(figure.subplots(1, len(alike), squeeze=False)[0]), grid, alike, mask_value)
    _legend(figure, grid, mask_value)
    return figure


def _draw_masks(axes: Sequence[Axes], grid: Grid, alike: dict[int, int], mask_value: float) -> None:
    masks = grid.shift_mask(mask_value)
    regions = grid.split(_numbered(grid)[None])[0]
    for ax, (window, count) in zip(axes, alike.items()):
        _draw_mask(ax, regions[window], masks[window])
        others = f", {count - 1} more alike" if count > 1 else ""
        ax.set_title(f"window {window}{others}", fontsize=9)
        ax.set_xlabel("key token", fontsize=8)
    axes[0].set_ylabel("query token", fontsize=8)


def shift_figure(grid: Grid, mask_value: float = -100.0) -> Figure:
    """Regions and masks in one picture; 6×6, window 3, shift 2 is the classic."""
    _two_axes(grid)
    alike = _windows_alike(grid)
    figure = _figure(max(8.4, 2.6 * len(alike)), 7.6)
    figure.suptitle(f"Shifted windows · {_caption(grid)}", fontsize=12)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.45, 1.0))
    top, bottom = halves
    left, right = top.subplots(1, 2)
    _draw_regions(left, right, grid)
    _draw_masks(list(bottom.subplots(1, len(alike), squeeze=False)[0]), grid, alike, mask_value)
    _legend(figure, grid, mask_value)
    return figure


def photo_figure(
    photo: NDArray[Any], grid: Grid, title: str = "", mask_value: float = -100.0
) -> Figure:
    """A photograph (height, width, 3) of bytes under the windows of `grid`, and one border mask.

    The mask is that of the last window, where the most regions meet. ValueError if the photograph
    has less than one pixel a token.
    """
    _two_axes(grid)
    if photo.ndim != 3 or any(photo.shape[axis] < grid.size[axis] for axis in range(2)):
        raise ValueError(
            f"photo: expected (height, width, 3) of at least {grid.size} pixels, "
            f"got {tuple(photo.shape)}"
        )
    scale = photo.shape[0] // grid.size[0], photo.shape[1] // grid.size[1]  # pixels a token
    figure = _figure(12.6, 5.2)
    from matplotlib.patches import Rectangle  # known to be there by now

    figure.suptitle(f"{title} · {_caption(grid)}" if title else _caption(grid), fontsize=12)
    left, middle, right = figure.subplots(1, 3)

    pixels = torch.tensor(photo[: grid.size[0] * scale[0], : grid.size[1] * scale[1]])
    _draw_photo(left, pixels, _source_map(grid), scale)
    _draw_seams(left, grid, scale)
    left.set_title("the photo; dashed: shifted windows", fontsize=9)

    _draw_photo(middle, _rolled(pixels, grid, scale), _numbered(grid), scale)
    _hatch(middle, _padding_map(grid), scale)
    _draw_windows(middle, grid, scale)
    last = [(count - 1) * window for count, window in zip(grid.counts, grid.window)]
    middle.add_patch(
        Rectangle(
            (last[1] * scale[1], last[0] * scale[0]),
            grid.window[1] * scale[1],
            grid.window[0] * scale[0],
            fill=False,
            edgecolor="#d00000",
            linewidth=3.5,
            clip_on=False,
            zorder=3,
        )
    )
    middle.set_title("rolled by −shift; bold: windows", fontsize=9)

    regions = grid.split(_numbered(grid)[None])[0]
    _draw_mask(right, regions[-1], grid.shift_mask(mask_value)[-1])
    right.set_title(f"mask of window {grid.windows - 1}, outlined in red", fontsize=9)
    right.set_xlabel("key token", fontsize=8)
    right.set_ylabel("query token", fontsize=8)
    _legend(figure, grid, mask_value)
    return figure


def _rolled(pixels: Tensor, grid: Grid, scale: tuple[int, int]) -> Tensor:
    """The photograph (height, width, 3) padded and rolled as its tokens are; padding is white."""
    for axis in range(2):
        blank = torch.full_like(pixels.narrow(axis, 0, scale[axis]), 255)
        strips = []
        for i in range(grid.padded[axis]):
            place = grid.source(axis, i)
            strip = (
                blank if place is None else pixels.narrow(axis, place * scale[axis], scale[axis])
            )
            strips.append(strip)
        pixels = torch.cat(strips, dim=axis)
    return pixels


def _draw_photo(ax: Axes, pixels: Tensor, regions: Tensor, scale: tuple[int, int]) -> None:
    """A photograph under a tint of its regions."""
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(pixels.numpy(), extent=extent)
    ax.imshow(_rgb(regions), extent=extent, interpolation="nearest", alpha=0.45)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)


def bias_figure(bias: Tensor, title: str = "Relative position bias") -> Figure:
    """A learnt bias (H, N, N), one panel a head, on one scale; ValueError for another shape."""
    if bias.ndim != 3 or bias.shape[1] != bias.shape[2]:
        raise ValueError(f"bias: expected (H, N, N), got {tuple(bias.shape)}")
    heads = bias.shape[0]
    rows = -(-heads // 8)
    columns = -(-heads // rows)
    figure = _figure(1.7 * columns + 1.2, 1.8 * rows + 0.9)
    figure.suptitle(title, fontsize=11)
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
