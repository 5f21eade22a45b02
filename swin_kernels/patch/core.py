"""patch, unpatch, patched: stock blocks turned into fused ones by a change of class, and back.

A fused class is a subclass of the stock class that overrides its attention method and holds no
parameter and no buffer, so that state_dict, isinstance, hooks, deepcopy, pickle and torch.compile
go on as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import nn

from swin_kernels.ops.dispatch import check_name, log_once
from swin_kernels.patch.source import fingerprint

# stock class -> our module with its fused subclass, imported when such a class is met
STOCK_CLASSES = {
    "timm.models.swin_transformer.SwinTransformerBlock": "swin_kernels.patch.timm",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": "swin_kernels.patch.timm",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": "swin_kernels.patch.timm",
}


# what of a block is fused: its attention alone, or all that can be
LEVELS = ("attention", "block")
# norm, attention or MLP, stochastic depth and the sum with x
HALVES = ("attention", "MLP")

_numbers = itertools.count()


@dataclass(eq=False)
class Memory:
    """All that a fused block holds beyond its stock attributes; in no state_dict."""

    backend: str | None
    strict: bool = False  # whether running stock is an error
    where: str = ""  # the block's name in the model that was patched, for messages
    level: str = "block"  # how far it is fused: one of LEVELS
    checked: Any = None  # what the fused class has found out about the block, kept between calls
    halves_unknown: str | None = None  # why the source of its halves is none that was tested
    # of this block alone; text, as torch.compile takes numbers for sizes that may change
    key: str = field(default_factory=lambda: str(next(_numbers)))

    def __reduce__(self) -> tuple:
        """A copy, or what is unpickled, is another block's."""
        return Memory, (self.backend, self.strict, self.where, self.level)

    def runs_stock(self, stock: type[nn.Module], reason: str) -> None:
        """Says, once for each reason, that a patched block takes the stock path, or raises."""
        what = f"patched block {self.where or stock.__name__!r} runs stock: {reason}"
        if self.strict:
            raise NotImplementedError(f"{what}; it was patched with strict=True")
        log_once(f"{self.key}: {reason}", what)


class Fused:
    """Base of the fused subclasses, before their stock class in the order of methods.

    A fused class bears the name of its stock class, by which tools find blocks (FSDP's wrapping,
    device maps); its module tells them apart.
    """

    stock: ClassVar[type[nn.Module]]
    known_sources: ClassVar[Mapping[str, str]]  # fingerprint -> the releases that have it

    _swin_kernels: Memory

    @classmethod
    def relied_on(cls) -> tuple[Callable, ...]:
        """The library's functions that the fused method stands for, as they are now."""
        raise NotImplementedError

    @classmethod
    def why_stock(cls, block: Any) -> str | None:
        """Why `block` must take the stock path now, or None; asked on each call."""
        raise NotImplementedError

    @classmethod
    def why_half_stock(cls, block: nn.Module, half: str) -> str | None:
        """Why a half of `block` is not one operation; `half` is one of HALVES.

        Of the attention half attention itself may be fused all the same.
        """
        raise NotImplementedError

    @classmethod
    def note(cls, block: nn.Module) -> str | None:
        """What a user of the fused `block` may not expect, though stock does the same."""
        return None

    def on_patch(self) -> None:
        """Called after the change of class, when `patch` finds the block again, and on a copy."""

    def extra_repr(self) -> str:
        stock = super().extra_repr()  # type: ignore[misc]
        return f"{stock}, swin_kernels" if stock else "swin_kernels"

    @classmethod
    def why_unknown(cls) -> str | None:
        """Why the source of the stock class is not one that was tested, or None."""
        found = fingerprint(cls.relied_on())
        if found in cls.known_sources:
            return None
        tested = ", ".join(sorted(set(cls.known_sources.values())))
        what = "cannot be read" if found is None else f"has fingerprint {found}"
        return (
            f"the source of {cls.stock.__name__} {what} and is not one of those tested "
            f"({tested}): it was changed, or comes from another release"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # pickled beside another release of the library
        if (reason := self.why_unknown()) is not None:
            _to_stock(self)
            warnings.warn(f"swin_kernels: unpickled as a stock block: {reason}", stacklevel=2)
        else:
            self.on_patch()


def _to_stock(block: Any) -> None:
    block.__class__ = block.stock
    del block._swin_kernels


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, by names as in `model.named_modules()`: '' is the model itself."""

    replaced: tuple[str, ...] = ()  #: blocks that now run fused
    already_patched: tuple[str, ...] = ()  #: blocks that ran fused before
    left: dict[str, str] = field(default_factory=dict)  #: name -> why it keeps the stock path
    notes: dict[str, str] = field(default_factory=dict)  #: name -> what may surprise a user
    #: "attention" and "MLP", each with the blocks whose half, with its norm, is one operation
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: for each half, why it is not in the other blocks, by their names
    halves_left: dict[str, dict[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.in_short()]
        lines += grouped("replaced", dict.fromkeys(self.replaced, ""))
        lines += grouped("already patched", dict.fromkeys(self.already_patched, ""))
        lines += grouped("left on the stock path", self.left)
        for half, left in self.halves_left.items():
            lines += grouped(f"{half} half not whole", left)
        lines += grouped("note", self.notes)
        return "\n".join(lines)

    def in_short(self) -> str:
        """A line: how many blocks, and how many of their halves are one operation."""
        total = len(self.replaced) + len(self.already_patched) + len(self.left)
        told = [f"window attention replaced in {len(self.replaced)} of {total} blocks"]
        return "; ".join(told + self.of_halves())

    def of_halves(self) -> list[str]:
        """In words, how many halves are one operation."""
        told = [f"{len(names)} {half} halves" for half, names in self.halves.items()]
        return [f"whole sublayers: {', '.join(told)}"] if told else []


def grouped(title: str, entries: Mapping[str, str]) -> list[str]:
    """One line for each text of `entries`, with the names that share it."""
    names: dict[str, list[str]] = {}
    for name, text in entries.items():
        names.setdefault(text, []).append(name or "(the model itself)")
    return [
        f"  {title}: {', '.join(who)}" + (f": {text}" if text else "")
        for text, who in names.items()
    ]


class Found(NamedTuple):
    """A block of a stock class, or of a subclass of one, in a model."""

    name: str
    block: Any
    fused: type[Fused]
    patched: bool
    reason: str | None  # why it takes the stock path as it is now

    def why_half_stock(self, half: str) -> str | None:
        if not self.patched and self.reason is not None:
            return self.reason
        return self.fused.why_half_stock(self.block, half)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _inspect_block(name: str, block: nn.Module, stock: str) -> Found:
    module = importlib.import_module(STOCK_CLASSES[stock])
    fused: type[Fused] = getattr(module, stock.rpartition(".")[2])
    if isinstance(block, Fused):
        return Found(name, block, fused, True, fused.why_stock(block))
    if type(block) is not fused.stock:
        reason: str | None = (
            f"{_qualified(type(block))} is a subclass of {fused.stock.__name__}, "
            "whose methods it may have changed"
        )
    else:
        reason = fused.why_unknown() or fused.why_stock(block)
    return Found(name, block, fused, False, reason)


def _expect_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}")


def survey(model: nn.Module) -> list[Found]:
    """Every block of the model that is looked for; ValueError if there is none. Changes nothing."""
    _expect_module(model)
    found = []
    for name, module in model.named_modules():
        stock = next(
            (q for cls in type(module).__mro__ if (q := _qualified(cls)) in STOCK_CLASSES), None
        )
        if stock is not None:
            found.append(_inspect_block(name, module, stock))
    if not found:
        came = sorted(
            {type(module).__name__ for module in model.modules()} - {type(model).__name__}
        )
        raise ValueError(
            f"no window attention found to replace in {_qualified(type(model))}; looked for blocks "
            f"of the classes {', '.join(STOCK_CLASSES)}; came: {', '.join(came) or 'no submodules'}"
        )
    return found


def report_on(found: list[Found]) -> PatchReport:
    """What `patch` would do with these blocks."""
    return PatchReport(
        replaced=tuple(f.name for f in found if not f.patched and f.reason is None),
        already_patched=tuple(f.name for f in found if f.patched),
        left={f.name: f.reason for f in found if not f.patched and f.reason is not None},
        notes={f.name: n for f in found if f.reason is None and (n := f.fused.note(f.block))},
        **halves_of(found),
    )


def halves_of(found: list[Found]) -> dict[str, Any]:
    """What a report says of halves, of blocks as they are now."""
    fused = [f for f in found if f.patched or f.reason is None]
    reasons = {half: {f.name: f.why_half_stock(half) for f in fused} for half in HALVES}
    whole = {half: tuple(n for n, why in r.items() if why is None) for half, r in reasons.items()}
    left = {half: {n: why for n, why in r.items() if why} for half, r in reasons.items()}
    return {"halves": whole, "halves_left": left}


def patch(
    model: nn.Module, *, backend: str | None = None, strict: bool = False, level: str = "block"
) -> PatchReport:
    """Run every supported block of `model` fused, in place: its window attention, or whole halves.

    Outputs and gradients are those of the stock model; roll, pad and partition are gone. Each block
    changes its class to a subclass of its own, which `unpatch` undoes. A block that is not exactly
    what was tested (a subclass, changed source, hooks on its attention) is left as it is, with a
    warning and the reason in the report. A patched block whose attention gets a hook later takes
    the stock path for as long as the hook is there; the log `swin_kernels` says so once, with the
    reason.

    Each half of a block, with its norm, stochastic depth and sum, is one operation where all in it
    is plain (LayerNorm, linear layers, an activation that is known, no dropout between, no hooks)
    and where a fused kernel is faster than its modules: now on CPUs with AVX2 or AVX-512. Elsewhere
    attention alone is fused, whatever `strict` says; the report tells how far each block went, and
    why not farther.

    Args:
        model: any module that holds blocks of the classes in docs/compatibility.md.
        backend: passed to each call of the operation and kept by each block: None chooses per call,
            a name never falls back. On a block already patched it replaces the backend asked for
            before, as does `strict`.
        strict: a block that cannot be replaced is an error, and so is a call of a patched block
            that would take the stock path (NotImplementedError). Recording for another runtime
            (TorchScript, FX, ONNX), which always takes stock operators, is not.
        level: "block" fuses all that can be, "attention" attention alone.

    Returns:
        What became of each block; its `str` is for a person.

    Raises:
        ValueError: not a module, an unknown backend or level, nothing to replace in it, or with
            `strict` a block that cannot be; the model is then unchanged.
    """
    if backend is not None:
        check_name(backend)
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    found = survey(model)
    report = report_on(found)
    stock = {f.name: f.reason for f in found if f.reason is not None}
    if strict and stock:
        lines = "\n".join(grouped("stays on the stock path", stock))
        raise ValueError(f"patch with strict=True: not every block can run fused\n{lines}")
    for name, block, fused, is_patched, reason in found:
        if is_patched:
            block._swin_kernels.backend = backend
            block._swin_kernels.strict = strict
            block._swin_kernels.level = level
            block.on_patch()
        elif reason is None:
            block._swin_kernels = Memory(backend, strict, name, level)
            block.__class__ = fused
            block.on_patch()
    report = dataclasses.replace(report, **halves_of(found))  # with this backend and level
    if report.left:
        lines = "\n".join(grouped("left on the stock path", report.left))
        warnings.warn(f"swin_kernels.patch: not every block was replaced\n{lines}", stacklevel=2)
    return report


def _fused_blocks(model: nn.Module) -> dict[str, Any]:
    _expect_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, Fused)}


def _restore(blocks: Mapping[str, Any]) -> None:
    for name, block in blocks.items():
        if "stock" not in vars(type(block)):  # a fused class has its own, a subclass of it does not
            raise ValueError(
                f"{name!r} is now a {_qualified(type(block))}: its class was changed after patch; "
                "undo that first"
            )
    for block in blocks.values():
        _to_stock(block)


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Give every patched block of `model` its stock class back.

    Returns:
        The names of these blocks, () where none was patched.

    Raises:
        ValueError: not a module, or the class of a block was changed again after `patch` (as FSDP2
            does): undo that first. Nothing is then changed.
    """
    blocks = _fused_blocks(model)
    _restore(blocks)
    return tuple(blocks)


@contextlib.contextmanager
def patched(
    model: nn.Module, *, backend: str | None = None, strict: bool = False, level: str = "block"
) -> Iterator[PatchReport]:
    """`with patched(model):` is `patch` on entry, and on exit the undoing of what it changed.

    Arguments are those of `patch`.

    Yields:
        The report of `patch`.

    Raises:
        ValueError: as `patch` on entry and `unpatch` on exit.
    """
    before = {
        block: (memory.backend, memory.strict, memory.level)
        for block in _fused_blocks(model).values()
        for memory in (block._swin_kernels,)
    }
    report = patch(model, backend=backend, strict=strict, level=level)
    try:
        yield report
    finally:
        blocks = _fused_blocks(model)
        for block in blocks.values():
            if block in before:
                memory = block._swin_kernels
                memory.backend, memory.strict, memory.level = before[block]
        _restore({name: block for name, block in blocks.items() if block not in before})
