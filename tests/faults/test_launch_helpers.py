"""The launcher's own helpers break down: the preloader hangs, the store dies. The job ends in bounded time, and says so."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.launching import LIMIT_S, ended, launch, launching, script
from tests.faults.leaving import ended_by, nothing_left, until

FAILS_ONCE = """
    import os, pathlib, sys, time
    pathlib.Path(f"{os.environ['RANK']}.ready").touch()
    while not os.path.exists("go"):
        time.sleep(0.01)
    sys.exit(3)
"""
WAITS = """
    import os, pathlib, time
    pathlib.Path(f"{os.environ['RANK']}.ready").touch()
    time.sleep(1000)
"""


def preloader_of(launcher: int) -> psutil.Process:
    """The ranks show its command line too; it was there before them."""
    found = [x for x in psutil.Process(launcher).children() if "preloader.py" in " ".join(x.cmdline())]
    return min(found, key=lambda x: x.create_time())


def both_ready(folder: Path, process) -> None:
    for rank in range(2):
        until(folder / f"{rank}.ready", process)


def test_a_preloader_that_hangs_does_not_make_the_launcher_deaf(tmp_path: Path) -> None:
    program = script(tmp_path, FAILS_ONCE)
    with (
        nothing_left(),
        launching("-n", 2, "--max-restarts", 3, "--grace", 1, program, cwd=tmp_path) as process,
    ):
        both_ready(tmp_path, process)
        preloader_of(process.pid).send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        assert process.stderr is not None
        while "restarting all ranks (1 of 3)" not in process.stderr.readline():
            pass
        time.sleep(0.5)  # it waits for the preloader's answer
        done = ended_by(process, signal.SIGTERM)

    assert done.code == 143, done.err
    assert done.seconds < 10
    assert "Traceback" not in done.err


def test_a_store_that_is_gone_ends_the_job_and_is_named(tmp_path: Path) -> None:
    with nothing_left(), launching("-n", 2, script(tmp_path, WAITS), cwd=tmp_path) as process:
        both_ready(tmp_path, process)
        (store,) = preloader_of(process.pid).children()
        store.kill()
        start = time.monotonic()
        done = ended(process)

    assert time.monotonic() - start < LIMIT_S / 2
    assert done.code != 0
    assert "the process that serves the ranks' store has ended" in done.err


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_unbuffered_output_is_unbuffered(tmp_path: Path, method: str) -> None:
    program = script(tmp_path, "import os\nprint('x', end='')\nos._exit(0)")
    done = launch("-n", 2, "--start-method", method, program, cwd=tmp_path, PYTHONUNBUFFERED="1")

    assert sorted(done.out.splitlines()) == ["[rank 0] x", "[rank 1] x"]


def test_settings_of_the_preloader_that_have_no_effect_are_named(tmp_path: Path) -> None:
    words = ("-n", 1, "--start-method", "spawn", "--preload", "json", script(tmp_path, "print('ran')"))
    done = launch(*words, cwd=tmp_path)

    assert (done.code, done.out) == (0, "ran\n")
    assert (
        "warning: preload (--preload) has no effect, each rank is started as a fresh interpreter" in done.err
    )

    done = launch("-n", 2, "--start-method", "fork", "--no-python", "true", cwd=tmp_path)
    assert "warning: start_method: fork (--start-method) has no effect" in done.err


def test_logs_say_that_a_launch_has_ended_that_was_refused(tmp_path: Path) -> None:
    done = launch(
        "-n", 2, "--preload", "no_such_module", "--log-dir", "logs", script(tmp_path, WAITS), cwd=tmp_path
    )

    assert (done.code, "D0312" in done.err) == (2, True)
    (about,) = tmp_path.glob("logs/*/launch.json")
    assert json.loads(about.read_text())["exit_code"] == 2


def test_a_long_reason_why_a_module_cannot_be_imported_arrives(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('why ' + 'y' * 1_000_000)")
    done = launch("-n", 2, "--preload", "broken", script(tmp_path, WAITS), cwd=tmp_path)

    assert done.code == 2
    assert "broken cannot be imported: ImportError: why yyy" in done.err


def test_no_half_of_a_secret_is_kept_of_a_long_message(tmp_path: Path) -> None:
    text = "import os\nraise ValueError('x' * 1940 + os.environ['MY_API_KEY'] + 'y' * 4000)"
    secret = "Secretvalue-0123456789abcdefgh-0123456789abcdefgh-0123456789"
    done = launch("-n", 1, "--log-dir", "logs", script(tmp_path, text), cwd=tmp_path, MY_API_KEY=secret)

    (failure,) = tmp_path.glob("logs/*/failure.json")
    assert "Secretv" not in failure.read_text()
    assert "Secretv" not in done.err
