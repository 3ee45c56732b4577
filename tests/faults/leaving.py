"""Launches of which nothing may be left, wherever its processes have gone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.faults.launching import LIMIT_S, Launched

_PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def nothing_left(within_s: float = 5.0) -> Iterator[None]:
    """Fail if a process that was started in the block, at whatever depth, is there `within_s` seconds after it.

    This process becomes the parent of every orphan meanwhile, so that none can get away.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = set(_descendants())
    try:
        yield
        left = _outliving(before, within_s)
        names = [" ".join(each.cmdline())[:120] for each in left if each.is_running()]
        assert not left, f"left behind after {within_s} s: {names}"
    finally:
        for each in _outliving(before, 0.0):
            each.kill()
        _outliving(before, 2.0)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _outliving(before: set[psutil.Process], within_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + within_s
    while True:
        left = [each for each in _descendants() if each not in before]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.02)


def _descendants() -> list[psutil.Process]:
    """Return our living descendants, and take leave of orphans that have ended."""
    living = []
    for each in psutil.Process().children(recursive=True):
        try:
            if each.status() != psutil.STATUS_ZOMBIE:
                living.append(each)
            elif "python" not in each.name():  # `subprocess` waits for the launchers itself
                os.waitpid(each.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def until(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a file that the launch's script writes."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None, f"the launch has ended before {path.name}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no {path.name} after {LIMIT_S} s"
        time.sleep(0.01)


def ended_by(process: subprocess.Popen[str], *numbers: signal.Signals) -> Launched:
    """Send a launch signals and wait for its end."""
    start = time.monotonic()
    for number in numbers:
        with suppress(ProcessLookupError):
            process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT_S)
    return Launched(process.returncode, out, err, time.monotonic() - start)
