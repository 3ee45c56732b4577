"""What `make demo` runs, looked at as a person sees it: on a terminal."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.launching import environment

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
COLUMNS = 100
STEP = re.compile(r"\[rank 0\] step +(\d+)/80  loss (\d\.\d{4})  lr \d\.\de[-+]\d\d +[\d,]+ tokens/s")
PROGRESS = re.compile(rb"\r\[rank 0\] step +(\d+)/80 ")


@dataclass
class Terminal:
    """What a terminal shows of plain text, carriage returns and "erase to the end of the line"."""

    columns: int
    rows: list[str] = field(default_factory=lambda: [""])
    column: int = 0

    def show(self, text: str) -> None:
        for part in re.findall(r"\x1b\[K|\r|\n|[^\r\n\x1b]|\x1b", text):
            if part == "\n":
                self.rows.append("")
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[K":
                self.rows[-1] = self.rows[-1][: self.column]
            else:
                self._put(part)

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self.rows.append("")
            self.column = 0
        row = self.rows[-1].ljust(self.column)
        self.rows[-1] = row[: self.column] + character + row[self.column + 1 :]
        self.column += 1


@dataclass(frozen=True)
class Seen:
    """A demo that has ended.

    Attributes:
        code: Its exit code.
        raw: All bytes that it wrote.
        rows: What stands on the terminal at its end.
        folder: Where the run wrote.
    """

    code: int
    raw: bytes
    rows: list[str]
    folder: Path


def watch(folder: Path) -> Seen:
    """Run the demo on a pseudo-terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(DEMO), str(folder)],
        env={name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    raw = bytearray()
    try:
        while chunk := read(ours):
            raw += chunk
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and its launch, which ends its ranks
            process.wait()
        os.close(ours)
    terminal = Terminal(COLUMNS)
    terminal.show(raw.decode())
    return Seen(code, bytes(raw), terminal.rows, folder)


def read(terminal: int) -> bytes:
    """Return what has been written; nothing once every writer has closed the terminal, which Linux tells as an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return watch(tmp_path_factory.mktemp("demo") / "run")


def claims(seen: Seen) -> list[str]:
    """Return the lines at the end, put together again where the terminal wrapped them."""
    text = "".join(row if len(row) == COLUMNS else f"{row}\n" for row in seen.rows)
    return text.split("--- 3. what happened ---\n\n")[1].strip().splitlines()


def test_every_claim_holds(seen: Seen):
    assert seen.code == 0, "\n".join(seen.rows)
    expected = [
        r"the launcher named rank 1 \(process \d+\) and ended with 137 \(128 \+ SIGKILL\)",
        r"killed after step 5\d, resumed from the checkpoint of step 40",
        r"steps 41 to 5\d, trained twice, have the same losses",
        r"loss fell from 5\.\d\d to 2\.\d\d",
        r"[\d,]+ tokens/s on two processes",
        rf"the model is in {seen.folder}/model/model\.safetensors",
    ]
    found = claims(seen)
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(f"ok    {pattern}", line)


def test_the_claims_can_be_seen_above(seen: Seen):
    text = "\n".join(seen.rows)
    killed = re.search(r"--- rank 1 \(process (\d+)\) gets SIGKILL now ---", text)
    assert f"distrib: rank 1 (process {killed[1]} on " in text
    assert f"resumed from {seen.folder}/checkpoints/step-00000040 at step 40" in text.replace("\n", "")
    assert (seen.folder / "model" / "model.safetensors").stat().st_size > 1_000_000


def test_one_line_renews_itself_at_every_step(seen: Seen):
    steps = [int(step) for step in PROGRESS.findall(seen.raw)]
    reached = max(steps[: steps.index(41, 41)])
    assert steps == [*range(1, reached + 1), *range(41, 81)]
    rows = [row for row in seen.rows if "tokens/s" in row and row.startswith("[")]
    assert len(rows) <= 3  # at the kill, what rank 0 still did then, and at the end
    assert [int(STEP.fullmatch(row)[1]) for row in (rows[0], rows[-1])] == [50, 80]


def test_nothing_is_garbled(seen: Seen):
    for row in seen.rows:
        assert row.isprintable()
        if "] step " in row:
            assert STEP.fullmatch(row), row
        assert not re.search(r"\S(--- |\$ distrib|distrib: |\[rank |ok  |FAIL)", row)


def demo_module():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_lines_cannot_be_renewed_only_the_kept_ones_are_written():
    out = io.StringIO()
    screen = demo_module().Screen(out)
    for step in range(1, 4):
        screen.progress(f"step {step}", keep=step == 2)
    screen.line("end")
    assert out.getvalue() == "step 2\nend\n"


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_a_line_after_progress_stands_below_it_whatever_its_length(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out, terminal = Tty(), Terminal(20)
    screen = demo_module().Screen(out)
    screen.progress("a line that is wider than the terminal", keep=False)
    screen.progress("shorter", keep=False)
    screen.line("below")
    terminal.show(out.getvalue().replace("\n", "\r\n"))
    assert terminal.rows == ["shorter", "below", ""]
