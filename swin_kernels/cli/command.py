"""What the commands that measure share: checks of options, the machine in words, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import swin_kernels
from swin_kernels.backends import native
from swin_kernels.cli import memory
from swin_kernels.testing import timing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_ACTIVATIONS = 10  # times the images, at the least: the first MLP of a Swin-T alone makes it 8
_FIRST_LINE = 30.0  # s; the next comes after three times as long


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    # OpenMP crashes the process when the system refuses it a thread
    count, most = positive(text), os.cpu_count() or 1
    if count > most:
        raise argparse.ArgumentTypeError(
            f"expected at most {most}, the CPUs of this machine, got {text!r}"
        )
    return count


def add_options(parser: argparse.ArgumentParser, more_models: str = "") -> None:
    """Those that the commands have in common."""
    model = "swin_tiny_patch4_window7_224"
    parser.add_argument(
        "--model", default=model, help=f"name of a Swin in timm{more_models} (default: {model})"
    )
    parser.add_argument(
        "--batch", type=positive, metavar="B", default=4, help="images in a batch (default: 4)"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=7, help="timed calls of each (default: 7)"
    )
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads (default: torch's)"
    )
    parser.add_argument(
        "--device", metavar="NAME", default="cpu", help="cpu, cuda or cuda:N (default: cpu)"
    )


def check_packages(needs: Mapping[str, str], command: str) -> None:
    """ImportError says which of `needs`, pip's names by what is imported, are missing."""
    missing = [pip for name, pip in needs.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def inductor_cache(*more: str) -> str:
    """A folder for what torch.compile makes, by vector code and torch's version.

    Inductor's own key leaves the vector code out: it would run here what it made for others, with
    wrong results and broken memory.
    """
    parts = (torch.backends.cpu.get_cpu_capability(), torch.__version__, *more)
    return os.path.join(tempfile.gettempdir(), "_".join(("swin_kernels_inductor", *parts)))


def keep_compiled_apart() -> None:
    """Has torch.compile use `inductor_cache`, where the user named no folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", inductor_cache())


def usable_device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device: cannot use {name!r}: expected cpu, cuda or cuda:N")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"--device: cannot use {name!r}: {cause}; --device cpu can run") from error
    return torch.device(name)


def check_batch(batch: int, height: int, width: int, device: torch.device) -> None:
    """ValueError for a batch that is sure not to fit: the activations are larger than the images.

    What passes may still be too large for a model.
    """
    image = 3 * height * width * 4
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = memory // (_ACTIVATIONS * image)
    if batch > most:
        raise ValueError(
            f"--batch: {batch} images of {height}×{width} do not fit into {memory / 1e9:.0f} GB of "
            f"memory; expected at most {most}"
        )


def processor() -> str:
    """The name of the CPU, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name[^:]*:(.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def machine(images: Tensor, backend: str) -> str:
    """What the figures were measured with, in a line; `backend` is the one that ran."""
    threads = torch.get_num_threads()
    vector = f" ({native.cpu_capability()})" if backend == "cpu" else ""
    parts = [f"{processor()}, {os.cpu_count()} CPUs"]
    if images.is_cuda:
        parts.append(torch.cuda.get_device_name(images.device))
    parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    parts.append(f"torch {torch.__version__}")
    parts.append(f"swin_kernels {swin_kernels.__version__}")
    return " · ".join([*parts, f"backend {backend}{vector}"])


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def make_console() -> Console:
    """As wide as the tables where the output is a file."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    return Console(width=width, highlight=False, markup=False)


class Bar:
    """A progress bar drawn when told to: a thread would take time from what is measured.

    Without a terminal it is a line after 30 s, 90 s, 270 s, ….
    """

    def __init__(self, console: Console, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps)
        self.start, self.due = time.monotonic(), _FIRST_LINE

    def say(self, what: str) -> None:
        self.progress.update(self.task, description=f"{what:<26}")
        self._show()

    def tick(self) -> None:
        self.progress.advance(self.task)
        self._show()

    @contextlib.contextmanager
    def untimed(self, what: str) -> Iterator[None]:
        """One step, in which nothing is timed: the clock goes on."""
        done = threading.Event()

        def show() -> None:
            while not done.wait(0.5):
                self._show()

        self.say(what)
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.tick()

    def _show(self) -> None:
        self.progress.refresh()
        seconds = time.monotonic() - self.start
        if self.progress.disable and seconds > self.due:
            task = self.progress.tasks[0]
            what = f"{task.description.strip()}, step {task.completed:.0f} of {task.total:.0f}"
            self.progress.console.print(f"{what}, {seconds:.0f} s")
            self.due *= 3


@contextlib.contextmanager
def progress(console: Console, rounds: int) -> Iterator[Bar]:
    """Of what `judged` runs, of `rounds` timed calls of stock and patched, and of `peaks_of`."""
    bar = Bar(console, 3 + len(timing.STEPS) * 2 * (rounds + 1) + 1)
    with bar.progress:
        yield bar


def peaks_of(spec: memory.Spec, bar: Bar) -> tuple[dict[str, dict[str, int]], list[str]]:
    """`memory.peak_memory` of stock and patched; if it fails none, and a remark that says why."""
    try:
        with bar.untimed("peak memory"):
            return memory.peak_memory(spec, ("stock", "patched")), []
    except RuntimeError as error:
        return {}, [f"Peak memory could not be measured: {error}"]


def make_table(first: str, *numbers: str, no_wrap: bool = False) -> Table:
    """A table in Markdown: a column of names, columns of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=no_wrap)
    return table


def numbers_table(differences: list[timing.Difference]) -> Table:
    titles = ("patched − stock", "stock − float64", "patched − float64")
    table = make_table("max. difference", *titles)
    for d in differences:
        values = (d.patched_stock, d.stock_exact, d.patched_exact)
        cells = [
            f"{x:.1e}" if d.largest == 1.0 else f"{x:.1e} ({x / d.largest:.1e})" for x in values
        ]
        table.add_row(d.name, *cells, style="red" if d.complaint else None)
    return table


def judged(
    modules: Mapping[str, nn.Module], images: Tensor, bar: Bar
) -> tuple[list[timing.Difference], timing.Outcome]:
    """Differences of `modules["patched"]` from stock, and stock's exact outcome."""
    outcomes = {}
    for name in ("patched", "stock"):
        with bar.untimed(f"gradients of {name}"):
            outcomes[name] = timing.run_once(modules[name], images)
    with bar.untimed("gradients in float64"):
        exact = timing.run_once(copy.deepcopy(modules["stock"]).double(), images)
        return timing.compare(outcomes["patched"], outcomes["stock"], exact), exact


def tell_verdict(console: Console, differences: list[timing.Difference]) -> bool:
    """Whether the differences keep the error rule, said in words."""
    complaints = [d.complaint for d in differences if d.complaint]
    for complaint in complaints:
        console.print(f"beyond the error rule: {complaint}", style="bold red", soft_wrap=True)
    if not complaints:
        console.print(
            "Within the error rule: the error against float64 is at most twice stock's, plus one "
            "ulp.",
            style="green",
        )
    return not complaints
