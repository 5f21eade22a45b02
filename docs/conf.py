"""Sphinx's configuration; `make docs` builds the site with warnings as errors."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where Sphinx installs tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package is documented where it lies, not installed

import swin_kernels  # noqa: E402
from swin_kernels.__main__ import main  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
version = release = swin_kernels.__version__
project_copyright = "2026, " + PROJECT["authors"][0]["name"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images"]
default_role = "code"
highlight_language = "none"  # blocks without a language are formulas and commands

# as on GitHub
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]

html_theme = "furo"
html_title = f"{project} {version}"
html_theme_options = {
    "source_repository": PROJECT["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": "docs/",
}
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
copybutton_selector = "div:not(.highlight-none) > div.highlight > pre"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry for `query, key`

smartquotes_action = "D"  # dashes; "pad-roll" is a string
toc_object_entries_show_parents = "hide"

nitpicky = True
# without intersphinx, so that the site builds offline
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|pathlib|typing|swin_kernels\.geometry)\..*|Tensor|Grid")
]

NAMES = {
    name: f"{module}.{name}"
    for module in ("swin_kernels.testing", "swin_kernels.models", "swin_kernels")
    for name in importlib.import_module(module).__all__
} | {f"problem.{name}": f"swin_kernels.problem.{name}" for name in ("Operands", "Options")}


def _markdown_to_rst(line: str) -> str:
    """Docstrings have Markdown's `code` and plain asterisks: reST's ``code``, and links."""
    spans = re.split(r"(`[^`]+`)", line)
    for i, span in enumerate(spans):
        if i % 2 == 0:
            escaped = re.sub(r"[*|\\]|(?<=\w)_\b", r"\\\g<0>", span)
            spans[i] = re.sub(r"\bdocs/([\w-]+)\.md", r":doc:`/\1`", escaped)
        elif (name := span[1:-1].removeprefix("swin_kernels.")) in NAMES:
            spans[i] = f":py:obj:`{name} <{NAMES[name]}>`"
        else:
            spans[i] = f"`{span}`"
    return "".join(spans)


def process_signature(app, what, name, obj, options, signature, returns):
    """Default factories of dataclasses as `...`, which Sphinx can parse."""
    return signature and signature.replace("<factory>", "..."), returns


def process_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = map(_markdown_to_rst, lines)


class CommandHelp(Directive):
    """The output of `python -m swin_kernels COMMAND --help`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "88"
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="none")]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", process_signature)
    app.add_directive("command-help", CommandHelp)
