"""Swin's attention and whole models on a CPU: checked, then timed beside peers.

    python -m benchmarks.cpu [--threads 2] [--budget 600] [--csv FILE] [--resume]
    python -m benchmarks.cpu --models               # whole models alone
    python -m benchmarks.cpu --sweep batch|resolution|window
    python -m benchmarks.cpu --dtype bf16

The same rows as `benchmarks.gpu`, in fp32 if not told otherwise: Swin-T's stages at a batch of 8,
larger windows, cosine attention, an odd number of channels, and timm's Swin-T, which ONNX Runtime
and OpenVINO run as well where they are installed. Bytes are held against a copy, products against a
large matrix product of the same dtype, timed in turn with the calls. A sweep varies one size of the
first stage alone; that of resolution times attention over all tokens as well, forward, which has no
error gate, as it computes another function. Exit code: 0; 1 where our results failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import models
from benchmarks.baselines.providers import PROVIDERS
from benchmarks.baselines.runtimes import RUNTIMES
from benchmarks.cases import cpu_cases, other_cpu_cases
from benchmarks.device import Cpu, keep_freed_memory
from benchmarks.report.rows import command_of, facts_of, file_name
from benchmarks.suite import RESULTS, Run, Suite, add_options
from benchmarks.sweeps import UNITS, compared, sweeps
from swin_kernels.cli.command import keep_compiled_apart, threads
from swin_kernels.testing.cases import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype != torch.float64}
# no graphs here, and FlexAttention has no backward
CPU_PROVIDERS = tuple(
    p._replace(backward=p.backward and p.name != "flex") for p in PROVIDERS if not p.graph
)
CPU_FORMS = (*models.FORMS, *RUNTIMES)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, budget=3000, limit=10)
    parser.add_argument("--threads", type=threads, default=torch.get_num_threads())
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--cases", nargs="*", help="of these alone, and no model")
    chosen.add_argument("--models", nargs="*", help="these whole models alone, or all of them")
    chosen.add_argument("--sweep", choices=UNITS, help="this size varied, and nothing else")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of everything (fp32)")
    parser.set_defaults(command=command_of("benchmarks.cpu", arguments))
    options = parser.parse_args(arguments)
    for name, known in (("cases", cpu_cases() | other_cpu_cases()), ("models", models.CPU_MODELS)):
        if unknown := set(getattr(options, name) or ()) - known.keys():
            parser.error(f"--{name}: expected of {list(known)}, got {sorted(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = Cpu(DTYPES[options.dtype])
    if options.csv is None:
        what = [options.sweep] if options.sweep else []
        what += ["models"] if options.models is not None else []
        what += [options.dtype] if device.dtype != torch.float32 else []
        options.csv = RESULTS / file_name(facts_of(device), "-".join(["cpu", *what]))
    cases, others, known_models = cpu_cases(), other_cpu_cases(), models.CPU_MODELS
    providers = CPU_PROVIDERS
    if options.cases is not None:
        cases = {name: (cases | others)[name] for name in options.cases}
        others, known_models = {}, {}
    elif options.models is not None:
        cases, others = {}, {}
        known_models = {name: known_models[name] for name in options.models or known_models}
    elif options.sweep is not None:
        cases, others, known_models = sweeps()[options.sweep], {}, {}
        providers = compared(options.sweep, providers)
    cases, others = (
        {name: case.but(dtype=device.dtype) for name, case in x.items()} for x in (cases, others)
    )
    suite = Suite(device, cases, others, known_models, providers, CPU_FORMS)
    return Run(suite, options).measure()


if __name__ == "__main__":
    keep_freed_memory()
    keep_compiled_apart()
    raise SystemExit(main())
