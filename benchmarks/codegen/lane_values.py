"""What the lanes of a warp hold in a register: the numbers of an abstract interpretation.

A value is a known number in each lane, plus an unknown that all lanes of a warp share, a multiple
of a power of two (abstract interpretation: Cousot & Cousot, POPL 1977; congruences: Granger, 1989).
Sums with an unknown are taken not to overflow and, where lanes differ, not to be negative. None is
anything, in each lane.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WORD = 1 << 32
BITS = WORD - 1


@dataclass(frozen=True, eq=False)
class Value:
    """`lanes` + u in each lane, with an unknown multiple u of `step` that a warp's lanes share."""

    lanes: np.ndarray  # (warps, 32) or what broadcasts to it, int64; exact ones in 0 … 2³² − 1
    step: int = WORD  # a power of two; 2³² where nothing is unknown

    @property
    def exact(self) -> bool:
        return self.step == WORD

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether a warp's lanes hold the same number."""
        return _uniform(self.lanes)

    @property
    def high(self) -> int:
        """The bits that are unknown."""
        return BITS & ~(self.step - 1)


Known = Value | None


def _uniform(lanes: np.ndarray) -> bool:
    return bool((lanes == lanes[:, :1]).all())


def _lowest_bit(lanes: np.ndarray) -> int:
    bits = int(np.bitwise_or.reduce(lanes, axis=None)) & BITS
    return bits & -bits or WORD


def value(lanes: np.ndarray, step: int = WORD) -> Value:
    """The one way to write `lanes` + u down."""
    if step >= WORD:
        return Value(lanes & BITS)
    first = lanes[:, :1]
    return Value(signed(lanes - first) + (first & (step - 1)), step)


def signed(lanes: np.ndarray) -> np.ndarray:
    return ((lanes + WORD // 2) & BITS) - WORD // 2


@functools.cache
def constant(number: int) -> Value:
    return value(np.full((1, 1), number, dtype=np.int64))


def unknown(step: int = 1) -> Value:
    """A multiple of `step`, the same in all lanes of a warp."""
    return value(np.zeros((1, 1), dtype=np.int64), step)


UNIFORM = unknown()


def exact(*values: Known) -> bool:
    return all(x is not None and x.exact for x in values)


def generic(inputs: Iterable[Known]) -> Known:
    """The result of any operation that gives equal results for equal inputs."""
    return UNIFORM if all(x is not None and x.uniform for x in inputs) else None


def join(a: Known, b: Known) -> Known:
    """What holds for both, one of which all lanes of a warp have."""
    if a is b or a is None or b is None:
        return a if a is b else None
    apart = (a.lanes - b.lanes) & BITS
    if not _uniform(apart):
        return None
    step = min(a.step, b.step, _lowest_bit(apart))
    return a if step == a.step else value(a.lanes, step)


def select(condition: Known, a: Known, b: Known) -> Known:
    """`a` in the lanes where the condition is 1, `b` where it is 0."""
    if condition is not None and not condition.exact:
        return join(a, b) if condition.uniform else None
    if condition is not None and condition.lanes.all():
        return a
    if condition is not None and not condition.lanes.any():
        return b
    if a is None or b is None:
        return None
    if exact(a, b):
        if condition is not None:
            return value(np.where(condition.lanes != 0, a.lanes, b.lanes))
        return a if (a.lanes == b.lanes).all() else None
    if condition is not None and condition.uniform:  # in each warp, but not the same in all
        return value(np.where(condition.lanes != 0, a.lanes, b.lanes), min(a.step, b.step))
    return None


def add(*terms: Known) -> Known:
    known = [x for x in terms if x is not None]
    if len(known) < len(terms):
        return None
    lanes = functools.reduce(np.add, (x.lanes for x in known))
    return value(lanes, min(x.step for x in known))


def multiply(a: Known, b: Known) -> Known:
    if a is None or b is None:
        return None
    if a.exact and b.exact:
        return value(a.lanes * b.lanes)
    for known, other in ((a, b), (b, a)):
        if known.exact and known.uniform:
            return value(other.lanes * known.lanes, other.step * _lowest_bit(known.lanes))
    if a.uniform and b.uniform:
        divisors = (min(x.step, _lowest_bit(x.lanes)) for x in (a, b))
        return unknown(min(WORD >> 1, functools.reduce(int.__mul__, divisors)))
    return None


def negative(a: Known) -> Known:
    return multiply(a, constant(-1))


def opposite(a: Known) -> Known:
    """Of a predicate."""
    return add(constant(1), negative(a))


def absolute(a: Known) -> Known:
    return value(np.abs(signed(a.lanes))) if a is not None and a.exact else generic((a,))


def _numbers(a: Value, with_sign: bool) -> np.ndarray:
    return signed(a.lanes) if with_sign else a.lanes


_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def compare(relation: str, a: Known, b: Known, with_sign: bool = False) -> Known:
    """1 where it holds, 0 elsewhere."""
    if a is None or b is None or not exact(a, b):
        return generic((a, b))
    numbers = (_numbers(x, with_sign) for x in (a, b))
    return value(_COMPARISONS[relation](*numbers).astype(np.int64))


def extreme(a: Known, b: Known, least: Known, with_sign: bool) -> Known:
    """The smaller number where `least` is 1, the larger elsewhere."""
    less, more = select(least, a, b), select(least, b, a)
    return select(compare("LT", a, b, with_sign), less, more)


def high_product(a: Known, b: Known, with_sign: bool) -> Known:
    """The high half of a product."""
    if a is None or b is None or not exact(a, b):
        return generic((a, b))
    kind = np.int64 if with_sign else np.uint64
    product = _numbers(a, with_sign).astype(kind) * _numbers(b, with_sign).astype(kind)
    return value((product >> kind(32)).astype(np.int64))


def low_bits(a: Known, count: Known, with_sign: bool) -> Known:
    """The low bits of a number, by themselves or with the highest of them as the sign."""
    if a is None or count is None or not count.exact or count.lanes.size > 1:
        return generic((a, count))
    bits = int(count.lanes.item())
    low = logical(0xC0, (a, constant((1 << bits) - 1), constant(0)))
    if not with_sign:
        return low
    half = 1 << bits >> 1
    return value((low.lanes ^ half) - half) if low is not None and low.exact else generic((a,))


def byte_permutation(a: Known, selector: Known, b: Known) -> Known:
    """Each byte one of eight, or, with the selector's high bit, that one's sign."""
    if a is None or b is None or selector is None or not exact(a, b, selector):
        return generic((a, selector, b))
    pool, result = a.lanes | b.lanes << 32, constant(0).lanes
    for place in range(0, 32, 8):
        chosen = selector.lanes >> place // 2
        byte = pool >> 8 * (chosen & 7) & 255
        result = result | np.where(chosen & 8, 255 * (byte >> 7), byte) << place
    return value(result)


def shift_left(a: Known, count: Known) -> Known:
    if count is None or not count.exact:
        return generic((a, count))
    return multiply(a, value(np.where(count.lanes < 32, 1 << np.minimum(count.lanes, 31), 0)))


def shift_right(a: Known, count: Known, arithmetic: bool) -> Known:
    if a is None or count is None or not count.exact:
        return generic((a, count))
    places = np.minimum(count.lanes, 63)
    if a.exact:
        return value((signed(a.lanes) if arithmetic else a.lanes) >> places)
    if places.size == 1 and a.step >> int(places.item()):
        return value(a.lanes >> places, a.step >> int(places.item()))
    if (places == 31).all() and not a.uniform:
        return constant(0)  # the sign
    return generic((a, count))


def _table(lut: int, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The function of three that a truth table gives, bit by bit."""
    result = np.zeros((1, 1), dtype=np.int64)
    for row in (row for row in range(8) if lut >> row & 1):
        bits = (x if row >> place & 1 else ~x for x, place in zip(inputs, (2, 1, 0)))
        result = result | functools.reduce(np.bitwise_and, bits)
    return result & BITS


def logical(lut: int, operands: Sequence[Known]) -> Known:
    """A truth table of three, where 0xf0, 0xcc and 0xaa are the operands themselves.

    Bits that depend on an unknown are again one that the lanes share, if they are the same bits of
    operands alike in all lanes, or if they are an operand's own, which pass unchanged.
    """
    known = [x for x in operands if x is not None]
    if len(known) < len(operands):
        return None
    results = []
    for chosen in range(1 << sum(not x.exact for x in known)):  # unknown bits all 0, or all 1
        places = itertools.accumulate((not x.exact for x in known), initial=0)
        highs = [x.high if chosen >> place & 1 else 0 for x, place in zip(known, places)]
        inputs = [x.lanes & (x.step - 1) | high for x, high in zip(known, highs)]
        results.append(_table(lut, inputs))
    depends = functools.reduce(np.bitwise_or, (x ^ results[0] for x in results))
    rest = results[0] & ~depends
    if not depends.any():
        return value(rest)
    if not _uniform(depends):
        return None
    parts = [x.lanes & (depends | ~(x.step - 1)) for x in known]
    if all(map(_uniform, parts)):
        return value(rest, _lowest_bit(depends))
    if len(results) == 2:
        place = next(i for i, x in enumerate(known) if not x.exact)
        high = known[place].high
        if (depends == high).all() and not (results[0] & high).any():
            return value(parts[place] + rest, known[place].step)
    return None
