"""The arrows: each layer imports only what lies below it, and importing the package stays light."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import ROOT, run_python

PACKAGE = ROOT / "swin_kernels"

# what each part of the package may import of the others
BELOW = {
    "version": set(),
    "geometry": set(),
    "position_bias": set(),
    "problem": {"geometry", "position_bias"},
}
BELOW["sublayer_problem"] = BELOW["problem"] | {"problem"}
BELOW["mlp_problem"] = BELOW["sublayer_problem"] | {"sublayer_problem"}
BELOW["attention_sublayer_problem"] = BELOW["mlp_problem"]
BELOW["backends"] = BELOW["mlp_problem"] | {"mlp_problem", "attention_sublayer_problem"}
BELOW["ops"] = BELOW["backends"] | {"backends"}
BELOW["modules"] = BELOW["ops"] | {"ops"}
BELOW["models"] = BELOW["modules"] | {"modules"}
BELOW["patch"] = BELOW["ops"] | {"ops", "version"}
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


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every (module or module.name, line) of a file's imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_file_imports_only_what_lies_below_it_and_libraries_that_belong_there(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in BELOW.keys() | TOP, f"{part}: say in BELOW what it may import"
    for name, line in _imports(path):
        library, target, *_ = f"{name}.".split(".")
        assert part in HOMES.get(library, {part}), f"{path}:{line}: imports {library}"
        if library == "swin_kernels" and part not in TOP and target not in ("", "__version__"):
            allowed = BELOW[part] | {part}
            assert target in allowed, f"{path}:{line}: {part} imports {target}"


# the files of backends/triton, each of which imports only those before it; device code none of them
TRITON = ("token_layout", "launch_spec", "config", "kernel_args", "plan", "launcher", "backend")
# folders of benchmarks, each of which may import of the others those before it
BENCHMARKS = ("device", "baselines", "report", "codegen", "gpu_tools", "compare")


def _graph(*folders: str) -> dict[str, set[str]]:
    """The modules that each module of these folders imports, at its top or inside a function."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        found = {x if x in files else x.rpartition(".")[0] for x, _ in _imports(path)}
        graph[name] = (found & files.keys()) - {name}
    return graph


def test_no_imports_go_in_a_circle():
    graph = _graph("swin_kernels", "benchmarks")
    assert len(graph) > 90
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_files_of_the_triton_backend_go_one_way():
    package = "swin_kernels.backends.triton"
    graph = _graph("swin_kernels/backends/triton")
    for name, imported in graph.items():
        here = name.removeprefix(f"{package}.")
        for other in (x.removeprefix(f"{package}.") for x in imported):
            if here.startswith("kernels."):
                assert other.startswith("kernels."), f"{here} imports {other}"
            else:
                assert TRITON.index(other) < TRITON.index(here), f"{here} imports {other}"


def test_the_folders_of_the_benchmarks_go_one_way():
    for name, imported in _graph("benchmarks").items():
        here = name.split(".")[1]
        for other in (x.split(".")[1] for x in imported):
            if here in BENCHMARKS and other in BENCHMARKS and here != other:
                assert BENCHMARKS.index(other) < BENCHMARKS.index(here), f"{name} imports {other}"


def _modules_after(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(' '.join(sys.modules))"
    return set(run_python("-c", program).stdout.split())


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


def test_no_test_imports_another():
    """Each runs alone: what several use is in tests/support."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(tests) > 50
    names = {path.stem for path in tests}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in tests
        for name, line in _imports(path)
        if name.split(".")[0] in names
    ]
    assert not found
