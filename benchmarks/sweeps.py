"""Batch, resolution or window varied alone, with attention over all tokens beside windows.

A case is named after what is varied and its value: `batch 8`, `resolution 56` (tokens a side of
the map), `window 7`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from benchmarks.baselines import global_attentions
from benchmarks.baselines.providers import Attend, Provider
from benchmarks.cases import cpu_cases
from benchmarks.device import Device
from swin_kernels.testing import Case

BATCHES = (1, 2, 4, 8, 16, 32)
RESOLUTIONS = (28, 42, 56, 70, 84, 98, 112)
WINDOWS = (4, 7, 8, 14, 28)  # those that 56 is a multiple of
GPU_IMAGES = 16  # of `sweeps`, on a GPU
UNITS = {
    "batch": "images a batch",
    "resolution": "tokens a side of the map",
    "window": "tokens a side of a window",
}


def sweeps(images: int = 1) -> dict[str, dict[str, Case]]:
    """Around Swin-T's first stage, shifted; of many tokens in a window, fewer images.

    `images` multiplies all batches: a GPU is not filled by what fills a CPU.
    """
    stage = cpu_cases()["T1 shift 3"]
    return {
        "batch": {f"batch {n * images}": stage.but(batch=n * images) for n in BATCHES},
        "resolution": {
            f"resolution {n}": stage.but(batch=images, size=(n, n)) for n in RESOLUTIONS
        },
        "window": {
            f"window {n}": stage.but(batch=4 * images, window=(n, n), shift=(n // 2, n // 2))
            for n in WINDOWS
        },
    }


def compared(kind: str, providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """What is timed in a sweep: against resolution, attention over all tokens as well."""
    return (*providers, *(ALTERNATIVES if kind == "resolution" else ()))


def varied(name: str) -> tuple[str, int] | None:
    """What a case of a sweep varies and its value; None for any other case."""
    found = re.fullmatch(rf"({'|'.join(UNITS)}) (\d+)", name)
    return None if found is None else (found[1], int(found[2]))


def global_attention(case: Case, device: Device) -> Attend:
    return lambda qkv, *_: global_attentions.global_attention(qkv)


def linformer(case: Case, device: Device) -> Attend:
    projection = global_attentions.projection(math.prod(case.size)).to(device.device, case.dtype)
    return lambda qkv, *_: global_attentions.linformer(qkv, projection)


def performer(case: Case, device: Device) -> Attend:
    directions = global_attentions.directions(case.head_dim).to(device.device, case.dtype)
    return lambda qkv, *_: global_attentions.performer(qkv, directions)


def routing(case: Case, device: Device) -> Attend:
    """√T clusters of √T tokens, which the paper has as the best."""
    tokens = math.prod(case.size)
    clusters = round(math.sqrt(tokens))
    centroids = global_attentions.centroids(case.head_dim, clusters).to(device.device, case.dtype)
    return lambda qkv, *_: global_attentions.routing(qkv, centroids, math.ceil(tokens / clusters))


ALTERNATIVES = (
    Provider("global", global_attention, same=False, backward=False),
    Provider("linformer", linformer, same=False, backward=False),
    Provider("performer", performer, same=False, backward=False),
    Provider("routing", routing, same=False, backward=False),
)
