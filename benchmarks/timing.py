"""Right before fast: the error rule on the very calls that are timed, then times in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.baselines.providers import DIRECTIONS, Attend
from benchmarks.device import Device, random
from swin_kernels.position_bias import table_length
from swin_kernels.problem import Operands
from swin_kernels.testing import (
    Case,
    Result,
    assert_within_error_rule,
    error_ratio,
    run_exact,
    run_unfused,
)

GATE_IMAGES = 3
MOST_PASSES = 20


class Inputs(NamedTuple):
    """Leaves that require grad, and a gradient of the output."""

    qkv: Tensor
    table: Tensor
    logit_scale: Tensor | None
    grad_out: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self[:3] if x is not None]

    @property
    def plain(self) -> list[Tensor | None]:
        """Detached: a view of a leaf requires grad where it is compiled, even under no_grad."""
        return [None if x is None else x.detach() for x in self[:3]]

    def with_grad(self) -> Inputs:
        """The same memory, as leaves that require grad."""
        leaves = (None if x is None else x.detach().requires_grad_() for x in self[:3])
        return Inputs(*leaves, self.grad_out)  # type: ignore[arg-type]


def make_inputs(case: Case, device: Device, seed: int) -> Inputs:
    """Drawn on the device: a hundred million numbers take seconds on a CPU."""
    heads, head_dim = case.heads, case.head_dim
    shape = (case.batch, *case.size)
    scale = 10 + random((heads,), device, seed + 3) if case.cosine else None
    return Inputs(
        random((*shape, 3, heads, head_dim), device, seed),
        random((table_length(case.window), heads), device, seed + 1),
        scale,
        random((*shape, heads, head_dim), device, seed + 2),
    ).with_grad()


def make_sets(case: Case, device: Device) -> list[Inputs]:
    """As many as `count_of_sets` says."""
    return [make_inputs(case, device, 10 * i) for i in range(count_of_sets(case, device))]


def tokens_of(case: Case) -> int:
    return case.batch * math.prod(case.size)


def floor_bytes(case: Case) -> dict[str, int]:
    """What must be read and written: qkv and out; qkv, gradient of out, gradient of qkv."""
    one = tokens_of(case) * case.heads * case.head_dim * case.dtype.itemsize
    return {"forward": 4 * one, "backward": 7 * one, "forward + backward": 11 * one}


def flops(case: Case) -> dict[str, int]:
    """Of the matrix products: two forward; the scores again and four more backward."""
    one = 2 * tokens_of(case) * case.grid.tokens * case.heads * case.head_dim
    return {"forward": 2 * one, "backward": 5 * one, "forward + backward": 7 * one}


class Draw(NamedTuple):
    """One image of a batch, and what it alone gives."""

    image: int
    grad_out: Tensor  # of the whole batch, zero for all other images
    eager: Result
    exact: Result


class Gate:
    """The error rule on a few images of a whole batch.

    The gradient of the output is zero for all images but one, so that the gradient of the table is
    that of the one, and the exact result is one of a single image; what is judged is the launch
    that is timed. That is done several times, as a table has few numbers, and their largest error
    is dominated by sampling noise.
    """

    def __init__(self, case: Case, device: Device, inputs: Inputs) -> None:
        self.inputs, last = inputs, case.batch - 1
        images = [i * last // (GATE_IMAGES - 1) for i in range(GATE_IMAGES)]
        self.draws = [self._draw(case, image, i) for i, image in enumerate(images)]

    def _draw(self, case: Case, image: int, shift: int) -> Draw:
        """The gradient is moved along the map: where images are few, one is drawn again."""
        chosen = slice(image, image + 1)
        grad_out = torch.zeros_like(self.inputs.grad_out)
        grad_out[chosen] = self.inputs.grad_out[chosen].roll(shift, 1)
        qkv, table, scale = self.inputs.plain
        operands = Operands(qkv[chosen], bias_table=table, logit_scale=scale)
        of_one = case.but(batch=1), operands, grad_out[chosen]
        return Draw(image, grad_out, run_unfused(*of_one), run_exact(*of_one))

    def check(self, attend: Attend, factor: float, backward: bool = True) -> dict[str, float]:
        """Error ratios by direction; AssertionError where the rule, `factor` 2, is broken."""
        if not backward:
            with torch.no_grad():
                return self.judge_output(attend(*self.inputs.plain), factor)
        found = []
        for draw in self.draws:
            out = attend(*self.inputs[:3])
            grads = torch.autograd.grad(out, self.inputs.leaves, draw.grad_out)
            found.append((out.detach(), grads))
        return self.judge(found, factor)

    def judge_output(self, out: Tensor, factor: float) -> dict[str, float]:
        """`check` of an output alone."""
        results = [Result(out[d.image, None], {}) for d in self.draws]
        eager, exact = ([Result(x.out, {}) for x in of] for of in zip(*(d[2:] for d in self.draws)))
        assert_within_error_rule(results, eager, exact, factor)
        return {"forward": _ratio(*([r.out for r in of] for of in (results, eager, exact)))}

    def judge(
        self, found: Sequence[tuple[Tensor, Sequence[Tensor]]], factor: float
    ) -> dict[str, float]:
        """`check` of an output and of the gradients of all leaves, for each draw."""
        eager, exact = (list(of) for of in zip(*(d[2:] for d in self.draws)))
        names = [n for n in ("query", "bias_table", "logit_scale") if n in exact[0].grads]
        results = []
        for draw, (out, grads) in zip(self.draws, found, strict=True):
            of_leaves = dict(zip(names, grads))
            of_images = of_leaves["query"].flatten(1).any(1)
            of_images[draw.image] = False
            spilt = int(of_images.sum())
            assert spilt == 0, f"{spilt} images have a gradient, though that of their output is 0"
            of_leaves["query"] = of_leaves["query"][draw.image, None]
            results.append(Result(out[draw.image, None], of_leaves))
        assert_within_error_rule(results, eager, exact, factor)
        sides = (results, eager, exact)
        return {
            "forward": _ratio(*([r.out for r in of] for of in sides)),
            "backward": max(_ratio(*([r.grads[n] for r in of] for of in sides)) for n in names),
        }


def _ratio(*sides: Sequence[Tensor]) -> float:
    """The error ratio of all draws together."""
    return error_ratio(*(torch.cat([x.flatten() for x in of]) for of in sides))


class Loop:
    """A call for each set of inputs: enough of them that the cache does not hold them.

    Results are kept until all sets were run, as those of one set would be written over in the
    cache, and never reach memory.
    """

    def __init__(
        self, attend: Attend, sets: Sequence[Inputs], directions: Sequence[str] = DIRECTIONS
    ) -> None:
        self.attend, self.sets, self.directions = attend, sets, directions
        self.plain = [s.plain for s in sets]
        self.outs: list[Tensor] = []
        self.results: list[list[Tensor]] = []

    def forward(self) -> None:
        self.results = []
        with torch.no_grad():
            self.results = [[self.attend(*tokens)] for tokens in self.plain]

    def training_forward(self) -> None:
        self.results = []
        self.outs = [self.attend(*s[:3]) for s in self.sets]

    def training_backward(self) -> None:
        self.results = [
            [out.detach(), *torch.autograd.grad(out, s.leaves, s.grad_out)]
            for out, s in zip(self.outs, self.sets)
        ]
        self.outs = []

    def training(self) -> None:
        self.training_forward()
        self.training_backward()

    def warm(self) -> None:
        self.forward()
        if "backward" in self.directions:
            self.training()

    def peaks(self, device: Device) -> dict[str, float]:
        """Megabytes that each direction adds at its peak; the gate has called it with gradients."""
        self.forward()
        found = {}
        for direction, run in (("forward", self.forward), ("forward + backward", self.training)):
            if direction in self.directions:
                self.results = []  # else what is freed would hide a part
                found[direction] = device.peak_bytes(run) / 1e6
        return found


class Replayed:
    """A loop under graphs: the same work without its launches."""

    def __init__(self, loop: Loop, device: Device) -> None:
        loop.warm()
        expected = [x.clone() for x in loop.results[0]]
        self.sets, self.directions = loop.sets, loop.directions
        (self.forward,) = device.capture(loop.forward)
        self.kept = loop.results  # what its replays write
        both = device.capture(loop.training_forward, loop.training_backward)
        self.training_forward, self.training_backward = both
        self.loop = loop
        self.warm()
        device.wait()
        for a, b in zip(self.latest()[0], expected):
            assert torch.equal(a, b), "a replay does not give what the launches gave"
        assert torch.equal(self.kept[0][0], expected[0]), "a replay of inference differs"

    def latest(self) -> list[list[Tensor]]:
        """What the training replays wrote last: for each set the output and the gradients."""
        return self.loop.results

    def warm(self) -> None:
        self.forward()
        self.training_forward()
        self.training_backward()


class Timed:
    """Samples of one provider, in seconds a call, by direction."""

    def __init__(self, loop: Loop | Replayed, device: Device, passes: dict[str, int]) -> None:
        self.loop, self.device, self.passes = loop, device, passes
        self.samples: dict[str, list[float]] = {d: [] for d in loop.directions}

    def sample(self) -> None:
        device, loop = self.device, self.loop
        first = device.mark()
        for _ in range(self.passes["forward"]):
            loop.forward()
        last = device.mark()
        device.wait()
        calls = self.passes["forward"] * len(loop.sets)
        self.samples["forward"].append(device.seconds(first, last) / calls)
        if "backward" not in loop.directions:
            return
        marks = [device.mark()]
        for _ in range(self.passes["forward + backward"]):
            loop.training_forward()
            marks.append(device.mark())
            loop.training_backward()
            marks.append(device.mark())
        device.wait()
        calls = self.passes["forward + backward"] * len(loop.sets)
        whole = device.seconds(marks[0], marks[-1]) / calls
        backward = sum(device.seconds(a, b) for a, b in zip(marks[1::2], marks[2::2])) / calls
        self.samples["forward + backward"].append(whole)
        self.samples["backward"].append(backward)


def count_of_sets(case: Case, device: Device) -> int:
    """Sets whose qkv is five times what the last cache holds."""
    one = floor_bytes(case)["forward"] * 3 / 4
    return max(2, math.ceil(5 * device.cache_bytes / one))


def passes_of(case: Case, device: Device, sets: int, rate: float) -> dict[str, int]:
    """Passes over the sets that make a sample long enough; `rate` in bytes a second."""
    wanted = device.shortest_sample * rate / sets
    return {
        direction: max(1, min(MOST_PASSES, math.ceil(wanted / needed)))
        for direction, needed in floor_bytes(case).items()
    }


class Sampled(Protocol):
    def sample(self) -> None: ...


def sample_in_turn(timed: Sequence[Sampled], rounds: int, limit: float) -> list[str | None]:
    """A sample of each, again and again, so that drift cancels; ends after `limit` seconds.

    What went wrong, for each, or None.
    """
    start, fewest = time.perf_counter(), min(rounds, 9)
    wrong: list[str | None] = [None] * len(timed)
    for turn in range(rounds):
        if turn >= fewest and time.perf_counter() - start > limit:
            break
        for step in range(len(timed)):
            place = (turn + step) % len(timed)  # so that none always follows the same other
            if wrong[place] is None:
                try:
                    timed[place].sample()
                except Exception as error:  # one provider's end is not that of the others
                    wrong[place] = reason_of(error)
    return wrong


def reason_of(error: BaseException) -> str:
    """One line that names an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
