"""Checked, then timed: attention cases beside their peers and the floor, then whole models.

What `benchmarks.gpu` and `benchmarks.cpu` share. Rows go into a CSV as they are known.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import models
from benchmarks.baselines.providers import OURS_CUDA, PEERS, PROVIDERS, Provider
from benchmarks.baselines.runtimes import RUNTIMES
from benchmarks.device import Device, MachinePeaks
from benchmarks.report.rows import (
    RESULTS,
    ResultsFile,
    Row,
    facts_of,
    file_name,
    print_table,
    table_of,
)
from benchmarks.timing import (
    DIRECTIONS,
    Gate,
    Loop,
    Replayed,
    Timed,
    count_of_sets,
    floor_bytes,
    flops,
    make_sets,
    passes_of,
    reason_of,
    sample_in_turn,
)
from swin_kernels.cli.command import positive
from swin_kernels.testing import Case
from swin_kernels.testing.timing import quantiles

TRY_AGAIN = 75  # as EX_TEMPFAIL of sysexits.h
OTHER_FUNCTION = "computes another function: no error gate"


class Budget:
    """Seconds for the whole run, and what they are still enough for."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    def spent(self) -> float:
        return (time.perf_counter() - self.start) / self.seconds

    def refuses(self, provider: Provider | None, share: float) -> str | None:
        """Why there is no time for it: all of `share` is spent, half of it for what is slow."""
        share = share / 2 if provider is not None and provider.slow else share
        if self.spent() < share:
            return None
        return f"skipped: {share:.0%} of {self.seconds:.0f} s were spent"


class Checked(NamedTuple):
    """A warm loop, with what was found before it is timed, by direction."""

    loop: Loop | Replayed
    errors: dict[str, float]  # as multiples of the unfused path's own
    peaks: dict[str, float]  # MB of one call


def add_reason(results_file: ResultsFile, case: str, provider: Provider, reason: str) -> None:
    """Rows that say why a provider has no time."""
    for direction in provider.directions:
        results_file.add(Row(case, provider.name, direction, note=reason))


def loops_of(
    name: str, case: Case, device: Device, providers: Sequence[Provider], results_file: ResultsFile
) -> dict[str, Checked]:
    """The loop of each provider; what fails goes into the results."""
    sets = make_sets(case, device)
    gate = Gate(case, device, sets[0])
    loops: dict[str, Checked] = {}
    for provider in providers:
        print(f"{name}: {provider.name}", flush=True)
        try:
            attend = provider.make(case, device)
            errors = gate.check(attend, provider.factor, provider.backward) if provider.same else {}
            single = Loop(attend, sets[:1], provider.directions)
            peaks = {} if provider.graph else single.peaks(device)
            loop: Loop | Replayed = Loop(attend, sets, provider.directions)
            loop = Replayed(loop, device) if provider.graph else loop
            loop.warm()
            device.wait()
            loops[provider.name] = Checked(loop, errors, peaks)
        except Exception as error:  # one provider's end is not that of the others
            traceback.print_exc()
            add_reason(results_file, name, provider, reason_of(error))
            if device.broken():
                break
    return loops


def measure_case(
    name: str,
    case: Case,
    device: Device,
    providers: Sequence[Provider],
    results_file: ResultsFile,
    rounds: int,
    limit: float,
) -> None:
    """Rows of all directions and providers."""
    torch._dynamo.reset()  # else the ninth case compiles no more
    loops = loops_of(name, case, device, providers, results_file)
    if not loops or device.broken():
        return
    machine = MachinePeaks(device)
    machine.sample()
    passes = passes_of(case, device, count_of_sets(case, device), machine.rates()[0])
    timed = {who: Timed(x.loop, device, passes) for who, x in loops.items()}
    # the machine's peaks in turn with the providers, as clocks drift
    wrong = sample_in_turn([machine, *timed.values()], rounds, limit)[1:]
    bytes_rate, flop_rate = machine.rates()
    for (who, one), reason in zip(timed.items(), wrong):
        for direction, samples in one.samples.items():
            if reason is not None:
                results_file.add(Row(name, who, direction, note=reason))
                continue
            median, low, high = quantiles(samples, 1e-6)
            floor = floor_bytes(case)[direction] / bytes_rate * 1e6
            same = bool(loops[who].errors)  # else its products are others
            share = flops(case)[direction] / (median * 1e-6 * flop_rate) if same else None
            times = (median, low, high, len(samples))
            found = loops[who].peaks.get(direction), loops[who].errors.get(direction)
            note = "" if same else OTHER_FUNCTION
            row = Row(name, who, direction, *times, floor, floor / median, share, *found, note)
            rates = {"copy_gb_s": bytes_rate * 1e-9, "matrix_tflop_s": flop_rate * 1e-12}
            results_file.add(row._replace(**rates))


class Suite(NamedTuple):
    """What is measured, and on what; what matters most comes first."""

    device: Device
    cases: dict[str, Case]  # the first three come before all models
    others: dict[str, Case]  # measured if time is left
    models: dict[str, models.Made]
    providers: Sequence[Provider]
    forms: Sequence[str] = models.FORMS  # of a whole model

    def only(self, options: argparse.Namespace) -> Suite:
        """What the options of `add_choices` leave of it."""

        def begins(known: Mapping[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
            if wanted is None:
                return dict(known)
            return {name: x for name, x in known.items() if name.startswith(tuple(wanted))}

        for option, known in (("cases", self.cases | self.others), ("models", self.models)):
            for name in getattr(options, option) or ():
                if not begins(known, [name]):
                    raise SystemExit(f"--{option} {name}: no such name; there are {list(known)}")
        providers = [p for p in self.providers if p.name in (options.providers or [p.name])]
        return self._replace(
            cases=begins(self.cases, options.cases),
            others=begins(self.others, options.cases),
            models=begins(self.models, options.models),
            providers=providers,
            forms=options.forms or self.forms,
        )


class Run:
    """One run of the benchmark: what it measures with, and where the rows go."""

    def __init__(self, suite: Suite, options: argparse.Namespace) -> None:
        self.suite, self.options, self.device = suite, options, suite.device
        self.budget = Budget(options.budget)
        facts = facts_of(self.device) | {"command": options.command}
        self.results_file = ResultsFile(
            options.csv or RESULTS / file_name(facts), facts, options.resume
        )

    def case(self, name: str, case: Case, share: float) -> None:
        wanted, options, kept = [], self.options, self.results_file
        for provider in self.suite.providers:
            if kept.has(name, provider.name):
                continue
            if (reason := self.budget.refuses(provider, share)) is None:
                wanted.append(provider)
            else:
                add_reason(kept, name, provider, reason)
        if not wanted:
            return
        try:
            measure_case(name, case, self.device, wanted, kept, options.rounds, options.limit)
        except Exception as error:  # of the gate or the inputs: no provider is to blame
            traceback.print_exc()
            for provider in wanted:
                if not kept.has(name, provider.name):
                    add_reason(kept, name, provider, reason_of(error))
        self._stop_if_broken()
        self.device.release()

    def model(self, name: str, share: float) -> None:
        torch._dynamo.reset()
        forms: dict[str, str | None] = {}
        for form in self.suite.forms:
            if not self.results_file.has(name, form):
                runtime = RUNTIMES.get(form)
                reason = runtime.why_not(self.device.dtype) if runtime else None
                forms[form] = reason or self.budget.refuses(None, share)
        if not forms:
            return
        if all(forms.values()):
            for form, reason in forms.items():
                self.results_file.add(Row(name, form, "inference", note=str(reason)))
            return
        try:
            for row in models.rows_of(
                name, self.device, forms, self.options.model_rounds, self.suite.models
            ):
                self.results_file.add(row)
        except Exception as error:
            traceback.print_exc()
            for form in forms:
                self.results_file.add(Row(name, form, "inference", note=reason_of(error)))
        self._stop_if_broken()
        self.device.release()

    def _stop_if_broken(self) -> None:
        if self.device.broken():
            print("the device is beyond use for this process", flush=True)
            raise SystemExit(TRY_AGAIN)

    def measure(self) -> int:
        """Exit code: 1 where one of ours failed."""
        try:
            self._measure()
        except KeyboardInterrupt:  # what there is, is shown
            print("interrupted", flush=True)
        self.report()
        return int(any(_is_a_failure_of_ours(r) for r in self.results_file.rows))

    def _measure(self) -> None:
        cases, others, names = self.suite.cases, self.suite.others, list(self.suite.models)
        # what is alone may take all of the time
        core, most = (0.5, 0.75) if names else (1.0, 1.0)
        for name, case in list(cases.items())[:3]:
            self.case(name, case, core)
        for name in names[:1]:
            self.model(name, 0.6 if cases else 1.0)
        for name, case in list(cases.items())[3:]:
            self.case(name, case, most)
        for name, case in others.items():
            self.case(name, case, 0.85)
        for name in names[1:]:
            self.model(name, 0.8 if cases else 1.0)

    def report(self) -> None:
        rows = self.results_file.rows
        print()
        print(", ".join(f"{name} {value}" for name, value in self.results_file.facts.items()))
        print("medians in µs a call; in brackets the floor as a share of them\n")
        core = [r for r in rows if r.direction in DIRECTIONS]
        whole = [r for r in rows if r.direction not in DIRECTIONS]
        if core:
            print_table(*table_of(core, [p.name for p in self.suite.providers]))
        if whole:
            print_table(*table_of(whole, self.suite.forms))
        untimed = [r for r in rows if r.median_us is None]
        for row in dict.fromkeys((r.case, r.provider, r.note) for r in untimed):
            print("no time for " + ": ".join(row))
        print(f"\n{self.results_file.path}")


def _is_a_failure_of_ours(row: Row) -> bool:
    untimed = row.median_us is None and not row.note.startswith("skipped")
    return untimed and row.provider.startswith(("ours", "patched"))


def _seconds(text: str) -> float:
    """Of an option: a number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return value


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that leave a part of the suite: see `Suite.only`."""
    begins = {"nargs": "*", "metavar": "NAME"}
    parser.add_argument("--cases", help="those whose names begin so; none without a NAME", **begins)
    parser.add_argument("--models", help="likewise, of the whole models", **begins)
    known = [p.name for p in (*PROVIDERS, *OURS_CUDA, *PEERS)]
    parser.add_argument(
        "--providers", nargs="+", choices=known, help="these alone, where they can run"
    )
    forms = (*models.FORMS, *models.AUTOTUNED)
    parser.add_argument("--forms", nargs="+", choices=forms, help="these of a model alone")


def add_options(parser: argparse.ArgumentParser, budget: float, limit: float) -> None:
    """Those of both programs."""
    parser.add_argument("--budget", type=_seconds, default=budget, help="seconds for all of it")
    parser.add_argument("--rounds", type=positive, default=25, help="samples of each provider")
    parser.add_argument(
        "--limit", type=_seconds, default=limit, help="seconds of samples a case; then no more"
    )
    parser.add_argument("--model-rounds", type=positive, default=8)
    parser.add_argument("--csv", type=Path, help="where the rows go; else benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="leave out what the CSV has")
