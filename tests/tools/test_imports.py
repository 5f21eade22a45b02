"""The arrows: each layer imports only what lies below it, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "swin_kernels"

# what each part of the package may import of the others
BELOW = {
    "geometry": set(),
    "position_bias": set(),
    "problem": {"geometry", "position_bias"},
    "backends": {"geometry", "position_bias", "problem"},
    "ops": {"geometry", "position_bias", "problem", "backends"},
}
BELOW["modules"] = BELOW["ops"] | {"ops"}
BELOW["models"] = BELOW["modules"] | {"modules"}
BELOW["patch"] = BELOW["ops"] | {"ops"}
BELOW["testing"] = BELOW["patch"] | {"patch"}  # stock beside patched
TOP = {"__init__", "__main__", "cli"}  # may import everything

# where each outside library may be imported; all others are for everyone
HOMES = {
    "timm": {"patch", "cli"},
    "torchvision": {"patch", "cli"},
    "transformers": {"patch", "cli"},
    "monai": {"patch", "cli"},
    "mmdet": {"patch"},
    "spandrel": {"patch"},
    "triton": {"backends"},
    "matplotlib": {"cli"},
    "skimage": {"cli"},
    "sklearn": {"cli"},
    "rich": {"cli", "__main__"},
}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path):
    """Every (module, line) that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "swin_kernels":
                for alias in node.names:
                    yield f"swin_kernels.{alias.name}", node.lineno
            else:
                yield node.module, node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))
over_files = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES]
)


@over_files
def test_file_imports_only_what_lies_below_it(path):
    part = _part(path)
    if part in TOP:
        return
    assert part in BELOW, f"{part}: say in BELOW what it may import"
    for name, line in _imports(path):
        if not name.startswith("swin_kernels.") or name == "swin_kernels.__version__":
            continue
        target = name.split(".")[1]
        assert target == part or target in BELOW[part], f"{path}:{line}: {part} imports {target}"


@over_files
def test_libraries_are_imported_only_where_they_belong(path):
    for name, line in _imports(path):
        library = name.split(".")[0]
        if library in HOMES:
            assert _part(path) in HOMES[library], f"{path}:{line}: imports {library}"


def _modules_after(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_no_triton_and_no_model_library():
    # torch itself may import some of them
    added = _modules_after("import torch, swin_kernels") - _modules_after("import torch")
    roots = {name.split(".")[0] for name in added}
    assert not roots & set(HOMES)
    assert "swin_kernels" in roots


def test_public_names_exist_and_are_documented():
    import swin_kernels

    assert len(set(swin_kernels.__all__)) == len(swin_kernels.__all__)
    for name in swin_kernels.__all__:
        assert getattr(swin_kernels, name).__doc__, name
