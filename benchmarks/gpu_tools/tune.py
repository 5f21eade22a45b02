"""Layouts of the Triton kernels, measured: writes swin_kernels/backends/triton/tuned.json.

    python -m benchmarks.gpu_tools.tune [--budget 300] [--cases T1 V2] [--out FILE] [--rehearse]

For each kernel of each case the fields of its layout are varied, a group at a time, from the best
so far; one that breaks the error rule or does not compile is left out and said. What was measured
before stays in the table, unless it was measured again. Every layout's time is a row of a CSV file
in the folder tuning, beside the table or, where that is the package's own, in benchmarks/results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.baselines.providers import ours
from benchmarks.cases import other_cases, swin_cases, toy_cases
from benchmarks.device import Cuda, Device, DryRunDevice
from benchmarks.gpu_tools.override import override
from benchmarks.report.rows import RESULTS, ResultsFile, Row, facts_of
from benchmarks.suite import TRY_AGAIN
from benchmarks.timing import Gate, Loop, Timed, make_sets, passes_of, reason_of
from swin_kernels.backends.triton import config, plan
from swin_kernels.backends.triton.launch_spec import Call, Config, Gpu
from swin_kernels.testing import Case

COPY_RATE = 4e12  # bytes a second, of the order of a data-centre GPU: for counts of passes
ROUNDS = 7
GAIN = 0.99  # of the best so far that a change must reach: less is noise

WARPS_AND_STAGES = {"num_warps": (1, 2, 4, 8), "loop_stages": (1, 2, 3)}
PROGRAMS = {"programs_per_multiprocessor": (1, 2, 3, 4, 8)}
# an expanded bias is padded to LARGEST_BLOCK, of a forward to its queries: tiles must divide it
BLOCKS = {
    side: tuple(b for b in (16, 32, 64, 128) if b <= config.LARGEST_BLOCK)
    for side in ("block_m", "block_n")
}
Groups = dict[str, tuple[dict[str, tuple[int, ...]], ...]]
# what is varied together, in this order
GROUPS: Groups = {
    "forward": (WARPS_AND_STAGES, PROGRAMS),
    "backward": (WARPS_AND_STAGES, PROGRAMS, {"holds_bias": (False, True)}),
    "tiled_forward": (BLOCKS | {"block_m": (32, 64, config.MOST_QUERIES)}, WARPS_AND_STAGES),
    "dq": (BLOCKS, WARPS_AND_STAGES),
    "dkv": (BLOCKS, WARPS_AND_STAGES),
    "dbias": (BLOCKS, WARPS_AND_STAGES, PROGRAMS),
}
TOY_GROUPS = {
    "forward": ({"num_warps": (1, 2)}, {"programs_per_multiprocessor": (2,)}),
    "backward": ({"programs_per_multiprocessor": (2,)},),
    "tiled_forward": ({"block_m": (32,), "block_n": (64,)},),
    "dq": ({"block_m": (32,)},),
    "dkv": ({"block_n": (32,)},),
    "dbias": ({"programs_per_multiprocessor": (2,)},),
}


class Kernel(NamedTuple):
    """One kernel, and all that its layout depends on."""

    name: str
    call: Call
    gpu: Gpu

    @property
    def key(self) -> str:
        return config.tuned_key(self.name, self.call, self.gpu)

    @property
    def direction(self) -> str:
        return "forward" if self.name.endswith("forward") else "backward"


def kernels_of(trial: Trial) -> list[Kernel]:
    """What the case's forward and its backward, with a gradient of the bias, ask a layout for."""
    asked = mock.Mock(wraps=config.config_for)
    with (
        mock.patch.object(plan, "config_for", asked),
        override({}),  # plans are made anew
    ):
        Loop(trial.attend, trial.sets[:1]).warm()
    kernels = (Kernel(*call.args) for call in asked.call_args_list)
    return list({kernel.key: kernel for kernel in kernels}.values())


def candidates(best: Config, group: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """The fields of every other layout that the group's values make of `best`."""
    for values in itertools.product(*group.values()):
        fields = dict(zip(group, values))
        if not fields.items() <= asdict(best).items():
            yield fields


class Trial:
    """Checks and times one case under one layout after another."""

    def __init__(self, case: Case, device: Device) -> None:
        self.device = device
        self.sets = make_sets(case, device)
        self.gate = Gate(case, device, self.sets[0])
        self.attend = ours(case, device)
        self.passes = passes_of(case, device, len(self.sets), COPY_RATE)

    def seconds(self, kernel: Kernel, fields: dict[str, int]) -> float:
        """Median of a call in the kernel's direction; AssertionError where the rule is broken."""
        with override({kernel.key: fields}):
            self.gate.check(self.attend, 2.0)
            loop = Loop(self.attend, self.sets)
            loop.warm()
            timed = Timed(loop, self.device, self.passes)
            for _ in range(ROUNDS if self.device.name == "cuda" else 1):
                timed.sample()
        return statistics.median(timed.samples[kernel.direction])


class Tuner:
    def __init__(
        self, device: Device, groups: dict, budget: float, results_file: ResultsFile
    ) -> None:
        self.device, self.groups, self.results_file = device, groups, results_file
        self.ends = time.perf_counter() + budget
        self.found: dict[str, dict[str, int]] = {}
        self.broken = False

    def tune(self, kernel: Kernel, trial: Trial) -> None:
        """Keeps the fastest layout of a kernel, if it is not the one it has anyway."""
        default = config.config_for(kernel.name, kernel.call, kernel.gpu)
        best, fields = default, {}
        fastest = first = trial.seconds(kernel, {})
        print(f"{kernel.key}: {first * 1e6:.4g} µs with {asdict(default)}", flush=True)
        self.note(kernel, asdict(default), first)
        for group in self.groups[kernel.name]:
            start = best
            for changed in candidates(start, group):
                if time.perf_counter() > self.ends or self.broken:
                    break
                candidate = {**fields, **changed}
                try:
                    seconds = trial.seconds(kernel, candidate)
                except Exception as error:  # too large for the device, or wrong
                    print(f"  {changed}: {reason_of(error)}", flush=True)
                    self.note(kernel, asdict(default) | candidate, None, reason_of(error))
                    self.broken = self.device.broken()
                    continue
                print(f"  {changed}: {seconds * 1e6:.4g} µs", flush=True)
                self.note(kernel, asdict(default) | candidate, seconds)
                if seconds < GAIN * fastest:
                    fastest, best = seconds, Config(**{**asdict(best), **changed})
            fields = {k: v for k, v in asdict(best).items() if v != asdict(default)[k]}
        if fields:
            self.found[kernel.key] = asdict(best)
            print(f"  best: {fields}, {fastest / first:.2f} of the time", flush=True)

    def note(
        self, kernel: Kernel, fields: dict[str, int], seconds: float | None, why: str = ""
    ) -> None:
        layout = " ".join(f"{name}={value}" for name, value in fields.items())
        median = None if seconds is None else seconds * 1e6
        self.results_file.add(Row(kernel.key, layout, kernel.direction, median, note=why))


def write(path: Path, found: dict[str, dict[str, int]], facts: dict[str, str]) -> None:
    """The table with what was found; each entry says where it was measured."""
    table = json.loads(config.TUNED.read_text())
    measured = table["measured"] if isinstance(table["measured"], dict) else {}
    table["measured"] = measured | dict.fromkeys(found, facts)
    table["configs"] |= found
    if not table["measured"]:
        table["measured"] = "nothing yet: no entry was timed on a device"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=300, help="seconds for all of it")
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--out", type=Path, default=config.TUNED)
    fields = {name for groups in GROUPS.values() for group in groups for name in group}
    parser.add_argument("--fields", nargs="+", choices=sorted(fields), help="these together, alone")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    return parser.parse_args(arguments)


def groups_of(options: argparse.Namespace) -> Groups:
    """What is varied: with --fields all of their values together, of the kernels that have them."""
    groups = TOY_GROUPS if options.rehearse else GROUPS
    if options.fields is None:
        return groups
    varied = {}
    for kernel, of_kernel in groups.items():
        values = {name: x for group in of_kernel for name, x in group.items()}
        varied[kernel] = ({name: values[name] for name in options.fields if name in values},)
    return varied


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.rehearse and options.out == config.TUNED:
        raise SystemExit("--rehearse measures nothing: give an --out of its own")
    torch.manual_seed(0)
    device: Device = DryRunDevice() if options.rehearse else Cuda()
    cases = toy_cases() if options.rehearse else swin_cases() | other_cases()
    facts, seen = facts_of(device), set()
    home = RESULTS if options.out == config.TUNED else options.out.parent
    results_file = ResultsFile(home / "tuning" / f"{options.out.stem}.csv", facts)
    tuner = Tuner(device, groups_of(options), options.budget, results_file)
    for name, case in cases.items():
        if not name.startswith(tuple(options.cases)):
            continue
        if time.perf_counter() > tuner.ends:
            print(f"{name}: left out, the time is spent", flush=True)
            continue
        print(name, flush=True)
        try:
            trial = Trial(case, device)
            kernels = [kernel for kernel in kernels_of(trial) if kernel.key not in seen]
        except Exception as error:  # this case cannot run at all
            print(f"{name}: {reason_of(error)}", flush=True)
            if device.broken():
                return TRY_AGAIN
            continue
        for kernel in kernels:
            seen.add(kernel.key)
            try:
                tuner.tune(kernel, trial)
            except Exception as error:  # the default itself is wrong: nothing to compare with
                print(f"{kernel.key}: {reason_of(error)}", flush=True)
            write(options.out, tuner.found, facts)
            if device.broken():
                return TRY_AGAIN
        del trial
        device.release()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
