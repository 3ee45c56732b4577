"""Single processes of a launch: what is read from them, and what happens when they cannot be started."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from distrib_launcher import guard
from distrib_launcher.process import Supervisor
from distrib_launcher.starting import (
    Forker,
    Handed,
    PreloadFailed,
    Spawner,
    StartRefused,
    WorkerSpec,
)
from distrib_launcher.workers import Outcome, Worker

from distrib.errors import LaunchError

ENV = {"PATH": os.environ["PATH"]}
TOO_LARGE = {**ENV, "LARGE": "x" * 3_000_000}  # for one variable of a process


def spec(rank: int = 0, *program: str, env: Mapping[str, str] = ENV) -> WorkerSpec:
    return WorkerSpec(rank, "command", program or ("true",), env)


@contextmanager
def worker(kind: str = "script") -> Iterator[Worker]:
    one = Worker(WorkerSpec(0, kind, ("train.py",), ENV), capture=False, stdin=False)
    try:
        yield one
    finally:
        one.let_go()
        one.release()


def end_of(
    program: str, *words: str, stop_at: float | None = None, sent: int = 0, kind: str = "script"
) -> Outcome:
    """Run a Python program as a worker; the descriptor on which it can tell something is its first argument.

    Args:
        program: Its text.
        words: More arguments.
        stop_at: As of `Worker.outcome`.
        sent: A signal to send it once it has told a line.
        kind: "script" or "command".
    """
    with worker(kind) as one:
        record = one.handed.record
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(record), *words],
            pass_fds=[record],
            stderr=subprocess.DEVNULL,
        ) as process:
            one.started(process.pid)
            if sent:
                os.set_blocking(one.record_fd, True)
                one.read_record()
                one.send(sent)
            os.set_blocking(one.record_fd, False)
            one.reap()
            process.returncode = one.returncode
        return one.outcome(stop_at)


STACK = """
    import faulthandler, os, signal, sys, time
    record = int(sys.argv[1])
    faulthandler.enable(file=record, all_threads=False)
    faulthandler.register(signal.SIGTERM, file=record, all_threads=False, chain=True)

    def inner():
        {what}

    def outer():
        inner()

    outer()
"""


def test_a_crash_in_native_code_leaves_its_stack() -> None:
    outcome = end_of(STACK.format(what="os.kill(os.getpid(), signal.SIGSEGV)"))

    assert outcome.returncode == -signal.SIGSEGV
    assert outcome.crash.splitlines()[0] == "Fatal Python error: Segmentation fault"
    assert "in outer" in outcome.crash
    assert outcome.stood == ()


WAITING = STACK.format(what="os.write(record, b'ready\\n'); time.sleep(60)")


def test_where_a_rank_stood_when_it_was_asked_to_end_is_known_innermost_first() -> None:
    outcome = end_of(WAITING, sent=signal.SIGTERM)

    assert [function for _, _, function in outcome.stood] == ["inner", "outer", "<module>"]
    assert all(path == "<string>" and line > 1 for path, line, _ in outcome.stood)
    assert outcome.crash == ""


CRASHING_LATER = """
    import faulthandler, os, signal, sys
    record = int(sys.argv[1])

    def stood():
        faulthandler.dump_traceback(record, all_threads=False)

    def crashed():
        os.abort()

    faulthandler.enable(file=record, all_threads=False)
    stood()
    crashed()
"""


def test_a_crash_after_the_request_to_end_is_told_apart_from_where_the_rank_stood() -> None:
    outcome = end_of(CRASHING_LATER)

    assert [function for _, _, function in outcome.stood] == ["stood", "<module>"]
    assert "in crashed" in outcome.crash
    assert "in stood" not in outcome.crash


def test_an_event_is_what_the_rank_told_last_and_its_time_is_when_it_failed() -> None:
    event = '{"time": 12.5, "kind": "exit", "exit_code": 3}'
    outcome = end_of(f"import os, sys; os.write(int(sys.argv[1]), b'{event}\\n'); sys.exit(3)")

    assert outcome.event == {"time": 12.5, "kind": "exit", "exit_code": 3}
    assert (outcome.at, outcome.returncode) == (12.5, 3)


def test_a_rank_has_failed_as_soon_as_it_says_so() -> None:
    with worker() as one:
        os.write(one.handed.record, b'{"time": 1.0, "exit_')
        assert one.read_record()
        assert not one.failed

        os.write(one.handed.record, b'code": 1}\n')
        assert one.read_record()
        assert one.failed


def test_a_rank_that_has_nothing_to_tell_yet_can_tell_something_later() -> None:
    with worker() as one:
        assert one.read_record()


def test_nothing_more_can_come_from_a_rank_that_has_closed_its_end() -> None:
    one = Worker(spec(), capture=False, stdin=False)
    one.let_go()

    assert not one.read_record()
    one.release()


def test_of_a_command_only_the_kind_is_told() -> None:
    told = "import os, sys; os.write(int(sys.argv[1]), b'{\"exit_code\": 9}\\n')"

    assert end_of(told, kind="command").event == {"kind": "command"}


@pytest.mark.parametrize(
    ("stop_at", "sent", "stopped"),
    [
        (None, signal.SIGTERM, False),  # nobody had been asked to end
        (0.0, signal.SIGTERM, True),
        (0.0, signal.SIGKILL, True),
        (float("inf"), signal.SIGTERM, False),  # before the others were
    ],
)
def test_a_rank_was_stopped_if_it_ended_after_that_and_by_the_signal_it_got(
    stop_at: float | None, sent: int, stopped: bool
) -> None:
    outcome = end_of(WAITING, sent=sent, stop_at=stop_at)

    assert (outcome.stopped, outcome.returncode) == (stopped, -sent)


def test_a_rank_that_a_signal_ended_which_nobody_sent_was_not_stopped() -> None:
    assert not end_of(STACK.format(what="os.abort()"), stop_at=0.0).stopped


def test_a_signal_to_a_rank_that_has_ended_reaches_nobody() -> None:
    with worker() as one:
        pid = os.posix_spawnp("true", ["true"], ENV)
        one.started(pid)
        one.reap()

        one.send(signal.SIGKILL)  # its number may be another process's by now

        assert one.returncode == 0


@contextmanager
def handed_out(*specs: WorkerSpec) -> Iterator[list[tuple[WorkerSpec, Handed]]]:
    """Make the pipes of workers; whoever starts them reaps them."""
    workers = [Worker(each, capture=False, stdin=False) for each in specs]
    try:
        yield [(each, one.handed) for each, one in zip(specs, workers, strict=True)]
    finally:
        for one in workers:
            one.let_go()
            one.release()


def test_a_start_that_the_system_refuses_tells_who_has_started() -> None:
    with handed_out(spec(), spec(1, env=TOO_LARGE), spec(2)) as workers:
        starter = Spawner("mark")
        with pytest.raises(StartRefused) as caught:
            starter.start(workers, 3, None)
        (pid,) = starter.started

        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert caught.value.error.errno == errno.E2BIG


def open_files(pid: int | None = None) -> set[str]:
    return {each.name for each in Path(f"/proc/{pid or 'self'}/fd").iterdir()}


def test_a_refused_start_ends_those_that_have_started_and_leaves_no_descriptor() -> None:
    before = open_files()
    with Supervisor(grace_s=30, embedded=True) as supervisor, pytest.raises(StartRefused):
        supervisor.run([spec(0, "sleep", "60"), spec(1, env=TOO_LARGE), spec(2)])

    assert guard.members({}, supervisor.marker) == []
    assert open_files() == before


def test_a_run_leaves_no_descriptor() -> None:
    before = open_files()
    with Supervisor(grace_s=30, embedded=True) as supervisor:
        ended = [supervisor.run([spec(0), spec(1)]) for _ in range(2)]

    assert [[each.returncode for each in one.outcomes] for one in ended] == [[0, 0], [0, 0]]
    assert open_files() == before


@contextmanager
def forker(*modules: str, wanted: Sequence[str] = (), path: Path | None = None) -> Iterator[Forker]:
    env = ENV if path is None else {**ENV, "PYTHONPATH": str(path)}
    starter = Forker([spec(0, env=env), spec(1, env=env)], "mark", modules, wanted)
    try:
        yield starter
    finally:
        starter.close()


def test_a_preloader_that_has_loaded_everything_is_ready() -> None:
    with forker("json", "no_such_module") as starter:  # which the program will find out
        starter.take()

        assert (starter.waits_on, starter.serves_store) == (None, False)
        assert len(starter.pids()) == 1


def test_a_module_that_the_user_named_has_to_be_there() -> None:
    with forker("json", wanted=["no_such_module"]) as starter, pytest.raises(LaunchError) as caught:
        starter.take()

    assert caught.value.code == "D0312"
    assert "no_such_module cannot be imported: ModuleNotFoundError" in str(caught.value)


def test_a_module_that_starts_a_thread_makes_forking_unsafe(tmp_path: Path) -> None:
    text = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    (tmp_path / "threaded.py").write_text(text)

    started = pytest.raises(PreloadFailed, match="importing threaded has started 1 threads")
    with forker("threaded", path=tmp_path) as starter, started:
        starter.take()


def test_a_module_that_ends_the_process_makes_forking_impossible(tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text("import os\nos._exit(3)\n")

    ended = pytest.raises(PreloadFailed, match="ended with 3")
    with forker("ending", path=tmp_path) as starter, ended:
        starter.take()


def test_a_module_that_raises_anything_is_left_to_the_program(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")

    with forker("leaving", path=tmp_path) as starter:
        starter.take()

        assert starter.waits_on is None


def test_a_preloader_that_was_killed_starts_nothing() -> None:
    with forker("json") as starter:
        starter.take()
        kill(starter)
        killed = pytest.raises(PreloadFailed, match="was ended by SIGKILL")
        with handed_out(spec(0), spec(1)) as workers, killed:
            starter.start(workers, 2, None)
            starter.take()


# Only the first fork, with which the preloader looks for threads, is let through.
REFUSES_FORKS = """
    import errno, os
    fork, forked = os.fork, []
    def once():
        if forked:
            raise OSError(errno.EAGAIN, "refused")
        forked.append(True)
        return fork()
    os.fork = once
"""


def test_a_refused_fork_of_the_stores_server_is_the_systems_refusal_at_every_attempt(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(textwrap.dedent(REFUSES_FORKS))
    with forker("refusing", path=tmp_path) as starter, socket.create_server(("127.0.0.1", 0)) as listening:
        starter.take()
        (preloader,) = starter.pids()
        before = open_files(preloader)
        for _ in range(2):
            with handed_out(spec(0), spec(1)) as workers:
                starter.start(workers, 2, listening.fileno())
            with pytest.raises(StartRefused) as caught:
                starter.take()

            assert (caught.value.error.errno, starter.started) == (errno.EAGAIN, [])
            assert open_files(preloader) == before


def kill(starter: Forker) -> None:
    (preloader,) = starter.pids()
    with closing(os.fdopen(os.pidfd_open(preloader))) as ended:
        os.kill(preloader, signal.SIGKILL)
        select.select([ended], [], [])


def test_a_preloader_that_breaks_down_is_replaced_by_fresh_interpreters(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "ending.py").write_text("import os\nos._exit(3)\n")
    env = {**ENV, "PYTHONPATH": str(tmp_path)}
    specs = [spec(0, env=env), spec(1, env=env)]
    with Supervisor(grace_s=30, notice=told.append, embedded=True) as supervisor:
        supervisor.use(Forker(specs, supervisor.marker, ["ending"], []))

        assert supervisor.prepare()
        assert [each.returncode for each in supervisor.run(specs).outcomes] == [0, 0]
    assert "each rank is started as a fresh interpreter instead" in told[0]


def test_a_signal_before_the_start_starts_nothing() -> None:
    with Supervisor(grace_s=30, embedded=True) as supervisor:
        os.kill(os.getpid(), signal.SIGTERM)

        assert not supervisor.prepare()
        assert supervisor.interrupted == signal.SIGTERM
