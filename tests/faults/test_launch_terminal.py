"""What a person sees who launches at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import selectors
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.launching import LIMIT_S, command, environment, launch, script

CTRL_C = b"\x03"
ERASE = "\r\x1b[K"
SLEEPS = """
    import os, time
    print("ready", os.environ["RANK"])
    time.sleep(1000)
"""


class Terminal:
    """A launch in a session of its own, and the person at its terminal.

    Attributes:
        shown: What was written so far.
    """

    def __init__(self, pid: int, fd: int) -> None:
        self.pid, self._fd, self._raw, self.shown = pid, fd, b"", ""

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait_for(self, text: str, times: int = 1) -> None:
        while self.shown.count(text) < times:
            assert self._read(), f"{text!r} never came: {self.shown!r}"

    def end(self) -> int:
        """Wait for the end of the launch; return its exit code."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            assert selector.select(LIMIT_S), f"nothing came for {LIMIT_S} s after {self.shown!r}"
        try:
            self._raw += os.read(self._fd, 1 << 16)
        except OSError:  # the launch has closed its side
            return False
        self.shown = self._raw.decode(errors="replace").replace("\r\n", "\n")
        return True


@contextmanager
def at_terminal(*words: object, cwd: Path, columns: int = 80, **env: str) -> Iterator[Terminal]:
    pid, fd = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(cwd)
        os.execve(sys.executable, command(*words), environment(**{"NO_COLOR": "1", **env}))
    terminal = Terminal(pid, fd)
    try:
        yield terminal
    finally:
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        except ChildProcessError:  # it has ended, and `end` has seen it
            pass
        os.close(fd)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_progress_is_never_wider_than_the_terminal_and_cut_between_characters(
    tmp_path: Path, columns: int
) -> None:
    text = """
        import os, sys, time
        if os.environ["RANK"] == "0":
            sys.stderr.write("\\r50%|" + "\u2588" * 200)
            sys.stderr.flush()
            while not os.path.exists("shown"): time.sleep(0.01)
            sys.stderr.write("\\rdone\\n")
    """
    with at_terminal("-n", 2, script(tmp_path, text), cwd=tmp_path, columns=columns) as terminal:
        terminal.wait_for("\u2588")
        (tmp_path / "shown").touch()
        assert terminal.end() == 0

    (bar,) = [line for line in terminal.shown.replace(ERASE, "\n").splitlines() if "\u2588" in line]
    assert bar == ("[rank 0] 50%|" + "\u2588" * 200)[: columns - 1]
    assert "\ufffd" not in terminal.shown
    assert terminal.shown.endswith("[rank 0] done\n")


def test_a_prompt_of_the_first_rank_is_seen_before_it_is_answered(tmp_path: Path) -> None:
    text = "import os\nif os.environ['RANK'] == '0': print('hello', input('Name? '))"
    with at_terminal("-n", 2, script(tmp_path, text), cwd=tmp_path) as terminal:
        terminal.wait_for("[rank 0] Name? ")
        terminal.type(b"Bob\n")
        assert terminal.end() == 0

    assert "hello Bob\n" in terminal.shown


def test_a_line_of_another_rank_stands_above_a_line_that_is_being_written(tmp_path: Path) -> None:
    text = """
        import os, time
        if os.environ["RANK"] == "0":
            print("one", end="", flush=True)
            while not os.path.exists("shown"): time.sleep(0.01)
            print(", two")
        else:
            while not os.path.exists("started"): time.sleep(0.01)
            print("in between")
    """
    with at_terminal("-n", 2, script(tmp_path, text), cwd=tmp_path) as terminal:
        terminal.wait_for("[rank 0] one")
        (tmp_path / "started").touch()
        terminal.wait_for("in between")
        (tmp_path / "shown").touch()
        assert terminal.end() == 0

    assert f"[rank 0] one{ERASE}[rank 1] in between\n[rank 0] one{ERASE}[rank 0] one, two\n" in terminal.shown


@pytest.mark.parametrize(("ranks", "before"), [(1, "^C\n"), (2, f"^C{ERASE}")])
def test_the_launcher_s_words_at_ctrl_c_start_a_line(tmp_path: Path, ranks: int, before: str) -> None:
    with at_terminal("-n", ranks, script(tmp_path, SLEEPS), cwd=tmp_path) as terminal:
        terminal.wait_for("ready", ranks)
        terminal.type(CTRL_C)
        assert terminal.end() == 130

    assert f"{before}distrib: Ctrl-C: asking the ranks to end" in terminal.shown
    assert terminal.shown.splitlines()[-1].startswith("distrib: interrupted by SIGINT; rank")


def test_ranks_have_colors_and_the_report_stands_out_unless_the_terminal_has_none(tmp_path: Path) -> None:
    text = """
        import os, pathlib, time
        print("here")
        folder = pathlib.Path(os.environ["TERM"])
        folder.mkdir(exist_ok=True)
        (folder / os.environ["RANK"]).touch()
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        raise ValueError("end")
    """
    program = script(tmp_path, text)
    for kind, seen in (("xterm", True), ("dumb", False)):
        with at_terminal("-n", 2, program, cwd=tmp_path, NO_COLOR="", TERM=kind) as terminal:
            assert terminal.end() == 1

        assert ("\x1b[36m[rank 0]\x1b[m here\n" in terminal.shown) == seen
        assert ("\x1b[33m[rank 1]\x1b[m here\n" in terminal.shown) == seen
        assert ("\x1b[1;31mdistrib: rank " in terminal.shown) == seen
        assert ("\x1b" in terminal.shown) == seen


@pytest.mark.parametrize("columns", [40, 80])
def test_the_report_is_broken_to_the_width_of_the_terminal(tmp_path: Path, columns: int) -> None:
    text = "raise ValueError('one two three four five six seven eight nine ten ' * 9)"
    with at_terminal("-n", 2, script(tmp_path, text), cwd=tmp_path, columns=columns) as terminal:
        assert terminal.end() == 1

    report = terminal.shown[terminal.shown.rindex("distrib: rank ") :].splitlines()
    assert len(report) <= 25
    assert max(len(line) for line in report if "/" not in line) < columns
    assert report[-1] == "exit code 1"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_says_that_it_kills(tmp_path: Path, ranks: int) -> None:
    text = f"    import signal; signal.signal(signal.SIGINT, signal.SIG_IGN){SLEEPS}"
    program = script(tmp_path, text)
    with at_terminal("-n", ranks, "--grace", 50, program, cwd=tmp_path) as terminal:
        terminal.wait_for("ready", ranks)
        terminal.type(CTRL_C)
        terminal.wait_for("asking the ranks to end")
        terminal.type(CTRL_C)
        assert terminal.end() == 130

    assert terminal.shown.count("distrib: Ctrl-C: killing the ranks\n") == 1
    assert "\ndistrib: interrupted by SIGINT; rank" in terminal.shown


def test_a_report_starts_a_line_below_a_progress_line(tmp_path: Path) -> None:
    text = "import sys\nsys.stderr.write('\\r10%\\r20%')\nsys.stderr.flush()\nraise ValueError('end')"
    with at_terminal("-n", 2, script(tmp_path, text), cwd=tmp_path) as terminal:
        assert terminal.end() == 1

    assert "\ndistrib: rank " in terminal.shown
    assert terminal.shown.endswith("\nexit code 1\n")


def test_nothing_but_text_goes_to_a_pipe(tmp_path: Path) -> None:
    text = "import sys\nsys.stderr.write('\\r10%\\r20%\\n')\nprint('a', end='')\nraise ValueError('\\x1b[31mend\\x1b[0m')"
    done = launch("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert "\x1b" not in done.out + done.err
