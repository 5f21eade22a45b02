"""Both sublayers of Swin-T's blocks on a CPU beside their stock modules, checked and timed in turn.

    python -m benchmarks.sublayers [--threads 2] [--batch 8] [--dtype fp32] [--rounds 11]

Stock is the composition of plain modules, as timm runs it; `products` are the two linear layers
alone, the least that unfused layers take. GFLOP/s count both layers and attention's products,
beside the rate of a large product of the same dtype in the same run. A forward is inference with
packed weights; forward and backward pack in each call and compute all again. A result that breaks
the error rule has no time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks.device import Cpu
from benchmarks.report.rows import command_of, facts_of, print_table
from swin_kernels.cli.command import positive, threads
from swin_kernels.testing import attention_sublayer as attention
from swin_kernels.testing import mlp
from swin_kernels.testing.cases import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if name in ("fp32", "bf16")}
STAGES = {96: (56, 3), 192: (28, 6), 384: (14, 12), 768: (7, 24)}  # channels: map, heads


def in_turn(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 2):  # the first two warm up
        for taken, function in zip(times, functions):
            start = time.perf_counter()
            function()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def measure_mlp(channels: int, batch: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """Seconds: stock, products and ours forward, stock and ours forward and backward; FLOPs."""
    size, _ = STAGES[channels]
    case = mlp.MlpCase(batch, (size, size), channels, dtype=dtype)
    mlp.check_mlp(case.but(batch=1))
    operands, grad_out = mlp.make_mlp_operands(case), mlp.make_mlp_grad_out(case)
    o = operands
    with torch.inference_mode():
        forward = in_turn(
            (
                lambda: mlp.unfused_mlp(case, operands),
                lambda: F.linear(F.linear(o.x, o.fc1_weight, o.fc1_bias), o.fc2_weight, o.fc2_bias),
                lambda: mlp.call_mlp(case, operands),
            ),
            rounds,
        )
    both = in_turn(
        (
            lambda: mlp.run_mlp_unfused(case, operands, grad_out),
            lambda: mlp.run_mlp(case, operands, grad_out),
        ),
        rounds,
    )
    return [*forward, *both, 2 * 2 * batch * size**2 * 4 * channels**2]


def measure_attention(channels: int, batch: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """The same of the attention half, shifted where the map has several windows."""
    size, heads = STAGES[channels]
    shift = 3 if size > 7 else 0
    case = attention.SublayerCase(
        batch, (size, size), (7, 7), (shift, shift), heads, channels, dtype
    )
    attention.check_sublayer(case.but(batch=2))
    operands = attention.make_sublayer_operands(case)
    grad_out, o = attention.make_sublayer_grad_out(case), operands

    def products() -> torch.Tensor:
        qkv = F.linear(o.x, o.qkv_weight, o.qkv_bias)
        return F.linear(qkv[..., :channels], o.proj_weight, o.proj_bias)

    with torch.inference_mode():
        forward = in_turn(
            (
                lambda: attention.unfused_sublayer(case, operands),
                products,
                lambda: attention.call_sublayer(case, operands),
            ),
            rounds,
        )
    both = in_turn(
        (
            lambda: attention.run_sublayer_unfused(case, operands, grad_out),
            lambda: attention.run_sublayer(case, operands, grad_out),
        ),
        rounds,
    )
    tokens = batch * size**2
    return [*forward, *both, 2 * tokens * 4 * channels**2 + 4 * tokens * 49 * channels]


HALVES = {"mlp_sublayer": measure_mlp, "window_attention_sublayer": measure_attention}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=threads, default=torch.get_num_threads())
    parser.add_argument("--batch", type=positive, default=8, help="images (8)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of everything (fp32)")
    parser.add_argument("--rounds", type=positive, default=11, help="samples of each time (11)")
    parser.add_argument("--channels", type=int, choices=STAGES, nargs="*", default=list(STAGES))
    parser.set_defaults(command=command_of("benchmarks.sublayers", arguments))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    matrix = torch.randn(2048, 2048).to(dtype)
    (taken,) = in_turn((lambda: matrix @ matrix,), 5)
    rate = 2 * 2048**3 / taken
    lines = []
    for name, half in HALVES.items():
        for channels in options.channels:
            try:
                *times, flops = half(channels, options.batch, dtype, options.rounds)
            except AssertionError as error:
                lines.append([name, str(channels), *["–"] * 7, str(error).splitlines()[0]])
                continue
            stock, products, ours, stock_both, both = times
            lines.append(
                [
                    name,
                    str(channels),
                    *(f"{t * 1e3:.1f}" for t in (stock, products, ours)),
                    f"{stock / ours:.2f}",
                    f"{flops / ours * 1e-9:.0f} ({flops / ours / rate:.0%})",
                    *(f"{t * 1e3:.1f}" for t in (stock_both, both)),
                    f"{stock_both / both:.2f}",
                ]
            )
    facts = facts_of(Cpu(dtype))
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value), options.command)
    print(f"batch {options.batch}; {options.dtype}; a product of 2048²: {rate * 1e-9:.0f} GFLOP/s")
    header = ["", "C", "stock ms", "products ms", "ours ms", "×", "GFLOP/s", "stock f+b ms"]
    print_table([*header, "ours f+b ms", "×"], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
