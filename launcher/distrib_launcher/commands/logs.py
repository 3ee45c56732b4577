"""`distrib logs`: print what the ranks of a launch have written, and follow it."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from distrib.errors import LaunchError
from distrib_launcher.numa import format_numbers
from distrib_launcher.output import Assembler, say, unwritable, write_all
from distrib_launcher.run_folder import RunFolder, unreadable

_BLOCK = 1 << 16  # bytes
_TURN = 16  # blocks of one rank before it is the next one's turn
_PAUSE_MS = 200  # between two looks at the files


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    *("--rank", "ranks"),
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Only this rank; may be repeated.",
)
@click.option("--attempt", type=click.IntRange(min=0), metavar="K", help="0 is the first; default: the last.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the launch has ended.")
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N of each rank.")
def logs(*, run: Path, ranks: tuple[int, ...], attempt: int | None, follow: bool, lines: int | None) -> int:
    """Print what the ranks of RUN have written.

    RUN is the folder of a run, or that of --log-dir, of which the newest run is taken. Lines of more than one rank
    come after "[rank N] ".
    """
    try:
        with closing(View(RunFolder.find(run), ranks, attempt, lines)) as view:
            if follow:
                with _ended_by_control_c():
                    view.follow(moves_on=attempt is None)
            else:
                view.show()
    except _ReaderGoneError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


@contextmanager
def _ended_by_control_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once: as an exception it is lost where Python ignores those, as in finalizers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _ReaderGoneError(Exception):
    """Nobody reads our stdout any more."""


class Log:
    """One rank's log, read as it grows. It may not be there yet, may be cut, or be replaced by another file.

    Args:
        path: Where it is.
        last: Begin so many lines before the end; None for the whole of it. What comes in its place is read whole.

    Raises:
        LaunchError: here and in `read`, if the file is there and cannot be opened.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self.path = path
        self._file: BinaryIO | None = self._opened()
        self._assembler = Assembler()
        if self._file is not None and last is not None:
            self._file.seek(start_of_last(self._file, last))

    def read(self) -> list[bytes] | None:
        """Return the lines that the next block of it finishes; None if there is nothing more for now."""
        self._file = self._file or self._opened()
        if self._file is None:
            return None
        replaced = self._is_replaced(self._file)  # asked first: what the old file got until then is read
        block = self._file.read(_BLOCK)
        if block:
            return self._assembler.feed(block)
        if not replaced:
            return None
        self.close()
        return self.rest()

    def rest(self) -> list[bytes]:
        """Return the line that was not finished, if there is one."""
        return self._assembler.finish()

    def close(self) -> None:
        """Let go of the file; `read` would open it again from its start."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _opened(self) -> BinaryIO | None:
        try:
            return self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(self.path, error.strerror or str(error)) from error

    def _is_replaced(self, file: BinaryIO) -> bool:
        """Whether another file has taken the place, or this one is shorter than what was read of it."""
        try:
            there = self.path.stat()
        except FileNotFoundError:  # moved away, and the next one is not there yet
            return False
        ours = os.fstat(file.fileno())
        return not os.path.samestat(there, ours) or ours.st_size < file.tell()


class View:
    """What is shown of a run.

    Args:
        run: The run.
        ranks: Which ranks; empty for all.
        attempt: Which attempt; None for the newest.
        last: How many lines of each rank, of those that are there now; None for all.

    Raises:
        LaunchError: if there is no such attempt.
    """

    def __init__(self, run: RunFolder, ranks: Sequence[int], attempt: int | None, last: int | None) -> None:
        self._run = run
        self._ranks = sorted(set(ranks))
        self._attempt = _attempt(run, attempt)
        self._last = last
        self._several = len(self._ranks or range(run.about().get("num_processes", 1))) > 1
        self._logs: dict[int, Log] = {}

    def show(self) -> None:
        """Print what is there now, rank by rank.

        Raises:
            LaunchError: if a rank has no log, or a log cannot be read.
        """
        self._check_ranks(running=False)
        self._open(self._last)
        for rank, log in self._logs.items():
            while self._turn(rank, log):
                pass
            self._print(rank, log.rest())

    def close(self) -> None:
        """Let go of the logs."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def follow(self, *, moves_on: bool) -> None:
        """Print what is there and what comes, until the launch has ended.

        Args:
            moves_on: Whether to go on with the attempts that come after this one.

        Raises:
            LaunchError: as `show`; of a launch that still runs a rank's log may come later.
        """
        running = self._run.is_running()
        self._check_ranks(running=running is not False)
        if running is None:
            say(
                "distrib: it cannot be told from here whether this launch still runs; Ctrl-C ends the display"
            )
        self._open(self._last)
        while True:
            over = self._run.is_running() is False  # asked first: what was written until then is read
            later = [attempt for attempt in self._run.attempts() if attempt > self._attempt]
            self._open(None)
            more = [self._turn(rank, log) for rank, log in self._logs.items()]
            if any(more):
                continue
            if later or over:
                self._finish()
            if later and moves_on:
                self._attempt = later[0]
                say(f"distrib: attempt {self._attempt}")
            elif later or over:
                say(f"distrib: {_end(self._run) if over else f'attempt {self._attempt} has ended'}")
                return
            elif _reader_leaves(_PAUSE_MS):
                raise _ReaderGoneError

    def _check_ranks(self, *, running: bool) -> None:
        there, about = self._run.ranks(self._attempt), self._run.about()
        count = about.get("world_size", about.get("num_processes", 0)) if running else 0
        missing = [rank for rank in self._ranks if rank not in there and rank >= count]
        if missing:
            known = f"there are those of {format_numbers(there)}" if there else "there is none"
            raise LaunchError(
                "D0322",
                f"rank {missing[0]} has no log in attempt {self._attempt}; {known}",
                where=str(self._run.path),
                fix="name a rank that has one, or leave --rank out",
            )

    def _open(self, last: int | None) -> None:
        """Take up the logs that are new since the last look."""
        for rank in self._ranks or self._run.ranks(self._attempt):
            if rank not in self._logs:
                self._logs[rank] = Log(self._run.log_path(self._attempt, rank), last)

    def _turn(self, rank: int, log: Log) -> bool:
        """Print the next blocks of a log; return whether there may be more right now."""
        for _ in range(_TURN):
            lines = log.read()
            if lines is None:
                return False
            self._print(rank, lines)
        return True

    def _finish(self) -> None:
        for rank, log in self._logs.items():
            self._print(rank, log.rest())
        self.close()

    def _print(self, rank: int, lines: Sequence[bytes]) -> None:
        prefix = b"[rank %d] " % rank if self._several or len(self._logs) > 1 else b""
        refusal = write_all(1, b"".join(prefix + line + b"\n" for line in lines))
        if isinstance(refusal, ConnectionError):
            raise _ReaderGoneError
        if refusal is not None:
            raise unwritable(refusal)


def start_of_last(file: BinaryIO, lines: int) -> int:
    """Return where the last lines of a file begin, in bytes; a line without an end counts."""
    end = file.seek(0, os.SEEK_END)
    if lines == 0:
        return end
    behind = max(end - 1, 0)  # a line end that is the file's last byte begins no line
    while behind > 0:
        start = max(behind - _BLOCK, 0)
        file.seek(start)
        block = file.read(behind - start)
        place = len(block)
        while (place := block.rfind(b"\n", 0, place)) >= 0:
            lines -= 1
            if lines == 0:
                return start + place + 1
        behind = start
    return 0


def _attempt(run: RunFolder, attempt: int | None) -> int:
    attempts = run.attempts()
    if attempt is None and attempts:
        return attempts[-1]
    if attempt is None or attempt not in attempts:
        problem = "there is no attempt" + (f" {attempt}" if attempt is not None else "")
        known = f"; there are {format_numbers(attempts)}" if attempts and attempt is not None else ""
        raise LaunchError(
            "D0322",
            problem + known,
            where=str(run.path),
            fix="leave --attempt out for the newest one" if attempts else "name another run",
        )
    return attempt


def _end(run: RunFolder) -> str:
    code = run.about().get("exit_code")
    return f"the launch has ended with exit code {code}" if code is not None else "the launcher is gone"


def _reader_leaves(within_ms: int) -> bool:
    """Wait; return early and with True if nobody reads our stdout any more."""
    watch = select.poll()
    watch.register(1, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in watch.poll(within_ms))
