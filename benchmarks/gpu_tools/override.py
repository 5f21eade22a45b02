"""Layouts of the Triton kernels that a search tries, in place of those of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from unittest import mock

from swin_kernels.backends.triton import config, launcher
from swin_kernels.ops import repeated


def forget() -> None:
    """Every call is planned anew."""
    launcher.forget()
    repeated.forget()


@contextlib.contextmanager
def override(fields: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Inside it these fields, by `config.tuned_key`, win over tuned.json and over those outside."""
    table = config._tuned()
    wins = {key: {**table.get(key, {}), **values} for key, values in fields.items()}
    try:
        with mock.patch.object(config, "_tuned", return_value={**table, **wins}):
            forget()
            yield
    finally:
        forget()
