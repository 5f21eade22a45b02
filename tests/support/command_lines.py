"""Command lines in tests: run in a process of their own, or refused by a `main`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def run(
    *command: object,
    code: int | None = 0,
    cwd: Path = ROOT,
    timeout: float | None = 600,
    **variables: str | None,
) -> subprocess.CompletedProcess[str]:
    """A command that ended with this exit code, or any; without the variables that are None."""
    environment = {k: v for k, v in (os.environ | variables).items() if v is not None}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert code in (None, done.returncode), done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, **options)


def last_line_of(program: str, **variables: str) -> str:
    """The last line that a program in Python prints."""
    return run_python("-c", program, **variables).stdout.splitlines()[-1]


def committed(folder: Path) -> None:
    """Makes a repository of a folder, with all that is there in its one commit."""
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "-m", "first")):
        run("git", *who, *command, cwd=folder)


def output_of(
    capsys: pytest.CaptureFixture, function: Callable, *arguments: object, code: int = 0
) -> str:
    """What a function that returns this exit code prints."""
    assert function(*arguments) == code
    return capsys.readouterr().out


def refusal(
    main: Callable, arguments: Sequence[object], capsys: pytest.CaptureFixture, code: int = 2
) -> str:
    """What a `main` that exits with this code says on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == code
    return capsys.readouterr().err
