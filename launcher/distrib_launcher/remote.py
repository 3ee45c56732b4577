"""Commands that run on other machines through clients such as ssh: started together, shown together, ended together.

A client that is killed leaves its command running. So each remote command is wrapped (`tied`): it is asked to end
when its standard input ends, and that is how we end it, or how the kernel does when this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from distrib.errors import LaunchError
from distrib_launcher.output import Pump, Source, say
from distrib_launcher.process import delivered_signals

_LOST_PEER: Final = 124  # what a launcher ends with when its ranks only lost those of another machine
_NO_CONNECTION: Final = 255  # of ssh
_ASKED_TO_END: Final = tuple(128 + number for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP))
_MARGIN_S = 10.0  # beyond the grace time, for the way there and back
_OUTPUT_S = 5.0  # for the last output; something that a client left behind may keep the pipe open


@dataclass(frozen=True)
class Client:
    """A command of this machine that runs one on another machine.

    Attributes:
        name: What to call the other machine in a report: "worker 1 (10.0.0.2)".
        prefix: What each of its lines begins with: "[worker 1] ".
        words: The command.
    """

    name: str
    prefix: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class ClientEnd:
    """How one client ended.

    Attributes:
        name: As of the client.
        code: Its exit code; 128 + the signal's number if a signal ended it.
        at: When, in seconds on the monotonic clock.
        stopped: Whether it had been asked to end.
    """

    name: str
    code: int
    at: float
    stopped: bool


def tied(words: Sequence[str], env: Mapping[str, str], folder: str) -> str:
    """Return the command line for another machine's shell that runs a command until our side goes away.

    Args:
        words: The command; a leading "~/" of the first word is the other machine's home.
        env: What to add to its environment.
        folder: Where to run it; likewise.
    """
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    command = " ".join([*(["env", variables] if env else []), _path(words[0]), shlex.join(words[1:])])
    script = (
        f"cd {_path(folder)} || exit 1; exec 3<&0; {command} </dev/null 3<&- & run=$!; "
        "{ cat <&3; kill -TERM $run; } >/dev/null 2>&1 & watch=$!; exec 3<&-; "
        "wait $run; code=$?; kill $watch; exit $code"
    )
    return f"sh -c {shlex.quote(script)}"


def _path(path: str) -> str:
    """Quote a path for a shell, which replaces a leading "~/" itself."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)


def run_together(
    clients: Sequence[Client], env: Mapping[str, str], grace_s: float, *, margin_s: float = _MARGIN_S
) -> int:
    """Run the clients to their common end and report; the first failure ends the others. Call from the main thread.

    Args:
        clients: What to run.
        env: Their environment.
        grace_s: What each remote command takes at most to end its own ranks, in seconds.
        margin_s: How much longer a client may take, which is then killed.

    Returns:
        The exit code: that of the failure that the others followed from.

    Raises:
        LaunchError: if a client cannot be started (D0917).
    """
    with selectors.DefaultSelector() as selector, delivered_signals(selector):
        job = _Job(selector, grace_s, margin_s)
        try:
            for client in clients:
                job.start(client, env)
            job.show_output()
            while job.is_running:
                job.wait()
        finally:
            job.kill()
            job.end_output()
    text, code = report(job.ended, job.interrupted)
    if text:
        say(text)
    return code


class _Job:
    def __init__(self, selector: selectors.BaseSelector, grace_s: float, margin_s: float) -> None:
        self._selector, self._grace_s, self._margin_s = selector, grace_s, margin_s
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._sources: list[Source] = []
        self._pump: Pump | None = None
        self.ended: list[ClientEnd] = []
        self.interrupted = 0
        self._stop_by: float | None = None  # when to stop all, unless a better cause shows up before
        self._kill_by: float | None = None  # set once all have been asked to end

    @property
    def is_running(self) -> bool:
        return bool(self._running)

    def start(self, client: Client, env: Mapping[str, str]) -> None:
        pipes = [os.pipe() for _ in range(2)]
        stdout, stderr = (write for _, write in pipes)
        try:
            process = subprocess.Popen(
                client.words,
                env=env,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # the terminal's Ctrl-C is for us: we ask all to end
            )
        except OSError as error:
            for read, _ in pipes:
                os.close(read)
            raise LaunchError(
                "D0917",
                f"{client.words[0]} cannot be started: {error.strerror}",
                where=client.name,
                fix=f"install {client.words[0]}, or put it on PATH",
            ) from error
        finally:
            os.close(stdout)
            os.close(stderr)
        self._running[client.name] = process
        for target, (read, _) in zip((1, 2), pipes, strict=True):
            self._sources.append(Source(read, target, client.prefix.encode(), shows_progress=False))

    def show_output(self) -> None:
        self._pump = Pump(self._sources)
        self._pump.start()

    def wait(self) -> None:
        """Wait for one thing to happen, and act on it."""
        dues = [due - time.monotonic() for due in (self._stop_by, self._kill_by) if due is not None]
        for key, _ in self._selector.select(max(0.0, min(dues)) if dues else None):
            for number in os.read(key.fd, 4096):
                self._on_signal(number)
        self._reap()
        now = time.monotonic()
        if self._stop_by is not None and now >= self._stop_by:
            self._stop()
        if self._kill_by is not None and now >= self._kill_by:
            self.kill()

    def _on_signal(self, number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            return
        if self._kill_by is not None and number == signal.SIGINT:
            self.kill()
        elif self._kill_by is None:
            self.interrupted = number
            self._say(
                f"distrib: {signal.Signals(number).name}: asking the workers to end, within {self._grace_s:g} s"
            )
            self._stop()

    def _reap(self) -> None:
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            _close(process.stdin)
            status = code if code >= 0 else 128 - code
            self.ended.append(ClientEnd(name, status, time.monotonic(), self._kill_by is not None))
            if status and self._kill_by is None:
                # Who only lost another worker may be quicker than the one that it lost, which ends its own ranks first.
                patience = self._grace_s if status == _LOST_PEER else 0.0
                due = time.monotonic() + patience
                self._stop_by = due if self._stop_by is None else min(due, self._stop_by)

    def _stop(self) -> None:
        """Ask all to end, by the end of their standard input, and start the clock."""
        self._stop_by = None
        if self._kill_by is None:
            self._kill_by = time.monotonic() + self._grace_s + self._margin_s
            for process in self._running.values():
                _close(process.stdin)

    def kill(self) -> None:
        """Kill the clients that still run, with what they have started here."""
        for name, process in list(self._running.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            _close(process.stdin)
            process.wait()
            del self._running[name]
            self.ended.append(ClientEnd(name, 128 + signal.SIGKILL, time.monotonic(), stopped=True))

    def end_output(self) -> None:
        if self._pump is not None:
            self._pump.join(_OUTPUT_S)
            self._pump = None

    def _say(self, line: str) -> None:
        if self._pump is not None:
            self._pump.say(line, 2)


def report(ended: Sequence[ClientEnd], interrupted: int) -> tuple[str, int]:
    """Return what to say of the end, nothing if all went well, and the exit code.

    Args:
        ended: All clients.
        interrupted: The signal that we were ended by; 0 if none.
    """
    failed = [one for one in ended if one.code]
    own = [one for one in failed if not one.stopped]
    if interrupted and not own:
        code = 128 + interrupted
        return f"distrib: ended by {signal.Signals(interrupted).name}\n  exit code {code}", code
    if not failed:
        return "", 0
    cause = min(failed, key=_blame)
    others = [one for one in ended if one is not cause]
    lines = [f"distrib: {cause.name} failed: exit code {cause.code}{_meaning(cause.code)}"]
    lines += [
        f"  {one.name} {'was ended' if one.stopped else 'had ended'}: exit code {one.code}" for one in others
    ]
    return "\n".join([*lines, "  its own report is above", f"  exit code {cause.code}"]), cause.code


def _blame(one: ClientEnd) -> tuple[bool, bool, float]:
    """Order failures: those of their own first, then the loss of a peer and what we asked for, each by its time."""
    followed = one.code == _LOST_PEER or (one.stopped and one.code in _ASKED_TO_END)
    return followed, one.stopped, one.at


def _meaning(code: int) -> str:
    return ", which ssh gives when there is no connection" if code == _NO_CONNECTION else ""


def _close(stdin: IO[bytes] | None) -> None:
    if stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
