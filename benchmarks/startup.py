"""CPU time of importing the library and of its commands, each in a fresh process."""

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import MILLI, OURS, PEER, RAW, Bar, Row, cpu_s, interleaved

ROUNDS = 9
BIN = Path(sys.executable).parent
DO_NOTHING = (sys.executable, "-c", "pass")
CASES = (
    (
        "import",
        100,
        {
            RAW: DO_NOTHING,
            PEER: (sys.executable, "-c", "import accelerate"),
            "fabric": (sys.executable, "-c", "import lightning_fabric"),
            OURS: (sys.executable, "-c", "import distrib"),
        },
    ),
    (
        "--help",
        100,
        {
            RAW: DO_NOTHING,
            "torchrun": (BIN / "torchrun", "--help"),
            PEER: (BIN / "accelerate", "--help"),
            OURS: (BIN / "distrib", "--help"),
        },
    ),
    ("launch --explain", 400, {RAW: DO_NOTHING, OURS: (BIN / "distrib", "launch", "--explain", "train.py")}),
)


def run() -> list[Row]:
    """The bars are judged by the smallest value: other programs can only add to the time of a process."""
    rows = []
    for what, limit_ms, commands in CASES:
        row = Row(what, "ms CPU", interleaved(commands, cpu_ms, ROUNDS))
        row.bars.append(Bar("least ms", min(row.samples[OURS]), limit_ms))
        rows.append(row)
    return rows


def cpu_ms(command: tuple[str, ...]) -> float:
    return cpu_s(lambda: subprocess.run(command, check=True, capture_output=True, timeout=60)) / MILLI
