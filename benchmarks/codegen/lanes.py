"""Which numbers the lanes of a warp hold while NVIDIA's machine code runs, as far as it tells them.

An abstract interpretation of all warps of a program at once, to a fixed point over the basic
blocks. Threads are numbered along x, as many as the program has. Block numbers, kernel parameters,
loop counters and what all lanes load from one address are unknown, but shared (`lane_values`).
Taken for granted: the lanes of a warp branch together, by jumps and by predicates that are not
known, and no register is read before it is written. What instructions mean is not published: those
that addresses are made of are understood by their names and by what compiled code does with them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.codegen import sass
from benchmarks.codegen.lane_values import (
    UNIFORM,
    Known,
    absolute,
    add,
    byte_permutation,
    compare,
    constant,
    exact,
    extreme,
    generic,
    high_product,
    join,
    logical,
    low_bits,
    multiply,
    negative,
    opposite,
    select,
    shift_left,
    shift_right,
    value,
)

WARP = 32
_REGISTER = re.compile(r"U?R(?:\d+|Z)$")
_PREDICATE = re.compile(r"U?P[\dT]$")
_NAMED = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
_OPERAND = re.compile(r"([-~!|]*)(.*?)\|?$")
_TERM = re.compile(r"(-?)(U?R(?:\d+|Z)|0x[0-9a-f]+)(?:\.X(\d+))?(?:\.\w+)*$")
_WRITES_NOTHING = re.compile(
    r"(?:ST[A-Z]*|RED|BAR|BRA|BRX|JMP|JMX|CALL|RET|EXIT|BSSY|BSYNC|WARPSYNC|NOP|DEPBAR|LDGDEPBAR|"
    r"MEMBAR|ERRBAR|CCTL[A-Z]*|NANOSLEEP|WARPGROUP|FENCE|UTMA[A-Z]*|LDGSTS|KILL|BPT|YIELD)$"
)
_COMPARES = ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3")  # which write two predicates
_CARRIES = ("IADD3", "LEA", "IMAD")  # which may write predicates after a register
_UNLIKE = ("S2R", "CS2R", "LDL", "P2R", "MATCH", "ELECT", "LDSM", "ATOM", "ATOMS", "ATOMG")
_SHARED = ("VOTE", "REDUX", "R2UR", "S2UR")  # whose result is one for all lanes
_BLOCK_SIZE = ("c[0x0][0x0]", "c[0x0][RZ]", "c[0x0][URZ]")  # threads of a program, to sm_90
_COMBINES = {"AND": 0xC0, "OR": 0xFC, "XOR": 0x3C}
_AND = 0xC0


class State(dict[str, Known]):
    """Registers and predicates by name; those that were never written are missing."""

    def read(self, operand: str) -> Known:
        """What an operand stands for."""
        modifiers, name = _OPERAND.match(operand).groups()  # type: ignore[union-attr]
        found = self._plain(name)
        for modifier in reversed(modifiers):
            if modifier == "-":
                found = negative(found)
            elif modifier == "~":
                found = add(negative(found), constant(-1))
            else:
                found = opposite(found) if modifier == "!" else absolute(found)
        return found

    def _plain(self, name: str) -> Known:
        if name in ("RZ", "URZ"):
            return constant(0)
        if name in ("PT", "UPT"):
            return constant(1)
        if _REGISTER.match(name) or _PREDICATE.match(name):
            return self.get(name)
        if name.startswith("0x"):
            return constant(int(name, 16))
        # a parameter, a label, a number of another type; a place to load from
        registers = (
            (k, int(n) + i) for k, n, w in _NAMED.findall(name) for i in range(1 + bool(w))
        )
        return generic(self.get(f"{kind}{number}") for kind, number in registers)

    def address(self, operand: str) -> Known:
        """The place in shared memory that `[R5.X16+UR4+0x400]` stands for."""
        terms: list[Known] = []
        for term in operand.strip("[]").split("+"):
            found = _TERM.match(term)
            if found is None:
                return None
            sign, name, scale = found.groups()
            terms.append(multiply(self.read(sign + name), constant(int(scale or 1))))
        return add(*terms)


@dataclass(frozen=True)
class _Parsed:
    """An instruction, taken apart."""

    instruction: sass.Instruction
    base: str  # the name of what it does, whether in the uniform unit or not
    parts: tuple[str, ...]
    results: tuple[str, ...]
    sources: tuple[str, ...]
    written: tuple[str, ...]  # every register and predicate that it writes


def _width(x: sass.Instruction) -> int:
    """How many registers a result fills."""
    base, *parts = x.name.split(".")
    if base.endswith("GMMA"):
        m, n = map(int, parts[0].split("x")[:2])
        return m * n // (4 * WARP)
    if base.endswith("MMA") or "128" in parts:
        return 4
    if base == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    types = {"F2I": parts[:1], "F2F": parts[:1], "I2F": [x for x in parts if x == "F64"]}
    wide = {"64", "WIDE", "S64", "U64", "F64"} & set(types.get(base, parts)) and base != "SHF"
    return 2 if wide or base in ("DADD", "DMUL", "DFMA") or x.name == "CS2R" else 1


def _parsed(x: sass.Instruction) -> _Parsed:
    parts = tuple(x.name.split("."))
    base = re.sub(r"^U(?!TM|P2UR|R2UP)|(?<=^VOTE)U$", "", parts[0])
    operands = [y.strip().replace(".reuse", "") for y in x.operands.split(", ")]
    kinds = "".join(
        "P" if _PREDICATE.match(y) else "R" if _REGISTER.match(y) else "-" for y in operands
    )
    if _WRITES_NOTHING.match(base):
        taken = 0
    elif base in _COMPARES:
        taken = 2
    else:
        shape = r"P?R?P*" if base in _CARRIES else r"P?R?"
        taken = re.match(shape, kinds).end()  # type: ignore[union-attr]
    results, sources = tuple(operands[:taken]), tuple(operands[taken:])
    if base in ("R2P", "UR2UP"):
        prefix, mask = base[-1:] if base == "R2P" else "UP", int(sources[-1], 16)
        written = [f"{prefix}{i}" for i in range(7) if mask >> i & 1]
    else:
        written = []
        for name in (y for y in results if y[-1].isdigit()):
            kind, number = re.match(r"(\D+)(\d+)", name).groups()  # type: ignore[union-attr]
            width = _width(x) if kind.endswith("R") else 1
            written += [f"{kind}{int(number) + i}" for i in range(width)]
    return _Parsed(x, base, parts, results, sources, tuple(written))


def _combined(x: _Parsed, *operands: Known) -> Known:
    """A comparison and the predicate that its name combines it with."""
    lut = next(lut for name, lut in _COMBINES.items() if name in x.parts)
    return _bit(lut, (*operands, constant(0)))


def _bit(lut: int, operands: Sequence[Known]) -> Known:
    """A truth table of predicates."""
    return logical(_AND, (logical(lut, operands), constant(1), constant(0)))


def _compared(x: _Parsed, a: Known, b: Known, *more: Known) -> Known:
    if "EX" in x.parts:
        return generic((a, b, *more))
    return compare(x.parts[1], a, b, "U32" not in x.parts)


def _shifted(x: _Parsed, low: Known, count: Known, high: Known) -> Known:
    if x.parts[1] == "R" and "HI" in x.parts:
        return shift_right(high, count, "S32" in x.parts)
    if x.parts[1] == "L" and "HI" not in x.parts and "W" not in x.parts:
        return shift_left(low, count)
    return generic((low, count, high))


def _scaled(x: _Parsed, a: Known, b: Known, *rest: Known) -> Known:
    """LEA: a shifted, plus b; .HI: what a shift of 64 bits leaves in the high half, plus b."""
    if "X" in x.parts:
        return generic((a, b, *rest))
    if "HI" not in x.parts:
        return add(shift_left(a, rest[0]), b)
    signs = "SX32" in x.parts
    if not signs and rest[0] is not constant(0):
        return generic((a, b, *rest))
    count = rest[0] if signs else rest[1]
    return add(shift_right(a, add(constant(32), negative(count)), signs), b)


def _product(x: _Parsed, a: Known, b: Known, c: Known, *more: Known) -> Known:
    if "X" in x.parts:
        return generic((a, b, c, *more))
    if "HI" in x.parts:
        return add(high_product(a, b, "U32" not in x.parts), c)
    return add(multiply(a, b), c)


def _shuffled(x: _Parsed, a: Known, lane: Known, *more: Known) -> Known:
    if a is not None and a.uniform:
        return a
    if "IDX" not in x.parts or not exact(lane):
        return None
    place = lane.lanes.flat[0] % WARP  # type: ignore[union-attr]
    alike = lane.lanes.size == 1 and a is not None  # type: ignore[union-attr]
    return value(a.lanes[:, place : place + 1], a.step) if alike else generic((lane,))  # type: ignore


_OPERATIONS: dict[str, Callable[..., Known]] = {
    "MOV": lambda x, a, *more: a,
    "LDC": lambda x, a, *more: a,
    "R2UR": lambda x, a, *more: a if a is not None and a.uniform else UNIFORM,
    "IADD3": lambda x, *terms: generic(terms) if "X" in x.parts else add(*terms[:3]),
    "VIADD": lambda x, a, b: add(a, b),
    "IABS": lambda x, a: absolute(a),
    "IMAD": _product,
    "IMNMX": lambda x, a, b, least: extreme(a, b, least, "U32" not in x.parts),
    "VIMNMX": lambda x, a, b, least: extreme(a, b, least, "U32" not in x.parts),
    "LEA": _scaled,
    "PRMT": lambda x, *inputs: byte_permutation(*inputs),
    "SEL": lambda x, a, b, chosen: select(chosen, a, b),
    "SGXT": lambda x, a, count: low_bits(a, count, "U32" not in x.parts),
    "SHF": _shifted,
    "SHFL": _shuffled,
}


class Interpreter:
    """The registers of every warp of a program, at every instruction."""

    def __init__(self, code: Sequence[sass.Instruction], warps: int) -> None:
        self.size = constant(WARP * warps)
        self.threads = value(np.arange(WARP * warps, dtype=np.int64).reshape(warps, WARP))
        self.lane = value(np.arange(WARP, dtype=np.int64)[None])
        self.parsed = {x.address: _parsed(x) for x in code}
        self.following = {a.address: b.address for a, b in itertools.pairwise(code)}
        self.subroutines: dict[int, list[str]] = {}
        graph = sass.Graph(list(code))
        self.entries: dict[int, State] = {graph.order[0]: State()}
        waiting = {graph.order[0]}
        places = {block: place for place, block in enumerate(graph.order)}
        while waiting:  # until nothing changes: a value loses its step, or is known no more
            block = min(waiting, key=places.__getitem__)
            waiting.remove(block)
            state = State(self.entries[block])
            for x in graph.blocks[block]:
                self._execute(state, self.parsed[x.address])
            for following in graph.ways.successors(block):
                if self._reach(following, state):
                    waiting.add(following)
        self.graph = graph

    def _reach(self, block: int, state: State) -> bool:
        """Whether what a block begins with is another after a way to it."""
        entry = self.entries.get(block)
        if entry is None:
            self.entries[block] = State(state)
            return True
        changed = False
        for name, new in state.items():
            if name not in entry:
                entry[name], changed = new, True
            elif (joined := join(entry[name], new)) is not entry[name]:
                entry[name], changed = joined, True
        return changed

    def states(self) -> Iterator[tuple[sass.Instruction, State]]:
        """Every instruction that is reached, with the registers before it."""
        for block in self.graph.order:
            state = State(self.entries[block])
            for x in self.graph.blocks[block]:
                yield x, state
                self._execute(state, self.parsed[x.address])

    def _execute(self, state: State, x: _Parsed) -> None:
        if x.base == "CALL":
            found = re.search(r"0x([0-9a-f]+)\)?$", x.instruction.operands)
            if found is not None:
                state.update(dict.fromkeys(self._subroutine(int(found[1], 16))))
            return
        inputs = [self.size if y in _BLOCK_SIZE else state.read(y) for y in x.sources]
        unlike = x.base in _UNLIKE or x.base.endswith("MMA")
        results = dict.fromkeys(x.written, None if unlike else generic(inputs))
        if x.base in _SHARED:
            results = dict.fromkeys(x.written, UNIFORM)
        results |= {k: v for k, v in self._understood(x, inputs) if k in results}
        guard = x.instruction.guard.removeprefix("@")
        for name, new in results.items():
            if guard and name in state:
                # an unknown predicate is a branch that the lanes take together
                state[name] = select(state.read(guard) or UNIFORM, new, state[name])
            else:
                state[name] = new

    def _understood(self, x: _Parsed, inputs: list[Known]) -> Iterator[tuple[str, Known]]:
        """What is known better of the results."""
        registers = [y for y in x.results if not _PREDICATE.match(y)]
        if x.base in ("S2R", "CS2R", "S2UR"):
            yield from self._special_register(x)
        elif x.base == "ISETP":
            a, b, other, *more = inputs
            found = _compared(x, a, b, *more)
            yield x.results[0], _combined(x, found, other)
            yield x.results[1], _combined(x, opposite(found), other)
        elif x.base == "PLOP3":
            for name, lut in zip(x.results, x.sources[-2:]):
                yield name, _bit(int(lut, 16), inputs[:3])
        elif x.base == "LOP3":
            found = logical(int(x.sources[3], 16), inputs[:3])
            yield registers[0], found
            if len(x.results) > 1:
                yield x.results[0], compare("NE", found, constant(0))
        elif x.base in _OPERATIONS:
            yield registers[0], _OPERATIONS[x.base](x, *inputs)

    def _special_register(self, x: _Parsed) -> Iterator[tuple[str, Known]]:
        source = x.sources[0]
        known = {"SR_TID.X": self.threads, "SR_LANEID": self.lane, "SRZ": constant(0)}
        known |= dict.fromkeys(("SR_TID.Y", "SR_TID.Z"), constant(0))
        if x.base != "S2UR" and source in known:
            yield from dict.fromkeys(x.written, known[source]).items()
        elif source.startswith(("SR_CTAID", "SR_NTID", "SR_NCTAID", "SR_Cga", "SR_SWINHI")):
            yield from dict.fromkeys(x.written, UNIFORM).items()

    def _subroutine(self, start: int) -> list[str]:
        """What the code that begins there may write until it returns; nothing if it never does."""
        if start not in self.subroutines:
            written: dict[str, None] = {}
            seen, waiting, returns = set(), [start], False
            while waiting:
                at = waiting.pop()
                x = self.parsed.get(at)
                if x is None or at in seen:
                    continue
                seen.add(at)
                written |= dict.fromkeys(x.written)
                returns |= x.base == "RET"
                if x.instruction.target is not None:
                    waiting.append(x.instruction.target)
                if not x.instruction.leaves and at in self.following:
                    waiting.append(self.following[at])
            self.subroutines[start] = list(written) if returns else []
        return self.subroutines[start]
