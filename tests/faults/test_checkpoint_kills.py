"""Saves that are cut off: by SIGKILL at random moments, by SIGTERM, by the end of the script, by another job."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distrib.checkpoint import latest, retain, save, verify
from distrib.checkpoint.staging import Arena
from distrib.checkpoint.storage import LockedError, Storage
from distrib.errors import CheckpointError
from distrib.testing import RanksFailed, run_ranks
from tests.faults.launching import ended, launch, launching, pids, script
from tests.faults.saving import Job, before_each_operation, stored_value
from tests.faults.test_checkpoint_faults import ALONE, ROOT, NthKills, contents, stored_value as value_in

SAVES = 5  # of which the first is complete before anything is killed


def newest(folder: Path) -> Path:
    found = latest(folder / "checkpoints")
    assert found is not None
    return found


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# SIGKILL


def saves_in_the_background(folder: Path, who: int | None, nth: int) -> int:
    """Save each step with one checkpoint kept; rank `who`, or all at once for None, die at the nth file operation.

    Returns how many operations this rank saw.
    """
    job = Job(folder)
    job.advance()
    job.accelerator.save_state()
    victims = job.accelerator.gather_object(os.getpid())
    counted, lock = [0], threading.Lock()

    def count(_: str) -> None:
        with lock:
            counted[0] += 1
            if counted[0] == nth and job.accelerator.process_index == (who or 0):
                if who is None:
                    os.kill(victims[1], signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    before_each_operation(count)
    for _ in range(SAVES - 1):
        job.advance()
        job.accelerator.save_state(blocking=False)  # waits for the save of the step before
        if job.accelerator.is_main_process:
            (folder / f"{job.step - 1}.confirmed").touch()
    job.accelerator.end_training()
    return counted[0]


def resumes(folder: Path) -> tuple[int, int]:
    """Load the newest, save one more; return both steps."""
    job = Job(folder)
    job.accelerator.load_state()
    before = job.step
    assert {job.counter.value, *job.accelerator.get_state_dict(job.model)["0.bias"].tolist()} == {before}
    job.advance()
    job.accelerator.save_state()
    return before, job.step


@pytest.fixture(scope="module")
def num_operations(tmp_path_factory) -> list[int]:
    """Of each rank, in a run that nobody kills."""
    return run_ranks(saves_in_the_background, 2, tmp_path_factory.mktemp("clean"), 0, 0)


MOMENTS = [
    pytest.param(who, seed, id=f"{who}-{seed}", marks=() if seed < 1 else pytest.mark.slow)
    for who in ("rank0", "rank1", "all")
    for seed in range(20)
]


@pytest.mark.parametrize(("who", "seed"), MOMENTS)
def test_a_kill_at_a_random_moment_of_background_saves_loses_nothing_that_was_confirmed(
    tmp_path, num_operations, who, seed
):
    """Pain 13 (20 random kills with limit 1), M4, F25."""
    rank = {"rank0": 0, "rank1": 1, "all": None}[who]
    nth = random.Random(f"{who}{seed}").randrange(1, num_operations[rank or 0] + 1)
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(saves_in_the_background, 2, tmp_path, rank, nth)

    step = stored_value(newest(tmp_path))
    assert newest(tmp_path).name == f"step-{step:08d}"
    confirmed = [int(path.stem) for path in tmp_path.glob("*.confirmed")]
    assert step >= max(confirmed, default=1), f"operation {nth}"
    assert run_ranks(resumes, 2, tmp_path) == [(step, step + 1)] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{step + 1:08d}"]


def rotate_in_a_child(folder: Path, nth: int, *, saves: bool) -> bool:
    """Remove all but the newest in a child that dies at its nth operation, which is one of a save if it `saves`.

    Returns whether it got to the end.
    """
    child = os.fork()
    if not child:
        try:
            storage = NthKills(nth, stuck=False)
            save(folder / f"step-{nth}", contents(nth), ALONE, storage=storage if saves else Storage())
            retain(folder, 1, storage=storage)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def kill_each_operation(folder: Path, *, saves: bool) -> None:
    """Run by a process of its own, since it forks."""
    save(folder / "step-0", contents(0), ALONE)
    nth, before, done = 0, 0, False
    while not done:
        nth += 1
        done = rotate_in_a_child(folder, nth, saves=saves)
        found = latest(folder)
        assert found is not None, f"operation {nth}: no checkpoint is left"
        assert value_in(found) in ((before, nth) if saves else (nth,))
        assert found.name == f"step-{value_in(found)}"
        before = value_in(found)
        for path in folder.glob("step-*"):
            verify(path)
    assert before == nth
    assert [path.name for path in folder.iterdir()] == [f"step-{nth}"]
    print(f"{nth - 1} kills survived")


@pytest.mark.parametrize(
    "saves", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rotation", "save-and-rotation"]
)
def test_a_kill_at_any_operation_with_keep_last_1_leaves_a_checkpoint_and_shows_no_half_one(tmp_path, saves):
    """M4, F29: the old one goes only when the new one is complete."""
    call = f"kill_each_operation(Path(sys.argv[1]), saves={saves})"
    text = f"import sys; from pathlib import Path; from tests.faults.test_checkpoint_kills import *; {call}"
    found = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[0]) > 8


# The writer thread


def loses_its_writer_thread(folder: Path, kind: type[BaseException], who: int) -> str:
    job = Job(folder)
    job.advance()
    job.accelerator.save_state()
    job.advance()

    def die(name: str) -> None:
        if name == "write" and threading.current_thread() is not threading.main_thread():
            raise kind("injected")

    if job.accelerator.process_index == who:
        before_each_operation(die)
    job.accelerator.save_state(blocking=False)
    with pytest.raises(CheckpointError) as caught:
        job.accelerator.save_state(folder / "other")
    return str(caught.value)


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("kind", [MemoryError, pytest.param(RuntimeError, marks=pytest.mark.slow)])
def test_a_writer_thread_that_dies_is_an_error_of_all_ranks_at_the_next_call(tmp_path, kind, who):
    for told in run_ranks(loses_its_writer_thread, 2, tmp_path, kind, who, timeout_s=30):
        assert f"rank {who}" in told
    assert stored_value(newest(tmp_path)) == 1
    assert hidden(tmp_path / "checkpoints") == []


def copies_late(folder: Path) -> bool:
    """Return whether rank 0 was back from save_state before rank 1 had copied its share."""
    job = Job(folder)
    job.advance()
    copies = Arena.copies
    early = []

    def late(arena, tensors):
        tick, start = threading.Event(), time.monotonic()
        while time.monotonic() < start + 1 and not (folder / "returned").exists():
            tick.wait(0.01)
        early.append((folder / "returned").exists())
        return copies(arena, tensors)

    if job.accelerator.process_index == 1:
        Arena.copies = late
    handle = job.accelerator.save_state(blocking=False)
    if job.accelerator.is_main_process:
        (folder / "returned").touch()
    handle.wait()
    return any(early)


def test_a_background_save_returns_when_every_rank_has_copied_its_share(tmp_path):
    """docs/checkpoints.md, 'In the background'; else a rank that fails ends others whose copy is not made: all is lost."""
    assert run_ranks(copies_late, 2, tmp_path) == [False, False]


def has_no_memory_for_its_copy(folder: Path) -> str:
    job = Job(folder)
    job.advance()
    job.accelerator.save_state()
    job.advance()

    def refuse(*_):
        raise MemoryError("injected")

    if job.accelerator.process_index == 1:
        Arena.copies = refuse
    try:
        job.accelerator.save_state(blocking=False).wait()
    except (CheckpointError, MemoryError) as error:
        return f"{type(error).__name__} {error}"
    return "saved"


def test_a_rank_without_memory_for_its_copy_is_an_error_of_all_ranks(tmp_path):
    for told in run_ranks(has_no_memory_for_its_copy, 2, tmp_path, timeout_s=20):
        assert "CheckpointError" in told
        assert "rank 1" in told
    assert stored_value(newest(tmp_path)) == 1


# SIGTERM and the end of the script

BEGINS = """
    import sys, threading
    from pathlib import Path
    from tests.faults.saving import Job, before_each_operation, hold_writes, slow_disk

    folder = Path(sys.argv[1])
    job = Job(folder, keep_last=5)
    job.advance()
    job.accelerator.save_state()
    job.advance()
"""


def interrupted(folder: Path, text: str, *words: object):
    """Launch a script on two ranks, and send SIGTERM when both have reached their first write of the second save."""
    program = script(folder, BEGINS + text)
    with launching(*words, "-n", 2, program, folder, cwd=folder) as process:
        pids(folder, 2)
        process.send_signal(signal.SIGTERM)
        (folder / "go").touch()
        return ended(process)


@pytest.mark.parametrize(
    "delay", [pytest.param("", marks=pytest.mark.slow), "slow_disk(0.03)"], ids=["fast", "slow"]
)
def test_sigterm_in_a_blocking_save_exits_143_with_the_save_finished_or_rolled_back(tmp_path, delay):
    """F28."""
    text = f"""
    {delay}
    hold_writes(folder, folder / "go")
    job.accelerator.save_state()
    threading.Event().wait(60)
"""
    done = interrupted(tmp_path, text)
    assert done.code == 143, done.err
    assert done.seconds < 10
    assert newest(tmp_path).name == f"step-{stored_value(newest(tmp_path)):08d}"
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} <= {
        "step-00000001",
        "step-00000002",
    }
    assert stored_value(tmp_path / "checkpoints/step-00000001") == 1


def test_sigterm_in_a_background_save_exits_143_with_the_checkpoint_complete(tmp_path):
    """F28, pain 17: the preempted run goes on from the step that it saved last."""
    text = """
    slow_disk(0.05)
    hold_writes(folder, folder / "go")
    job.accelerator.save_state(blocking=False)
    threading.Event().wait(60)
"""
    done = interrupted(tmp_path, text)
    assert done.code == 143, done.err
    assert done.seconds < 10
    assert stored_value(newest(tmp_path)) == 2
    assert hidden(tmp_path / "checkpoints") == []


@pytest.mark.slow
def test_a_disk_that_hangs_longer_than_the_grace_time_leaves_the_older_checkpoint(tmp_path):
    """F28: the save is abandoned, and the job still ends in time."""
    text = """
    hold_writes(folder, folder / "never")
    job.accelerator.save_state(blocking=False)
    threading.Event().wait(60)
"""
    done = interrupted(tmp_path, text, "--grace", 1)
    assert done.code == 143, done.err
    assert done.seconds < 8
    assert stored_value(newest(tmp_path)) == 1
    assert run_ranks(resumes, 1, tmp_path) == [(1, 2)]
    assert hidden(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("last", "code"),
    [
        pytest.param("", 0, marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.slow),
        pytest.param("raise RuntimeError('in the script')", 1, marks=pytest.mark.slow),
        pytest.param(
            "if job.accelerator.process_index == 1: raise RuntimeError('in the script')",
            1,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["end", "exit-3", "error", "error-of-one"],
)
def test_an_exit_right_after_a_background_save_to_a_slow_disk_waits_for_the_commit(tmp_path, last, code):
    """F30: 100 ms per write."""
    text = f"""
    slow_disk(0.1)
    job.accelerator.save_state(blocking=False)
    job.accelerator.wait_for_everyone()  # else a rank that fails may end the others before they have copied theirs
    {last}
"""
    done = launch("-n", 2, script(tmp_path, BEGINS + text), tmp_path, cwd=tmp_path)
    assert done.code == code, done.err
    assert stored_value(newest(tmp_path)) == 2, done.err
    assert hidden(tmp_path / "checkpoints") == []


# Two jobs

HOLDS = """
    import sys
    from pathlib import Path
    from tests.faults.saving import Job, hold_writes

    folder, target, value, holds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "holds"
    job = Job(folder)
    job.advance(value)
    if holds:
        hold_writes(folder, folder / "go")
    job.accelerator.save_state(target)
"""


def main_rank(folder: Path) -> int:
    """Process id of the rank 0 that holds the lock."""
    (lock,) = folder.glob(".c.lock")
    return int(lock.read_text().split()[-1])


def test_of_two_jobs_that_save_to_one_place_the_second_is_told_the_owner_and_the_first_is_complete(tmp_path):
    program, target = script(tmp_path, HOLDS), tmp_path / "c"
    with launching("-n", 2, program, tmp_path, target, 7, "holds", cwd=tmp_path) as first:
        held = {process.pid for process in pids(tmp_path, 2)}
        second = launch("-n", 2, program, tmp_path, target, 8, "goes", cwd=tmp_path)
        owner = main_rank(tmp_path)
        (tmp_path / "go").touch()
        done = ended(first)
    assert done.code == 0, done.err
    assert owner in held
    assert second.code == 1
    assert "D0712" in second.err
    assert f"process {owner} on host {socket.gethostname()}" in second.err
    assert stored_value(target) == 7
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_job_that_saves_beside_a_save_of_another_job_removes_nothing_of_it(tmp_path):
    """F25: only what dead jobs have left is removed."""
    program = script(tmp_path, HOLDS)
    with launching("-n", 2, program, tmp_path, tmp_path / "a", 7, "holds", cwd=tmp_path) as first:
        pids(tmp_path, 2)
        second = launch("-n", 2, program, tmp_path, tmp_path / "b", 8, "goes", cwd=tmp_path)
        (tmp_path / "go").touch()
        done = ended(first)
    assert (done.code, second.code) == (0, 0), done.err + second.err
    assert (stored_value(tmp_path / "a"), stored_value(tmp_path / "b")) == (7, 8)
    assert hidden(tmp_path) == []


def test_the_owner_is_named_even_if_it_has_taken_the_lock_this_very_moment(tmp_path, monkeypatch):
    told, truncate = [], os.ftruncate

    def ask() -> None:
        with pytest.raises(LockedError) as caught:
            Storage().lock(tmp_path / ".c.lock")
        told.append(str(caught.value))

    def truncate_while_another_asks(file: int, size: int) -> None:
        monkeypatch.setattr(os, "ftruncate", truncate)
        truncate(file, size)
        thread.start()
        thread.join(0.3)  # it may well wait for the owner's name, but not for ever

    thread = threading.Thread(target=ask)
    monkeypatch.setattr(os, "ftruncate", truncate_while_another_asks)
    lock = Storage().lock(tmp_path / ".c.lock")
    thread.join(10)
    Storage().close(lock)
    assert f"process {os.getpid()} on host {socket.gethostname()}" in told[0]


RACES = """
    import sys
    from pathlib import Path
    from distrib import CheckpointError
    from tests.faults.saving import Job

    folder, value, saves = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = Job(folder)
    tally = {"saved": 0, "refused": 0}
    for _ in range(saves):
        job.advance(value)
        try:
            job.accelerator.save_state(folder / "c", durable=False)
            tally["saved"] += 1
        except CheckpointError as error:
            assert error.code == "D0712", error
            tally["refused"] += 1
    job.accelerator.print(tally["saved"], tally["refused"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("saves", [40, 600])
def test_two_jobs_that_race_for_one_place_mix_nothing(tmp_path, saves):
    program = script(tmp_path, RACES)
    with (
        launching("-n", 2, program, tmp_path, 7, saves, cwd=tmp_path) as a,
        launching("-n", 2, program, tmp_path, 8, saves, cwd=tmp_path) as b,
    ):
        outcomes = [ended(a), ended(b)]
    for done in outcomes:
        assert done.code == 0, done.err
        saved, refused = map(int, done.out.split()[-2:])
        assert saved > 0
        assert saved + refused == saves
    assert stored_value(tmp_path / "c") in (7, 8)
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_of_two_jobs_that_save_to_one_url_the_second_is_told_the_owner(tmp_path):
    """The owner of a lock in a store is watched for as long as it takes to renew it, about 10 s."""
    pytest.importorskip("fsspec", reason="needs fsspec: pip install 'distrib[remote]'")
    text = HOLDS.replace("hold_writes", "hold_uploads")
    program, target = script(tmp_path, text), f"local://{tmp_path}/store/c"
    with launching("-n", 2, program, tmp_path, target, 7, "holds", cwd=tmp_path) as first:
        pids(tmp_path, 1)
        second = launch("-n", 2, program, tmp_path, target, 8, "goes", cwd=tmp_path)
        (tmp_path / "go").touch()
        done = ended(first)
    assert done.code == 0, done.err
    assert second.code == 1
    assert "D0712" in second.err
    assert socket.gethostname() in second.err
    assert stored_value(tmp_path / "store/c") == 7
