"""The documentation: every public name has an entry, and every relative link has a target."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")
ENTRY = re.compile(r"\.\. (?:auto\w+|py:\w+):: |^ {10,}(?=swin_kernels\.)", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("module", ["swin_kernels", "swin_kernels.models", "swin_kernels.testing"])
def test_public_names_have_an_entry_in_the_api_reference(module):
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = {text[m.end() :].split(None, 1)[0] for m in ENTRY.finditer(text)}
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert names <= documented, f"no entry in docs/api for {sorted(names - documented)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_have_targets(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_tests_that_a_page_names_are_there():
    """Written as `file.py::test`."""
    named = {
        x
        for page in PAGES
        for x in re.findall(r"(test_\w+\.py)::(?:Test\w+::)?(\w+)", page.read_text())
    }
    assert named
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [x for x in sorted(named) if f"def {x[1]}(" not in tests.get(x[0], "")]


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    toctrees = "".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL))
    listed = {line.rpartition("<")[2].rstrip(">") for line in toctrees.splitlines()}
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")}
    assert pages - {"index"} <= listed
