"""The guard: a small process that outlives the launcher and ends whatever the launcher leaves behind.

The launcher starts it as `python -I -S guard.py MARKER` and holds the write end of its standard input. Each line tells
of one worker ("PID START"), the line "done" dismisses the guard. End of file without "done" means that the launcher
died: the guard then kills the worker's sessions and everything that carries the marker, grandchildren included.

This file imports the standard library's quick parts only, so that the guard is up before the first worker.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

MARKER = "_DISTRIB_RUN"  # environment variable that every process of a launch inherits
_ROUNDS = 100  # a process can fork between the scan and the kill; each round finds fewer


class Process(NamedTuple):
    """One line of the process table.

    Attributes:
        pid: Its process id.
        parent: Process id of its parent.
        session: Id of its session, which is the process id of the session's leader.
        start: When it started, in clock ticks since boot; with `pid` it names a process for good.
        ended: Whether it has ended and only waits for its parent to notice.
    """

    pid: int
    parent: int
    session: int
    start: int
    ended: bool


def processes() -> list[Process]:
    """Return every process that /proc shows; empty where there is no /proc."""
    if not os.path.isdir("/proc/self"):  # noqa: PTH112 (pathlib would double the guard's start-up)
        return []
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 (as above)
    return [process for process in found if process is not None]


def read_process(pid: int) -> Process | None:
    """Read one process from /proc; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (as above)
            fields = file.read().rpartition(b")")[2].split()  # the name before ")" may hold anything
    except OSError:
        return None
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), ended=fields[0] in b"ZX")


def belongs(process: Process, table: dict[int, Process], sessions: dict[int, int], marker: str) -> bool:
    """Whether a process is part of the launch: in the session of one of its workers, or carrying its marker.

    Args:
        process: The process in question.
        table: The processes by id.
        sessions: Start time of each worker by its process id. A session number can be reused after all of its
            processes have ended; the leader's start time tells such a stranger.
        marker: The launch's own value of the variable `MARKER`.
    """
    leader = table.get(process.session)
    if process.session in sessions and (leader is None or leader.start == sessions[process.session]):
        return True
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:  # noqa: PTH123 (as above)
            return f"{MARKER}={marker}".encode() in file.read().split(b"\0")
    except OSError:  # another user's, or gone
        return False


def members(sessions: dict[int, int], marker: str) -> list[Process]:
    """Return the launch's living processes, but for the caller itself. Arguments as in `belongs`."""
    table = {process.pid: process for process in processes()}
    return [
        process
        for process in table.values()
        if not process.ended and process.pid != os.getpid() and belongs(process, table, sessions, marker)
    ]


def kill_all(sessions: dict[int, int], marker: str) -> None:
    """Kill the launch's processes until none is left. Arguments as in `belongs`."""
    for session in sessions:
        if not os.path.isdir("/proc/self"):  # noqa: PTH112 (as above)
            _signal(os.killpg, session)
    for _ in range(_ROUNDS):
        found = members(sessions, marker)
        for process in found:
            _signal(os.kill, process.pid)
        if not found:
            return


def _signal(send: Callable[[int, int], None], target: int) -> None:
    try:
        send(target, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def main(marker: str) -> None:
    """Wait for the launcher's end; clean up after it unless it said "done"."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    sessions: dict[int, int] = {}
    for line in sys.stdin:
        if line == "done\n":
            return
        pid, start = line.split()
        sessions[int(pid)] = int(start)
    kill_all(sessions, marker)


if __name__ == "__main__":
    main(sys.argv[1])
