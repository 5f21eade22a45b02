"""Listings of machine code, written by hand."""

from __future__ import annotations

from benchmarks.codegen import sass

HEAD = "\tcode for sm_90\n\t\tFunction : kernel\n"


def parse(*lines: str) -> list[sass.Instruction]:
    """Instructions as cuobjdump prints them, 16 bytes each, with their encodings between."""
    rows = (
        f"        /*{16 * i:04x}*/                   {line} ;   /* 0x000000ff00017b82 */\n"
        f"                                              /* 0x000fe20000000a00 */\n"
        for i, line in enumerate(lines)
    )
    return sass.parse(HEAD + "".join(rows))
