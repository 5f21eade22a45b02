"""The error rule: no further from float64 than twice what the unfused path is, plus one ulp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swin_kernels.problem import Operands
from swin_kernels.testing.cases import DTYPE_NAMES, Case, make_grad_out, make_operands
from swin_kernels.testing.runs import Result, run, run_exact, run_unfused

# the largest of fewer errors is dominated by sampling noise: they are judged over several inputs
FEW, LEAST_INPUTS = 1000, 3
# numbers of a gradient and of an output that `check` judges together, by as many inputs as it takes
ENOUGH, SMALL, MOST_RUNS = 48, 16384, 24

Several = Tensor | Sequence[Tensor]  # of one input, or of each of several


def _of_all_inputs(name: str, *given: Several) -> list[Tensor]:
    """Each of `given` as one tensor; ValueError where few numbers are of few inputs."""
    lists = [[x] if isinstance(x, Tensor) else list(x) for x in given]
    inputs, numbers = len(lists[0]), sum(x.numel() for x in lists[0])
    if 0 < numbers < FEW and inputs < LEAST_INPUTS:
        raise ValueError(
            f"{name}: expected at least {FEW} numbers or {LEAST_INPUTS} inputs, got {numbers} "
            f"numbers of {inputs} input{'s' * (inputs > 1)}, whose largest error is dominated by "
            "sampling noise: pass lists, a result for each input"
        )
    if inputs == 1:
        return [x[0] for x in lists]
    shapes = [[tuple(x.shape) for x in several] for several in lists]
    assert shapes[0] == shapes[1] == shapes[2], f"{name}: shapes {shapes}"
    return [torch.cat([x.flatten() for x in several]) for several in lists]


def assert_no_worse_than_eager(
    actual: Several, eager: Several, exact: Several, factor: float = 2.0, name: str = "result"
) -> None:
    """Error against float64 within `factor` of the unfused path's own, plus one ulp.

    For the largest error the ulp is that of the largest value, for the mean error that of the mean
    magnitude; sums of probabilities that were flushed, being below the smallest normal number, are
    free. Where `exact` is not finite, `actual` must hold the same; what is not finite in `eager`
    allows nothing.

    Args:
        actual, eager: the result to check and that of the unfused path, of one shape and dtype; or
            lists of them, one for each input.
        exact: the same in float64.
        factor: how many times the error of `eager` is allowed.
        name: what the message calls the result.

    Raises:
        AssertionError: the rule is broken, with both errors; or shapes and dtypes differ.
        ValueError: fewer than `FEW` numbers of fewer than `LEAST_INPUTS` inputs.
    """
    actual, eager, exact = _of_all_inputs(name, actual, eager, exact)
    assert actual.shape == exact.shape == eager.shape, (
        f"{name}: shape {tuple(actual.shape)}, eager {tuple(eager.shape)}, "
        f"exact {tuple(exact.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager {eager.dtype}"
    assert exact.dtype == torch.float64, f"{name}: exact is {exact.dtype}, not float64"
    if exact.numel() == 0:
        return
    # a value beyond the dtype's range is rightly stored as infinite
    stored = exact.to(actual.dtype)
    finite = stored.isfinite()
    wrong = int((actual.isfinite() != finite).sum())
    assert wrong == 0, (
        f"{name}: {wrong} of {actual.numel()} values finite where float64 is not, or the reverse "
        f"({int(actual.isnan().sum())} NaN, {int(actual.isinf().sum())} infinite)"
    )
    strange = ~finite
    assert torch.equal(actual[strange].isnan(), stored[strange].isnan()), (
        f"{name}: NaN for infinity"
    )
    if not finite.any():
        return
    exact = exact[finite]
    errors = (actual[finite].double() - exact).abs()
    kept = eager[finite].isfinite()
    eager_errors = (eager[finite].double() - exact).abs()[kept]
    eps = torch.finfo(actual.dtype).eps
    flushed = 1024 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).tiny
    for kind, reduce in (("largest", torch.amax), ("mean", torch.mean)):
        error = float(reduce(errors))
        allowed = float(reduce(eager_errors)) if kept.any() else 0.0
        ulp = eps * float(reduce(exact.abs())) + flushed
        assert error <= factor * allowed + ulp, (
            f"{name}: {kind} {error=:.3e} exceeds {factor} x {allowed=:.3e} + {ulp=:.3e} "
            f"({DTYPE_NAMES[actual.dtype]}, shape {tuple(actual.shape)})"
        )


def error_ratio(actual: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Largest error against float64, as a multiple of the unfused path's own."""
    error, allowed = (float((x.double() - exact).abs().max()) for x in (actual, eager))
    if allowed == 0:
        return 1.0 if error == 0 else math.inf
    return error / allowed


def assert_within_error_rule(
    actual: Result | Sequence[Result],
    eager: Result | Sequence[Result],
    exact: Result | Sequence[Result],
    factor: float = 2.0,
) -> None:
    """The error rule for the output and every gradient: of one input, or of a list of inputs."""
    ours, theirs, best = ([x] if isinstance(x, Result) else list(x) for x in (actual, eager, exact))
    for x, y, z in zip(ours, theirs, best, strict=True):
        assert x.grads.keys() == z.grads.keys() == y.grads.keys(), (
            f"gradients {sorted(x.grads)}, eager {sorted(y.grads)}, exact {sorted(z.grads)}"
        )
    a, b, c = ([r.out for r in results] for results in (ours, theirs, best))
    assert_no_worse_than_eager(a, b, c, factor, "output")
    for name in best[0].grads:
        a, b, c = ([r.grads[name] for r in results] for results in (ours, theirs, best))
        assert_no_worse_than_eager(a, b, c, factor, f"gradient of {name}")


def repetitions(numbers: int, fewest: int) -> int:
    """How many inputs `check` judges together, by the numbers of an output and of any gradient."""
    least = LEAST_INPUTS if min(numbers, fewest) < FEW else 1
    return max(least, -(-ENOUGH // fewest), min(-(-SMALL // numbers), MOST_RUNS))


def check(
    case: Case,
    backend: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    change: Callable[[Operands], Operands] | None = None,
) -> Result:
    """Run `case` on `backend` and hold it to the error rule.

    The largest error among a few numbers is dominated by sampling noise: small cases are judged
    over several inputs together.

    Args:
        case: the configuration; its operands are random.
        backend: None takes the first that can run the case.
        device: None is torch's default device.
        seed: of the operands and of the dropout.
        change: makes other operands of the random ones.

    Returns:
        What the backend computed for the first input.

    Raises:
        AssertionError: the error rule is broken.
        NotImplementedError: the backend cannot run the case, with the reason.
    """

    def measure(seed: int) -> tuple[Result, Result, Result]:
        operands = make_operands(case, device, seed)
        grad_out = make_grad_out(case, device, seed + 1)
        if change is not None:
            operands = change(operands)
        return (
            run(case, operands, grad_out, backend, seed),
            run_unfused(case, operands, grad_out, seed),
            run_exact(case, operands, grad_out, seed),
        )

    measured = [measure(seed)]
    actual = measured[0][0]
    sizes = [x.numel() for x in (actual.out, *actual.grads.values()) if x.numel() > 0]
    runs = repetitions(actual.out.numel() or SMALL, min(sizes, default=FEW))
    measured += [measure(seed + 2 * i) for i in range(1, runs)]
    ours, eager, best = zip(*measured)
    assert_within_error_rule(ours, eager, best)
    return actual
