from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distrib_launcher.planning import most_processes

from tests.faults.launching import command, environment, launch, script

FAIL_ON_RANK_1 = """
    import os, sys, time, signal, ctypes
    def fail():
        {how}
    if os.environ["RANK"] == "1":
        fail()
    time.sleep(60)
"""


def failing(folder: Path, how: str) -> Path:
    return script(folder, FAIL_ON_RANK_1.format(how=how))


def test_the_first_exception_ends_all_ranks_and_is_the_report(tmp_path: Path) -> None:
    done = launch("-n", 2, failing(tmp_path, 'raise RuntimeError("injected failure")'), cwd=tmp_path)

    assert done.code == 1
    assert done.seconds < 10
    assert done.report[0].startswith("distrib: rank 1 (process ")
    assert done.err.count("RuntimeError: injected failure") == 1
    assert f"  {tmp_path}/train.py:4 in fail" in done.report
    assert any(line.startswith("  rank 0 followed: ended by the launcher") for line in done.report)
    assert done.report[-1] == "exit code 1"
    assert len(done.report) <= 25
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("how", "code", "name"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
        ("ctypes.string_at(0)", 139, "SIGSEGV"),
        ("os.abort()", 134, "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "SIGTERM"),
    ],
)
def test_a_rank_that_dies_of_a_signal_is_named_with_it(
    tmp_path: Path, how: str, code: int, name: str
) -> None:
    done = launch("-n", 2, failing(tmp_path, how), cwd=tmp_path)

    assert done.code == code
    assert done.seconds < 10
    assert done.report[0].startswith("distrib: rank 1 ")
    assert done.report[0].endswith(f"ended by {name}")
    assert any(line.startswith("  likely cause:") for line in done.report)


def test_a_crash_in_native_code_shows_the_python_line(tmp_path: Path) -> None:
    done = launch("-n", 2, failing(tmp_path, "ctypes.string_at(0)"), cwd=tmp_path)

    assert any("train.py" in line and "line 4 in fail" in line for line in done.report)


@pytest.mark.parametrize(
    ("how", "code"),
    [("sys.exit(3)", 3), ("os._exit(4)", 4), ("sys.exit('no data')", 1), ("sys.exit(256 + 5)", 5)],
)
def test_an_exit_code_is_passed_on(tmp_path: Path, how: str, code: int) -> None:
    assert launch("-n", 2, failing(tmp_path, how), cwd=tmp_path).code == code


def test_sys_exit_0_is_success(tmp_path: Path) -> None:
    done = launch("-n", 2, script(tmp_path, "import sys; sys.exit(0)"), cwd=tmp_path)

    assert done.code == 0
    assert len(done.err.splitlines()) == 1  # the start-up line


def test_a_crash_in_a_forked_child_leaves_the_rank_s_own_exception_in_the_report(tmp_path: Path) -> None:
    how = """
        if os.fork() == 0:
            ctypes.string_at(0)
        os.wait()
        raise ValueError("a worker of mine crashed")
    """
    done = launch("-n", 2, failing(tmp_path, how), cwd=tmp_path)

    assert done.report[0].endswith("failed: ValueError")
    assert "  ValueError: a worker of mine crashed" in done.report
    assert "Fatal Python error" not in "\n".join(done.report)
    assert "[rank 1] Fatal Python error: Segmentation fault" in done.err


def test_a_crash_after_success_is_named_by_its_signal(tmp_path: Path) -> None:
    text = """
        import atexit, ctypes, sys
        atexit.register(ctypes.string_at, 0)
        sys.exit(0)
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 139
    assert done.report[0].endswith("ended by SIGSEGV")


def test_an_exception_is_the_report_although_the_rank_crashes_after_it(tmp_path: Path) -> None:
    text = """
        import atexit, ctypes
        atexit.register(ctypes.string_at, 0)
        raise ValueError("first")
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert "  ValueError: first" in done.report


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has exception groups")
def test_the_exceptions_of_a_group_are_shown_with_their_places(tmp_path: Path) -> None:
    text = """
        def fail(error):
            raise error
        found = []
        for error in (ValueError("inner one"), KeyError("k")):
            try:
                fail(error)
            except Exception as caught:
                found.append(caught)
        raise ExceptionGroup("many", [found[0], ExceptionGroup("nested", [found[1]])])
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    shown = done.report[done.report.index("  ExceptionGroup: many (2 sub-exceptions)") :]
    assert shown[1:4] == [
        f"    ValueError: inner one ({tmp_path}/train.py:3)",
        "    ExceptionGroup: nested (1 sub-exception)",
        f"      KeyError: 'k' ({tmp_path}/train.py:3)",
    ]


def test_both_ends_of_a_long_message_are_shown(tmp_path: Path) -> None:
    text = "raise ValueError('the start ' + 'line\\n' * 50000 + 'the end ' + 'w' * 100000 + ' the very end')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    message = "\n".join(done.report[done.report.index("  ValueError: the start line") :])
    assert "lines left out)" in message
    assert "\n  the end ww" in message
    assert "ww the very end\n" in message
    assert len(done.report) <= 25


def test_a_text_of_sys_exit_that_cannot_be_made_is_no_traceback_of_ours(tmp_path: Path) -> None:
    text = """
        import sys
        class Bad:
            def __str__(self):
                raise RuntimeError("no text")
        sys.exit(Bad())
    """
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert "Traceback" not in done.err
    assert "sys.exit(" in done.report[0]


def test_a_long_text_of_sys_exit_is_shown_in_lines(tmp_path: Path) -> None:
    text = "import sys; sys.exit('there is no data here\\nmake some with prepare.py')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.report[1:3] == ["  there is no data here", "  make some with prepare.py"]


def test_colors_and_control_characters_of_a_message_are_not_written_to_the_terminal(tmp_path: Path) -> None:
    text = r"raise ValueError('\x1b[31mred\x1b[0m \x07 bell')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert r"  ValueError: red \x07 bell" in done.report


@pytest.mark.parametrize("files", [64, 90])
def test_as_many_ranks_as_the_limit_of_open_files_allows_run(tmp_path: Path, files: int) -> None:
    limited = f'ulimit -n {files}; exec "$@"'
    words = [*command("-n", most_processes(files), "--no-python", "true")]
    done = subprocess.run(
        ["sh", "-c", limited, "sh", *words],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr


def test_the_message_of_sys_exit_is_shown_once(tmp_path: Path) -> None:
    done = launch("-n", 2, script(tmp_path, "import sys; sys.exit('no data found')"), cwd=tmp_path)

    assert (done.code, done.err.count("no data found")) == (1, 1)


@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module\n"])
def test_an_error_of_all_ranks_is_shown_once(tmp_path: Path, text: str) -> None:
    done = launch("-n", 3, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert done.err.count("Error:") == 1
    assert "ranks" in done.report[0] or "followed" in "\n".join(done.report)


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    text = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["RANK"] == "1":
            time.sleep(0.5)  # rank 0 has its handler by now
            sys.exit(7)
        time.sleep(60)
    """
    done = launch("-n", 2, "--grace", 1, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 7
    assert 1 < done.seconds < 10
    assert "  rank 0 followed: killed by the launcher after the grace time" in done.report


def test_a_rank_that_hangs_after_its_exception_does_not_hold_up_the_end(tmp_path: Path) -> None:
    text = """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise ValueError("and a thread goes on")
    """
    done = launch("--grace", 1, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert done.seconds < 10
    assert "  ValueError: and a thread goes on" in done.report


def test_a_rank_that_lost_its_peer_is_not_the_root_cause(tmp_path: Path) -> None:
    text = """
        import os, socket
        address = "\\0" + os.environ["MASTER_PORT"] + "-peer"
        if os.environ["RANK"] == "1":
            server = socket.socket(socket.AF_UNIX)
            server.bind(address)
            server.listen()
            server.accept()[0].recv(1)
            os._exit(9)
        while True:
            try:
                peer = socket.socket(socket.AF_UNIX)
                peer.connect(address)
                break
            except OSError:
                peer.close()
        peer.send(b"x")
        peer.recv(1)
        raise ConnectionResetError("Connection reset by peer")
    """
    done = launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 9
    assert done.report[0].startswith("distrib: rank 1 ")
    assert done.report[1].startswith(
        "  rank 0 followed: "
    )  # it lost its peer, or was ended before it saw that


def test_atexit_runs_when_the_launcher_ends_a_rank(tmp_path: Path) -> None:
    text = """
        import atexit, os, pathlib, sys, time
        rank = os.environ["RANK"]
        atexit.register(lambda: pathlib.Path(f"{rank}.bye").touch())
        pathlib.Path(f"{rank}.ready").touch()
        if rank == "1":
            while not pathlib.Path("0.ready").exists():
                time.sleep(0.01)
            sys.exit(1)
        time.sleep(60)
    """
    launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert (tmp_path / "0.bye").exists()
