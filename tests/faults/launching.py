"""Starting `distrib launch` on a script of a test, and looking at what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LIMIT_S = 60.0


@dataclass(frozen=True)
class Launched:
    """What a launch that has ended printed and returned."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def report(self) -> list[str]:
        """The lines of the final report."""
        lines = self.err.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("distrib: ")]
        return lines[starts[-1] :]


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "distrib", "launch", *map(str, words)]


@contextmanager
def default_signals() -> Iterator[None]:
    """Let a started process have SIGHUP's default effect, even if the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def environment(**extra: str) -> dict[str, str]:
    root = Path(__file__).parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DISTRIB_")}
    return {**kept, "PYTHONPATH": f"{root}{os.pathsep}{root / 'launcher'}", **extra}


def launch(*words: object, cwd: Path, **extra: str) -> Launched:
    """Run a launch to its end."""
    start = time.monotonic()
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    return Launched(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


@contextmanager
def launching(*words: object, cwd: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """Start a launch; whatever the test does, none of its processes is left afterwards."""
    with default_signals():
        process = subprocess.Popen(
            command(*words),
            cwd=cwd,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> Launched:
    """Wait for the end of a launch."""
    start = time.monotonic()
    out, err = process.communicate(timeout=LIMIT_S)
    return Launched(process.returncode, out, err, time.monotonic() - start)


def pids(folder: Path, count: int) -> list[psutil.Process]:
    """Wait until `count` processes of the script have left a file `<pid>.pid`; return those that still live."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = list(folder.glob("*.pid"))
        if len(found) >= count:
            return [process for path in found for process in _living(int(path.stem))]
        time.sleep(0.02)
    raise AssertionError(f"only {found} after {LIMIT_S} s")


def _living(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []


def all_gone(processes: list[psutil.Process], within_s: float) -> bool:
    """Wait for processes that are not our children; a zombie counts as gone."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_lives(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
