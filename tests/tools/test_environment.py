""".ci/environment.py and .ci/progress.py: command lines, what they refuse, what they say of pip."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from command_lines import ROOT, run, run_python

SCRIPTS = ROOT / ".ci"

NO_NETWORK = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<object>: \
Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch>=2.11 (from versions: none)
ERROR: No matching distribution found for torch>=2.11
"""
NO_CERTIFICATE = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'SSLError(1, \
'[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate'))': /simple/x/
ERROR: Could not find a version that satisfies the requirement torch>=2.11 (from versions: none)
"""
CUT = """\
    raise ReadTimeoutError(self._pool, None, "Read timed out.") from e
pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(port=443): Read timed out.
"""
NO_VERSION = """\
ERROR: Could not find a version that satisfies the requirement torch==2.99.* (from versions: \
2.10.0, 2.11.0, 2.12.0, 2.12.1, 2.13.0, 2.14.0)
ERROR: No matching distribution found for torch==2.99.*
"""
CONFLICT = """\
ERROR: Cannot install torch==2.15.* because these package versions have conflicting dependencies.

The conflict is caused by:
    The user requested torch==2.15.*
    The user requested (constraint) torch<=2.14.1

To fix this you could try to:
1. loosen the range of package versions you've specified
"""
NO_SPACE = """\
Installing collected packages: numpy, torch
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device
"""
NO_BUILD = """\
  error: subprocess-exited-with-error
  × Getting requirements to build wheel did not run successfully.
ERROR: Failed to build 'thing' when getting requirements to build wheel
"""


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "environment", raising=False)
    import environment

    yield environment
    monkeypatch.delitem(sys.modules, "environment")


def _run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return run_python(SCRIPTS / "environment.py", *arguments, **options)


def _refusal(*arguments: str | Path, code: int = 1, cwd: Path = ROOT) -> str:
    """The one line that is all it says."""
    (line,) = _run(*arguments, code=code, cwd=cwd).stderr.splitlines()
    return line


def _with_torch(folder: Path, version: str) -> Path:
    """An environment without pip that holds nothing but the name of a torch."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / f"torch-{version}.dist-info").mkdir()
    (packages / f"torch-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected either VENV RECORD or --key"),
        ("somewhere", "expected either VENV RECORD or --key"),
        ("somewhere record --key", "expected either VENV RECORD or --key"),
        ("somewhere record more", "unrecognized arguments: more"),
        ("--wat", "unrecognized arguments: --wat"),
        ("somewhere record --torch", "--torch: expected one argument"),
        ("somewhere record --torch new", "expected a version as 2.14 or 2.14.1, got 'new'"),
        ("somewhere record --torch 2", "expected a version as 2.14 or 2.14.1, got '2'"),
        ("somewhere record --torch ==2.14", "expected a version as 2.14 or 2.14.1, got '==2.14'"),
        ("somewhere record --torch 2.10.1", "expected 2.11 or newer, got '2.10.1'"),
        ("--key --torch 1.13", "expected 2.11 or newer, got '1.13'"),
    ],
)
def test_bad_command_lines_get_one_line_and_exit_code_2(arguments, message, tmp_path):
    assert message in _refusal(*arguments.split(), code=2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_key_is_of_the_torch_that_is_asked_for():
    asked = ((), (), ("--torch", "2.14"), ("--torch", "2.15"))
    keys = [_run("--key", *torch).stdout for torch in asked]
    assert keys[0] == keys[1]  # in another process
    assert len(set(keys)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{16}\n", key) for key in keys)


def test_every_extra_but_that_of_the_rivals_is_taken(environment, monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    monkeypatch.setattr(environment, "PROJECT", project)
    project.write_text(
        '[build-system]\nrequires = ["ninja"]\n[project]\ndependencies = ["torch>=2.11"]\n'
        '[project.optional-dependencies]\ndemo = ["rich"]\ndocs = ["sphinx"]\npeers = ["onnx"]\n'
    )
    assert environment.requirements() == ["ninja", "rich", "sphinx", "torch>=2.11"]


@pytest.mark.parametrize(
    ("asked", "version", "expected"),
    [
        ("2.14", "2.14.1+cpu", True),
        ("2.14", "2.14.0", True),
        ("2.14.1", "2.14.1+cu130", True),
        ("2.14.1", "2.14.10", False),
        ("2.1", "2.14.1", False),
        ("2.14", "2.15.0", False),
        ("2.11", "2.11.0a0+vendor", True),
    ],
)
def test_torch_of_a_version_is_known(environment, asked, version, expected):
    assert environment.matches(asked, version) is expected


@pytest.mark.parametrize(
    ("version", "asked", "message"),
    [
        ("2.14.1+cpu", ["--torch", "2.11"], "torch 2.14.1+cpu, and torch 2.11 was asked for: name"),
        ("2.10.0", [], "torch >= 2.11 is needed"),
    ],
)
def test_environment_of_another_torch_is_refused(version, asked, message, tmp_path):
    said = _refusal(_with_torch(tmp_path / "venv", version), tmp_path / "record", *asked)
    assert message in said
    assert "VENV=" in said
    assert not (tmp_path / "record").exists()


def test_environment_that_is_up_to_date_is_silent_and_its_record_stays(environment, tmp_path):
    folder, record = _with_torch(tmp_path / "venv", "2.14.1"), tmp_path / "build" / "environment"
    made_for = environment.digest(environment.requirements(), "2.14.1")
    (folder / environment.MARK).write_text(f'{{"made_for": "{made_for}", "missing": []}}')
    for torch in ((), ("--torch", "2.14"), ("--torch", "2.14.1")):
        done = _run(folder, record, *torch)
        assert done.stdout + done.stderr == ""
        assert record.read_text() == "torch 2.14.1\n"
        os.utime(record, (1, 1))
    assert record.stat().st_mtime == 1


def test_environment_whose_python_does_not_run_is_refused(tmp_path):
    folder = _with_torch(tmp_path / "venv", "2.14.1")
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin" / "python").chmod(0o755)
    assert "does not run: remove its environment" in _refusal(folder, tmp_path / "record")


def test_place_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in _refusal(tmp_path / "file" / "venv", tmp_path / "record")


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    assert "is no virtual environment" in _refusal(tmp_path, tmp_path / "record")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("output", "kind", "messages"),
    [
        (NO_NETWORK, "network", ["(Name or service not known)", "PIP_INDEX_URL"]),
        (NO_CERTIFICATE, "network", ["cannot be reached (certificate verify failed)"]),
        (CUT, "network", ["cannot be reached (timed out)"]),
        (NO_VERSION, "version", ["no torch==2.99.* for Python 3.", "2.13.0, 2.14.0"]),
        (CONFLICT, "conflict", ["satisfies torch==2.15.* and (constraint) torch<=2.14.1: loosen"]),
        (NO_SPACE, "space", ["no space left on the disk of", "VENV="]),
        (NO_BUILD, "other", ["pip failed: Failed to build 'thing'"]),
        ("", "other", ["pip failed: "]),
    ],
)
def test_failures_of_pip_are_told_in_a_line(environment, tmp_path, output, kind, messages):
    failure = environment.diagnose("Collecting torch\n" * 30 + output, tmp_path)
    assert failure.kind == kind
    assert all(message in failure.message for message in messages)
    assert "\n" not in failure.message


def test_a_connection_that_came_back_is_no_failure_of_the_network(environment, tmp_path):
    output = NO_NETWORK.splitlines()[0] + "\nCollecting x" * 30 + "\n" + NO_VERSION
    assert environment.diagnose(output, tmp_path).kind == "version"


def _build(log: Path, script: str) -> list[object]:
    build = [sys.executable, "-c", script]
    return [sys.executable, SCRIPTS / "progress.py", log, "thing.so", *build]


def test_build_is_one_line_and_its_output_is_in_the_log(tmp_path):
    log = tmp_path / "build" / "log"
    done = run(*_build(log, "print('[1/2] c++ a.cpp')"))
    assert re.fullmatch(r"built thing\.so in \d+ s\n", done.stderr)
    assert log.read_text() == "[1/2] c++ a.cpp\n"


def test_build_that_fails_shows_its_errors_and_names_the_log(tmp_path):
    script = "print('a.cpp:1: error: no'); [print('Traceback') for _ in range(99)]; exit(3)"
    told = run(*_build(tmp_path / "log", script), code=1).stderr
    assert told == f"building thing.so failed; from {tmp_path}/log:\n  a.cpp:1: error: no\n"


def test_build_on_a_terminal_rewrites_one_line(tmp_path):
    script = "import time; print('[1/2] a', flush=True); time.sleep(1.2)"
    command = _build(tmp_path / "log", script)
    parent, child = pty.openpty()
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child) as process:
        os.close(child)
        shown = b""
        # OSError: Linux's end of a terminal
        with open(parent, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            while read := terminal.read(4096):
                shown += read
    assert process.returncode == 0
    assert shown.count(b"\n") == 1
    assert b"\rbuilding thing.so: 1 of 2 files, 0 s" in shown
    assert re.search(rb"\rbuilt thing\.so in \d+ s +\r\n$", shown)
