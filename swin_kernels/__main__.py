"""The command line: `python -m swin_kernels demo | bench | explain | picture`."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import swin_kernels

BAD_INPUT, INTERRUPTED = 2, 130
_NO_MEMORY = "out of memory|allocate memory|size calculation overflowed"
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # a mask is float32


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.stop(f"{message}; `{self.prog} --help` lists the options")

    def stop(self, message: str, code: int = BAD_INPUT) -> NoReturn:
        self.exit(code, f"{self.prog}: {' '.join(message.split())}\n")


def _print(text: str) -> int:
    print(text)
    return 0


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _mask_value(text: str) -> float:
    """A float32 or -inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value != -math.inf and not abs(value) <= _FLOAT32_MAX:
        raise argparse.ArgumentTypeError(f"expected a float32 number or -inf, got {text!r}")
    return value


def _file(text: str) -> str:
    if not text or text.endswith(os.sep) or Path(text).is_dir():
        got = f"the directory {text!r}" if text else "an empty name"
        raise argparse.ArgumentTypeError(f"expected a file to write, such as x.png, got {got}")
    return text


def _joined(arguments: list[str]) -> list[str]:
    """`--mask-value -inf` as `--mask-value=-inf`: argparse takes -inf and -1e3 for options."""
    joined: list[str] = []
    for argument in arguments:
        option = joined[-1] if joined else ""
        negative = re.match(r"-(\.?\d|inf|nan)", argument, re.IGNORECASE)
        if negative and len(option) > 3 and "--mask-value".startswith(option):
            joined[-1] = f"{option}={argument}"
        else:
            joined.append(argument)
    return joined


def _bias_figure(options: argparse.Namespace):
    """Of a block's bias in a checkpoint."""
    from swin_kernels.cli.picture import bias_figure
    from swin_kernels.models.biases import learnt_bias
    from swin_kernels.models.checkpoints import read

    window = None if options.window is None else _two(options.window)
    stage, block = options.block or (0, 0)
    bias = learnt_bias(read(options.bias), stage, block, window)
    return bias_figure(bias, f"Stage {stage}, block {block} of {Path(options.bias).name}")


def _without(options: argparse.Namespace, given: str, *names: str) -> None:
    """ValueError if an option of these was given too, that would be ignored."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {given}")


def _two(values: list[int]) -> list[int]:
    """One number for both axes, or one for each."""
    return values * 2 if len(values) == 1 else values


def _picture(options: argparse.Namespace) -> str:
    """Writes the picture; returns its path."""
    from swin_kernels.cli import picture
    from swin_kernels.geometry import Grid

    if options.bias is not None:
        _without(options, "--bias", "size", "shift", "mask_value", "only")
        figure = _bias_figure(options)
    else:
        _without(options, "no --bias", "block")
        window = _two(options.window or [3])
        grid = Grid.checked(options.size or (6, 6), window, _two(options.shift or [2]))
        masks = [] if options.mask_value is None else [options.mask_value]
        if options.only == "regions":
            figure = picture.region_figure(grid)
        elif options.only == "masks":
            figure = picture.mask_figure(grid, *masks)
        else:
            figure = picture.shift_figure(grid, *masks)
    try:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        # matplotlib appends .png to a name without one, and the path returned would be wrong
        figure.savefig(options.out, format=Path(options.out).suffix[1:] or "png")
    except OSError as error:
        raise ValueError(
            f"--out: cannot write {options.out!r}: {error.strerror}; name another file"
        ) from error
    return options.out


def _parser() -> _Parser:
    from swin_kernels.cli import bench, demo

    parser = _Parser(prog="python -m swin_kernels", description="Fused shifted-window attention.")
    commands = parser.add_subparsers(title="commands", metavar="command")

    def add(name: str, text: str, prepare: Callable, run: Callable) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(parser=added, prepare=prepare, run=run)
        return added

    text = "a timm Swin on a photo, stock against patched"
    demo.add_options(add("demo", text, demo.prepare, demo.run))
    text = "a model and size of your own, stock against patched"
    bench.add_options(add("bench", text, bench.prepare, bench.run))
    add("explain", "backends, and why one cannot run", lambda _: swin_kernels.explain(), _print)
    text = "shift regions, window masks or a learnt bias as PNG or SVG"
    picture = add("picture", text, _picture, _print)
    picture.add_argument(
        "--size", type=_whole, nargs=2, metavar="N", help="tokens of the map (default: 6 6)"
    )
    picture.add_argument(
        "--window", type=_whole, nargs="+", metavar="N", help="window size (default: 3)"
    )
    picture.add_argument("--shift", type=_whole, nargs="+", metavar="N", help="(default: 2)")
    picture.add_argument(
        "--mask-value", type=_mask_value, metavar="X", help="number or -inf (default: -100)"
    )
    picture.add_argument("--only", choices=("regions", "masks"), help="one of the two")
    picture.add_argument(
        "--bias", metavar="CHECKPOINT", help="instead, the position bias of a block in this file"
    )
    picture.add_argument(
        "--block", type=_whole, nargs=2, metavar=("STAGE", "BLOCK"), help="which (default: 0 0)"
    )
    picture.add_argument(
        "--out",
        metavar="FILE",
        type=_file,
        default="out/shift.png",
        help="PNG, or by its suffix SVG or PDF (default: out/shift.png)",
    )
    return parser


def _in_words(error: Exception) -> str:
    """What an error says; of a file, its name first and no number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    arguments = _joined(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr.isatty() and arguments[:1] in (["demo"], ["bench"]):
        # torch and timm take seconds; the next line, whatever it is, is longer and takes its place
        print("loading …", end="\r", file=sys.stderr, flush=True)
    commands = _parser()
    options, unknown = commands.parse_known_args(arguments)
    parser: _Parser = getattr(options, "parser", commands)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "prepare" not in options:
        parser.error("expected a command: demo, bench, explain or picture")
    try:
        try:
            prepared = options.prepare(options)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            parser.stop(_in_words(error))
        return options.run(prepared)
    except KeyboardInterrupt:
        parser.stop("interrupted", INTERRUPTED)
    except OSError as error:
        parser.stop(_in_words(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(_NO_MEMORY, str(error)):
            raise
        parser.stop(f"not enough memory: expected a smaller --batch or --size ({error})")


if __name__ == "__main__":
    sys.exit(main())
