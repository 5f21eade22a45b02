"""Swin's attention on a CPU: checked, then timed beside its peers and the rates of the machine.

    python -m benchmarks.cpu [--threads 2] [--budget 600] [--csv FILE] [--resume]

The same rows as `benchmarks.gpu`, in fp32: Swin-T's stages at a batch of 8, windows of 256 and 343
tokens, and timm's Swin-T. Bytes are told against a copy, products against sgemm of the same run.
Exit code: 0; 1 where our results failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import models
from benchmarks.attention import RESULTS, Run, Suite, add_options
from benchmarks.cases import cpu_cases, larger_cpu_cases
from benchmarks.device import Cpu
from benchmarks.providers import PROVIDERS
from benchmarks.rows import command_of, facts_of, file_name

# no graphs here, and FlexAttention has no backward
CPU_PROVIDERS = tuple(p for p in PROVIDERS if not p.graph and p.name != "flex")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, budget=600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="*", help="of these alone, and no model")
    parser.set_defaults(command=command_of("benchmarks.cpu", arguments))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = Cpu()
    if options.csv is None:
        options.csv = RESULTS / file_name(facts_of(device), "cpu")
    cases, others, known_models = cpu_cases(), larger_cpu_cases(), models.CPU_MODELS
    if options.cases is not None:
        known = cases | others
        if unknown := set(options.cases) - known.keys():
            raise SystemExit(f"no case {sorted(unknown)}; there are {list(known)}")
        cases, others, known_models = {name: known[name] for name in options.cases}, {}, {}
    suite = Suite(device, cases, others, known_models, CPU_PROVIDERS)
    return Run(suite, options).measure()


if __name__ == "__main__":
    raise SystemExit(main())
