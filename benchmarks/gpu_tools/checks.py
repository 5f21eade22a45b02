"""Before anything is timed: are the kernels right on this GPU, and the same each time?

    python -m benchmarks.gpu_tools.checks [--csv FILE] [--rehearse]

Each case runs in a process of its own, side by side, forward and backward: first as Triton
launches, then as repeated calls are launched. The error rule is that of the benchmark, against
float64; then REPEATS more runs are to give the same bits. Exit code: 1 where a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.baselines.providers import Attend, ours
from benchmarks.cases import check_cases, toy_cases
from benchmarks.device import Cuda, Device, DryRunDevice
from benchmarks.report.rows import ResultsFile, Row, facts_of
from benchmarks.timing import Gate, Inputs, make_inputs, reason_of
from swin_kernels.backends.triton import launcher
from swin_kernels.ops import repeated
from swin_kernels.testing import Case

REPEATS = 20
WAYS = ("plain launch", "fast path")


@contextlib.contextmanager
def plain_launches() -> Iterator[None]:
    """Inside it every kernel is launched by Triton, as its first launch is."""
    with (
        mock.patch.object(launcher, "current_stream", return_value=None),
        mock.patch.object(repeated, "find", return_value=None),
    ):
        yield


def results(attend: Attend, inputs: Inputs) -> list[Tensor]:
    """Output of inference, then output and gradients of training."""
    with torch.no_grad():
        alone = attend(*inputs.plain)
    out = attend(*inputs[:3])
    return [alone, out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]


def check(name: str, case: Case, device: Device, repeats: int) -> Iterator[Row]:
    """Rows of a case, for both ways to launch; the last number is how many runs were the same."""
    inputs, attend = make_inputs(case, device, 0), ours(case, device)
    gate = Gate(case, device, inputs)
    for way in WAYS:
        with plain_launches() if way == WAYS[0] else contextlib.nullcontext():
            errors, note = {}, ""
            try:
                errors = gate.check(attend, 2.0)
            except AssertionError as error:
                note = reason_of(error)
            first = results(attend, inputs)
            for i in range(repeats):
                again = results(attend, inputs)
                if not all(torch.equal(a, b) for a, b in zip(first, again)):
                    note = f"run {i + 2} gave other bits; {note}"
                    break
        for direction in ("forward", "backward"):
            error = errors.get(direction)
            yield Row(name, way, direction, samples=repeats, error=error, note=note)


def _device(rehearse: bool) -> Device:
    return DryRunDevice() if rehearse else Cuda()


def _run(name: str, case: Case, rehearse: bool, pipe: Connection) -> None:
    """A process of its own: a case that breaks the device breaks no other."""
    try:
        torch.set_num_threads(1)
        for row in check(name, case, _device(rehearse), 2 if rehearse else REPEATS):
            pipe.send(row)
    except Exception as error:
        traceback.print_exc()
        pipe.send(Row(name, WAYS[0], "forward", note=reason_of(error)))
    finally:
        pipe.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="where the rows go")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    options = parser.parse_args(arguments)
    cases = toy_cases() if options.rehearse else check_cases()
    # forked: torch is imported once; no process has touched the device before
    context = multiprocessing.get_context("fork")
    running = {}
    for name, case in cases.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(name, case, options.rehearse, sender))
        process.start()
        sender.close()
        running[receiver] = (name, process)
    facts = facts_of(_device(options.rehearse))
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with contextlib.suppress(OSError):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    results_file, failed = ResultsFile(options.csv, facts), False
    while running:
        for receiver in multiprocessing.connection.wait(list(running)):
            name, process = running[receiver]
            try:
                row = receiver.recv()
            except EOFError:
                process.join()
                del running[receiver]
                if not process.exitcode:
                    continue
                note = f"the process ended with exit code {process.exitcode}"
                row = Row(name, WAYS[0], "forward", note=note)
            failed |= bool(row.note)
            results_file.add(row)
            print(
                f"{row.case}: {row.provider}: {row.direction}: {row.error} {row.note}", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
