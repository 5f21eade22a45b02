"""The command line: `python -m swin_kernels demo | bench | explain | picture`."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # a mask is float32


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _print(text: str) -> int:
    print(text)
    return 0


def _explanation(options: argparse.Namespace) -> str:
    import swin_kernels

    return swin_kernels.explain()


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
    from swin_kernels.models.biases import learnt_bias
    from swin_kernels.models.checkpoints import read
    from swin_kernels.picture import bias_figure

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
    from swin_kernels import picture
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
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    # matplotlib appends .png to a name without one, and the path returned would be wrong
    figure.savefig(options.out, format=Path(options.out).suffix[1:] or "png")
    return options.out


def _parser() -> argparse.ArgumentParser:
    from swin_kernels.demo import bench, run

    parser = _Parser(prog="python -m swin_kernels", description="Fused shifted-window attention.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="a timm Swin on a photograph, patched against stock")
    run.add_options(demo)
    demo.set_defaults(prepare=run.prepare, run=run.run)

    times = commands.add_parser("bench", help="a timm Swin at a size of your own, timed")
    bench.add_options(times)
    times.set_defaults(prepare=bench.prepare, run=bench.run)

    explain = commands.add_parser("explain", help="backends, and why one cannot run")
    explain.set_defaults(prepare=_explanation, run=_print)

    picture = commands.add_parser(
        "picture", help="shift regions, window masks or a learnt bias as PNG or SVG"
    )
    picture.add_argument("--size", type=int, nargs=2, help="tokens of the map (6 6)")
    picture.add_argument("--window", type=int, nargs="+", help="window (3)")
    picture.add_argument("--shift", type=int, nargs="+", help="shift (2)")
    picture.add_argument("--mask-value", type=_mask_value, help="mask, a number or -inf (-100)")
    picture.add_argument("--only", choices=("regions", "masks"), help="one of the two")
    picture.add_argument(
        "--bias", metavar="CHECKPOINT", help="instead, the position bias of a block in this file"
    )
    picture.add_argument(
        "--block", type=int, nargs=2, metavar=("STAGE", "BLOCK"), help="which (0 0)"
    )
    picture.add_argument(
        "--out",
        metavar="FILE",
        type=_file,
        default="out/shift.png",
        help="PNG, or by its suffix SVG or PDF (out/shift.png)",
    )
    picture.set_defaults(prepare=_picture, run=_print)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        prepared = options.prepare(options)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        parser.error(" ".join(str(error).split()))
    return options.run(prepared)


if __name__ == "__main__":
    sys.exit(main())
