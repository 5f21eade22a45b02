#!/usr/bin/env python3
"""In the place of Nsight Compute: runs a command, then writes a page of its launches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

START, END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
COLUMNS = [  # beside the launch's number and kernel: name, unit, value
    ("gpu__time_duration.sum", "ns", "80,000"),
    ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "%", "61.5"),
    ("dram__bytes.sum.per_second", "byte/s", "4,000,000,000,000"),
    ("smsp__inst_executed.sum", "inst", "1234567"),
    (f"{START}long_scoreboard{END}", "", "5.5"),
    (f"{START}barrier{END}", "", "1.25"),
    (f"{START}selected{END}", "", "1.0"),
    (f"{START}wait{END}", "", "2.0"),
    (f"{START}math_pipe_throttle{END}", "", "n/a"),
    (f"{START}wait_not_issued{END}", "", "9.0"),
]


def page(*kernels: str) -> str:
    """As Nsight Compute 2025.3 writes `--csv --page raw --print-units base`."""
    names, units, values = zip(*COLUMNS)
    lines = [("ID", "Kernel Name", *names), ("", "", *units)]
    lines += [(i, f"{kernel}(int, float)", *values) for i, kernel in enumerate(kernels)]
    quoted = (",".join(f'"{x}"' for x in line) for line in lines)
    return "\n".join(["==PROF== Connected to process 12 (/usr/bin/python3)", *quoted])


def main(arguments: list[str]) -> None:
    log = Path(arguments[arguments.index("--log-file") + 1])
    command = arguments[arguments.index("--log-file") + 2 :]
    subprocess.run(command, check=True)
    launched = json.loads(Path(command[command.index("--launches") + 1]).read_text())
    log.write_text(page(*(kernel for *_, kernel in launched)))


if __name__ == "__main__":
    main(sys.argv[1:])
