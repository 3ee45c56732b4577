"""Paired measurement: the contestants take turns in one run, so that what else the machine does falls on all alike."""

import contextlib
import ctypes
import gc
import io
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RAW, PEER, OURS = "raw", "accelerate", "distrib"
MILLI, MICRO, MEGA = 1e-3, 1e-6, 1e6


@dataclass(frozen=True)
class Bar:
    """A limit, met if `value` is at most `limit`; a `target` is shown but does not fail the run."""

    text: str
    value: float
    limit: float
    target: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """What was measured: contestant -> one value per round. Values of one round were taken side by side."""

    what: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    bars: list[Bar] = field(default_factory=list)

    def ratio(self, to: str, of: str = OURS) -> float:
        """Return the median of the paired ratios."""
        return statistics.median(a / b for a, b in self._pairs(of, to))

    def over(self, to: str = RAW, of: str = OURS) -> float:
        """Return the median of the paired differences."""
        return statistics.median(a - b for a, b in self._pairs(of, to))

    def most_over(self, to: str = RAW, of: str = OURS) -> float:
        """Return the largest paired difference: for counts, which are exact."""
        return max(a - b for a, b in self._pairs(of, to))

    def _pairs(self, of: str, to: str) -> Iterable[tuple[float, float]]:
        return zip(self.samples[of], self.samples[to], strict=True)


def interleaved(
    contestants: Mapping[str, Any], measure: Callable[[Any], float], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Give every contestant one turn per round, each round another one first.

    Args:
        contestants: Name -> what `measure` is called with.
        measure: Returns the value of one turn.
        rounds: Values per contestant.
        warm_up: Rounds before that, whose values are dropped.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = measure(contestants[name])
            if turn >= 0:
                samples[name].append(value)
    return samples


def cpu_s(function: Callable[[], object]) -> float:
    """Return CPU seconds of all threads of this process and of the children that it waited for."""
    start = _cpu_clock()
    function()
    return _cpu_clock() - start


def wall_s(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def per(turns: int, clock: Callable[[Callable[[], object]], float], unit: float) -> Callable[..., float]:
    """Return a measure of one call out of `turns` in a row, in `unit` seconds."""

    def measure(function: Callable[[], object]) -> float:
        def repeat() -> None:
            for _ in range(turns):
                function()

        return clock(repeat) / turns / unit

    return measure


def python_calls(function: Callable[[], object]) -> int:
    """Return how many Python functions run inside `function`, resumptions of generators included: exact."""
    calls = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    gc.disable()  # finalizers of older garbage are not this function's calls
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls - 1  # `function` itself


def num_collectives(function: Callable[[], object]) -> int:
    """Return how many torch.distributed operations run, as torch's profiler sees them: DDP's reducer included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name.startswith("c10d::") for event in profile.events())


def peak_mb(function: Callable[[], object], above: float | None = None) -> float:
    """Return how far the resident size rose, at its peak, above `above` or its value at the start, in 10**6 bytes."""
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes the present size
    before = resident_mb() if above is None else above
    function()
    return resident_mb("VmHWM") - before


def resident_mb(key: str = "VmRSS") -> float:
    """Return the resident size of this process, or its peak (VmHWM), in 10**6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / MEGA


def give_back_memory() -> None:
    """Return freed memory to the system: else it would be used again, unseen and faster than in a new process."""
    ctypes.CDLL(None).malloc_trim(0)


def alone(function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """Call a module-level function in a fresh process that is no rank of anything."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which start-up lines are not shown."""
    return contextlib.redirect_stderr(io.StringIO())


def _cpu_clock() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
