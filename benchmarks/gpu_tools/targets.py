"""What the CUDA C++ kernels are to reach at Swin-T's stages, held against measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.report.rows import Row

KERNELS = "ours, CUDA C++"
STAGES = ("T1 shift 3", "T2 shift 3", "T3 shift 3", "T4 shift 0")
AT_LEAST, AT_MOST = 3.0, 1.6  # times as fast as the unfused path; times of the Triton kernels


def verdicts(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each stage and direction that was timed: both ratios, and whether they will do."""
    times = {(r.case, r.direction, r.provider): r.median_us for r in rows if r.median_us}
    for case in STAGES:
        for direction in ("forward", "backward"):
            ours, unfused, triton = (
                times.get((case, direction, name)) for name in (KERNELS, "unfused", "ours")
            )
            if ours is None or unfused is None or triton is None:
                continue
            faster, slower = unfused / ours, ours / triton
            reached = faster >= AT_LEAST and slower <= AT_MOST
            yield (
                f"{KERNELS}: {case}, {direction}: {faster:.2f} times as fast as unfused (at least "
                f"{AT_LEAST}), {slower:.2f} times the time of ours (at most {AT_MOST}): "
                f"{'reached' if reached else 'NOT reached'}"
            )
