"""Whether a kernel of several warp groups may write what another group's HGMMA still reads.

HGMMA reads its operands from shared memory while other instructions run, and the wait for it is
one of a warp group: in a program of eight warps the other four may not be done. What stores to an
operand's buffer afterwards has to come behind a barrier of all warps, which some versions of Triton
leave out (triton-lang/triton, issue 11047). Here the machine code is searched for a way from a wait
to a store without a barrier, and the store's place is compared with the buffers of operands, as
Triton lays them out. Which product a wait is for is not known: a store to the operand of one that
was waited for before an earlier barrier is reported too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from typing import Any

from triton._C.libtriton import ir, nvidia

from benchmarks.codegen import aot, sass

WARPS_OF_A_GROUP = 4
_STORES = ("STS", "STSM", "LDGSTS", "ATOMS", "UBLKCP", "UTMALDG")
_PLACE = re.compile(r"\[[^\]]*?(?:\+(0x[0-9a-f]+))?\]")
_DEFINED = re.compile(r"^\s*(%\w+)(?::\d+)? = ([\w.]+)(.*)", re.M)
_CARRIED = re.compile(r"(%arg\d+) = (%[\w#]+)")  # of a loop: its argument, and what it begins as
_VIEWS = ("ttg.memdesc", "ttng.warp_group_dot_wait")  # which gives back the buffers it waits for
_NAME = re.compile(r"%\w+(?:#\d+)?")
_OFFSET = re.compile(r"allocation\.offset = (\d+)")


def unguarded_stores(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """Stores to shared memory that some way from a wait for HGMMA reaches before a barrier."""
    places = {x.address: i for i, x in enumerate(code)}
    waits = [i for i, x in enumerate(code) if x.name.startswith("WARPGROUP.DEPBAR")]
    found, seen, stack = set(), set(), [i + 1 for i in waits]
    while stack:
        at = stack.pop()
        while at < len(code) and at not in seen:
            seen.add(at)
            x = code[at]
            if x.base == "BAR":
                break
            if x.base in _STORES:
                found.add(at)
            if x.target in places:
                stack.append(places[x.target])
            if x.leaves:
                break
            at += 1
    return [code[i] for i in sorted(found)]


def _allocated(compiled: Any) -> str:
    """The kernel's intermediate code, with the places of its buffers in shared memory."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(compiled.asm["ttgir"])
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    passes = ir.pass_manager(context)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(passes, 90, 80)
    passes.run(module, "allocation")
    return str(module)


def _sources(
    name: str, defined: dict[str, tuple[str, str]], carried: dict[str, str]
) -> Iterator[str]:
    """The allocations that a buffer is a view of."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        base, _, index = name.partition("#")
        if base in carried:
            name = carried[base]
            continue
        if base not in defined:
            return
        operation, rest = defined[base]
        if operation == "ttg.local_alloc":
            yield base
            return
        operands = _NAME.findall(rest.split("{")[0].split(" : ")[0])
        if not operands or not operation.startswith(_VIEWS):  # in registers
            return
        name = operands[int(index)] if index and int(index) < len(operands) else operands[0]


def buffers(compiled: Any) -> dict[int, bool]:
    """Where each buffer of shared memory begins, and whether HGMMA reads an operand from there."""
    text = _allocated(compiled)
    defined = {name: (operation, rest) for name, operation, rest in _DEFINED.findall(text)}
    carried = dict(_CARRIED.findall(text))
    read: set[str] = set()
    for operation, rest in defined.values():
        if operation == "ttng.warp_group_dot":
            for operand in _NAME.findall(rest)[:2]:
                read.update(_sources(operand, defined, carried))
    found = {int(x): False for x in _OFFSET.findall(text)}
    for name in read:
        found[int(_OFFSET.search(defined[name][1])[1])] = True  # type: ignore[index]
    return found


def hazards(compiled: Any) -> list[str]:
    """Stores that may overwrite what HGMMA reads, as the machine code has them; none is well.

    A store belongs to the last buffer that begins at or before the constant of its address.
    """
    if compiled.metadata.num_warps <= WARPS_OF_A_GROUP:
        return []
    stores = unguarded_stores(sass.parse(aot.listing_of(compiled)))
    if not stores:
        return []
    begins = buffers(compiled)
    found = []
    for store in stores:
        place = _PLACE.search(store.operands)
        constant = int(place[1], 16) if place is not None and place[1] else 0
        before = [start for start in begins if start <= constant]
        if not before or begins[max(before)]:
            found.append(f"{store.address:#x}: {store.name} {store.operands}")
    return found
