"""Programs for a Python of their own, which imports the package from this tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_program(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -c program` in the root of the tree, with these variables set."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def last_line_of(program: str, **environment: str) -> str:
    """The last line that the program prints; it must not fail."""
    done = run_program(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
