"""Two trees timed in turn: alike, slowed, wrong; their checkouts and builds without a compiler."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_lines import ROOT, committed, output_of, refusal

from benchmarks.cases import toy_cases
from benchmarks.compare import regression
from benchmarks.compare.regression import Side, compared
from swin_kernels.testing import Case

pytestmark = pytest.mark.slow

TOYS = {
    "toy": Case(2, (8, 8), (4, 4), (2, 2), 2, 16, packed=True, bias="table", layout="contiguous"),
    "toy tiles": toy_cases()["toy tiles"].but(dtype=torch.float32),
}
CHANGED = """
import time
_attend = shifted_window_attention_qkvpacked
def shifted_window_attention_qkvpacked(*args, **options):
    {}
"""


@pytest.fixture
def small(cpu_kernels, monkeypatch):
    """Few inputs, short samples."""
    monkeypatch.setattr(regression.Cpu, "cache_bytes", 1e3)
    monkeypatch.setattr(regression, "SAMPLE_SECONDS", 1e-3)


@pytest.fixture
def changed(tmp_path):
    """A tree like this one, whose public function is another."""

    def make(body: str) -> Path:
        package = tmp_path / "changed" / "swin_kernels"
        shutil.copytree(ROOT / "swin_kernels", package)
        with (package / "__init__.py").open("a") as file:
            file.write(CHANGED.format(body))
        return package.parent

    return make


def test_identical_trees_are_no_regression(small, capsys):
    # on a busy machine a toy's interval can be anywhere: what must hold is that it is told
    out = output_of(capsys, regression.run, (ROOT, ROOT), TOYS, 5, 3.0, 1)
    assert out.count("forward + backward") == len(TOYS)
    assert "slower" not in out
    assert "wrong" not in out


def test_slowed_tree_is_reported_and_is_the_exit_code(small, changed, capsys):
    slowed = changed("time.sleep(5e-3); return _attend(*args, **options)")
    rest = ({"toy": TOYS["toy"]}, 5, 1.05, 1)
    out = output_of(capsys, regression.run, (ROOT, slowed), *rest, code=1)
    assert sum("slower" in line for line in out.splitlines()) == 2, out
    assert "faster" in output_of(capsys, regression.run, (slowed, ROOT), *rest)


def test_wrong_tree_is_not_timed_and_is_the_exit_code(small, changed, capsys):
    wrong = changed("return _attend(*args, **options) * 1.01")
    out = output_of(capsys, regression.run, (ROOT, wrong), TOYS, 2, 1.05, 1, code=1)
    assert "wrong or without time: toy: AssertionError: new: output: largest error" in out
    assert "forward" not in out


def test_tree_that_cannot_run_a_case_goes_on_with_the_next(small, changed, capsys):
    body = "assert args[0].shape[1] != 8, 'no eights'; return _attend(*args, **options)"
    out = output_of(capsys, regression.run, (ROOT, changed(body)), TOYS, 2, 100.0, 1, code=1)
    assert "toy: RuntimeError: new: AssertionError: no eights" in out
    assert [line.split()[:2] for line in out.splitlines() if "backward" in line] == [
        ["toy", "tiles"]
    ]


def test_side_that_dies_is_named(small, changed, tmp_path):
    with (
        Side("new", changed("import os; os._exit(3)"), 1) as side,
        pytest.raises(RuntimeError, match="new: the process ended, exit code 3"),
    ):
        regression.check(TOYS["toy"], [side], tmp_path)


def test_side_runs_the_package_of_its_tree(small, changed):
    tree = changed("return _attend(*args, **options)")
    with Side("old", tree, 1) as side:
        assert side.process.poll() is None
    assert side.process.poll() is not None


@pytest.mark.parametrize(
    "factor, verdict",
    [(1.0, "as fast"), (1.2, "slower"), (0.8, "faster"), (1.05, "unclear")],
)
def test_verdict_is_of_the_whole_interval(factor, verdict):
    old = [1 + 0.01 * (i % 7) for i in range(40)]
    found = compared("x", "forward", old, [factor * (1 + 0.01 * (i % 5)) for i in range(40)])
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert found.verdict(1.05 if factor != 1.05 else found.ratio) == verdict


def test_drift_that_both_share_cancels():
    drift = [1 + i / 20 for i in range(40)]
    found = compared("x", "forward", drift, [1.1 * x for x in drift])
    assert found.ratio == pytest.approx(1.1)
    assert found.interval == pytest.approx((1.1, 1.1))


# trees


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, changed since, and a build that needs no compiler."""
    root = tmp_path / "repository"
    for folder in ("csrc", "swin_kernels"):
        (root / folder).mkdir(parents=True)
    (root / "setup.py").write_text("1")
    (root / "csrc" / "a.cpp").write_text("a")
    (root / "swin_kernels" / "x.py").write_text("x")
    (root / ".gitignore").write_text("*.so\nbuild/\n")
    monkeypatch.setattr(regression, "ROOT", root)
    monkeypatch.setattr(regression, "BUILT", root / "build" / "regression")
    count = tmp_path / "builds"
    script = (
        "from pathlib import Path; "
        f"Path({str(count)!r}).open('a').write('built '); "
        "Path('swin_kernels/_C.so').write_text(Path('csrc/a.cpp').read_text())"
    )
    monkeypatch.setattr(regression, "BUILD", (sys.executable, "-c", script))
    try:
        committed(root)
    except FileNotFoundError:
        pytest.skip("needs git")
    (root / "swin_kernels" / "x.py").write_text("changed")
    (root / "swin_kernels" / "new.py").write_text("new")
    return root, count


@pytest.mark.parametrize(
    ("commit", "files"),
    [
        ("HEAD", {"x.py": "x", "_C.so": "a"}),
        (None, {"x.py": "changed", "new.py": "new", "_C.so": "a"}),
    ],
    ids=["commit", "working tree"],
)
def test_tree_has_its_files_and_its_object_and_goes(repository, commit, files):
    root, _ = repository
    with regression.tree_of(commit) as tree:
        assert {path.name: path.read_text() for path in (tree / "swin_kernels").iterdir()} == files
    assert not tree.exists()
    assert regression.git("worktree", "list").count("\n") == 1
    assert not (root / "swin_kernels" / "_C.so").exists()


def test_the_same_sources_are_built_once(repository):
    root, count = repository
    for commit in ("HEAD", None, "HEAD"):
        with regression.tree_of(commit):
            pass
    assert count.read_text() == "built "
    (root / "csrc" / "a.cpp").write_text("b")
    with regression.tree_of(None) as tree:
        assert (tree / "swin_kernels" / "_C.so").read_text() == "b"
    assert count.read_text() == "built built "


def test_failed_build_says_why_and_keeps_nothing(repository, monkeypatch, capsys):
    failing = (sys.executable, "-c", "raise SystemExit('no compiler')")
    monkeypatch.setattr(regression, "BUILD", failing)
    assert "no compiler" in refusal(regression.main, ["HEAD"], capsys)
    assert not list(regression.BUILT.glob("*"))
    assert regression.git("worktree", "list").count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such-commit"], "no-such-commit"),
        (["HEAD", "no-such-commit"], "no-such-commit"),
        (["HEAD", "--cases", "T9"], "invalid choice: 'T9'"),
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_named(repository, arguments, message, capsys):
    assert message in refusal(regression.main, arguments, capsys)
    assert regression.git("worktree", "list").count("\n") == 1


def test_command_runs_two_trees(repository, monkeypatch):
    seen = []

    def run(trees, cases, rounds, tolerance, threads):
        seen.append(([(t / "swin_kernels" / "x.py").read_text() for t in trees], list(cases)))
        return 1

    monkeypatch.setattr(regression, "run", run)
    arguments = ["HEAD", "--cases", "w16", "--threads", str(torch.get_num_threads())]
    assert regression.main(arguments) == 1
    assert seen == [(["x", "changed"], ["w16"])]


def test_worker_is_told_apart_from_what_it_imports():
    """It must run with the packages of other commits: of ours it imports the public one alone."""
    text = (ROOT / "benchmarks" / "compare" / "worker.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert [x for x in imports if "swin_kernels" in x or "benchmarks" in x] == [
        "import swin_kernels"
    ]
