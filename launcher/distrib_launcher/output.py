"""The ranks' output on the launcher's own stdout and stderr: whole lines, each with its rank, none lost."""

from __future__ import annotations

import os
import re
import select
import selectors
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from distrib.errors import LaunchError

_CHUNK = 1 << 16  # bytes; a pipe's capacity
_LONGEST = (
    1 << 20
)  # bytes of a line; a longer one comes in pieces, so that no rank can fill the launcher's memory
_NAMES: Final = {1: "stdout", 2: "stderr"}
_BYTES_OF_A_COLUMN = 64  # enough for any character and its color
_ERASE = b"\r\x1b[K"
_UP_AND_DOWN = re.compile(rb"(?:\x1b\[A)+\n+")  # how a bar below another one is overwritten
_COLORS: Final = (36, 33, 32, 35, 34, 31)  # cyan first; a terminal's own shades
_NOT_COLOR = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-ln-~]"
)  # would move the cursor, or erase, among other ranks' lines
_ESCAPE = re.compile("(\x1b\\[[0-?]*[ -/]*[@-~])")  # a control sequence (ECMA-48, 5.4), such as a color


@dataclass
class Assembler:
    """Cuts one stream into whole lines, and keeps the one that is still being written.

    Of bars below one another, the lower ones share that line.

    Attributes:
        tail: The unfinished line, at most `_LONGEST` long. Of text that carriage returns overwrote, only the last
            state is kept.
    """

    tail: bytes = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take what arrived; return the lines that it finished, without their ends."""
        text = self.tail + chunk
        if b"\x1b[A" in text:
            text = _UP_AND_DOWN.sub(b"\r", text)
        *lines, tail = text.split(b"\n")
        body = tail.rstrip(b"\r")
        overwritten = b"\r" if b"\r" in body else b""
        self.tail = overwritten + _last_state(body) + tail[len(body) :]
        if len(self.tail) > _LONGEST:
            lines, self.tail = [*lines, self.tail], b""
        return [_shown(line) for line in lines]

    @property
    def unfinished(self) -> bytes:
        """What a terminal would show of the line that is being written; empty if there is none."""
        return _shown(self.tail)

    @property
    def progress(self) -> bytes:
        """The same of a line that is being overwritten."""
        return self.unfinished if b"\r" in self.tail else b""

    def finish(self) -> list[bytes]:
        """The stream has ended: return what is left, as a line."""
        rest, self.tail = self.unfinished, b""
        return [rest] if rest else []


def _last_state(line: bytes) -> bytes:
    return line.rpartition(b"\r")[2]


def _shown(line: bytes) -> bytes:
    return _NOT_COLOR.sub(b"", _last_state(line.rstrip(b"\r")))


def fitting(line: bytes, columns: int) -> bytes:
    """Cut a line to a number of columns, between characters. Colors take no room, and those behind the cut stay."""
    line = line[: _BYTES_OF_A_COLUMN * columns]
    room, kept = columns, []
    for part in _ESCAPE.split(line.decode(errors="replace")):
        if part.startswith("\x1b["):
            kept.append(part)
            continue
        for character in part:
            room -= _width(character)
            if room >= 0:
                kept.append(character)
    return line if room >= 0 else "".join(kept).encode()


def _width(character: str) -> int:
    """Return how many columns a character takes on a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@dataclass
class Surface:
    """One terminal, file or pipe that lines go to, with the progress line that may stand at its end.

    Attributes:
        terminal: Whether text can be erased.
        fd: Its file descriptor, which knows how wide a terminal is.
        open_text: The progress text that stands without a line end.
        open_source: Whose it is.
    """

    terminal: bool
    fd: int = 2
    open_text: bytes = b""
    open_source: object = None

    def line(self, source: object, text: bytes) -> bytes:
        """Return the bytes that put a whole line there, below or in place of the progress line."""
        own = source == self.open_source
        opened, self.open_text = self.open_text, b""
        if not opened:
            return text + b"\n"
        if own and text == opened:
            return b"\n"
        if own:
            return (_ERASE if self.terminal else b"\r") + text + b"\n"
        if self.terminal:
            self.open_text = opened
            return _ERASE + text + b"\n" + opened
        return b"\n" + text + b"\n"

    def message(self, text: bytes) -> bytes:
        """Return the bytes that put a line of the launcher's own there, over a "^C" that the keyboard has left."""
        echoed = self.terminal and not self.open_text
        return (_ERASE if echoed else b"") + self.line(None, text)

    def is_left(self, refusal: OSError) -> bool:
        """Whether text was refused because the reader has gone: closed its pipe, or the terminal's window."""
        return self.terminal or isinstance(refusal, ConnectionError)

    def progress(self, source: object, text: bytes) -> bytes:
        """Return the bytes that show an unfinished line in place."""
        other = self.open_text and source != self.open_source
        if self.terminal:
            text = fitting(text, _columns(self.fd) - 1)  # a wrapped line cannot be erased
        if text == self.open_text and not other:
            return b""
        had_text, self.open_text, self.open_source = bool(self.open_text), text, source
        if self.terminal:
            return (_ERASE if had_text else b"") + text
        return (b"\n" if other else b"\r" if had_text else b"") + text


@dataclass(frozen=True)
class Source:
    """A stream of one rank.

    Attributes:
        fd: Where to read it.
        target: File descriptor to show it on.
        prefix: Put before each line.
        shows_progress: Whether an unfinished line is shown as it changes: on a terminal every one, such as a prompt;
            elsewhere one with carriage returns.
        log: File descriptor that gets the lines as well, without the prefix; -1 if there is none.
        shown: Whether the lines are shown at all.
    """

    fd: int
    target: int
    prefix: bytes
    shows_progress: bool
    log: int = -1
    shown: bool = True
    assembler: Assembler = field(default_factory=Assembler, compare=False)


@dataclass(frozen=True)
class Display:
    """How the output of several workers is shown and kept.

    Attributes:
        shown: The ranks whose lines are shown; None: all.
        log: Rank -> the file that keeps its lines, in a folder that is there then (OSError if there can be none);
            None: nothing is kept.
        color: Whether the prefix of a line has its rank's color, where that goes to a terminal.
    """

    shown: frozenset[int] | None = None
    log: Callable[[int], Path] | None = None
    color: bool = False

    def captures(self, num_workers: int) -> bool:
        """Whether the output has to come to us: a worker alone may write to our own streams."""
        return num_workers > 1 or self.log is not None or self.shown is not None

    def sources(self, workers: Sequence[tuple[int, Sequence[int]]]) -> list[Source]:
        """Return the streams to copy. Logs that cannot be opened are missed, which is said once; the job goes on.

        Args:
            workers: Of each its rank, and where to read its stdout and stderr.
        """
        found = []
        logs = self._open_logs([rank for rank, _ in workers])
        for number, (rank, streams) in enumerate(workers):
            log = logs.get(rank, -1)
            shown = self.shown is None or rank in self.shown
            for target, fd in zip((1, 2), streams, strict=True):
                prefix = self._prefix(rank, target) if len(workers) > 1 else b""
                found.append(Source(fd, target, prefix, number == 0, log, shown))
        return found

    def _open_logs(self, ranks: Sequence[int]) -> dict[int, int]:
        """Return the descriptor of each rank's log, of those that can be opened."""
        logs, refusal = dict[int, int](), ""
        if self.log is None:
            return logs
        for rank in ranks:
            try:
                logs[rank] = _open_log(self.log(rank))
            except OSError as error:  # a full disk, or somebody has removed the folder
                refusal = str(error.strerror)
        if refusal:
            say(_incomplete(refusal))
        return logs

    def _prefix(self, rank: int, target: int) -> bytes:
        if self.color and os.isatty(target):
            return f"\x1b[{_COLORS[rank % len(_COLORS)]}m[rank {rank}]\x1b[m ".encode()
        return f"[rank {rank}] ".encode()


def wants_color(env: Mapping[str, str]) -> bool:
    """Whether a terminal is to show colors (https://no-color.org)."""
    return not env.get("NO_COLOR") and env.get("TERM", "dumb") != "dumb"


def _incomplete(why: str) -> str:
    return f"distrib: warning: the logs are not complete: {why}"


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


class Pump(threading.Thread):
    """Copies the ranks' streams to the launcher's own. A thread, so that a slow reader never stops supervision.

    Args:
        sources: The streams; the pump closes their descriptors at their end.

    Attributes:
        lost: Which of the launcher's streams did not take all text, and why; empty if all was shown, or nobody reads
            it any more.
        log_lost: The same of the logs.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        super().__init__(name="output", daemon=True)
        self._sources = list(sources)
        self._surfaces = _surfaces({source.target for source in self._sources})
        self._messages: deque[tuple[int, bytes]] = deque()
        self.lost = self.log_lost = ""
        self._wake_read, self._wake_write = os.pipe()
        self.ended_fd, self._ended_write = os.pipe()  # readable (at its end) when all streams have ended

    def say(self, text: str, target: int) -> None:
        """Show a line of the launcher's own among the ranks' lines."""
        self._messages.append((target, text.encode()))
        os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Copy until every stream has ended."""
        open_sources = len(self._sources)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for source in self._sources:
                selector.register(source.fd, selectors.EVENT_READ, source)
            while open_sources:
                shown: list[tuple[int, bytes]] = []
                for key, _ in selector.select():
                    if key.data is None:
                        os.read(self._wake_read, _CHUNK)
                        continue
                    chunk = os.read(key.fd, _CHUNK)
                    shown += self._lines(key.data, chunk)
                    if not chunk:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        open_sources -= 1
                self._show(shown + self._own_lines())
        self._show([*self._own_lines(), *self._closing()])
        for log in {source.log for source in self._sources} - {-1}:
            os.close(log)
        os.close(self._ended_write)

    def close(self) -> None:
        """Close the pump's own descriptors, after its end."""
        for own in (self._wake_read, self._wake_write, self.ended_fd):
            os.close(own)

    def _lines(self, source: Source, chunk: bytes) -> list[tuple[int, bytes]]:
        surface, assembler = self._surfaces[source.target], source.assembler
        lines = assembler.feed(chunk) if chunk else assembler.finish()
        if lines and source.log >= 0:
            self._keep(source.log, b"".join(line + b"\n" for line in lines))
        if not source.shown:
            return []
        shown = [surface.line(source.fd, source.prefix + line) for line in lines]
        unfinished = assembler.unfinished if surface.terminal else assembler.progress
        if source.shows_progress and unfinished:
            shown.append(surface.progress(source.fd, source.prefix + unfinished))
        return [(source.target, b"".join(shown))]

    def _keep(self, log: int, lines: bytes) -> None:
        refusal = write_all(log, lines)
        if refusal and not self.log_lost:
            self.log_lost = str(refusal.strerror)
            self._messages.append((2, _incomplete(self.log_lost).encode()))

    def _own_lines(self) -> list[tuple[int, bytes]]:
        shown = []
        while self._messages:
            target, text = self._messages.popleft()
            shown.append((target, self._surfaces[target].message(text)))
        return shown

    def _closing(self) -> list[tuple[int, bytes]]:
        """End a progress line that still stands open, so that the report starts on a line of its own."""
        ends = []
        for target, surface in self._surfaces.items():
            if surface.open_text:
                ends.append((target, b"\n"))
                surface.open_text = b""
        return ends

    def _show(self, shown: list[tuple[int, bytes]]) -> None:
        for target, parts in groupby(shown, key=itemgetter(0)):
            refusal = write_all(target, b"".join(data for _, data in parts))
            if refusal and not (self.lost or self._surfaces[target].is_left(refusal)):
                self.lost = f"{_NAMES.get(target, target)}: {refusal.strerror}"
                warning = f"distrib: warning: the ranks' output is lost: {self.lost}; the job goes on"
                write_all(2, self._surfaces.get(2, Surface(terminal=False)).message(warning.encode()))


def _surfaces(targets: set[int]) -> dict[int, Surface]:
    """One surface a terminal or file, even where stdout and stderr are the same one."""
    by_place: dict[tuple[int, int], Surface] = {}
    surfaces = {}
    for target in sorted(targets):
        status = os.fstat(target)
        place = (status.st_dev, status.st_ino)
        surfaces[target] = by_place.setdefault(place, Surface(os.isatty(target), target))
    return surfaces


def _columns(terminal: int) -> int:
    try:
        return os.get_terminal_size(terminal).columns or 80  # some terminals do not know, and say 0
    except OSError:
        return 80


def open_closed_streams() -> None:
    """Put /dev/null where cron or a daemon has closed stdin, stdout or stderr.

    Else the next pipe would get that number, and the ranks would write to it.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


def say(text: str) -> None:
    """Write a line of the launcher's own to stderr. Where that cannot be, the line is lost and nothing else."""
    write_all(2, f"{text}\n".encode(errors="backslashreplace"))


def show(text: str) -> int:
    """Write what was asked for to stdout; return the exit code, that of SIGPIPE if nobody reads it.

    Raises:
        LaunchError: if it cannot be written.
    """
    refusal = write_all(1, f"{text}\n".encode(errors="backslashreplace"))
    if refusal is None:
        return 0
    if isinstance(refusal, ConnectionError):
        return 128 + signal.SIGPIPE
    raise unwritable(refusal)


def unwritable(refusal: OSError) -> LaunchError:
    """Return the error for what was asked for and cannot be shown."""
    return LaunchError(
        "D0311",
        f"the output cannot be written: {refusal.strerror}",
        where="stdout",
        fix="make room there, or write it elsewhere",
    )


def write_all(target: int, data: bytes) -> OSError | None:
    """Write everything, however often it takes; return what refused the rest, which is dropped then."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(target, rest) :]
        except BlockingIOError:  # somebody made the terminal non-blocking
            select.select([], [target], [])
        except OSError as refusal:  # the reader closed its end, or the disk is full
            return refusal
    return None
