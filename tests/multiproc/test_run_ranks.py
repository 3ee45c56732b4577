"""`run_ranks` itself, over real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distrib.testing import RanksFailed, ranks, run_ranks


def own_rank() -> int:
    return int(os.environ["RANK"])


def sum_over_ranks(value: float) -> float:
    dist.init_process_group("gloo")
    total = torch.tensor(value * (own_rank() + 1))
    dist.all_reduce(total)
    return float(total)


def raise_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if own_rank() == 1:
        raise ValueError("seven is not a prime minister")
    dist.all_reduce(torch.ones(1))


def kill_rank_one() -> None:
    if own_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def hang() -> None:
    time.sleep(60)


class PickledOnce:
    """Travels to one rank, but not to a second one."""

    def __init__(self):
        self.travelled = False

    def __reduce__(self):
        if self.travelled:
            raise ValueError("enough")
        self.travelled = True
        return str, ()


def hang_with(_: object) -> None:
    hang()


def test_a_rank_that_cannot_be_started_leaves_none_of_those_before_it():
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="enough"):
        run_ranks(hang_with, 2, PickledOnce())
    assert multiprocessing.active_children() == before


def test_results_come_back_in_rank_order():
    assert run_ranks(own_rank, 3) == [0, 1, 2]


def test_the_ranks_can_talk():
    assert run_ranks(sum_over_ranks, 2, 2.0) == [6.0, 6.0]


def test_the_root_cause_is_shown_once_and_the_follower_is_folded():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(raise_on_rank_one, 2)
    text = str(failed.value)
    assert text.count("Traceback") == 1
    assert "seven is not a prime minister" in text
    assert "rank 1 of 2 failed" in text


def test_a_killed_rank_is_named_with_its_signal():
    started = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 failed:\nkilled by SIGKILL"):
        run_ranks(kill_rank_one, 2)
    assert time.monotonic() - started < 25


def test_a_rank_that_hangs_shows_its_stack():
    with pytest.raises(RanksFailed, match=r"(?s)no result after 2 s.*in hang"):
        run_ranks(hang, 1, timeout_s=2)


def test_a_nested_function_is_refused():
    with pytest.raises(ValueError, match="module level"):
        run_ranks(lambda: None, 1)


@pytest.mark.parametrize("word", ["a", "b"])
@ranks(1, 2)
def test_the_decorator_hands_fixtures_and_parameters_to_the_ranks(tmp_path: Path, word: str):
    (tmp_path / f"{word}{own_rank()}").touch()
    assert word in "ab"
    assert tmp_path.is_dir()


def say_pids_and_wait(folder: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    found = Path(folder) / f"pids-{own_rank()}"
    found.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
    found.with_suffix(".new").rename(found)
    child.wait()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def waited_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_killed_caller_leaves_nothing_behind(tmp_path: Path):
    code = f"from tests.multiproc.test_run_ranks import *; run_ranks(say_pids_and_wait, 2, {str(tmp_path)!r})"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        assert waited_for(lambda: len(list(tmp_path.glob("pids-?"))) == 2)
    finally:
        caller.kill()
        caller.wait()
    pids = [int(pid) for path in tmp_path.glob("pids-?") for pid in path.read_text().split()]
    assert len(pids) == 4
    assert waited_for(lambda: all(map(has_ended, pids)))
