"""Runs a command with its output in a log, and shows its progress; standard library only.

    python3 .ci/progress.py LOG OBJECT COMMAND …     builds OBJECT, with ninja somewhere inside

On a terminal the line is rewritten in place; elsewhere one is printed after 30 s, 90 s, 270 s, ….
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

FIRST_LINE = 30  # s, without a terminal; the next comes after three times as long
SHOWN = 5  # lines of a log, where a command failed


def _columns() -> int:
    return shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else 0


def say(message: str) -> None:
    """A line that stays; on a terminal it takes the place of the one that moves."""
    columns = _columns()
    print(f"\r{message:<{columns}}" if columns else message, file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path],
    log: Path,
    line: Callable[[str, int], str],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Adds to the log; returns the exit code. `line` makes one of its text and the seconds."""
    start, due = time.monotonic(), FIRST_LINE
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        while process.poll() is None:
            columns, seconds = _columns(), int(time.monotonic() - start)
            text = "" if not columns and seconds < due else line(_text(log), seconds)
            if columns:
                print(f"\r{text[:columns]:<{columns}}", end="", file=sys.stderr, flush=True)
            elif text:
                print(text[:100], file=sys.stderr, flush=True)
                due *= 3
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # on a terminal it was interrupted as well
        process.terminate()
        process.wait()
        say("interrupted")
        sys.exit(130)
    return process.returncode


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def last_lines(log: Path, having: str = "") -> str:
    """A few lines of a log, indented: those that match if any does, else the last."""
    lines = [line[:200] for line in _text(log).splitlines() if line.strip()]
    found = [line for line in lines if re.search(having, line)][:SHOWN] if having else []
    return "\n".join(f"  {line}" for line in found or lines[-SHOWN:])


def fail(message: str, code: int = 1) -> NoReturn:
    say(message)
    sys.exit(code)


def main() -> None:
    log, built = Path(sys.argv[1]), sys.argv[2]
    start = time.monotonic()

    def line(text: str, seconds: int) -> str:
        steps = re.findall(r"^\[(\d+)/(\d+)\]", text, re.MULTILINE)
        done, of = steps[-1] if steps else (0, "…")
        return f"building {built}: {done} of {of} files, {seconds} s"

    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if run(sys.argv[3:], log, line) != 0:
        fail(f"building {built} failed; from {log}:\n{last_lines(log, r'error:|No space left')}")
    say(f"built {built} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
