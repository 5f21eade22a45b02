"""Makes or completes the virtual environment of the Makefile and .ci/run; standard library only.

    python3 .ci/environment.py VENV RECORD   writes torch's version to RECORD if it is another one
    python3 .ci/environment.py --key         one word for this Python, its torch, the requirements

A torch >= 2.11 that this Python already imports is used as it is: the environment only looks into
its packages, and what is installed beside it has to fit it. The package itself is never installed,
so that several clones can share one environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
MARK = "swin_kernels-environment.json"  # in VENV: what we made it with and what it lacks
OLDEST_TORCH = (2, 11)
PRINT_TORCH_VERSION = """
import importlib.metadata
try:
    print(importlib.metadata.version("torch"))
except importlib.metadata.PackageNotFoundError:
    print()
"""


def say(message: str) -> None:
    print(f"environment: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"environment: {message}")


def succeeds(*command: str | Path, quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, check=False, stdout=output, stderr=output).returncode == 0


def requirements() -> list[str]:
    """What building, the demo, the tests and the checks need, from pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads(PROJECT.read_text())
    extras = project["project"]["optional-dependencies"].values()
    groups = [project["build-system"]["requires"], project["project"]["dependencies"], *extras]
    return sorted({requirement for group in groups for requirement in group})


def new_enough(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH


def directories_of_torch() -> list[str]:
    """Where this Python finds its packages if a torch that will do is among them, else nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torch")
        if not new_enough(version):
            say(f"torch {version} of {sys.executable} is too old, another is taken")
            return []
    home = str(Path(spec.origin).parent.parent)
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([home, *packages]))


def maker() -> list[str]:
    """What an environment that we make depends on besides the requirements."""
    return [sys.version.split()[0], sys.base_prefix, *directories_of_torch()]


def digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def create(venv: Path) -> None:
    """An empty environment that sees this Python's torch, if there is one."""
    say(f"making {venv} with {sys.executable}")
    if not succeeds(sys.executable, "-m", "venv", venv):
        fail(f"`{sys.executable} -m venv` failed; on Debian and Ubuntu it needs python3-venv")
    if found := directories_of_torch():
        packages = venv / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
        (packages / "swin_kernels-torch.pth").write_text("\n".join(found) + "\n")
        # the setuptools of an older Python's venv would hide the one beside torch
        succeeds(venv / "bin" / "python", "-m", "pip", "uninstall", "-qy", "setuptools", quiet=True)
        say(f"using the torch in {found[0]}")
    (venv / MARK).write_text(json.dumps({"maker": maker()}))


def torch_version(python: Path) -> str:
    return subprocess.check_output([python, "-c", PRINT_TORCH_VERSION], text=True).strip()


def install(python: Path, wanted: list[str], torch: str, constraints: Path) -> list[str]:
    """Installs what is missing beside `torch`, which stays; returns what could not be had."""
    if not succeeds(python, "-m", "pip", "--version", quiet=True):
        succeeds(python, "-m", "ensurepip", quiet=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    if torch:
        constraints.write_text(f"torch=={torch}\n")
        pip += ["--constraint", str(constraints)]
    say(f"installing {', '.join(wanted)}" + ("" if torch else " (torch: some gigabytes)"))
    if torch or "CI" in os.environ:
        pip.append("--quiet")
    if succeeds(*pip, *wanted):
        return []
    # one package that cannot be had, or does not fit this torch, must not keep the others away
    say("not all at once, so one by one")
    pip += ["--retries", "0"]
    return [
        x
        for x in wanted
        if not succeeds(*pip, x, quiet=True) and not succeeds(*pip, "--no-deps", x, quiet=True)
    ]


def warn_of(missing: list[str], mark: Path) -> None:
    if missing:
        say(f"going on without {', '.join(missing)}; remove {mark} to try again")


def ensure(venv: Path) -> str:
    """Brings `venv` up to date if it is not; returns the version of its torch."""
    mark, python = venv / MARK, venv / "bin" / "python"
    if not python.exists():
        create(venv)
    facts = json.loads(mark.read_text()) if mark.exists() else {}
    inside = Path(sys.prefix).resolve() == venv.resolve()
    if not inside and facts.get("maker", maker()) != maker():
        fail(
            f"{venv} was made for {facts['maker']}, and {sys.executable} is {maker()}: "
            "remove it, or name another with VENV=…"
        )
    wanted, torch = requirements(), torch_version(python)
    if facts.get("made_for") == digest(wanted, torch):
        warn_of(facts["missing"], mark)
        return torch
    if torch and not new_enough(torch):
        fail(f"torch >= 2.11 is needed, {venv} has {torch}: name another environment with VENV=…")
    missing = install(python, wanted, torch, venv / "swin_kernels-constraints.txt")
    torch = torch_version(python)
    if not torch or any(requirement.startswith("setuptools") for requirement in missing):
        fail(f"cannot go on without {', '.join(missing)}")
    warn_of(missing, mark)
    made = {"made_for": digest(wanted, torch), "missing": missing}
    mark.write_text(json.dumps({**facts, **made}))
    return torch


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036, the Python that runs this may be any
        fail(f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
    if sys.argv[1:] == ["--key"]:
        print(digest(requirements(), maker()))
        return
    if len(sys.argv) != 3:
        fail("expected VENV RECORD, or --key")
    venv, record = Path(sys.argv[1]), Path(sys.argv[2])
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        fail(f"{venv} is there, but is no virtual environment: name another with VENV=…")
    venv.mkdir(parents=True, exist_ok=True)
    with open(venv / "swin_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two clones may share the environment
        torch = ensure(venv)
    # make builds again what is older than this file
    content = f"torch {torch}\n"
    if not record.exists() or record.read_text() != content:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(content)


if __name__ == "__main__":
    main()
