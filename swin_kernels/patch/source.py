"""A fingerprint of Python source: of what the code does, not of how it is written down."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType

# what a run never sees, and fields that come and go between Python 3.10 and 3.14
_IGNORED = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx", "decorator_list")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _tokens(node: object) -> Iterator[str]:
    """The tree in prefix order; `ast.dump` and `ast.unparse` differ between versions of Python."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for field, value in ast.iter_fields(node):
            if field in _IGNORED or value is None or value == []:
                continue
            documented = (
                field == "body"
                and isinstance(node, _DEFINITIONS)
                and ast.get_docstring(node, clean=False) is not None
            )
            yield field
            yield from _tokens(value[1:] if documented else value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _tokens(item)
        yield "]"
    else:
        yield repr(node)


@functools.lru_cache(maxsize=256)
def _of_code(code: CodeType) -> bytes:
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    return " ".join(_tokens(tree.body[0])).encode()


def fingerprint(functions: tuple[Callable, ...]) -> str | None:
    """16 hex digits over the bodies, names and defaults of `functions`; None where a source cannot
    be read.

    Docstrings, comments, annotations and decorators are left out. A function that wraps another (a
    monkey patch) is read itself, not what it claims to wrap.
    """
    digest = hashlib.sha256()
    for function in functions:
        code = getattr(function, "__code__", None)
        if code is None:
            return None
        try:
            digest.update(_of_code(code))
        except (OSError, SyntaxError, TypeError):
            return None
    return digest.hexdigest()[:16]
