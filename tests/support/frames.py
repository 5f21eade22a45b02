"""How deep a call goes before its kernel, in Python frames of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import swin_kernels

_PACKAGE = str(Path(swin_kernels.__file__).parent)


def frames_open_at(kernel: str, function: Callable[[], object]) -> list[str]:
    """The package's functions that are open where `function` first calls one named `kernel`."""
    open_now: list[str] = []
    found: list[str] = []

    def watch(frame, event, argument):
        code = frame.f_code
        named = argument.__name__ if event == "c_call" else code.co_name
        if named == kernel and event in ("call", "c_call") and not found:
            found.extend(open_now)
        if code.co_filename.startswith(_PACKAGE):
            if event == "call":
                open_now.append(code.co_name)
            elif event == "return":
                open_now.pop()

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    assert found, f"{kernel} was not called"
    return found
