"""Makes or completes the virtual environment of the Makefile and .ci/run; standard library only.

    python3 .ci/environment.py VENV RECORD   writes torch's version to RECORD if it is another one
    python3 .ci/environment.py --key         one word for this Python, its torch, the requirements

A torch >= 2.11 that this Python already imports is used as it is: the environment only looks into
its packages, and what is installed beside it has to fit it. With --torch 2.14, or 2.14.1, that one
is installed instead. The package itself is never installed, so that several clones can share one
environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import progress

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
MARK = "swin_kernels-environment.json"  # in VENV: what we made it with and what it lacks
LOG = "swin_kernels-pip.log"  # in VENV
STEPS = ("Collecting", "Downloading", "Processing", "Building", "Installing", "WARNING: Retrying")
OLDEST_TORCH = (2, 11)
LEFT_OUT = {"peers"}  # extras: only the benchmark beside other libraries needs them
SPACE = 12  # GB while it is made: packages, and the files that they come in
BAD_INPUT = 2
NO_CONNECTION = (
    "connection broken by|Max retries exceeded|timed out|IncompleteRead|Connection \\w+ed"
)
PRINT_TORCH_VERSION = """
import importlib.metadata
try:
    print(importlib.metadata.version("torch"))
except importlib.metadata.PackageNotFoundError:
    print()
"""


def say(message: str) -> None:
    progress.say(f"environment: {message}")


def fail(message: str, code: int = 1) -> NoReturn:
    progress.fail(f"environment: {message}", code)


def quietly(*command: str | Path) -> subprocess.CompletedProcess[str]:
    pipe = subprocess.PIPE
    return subprocess.run(command, check=False, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def requirements() -> list[str]:
    """What building, the demo, the tests, the checks and the pages need, from pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads(PROJECT.read_text())
    extras = project["project"]["optional-dependencies"]
    groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
    groups += [extras[name] for name in extras if name not in LEFT_OUT]
    return sorted({requirement for group in groups for requirement in group})


def is_torch(requirement: str) -> bool:
    return re.split(r"[^\w-]", requirement)[0] == "torch"


def new_enough(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH


def matches(asked: str, version: str) -> bool:
    """Whether torch `version`, such as 2.14.1+cpu, is the 2.14 or 2.14.1 that was asked for."""
    return re.match(rf"{re.escape(asked)}(?!\d)", version) is not None


def directories_of_torch() -> list[str]:
    """Where this Python finds its packages if a torch that will do is among them, else nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if not new_enough(importlib.metadata.version("torch")):
            return []
    home = str(Path(spec.origin).parent.parent)
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([home, *packages]))


def maker(own_torch: bool) -> list[str]:
    """What an environment depends on besides the requirements: this Python, perhaps its torch."""
    return [sys.version.split()[0], sys.base_prefix, *([] if own_torch else directories_of_torch())]


def in_words(maker: list[str]) -> str:
    version, prefix, *torch = maker
    return f"Python {version} in {prefix}" + (f" and the torch in {torch[0]}" if torch else "")


def digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def create(venv: Path, own_torch: bool) -> None:
    """An empty environment; unless it gets a torch of its own, it sees this Python's, if any."""
    say(f"making {venv} with {sys.executable}")
    done = quietly(sys.executable, "-m", "venv", venv)
    if done.returncode != 0:
        if shutil.disk_usage(venv).free < 1e8:
            fail(no_space(venv))
        said = done.stdout.strip().partition("\n")[0]
        fail(
            f"`{sys.executable} -m venv {venv}` failed, and said: {said} On Debian and Ubuntu it "
            "needs python3-venv"
        )
    facts = {"maker": maker(own_torch), "own_torch": own_torch}
    if found := facts["maker"][2:]:
        packages = venv / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
        (packages / "swin_kernels-torch.pth").write_text("\n".join(found) + "\n")
        # the setuptools of an older Python's venv would hide the one beside torch
        quietly(venv / "bin" / "python", "-m", "pip", "uninstall", "-qy", "setuptools")
        say(f"using the torch in {found[0]}")
    elif not own_torch and importlib.util.find_spec("torch"):
        say(f"the torch of {sys.executable} is older than 2.11, so another is installed")
    (venv / MARK).write_text(json.dumps(facts))


def torch_version(python: Path) -> str:
    command = [python, "-c", PRINT_TORCH_VERSION]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        fail(f"{python} does not run: remove its environment, or name another with VENV=…")
    return done.stdout.strip()


def no_space(venv: Path) -> str:
    return (
        f"no space left on the disk of {venv}, which needs up to {SPACE} GB: free some, or name "
        "another place with VENV=…"
    )


class Failure(NamedTuple):
    """Of a call of pip."""

    kind: str  # space, network, version, conflict or other
    message: str  # a line


def diagnose(output: str, venv: Path) -> Failure:
    """The cause of a failure, from pip's output."""
    end = "\n".join(output.splitlines()[-25:])
    if re.search(r"No space left|Disk quota exceeded", end):
        return Failure("space", no_space(venv))
    if re.search(NO_CONNECTION, end):
        cause = re.search(r"\[Errno -?\d+\] [\w ,]+|timed out|certificate verify failed", end)
        detail = f" ({cause[0].rpartition('] ')[2]})" if cause else ""
        return Failure(
            "network",
            f"the package index cannot be reached{detail}: connect to the network, or name a "
            "mirror with PIP_INDEX_URL",
        )
    if no := re.search(r"satisfies the requirement (\S+).*\(from versions: (.*)\)", end):
        return Failure(
            "version",
            f"there is no {no[1]} for Python {'.'.join(map(str, sys.version_info[:2]))} on this "
            f"platform: expected one that the index has: {', '.join(no[2].split(', ')[-5:])}",
        )
    if conflict := re.search(r"conflict is caused by:\n(.*?)\n\n", end, re.DOTALL):
        sides = conflict[1].replace("The user requested ", "").strip().splitlines()
        sides = " and ".join(side.strip() for side in sides)
        return Failure("conflict", f"no version satisfies {sides}: loosen one of them")
    errors = re.findall(r"^ *(?:ERROR:|error:|×) (.*)", end, re.MULTILINE)
    said = errors or end.strip().splitlines() or ["it said nothing"]
    return Failure("other", f"pip failed: {said[-1][:200]}")


class Pip:
    """The environment's pip: its output goes into a log, and one line shows how far it is."""

    def __init__(self, venv: Path) -> None:
        self.venv, self.log = venv, venv / LOG
        self.free = shutil.disk_usage(venv).free
        self.start = time.monotonic()
        self.log.write_text("")
        if quietly(venv / "bin" / "python", "-m", "pip", "--version").returncode != 0:
            quietly(venv / "bin" / "python", "-m", "ensurepip")

    def line(self, output: str, _: int) -> str:
        seen = re.findall(
            r"^(?:Collecting|Requirement already satisfied:|Processing \S*/) ?([A-Za-z0-9_.]+)",
            output.replace("-", "_"),
            re.MULTILINE,
        )
        steps = re.findall(rf"^ *((?:{'|'.join(STEPS)}) .*)", output, re.MULTILINE)
        step = re.sub(r"[^ ]*/", "", steps[-1]) if steps else ""
        gigabytes = max(self.free - shutil.disk_usage(self.venv).free, 0) / 1e9
        seconds = time.monotonic() - self.start
        return (
            f"environment: {len(set(seen))} packages, {gigabytes:.1f} GB, {seconds:.0f} s: {step}"
        )

    def install(self, *arguments: str) -> Failure | None:
        command = [self.venv / "bin" / "python", "-m", "pip", "install", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", *arguments]
        scratch = self.venv / "tmp"  # gigabytes, for which /tmp may be too small
        scratch.mkdir(exist_ok=True)
        before = self.log.stat().st_size
        variables = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
        try:
            code = progress.run(command, self.log, self.line, variables)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        output = self.log.read_bytes()[before:].decode(errors="replace")
        return diagnose(output, self.venv) if code else None


def install(venv: Path, asked: str, torch: str) -> list[str]:
    """Installs what is missing beside `torch`, which stays; returns what could not be had.

    Where there is no torch yet, the one `asked` for, or the newest.
    """
    python, constraints = venv / "bin" / "python", venv / "swin_kernels-constraints.txt"
    wanted = sorted(requirements(), key=lambda x: not is_torch(x))
    if asked:
        exactly = f"torch=={asked}" if asked.count(".") == 2 else f"torch=={asked}.*"
        wanted = [exactly if is_torch(x) else x for x in wanted]
    pip = Pip(venv)

    def attempt(*arguments: str) -> Failure | None:
        if not torch:
            return pip.install(*arguments)
        constraints.write_text(f"torch=={torch}\n")
        return pip.install("--constraint", str(constraints), *arguments)

    failure = attempt(*wanted)
    if failure is None:
        return []
    if not torch and failure.kind not in ("space", "network"):
        alone = attempt(wanted[0])
        torch = torch_version(python)
        failure = failure if torch or alone is None else alone
    if not torch or failure.kind == "space":
        if asked and failure.kind in ("version", "conflict"):
            fail(f"--torch: {failure.message}", BAD_INPUT)
        end = f":\n{progress.last_lines(pip.log)}" if failure.kind == "other" else ""
        fail(f"{failure.message}; pip's output is in {pip.log}{end}")
    # one package that cannot be had, or does not fit this torch, must not keep the others away
    say(f"not all at once, so one by one: {failure.message}")
    offline = ["--no-index"] if failure.kind == "network" else []

    def can_be_had(x: str) -> bool:
        # a torch of a vendor's own version fits no package that asks for one, and works with many
        bare = ["--no-deps", *(["--no-index"] if x.startswith("torchvision") else offline)]
        return attempt(*offline, x) is None or attempt(*bare, x) is None

    return [x for x in wanted if not is_torch(x) and not can_be_had(x)]


def contents(venv: Path) -> str:
    """What `venv` holds, in words."""
    packages = len([*venv.glob("lib/*/site-packages/*.dist-info")])
    files = (path for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{packages} packages, {sum(path.stat().st_size for path in files) / 1e9:.1f} GB"


def warn_of(missing: list[str], venv: Path) -> None:
    if missing:
        say(
            f"going on without {', '.join(missing)}: why is in {venv / LOG}; "
            f"remove {venv / MARK} to try again"
        )


def ensure(venv: Path, asked: str) -> str:
    """Brings `venv` up to date if it is not; returns the version of its torch."""
    mark, python = venv / MARK, venv / "bin" / "python"
    start = time.monotonic()
    fresh = not (venv / "pyvenv.cfg").exists()
    if not python.exists():
        try:
            create(venv, bool(asked))
        except BaseException:
            python.unlink(missing_ok=True)  # what is half made is made again
            raise
    facts: dict = {}
    with contextlib.suppress(OSError, ValueError):  # not ours, or cut short by a full disk
        facts = json.loads(mark.read_text())
    now = maker(facts.get("own_torch", False))
    inside = Path(sys.prefix).resolve() == venv.resolve()
    if not inside and facts.get("maker", now) != now:
        fail(
            f"{venv} was made for {in_words(facts['maker'])}, and {sys.executable} is "
            f"{in_words(now)}: remove it, or name another with VENV=…"
        )
    torch = torch_version(python)
    if torch and asked and not matches(asked, torch):
        fail(
            f"{venv} has torch {torch}, and torch {asked} was asked for: "
            "name another environment with VENV=…, or remove this one"
        )
    if torch and not new_enough(torch):
        fail(f"torch >= 2.11 is needed, {venv} has {torch}: name another environment with VENV=…")
    if facts.get("made_for") == digest(requirements(), torch):
        warn_of(facts["missing"], venv)
        return torch
    try:
        missing = install(venv, asked, torch)
    except SystemExit as stop:
        if fresh and stop.code == BAD_INPUT:
            shutil.rmtree(venv)
        raise
    torch = torch_version(python)
    if any(requirement.startswith("setuptools") for requirement in missing):
        fail(f"cannot go on without {', '.join(missing)}: why is in {venv / LOG}")
    warn_of(missing, venv)
    made = {"made_for": digest(requirements(), torch), "missing": missing}
    mark.write_text(json.dumps({**facts, **made}))
    say(f"{venv} is ready: torch {torch}, {contents(venv)}, {time.monotonic() - start:.0f} s")
    return torch


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; `environment.py --help` lists what there is", BAD_INPUT)


def version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected a version as 2.14 or 2.14.1, got {text!r}")
    if not new_enough(text):
        raise argparse.ArgumentTypeError(f"expected 2.11 or newer, got {text!r}")
    return text


def arguments() -> argparse.Namespace:
    described, _, form = (__doc__ or "").partition("\n\n")
    parser = Parser(
        "environment.py",
        description=described,
        epilog=form,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("venv", metavar="VENV", nargs="?", type=Path, help="its folder")
    parser.add_argument("record", metavar="RECORD", nargs="?", type=Path, help="a file")
    parser.add_argument("--key", action="store_true", help="print the word, and make nothing")
    parser.add_argument("--torch", metavar="VERSION", type=version, help="which torch")
    given = parser.parse_args()
    if given.key == (given.venv is not None) or given.key == (given.record is not None):
        parser.error("expected either VENV RECORD or --key")
    return given


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """Two clones may share the environment: one makes it, the other waits."""
    with open(venv / "swin_kernels.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is making {venv}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036, the Python that runs this may be any
        fail(f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
    given = arguments()
    if given.key:
        print(digest(requirements(), maker(bool(given.torch)), *filter(None, [given.torch])))
        return
    venv, record = given.venv, given.record
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        fail(f"{venv} is there, but is no virtual environment: name another with VENV=…")
    venv.mkdir(parents=True, exist_ok=True)
    with locked(venv):
        torch = ensure(venv, given.torch or "")
    # make builds again what is older than this file
    content = f"torch {torch}\n"
    if not record.exists() or record.read_text() != content:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(content)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}: name another place with VENV=…")
