"""The error rule: no further from float64 than twice what the unfused path is, plus one ulp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swin_kernels.problem import Operands
from swin_kernels.testing.cases import DTYPE_NAMES, Case, make_grad_out, make_operands
from swin_kernels.testing.runs import Result, run, run_exact, run_unfused

# numbers in a gradient and in an output below which one draw of rounding errors says little
FEW, SMALL, MOST_RUNS = 48, 16384, 24


def assert_no_worse_than_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Error against float64 within `factor` of the unfused path's own, plus one ulp.

    For the largest error the ulp is that of the largest value, for the mean error that of the mean
    magnitude; sums of probabilities that were flushed, being below the smallest normal number, are
    free. Where `exact` is not finite, `actual` must hold the same; what is not finite in `eager`
    allows nothing.
    """
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
    actual: Result, eager: Result, exact: Result, factor: float = 2.0
) -> None:
    """The error rule for the output and every gradient."""
    assert actual.grads.keys() == exact.grads.keys() == eager.grads.keys(), (
        f"gradients {sorted(actual.grads)}, eager {sorted(eager.grads)}, "
        f"exact {sorted(exact.grads)}"
    )
    assert_no_worse_than_eager(actual.out, eager.out, exact.out, factor, "output")
    for name in exact.grads:
        assert_no_worse_than_eager(
            actual.grads[name], eager.grads[name], exact.grads[name], factor, f"gradient of {name}"
        )


Change = Callable[[Operands], Operands]


def _measure(
    case: Case,
    backend: str | None,
    device: torch.device | str | None,
    seed: int,
    change: Change | None,
) -> tuple[Result, Result, Result]:
    operands, grad_out = make_operands(case, device, seed), make_grad_out(case, device, seed + 1)
    if change is not None:
        operands = change(operands)
    return (
        run(case, operands, grad_out, backend, seed),
        run_unfused(case, operands, grad_out, seed),
        run_exact(case, operands, grad_out, seed),
    )


def _joined(results: Sequence[Result]) -> Result:
    """Several results as one, each tensor flattened."""
    if len(results) == 1:
        return results[0]
    return Result(
        torch.cat([r.out.flatten() for r in results]),
        {name: torch.cat([r.grads[name].flatten() for r in results]) for name in results[0].grads},
    )


def repetitions(numbers: int, fewest: int) -> int:
    """How many inputs `check` judges together, by the numbers of an output and of any gradient."""
    return max(-(-FEW // fewest), min(-(-SMALL // numbers), MOST_RUNS))


def check(
    case: Case,
    backend: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    change: Change | None = None,
) -> Result:
    """Run `case` on `backend` and hold it to the error rule; returns what the backend computed.

    `change` makes other operands of the random ones.

    The largest error among a few numbers is a throw of dice: small cases are judged over several
    inputs together.
    """
    measured = [_measure(case, backend, device, seed, change)]
    actual, eager, exact = measured[0]
    assert actual.out.shape == exact.out.shape, f"output of {case}: shape {tuple(actual.out.shape)}"
    for name, grad in actual.grads.items():
        assert grad.shape == exact.grads[name].shape, f"gradient of {name}: {tuple(grad.shape)}"
    if actual.out.numel() > 0:
        fewest = min(grad.numel() for grad in actual.grads.values())
        runs = repetitions(actual.out.numel(), fewest)
        measured += [_measure(case, backend, device, seed + 2 * i, change) for i in range(1, runs)]
    ours, eager, exact = (_joined(results) for results in zip(*measured))
    assert_within_error_rule(ours, eager, exact)
    return actual
