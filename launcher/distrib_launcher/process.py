"""Start the workers, watch them, and end them together. Waits on file descriptors only; nothing is polled."""

from __future__ import annotations

import ctypes
import errno
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distrib_launcher import guard
from distrib_launcher.output import Display, Pump
from distrib_launcher.starting import Handed, PreloadFailed, Spawner, Starter, StartRefused, WorkerSpec
from distrib_launcher.workers import Outcome, Worker

_LEFTOVER_GRACE_S = 1.0  # for processes that the ranks left behind, after the ranks themselves have ended
_LOAD_LIMIT_S = 600.0  # of a preloader: a network file system can be that slow
_START_LIMIT_S = 60.0  # from the order to the ranks
_CAUSE_WAIT_S = 1.0  # a rank that closes its group while it fails loses its peers before it has told why
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Ended:
    """One attempt of a launch, after its end.

    Attributes:
        outcomes: One for each worker that was started, in rank order.
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
    """Runs sets of workers, one after another, each to its common end. A context; use it from the main thread.

    Args:
        grace_s: Seconds between asking a worker to end and killing it.
        notice: Called with a line to show, when nothing else shows it.
        follows: Whether a failed worker, by its `Outcome.event`, only lost a peer. The peer then gets a moment to
            tell its own failure before it is stopped.
        embedded: Whether this process has children of its own, and may get more meanwhile. Then only what is marked
            as the workers' is taken for theirs.

    Attributes:
        marker: This launch's value of the variable `guard.MARKER`, which every process of it has.
    """

    def __init__(
        self,
        *,
        grace_s: float,
        notice: Callable[[str], None] | None = None,
        follows: Callable[[Mapping[str, Any]], bool] | None = None,
        embedded: bool = False,
    ) -> None:
        self._embedded = embedded
        self._grace_s, self._notice, self._follows = grace_s, notice, follows
        self.marker = uuid.uuid4().hex
        self._sessions: dict[int, int] = {}  # of all attempts: process id -> its start
        self._interrupted = 0
        self._starter: Starter = Spawner(self.marker)
        self._strangers: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        """Forget the attempt before, whose processes and pipes are gone."""
        self._workers: list[Worker] = []
        self._stop_at: float | None = None
        self._deadline: float | None = None
        self._cause_by: float | None = None
        self._pump: Pump | None = None
        self._starting = False

    def __enter__(self) -> Supervisor:
        with ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            stack.enter_context(delivered_signals(self._selector))
            self._strangers = {process.pid for process in guard.processes() if process.parent == os.getpid()}
            self._adopts = stack.enter_context(_adopting_orphans())
            self._guard = _Guard(self.marker)
            stack.callback(self._guard.dismiss)
            stack.callback(self._end_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, found: TracebackType | None
    ) -> None:
        self._stack.close()

    def _end_all(self) -> None:
        """End the starter, and after an error the workers too."""
        self._starter.close()
        for one in self._workers:
            one.send(signal.SIGKILL)
            if one.returncode is None and one.pid:
                one.reap()
            one.release()
        self._end_leftovers()

    def use(self, starter: Starter) -> None:
        """Start the workers in another way than as fresh interpreters, and take over the starter's end."""
        self._starter = starter
        for pid in starter.pids():
            self._watch(pid)
        if not self._adopts:
            self._do_without(PreloadFailed("the system does not let this process adopt others"))

    def prepare(self) -> bool:
        """Wait until workers can be started; return whether they still are to be: nobody has interrupted us.

        Raises:
            LaunchError: of the starter, if the user has to mend something before.
        """
        self._wait_for_starter(_LOAD_LIMIT_S)
        if self._starter.broken():
            self._do_without(PreloadFailed(self._starter.broken()))
        self._wait(0)
        return not self._interrupted

    @property
    def interrupted(self) -> int:
        """The signal that we have got and passed on; 0 if none."""
        return self._interrupted

    @property
    def serves_store(self) -> bool:
        """Whether the ranks' store is served for them, on the socket that is given to `run`. After `prepare`."""
        return self._starter.serves_store

    def run(
        self,
        specs: Sequence[WorkerSpec],
        display: Display | None = None,
        listening: int | None = None,
        handed_over: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Start the workers, wait for their end, and leave no process behind.

        The first failure ends the others: SIGTERM, then SIGKILL after the grace time. SIGINT, SIGTERM and SIGHUP are
        passed on; a second SIGINT kills at once. With one worker its streams are ours, unless they are also to be kept;
        with more each line is prefixed.

        Args:
            specs: The workers.
            display: How their output is shown and kept.
            listening: A socket that listens where the ranks meet, if `serves_store`.
            handed_over: Called when others hold that socket.

        Raises:
            StartRefused: if the system did not let us start all of them; those that started have ended.
            PreloadFailed: if the starter has broken down.
        """
        refused = self._start(specs, display or Display(), listening)
        handed_over()
        while any(one.returncode is None for one in self._workers):
            self._wait()
        stopped_s = time.monotonic() - self._stop_at if self._stop_at is not None else 0.0
        if self._starter.store_fd is not None:
            self._forget(self._starter.store_fd)
        self._starter.end_attempt()
        leftovers = self._end_leftovers()
        self._drain()
        outcomes = tuple(one.outcome(self._stop_at) for one in self._workers)
        lost = self._pump.lost if self._pump is not None else ""
        for one in self._workers:
            self._forget(one.record_fd)
            one.release()
        self._begin()
        if refused is not None:
            raise refused
        return Ended(outcomes, self._interrupted, leftovers, stopped_s, lost)

    def _start(
        self, specs: Sequence[WorkerSpec], display: Display, listening: int | None
    ) -> StartRefused | None:
        capture, workers, refused = display.captures(len(specs)), self._workers, None
        self._starting = True  # nobody reaps a process that is not known yet
        try:
            with closing(_hand_out(specs, workers, capture=capture)) as handed:
                self._starter.start(handed, len(specs), listening)
            self._wait_for_starter(_START_LIMIT_S)
        except StartRefused as refusal:
            refused = refusal
        if self._starter.waits_on is not None:
            # Interrupted, or refused half-way: whom it has started, we find by their marks.
            self._starter.close()
            self._starter = Spawner(self.marker)
        pids = self._starter.started
        for one, pid in zip(workers, pids, strict=False):
            one.started(pid)
            self._watch(pid)
            self._selector.register(one.exit_fd, selectors.EVENT_READ, ("exit", one))
            self._selector.register(one.record_fd, selectors.EVENT_READ, ("record", one))
        self._starting = False
        if self._starter.store_fd is not None:
            self._selector.register(self._starter.store_fd, selectors.EVENT_READ, ("store", None))
        if capture:
            self._pump = Pump(display.sources([(one.rank, one.streams) for one in workers]))
            no_thread = self._start_pump(self._pump)
            refused = refused or no_thread
        for one in workers[len(pids) :]:
            one.release()
        del workers[len(pids) :]
        if self._interrupted:  # while they were being started: they have not heard of it
            self._stop(signal.SIGTERM)
        if refused is not None:
            self._stop(signal.SIGKILL)
        return refused

    def _start_pump(self, pump: Pump) -> StartRefused | None:
        try:
            pump.start()
        except RuntimeError as error:  # the system refuses the thread
            self._pump = None
            return StartRefused(OSError(errno.EAGAIN, str(error)))
        return None

    def _wait_for_starter(self, limit_s: float) -> None:
        """Wait for what the starter waits for, unless we are interrupted.

        Raises:
            PreloadFailed, StartRefused, LaunchError: of the starter.
        """
        waits_on, until = self._starter.waits_on, time.monotonic() + limit_s
        if waits_on is None:
            return
        self._selector.register(waits_on, selectors.EVENT_READ, ("starter", None))
        try:
            while self._starter.waits_on is not None and not self._interrupted:
                if time.monotonic() > until:
                    raise PreloadFailed("the process that loads what the ranks need does not answer")
                self._wait(1)
        finally:
            self._forget(waits_on)

    def _watch(self, pid: int) -> None:
        known = guard.read_process(pid)
        self._sessions[pid] = known.start if known else 0
        self._guard.watch(pid, self._sessions[pid])

    def _wait(self, at_most_s: float | None = None) -> None:
        """Wait for one thing to happen, and act on it."""
        dues = [due - time.monotonic() for due in (self._deadline, self._cause_by) if due is not None]
        limits = [max(0.0, due) for due in dues] + ([] if at_most_s is None else [at_most_s])
        for key, _ in self._selector.select(min(limits, default=None)):
            what, one = key.data
            if what == "signal":
                self._on_signals(os.read(key.fd, 4096))
            elif what == "starter":
                self._selector.unregister(key.fd)
                self._on_starter()
            elif what == "store":
                self._selector.unregister(key.fd)
                self._on_store_lost()
            elif what == "exit":
                one.reap()
                self._selector.unregister(one.exit_fd)
            elif what == "record" and not one.read_record():
                self._selector.unregister(key.fd)
        if self._stop_at is None and any(one.failed for one in self._workers):
            self._on_failure()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._kill()

    def _on_starter(self) -> None:
        try:
            self._starter.take()
        except PreloadFailed as why:
            if self._starting:
                raise
            self._do_without(why)

    def _do_without(self, why: PreloadFailed) -> None:
        self._starter.close()
        self._starter = Spawner(self.marker)
        self._say(f"distrib: warning: {why}; each rank is started as a fresh interpreter instead")

    def _on_store_lost(self) -> None:
        """Without the store the ranks could not even tell each other that they have failed."""
        if self._stop_at is None:
            self._say("distrib: the process that serves the ranks' store has ended; ending the ranks")
            self._stop(signal.SIGTERM)

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
            elif number not in _STOP_SIGNALS:
                continue  # one that this process handles for itself
            elif number == signal.SIGINT and self._stop_at is not None:
                self._interrupted = self._interrupted or number
                if self._deadline is not None:
                    self._say("distrib: Ctrl-C: killing the ranks")
                self._kill()
            elif not self._interrupted:
                self._interrupted = number
                if self._workers:
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
        own = self._own_pids()
        ours = {process.pid for process in guard.members(self._sessions, self.marker)}
        grown = {process.pid for process in table if self._is_orphan(process)} - own
        while grown:
            ours |= grown
            grown = {process.pid for process in table if process.parent in grown} - ours
        return [process for process in table if process.pid in ours - own and not process.ended]

    def _own_pids(self) -> set[int]:
        """What runs beside the workers, and what ran before us."""
        return {*self._strangers, self._guard.process.pid, *self._starter.pids()}

    def _reap_orphans(self) -> None:
        if self._starting:
            return
        known = self._own_pids() | {one.pid for one in self._workers}
        for process in guard.processes():
            if process.ended and process.pid not in known and self._is_orphan(process):
                os.waitpid(process.pid, os.WNOHANG)

    def _is_orphan(self, process: guard.Process) -> bool:
        """Whether a process was handed to us when its parent ended."""
        ours = process.parent == os.getpid()
        return ours and (not self._embedded or process.session in self._sessions)

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
                if key.data[0] == "signal":
                    asked = [n for n in os.read(key.fd, 4096) if n in _STOP_SIGNALS]
                    if asked:
                        self._interrupted = self._interrupted or asked[0]
                        self._selector.unregister(self._pump.ended_fd)
                        return
                if key.data[0] == "record":
                    self._selector.unregister(key.fd)

    def _forget(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def _say(self, line: str) -> None:
        if self._pump is not None:
            self._pump.say(line, 2)
        elif self._notice is not None:
            self._notice(line)


def _hand_out(
    specs: Sequence[WorkerSpec], workers: list[Worker], *, capture: bool
) -> Generator[tuple[WorkerSpec, Handed], None, None]:
    """Make a worker of each, and yield what it is handed; that is closed afterwards."""
    for number, spec in enumerate(specs):
        one = Worker(spec, capture=capture, stdin=number == 0)
        workers.append(one)
        try:
            yield spec, one.handed
        finally:
            one.let_go()


def _interrupt_line(number: int, grace_s: float) -> str:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"distrib: {name}: asking the ranks to end, within {grace_s:g} s; Ctrl-C kills them at once"


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


@contextmanager
def _adopting_orphans() -> Iterator[bool]:
    """Be the parent of what the workers leave behind, so that it can be found; yield whether that is so."""
    if sys.platform != "linux":
        yield False
        return
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    try:
        yield libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


@contextmanager
def delivered_signals(selector: selectors.BaseSelector) -> Iterator[None]:
    """Deliver signals as bytes on a descriptor of the selector, for the duration of the block."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    handled = [*_STOP_SIGNALS, signal.SIGCHLD]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        handled.remove(signal.SIGHUP)
    selector.register(read, selectors.EVENT_READ, ("signal", None))
    before = {number: signal.getsignal(number) for number in handled}
    before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # first, since our handlers do nothing
    try:
        for number in handled:
            signal.signal(number, lambda *_: None)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it was not installed from Python, and cannot be put back
                signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(read)
        os.close(write)
