"""Reads NVIDIA's machine code, as cuobjdump prints it: its loops, and the ways through one trip.

A loop is natural (Aho, Lam, Sethi & Ullman, "Compilers", 9.6.6): what reaches a jump back without
leaving by the place it jumps to. So a copy of the last trip that the compiler peels off is not in
it, and a trip has a shortest and a longest way, where the code branches.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)\)?$")
_JUMPS = ("BRA", "JMP", "UBRA")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate that it is executed under, or ""
    name: str  # with its suffixes
    operands: str

    @property
    def base(self) -> str:
        """Its name without suffixes."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where it may jump to."""
        found = _TARGET.search(self.operands) if self.base in _JUMPS else None
        return int(found[1], 16) if found else None

    @property
    def leaves(self) -> bool:
        """Whether what follows it is never reached from it."""
        # BRA.U !UP0, 0x…: some jumps have their condition among the operands
        conditional = bool(self.guard) or bool(re.match(r"!?U?P\d", self.operands))
        return (self.base in _JUMPS or self.base in _ENDS) and not conditional


@dataclass(frozen=True)
class Trip:
    """One way through a loop's body."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return sum(x.base != "NOP" for x in self.instructions)

    @property
    def histogram(self) -> tuple[tuple[str, int], ...]:
        """How often each name occurs, the most frequent first."""
        names = (x.name for x in self.instructions if x.base != "NOP")
        return tuple(Counter(names).most_common())


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel's listing."""
    return [
        Instruction(int(address, 16), guard or "", name, operands)
        for address, guard, name, operands in _LINE.findall(text)
    ]


class Graph:
    """Basic blocks, by the address of their first instruction, and the ways between them."""

    def __init__(self, code: list[Instruction]) -> None:
        following = {a.address: b.address for a, b in itertools.pairwise(code)}
        starts = {code[0].address}
        for x in code:
            if x.target is not None:
                starts.add(x.target)
            if (x.target is not None or x.leaves) and x.address in following:
                starts.add(following[x.address])
        self.entry = code[0].address
        self.blocks: dict[int, list[Instruction]] = {}
        for x in code:
            if x.address in starts:
                block = self.blocks.setdefault(x.address, [])
            block.append(x)
        self.next: dict[int, list[int]] = {}
        for start, block in self.blocks.items():
            last = block[-1]
            ways = [] if last.target is None else [last.target]
            if not last.leaves and last.address in following:
                ways.append(following[last.address])
            self.next[start] = [w for w in dict.fromkeys(ways) if w in self.blocks]
        self.dominators = self._dominators()

    def _dominators(self) -> dict[int, set[int]]:
        """The blocks that every way from the entry to a block goes through, itself among them."""
        order = self._reachable()
        before: dict[int, list[int]] = {b: [] for b in order}
        for block in order:
            for way in self.next[block]:
                before[way].append(block)
        found = {b: set(order) for b in order}
        found[self.entry] = {self.entry}
        changed = True
        while changed:
            changed = False
            for block in order:
                if block == self.entry:
                    continue
                through = set.intersection(*(found[b] for b in before[block])) | {block}
                changed |= through != found[block]
                found[block] = through
        return found

    def _reachable(self) -> list[int]:
        """Blocks in reverse postorder."""
        seen, postorder = {self.entry}, []
        stack = [(self.entry, iter(self.next[self.entry]))]
        while stack:
            block, ways = stack[-1]
            way = next((w for w in ways if w not in seen), None)
            if way is None:
                postorder.append(block)
                stack.pop()
            else:
                seen.add(way)
                stack.append((way, iter(self.next[way])))
        return postorder[::-1]

    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by the block that begins a trip."""
        before: dict[int, list[int]] = {}
        for block in self.dominators:
            for way in self.next[block]:
                before.setdefault(way, []).append(block)
        found: dict[int, set[int]] = {}
        for block, above in self.dominators.items():
            for head in above.intersection(self.next[block]):
                body, stack = found.setdefault(head, {head}), [block]
                while stack:
                    inner = stack.pop()
                    if inner not in body:
                        body.add(inner)
                        stack += before.get(inner, [])
        return found

    def trips(self, head: int, body: set[int]) -> tuple[Trip, Trip]:
        """The shortest and the longest way from `head` back to it; of loops inside, one trip."""
        ends = [b for b in body if head in self.next[b]]
        best: dict[int, tuple[Trip, Trip]] = {}
        for block in self._reachable():  # all but jumps back lead on
            if block not in body:
                continue
            own = tuple(self.blocks[block])
            ways = [
                best[b] for b in best if block in self.next[b] and block not in self.dominators[b]
            ]
            if block == head or not ways:
                best[block] = Trip(own), Trip(own)
                continue
            shortest = min((w[0] for w in ways), key=len)
            longest = max((w[1] for w in ways), key=len)
            best[block] = (
                Trip((*shortest.instructions, *own)),
                Trip((*longest.instructions, *own)),
            )
        return (
            min((best[b][0] for b in ends), key=len),
            max((best[b][1] for b in ends), key=len),
        )


def main_loop(code: Iterable[Instruction]) -> tuple[Trip, Trip] | None:
    """The shortest and longest trip of the loop that costs most; None without a loop."""
    graph = Graph(list(code))
    found = [graph.trips(head, body) for head, body in graph.loops().items()]
    return max(found, key=lambda trips: len(trips[1]), default=None)
