"""Swin-T's four stages on a CPU: the operation against the unfused path, in one run.

    python -m benchmarks.stages [--batch 8] [--rounds 15] [--threads 2] [--csv FILE]

`core` starts at the packed qkv map and ends at the map of attended values; its unfused form rolls
and partitions qkv once, then does what timm does. `block` is timm's own `_attn`, linear layers
included, stock against patched. The two run in turn, so that the drift of a shared machine cancels;
each ratio is of medians, and none is printed for a result that failed the error rule.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

import swin_kernels
from swin_kernels.demo.run import processor
from swin_kernels.geometry import Grid
from swin_kernels.kernels.native import cpu_capability
from swin_kernels.position_bias import relative_position_index
from swin_kernels.testing import assert_no_worse_than_eager

WINDOW, HEAD_DIM = 7, 32
STAGES = ((56, 3), (28, 6), (14, 12), (7, 24))  # map, heads


class Row(NamedTuple):
    stage: int
    shift: int
    what: str  # core or block
    direction: str  # forward, or forward + backward
    unfused_ms: float
    fused_ms: float

    @property
    def ratio(self) -> float:
        return self.unfused_ms / self.fused_ms


def unfused(qkv: Tensor, table: Tensor, index: Tensor, mask: Tensor | None, shift: int) -> Tensor:
    """(B, S, S, 3, H, D) -> (B, S, S, H, D) by roll, partition, products and softmax."""
    batch, size, heads = qkv.shape[0], qkv.shape[1], qkv.shape[-2]
    count, tokens = size // WINDOW, WINDOW * WINDOW
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    x = qkv.reshape(batch, count, WINDOW, count, WINDOW, -1).transpose(2, 3)
    q, k, v = x.reshape(-1, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
    logits = logits + table[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
    if mask is not None:
        logits = logits.view(batch, -1, heads, tokens, tokens) + mask[:, None]
    out = logits.softmax(-1).view(-1, heads, tokens, tokens) @ v
    out = out.transpose(1, 2).reshape(batch, count, count, WINDOW, WINDOW, -1).transpose(2, 3)
    out = out.reshape(batch, size, size, heads, HEAD_DIM)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(unfused: Callable, fused: Callable, rounds: int) -> tuple[float, float]:
    """Median milliseconds of each, called in turn."""
    pairs = [(seconds(unfused), seconds(fused)) for _ in range(rounds + 1)][1:]
    first, second = (statistics.median(times) * 1e3 for times in zip(*pairs))
    return first, second


def core_functions(size: int, heads: int, shift: int, batch: int) -> tuple[list[Tensor], list]:
    """The leaves, and the unfused, fused and exact forms of one stage's attention core."""
    qkv = torch.randn(batch, size, size, 3, heads, HEAD_DIM, requires_grad=True)
    table = torch.randn((2 * WINDOW - 1) ** 2, heads, requires_grad=True)
    index = relative_position_index((WINDOW, WINDOW))
    mask = Grid.checked((size, size), WINDOW, shift).shift_mask().float() if shift else None

    def stock() -> Tensor:
        return unfused(qkv, table, index, mask, shift)

    def ours() -> Tensor:
        return swin_kernels.shifted_window_attention_qkvpacked(
            qkv, WINDOW, shift, bias_table=table, backend="cpu"
        )

    def exact() -> Tensor:
        wide = None if mask is None else mask.double()
        return unfused(qkv.double(), table.double(), index, wide, shift)

    return [qkv, table], [stock, ours, exact]


def block_functions(size: int, heads: int, shift: int, batch: int) -> tuple[list[Tensor], list]:
    """The same of timm's block attention, between its norm and its residual."""
    arguments = (heads * HEAD_DIM, (size, size), heads, None, WINDOW, shift)
    block = SwinTransformerBlock(*arguments)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(batch, size, size, heads * HEAD_DIM, requires_grad=True)

    def stock() -> Tensor:
        return block._attn(x)

    def ours() -> Tensor:
        return fused._attn(x)

    def exact() -> Tensor:
        wide = SwinTransformerBlock(*arguments).double()
        wide.load_state_dict(block.state_dict())
        return wide._attn(x.double())

    fused = SwinTransformerBlock(*arguments)
    fused.load_state_dict(block.state_dict())
    swin_kernels.patch(fused, backend="cpu")
    return [x], [stock, ours, exact]


def rows_of(stage: int, shift: int, batch: int, rounds: int) -> Iterator[Row]:
    size, heads = STAGES[stage]
    for what, functions in (("core", core_functions), ("block", block_functions)):
        leaves, (stock, ours, exact) = functions(size, heads, shift, batch)
        grad_out = torch.randn(stock().shape)

        def step(form: Callable[[], Tensor], leaves=leaves, grad_out=grad_out) -> list[Tensor]:
            out = form()
            return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

        for a, b, c in zip(step(ours), step(stock), step(exact)):
            assert_no_worse_than_eager(a, b, c.double())
        with torch.no_grad():
            yield Row(stage + 1, shift, what, "forward", *in_turn(stock, ours, rounds))
        times = in_turn(lambda: step(stock), lambda: step(ours), rounds)  # noqa: B023
        yield Row(stage + 1, shift, what, "forward + backward", *times)


def table_of(rows: list[Row]) -> str:
    """Markdown: one line a stage and shift, unfused and fused milliseconds with their ratio."""
    columns = [(w, d) for w in ("core", "block") for d in ("forward", "forward + backward")]
    lines = [
        "| stage | shift | " + " | ".join(f"{w}, {d}" for w, d in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for stage, shift in dict.fromkeys((r.stage, r.shift) for r in rows):
        cells = [
            f"{r.unfused_ms:.2f} → {r.fused_ms:.2f} ms, **{r.ratio:.2f}×**"
            for column in columns
            for r in rows
            if (r.stage, r.shift, r.what, r.direction) == (stage, shift, *column)
        ]
        lines.append(f"| {stage} | {shift} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return answer.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, help="where to keep the rows as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = {
        "machine": processor(),
        "threads": options.threads,
        "vector_code": cpu_capability(),
        "torch": torch.__version__,
        "batch": options.batch,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    rows = [
        row
        for stage, (size, _) in enumerate(STAGES)
        for shift in ((0, 3) if size > WINDOW else (0,))
        for row in rows_of(stage, shift, options.batch, options.rounds)
    ]
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    print(table_of(rows))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields, "ratio", *facts])
            writer.writerows([*row, row.ratio, *facts.values()] for row in rows)


if __name__ == "__main__":
    main()
