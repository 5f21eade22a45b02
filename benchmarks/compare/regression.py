"""Whether one commit is slower than another: both in one run, by the ratio of their medians.

    python -m benchmarks.compare OLD [NEW] [--cases ...] [--rounds 40] [--tolerance 1.05]

NEW is the working tree unless named. Each side is a process of its own, on a tree of its own with
its own compiled object; they are asked for samples in turn, so that the drift of a shared machine
cancels. Results are held to the error rule before anything is timed. Exit code: 1 where NEW is
slower than the tolerance allows, with its whole interval, or where a result is wrong; 2 for a
commit or a case that is unknown; else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import cpu_cases, other_cpu_cases
from benchmarks.device import Cpu
from benchmarks.report.rows import ROOT, print_table
from benchmarks.timing import Gate, make_sets, reason_of
from swin_kernels.testing import Case

BUILT = ROOT / "build" / "regression"
BUILD = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
TIMED = ("forward", "forward + backward")
SAMPLE_SECONDS = 0.02
DRAWS = 4000  # of the bootstrap


def git(*arguments: str) -> str:
    """What git says; ValueError where it refuses."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


@contextlib.contextmanager
def tree_of(commit: str | None) -> Iterator[Path]:
    """A folder with the files of `commit`, or of the working tree, and with its object."""
    with tempfile.TemporaryDirectory(prefix="swin_kernels-") as folder:
        tree = Path(folder) / "tree"
        if commit is None:
            files = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
            for name in filter(None, files.split("\0")):
                if (ROOT / name).is_file():  # one that was removed is still listed
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, tree / name)
        else:
            git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            build(tree)
            yield tree
        finally:
            if commit is not None:
                git("worktree", "remove", "--force", str(tree))


def build(tree: Path) -> None:
    """The compiled object in its place: built, or what was built of the same sources before."""
    sources = [tree / "setup.py", *sorted(p for p in (tree / "csrc").rglob("*") if p.is_file())]
    key = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        key.update(f"\0{path.relative_to(tree)}\0".encode() + path.read_bytes())
    kept = BUILT / key.hexdigest()[:16]
    package = tree / "swin_kernels"
    if not kept.exists():
        print(f"building {kept.name}", flush=True)
        done = subprocess.run(BUILD, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"the build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        kept.mkdir(parents=True)
        for built in package.glob("*.so"):
            shutil.copy(built, kept)
    for built in kept.glob("*.so"):
        shutil.copy(built, package)


class Side:
    """A process that runs the package of one tree."""

    def __init__(self, name: str, tree: Path, threads: int) -> None:
        self.name = name
        worker = str(Path(__file__).with_name("worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, worker, str(tree), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        )
        package = Path(self._answer()["package"]).resolve()
        assert package.is_relative_to(tree.resolve()), f"{name} imported {package}, not of {tree}"

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended, exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, do: str, **question: object) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **question}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Compared(NamedTuple):
    """One direction of a case."""

    case: str
    direction: str
    seconds: tuple[float, float]  # medians, old and new
    ratio: float  # new ÷ old
    interval: tuple[float, float]  # of the ratio, 95 %

    def verdict(self, tolerance: float) -> str:
        low, high = self.interval
        if low > tolerance:
            return "slower"
        if high > tolerance:
            return "unclear"
        return "faster" if high < 1 else "as fast"


def compared(case: str, direction: str, old: Sequence[float], new: Sequence[float]) -> Compared:
    """Ratio of medians, and its interval by a bootstrap over rounds: a round has one of each."""
    samples = torch.tensor([list(old), list(new)], dtype=torch.float64)
    rounds = samples.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(rounds, (DRAWS, rounds), generator=generator)
    medians = samples[:, drawn].quantile(0.5, dim=-1)  # (2, DRAWS)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (medians[1] / medians[0]).quantile(ends).tolist()
    first, second = samples.quantile(0.5, dim=-1).tolist()
    return Compared(case, direction, (first, second), second / first, (low, high))


def check(case: Case, sides: Sequence[Side], folder: Path) -> int:
    """Has both sides load the case and holds each to the error rule; the number of its inputs."""
    device = Cpu()
    sets = make_sets(case, device)
    gate = Gate(case, device, sets[0])
    path = folder / "case.pt"
    torch.save(
        {
            "options": case.options | {"backend": device.backend},
            "sets": [s.plain for s in sets],
            "grads_out": [s.grad_out for s in sets],
            "gates": [draw.grad_out for draw in gate.draws],
        },
        path,
    )
    for side in sides:
        result = folder / f"{side.name}.pt"
        side.ask("load", path=str(path), result=str(result))
        try:
            gate.judge(torch.load(result), factor=2.0)
        except AssertionError as error:
            raise AssertionError(f"{side.name}: {error}") from error
    return len(sets)


def measure(name: str, case: Case, sides: Sequence[Side], rounds: int) -> Iterator[Compared]:
    """Each direction of a case; AssertionError where a result breaks the error rule."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = check(case, sides, Path(folder))
    for direction in TIMED:
        slowest = max(s.ask("sample", direction=direction, passes=1)["seconds"] for s in sides)
        passes = max(1, math.ceil(SAMPLE_SECONDS / (slowest * inputs)))
        samples: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(rounds):
            for side in sides[:: -1 if turn % 2 else 1]:
                answer = side.ask("sample", direction=direction, passes=passes)
                samples[side.name].append(answer["seconds"])
        yield compared(name, direction, *samples.values())


def run(
    trees: Sequence[Path], cases: dict[str, Case], rounds: int, tolerance: float, threads: int
) -> int:
    """The exit code, after a table of old and new."""
    found: list[Compared] = []
    wrong: list[str] = []
    with Side("old", trees[0], threads) as old, Side("new", trees[1], threads) as new:
        for name, case in cases.items():
            print(name, flush=True)
            try:
                found += measure(name, case, (old, new), rounds)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{name}: {reason_of(error)}")
                if any(side.process.poll() is not None for side in (old, new)):
                    break
    lines = [
        [
            *(c.case, c.direction, *(f"{x * 1e3:.3f}" for x in c.seconds), f"{c.ratio:.3f}"),
            *("{:.3f} to {:.3f}".format(*c.interval), c.verdict(tolerance)),
        ]
        for c in found
    ]
    header = ["case", "direction", "old ms", "new ms", "new ÷ old", "95 %", f"at {tolerance:g}"]
    print_table(header, lines)
    for complaint in wrong:
        print(f"wrong or without time: {complaint}")
    if any(line[-1] == "unclear" for line in lines):
        print("unclear: the interval holds the tolerance; more --rounds make it shorter")
    return int(bool(wrong) or any(line[-1] == "slower" for line in lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit; else the working tree")
    known = cpu_cases() | other_cpu_cases()
    parser.add_argument(
        "--cases", nargs="+", choices=known, default=list(cpu_cases()), metavar="CASE"
    )
    parser.add_argument("--rounds", type=int, default=40, help="samples of each side")
    parser.add_argument("--tolerance", type=float, default=1.05, help="of new ÷ old")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    cases = {name: known[name] for name in options.cases}
    torch.set_num_threads(options.threads)
    try:
        with tree_of(options.old) as old, tree_of(options.new) as new:
            return run((old, new), cases, options.rounds, options.tolerance, options.threads)
    except ValueError as error:
        parser.error(str(error))
