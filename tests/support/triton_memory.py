"""The memory traffic of interpreted Triton kernels: every load and store checked, and counted.

The interpreter reads and writes raw addresses: a lane outside of its tensor corrupts the process,
or nothing, in silence. `guarded` raises at the first active lane that is not an element of the
tensors given, be it in the gap between two rows of a strided one, and at a store to what is read
only.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from swin_kernels.backends.triton.launcher import Launch, Run
from swin_kernels.problem import Operands


class Traffic:
    """Bytes by the names of tensors, of active lanes alone: all that moved, and the distinct."""

    def __init__(self) -> None:
        self.loaded: dict[str, int] = defaultdict(int)
        self.stored: dict[str, int] = defaultdict(int)
        self._elements: dict[tuple[str, str, int], list[np.ndarray]] = defaultdict(list)

    def add(self, what: str, name: str, elements: np.ndarray, width: int) -> None:
        (self.loaded if what == "load" else self.stored)[name] += elements.size * width
        self._elements[what, name, width].append(np.unique(elements))

    def _distinct(self, what: str) -> dict[str, int]:
        return {
            name: np.unique(np.concatenate(parts)).size * width
            for (kind, name, width), parts in self._elements.items()
            if kind == what
        }

    @property
    def distinct_loaded(self) -> dict[str, int]:
        return self._distinct("load")

    @property
    def distinct_stored(self) -> dict[str, int]:
        return self._distinct("store")


class _Storage:
    """The elements that tensors have in one storage."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.width = tensor.element_size()
        self.start, self.bytes = storage.data_ptr(), storage.nbytes()
        self.names = np.zeros(self.bytes // self.width, np.int8)  # 0: no element of a tensor

    def add(self, number: int, tensor: Tensor) -> None:
        assert tensor.element_size() == self.width, "one storage, two widths"
        names = torch.from_numpy(self.names)
        names.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(number)

    def elements(self, addresses: np.ndarray) -> np.ndarray | None:
        """Which elements of the storage lie at these addresses; None if some are not in it."""
        offsets = addresses - self.start
        if (offsets < 0).any() or (offsets >= self.bytes - self.bytes % self.width).any():
            return None
        assert not (offsets % self.width).any(), "an address between two elements"
        return offsets // self.width


class _Guard:
    """The tensors that an interpreted kernel may touch."""

    def __init__(
        self,
        readable: Mapping[str, Tensor],
        writable: Mapping[str, Tensor],
        traffic: Traffic | None,
    ) -> None:
        self.traffic = traffic
        self.names = ["", *readable, *writable]
        self.writable = np.array([name in writable for name in self.names])
        storages: dict[int, _Storage] = {}
        for number, tensor in enumerate((*readable.values(), *writable.values()), start=1):
            if tensor.numel() == 0:
                continue
            storage = storages.setdefault(tensor.untyped_storage().data_ptr(), _Storage(tensor))
            storage.add(number, tensor)
        self.storages = list(storages.values())

    def check(self, what: str, pointers, mask) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data.astype(bool), addresses.shape)]
        addresses = addresses.ravel()
        if addresses.size == 0:
            return
        for storage in self.storages:
            if (elements := storage.elements(addresses)) is not None:
                break
        else:
            raise IndexError(f"{what}: of {addresses.size} lanes some are outside of all tensors")
        numbers = storage.names[elements]
        if not numbers.all():
            outside = int((numbers == 0).sum())
            raise IndexError(
                f"{what}: {outside} of {addresses.size} lanes are between the elements of "
                f"{sorted({self.names[n] for n in np.unique(storage.names) if n})}"
            )
        touched = np.unique(numbers)
        if what == "store" and not self.writable[touched].all():
            read_only = [self.names[n] for n in touched if not self.writable[n]]
            raise IndexError(f"store to {', '.join(read_only)}, which is read only")
        if self.traffic is not None:
            for n in touched:
                self.traffic.add(what, self.names[n], elements[numbers == n], storage.width)


@contextlib.contextmanager
def guarded(
    readable: Mapping[str, Tensor],
    writable: Mapping[str, Tensor],
    traffic: Traffic | None = None,
) -> Iterator[None]:
    """Kernels launched inside may load elements of both, and store to those of `writable`.

    IndexError, wrapped by the interpreter, says what else an active lane did. Atomics are refused:
    their order is not fixed.
    """
    builder = interpreter.interpreter_builder
    guard = _Guard(readable, writable, traffic)
    # the interpreter's other loads and stores end in these two, and in the atomics
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(pointers, mask, *rest):
        guard.check("load", pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        guard.check("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    def refused(*args, **kwargs):
        raise AssertionError("an atomic: two runs may differ")

    replaced = {"create_masked_load": checked_load, "create_masked_store": checked_store}
    replaced |= dict.fromkeys((n for n in dir(builder) if n.startswith("create_atomic")), refused)
    with mock.patch.multiple(builder, **replaced):
        yield


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """What the Triton backend allocates inside holds NaN until it is written."""

    def filled(function):
        @functools.wraps(function)
        def call(*args):
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)  # has torch.empty fill its result
            try:
                return function(*args)
            finally:
                torch.use_deterministic_algorithms(before)

        return call

    with mock.patch.object(Run, "__call__", filled(Run.__call__)):
        yield


READ_ONLY = {*Operands._fields, "grad_out"}


@contextlib.contextmanager
def guarded_launches(traffic: dict[str, Traffic] | None = None) -> Iterator[None]:
    """Every launch of the Triton backend inside is guarded; `traffic` takes it by kernel."""
    launch = Launch.__call__

    def checked(self, *arguments):
        read_only = READ_ONLY
        if "grad_out" in self.tensors:  # what the forward saved
            read_only = read_only | {"out", "stats", "tiles"}
        named = {name: x for name, x in zip(self.tensors, arguments) if name is not None}
        count = None
        if traffic is not None:
            count = traffic.setdefault(self.kernel.__name__, Traffic())
        readable = {name: x for name, x in named.items() if name in read_only}
        writable = {name: x for name, x in named.items() if name not in read_only}
        with guarded(readable, writable, count):
            return launch(self, *arguments)

    with mock.patch.object(Launch, "__call__", checked):
        yield
