from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distrib_launcher import cli
from distrib_launcher.commands.logs import Log, start_of_last
from distrib_launcher.run_folder import RunFolder
from hypothesis import given, strategies as st

from distrib.errors import LaunchError

LINES = st.lists(st.binary(max_size=9).map(lambda raw: raw.translate(None, b"\n\r\x1b")), max_size=9)
TABLE = {"logs": ("distrib_launcher.commands.logs:logs", "Print what the ranks of a launch have written.")}
COMMAND = f"""
import sys
from distrib_launcher import cli
cli._COMMANDS.update({TABLE!r})
sys.exit(cli.run(sys.argv[1:], {{}}))
"""
PATH = os.pathsep.join(str(Path(__file__).parents[2] / folder) for folder in (".", "launcher"))


@pytest.fixture(autouse=True)
def command_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._COMMANDS, "logs", TABLE["logs"])  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", {"command": "python train.py", "num_processes": 2})


def write(run: RunFolder, attempt: int, rank: int, text: str) -> None:
    run.start_attempt(attempt)
    with run.log_path(attempt, rank).open("a", encoding="utf-8") as file:
        file.write(text)


def shown(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    code = cli.run(["logs", *map(str, words)], {})
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    code = cli.run(["logs", *map(str, words)], {})
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    return err


# --- the folder ---


def test_a_run_s_folder_says_what_was_started_and_by_whom(run: RunFolder) -> None:
    about = json.loads((run.path / "launch.json").read_text())

    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.path.name)
    assert (about["command"], about["num_processes"], about["pid"]) == ("python train.py", 2, os.getpid())
    assert about["started"].startswith(f"{run.path.name[:4]}-{run.path.name[4:6]}-{run.path.name[6:8]}T")
    assert (run.attempts(), run.ranks(0)) == ([0], [])
    assert sorted(path.name for path in run.path.iterdir()) == ["attempt-0", "launch.json"]


def test_attempts_and_ranks_are_in_the_order_of_their_numbers(run: RunFolder) -> None:
    for attempt, rank in [(10, 0), (2, 0), (1, 11), (1, 3)]:
        write(run, attempt, rank, "x\n")
    (run.path / "attempt-1" / "rank-3.log.gz").touch()

    assert (run.attempts(), run.ranks(1), run.ranks(7)) == ([0, 1, 2, 10], [3, 11], [])


def test_two_launches_of_one_second_with_the_same_chance_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([b"aa", b"aa", b"bb"] * 3)
    monkeypatch.setattr(os, "urandom", lambda count: next(drawn))
    paths = {RunFolder.create(tmp_path, {}).path for _ in range(2)}

    assert len(paths) == 2


def test_launches_at_once_get_a_folder_each(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(RunFolder.create(tmp_path, {}).path)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(found)) == len(list(tmp_path.iterdir())) == 16


def test_a_file_in_the_way_of_the_log_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for log_dir in (tmp_path / "notes", tmp_path / "notes" / "runs"):
        with pytest.raises(LaunchError) as raised:
            RunFolder.create(log_dir, {})

        assert (raised.value.code, raised.value.where) == ("D0320", "--log-dir")
        assert f"{tmp_path / 'notes'} is a file" in str(raised.value)


def test_a_log_directory_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(LaunchError, match="D0320") as raised:
        RunFolder.create(Path("/proc/self/runs"), {})

    assert "no run's folder can be made in /proc/self/runs: No such file or directory" in str(raised.value)


FULL = """
import resource, sys
from pathlib import Path
from distrib.errors import LaunchError
from distrib_launcher.run_folder import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    RunFolder.create(Path(sys.argv[1]), {})
except LaunchError as error:
    print(error)
"""


def test_where_nothing_can_be_written_a_launch_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, env={"PYTHONPATH": PATH}, stdout=subprocess.PIPE, text=True, timeout=60)

    assert ended.stdout.startswith(
        f"error[D0320] --log-dir: no run's folder can be made in {tmp_path}: File too large"
    )
    assert list(tmp_path.iterdir()) == []


def made(log_dir: Path, name: str, started: str) -> RunFolder:
    about = {"host": "h", "machine": "m", "pid": 1, "pid_start": 1, "started": started}
    (log_dir / name).mkdir(parents=True)
    (log_dir / name / "launch.json").write_text(json.dumps(about))
    return RunFolder(log_dir / name)


def test_the_newest_run_is_the_one_that_was_started_last(tmp_path: Path) -> None:
    made(tmp_path, "20260101-000000-ffff", "2026-01-01T00:00:00.9")
    made(tmp_path, "20260102-000000-ffff", "2026-01-02T00:00:00.1")
    last = made(tmp_path, "20260102-000000-0000", "2026-01-02T00:00:00.2")
    (tmp_path / "20270101-000000-0000").mkdir()  # nothing says that a launch began there
    (tmp_path / "other").mkdir()

    assert RunFolder.newest(tmp_path) == last
    assert RunFolder.find(tmp_path) == last
    assert RunFolder.find(last.path) == last
    assert RunFolder.newest(tmp_path / "other") is None


def test_a_run_goes_on_until_its_end_is_noted(run: RunFolder) -> None:
    assert run.is_running() is True

    assert run.close(3) == ""
    assert run.is_running() is False
    assert (run.about()["exit_code"], run.about()["command"]) == (3, "python train.py")


@contextmanager
def launcher(log_dir: Path) -> Iterator[tuple[RunFolder, subprocess.Popen[str]]]:
    """A process that has made a run's folder and goes on until its stdin closes, or it is killed."""
    code = (
        "import sys; from pathlib import Path; from distrib_launcher.run_folder import RunFolder; "
        "print(RunFolder.create(Path(sys.argv[1]), {}).path, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(log_dir)]
    with subprocess.Popen(
        command, env={"PYTHONPATH": PATH}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield RunFolder(Path(process.stdout.readline().strip())), process


def test_a_run_whose_launcher_was_killed_does_not_go_on(tmp_path: Path) -> None:
    with launcher(tmp_path) as (run, process):
        assert run.is_running() is True
        process.kill()
        process.wait()

        assert run.is_running() is False


def changed(run: RunFolder, **about: object) -> RunFolder:
    (run.path / "launch.json").write_text(json.dumps({**run.about(), **about}))
    return run


def test_a_process_that_got_the_launcher_s_number_later_is_not_taken_for_it(run: RunFolder) -> None:
    assert changed(run, pid_start=1).is_running() is False


@pytest.mark.parametrize("machine", ["", "another boot pid:[1]"])
def test_of_another_machine_s_launch_nobody_claims_to_know(run: RunFolder, machine: str) -> None:
    assert changed(run, machine=machine).is_running() is None


def test_an_end_that_cannot_be_noted_is_told_and_raises_nothing(run: RunFolder) -> None:
    (run.path / "launch.json").unlink()

    assert "launch.json cannot be read: No such file or directory" in run.close(0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"started": 1}', "\xff"])
def test_a_damaged_launch_json_is_refused(run: RunFolder, text: str) -> None:
    (run.path / "launch.json").write_text(text, encoding="latin-1")

    with pytest.raises(LaunchError, match="D0323"):
        run.about()


# --- distrib logs ---


def test_lines_of_several_ranks_have_their_rank_and_those_of_one_do_not(
    capfd: pytest.CaptureFixture[str], run: RunFolder
) -> None:
    write(run, 0, 0, "a\nb\n")
    write(run, 0, 1, "c\n")

    assert shown(capfd, run.path) == "[rank 0] a\n[rank 0] b\n[rank 1] c\n"
    assert shown(capfd, run.path, "--rank", 1) == "c\n"
    assert shown(capfd, run.path, "--rank", 1, "--rank", 0, "--rank", 1) == shown(capfd, run.path)


def test_a_launch_of_one_process_needs_no_rank_before_its_lines(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path, {"num_processes": 1})
    write(run, 0, 0, "a\n")

    assert shown(capfd, run.path) == "a\n"


def test_the_newest_attempt_of_the_newest_run_is_the_default(
    capfd: pytest.CaptureFixture[str], run: RunFolder
) -> None:
    write(run, 0, 0, "first\n")
    write(run, 1, 0, "second\n")

    assert shown(capfd, run.path.parent, "--rank", 0) == "second\n"
    assert shown(capfd, run.path.parent, "--rank", 0, "--attempt", 0) == "first\n"


@pytest.mark.parametrize(("count", "text"), [(0, ""), (1, "end"), (2, "c\nend"), (9, "a\nb\nc\nend")])
def test_lines_asks_for_the_last_ones_and_an_unfinished_one_counts(
    capfd: pytest.CaptureFixture[str], run: RunFolder, count: int, text: str
) -> None:
    write(run, 0, 0, "a\nb\nc\nend")

    assert shown(capfd, run.path, "--rank", 0, "-n", count) == (text and f"{text}\n")


def test_bytes_that_are_no_text_come_out_as_they_are(
    capfdbinary: pytest.CaptureFixture[bytes], run: RunFolder
) -> None:
    run.log_path(0, 0).write_bytes(b"\xff\x00\xfe\n")

    assert cli.run(["logs", str(run.path), "--rank", "0"], {}) == 0
    assert capfdbinary.readouterr().out == b"\xff\x00\xfe\n"


def test_a_path_without_a_run_is_refused_and_the_nearest_named(
    capfd: pytest.CaptureFixture[str], run: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    near = f"{run.path}0"

    assert (
        f"{near} does not exist; expected a run's folder, or a folder of runs; did you mean {run.path.name!r}?"
        in (refused(capfd, near))
    )
    assert "holds no run" in refused(capfd, tmp_path / "empty")
    assert "is a file" in refused(capfd, tmp_path / "file")


def test_an_attempt_that_never_was_is_refused_and_those_that_were_are_named(
    capfd: pytest.CaptureFixture[str], run: RunFolder
) -> None:
    run.start_attempt(1)

    assert "there is no attempt 2; there are 0-1" in refused(capfd, run.path, "--attempt", 2)

    for attempt in run.attempts():
        (run.path / f"attempt-{attempt}").rmdir()
    assert "there is no attempt\n" in refused(capfd, run.path)


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_a_rank_without_a_log_is_refused_and_those_with_one_are_named(
    capfd: pytest.CaptureFixture[str], run: RunFolder, follow: list[str]
) -> None:
    write(run, 0, 0, "a\n")
    write(run, 0, 1, "a\n")
    run.close(0)

    assert "rank 7 has no log in attempt 0; there are those of 0-1" in refused(
        capfd, run.path, "--rank", 7, *follow
    )


@pytest.mark.parametrize("words", [["--rank", "x"], ["--rank", "-1"], ["-n", "-1"], ["--attempt", "new"], []])
def test_a_wrong_command_line_is_refused(
    capfd: pytest.CaptureFixture[str], run: RunFolder, words: list[str]
) -> None:
    assert "error[D0307] distrib logs: " in refused(capfd, *([run.path] if words else []), *words)


def test_a_log_that_cannot_be_read_is_named(capfd: pytest.CaptureFixture[str], run: RunFolder) -> None:
    run.log_path(0, 0).mkdir()

    assert f"{run.log_path(0, 0)} cannot be read: Is a directory" in refused(capfd, run.path)


# --- reading a growing file ---


@given(lines=LINES, last=st.integers(0, 10), end=st.booleans(), long=st.booleans())
def test_the_last_lines_begin_where_they_would_in_the_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], last: int, end: bool, long: bool
) -> None:
    body = b"x" * 70_000 if long else b""  # longer than a block
    data = b"\n".join(line + body for line in lines) + (b"\n" if end else b"")
    file = tmp_path_factory.mktemp("logs") / "log"
    file.write_bytes(data)

    with file.open("rb") as opened:
        found = data[start_of_last(opened, last) :]
    assert found == b"".join(data.splitlines(keepends=True)[-last:] if last else [])


def read_all(log: Log) -> list[bytes]:
    found: list[bytes] = []
    while (lines := log.read()) is not None:
        found += lines
    return found


@given(lines=LINES, cuts=st.lists(st.integers(0, 99), max_size=5))
def test_a_growing_log_gives_each_line_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(line + b"\n" for line in lines)
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    file = tmp_path_factory.mktemp("logs") / "log"
    log, found = Log(file), list[bytes]()
    for start, stop in itertools.pairwise(places):
        with file.open("ab") as writer:
            writer.write(data[start:stop])
        found += read_all(log)
    log.close()

    assert found == lines


def test_a_log_that_comes_later_is_read_whole_whatever_number_of_lines_was_asked_for(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", 1)
    assert log.read() is None

    (tmp_path / "log").write_bytes(b"a\nb\n")
    assert read_all(log) == [b"a", b"b"]
    log.close()


def test_a_log_that_is_cut_is_read_from_its_new_start(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a long line\npart")
    log = Log(tmp_path / "log")
    before = read_all(log)
    (tmp_path / "log").write_bytes(b"new\n")

    assert (before, read_all(log)) == ([b"a long line"], [b"part", b"new"])
    log.close()


def test_a_log_that_is_moved_away_is_read_to_its_end_and_then_the_one_in_its_place(tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "log.1"
    path.write_bytes(b"a\n")
    log = Log(path)
    found = read_all(log)
    path.rename(moved)
    with moved.open("ab") as writer:
        writer.write(b"b\n")
    found += read_all(log)
    with moved.open("ab") as writer:
        writer.write(b"c\n")
    path.write_bytes(b"d\n")
    found += read_all(log)

    assert found == [b"a", b"b", b"c", b"d"]
    log.close()


# --- following, as a process ---


@contextmanager
def process(*words: object, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", COMMAND, "logs", *map(str, words)]
    env: Mapping[str, Any] = {"PYTHONPATH": PATH}
    with subprocess.Popen(command, env=env, stdout=stdout, stderr=subprocess.PIPE, bufsize=0) as started:
        try:
            yield started
        finally:
            started.kill()


def line(started: subprocess.Popen[bytes]) -> bytes:
    assert started.stdout is not None
    return started.stdout.readline()


def end(started: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = started.communicate(timeout=60)
    return started.returncode, out or b"", err


def test_following_shows_what_comes_goes_on_with_the_next_attempt_and_ends_with_the_launch(
    run: RunFolder,
) -> None:
    write(run, 0, 0, "old\n")
    with process(run.path, "-f") as following:
        assert line(following) == b"[rank 0] old\n"
        write(run, 0, 1, "half")
        write(run, 0, 0, "new\n")
        assert line(following) == b"[rank 0] new\n"
        write(run, 0, 1, " and half\nend of 1")
        assert line(following) == b"[rank 1] half and half\n"
        write(run, 1, 0, "again\n")
        assert [line(following), line(following)] == [b"[rank 1] end of 1\n", b"[rank 0] again\n"]
        write(run, 1, 0, "last words")
        run.close(3)

        assert end(following) == (
            0,
            b"[rank 0] last words\n",
            b"distrib: attempt 1\ndistrib: the launch has ended with exit code 3\n",
        )


def test_following_one_attempt_from_its_last_line_ends_with_it(run: RunFolder) -> None:
    write(run, 0, 1, "older\nold\n")
    with process(run.path, "-f", "--attempt", 0, "--rank", 1, "-n", 1) as following:
        assert line(following) == b"old\n"
        write(run, 0, 1, "a\nb\n")
        assert [line(following), line(following)] == [b"a\n", b"b\n"]
        write(run, 1, 1, "c\n")

        assert end(following) == (0, b"", b"distrib: attempt 0 has ended\n")


def test_following_ends_when_the_launcher_was_killed(tmp_path: Path) -> None:
    with launcher(tmp_path) as (run, launching):
        write(run, 0, 0, "a\n")
        with process(tmp_path, "--follow") as following:
            assert line(following) == b"a\n"
            launching.kill()
            launching.wait()

            assert end(following) == (0, b"", b"distrib: the launcher is gone\n")


def test_following_a_launch_that_has_ended_shows_it_and_ends(run: RunFolder) -> None:
    write(run, 0, 0, "a\nb\n")
    run.close(0)
    with process(run.path, "-f", "-n", 1) as following:
        assert end(following)[:2] == (0, b"[rank 0] b\n")


def test_control_c_ends_quietly(run: RunFolder) -> None:
    write(run, 0, 0, "a\n")
    with process(run.path, "-f", "--rank", 0) as following:
        assert line(following) == b"a\n"
        following.send_signal(signal.SIGINT)

        assert end(following) == (130, b"", b"")


@pytest.mark.parametrize("words", [["-f"], []])
def test_a_reader_that_goes_ends_it_quietly(run: RunFolder, words: list[str]) -> None:
    write(run, 0, 0, "a\n" * 1_000_000)  # more than a pipe holds
    with process(run.path, *words) as printing:
        assert line(printing) == b"[rank 0] a\n"
        assert printing.stdout is not None
        printing.stdout.close()
        printing.stdout = None

        assert end(printing) == (141, b"", b"")


def test_a_reader_that_goes_ends_following_although_nothing_comes(run: RunFolder) -> None:
    write(run, 0, 0, "a\n")
    with process(run.path, "-f") as following:
        assert line(following) == b"[rank 0] a\n"
        assert following.stdout is not None
        following.stdout.close()
        following.stdout = None

        assert end(following) == (141, b"", b"")


def test_output_that_a_full_disk_refuses_is_an_error(run: RunFolder) -> None:
    write(run, 0, 0, "a\n")
    full = os.open("/dev/full", os.O_WRONLY)
    with process(run.path, stdout=full) as printing:
        os.close(full)
        code, _, err = end(printing)

    assert (code, err.startswith(b"error[D0311] stdout: the output cannot be written: No space left")) == (
        2,
        True,
    )


def test_where_the_end_cannot_be_told_following_says_so_first(run: RunFolder) -> None:
    changed(run, machine="another")
    write(run, 0, 0, "a\n")
    with process(run.path, "-f", "--rank", 0) as following:
        assert line(following) == b"a\n"
        run.close(0)
        code, _, err = end(following)

    assert code == 0
    assert err.startswith(b"distrib: it cannot be told from here whether this launch still runs; Ctrl-C")
