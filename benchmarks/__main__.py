"""Run suites, print their tables, and exit with 1 if a bar is not met.

python -m benchmarks [startup] [steps] [data] [collectives] [checkpoint] [planning] [memory] [sharding] [zero] [launch]
    [--json FILE]
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import OURS, PEER, RAW, Bar, Row

SUITES = (
    "startup",
    "steps",
    "data",
    "collectives",
    "checkpoint",
    "planning",
    "memory",
    "sharding",
    "zero",
    "launch",
)
VERSIONS = ("distrib", "torch", "accelerate", "lightning-fabric")
WIDTH = 150  # of the tables, where the output is no terminal
VERDICTS = {  # (met, target) -> color, word
    (True, False): ("green", "met"),
    (True, True): ("green", "reached"),
    (False, False): ("red", "NOT MET"),
    (False, True): ("yellow", "not yet"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=f"any of {', '.join(SUITES)}; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there too")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"unknown suite: {', '.join(sorted(unknown))}; expected any of {', '.join(SUITES)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces its starts and stops
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    results: dict[str, list[Row]] = {}
    for name in options.suites or SUITES:
        suite = importlib.import_module(f"benchmarks.{name}")
        with console.status(f"{name}: measuring"):
            results[name] = suite.run()
        console.print(table(f"{name}: {suite.__doc__.splitlines()[0]}", results[name]), judged(results[name]))
    if options.json:
        rows = {name: [asdict(row) for row in rows] for name, rows in results.items()}
        options.json.write_text(json.dumps({"about": about, "suites": rows}, indent=1))
    return verdict(console, [bar for rows in results.values() for row in rows for bar in row.bars])


def machine() -> dict[str, str]:
    """Say when, where and with what."""
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{cpu.partition(':')[2].strip()} x {os.cpu_count()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def table(title: str, rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.samples))
    names.sort(key=lambda name: (name == OURS, name != RAW))  # raw first, ours last
    shown = Table(title=title, title_justify="left")
    shown.add_column("median (least - most)")
    shown.add_column("unit")
    for column in (*names, f"{OURS} / {RAW}", f"{OURS} / {PEER}"):
        shown.add_column(column, justify="right")
    for row in rows:
        ratios = (f"{row.ratio(to):.2f}" if min(row.samples.get(to, [0])) > 0 else "" for to in (RAW, PEER))
        cells = (spread(row.samples.get(name, ())) for name in names)
        shown.add_row(row.what, row.unit, *cells, *ratios)
    return shown


def judged(rows: Sequence[Row]) -> Table:
    """Return the verdict on every bar and target."""
    shown = Table(box=None, show_header=False)
    for row in rows:
        for bar in row.bars:
            color, word = VERDICTS[bar.met, bar.target]
            kind = "target" if bar.target else "bar"
            limit = f"{figure(bar.value)}, {kind} {figure(bar.limit)}"
            shown.add_row(f"[{color}]{word}[/]", f"{row.what}, {row.unit}", bar.text, limit)
    return shown


def spread(values: Sequence[float]) -> str:
    """Show the median and, where they differ, the smallest and the largest value."""
    if not values:
        return ""
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{figure(statistics.median(values))} ({low} - {high})"


def figure(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def verdict(console: Console, bars: Sequence[Bar]) -> int:
    binding = [bar for bar in bars if not bar.target]
    missed = [bar for bar in binding if not bar.met]
    targets = [bar for bar in bars if bar.target]
    console.print(
        f"{len(binding) - len(missed)} of {len(binding)} bars met; "
        f"{sum(bar.met for bar in targets)} of {len(targets)} targets reached"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
