"""A worker as the launcher sees it: a process, what it tells, and how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib_launcher.starting import Handed, WorkerSpec

_CRASH = "Fatal Python error"  # how faulthandler begins to tell of one
_OWN_FOLDER = f"{Path(__file__).parent}/"
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Outcome:
    """How one worker ended.

    Attributes:
        rank: Its global rank.
        pid: Its process id.
        returncode: As `subprocess` gives it: the exit code, or minus the signal.
        at: When it failed or ended, on the monotonic clock, in seconds.
        stopped: Whether it ended only after the launcher had begun to stop everybody.
        event: What the program's end was, as `distrib_launcher.worker` told it; empty if it told nothing. Of a
            command, which cannot tell, only the kind.
        crash: The Python stack at a crash in native code; empty if there is none.
        stood: The Python stack, innermost frame first, when it was asked to end: (file, line, function).
    """

    rank: int
    pid: int
    returncode: int
    at: float
    stopped: bool = False
    event: Mapping[str, Any] = field(default_factory=dict)
    crash: str = ""
    stood: tuple[tuple[str, int, str], ...] = ()


class Worker:
    """A process of the job and the pipes to it.

    Args:
        spec: What it runs.
        capture: Whether its output comes to us.
        stdin: Whether it reads our stdin.

    Attributes:
        handed: Its ends of the pipes, until it has started.
        streams: Our ends of its stdout and stderr, which the caller owns; empty if it shares ours.
        record_fd: Readable when it tells something, or has ended.
        exit_fd: Readable when it has ended.
        pid: Its process id.
        returncode: As in `Outcome`; None while it runs.
        event: As in `Outcome`.
    """

    def __init__(self, spec: WorkerSpec, *, capture: bool, stdin: bool) -> None:
        self.rank, self._is_command = spec.rank, spec.kind == "command"
        life, self._life = os.pipe()
        self.record_fd, record = os.pipe()
        os.set_blocking(self.record_fd, False)
        pipes = [os.pipe() for _ in range(2 if capture else 0)]
        self.streams = tuple(read for read, _ in pipes)
        self.handed = Handed(life, record, tuple(write for _, write in pipes), stdin)
        self.pid, self.exit_fd = 0, -1
        self.returncode: int | None = None
        self.event: dict[str, Any] = {}
        self._ended_at = 0.0
        self._told, self._unread = list[str](), b""
        self._sent: set[int] = set()

    def started(self, pid: int) -> None:
        """It runs: watch it."""
        self.pid, self.exit_fd = pid, _exit_fd(pid)

    def let_go(self) -> None:
        """Close its ends of the pipes: it has its own copies."""
        for fd in (self.handed.life, self.handed.record, *self.handed.streams):
            os.close(fd)

    @property
    def failed(self) -> bool:
        """Whether it has ended, or said that it is about to end, other than with exit code 0."""
        return bool(self.returncode) or bool(self.event.get("exit_code"))

    def read_record(self) -> bool:
        """Take what it has told; return whether more can come."""
        try:
            chunk = os.read(self.record_fd, 1 << 20)
        except BlockingIOError:
            return True
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))
        return bool(chunk)

    def _take(self, line: str) -> None:
        if line.startswith('{"'):
            with contextlib.suppress(ValueError):  # a crash that told of itself in the middle of it
                self.event = json.loads(line)
                return
        self._told.append(line)

    def reap(self) -> None:
        """Take note of its end; waits for that."""
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended_at = time.monotonic()
        self.read_record()

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.returncode is None and self.pid:
            self._sent.add(number)
            _signal_main_thread(self.pid, number)

    def outcome(self, stop_at: float | None) -> Outcome:
        """Return how it ended.

        Args:
            stop_at: When the launcher began to stop everybody, on the monotonic clock; None if it did not.
        """
        assert self.returncode is not None
        at = float(self.event.get("time", self._ended_at))
        crash = next((i for i, line in enumerate(self._told) if _CRASH in line), len(self._told))
        return Outcome(
            rank=self.rank,
            pid=self.pid,
            returncode=self.returncode,
            at=at,
            stopped=stop_at is not None and at >= stop_at and not self._died_of_another_signal(),
            event={"kind": "command"} if self._is_command else self.event,
            crash="\n".join(self._told[crash:]).strip(),
            stood=_frames(self._told[:crash]),
        )

    def _died_of_another_signal(self) -> bool:
        """Whether a signal ended it that we did not send: it may have been dying when we began to stop it."""
        assert self.returncode is not None
        return self.returncode < 0 and -self.returncode not in self._sent

    def release(self) -> None:
        """Close our ends of the pipes, but for its streams."""
        for fd in (self.exit_fd, self.record_fd, self._life):
            if fd >= 0:
                os.close(fd)


def _signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to a process's first thread, the only one whose Python stack its handler can tell."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30 and newer
    if tgkill is None or tgkill(pid, pid, number) != 0:
        os.kill(pid, number)


def _frames(lines: list[str]) -> tuple[tuple[str, int, str], ...]:
    """Return the frames of a stack, innermost first, without our own."""
    found = (_FRAME.match(line) for line in lines)
    return tuple(
        (each[1], int(each[2]), each[3]) for each in found if each and not each[1].startswith(_OWN_FOLDER)
    )


def _exit_fd(pid: int) -> int:
    """Return a descriptor that becomes readable when the process, a child of ours, ends."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    read, write = os.pipe()

    def wait() -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.close(write)

    threading.Thread(target=wait, daemon=True).start()
    return read
