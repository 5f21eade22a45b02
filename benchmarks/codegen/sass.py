"""Reads NVIDIA's machine code, as cuobjdump prints it: its loops, and the ways through one trip.

A loop is natural (Aho, Lam, Sethi & Ullman, "Compilers", 9.6.6): what reaches a jump back without
leaving by the place it jumps to. So a copy of the last trip that the compiler peels off is not in
it, and a trip has a shortest and a longest way, where the code branches.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import networkx

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)\)?$")
_JUMPS = ("BRA", "JMP", "UBRA")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL")


class Kind(NamedTuple):
    """What instructions that cost the same have in common."""

    name: str  # with its suffixes
    clocks: float = 0.0  # of the path to a multiprocessor's memory, a warp


Histogram = tuple[tuple[Kind, int], ...]  # how often each kind occurs


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

    def kind(self, clocks: Mapping[int, float]) -> Kind:
        """What it has in common with others, with the `clocks` of its address."""
        return Kind(self.name, clocks[self.address])

    @property
    def target(self) -> int | None:
        """Where it may jump to."""
        # @P0 CALL 0x…: a far way out of a loop; plain calls are of subroutines, which return
        jumps = self.base in _JUMPS or (self.base == "CALL" and self.guard)
        found = _TARGET.search(self.operands) if jumps else None
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

    def histogram(self, clocks: Mapping[int, float]) -> Histogram:
        """How often each kind occurs, the most frequent first; `clocks` of each address."""
        kinds = (x.kind(clocks) for x in self.instructions if x.base != "NOP")
        return tuple(Counter(kinds).most_common())


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
        self.blocks: dict[int, list[Instruction]] = {}
        for x in code:
            if x.address in starts:
                block = self.blocks.setdefault(x.address, [])
            block.append(x)
        ways = networkx.DiGraph()
        ways.add_nodes_from(self.blocks)
        for start, block in self.blocks.items():
            last = block[-1]
            if last.target in self.blocks:
                ways.add_edge(start, last.target)
            if not last.leaves and last.address in following:
                ways.add_edge(start, following[last.address])
        entry = code[0].address
        self.order = list(networkx.dfs_postorder_nodes(ways, entry))[::-1]  # of what is reached
        self.ways = ways.subgraph(self.order)

    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by the block that begins a trip."""
        found: dict[int, set[int]] = {}
        entry = self.order[0]
        for block, head in self.ways.edges:
            others = self.ways.subgraph(self.ways.nodes - {head})
            # a jump back: every way from the entry to `block` goes through `head`
            if head in (entry, block) or not networkx.has_path(others, entry, block):
                inside = {block} | networkx.ancestors(others, block) if block != head else set()
                found.setdefault(head, {head}).update(inside)
        return found

    def without(self, blocks: set[int]) -> Graph:
        """The graph of what is reached when these blocks are never entered."""
        left = copy.copy(self)
        ways = self.ways.subgraph(self.ways.nodes - blocks)
        left.order = list(networkx.dfs_postorder_nodes(ways, self.order[0]))[::-1]
        left.ways = ways.subgraph(left.order)
        return left

    def trip(self, head: int, body: set[int], choose: Callable[..., Trip]) -> Trip:
        """The shortest or longest way from `head` back to it; of loops inside, one trip."""
        best: dict[int, Trip] = {}
        for block in (b for b in self.order if b in body):  # all but jumps back lead on
            ways = [best[b] for b in best if self.ways.has_edge(b, block)]
            before = choose(ways, key=len) if ways and block != head else Trip(())
            best[block] = Trip((*before.instructions, *self.blocks[block]))
        return choose((best[b] for b in body if self.ways.has_edge(b, head)), key=len)


def main_loop(code: Iterable[Instruction]) -> tuple[Trip, Trip] | None:
    """The shortest and longest trip of the loop that costs most; None without a loop."""
    graph = Graph(list(code))
    loops = graph.loops().items()
    found = [(graph.trip(*loop, min), graph.trip(*loop, max)) for loop in loops]
    return max(found, key=lambda trips: len(trips[1]), default=None)
