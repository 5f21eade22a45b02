"""The package as it is handed out: its version, its wheel, its source distribution."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zipfile
from typing import Any

import pytest
import torch
from command_lines import ROOT, run_python

import swin_kernels
from swin_kernels.models import state_dict_for, swin

FOLDERS = ("csrc", "swin_kernels")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")

# run in an empty folder against the unpacked wheel
USE_WHEEL = """
import sys
import swin_kernels
heavy = {"triton", "timm", "torchvision", "transformers", "monai", "matplotlib", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert swin_kernels.__file__.startswith(sys.argv[1]), swin_kernels.__file__
import torch
qkv = torch.randn(2, 6, 6, 3, 2, 8)
out = swin_kernels.shifted_window_attention_qkvpacked(qkv, 3, 2, backend="cpu")
print(tuple(out.shape), bool(out.isfinite().all()))
"""


def test_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", swin_kernels.__version__)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version", "readme"]' in project
    assert 'version = { attr = "swin_kernels.version.__version__" }' in project
    assert f"## [{swin_kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_examples_of_the_readme_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    text = (ROOT / "README.md").read_text()
    patching, models = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(patching, names)
    assert names["logits"].shape == (2, 1000)
    assert names["out"].shape == (2, 56, 56, 3, 32)
    assert names["table"].grad.isfinite().all()
    assert "replaced in 12 of 12 blocks" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    (file,) = re.findall(r"load\(model, \"(.*?)\"", models)
    torch.save({"model": state_dict_for(swin(file.removesuffix(".pth")), "authors")}, file)
    exec(models, names)
    assert names["model"].head.out_features == 10
    assert names["backbone"].features_only


@pytest.mark.slow
def test_wheel_holds_the_compiled_object_and_imports_from_an_empty_folder(tmp_path):
    pytest.importorskip("setuptools", minversion="77.0.3")  # knows SPDX
    source, unpacked, empty = (tmp_path / name for name in ("source", "unpacked", "empty"))
    source.mkdir()
    empty.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=built)
    for name in FILES:
        shutil.copy(ROOT / name, source)

    # unoptimised in a quarter of the time
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec ${REAL_CXX:-c++} "$@" -O0\n')
    compiler.chmod(0o755)
    real = {"REAL_CXX": os.environ.get("CXX", "c++"), "CXX": str(compiler)}
    command = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index")
    variables = {**real, "PYTHONPATH": "", "SWIN_KERNELS_CUDA": "0"}
    run_python(*command, "--wheel-dir", tmp_path, cwd=source, **variables)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"swin_kernels-{swin_kernels.__version__}-cp310-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    assert {"swin_kernels/_C_cpu.abi3.so", "swin_kernels/py.typed"} <= set(names)
    assert [name for name in names if name.endswith("/LICENSE")]
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "swin_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "build"))]

    used = run_python("-c", USE_WHEEL, unpacked, cwd=empty, PYTHONPATH=str(unpacked))
    assert used.stdout.split("\n")[0] == "(2, 6, 6, 2, 8) True"


# setup.py, asked for its name alone: it decides what to build, and builds nothing
SETUP = ("setup.py", "--name")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"SWIN_KERNELS_CUDA": "yes"}, "SWIN_KERNELS_CUDA: expected auto, 0 or 1, got 'yes'"),
        (
            {"SWIN_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "native"},
            "SWIN_KERNELS_CUDA=1, but without _C_cuda: ",
        ),
    ],
    ids=["unknown", "no architecture"],
)
def test_a_build_that_cannot_be_says_why(variables, complaint):
    assert complaint in run_python(*SETUP, code=1, **variables).stderr


@pytest.mark.slow
def test_a_build_without_cuda_needs_no_toolkit():
    assert "swin_kernels" in run_python(*SETUP, SWIN_KERNELS_CUDA="0", PATH="/nowhere").stdout


@pytest.mark.slow
def test_a_source_distribution_has_every_source(tmp_path):
    """Whatever was built where it was made: what is missing would be missed only by a build."""
    command = ("setup.py", "--quiet", "egg_info", "--egg-base", tmp_path)
    run_python(*command, "sdist", "--dist-dir", tmp_path, SWIN_KERNELS_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu")
    }
    assert sources
    assert sources <= names, sources - names
