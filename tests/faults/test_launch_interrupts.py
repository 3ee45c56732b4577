from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.launching import all_gone, ended, launching, pids, script

# Each rank has a child and a grandchild that ignore SIGTERM and SIGINT, and one that left its session.
FAMILY = """
    import os, pathlib, signal, subprocess, sys, time
    CHILD = (
        "import os, pathlib, signal, subprocess, sys, time\\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\\n"
        "pathlib.Path(f'{os.getpid()}.pid').touch()\\n"
        "if len(sys.argv) > 1: subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]])\\n"
        "time.sleep(1000)"
    )
    subprocess.Popen([sys.executable, "-S", "-c", CHILD, CHILD])
    subprocess.Popen([sys.executable, "-S", "-c", CHILD], start_new_session=True)
    pathlib.Path(f"{os.getpid()}.pid").touch()
"""
PROCESSES_OF_TWO_RANKS = 8


def family(folder: Path, then: str) -> Path:
    return script(folder, FAMILY + f"    {then}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV])
def test_no_process_survives_a_launcher_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    with launching("-n", 2, family(tmp_path, "time.sleep(1000)"), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, PROCESSES_OF_TWO_RANKS)
        guards = [
            each for each in psutil.Process(launcher.pid).children() if "guard.py" in " ".join(each.cmdline())
        ]
        launcher.send_signal(number)
        launcher.wait(10)

        assert all_gone(processes, within_s=5)
        assert len(guards) == 1
        assert all_gone(guards, within_s=5)


@pytest.mark.parametrize("command", [False, True])
def test_no_process_survives_a_launcher_and_guard_that_are_killed(tmp_path: Path, command: bool) -> None:
    text = """
        import os, pathlib, signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])  # in the rank's process group
        pathlib.Path(f"{child.pid}.pid").touch()
        pathlib.Path(f"{os.getpid()}.pid").touch()
        time.sleep(1000)
    """
    program = ("--no-python", sys.executable) if command else ()
    with launching("-n", 2, *program, script(tmp_path, text), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, 4)
        for each in psutil.Process(launcher.pid).children():
            if "guard.py" in " ".join(each.cmdline()):
                each.kill()
        launcher.kill()

        assert all_gone(processes, within_s=5)


def test_a_stopped_rank_does_not_survive_the_launcher(tmp_path: Path) -> None:
    with launching(family(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)"), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, 4)
        launcher.kill()

        assert all_gone(processes, within_s=5)


def test_what_a_failing_rank_leaves_behind_is_ended(tmp_path: Path) -> None:
    text = "while len(list(pathlib.Path().glob('*.pid'))) < 8: time.sleep(0.01)\n    sys.exit(3)"
    with launching("-n", 2, family(tmp_path, text), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, PROCESSES_OF_TWO_RANKS)
        done = ended(launcher)

        assert done.code == 3
        assert done.seconds < 5
        assert all_gone(processes, within_s=1)


def test_what_ranks_leave_behind_after_success_is_ended_and_said(tmp_path: Path) -> None:
    text = "while len(list(pathlib.Path().glob('*.pid'))) < 8: time.sleep(0.01)"
    with launching("-n", 2, family(tmp_path, text), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, PROCESSES_OF_TWO_RANKS)
        done = ended(launcher)

        assert done.code == 0
        assert done.report == ["distrib: ended 6 processes that the ranks had left behind"]
        assert all_gone(processes, within_s=1)


def test_an_unrelated_process_of_the_same_user_is_left_alone(tmp_path: Path) -> None:
    other = psutil.Popen(["sleep", "1000"], start_new_session=True)
    try:
        with launching(family(tmp_path, "time.sleep(1000)"), cwd=tmp_path) as launcher:
            processes = pids(tmp_path, 4)
            launcher.kill()
            assert all_gone(processes, within_s=5)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_launcher_reaches_every_rank_once(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    text = """
        import atexit, os, pathlib, time
        atexit.register(print, "bye from", os.environ["RANK"])
        pathlib.Path(f"{os.getpid()}.pid").touch()
        time.sleep(1000)
    """
    with launching("-n", 2, script(tmp_path, text), cwd=tmp_path) as launcher:
        pids(tmp_path, 2)
        launcher.send_signal(number)
        done = ended(launcher)

    assert done.code == code
    assert done.seconds < 12
    assert sorted(done.out.splitlines()) == ["[rank 0] bye from 0", "[rank 1] bye from 1"]
    assert "Traceback" not in done.err
    assert done.report[0].startswith(f"distrib: interrupted by {number.name}; ranks 0-1 ended within ")
    assert len(done.report) == 1


def test_ranks_that_ignore_an_interrupt_are_killed_after_the_grace_time(tmp_path: Path) -> None:
    with launching("-n", 2, "--grace", 1, family(tmp_path, IGNORE), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, PROCESSES_OF_TWO_RANKS + 2)
        launcher.send_signal(signal.SIGINT)
        done = ended(launcher)

        assert done.code == 130
        assert 1 <= done.seconds < 4
        assert "had to be killed" in done.report[0]
        assert all_gone(processes, within_s=1)


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with launching("-n", 2, "--grace", 50, family(tmp_path, IGNORE), cwd=tmp_path) as launcher:
        processes = pids(tmp_path, PROCESSES_OF_TWO_RANKS + 2)
        launcher.send_signal(signal.SIGINT)
        assert launcher.stderr is not None
        while "Ctrl-C" not in launcher.stderr.readline():
            pass
        launcher.send_signal(signal.SIGINT)
        done = ended(launcher)

        assert done.code == 130
        assert done.seconds < 3
        assert all_gone(processes, within_s=1)


IGNORE = (
    "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]\n"
    "    pathlib.Path(f'{os.getpid()}.pid').unlink()\n"
    "    child = subprocess.Popen(['sleep', '1000'])\n"
    "    pathlib.Path(f'{child.pid}.pid').touch()\n"
    "    pathlib.Path(f'{os.getpid()}.pid').touch()\n"
    "    time.sleep(1000)"
)


@pytest.mark.parametrize("after_s", [0, 1e-4, 3e-4, 1e-3, 0.05, 0.3, 1])
def test_an_interrupt_during_start_up_is_heard_and_prints_no_traceback(
    tmp_path: Path, after_s: float
) -> None:
    with launching("-n", 8, script(tmp_path, "import time; time.sleep(1000)"), cwd=tmp_path) as launcher:
        assert launcher.stderr is not None
        assert "8 processes" in launcher.stderr.readline()
        time.sleep(after_s)
        launcher.send_signal(signal.SIGINT)
        done = ended(launcher)

    assert done.code == 130
    assert done.seconds < 12
    assert "Traceback" not in done.err
