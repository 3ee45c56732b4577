"""Two ways to start the ranks' processes: fresh interpreters, or forks of one that has loaded what they need."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distrib.errors import LaunchError
from distrib_launcher import guard, preloader, worker

_MAX_ANSWER = 1 << 20  # bytes
_PATIENCE_S = 20.0  # for an order to be taken: the preloader has nothing else to do


@dataclass(frozen=True)
class WorkerSpec:
    """One process to start.

    Attributes:
        rank: Its global rank.
        kind: "script", "module", "command" or "function".
        program: The script, module, command or file with the function, and its arguments.
        env: Its whole environment.
    """

    rank: int
    kind: str
    program: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Handed:
    """What a worker gets of the launcher's descriptors.

    Attributes:
        life: It is killed when the other end of this pipe closes.
        record: Where it tells how it ended.
        streams: Its stdout and stderr; empty if it shares the launcher's.
        stdin: Whether it has the launcher's stdin; else /dev/null.
    """

    life: int
    record: int
    streams: tuple[int, ...]
    stdin: bool


class PreloadFailed(Exception):  # noqa: N818 (says what happened; the launch goes on in another way)
    """Forking is not possible; the text says why."""


class StartRefused(Exception):  # noqa: N818 (as above)
    """The system did not let us start all processes; `Starter.started` has those that were.

    Args:
        error: What it said.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Starter(Protocol):
    """A way to start processes, for all attempts of one launch.

    Attributes:
        waits_on: Becomes readable when `take` can be called; None while there is nothing to wait for.
        serves_store: Whether it serves the store over which the ranks meet, so that no rank has to.
        store_fd: Becomes readable when the store has ended; None where it serves none now.
    """

    waits_on: int | None
    serves_store: bool
    store_fd: int | None

    def take(self) -> None:
        """Take note of what has come.

        Raises:
            PreloadFailed: if it will never be able to start anything.
            StartRefused: by the system.
            LaunchError: if the user has to mend something before.
        """

    def start(self, workers: Iterable[tuple[WorkerSpec, Handed]], count: int, listening: int | None) -> None:
        """Start one process for each; `started` has their ids as soon as there is nothing more to wait for.

        Args:
            workers: What to start. The descriptors of one are needed until the next one is asked for.
            count: How many there are.
            listening: A socket that listens where the ranks meet; for a starter that serves the store.

        Raises:
            StartRefused: by the system.
            PreloadFailed: if it has broken down.
        """

    @property
    def started(self) -> list[int]:
        """The processes of the last `start`, in its order."""

    def broken(self) -> str:
        """Say why it cannot start anything any more; an empty text if it can."""

    def pids(self) -> list[int]:
        """Return its own processes."""

    def end_attempt(self) -> None:
        """End what it has started beside the workers."""

    def close(self) -> None:
        """End its own processes."""


class Spawner:
    """Starts a fresh interpreter for each worker, or a command.

    Args:
        marker: This launch's value of the variable `guard.MARKER`.
    """

    waits_on: int | None = None
    serves_store = False
    store_fd: int | None = None

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self.started: list[int] = []

    def take(self) -> None:
        """There is nothing to wait for."""

    def start(self, workers: Iterable[tuple[WorkerSpec, Handed]], count: int, listening: int | None) -> None:
        """As `Starter.start`."""
        self.started = []
        try:
            for spec, handed in workers:
                self.started.append(self._start(spec, handed))
        except OSError as error:
            raise StartRefused(error) from error

    def _start(self, spec: WorkerSpec, handed: Handed) -> int:
        start = [sys.executable, str(Path(worker.__file__))]
        stdout, stderr = handed.streams or (None, None)
        with held_back():
            process = subprocess.Popen(
                [*start, *map(str, (handed.life, handed.record, os.getpid())), spec.kind, *spec.program],
                env={**spec.env, guard.MARKER: self._marker},
                stdin=None if handed.stdin else subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(handed.life, handed.record),
                start_new_session=True,
            )
        process.returncode = 0  # whoever watches it waits for it: `subprocess` is not to
        return process.pid

    def broken(self) -> str:
        """It never is."""
        return ""

    def pids(self) -> list[int]:
        """It has none."""
        return []

    def end_attempt(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """There is nothing to end."""


class Forker:
    """Forks the workers from a preloader (see `preloader.py`), which begins to load at once.

    Args:
        specs: Workers like those to come: the preloader has their program on its command line, and the part of their
            environment that they share.
        marker: This launch's value of the variable `guard.MARKER`.
        modules: What to load, in this order; what cannot be imported is left to the program to find out.
        wanted: More of them, named by the user: these have to be there.
    """

    def __init__(
        self, specs: Sequence[WorkerSpec], marker: str, modules: Sequence[str], wanted: Sequence[str]
    ) -> None:
        first, *others = specs
        self._common = {
            name: value
            for name, value in first.env.items()
            if all(spec.env.get(name) == value for spec in others)
        }
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_PATIENCE_S)
        self._wanted, self._store, self._is_ready = wanted, 0, False
        start = [sys.executable, str(Path(preloader.__file__)), str(theirs.fileno())]
        with theirs, held_back():
            self._process = subprocess.Popen(
                [*start, ",".join(modules), ",".join(wanted), first.kind, *first.program],
                env={**self._common, guard.MARKER: marker},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.started: list[int] = []
        self.waits_on: int | None = self._channel.fileno()
        self.serves_store = False
        self.store_fd: int | None = None
        self._store_life = self._store_read = -1

    def take(self) -> None:
        """As `Starter.take`: first what the preloader says when it has loaded everything, then of each start."""
        self.waits_on = None
        told = self._answer()
        if self._is_ready:
            self._take_start(told)
        else:
            self._take_load(told)

    def _take_load(self, told: Mapping[str, Any]) -> None:
        self._is_ready = True
        missing = {name: why for name, why in told["failed"].items() if name in self._wanted}
        if missing:
            raise LaunchError(
                "D0312",
                "; ".join(f"{name} cannot be imported: {why}" for name, why in missing.items()),
                where="launch.preload",
                fix="install it, correct its name, or leave it out",
            )
        if told["unsafe"]:
            raise PreloadFailed("; ".join(told["unsafe"]))
        self.serves_store = told["store"]

    def _take_start(self, told: Mapping[str, Any]) -> None:
        self.started, self._store = told["pids"], told["store"]
        if self._store:
            self.store_fd = os.pidfd_open(self._store)
        if told["errno"]:
            raise StartRefused(OSError(told["errno"], os.strerror(told["errno"])))

    def start(self, workers: Iterable[tuple[WorkerSpec, Handed]], count: int, listening: int | None) -> None:
        """As `Starter.start`."""
        self.started, self.waits_on = [], self._channel.fileno()
        try:
            for number, (spec, handed) in enumerate(workers):
                first = self._for_store(listening) if number == 0 and listening is not None else []
                order = {
                    "others": count - 1,
                    "listening": bool(first),
                    "env": {name: text for name, text in spec.env.items() if self._common.get(name) != text},
                    "stdin": handed.stdin,
                    "launcher": os.getpid(),
                }
                self._order(order, [*first, handed.life, handed.record, *handed.streams])
        except OSError as error:
            raise StartRefused(error) from error

    def _for_store(self, listening: int) -> list[int]:
        """Return what its server needs: the socket, and a pipe that closes when we end."""
        self._end_pipe()
        read, self._store_life = os.pipe()
        self._store_read = read
        return [listening, read]

    def _end_pipe(self) -> None:
        for fd in (self._store_life, self._store_read):
            if fd >= 0:
                os.close(fd)
        self._store_life = self._store_read = -1

    def _order(self, order: Mapping[str, object], fds: Sequence[int]) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        try:
            self._channel.sendmsg([json.dumps(order).encode()], [rights])
        except (ConnectionError, TimeoutError) as error:
            raise PreloadFailed(self._how_it_ended()) from error

    def _answer(self) -> dict[str, Any]:
        try:
            text = self._channel.recv(_MAX_ANSWER)
        except (ConnectionError, TimeoutError):
            text = b""
        if not text:
            raise PreloadFailed(self._how_it_ended())
        told: dict[str, Any] = json.loads(text)
        if "error" in told:
            raise PreloadFailed(f"the process that loads what the ranks need has failed: {told['error']}")
        return told

    def _how_it_ended(self) -> str:
        what = "the process that loads what the ranks need"
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return f"{what} does not answer"
        return (
            f"{what} was ended by {signal.Signals(-code).name}" if code < 0 else f"{what} ended with {code}"
        )

    def broken(self) -> str:
        """As `Starter.broken`: the preloader may have been killed."""
        return "" if self._process.poll() is None else self._how_it_ended()

    def pids(self) -> list[int]:
        """The preloader, and the server of the store."""
        return [self._process.pid, *([self._store] if self._store else [])]

    def end_attempt(self) -> None:
        """End the server of the store, and with it the hold on its port."""
        self._end_pipe()
        if self.store_fd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._store, signal.SIGKILL)
        ended = select.poll()
        ended.register(self.store_fd, select.POLLIN)
        ended.poll()
        os.close(self.store_fd)
        self.store_fd = None

    def close(self) -> None:
        """End the preloader, which has nothing to lose."""
        self.end_attempt()
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._store:
            with contextlib.suppress(ChildProcessError):  # handed to us when the preloader ended
                os.waitpid(self._store, 0)


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals, for the process started meanwhile too: it unblocks them when it can handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, worker.HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
