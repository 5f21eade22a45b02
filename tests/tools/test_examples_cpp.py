"""examples/cpp: a package of AOTInductor that holds our operation, run without Python."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_lines import ROOT, run

from swin_kernels.backends import native

pytestmark = pytest.mark.slow

timm = pytest.importorskip("timm", reason="the example exports a model of timm")

EXAMPLE = ROOT / "examples" / "cpp"
TOOLS = [shutil.which(name) for name in ("make", os.environ.get("CXX", "c++").split()[0])]
MAKE = ("make", "-C", EXAMPLE, f"PYTHON={sys.executable}")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# names neither Python nor our package
BARE = {name: None for name in os.environ if name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The compiled program."""
    assert all(TOOLS), "make and a C++ compiler are needed"
    out = tmp_path_factory.mktemp("program")
    run(*MAKE, f"OUT={out}", out / "run")
    return out / "run"


@pytest.mark.parametrize("device", DEVICES)
def test_a_patched_swin_runs_from_cpp_without_python(program, tmp_path, device):
    built = getattr(native, f"{device.upper()}_OBJECT")
    if device == "cuda" and built.path is None:
        pytest.skip(built.error)
    torch.manual_seed(0)
    # two blocks, one of them shifted, on a map that windows of 7 do not fit
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=72, embed_dim=32, depths=(2,), num_heads=(2,), num_classes=10, window_size=7
    )
    with torch.device("cpu"):
        package = runpy.run_path(str(EXAMPLE / "export.py"))["package"]
        package(model.eval().cpu(), (2, 3, 72, 72), device, tmp_path)
    library = (tmp_path / "library").read_text().strip()
    assert Path(library) == built.path
    done = run(program, tmp_path / "model.pt2", tmp_path / "tensors.pt", library, 3, **BARE)
    assert "1000 logits of 50 inputs" in done.stdout
    assert "the error rule holds" in done.stdout
    assert "ms a call" in done.stdout
    assert "Python in this process: no" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "usage: "),
        (["model.pt2", "tensors.pt", "nowhere.so"], "nowhere.so: cannot open shared object file"),
        (["model.pt2", "tensors.pt", str(native.CPU_OBJECT.path)], "model.pt2: cannot be read"),
        (["model.pt2", "tensors.pt", "x.so", "3abc"], "expected a whole number up to 999999"),
    ],
    ids=["no arguments", "no library", "no package", "rounds"],
)
def test_what_is_missing_is_named(program, tmp_path, arguments, complaint):
    assert complaint in run(program, *arguments, code=2, cwd=tmp_path, **BARE).stderr


def test_make_finds_the_package_and_exports_again_for_other_arguments(tmp_path):
    def made(model: str, code: int):
        """In an environment without our package, as in a clone where nothing is installed."""
        package = tmp_path / "model.pt2"
        arguments = (f"OUT={tmp_path}", package, f"ARGS=--model {model}")
        return run(*MAKE, *arguments, code=code, PYTHONPATH=None)

    assert "export: timm makes no nonsense" in made("nonsense", 2).stderr
    (tmp_path / "model.pt2").touch()
    assert "export.py" not in made("nonsense", 0).stdout
    assert "timm makes no other" in made("other", 2).stderr
