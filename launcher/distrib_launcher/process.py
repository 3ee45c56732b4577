"""Start the workers, watch them, and end them together. Waits on file descriptors only; nothing is polled."""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib_launcher import guard, worker
from distrib_launcher.output import Pump, Source

_LEFTOVER_GRACE_S = 1.0  # for processes that the ranks left behind, after the ranks themselves have ended
_CAUSE_WAIT_S = 1.0  # a rank that closes its group while it fails loses its peers before it has told why
_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class WorkerSpec:
    """One process to start.

    Attributes:
        rank: Its global rank.
        kind: "script", "module" or "command".
        program: The script, module or command, and its arguments.
        env: Its whole environment.
    """

    rank: int
    kind: str
    program: tuple[str, ...]
    env: Mapping[str, str]


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
    """

    rank: int
    pid: int
    returncode: int
    at: float
    stopped: bool = False
    event: Mapping[str, Any] = field(default_factory=dict)
    crash: str = ""


@dataclass(frozen=True)
class Ended:
    """The whole launch, after its end.

    Attributes:
        outcomes: One for each worker, in rank order.
        interrupted: The signal that the launcher itself got and passed on; 0 if none.
        leftovers: How many processes of the workers had to be ended after them.
        stop_s: Seconds from the first failure or signal to the end of the last worker.
        lost: Which stream did not take all of the workers' output, and why; empty if all was shown.
    """

    outcomes: tuple[Outcome, ...]
    interrupted: int = 0
    leftovers: int = 0
    stop_s: float = 0.0
    lost: str = ""


class _Worker:
    """A started worker and the pipes to it."""

    def __init__(self, spec: WorkerSpec, *, marker: str, capture: bool, shares_stdin: bool) -> None:
        life_read, self._life = os.pipe()
        self.record_fd, record_write = os.pipe()
        os.set_blocking(self.record_fd, False)
        stream = subprocess.PIPE if capture else None
        command = [
            sys.executable,
            str(Path(worker.__file__)),
            str(life_read),
            str(record_write),
            str(os.getpid()),
        ]
        self.rank, self.event, self.ended_at = spec.rank, dict[str, Any](), 0.0
        self._is_command = spec.kind == "command"
        self._unread, self._crash = b"", list[str]()
        self._sent: set[int] = set()
        with _held_back(worker.HELD_SIGNALS):
            self.process = subprocess.Popen(
                [*command, spec.kind, *spec.program],
                env={**spec.env, guard.MARKER: marker},
                stdin=None if shares_stdin else subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                bufsize=0,
                pass_fds=(life_read, record_write),
                start_new_session=True,
            )
        os.close(life_read)
        os.close(record_write)
        self.exit_fd = _exit_fd(self.process)

    @property
    def failed(self) -> bool:
        """Whether it has ended, or said that it is about to end, other than with exit code 0."""
        code = self.process.returncode
        return bool(code) or bool(self.event.get("exit_code"))

    def read_record(self) -> bool:
        """Take what the worker has told; return whether more can come."""
        try:
            chunk = os.read(self.record_fd, 1 << 20)
        except BlockingIOError:
            return True
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b'{"'):
                self.event = json.loads(line)
            else:
                self._crash.append(line.decode(errors="replace"))
        return bool(chunk)

    def send(self, number: int) -> None:
        if self.process.returncode is None:
            self._sent.add(number)
            self.process.send_signal(number)

    def outcome(self, stop_at: float | None) -> Outcome:
        at = float(self.event.get("time", self.ended_at))
        return Outcome(
            rank=self.rank,
            pid=self.process.pid,
            returncode=self.process.returncode,
            at=at,
            stopped=stop_at is not None and at >= stop_at and not self._died_of_another_signal(),
            event={"kind": "command"} if self._is_command else self.event,
            crash="\n".join(self._crash).strip(),
        )

    def _died_of_another_signal(self) -> bool:
        """Whether a signal ended it that we did not send: it may have been dying when we began to stop it."""
        return self.process.returncode < 0 and -self.process.returncode not in self._sent

    def release(self) -> None:
        os.close(self.exit_fd)
        os.close(self.record_fd)
        os.close(self._life)


class _Guard:
    """The process that cleans up when this one is killed."""

    def __init__(self, marker: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard.__file__)), marker],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            bufsize=0,
            start_new_session=True,
        )

    def watch(self, pid: int, start: int) -> None:
        self._tell(f"{pid} {start}\n")

    def dismiss(self) -> None:
        self._tell("done\n")
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode())
        except BrokenPipeError:  # somebody killed it; the parent-death signal still ties the workers to us
            return


class Supervisor:
    """Runs a set of workers to their common end.

    Args:
        grace_s: Seconds between asking a worker to end and killing it.
        notice: Called with a line to show when the launcher is interrupted.
        follows: Whether a failed worker, by its `Outcome.event`, only lost a peer. The peer then gets a moment to
            tell its own failure before it is stopped.
    """

    def __init__(
        self,
        *,
        grace_s: float,
        notice: Callable[[str], None] | None = None,
        follows: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self._grace_s, self._notice, self._follows = grace_s, notice, follows
        self._cause_by: float | None = None
        self._marker = uuid.uuid4().hex
        self._workers: list[_Worker] = []
        self._sessions: dict[int, int] = {}
        self._stop_at: float | None = None
        self._deadline: float | None = None
        self._interrupted = 0
        self._pump: Pump | None = None
        self._strangers: set[int] = set()

    def run(self, specs: Sequence[WorkerSpec]) -> Ended:
        """Start the workers, wait for their end, and leave no process behind.

        The first failure ends the others: SIGTERM, then SIGKILL after the grace time. SIGINT, SIGTERM and SIGHUP are
        passed on; a second SIGINT kills at once. With one worker its streams are ours, with more each line is
        prefixed. Call from the main thread.
        """
        with selectors.DefaultSelector() as self._selector, _signals(self._selector):
            self._strangers = {process.pid for process in guard.processes() if process.parent == os.getpid()}
            _adopt_orphans()
            self._guard = _Guard(self._marker)
            self._start(specs)
            while any(one.process.returncode is None for one in self._workers):
                self._wait()
            stopped_s = time.monotonic() - self._stop_at if self._stop_at is not None else 0.0
            leftovers = self._end_leftovers()
            self._drain()
            self._guard.dismiss()
        outcomes = tuple(one.outcome(self._stop_at) for one in self._workers)
        for one in self._workers:
            one.release()
        lost = self._pump.lost if self._pump is not None else ""
        return Ended(outcomes, self._interrupted, leftovers, stopped_s, lost)

    def _start(self, specs: Sequence[WorkerSpec]) -> None:
        sources = []
        capture = len(specs) > 1
        for index, spec in enumerate(specs):
            one = _Worker(spec, marker=self._marker, capture=capture, shares_stdin=index == 0)
            self._workers.append(one)
            known = guard.read_process(one.process.pid)
            self._sessions[one.process.pid] = known.start if known else 0
            self._guard.watch(one.process.pid, self._sessions[one.process.pid])
            self._selector.register(one.exit_fd, selectors.EVENT_READ, ("exit", one))
            self._selector.register(one.record_fd, selectors.EVENT_READ, ("record", one))
            sources += _sources(one, shows_progress=index == 0) if capture else []
        if sources:
            self._pump = Pump(sources)
            self._pump.start()

    def _wait(self) -> None:
        """Wait for one thing to happen, and act on it."""
        next_due = min((due for due in (self._deadline, self._cause_by) if due is not None), default=None)
        timeout = None if next_due is None else max(0.0, next_due - time.monotonic())
        for key, _ in self._selector.select(timeout):
            what, one = key.data
            if what == "signal":
                self._on_signals(os.read(key.fd, 4096))
            elif what == "exit":
                self._on_exit(one)
            elif what == "record" and not one.read_record():
                self._selector.unregister(key.fd)
        if self._stop_at is None and any(one.failed for one in self._workers):
            self._on_failure()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._kill()

    def _on_exit(self, one: _Worker) -> None:
        one.process.wait()
        one.ended_at = time.monotonic()
        one.read_record()
        self._selector.unregister(one.exit_fd)

    def _on_failure(self) -> None:
        """Stop everybody, but not before the rank that the failed ones lost has had a moment to tell why."""
        if self._cause_by is None:
            self._cause_by = time.monotonic() + _CAUSE_WAIT_S
        lost_a_peer = all(self._follows and self._follows(one.event) for one in self._workers if one.failed)
        if not lost_a_peer or time.monotonic() >= self._cause_by:
            self._stop(signal.SIGTERM)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._reap_orphans()
            elif number == signal.SIGINT and self._stop_at is not None:
                self._interrupted = self._interrupted or number
                if self._deadline is not None:
                    self._say("distrib: Ctrl-C: killing the ranks")
                self._kill()
            elif not self._interrupted:
                self._interrupted = number
                self._say(_interrupt_line(number, self._grace_s))
                self._stop(number if number == signal.SIGINT else signal.SIGTERM)

    def _stop(self, number: int) -> None:
        """Ask every worker to end, but for those that are ending already, and start the clock."""
        self._cause_by = None
        if self._stop_at is None:
            self._stop_at = time.monotonic()
            self._deadline = self._stop_at + self._grace_s
        for one in self._workers:
            if not one.event:
                one.send(number)

    def _kill(self) -> None:
        self._deadline = None
        for one in self._workers:
            one.send(signal.SIGKILL)

    def _end_leftovers(self) -> int:
        """End what the workers started and left behind; return how many there were."""
        left = self._leftovers()
        if left and self._stop_at is None:
            for process in left:
                _send(process.pid, signal.SIGTERM)
            _wait_for([process.pid for process in left], _LEFTOVER_GRACE_S)
        while True:
            still = self._leftovers()
            for process in still:
                _send(process.pid, signal.SIGKILL)
            if not still or not _wait_for([process.pid for process in still], _LEFTOVER_GRACE_S):
                break
        self._reap_orphans()
        return len(left)

    def _leftovers(self) -> list[guard.Process]:
        """Everything in the workers' sessions, marked as theirs, or handed to us when its parent ended."""
        table = guard.processes()
        ours = {process.pid for process in guard.members(self._sessions, self._marker)}
        grown = {process.pid for process in table if process.parent == os.getpid()}
        grown -= {*self._strangers, self._guard.process.pid}
        while grown:
            ours |= grown
            grown = {process.pid for process in table if process.parent in grown} - ours
        return [process for process in table if process.pid in ours and not process.ended]

    def _reap_orphans(self) -> None:
        known = {*self._strangers, self._guard.process.pid, *self._sessions}
        for process in guard.processes():
            if process.parent == os.getpid() and process.ended and process.pid not in known:
                os.waitpid(process.pid, os.WNOHANG)

    def _drain(self) -> None:
        """Wait until the last output is shown. Who reads it may be slow; a signal ends the wait."""
        if self._pump is None:
            return
        self._selector.register(self._pump.ended_fd, selectors.EVENT_READ, ("output", None))
        while True:
            for key, _ in self._selector.select():
                if key.data[0] == "output":
                    self._selector.unregister(self._pump.ended_fd)
                    self._pump.join()
                    self._pump.close()
                    return
                if key.data[0] == "signal" and set(os.read(key.fd, 4096)) & set(map(int, _STOP_SIGNALS)):
                    return
                if key.data[0] == "record":
                    self._selector.unregister(key.fd)

    def _say(self, line: str) -> None:
        if self._pump is not None:
            self._pump.say(line, 2)
        elif self._notice is not None:
            self._notice(line)


def _interrupt_line(number: int, grace_s: float) -> str:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"distrib: {name}: asking the ranks to end, within {grace_s:g} s; Ctrl-C kills them at once"


def _sources(one: _Worker, *, shows_progress: bool) -> list[Source]:
    assert one.process.stdout is not None
    assert one.process.stderr is not None
    prefix = f"[rank {one.rank}] ".encode()
    sources = []
    for pipe, target in ((one.process.stdout, 1), (one.process.stderr, 2)):
        with pipe:  # the pump owns and closes its own descriptor
            sources.append(Source(os.dup(pipe.fileno()), target, prefix, shows_progress))
    return sources


def _exit_fd(process: subprocess.Popen[bytes]) -> int:
    """Return a descriptor that becomes readable when the process ends."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(process.pid)
    read, write = os.pipe()

    def wait() -> None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        os.close(write)

    threading.Thread(target=wait, daemon=True).start()
    return read


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _wait_for(pids: Sequence[int], timeout_s: float) -> bool:
    """Wait until the processes have ended; return whether all of them did within the time."""
    with selectors.DefaultSelector() as selector:
        for pid in pids:
            try:
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ)
            except OSError:  # gone
                continue
        deadline = time.monotonic() + timeout_s
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(deadline - time.monotonic()):
                selector.unregister(key.fd)
                os.close(key.fd)
        for key in list(selector.get_map().values()):
            os.close(key.fd)
        return not selector.get_map()


def _adopt_orphans() -> None:
    """Become the parent of what the workers leave behind, so that it can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def _held_back(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Block signals, for the process started meanwhile too: it unblocks them when it can handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals(selector: selectors.BaseSelector) -> Iterator[None]:
    """Deliver signals as bytes on a descriptor of the selector, for the duration of the block."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    handled = [*_STOP_SIGNALS, signal.SIGCHLD]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        handled.remove(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    selector.register(read, selectors.EVENT_READ, ("signal", None))
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
