"""Swin's attention on one GPU: checked, then timed beside its peers and the floor of its memory.

    python -m benchmarks.gpu [--budget 300] [--csv FILE] [--resume] [--rehearse]
    python -m benchmarks.gpu [--cases NAME …] [--models …] [--providers …] [--forms …]
    python -m benchmarks.gpu --sweep batch|resolution|window

Rows go into the CSV as they are known. `--warm` compiles the work into the caches on disk, and
times nothing. `--rehearse` is the same program on toy sizes
and a CPU, under TRITON_INTERPRET=1. Exit code: 0; 1 where our results or launches failed; 75 where
the device is beyond use for this process, and another one can `--resume`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from benchmarks import models
from benchmarks.baselines.providers import GPU_PROVIDERS
from benchmarks.cases import other_cases, swin_cases, toy_cases
from benchmarks.device import Cuda, DryRunDevice
from benchmarks.gpu_tools.targets import verdicts
from benchmarks.report.rows import command_of, facts_of, file_name
from benchmarks.suite import RESULTS, TRY_AGAIN, Run, Suite, add_choices, add_options
from benchmarks.sweeps import GPU_IMAGES, UNITS, compared, sweeps
from benchmarks.timing import Loop, make_inputs, reason_of


def suite_of(options: argparse.Namespace) -> Suite:
    if options.rehearse:
        return Suite(DryRunDevice(), toy_cases(), {}, models.TOYS, GPU_PROVIDERS)
    if options.sweep is not None:
        device = Cuda()
        varied = sweeps(GPU_IMAGES)[options.sweep]
        cases = {name: case.but(dtype=device.dtype) for name, case in varied.items()}
        return Suite(device, cases, {}, {}, compared(options.sweep, GPU_PROVIDERS))
    return Suite(Cuda(), swin_cases(), other_cases(), models.MODELS, GPU_PROVIDERS)


def warm(suite: Suite) -> None:
    """Compile into the caches on disk; nothing is checked or timed."""
    device, cases, known_models = suite.device, suite.cases | suite.others, suite.models
    # models first: they take longest
    work = [(name, form) for name in known_models for form in suite.forms if "," in form]
    work += [(name, p.name) for name in cases for p in suite.providers if not p.graph]
    for name, what in work:
        start = time.perf_counter()
        try:
            torch._dynamo.reset()
            if name in known_models:
                models.Models(name, device, known_models).warm(what)
            else:
                provider = next(p for p in suite.providers if p.name == what)
                inputs = make_inputs(cases[name], device, 0)
                Loop(provider.make(cases[name], device), [inputs]).warm()
            device.release()
            print(f"{name}: {what}: {time.perf_counter() - start:.1f} s", flush=True)
        except Exception as error:  # the run itself will say so in its rows
            print(f"{name}: {what}: {reason_of(error)}", flush=True)
            if device.broken():
                raise SystemExit(TRY_AGAIN) from error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, budget=300, limit=3)
    add_choices(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    chosen.add_argument("--sweep", choices=UNITS, help="this size varied, and nothing else")
    parser.add_argument("--warm", action="store_true", help="compile the work, time nothing")
    parser.set_defaults(command=command_of("benchmarks.gpu", arguments))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    suite = suite_of(options).only(options)
    if options.warm:
        warm(suite)
        return 0
    if options.rehearse:
        options.rounds, options.model_rounds = 1, 1
    if options.csv is None and options.sweep is not None:
        options.csv = RESULTS / file_name(facts_of(suite.device), f"gpu-{options.sweep}")
    run = Run(suite, options)
    code = run.measure()
    print(*verdicts(run.results_file.rows), sep="\n", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
