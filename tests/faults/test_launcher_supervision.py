"""What a supervisor, a report and a launched function must not get wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil
import pytest
from distrib_launcher import guard
from distrib_launcher.functions import launch
from distrib_launcher.output import Display
from distrib_launcher.process import Ended, Supervisor
from distrib_launcher.redaction import Redactor
from distrib_launcher.report import Circumstances, is_worth_a_restart, render
from distrib_launcher.starting import WorkerSpec
from distrib_launcher.workers import Worker

from distrib.config import RunConfig, with_code
from distrib.errors import LaunchError
from tests.unit.test_launcher_report import raised, stood

ENV = {"PATH": os.environ["PATH"]}
FRESH = with_code(RunConfig(), {"launch.start_method": "spawn", "device": "cpu"}, "t.py:1")


def spec(rank: int, *program: str) -> WorkerSpec:
    return WorkerSpec(rank, "command", program, ENV)


def test_a_signal_with_a_handler_of_the_user_s_does_not_end_the_launch() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    ours = os.getpid()

    def tell() -> int:
        os.kill(ours, signal.SIGUSR1)
        time.sleep(0.3)
        return 7

    try:
        assert launch(tell, nproc=1, config=FRESH) == [7]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_restart_does_not_wait_for_the_old_grace_time() -> None:
    with Supervisor(grace_s=5, embedded=True) as supervisor:
        supervisor.run([spec(0, "false"), spec(1, "sleep", "60")])
        start = time.monotonic()

        assert supervisor.prepare()
        assert time.monotonic() - start < 1


def test_a_signal_between_two_attempts_is_an_interrupt() -> None:
    with Supervisor(grace_s=1, embedded=True) as supervisor:
        supervisor.run([spec(0, "false"), spec(1, "true")])
        os.kill(os.getpid(), signal.SIGTERM)

        assert not supervisor.prepare()
        assert supervisor.interrupted == signal.SIGTERM


def test_a_signal_while_the_last_output_is_shown_prevents_a_restart() -> None:
    read, write = os.pipe()
    before = os.dup(1)
    os.dup2(write, 1)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with Supervisor(grace_s=1, embedded=True) as supervisor:
            timer.start()
            ended = supervisor.run(
                [spec(0, "sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; exit 1"), spec(1, "true")]
            )
            assert not is_worth_a_restart(ended)
    finally:
        os.dup2(before, 1)
        for fd in (before, write, read):
            os.close(fd)


def test_an_error_in_a_run_leaves_no_rank() -> None:
    with Supervisor(grace_s=1, embedded=True) as supervisor, pytest.raises(KeyError):
        supervisor.run([spec(0, "sleep", "60"), spec(1, "sleep", "60")], Display(log={}.__getitem__))

    left = guard.members({}, supervisor.marker)
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
    assert left == []


def test_a_launch_leaves_no_zombie() -> None:
    before = set(psutil.Process().children())
    launch(os.getpid, nproc=2, config=with_code(RunConfig(), {"device": "cpu"}, "t.py:1"))

    assert set(psutil.Process().children()) - before == set()


def test_a_rank_that_lost_its_peer_and_had_to_be_killed_is_counted_once() -> None:
    lost = raised(1, 1.5, "DistBackendError", bases=["DistBackendError"])
    lost = type(lost)(lost.rank, lost.pid, -signal.SIGKILL, lost.at, lost.stopped, lost.event)

    assert "-1" not in render(Ended((raised(0, 1.0), lost)), Circumstances("host"))


def test_the_cause_is_shown_before_what_others_said() -> None:
    outcomes = [raised(0, 1.0, lines=["ValueError: the cause"])]
    outcomes += [raised(r, 1.5, "KeyError", lines=[f"KeyError: {r} " + "y " * 140]) for r in (1, 2, 3)]
    outcomes += [stood(r, f"/home/me/{'deep/' * 15}{r}.py") for r in range(4, 9)]

    assert "ValueError: the cause" in render(Ended(tuple(outcomes)), Circumstances("host", columns=80))


def test_a_private_key_in_a_message_is_taken_out_whole() -> None:
    key = [
        "KeyError: -----BEGIN RSA PRIVATE KEY-----",
        "MIIEpAIBAAKCAQEA7bq0",
        "-----END RSA PRIVATE KEY-----",
    ]

    assert "MIIEp" not in render(
        Ended((raised(0, 1.0, lines=key),)), Circumstances("h", redact=Redactor({}).text)
    )


def test_broken_words_of_a_rank_are_no_error_of_the_launcher() -> None:
    one = Worker(spec(0, "true"), capture=False, stdin=False)
    os.write(
        one.handed.record,
        b'{"time": 1.0, "li' + b"Current thread 0x1 (most recent call first):\n" + b'nes": []}\n',
    )
    try:
        assert one.read_record()
    finally:
        one.let_go()
        one.release()


def test_a_function_that_exits_with_0_has_no_result_and_is_told_so() -> None:
    with pytest.raises(LaunchError):
        launch(lambda: sys.exit(0), nproc=1, config=FRESH)


def test_a_lock_of_multiprocessing_is_refused_as_an_argument() -> None:
    import multiprocessing

    with pytest.raises(LaunchError, match="D0317"):
        launch(print, (multiprocessing.Lock(),), nproc=1, config=FRESH)
