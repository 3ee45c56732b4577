"""The examples, unchanged, on XLA's CPU client: started as a user starts them, with the numbers that the CPU gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.launching import command, environment

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 110.0
EPOCH = r"epoch (\d): test loss ([\d.]+), accuracy [\d.]+% \((\d+) of (\d+)\)"


def run(words: list[str], cwd: Path, **env: str) -> tuple[str, str]:
    """Run a command to its good end; return what it wrote to stdout, without the ranks' names, and to stderr."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment(PJRT_DEVICE="CPU", OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.replace("[rank 0] ", ""), done.stderr


def launched(cwd: Path, *words: str, **env: str) -> tuple[str, str]:
    return run(command(*words[:-1], EXAMPLES / words[-1]), cwd, **env)


def digits(cwd: Path, *words: str, strategy: str, **env: str) -> tuple[float, int, int]:
    """Return the loss, the right answers and their total after an epoch of digits.py, on the strategy that is expected."""
    program = [*command(*words), str(EXAMPLES / "digits.py"), "--epochs", "1"]
    out, err = run(program, cwd, **env)
    assert f"strategy {strategy} (" in err
    ((_, loss, right, total),) = re.findall(EPOCH, out)
    return float(loss), int(right), int(total)


def assert_close(found: tuple[float, int, int], expected: tuple[float, int, int]) -> None:
    """Losses in float32 differ by the order of additions; an image may fall on the other side."""
    assert found[0] == pytest.approx(expected[0], abs=2e-3)
    assert found[1] == pytest.approx(expected[1], abs=1)
    assert found[2] == expected[2] == 297


def test_the_changed_loop_has_the_plain_loops_loss(tmp_path: Path):
    plain, _ = run([sys.executable, str(EXAMPLES / "plain_loop.py")], tmp_path)
    out, err = launched(tmp_path, "--set", "data.tail=exact", "with_distrib.py")

    (expected,), (loss,) = (re.findall(r"final loss ([\d.]+)", text) for text in (plain, out))
    assert "strategy xla (auto, device xla)" in err
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_digits_on_two_replicas_learns_what_it_learns_on_the_cpu(tmp_path: Path):
    (tmp_path / "cpu").mkdir()
    expected = digits(tmp_path / "cpu", "--cpu", strategy="single")
    found = digits(tmp_path, "-n", "2", strategy="xla")

    assert_close(found, expected)


def test_digits_in_one_program_for_four_devices_learns_what_it_learns_on_the_cpu(tmp_path: Path):
    tail = ("--set", "data.tail=pad")
    (tmp_path / "cpu").mkdir()
    expected = digits(tmp_path / "cpu", "--cpu", *tail, strategy="single")
    found = digits(tmp_path, "--set", "xla.spmd=true", *tail, strategy="xla", CPU_NUM_DEVICES="4")

    assert_close(found, expected)
