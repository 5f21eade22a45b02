"""Triton's interpreter, five times as fast, its sums as a GPU's, for newer NumPys: for tests alone.

What is replaced here is private to Triton (3.6 to 3.9); where it is not as expected, nothing is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from swin_kernels.backends.triton.launcher import Launch

_KNOWN = ("_patch_lang", "_get_np_dtype", "_LangPatchScope", "ReduceOps")


@functools.cache
def _languages(function) -> frozenset[str]:
    """The modules that the interpreter replaces members of before it calls `function`."""
    return frozenset(
        module.__name__
        for module in function.__globals__.values()
        if inspect.ismodule(module) and module in (tl, tl.core)
    )


def _tree_sum(self, x):
    """`ReduceOps.sum` in halves: NumPy sums a first axis one by one, which rounds far more."""
    assert self.axis is not None
    terms = np.moveaxis(x.handle.data, self.axis, 0)
    while len(terms) > 1:
        half = len(terms) // 2
        terms = terms[:half] + terms[half:]
    total = terms[0]
    return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, x.dtype)


def _dot(self, a, b, accumulator, *options):
    """`create_dot` rounded once: BLAS sums in an order that hangs on the shape of the tile.

    A GPU's does not, and a backward in tiles takes its logits to be those of its forward.
    """
    product = np.matmul(a.data, b.data, dtype=np.float64) + accumulator.data
    return interpreter.TensorHandle(
        product.astype(accumulator.data.dtype), accumulator.dtype.scalar
    )


@contextlib.contextmanager
def fast_interpreter(overflow_checked: bool = False) -> Iterator[None]:
    """Inside, a launch replaces the members of `tl` once, not again at every device function.

    Nor does every sum and product of integers come with another, of 64 bits, that must equal it,
    unless they are to be `overflow_checked`.
    """
    if not all(hasattr(interpreter, name) for name in _KNOWN):
        yield
        return
    patch, numpy_dtype, launch = interpreter._patch_lang, interpreter._get_np_dtype, Launch.__call__
    done: set[frozenset[str]] = set()
    dtypes: dict[str, object] = {}

    def patch_once(function):
        if (languages := _languages(function)) in done:
            return interpreter._LangPatchScope()
        done.add(languages)
        scope = patch(function)
        # Triton 3.6 makes an int of an array of one number, which NumPy 2.4 refuses
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        return scope

    def dtype_once(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return numpy_dtype(dtype)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = numpy_dtype(scalar)
        return dtypes[scalar.name]

    def launched(self, *arguments):
        done.clear()  # what a launch replaced it puts back
        return launch(self, *arguments)

    options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=overflow_checked
    )
    with (
        mock.patch.object(interpreter.interpreter_builder, "options", options),
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_get_np_dtype", dtype_once),
        mock.patch.object(interpreter.ReduceOps, "sum", _tree_sum),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        mock.patch.object(Launch, "__call__", launched),
    ):
        yield
