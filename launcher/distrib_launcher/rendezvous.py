"""The port at which the ranks of this machine meet, held for rank 0 until it listens."""

from __future__ import annotations

import errno
import socket
import sys

from distrib.errors import LaunchError

HOST = "127.0.0.1"
_QUEUE = 4096  # connections; the kernel takes fewer if it has a lower limit


class ReservedPort:
    """A TCP port that no other program gets while rank 0 starts up.

    The socket is bound and never listens, with SO_REUSEADDR: whoever sets that option too, as every store of torch
    does, can still bind and listen, but the kernel hands the port to nobody as a free one. So two launches at once
    never meet by accident, and there is no moment at which the port is free.

    Args:
        port: The port, or 0 for a free one.
        where: What asked for the port, to be named in an error.
        for_others: Whether ranks of other machines meet here too; else it is this machine's own.

    Raises:
        LaunchError: if the port is taken or not ours to take.
    """

    def __init__(self, port: int = 0, *, where: str | None = None, for_others: bool = False) -> None:
        self._lock = _lock(port, where, for_others=for_others) if port else None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if (
            port
        ):  # a port of the kernel's choice is free; asking with the option might give one that is shared
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("" if for_others else HOST, port))
        except (OSError, OverflowError) as error:
            self.release()
            raise _refused(port, where, error, for_others=for_others) from error
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port: int = self._socket.getsockname()[1]

    def listen(self) -> int:
        """Listen at the port, for a process that the socket is handed to; return its descriptor.

        Whoever comes before that process is ready waits in the queue, instead of being refused and trying again.
        """
        self._socket.listen(_QUEUE)
        return self._socket.fileno()

    def let_go(self) -> None:
        """Close our end of a socket that others hold by now: else who comes when they are gone would wait for ever."""
        self._socket.close()

    def release(self) -> None:
        """Let go of the port."""
        self._socket.close()
        if self._lock is not None:
            self._lock.close()


def _lock(port: int, where: str | None, *, for_others: bool) -> socket.socket | None:
    """Keep two launches from the same port: their reservations would not disturb each other, but their ranks would."""
    if sys.platform != "linux":
        return None
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0distrib-launch-port-{port}")  # an abstract name: as local as the port, and gone with us
    except OSError as error:
        lock.close()
        raise _refused(port, where, error, for_others=for_others) from error
    return lock


def _refused(port: int, where: str | None, error: Exception, *, for_others: bool) -> LaunchError:
    instead = (
        "name a free one on every machine: --master-port"
        if for_others
        else "leave the port out, so that a free one is chosen"
    )
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return LaunchError(
            "D0301",
            f"port {port} is in use{_owner(port)}; expected a free one",
            where=where,
            fix=instead if for_others else f"{instead}, or name another one",
        )
    return LaunchError(
        "D0302",
        f"port {port} on {HOST} cannot be used: {error}",
        where=where,
        fix=instead if for_others else f"{instead}, or name one above 1023",
    )


def _owner(port: int) -> str:
    """Name the process that has the port, where the system lets us see it."""
    import psutil  # noqa: PLC0415 (slow to import, and needed for this message only)

    try:
        found = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid}
    except psutil.Error:
        return ""
    return f" by process {', '.join(map(str, sorted(found)))}" if found else ""
