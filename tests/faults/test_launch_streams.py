"""Streams that are closed, full, or that nobody reads any more, as under cron, with `| head`, or on a full disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.faults.launching import LIMIT_S, Launched, command, environment, launch, launching, script

ENDS_WITH_7 = "import os, sys\nif os.environ['RANK'] == '0': sys.exit(7)"
SHOWS_THAT_IT_RAN = """
    import os, sys
    print("to stdout")
    sys.stdout.flush()
    print("to stderr", file=sys.stderr)
    open(f"ran_{os.environ['RANK']}", "w").close()
"""
WAITS_UNTIL_NOBODY_READS = """
    import os, sys, time
    while not os.path.exists("left"): time.sleep(0.01)
    sys.exit(7)
"""


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python hold text back, as it does by default: what it writes at its end is harder to tell of."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def redirected(to: str, *words: object, cwd: Path) -> Launched:
    """Run a launch to its end, with its streams as a shell redirects them."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {to}', "sh", *command(*words)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Launched(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_launch_whose_streams_are_closed_runs_as_any_other(tmp_path: Path, closed: str, ranks: int) -> None:
    done = redirected(closed, "-n", ranks, script(tmp_path, SHOWS_THAT_IT_RAN), cwd=tmp_path)

    assert (done.code, done.out) == (0, "")
    assert "to stdout" not in done.err
    assert done.err.count("to stderr") == (0 if "2>&-" in closed else ranks)
    assert len(list(tmp_path.glob("ran_*"))) == ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_exit_code_is_the_rank_s_where_stderr_is_closed(tmp_path: Path, ranks: int) -> None:
    assert redirected("2>&-", "-n", ranks, script(tmp_path, ENDS_WITH_7), cwd=tmp_path).code == 7


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_exit_code_is_the_rank_s_where_nobody_reads_stderr_any_more(tmp_path: Path, ranks: int) -> None:
    with launching("-n", ranks, script(tmp_path, WAITS_UNTIL_NOBODY_READS), cwd=tmp_path) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.close()
        (tmp_path / "left").touch()
        code = process.wait(LIMIT_S)
        process.stderr = None  # not to be read at the end

    assert code == 7


@pytest.mark.parametrize("to", ["2>&-", "2>/dev/full"])
def test_wrong_usage_is_exit_code_2_even_where_it_cannot_be_said(tmp_path: Path, to: str) -> None:
    assert redirected(to, "nope.py", cwd=tmp_path).code == 2


def after_one_line(*words: object, cwd: Path) -> Launched:
    """Run a launch whose reader goes after the first line, as `head -1` does."""
    with launching(*words, cwd=cwd) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.stdout.close()
        process.stdout = None  # not to be read at the end
        err = process.communicate(timeout=LIMIT_S)[1]
    return Launched(process.returncode, first, err, 0.0)


def test_one_rank_ends_like_any_program_when_nobody_reads_its_output_any_more(tmp_path: Path) -> None:
    done = after_one_line(script(tmp_path, "while True: print('line')"), cwd=tmp_path)

    assert (done.code, done.out) == (141, "line\n")
    assert done.report[0].endswith(" failed: ended by SIGPIPE")
    assert done.report[1:] == [
        "  likely cause: it wrote to a pipe that nobody reads any more",
        "exit code 141",
    ]


def test_two_ranks_go_on_when_nobody_reads_their_output_any_more(tmp_path: Path) -> None:
    text = "import os\nfor i in range(20000): print('line')\nopen(f\"ran_{os.environ['RANK']}\", 'w').close()"
    done = after_one_line("-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 0
    assert len(done.err.splitlines()) == 1  # the start-up line
    assert len(list(tmp_path.glob("ran_*"))) == 2


def test_a_broken_pipe_of_the_program_s_own_is_its_exception(tmp_path: Path) -> None:
    text = "import os\nread, write = os.pipe()\nos.close(read)\nos.write(write, b'x')"
    done = launch(script(tmp_path, text), cwd=tmp_path)

    assert done.code == 1
    assert "      os.write(write, b'x')" in done.report


def test_output_of_two_ranks_that_a_full_disk_refuses_is_told_and_is_no_success(tmp_path: Path) -> None:
    done = redirected(">/dev/full", "-n", 2, script(tmp_path, SHOWS_THAT_IT_RAN), cwd=tmp_path)

    assert done.code == 1
    assert [line for line in done.err.splitlines() if not line.startswith("[rank")][1:] == [
        "distrib: warning: the ranks' output is lost: stdout: No space left on device; the job goes on",
        "distrib: every rank ended with 0, but output was lost: stdout: No space left on device",
        "exit code 1",
    ]
    assert len(list(tmp_path.glob("ran_*"))) == 2


def test_a_rank_s_own_exit_code_counts_more_than_lost_output(tmp_path: Path) -> None:
    text = f"print('to stdout')\n{ENDS_WITH_7}"
    done = redirected(">/dev/full", "-n", 2, script(tmp_path, text), cwd=tmp_path)

    assert done.code == 7
    assert "  output was lost: stdout: No space left on device" in done.report


@pytest.mark.parametrize("end", ["", "\\n"])
def test_output_of_one_rank_that_a_full_disk_refuses_is_its_exception(tmp_path: Path, end: str) -> None:
    done = redirected(">/dev/full", script(tmp_path, f"print('line', end='{end}')"), cwd=tmp_path)

    assert done.code == 1
    assert "  OSError: [Errno 28] No space left on device" in done.report


def test_a_plan_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = redirected(">/dev/full", "--explain", cwd=tmp_path)

    assert done.code == 2
    assert done.err.startswith("error[D0311] stdout: the output cannot be written: No space left on device\n")


def test_a_command_is_ended_by_a_pipe_that_nobody_reads_as_in_a_shell(tmp_path: Path) -> None:
    done = launch("--no-python", "sh", "-c", "yes | head -1", cwd=tmp_path)

    assert (done.code, done.out) == (0, "y\n")
    assert len(done.err.splitlines()) == 1  # the start-up line
