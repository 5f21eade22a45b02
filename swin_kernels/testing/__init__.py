"""Inputs of the operation, its unfused form and the error rule: for tests and benchmarks alike.

A check is three lines: `operands = make_operands(case)`, `grad_out = make_grad_out(case)`, then
`assert_within_error_rule(run(...), run_unfused(...), run_exact(...))`; `check(case, backend)` is
all of them.
"""

from swin_kernels.problem import DIFFERENTIABLE
from swin_kernels.testing.cases import (
    BIASES,
    DTYPE_NAMES,
    LAYOUTS,
    MASKS,
    Case,
    make_grad_out,
    make_operands,
)
from swin_kernels.testing.error_rule import (
    FEW,
    LEAST_INPUTS,
    Several,
    assert_no_worse_than_eager,
    assert_within_error_rule,
    check,
    error_ratio,
    repetitions,
)
from swin_kernels.testing.runs import (
    Result,
    call,
    differentiate,
    run,
    run_exact,
    run_unfused,
    with_grad,
)
from swin_kernels.testing.unfused import unfused

__all__ = [
    "BIASES",
    "DIFFERENTIABLE",
    "DTYPE_NAMES",
    "FEW",
    "LAYOUTS",
    "LEAST_INPUTS",
    "MASKS",
    "Case",
    "Result",
    "Several",
    "assert_no_worse_than_eager",
    "assert_within_error_rule",
    "call",
    "check",
    "differentiate",
    "error_ratio",
    "make_grad_out",
    "make_operands",
    "repetitions",
    "run",
    "run_exact",
    "run_unfused",
    "unfused",
    "with_grad",
]
