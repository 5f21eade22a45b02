"""Windows on a grid, as device code: the arithmetic of swin_kernels.geometry on program ids.

A map always has three axes here; those that a caller lacks are leading axes of one token.
`geometry` and `META` are `Geometry` and `Meta` of kernel_args.
"""

import triton
import triton.language as tl


@triton.jit
def _quotient(n, factor, shift):
    """n // d of 0 ≤ n < 2³¹, with `divisor` of d: three instructions instead of twenty."""
    twice = n.to(tl.uint32) << 1
    return (tl.umulhi(twice, factor.to(tl.uint32, bitcast=True)) >> shift).to(tl.int32)


@triton.jit
def window_place(window, geometry, META: tl.constexpr):
    """Image of a window, its number in the image, and its place on each axis."""
    counts, factors, shifts = geometry.counts, geometry.factors, geometry.shifts
    rows = _quotient(window, factors[2], shifts[2])  # of windows, in all images
    planes = _quotient(rows, factors[1], shifts[1])
    image = planes
    if META.PLANES:
        image = _quotient(planes, factors[0], shifts[0])
    place = (planes - image * counts[0], rows - planes * counts[1], window - rows * counts[2])
    if not META.PLANES:
        place = (planes - planes, place[1], place[2])
    number = (place[0] * counts[1] + place[1]) * counts[2] + place[2]
    return image, number, place


@triton.jit
def window_place_by_image(window, geometry, META: tl.constexpr):
    """As `window_place`, of windows counted by place on the map, and there by image.

    Neighbours are then cut by the same seams, but where one place follows on another.
    """
    counts, factors, shifts, images = (
        geometry.counts,
        geometry.factors,
        geometry.shifts,
        geometry.images,
    )
    number = _quotient(window, images[1], images[2])
    rows = _quotient(number, factors[2], shifts[2])
    planes = rows - rows
    if META.PLANES:
        planes = _quotient(rows, factors[1], shifts[1])
    place = (planes, rows - planes * counts[1], number - rows * counts[2])
    return window - number * images[0], number, place


@triton.jit
def token_places(n, META: tl.constexpr):
    """Place of token n in its window, on each axis."""
    plane: tl.constexpr = META.WINDOW[1] * META.WINDOW[2]
    return n // plane, n // META.WINDOW[2] % META.WINDOW[1], n % META.WINDOW[2]


@triton.jit
def _source(rolled, size, period, roll, ROLLED: tl.constexpr, PADDED: tl.constexpr):
    """Where on the map a position of the rolled map comes from, and whether it is on the map."""
    position = rolled
    real = rolled == rolled  # which a compiler knows
    if ROLLED:
        position += roll
        position = tl.where(position >= period, position - period, position)
    if PADDED:
        real = (rolled < period) & (position < size)
    return position, real


@triton.jit
def locate(n, places, window, geometry, META: tl.constexpr):
    """Positions on the map of the tokens n at `places` of the window at `window`.

    With them, which of the tokens lie on the map, and which are padding.
    """
    sizes, periods, rolls = geometry.sizes, geometry.periods, geometry.rolls
    rolled0 = window[0] * META.WINDOW[0] + places[0]
    rolled1 = window[1] * META.WINDOW[1] + places[1]
    rolled2 = window[2] * META.WINDOW[2] + places[2]
    ROLLED_0: tl.constexpr = META.ROLLED and META.PLANES
    PADDED_0: tl.constexpr = META.PADDED and META.PLANES
    x0, real0 = _source(rolled0, sizes[0], periods[0], rolls[0], ROLLED_0, PADDED_0)
    x1, real1 = _source(rolled1, sizes[1], periods[1], rolls[1], META.ROLLED, META.PADDED)
    x2, real2 = _source(rolled2, sizes[2], periods[2], rolls[2], META.ROLLED, META.PADDED)
    if META.WIDE:
        x0, x1, x2 = x0.to(tl.int64), x1.to(tl.int64), x2.to(tl.int64)
    real = real0 & real1 & real2
    inside = n < META.TOKENS
    return (x0, x1, x2), real & inside, inside & ~real


@triton.jit
def decode_program_id(program, heads, windows, group_windows, TILES: tl.constexpr):
    """Tile, head and window of a program, of a grid of windows·heads·TILES.

    As many windows as the device works on at once take one tile of one head together, which so
    finds its bias in the first cache; then its other tiles, and then the other heads.
    """
    together = group_windows * heads * TILES
    first = program // together * group_windows
    here = tl.minimum(windows - first, group_windows)
    within = program - first * (heads * TILES)
    tile = within // here
    return tile % TILES, tile // TILES, first + within % here


@triton.jit
def seams_crossed(window, geometry, META: tl.constexpr):
    """A bit per axis on which a window holds two regions: only the last one does, if shifted."""
    crossed = 0
    if META.REGIONS[0]:
        crossed += (window[0] == geometry.counts[0] - 1).to(tl.int32) * 4
    if META.REGIONS[1]:
        crossed += (window[1] == geometry.counts[1] - 1).to(tl.int32) * 2
    if META.REGIONS[2]:
        crossed += (window[2] == geometry.counts[2] - 1).to(tl.int32)
    return crossed


@triton.jit
def seam_sides(places, seams):
    """A bit per axis: the side of the seam on which a token lies, in a window that holds one."""
    side = (places[0] >= seams[0]).to(tl.int32) * 4
    return side + (places[1] >= seams[1]).to(tl.int32) * 2 + (places[2] >= seams[2]).to(tl.int32)


@triton.jit
def geometric_row(places_i, places_j, META: tl.constexpr):
    """Row of a geometric table where query i meets key j (Liu et al. 2021, eq. 4)."""
    row = places_i[0] - places_j[0] + (META.WINDOW[0] - 1)
    row = row * (2 * META.WINDOW[1] - 1) + places_i[1] - places_j[1] + (META.WINDOW[1] - 1)
    return row * (2 * META.WINDOW[2] - 1) + places_i[2] - places_j[2] + (META.WINDOW[2] - 1)
