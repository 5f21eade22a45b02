"""The command line: `python -m swin_kernels demo | explain | picture`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _run_demo(prepared: Any) -> int:
    from swin_kernels.demo import run

    return run.run(prepared)


def _print(text: str) -> int:
    print(text)
    return 0


def _explanation(options: argparse.Namespace) -> str:
    import swin_kernels

    return swin_kernels.explain()


def _picture(options: argparse.Namespace) -> str:
    """Writes the picture; returns its path."""
    from swin_kernels.geometry import Grid
    from swin_kernels.picture import shift_figure

    window = options.window if len(options.window) > 1 else options.window[0]
    shift = options.shift if len(options.shift) > 1 else options.shift[0]
    figure = shift_figure(Grid.checked(options.size, window, shift), options.mask_value)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)
    return options.out


def _parser() -> argparse.ArgumentParser:
    from swin_kernels.demo.run import add_options, prepare

    parser = _Parser(prog="python -m swin_kernels", description="Fused shifted-window attention.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="a timm Swin on a photograph, patched against stock")
    add_options(demo)
    demo.set_defaults(prepare=prepare, run=_run_demo)

    explain = commands.add_parser("explain", help="backends, and why one cannot run")
    explain.set_defaults(prepare=_explanation, run=_print)

    picture = commands.add_parser("picture", help="shift regions and window masks as a PNG")
    picture.add_argument(
        "--size", type=int, nargs=2, default=(6, 6), help="tokens of the map (6 6)"
    )
    picture.add_argument("--window", type=int, nargs="+", default=(3,), help="window (3)")
    picture.add_argument("--shift", type=int, nargs="+", default=(2,), help="shift (2)")
    picture.add_argument("--mask-value", type=float, default=-100.0, help="mask (-100)")
    picture.add_argument("--out", default="out/shift.png", help="file to write (out/shift.png)")
    picture.set_defaults(prepare=_picture, run=_print)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        prepared = options.prepare(options)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        parser.error(" ".join(str(error).split()))
    return options.run(prepared)


if __name__ == "__main__":
    sys.exit(main())
