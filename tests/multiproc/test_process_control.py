"""Who does what, when and with which part; and the facade's calls on values, as far as one process cannot show them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from torch import nn
from torch._C._distributed_c10d import HashStore

from distrib import Accelerator, RunConfig, get_logger
from distrib.collectives import Collectives, connected_ranks, turns
from distrib.collectives.split import split
from distrib.collectives.turns import Turns
from distrib.errors import CollectiveError, ConfigError, DataError, StrategyError
from distrib.testing import RanksFailed, ranks, run_ranks
from tests.multiproc.counting import operations


def line_here() -> int:
    return sys._getframe(1).f_lineno


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def write(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


# The main process first


@ranks(3)
def test_the_main_process_is_done_before_the_others_begin(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    for turn in range(5):
        with accelerator.main_process_first():
            done = lines_of(tmp_path / f"{turn}")
            write(tmp_path / f"{turn}", f"rank {accelerator.process_index}")
        assert ("rank 0" in done) == (not accelerator.is_main_process)


def work_longer_than_a_collective_may_wait() -> float:
    accelerator = Accelerator(RunConfig(device="cpu", watch={"stall_timeout_s": 3}))
    started = time.monotonic()
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            threading.Event().wait(8)  # the work; a collective that waited for it would end after 3 s
    waited = time.monotonic() - started
    assert accelerator.gather(torch.ones(1)).tolist() == [1, 1]
    return waited


def test_the_first_process_may_work_longer_than_a_collective_may_wait():
    assert min(run_ranks(work_longer_than_a_collective_may_wait, 2)) >= 8


def fail_in_the_first_body() -> tuple[str, str, float]:
    accelerator = Accelerator(cpu=True)
    error, started = None, time.monotonic()
    try:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                raise ValueError("no such data set: 'imagenot'")
    except (ValueError, CollectiveError) as found:
        error = found
    seconds = time.monotonic() - started
    assert accelerator.gather(torch.ones(1)).tolist() == [1, 1]  # who has dealt with the error goes on
    return type(error).__name__, str(error), seconds


def test_what_the_first_body_raises_reaches_the_others_at_once():
    (first, own, _), (other, text, seconds) = run_ranks(fail_in_the_first_body, 2)
    assert (first, own) == ("ValueError", "no such data set: 'imagenot'")
    assert other == "CollectiveError"
    assert "rank 0 on " in text
    assert "ValueError: no such data set: 'imagenot'" in text
    assert f"{__file__}:" in text
    assert seconds < 5


def fail_in_the_first_body_for_good() -> None:
    accelerator = Accelerator(cpu=True)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            raise ValueError("the root cause")


def test_the_first_bodys_own_error_is_the_root_cause_and_the_others_only_follow():
    with pytest.raises(RanksFailed, match=r"rank 0 of 3 failed:\n(.*\n)*.*ValueError: the root cause"):
        run_ranks(fail_in_the_first_body_for_good, 3)


@ranks(2)
def test_blocks_may_be_nested(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    mine = f"rank {accelerator.process_index}"
    with accelerator.main_process_first():
        write(tmp_path / "log", f"{mine} outer")
        with accelerator.local_main_process_first():
            write(tmp_path / "log", f"{mine} inner")
        with accelerator.main_process_first():
            write(tmp_path / "log", f"{mine} again")
    accelerator.wait_for_everyone()
    assert lines_of(tmp_path / "log") == [
        f"rank {rank} {part}" for rank in range(2) for part in ("outer", "inner", "again")
    ]


@ranks(2)
def test_a_block_may_be_a_decorator_and_each_call_takes_turns(tmp_path: Path):
    accelerator = Accelerator(cpu=True)

    @accelerator.main_process_first()
    def prepare(name: str) -> int:
        write(tmp_path / name, f"rank {accelerator.process_index}")
        return len(lines_of(tmp_path / name))

    places = [prepare("one"), prepare("two")]
    assert (places == [1, 1]) == accelerator.is_main_process
    accelerator.wait_for_everyone()
    assert lines_of(tmp_path / "two") == ["rank 0", "rank 1"]


@ranks(2)
def test_several_accelerators_take_turns_in_one_group(tmp_path: Path):
    accelerators = [Accelerator(cpu=True) for _ in range(3)]
    for turn, accelerator in enumerate(accelerators):
        with accelerator.main_process_first():
            done = lines_of(tmp_path / f"{turn}")
            write(tmp_path / f"{turn}", "done")
        assert bool(done) == (not accelerator.is_main_process)


@ranks(2)
def test_a_group_that_the_script_has_made_takes_turns_too(tmp_path: Path):
    dist.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    with accelerator.main_process_first():
        done = lines_of(tmp_path / "log")
        write(tmp_path / "log", "done")
    assert bool(done) == (not accelerator.is_main_process)


@ranks(4)
def test_each_nodes_first_process_goes_first_on_its_node(tmp_path: Path):
    rank = int(os.environ["RANK"])
    node, place = divmod(rank, 2)
    os.environ.update(LOCAL_RANK=str(place), LOCAL_WORLD_SIZE="2", NODE_RANK=str(node), GROUP_RANK=str(node))
    accelerator = Accelerator(cpu=True)
    assert accelerator.topology.num_nodes == 2
    with accelerator.local_main_process_first():
        done = lines_of(tmp_path / f"node-{node}")
        write(tmp_path / f"node-{node}", "done")
    assert bool(done) == (place == 1)


@ranks(2)
def test_a_collective_in_the_first_body_is_an_error_instead_of_a_hang():
    accelerator = Accelerator(cpu=True)
    block = line_here() + 1
    with pytest.raises(CollectiveError) as refused, accelerator.main_process_first():
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()
    assert refused.value.code == ("D0406" if accelerator.is_main_process else "D0402")
    call = f"wait_for_everyone at {__file__}:{block + 2}"
    assert f"{call} inside the block at {__file__}:{block}" in str(refused.value)


def gather_in_the_first_body_of_a_mesh(folder: Path) -> tuple[str, str]:
    accelerator = Accelerator(
        RunConfig(
            strategy="fsdp", device="cpu", mesh={"shard": 2, "tensor": 2}, watch={"stall_timeout_s": 20}
        )
    )
    with pytest.raises(CollectiveError) as refused, accelerator.main_process_first():
        if accelerator.is_main_process:
            accelerator.gather(torch.ones(1))
    return refused.value.code, str(refused.value)


def test_a_collective_of_a_part_of_the_ranks_in_the_first_body_is_an_error_too(tmp_path: Path):
    (main, text), *others = run_ranks(gather_in_the_first_body_of_a_mesh, 4, tmp_path, timeout_s=60)
    assert main == "D0406"
    assert f"gather inside the block at {__file__}:" in text
    assert {code for code, _ in others} == {"D0402"}
    assert all("D0406" in text for _, text in others)


UNCHECKED: dict[str, Callable[[Collectives], Any]] = {
    "all_reduce": lambda ours: ours.all_reduce_(torch.ones(1)),
    "exchange": lambda ours: ours.exchange([1]),
    "scatter": lambda ours: ours.scatter_(torch.empty(1), [torch.ones(1)] * 2),
    "all_gather": lambda ours: ours.all_gather(torch.ones(1)),
    "all_to_all": lambda ours: ours.all_to_all(torch.ones(2)),
}


@ranks(2)
def test_what_is_not_compared_is_refused_in_the_first_body_as_well():
    accelerator = Accelerator(cpu=True)
    for name, call in UNCHECKED.items():
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                with pytest.raises(CollectiveError, match=rf"D0406.*{name} inside the block"):
                    call(accelerator._runtime.collectives)


@ranks(2)
def test_another_thread_of_every_rank_may_talk_while_one_goes_first():
    accelerator = Accelerator(cpu=True)
    beside = accelerator._runtime.collectives.beside()
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(beside.exchange([accelerator.process_index])))
    if not accelerator.is_main_process:
        thread.start()
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            thread.start()
            thread.join()
    thread.join()
    assert found == [[[0], [1]]]


def leave_right_after_the_block(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    if not accelerator.is_main_process:
        while not (
            folder / "left"
        ).exists():  # come only when the other, which serves the store, is about to end
            time.sleep(0.01)
    with accelerator.main_process_first():
        write(folder / "log", f"rank {accelerator.process_index}")
    (folder / "left").touch()
    accelerator.end_training()


def test_the_first_process_stays_until_the_others_know_that_it_is_done(tmp_path: Path):
    run_ranks(leave_right_after_the_block, 2, tmp_path)
    assert lines_of(tmp_path / "log") == ["rank 0", "rank 1"]


def test_a_long_wait_is_told_with_who_is_waited_for_and_since_when():
    store, told = HashStore(), []
    go_on = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        go_on.set()

    follower = Turns(store, 1, tell_every_s=0.05, tell=tell)
    waiting = threading.Thread(target=follower.follow, args=("main", "train.py:7"), kwargs={"speaks": True})
    waiting.start()
    assert go_on.wait(30)
    assert told[0].startswith(
        "rank 1 has waited 0 s at train.py:7 for the first rank of 'main', which has not come"
    )
    with Turns(store, 0).go_first("main", "train.py:7", followers=1):
        for _ in range(2):  # a line that was being written when the first one came, then one that knows of it
            go_on.clear()
            assert go_on.wait(30)
    waiting.join(30)
    assert not waiting.is_alive()
    assert "for rank 0 on " in told[-1]
    assert "(there since " in told[-1]
    assert ", at train.py:7) to go first" in told[-1]


def test_what_all_have_seen_is_forgotten_here_and_in_the_store():
    store = HashStore()
    first, follower = Turns(store, 0), Turns(store, 1)
    kept = []
    for _ in range(5):
        with first.go_first("main", "train.py:7", followers=1):
            pass
        follower.follow("main", "train.py:7", speaks=False)
        kept.append((len(first._left), store.num_keys()))
    assert kept == [kept[0]] * 5
    first.close()


def test_what_a_follower_has_not_seen_yet_is_kept_for_it():
    store = HashStore()
    first, follower = Turns(store, 0), Turns(store, 1)
    for _ in range(3):
        with first.go_first("main", "train.py:7", followers=1):
            pass
    for _ in range(3):
        follower.follow("main", "train.py:7", speaks=False)
    first.close()
    assert first._left == {}


def test_at_the_end_all_that_is_not_seen_is_waited_for_together(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0, time=time.time, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(turns, "time", clock)
    first = Turns(HashStore(), 0)
    for _ in range(3):
        with first.go_first("main", "train.py:7", followers=1):
            pass
    first.close()
    assert 30 <= clock.now < 31


def test_ranks_that_do_not_speak_wait_in_silence():
    store, told = HashStore(), []
    follower = Turns(store, 2, tell_every_s=0, tell=told.append)
    waiting = threading.Thread(target=follower.follow, args=("main", "train.py:7"), kwargs={"speaks": False})
    waiting.start()
    with Turns(store, 0).go_first("main", "train.py:7", followers=1):
        pass
    waiting.join(30)
    assert not waiting.is_alive()
    assert told == []


# Functions and parts for some ranks


@ranks(3)
def test_decorated_functions_run_where_they_say():
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    found = [
        accelerator.on_main_process(lambda: "main")(),
        accelerator.on_local_main_process(lambda: "local main")(),
        accelerator.on_process(lambda: "one", process_index=1)(),
        accelerator.on_process(process_index=1)(lambda: "one again")(),
        accelerator.on_last_process(lambda: "last")(),
    ]
    expected = [
        ["main", "local main", None, None, None],
        [None, None, "one", "one again", None],
        [None] * 4 + ["last"],
    ]
    assert found == expected[rank]


@ranks(2)
def test_only_the_main_process_prints(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    with (tmp_path / f"{accelerator.process_index}").open("w") as file:
        accelerator.print("loss", 0.5, sep="=", file=file)
    assert lines_of(tmp_path / f"{accelerator.process_index}") == (
        ["loss=0.5"] if accelerator.is_main_process else []
    )


@given(n=st.integers(0, 40), world_size=st.integers(1, 9))
def test_the_parts_are_contiguous_in_order_and_of_sizes_that_differ_by_one_larger_first(
    n: int, world_size: int
):
    items = list(range(n))
    parts = [split(items, rank, world_size) for rank in range(world_size)]
    assert [x for part in parts for x in part] == items
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(n=st.integers(1, 40), world_size=st.integers(1, 9))
def test_padding_gives_all_ranks_the_size_of_the_first_by_repeating_the_last_item(n: int, world_size: int):
    plain = [split(list(range(n)), rank, world_size) for rank in range(world_size)]
    for rank, part in enumerate(plain):
        padded = split(list(range(n)), rank, world_size, padded=True)
        assert padded == part + [n - 1] * (len(plain[0]) - len(part))


def as_list(x: Any) -> Any:
    return {key: as_list(value) for key, value in x.items()} if isinstance(x, dict) else list(map(int, x))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [list, tuple, range, np.array, torch.tensor], ids=lambda x: x.__name__)
def test_every_kind_of_collection_is_cut_alike_and_keeps_its_kind(make: Any, padded: bool):
    source = range(4) if make is range else make([0, 1, 2, 3])
    parts = [split({"x": source, "more": {"y": source}}, rank, 3, padded=padded) for rank in range(3)]
    expected = [[0, 1], [2, 3], [3, 3]] if padded else [[0, 1], [2], [3]]
    assert [as_list(part) for part in parts] == [{"x": each, "more": {"y": each}} for each in expected]
    kinds = {type(part["x"]) for part in parts}
    assert kinds <= ({range, list} if make is range else {type(source)})


def test_rows_of_a_tensor_and_of_an_array_are_cut():
    rows = torch.arange(10).reshape(5, 2)
    assert split(rows, 1, 2, padded=True).tolist() == [[6, 7], [8, 9], [8, 9]]
    assert split(rows.numpy(), 1, 2, padded=True).tolist() == [[6, 7], [8, 9], [8, 9]]


@pytest.mark.parametrize(
    "inputs", ["text", 3, None, torch.tensor(1.0), {1, 2}, iter([1]), {"a": "text"}], ids=repr
)
def test_what_has_no_items_to_cut_is_refused(inputs: Any):
    with pytest.raises(DataError, match=r"D0511.*expected a list, tuple, range, array or tensor"):
        split(inputs, 0, 1)


def test_values_of_different_lengths_are_refused_with_their_lengths():
    with pytest.raises(DataError, match=r"D0510.*'x': 3, 'y': 2"):
        split({"x": [1, 2, 3], "y": [1, 2]}, 0, 2)


@ranks(1, 2, 3)
def test_a_collection_is_split_between_the_processes():
    accelerator = Accelerator(cpu=True)
    prompts = {"text": ["a", "b", "c", "d", "e"], "id": torch.arange(5)}
    with accelerator.split_between_processes(prompts) as mine:
        ids = accelerator.gather(mine["id"]).tolist()
        texts = [text for part in accelerator.gather_object(mine["text"]) for text in part]
    assert (ids, texts) == ([0, 1, 2, 3, 4], ["a", "b", "c", "d", "e"])
    assert len(prompts["text"]) == 5
    with accelerator.split_between_processes([1, 2, 3, 4], apply_padding=True) as mine:
        assert len(mine) == -(-4 // accelerator.num_processes)


# Triggers and waiting


@ranks(1, 2, 3)
def test_a_trigger_of_any_rank_is_seen_by_all_once():
    accelerator = Accelerator(cpu=True)
    for rank in range(accelerator.num_processes):
        assert not accelerator.check_trigger()
        if accelerator.process_index == rank:
            accelerator.set_trigger()
        assert accelerator.check_trigger()
    assert not accelerator.check_trigger()


@ranks(2)
def test_a_trigger_costs_one_operation():
    accelerator = Accelerator(cpu=True)
    assert operations(accelerator.check_trigger) == 1
    accelerator.set_trigger()
    assert operations(accelerator.check_trigger) == 1


@ranks(2)
def test_ranks_may_wait_for_everyone_at_different_lines():
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
    else:
        accelerator.wait_for_everyone()
    assert accelerator.gather(torch.ones(1)).tolist() == [1, 1]


@ranks(2)
def test_while_a_rank_waits_its_reason_and_line_can_be_read():
    accelerator = Accelerator(cpu=True)
    collectives = accelerator._runtime.collectives
    store = dist.distributed_c10d._get_default_store()
    assert collectives.in_flight is None

    def watch() -> None:
        while collectives.in_flight is None:
            pass
        store.set("seen", collectives.in_flight)

    if accelerator.is_main_process:
        seen = store.get("seen").decode()
        accelerator.wait_for_everyone()
        assert seen.startswith(f"wait_for_everyone at {__file__}:")
    else:
        watching = threading.Thread(target=watch)
        watching.start()
        accelerator.wait_for_everyone()
        watching.join()
    assert collectives.in_flight is None


def wait_for_a_rank_that_is_killed(path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    if not accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CollectiveError) as lost:
        accelerator.wait_for_everyone()
    path.write_text(f"{line_here() - 1}\n{lost.value.problem}")


def test_when_a_rank_is_missing_the_error_says_what_was_waited_for_and_where(tmp_path: Path):
    with pytest.raises(RanksFailed, match="killed by SIGKILL"):
        run_ranks(wait_for_a_rank_that_is_killed, 2, tmp_path / "error", timeout_s=40)
    line, problem = (tmp_path / "error").read_text().split("\n", 1)
    assert problem.startswith(f"wait_for_everyone at {__file__}:{line} failed: ")


# Logging in order


def logger_to(path: Path) -> Any:
    handler = logging.FileHandler(path)
    logger = get_logger(f"distrib.tests.{path.name}", "INFO")
    logger.logger.addHandler(handler)
    return logger


@ranks(3)
def test_in_order_each_rank_logs_in_its_turn(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    logger = logger_to(tmp_path / "log")
    for turn in range(4):
        logger.info(
            "turn %d rank %d", turn, accelerator.process_index, main_process_only=False, in_order=True
        )
    accelerator.wait_for_everyone()
    assert lines_of(tmp_path / "log") == [
        f"turn {turn} rank {rank}" for turn in range(4) for rank in range(3)
    ]


@ranks(2)
def test_in_order_alone_is_enough_for_all_ranks_to_log(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    logger_to(tmp_path / "log").info("rank %d", accelerator.process_index, in_order=True)
    accelerator.wait_for_everyone()
    assert lines_of(tmp_path / "log") == ["rank 0", "rank 1"]


@ranks(2)
def test_a_logger_leaves_the_end_of_the_group_to_the_accelerator(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    logger = logger_to(tmp_path / "log")
    for _ in range(3):
        logger.info("rank %d", accelerator.process_index, in_order=True)
    accelerator.end_training()
    assert not dist.is_initialized()


@ranks(2)
def test_a_logger_talks_over_the_group_that_there_is_and_makes_one_set_of_collectives_for_it(tmp_path: Path):
    logger = logger_to(tmp_path / "log")
    found = []
    place = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
    for turn in range(2):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store-{turn}", **place)
        found.append(connected_ranks())
        logger.info("rank %d", dist.get_rank(), in_order=True)
        assert connected_ranks() is found[-1]
        dist.destroy_process_group()
    assert found[0] is not found[1]
    assert sorted(lines_of(tmp_path / "log")) == ["rank 0"] * 2 + ["rank 1"] * 2


@ranks(2)
def test_what_is_below_the_level_costs_no_operation_in_order_either(tmp_path: Path):
    Accelerator(cpu=True)
    logger = logger_to(tmp_path / "log")
    assert operations(lambda: logger.debug("unseen", in_order=True)) == 0
    assert operations(lambda: logger.info("seen", in_order=True)) == 1


@ranks(2)
def test_a_rank_that_does_not_log_in_order_with_the_others_is_an_error_on_all(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    logger = logger_to(tmp_path / "log")
    with pytest.raises(CollectiveError, match=r"D0401.*barrier\(logging in order\)") as refused:
        if accelerator.is_main_process:
            logger.info("alone", in_order=True)
        else:
            accelerator.gather(torch.ones(1))
    assert str(refused.value).count(f"{__file__}:") == 2


def test_a_single_process_logs_in_order_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    logger_to(tmp_path / "log").info("alone", in_order=True)
    assert lines_of(tmp_path / "log") == ["alone"]


@ranks(2)
def test_in_order_before_the_ranks_are_connected_is_an_error(tmp_path: Path):
    with pytest.raises(CollectiveError, match=r"D0407.*not connected yet"):
        logger_to(tmp_path / "log").info("too early", in_order=True)


def test_in_order_on_the_main_process_only_is_a_contradiction(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"D0107.*in_order"):
        logger_to(tmp_path / "log").info("text", in_order=True, main_process_only=True)


# Values that would stay local


LOCAL: dict[str, Any] = {
    "a float": 3.0,
    "an int": 5,
    "a bool": True,
    "a list of numbers": [1, 2],
    "an array": np.ones(2),
    "a number of numpy": np.float32(1),
    "text": "text",
    "nothing": None,
    "an array beside a tensor": {"a": torch.ones(1), "b": np.ones(2)},
    "a number beside a tensor": [torch.ones(1), 0.5],
}


def errors_of_local_values() -> list[tuple[str, str, str]]:
    accelerator = Accelerator(cpu=True)
    calls = [accelerator.gather, accelerator.reduce, accelerator.broadcast, accelerator.pad_across_processes]
    found = []
    for name, value in LOCAL.items():
        for call in calls:
            with pytest.raises(DataError) as refused:
                call(value)
            found.append((name, refused.value.code, str(refused.value)))
    assert len(accelerator.gather(torch.ones(1))) == accelerator.num_processes
    return found


@pytest.fixture(scope="module", params=[1, 2])
def refusals(request: pytest.FixtureRequest) -> list[list[tuple[str, str, str]]]:
    return run_ranks(errors_of_local_values, request.param)


@pytest.mark.parametrize("name", LOCAL)
def test_a_value_that_is_no_tensor_is_an_error_with_the_fix(
    refusals: list[list[tuple[str, str, str]]], name: str
):
    texts = [(code, text) for of_rank in refusals for each, code, text in of_rank if each == name]
    assert len(texts) == 4 * len(refusals)
    for code, text in texts:
        assert code == "D0508"
        assert "which is no tensor" in text
        assert "fix: pass torch." in text
        assert "gather_object" in text


def test_the_value_itself_is_shown(refusals: list[list[tuple[str, str, str]]]):
    first = {name: text for name, _, text in reversed(refusals[0])}
    assert "gather was given 3.0 (float)" in first["a float"]
    assert "gather was given an array of shape (2,) (ndarray)" in first["an array beside a tensor"]


@ranks(1, 2)
def test_constants_beside_tensors_and_empty_containers_pass_through():
    accelerator = Accelerator(cpu=True)
    assert accelerator.gather({}) == {}
    found = accelerator.reduce({"x": torch.ones(1), "name": "loss", "none": None})
    assert (found["x"].item(), found["name"], found["none"]) == (accelerator.num_processes, "loss", None)


@ranks(1, 2)
def test_a_sparse_tensor_is_refused():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(DataError, match=r"(?s)D0508.*to_dense"):
        accelerator.gather(torch.eye(2).to_sparse())


@ranks(1, 2)
def test_a_rank_that_does_not_exist_is_an_error_with_the_world_size():
    accelerator = Accelerator(cpu=True)
    calls: list[Callable[[Any], Any]] = [
        lambda rank: accelerator.broadcast(torch.ones(1), from_process=rank),
        lambda rank: accelerator.broadcast_object(1, from_process=rank),
        lambda rank: accelerator.on_process(print, process_index=rank),
    ]
    for call in calls:
        for rank in (7, -1, "0", None, 1.0, True):
            with pytest.raises(
                CollectiveError, match=f"D0403.*the world size is {accelerator.num_processes}"
            ):
                call(rank)


@ranks(2)
def test_an_object_that_one_rank_cannot_pickle_is_an_error_on_all():
    accelerator = Accelerator(cpu=True)
    mine = (lambda: None) if accelerator.process_index == 1 else 1
    with pytest.raises(CollectiveError, match=r"D0404.*rank 1 cannot pickle"):
        accelerator.gather_object(mine)
    with pytest.raises(CollectiveError, match=r"D0404.*rank 1 cannot pickle"):
        accelerator.broadcast_object(mine, from_process=1)
    assert accelerator.gather_object("on") == ["on", "on"]


class OfRankOne:
    def __reduce__(self) -> Any:
        return known_to_rank_one, ()


def known_to_rank_one() -> OfRankOne:
    if os.environ["RANK"] != "1":
        raise ImportError("no module named 'mine'")
    return OfRankOne()


@ranks(2)
def test_an_object_that_cannot_be_unpickled_names_its_rank():
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        with pytest.raises(CollectiveError, match=r"D0405.*rank 1 .*no module named 'mine'"):
            accelerator.broadcast_object(None, from_process=1)
    else:
        assert isinstance(accelerator.broadcast_object(OfRankOne(), from_process=1), OfRankOne)


# Numbers


@ranks(1, 2, 3)
def test_each_dtype_has_a_result_that_is_right():
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    flags = torch.tensor([True, rank == 0, False])
    assert accelerator.reduce(flags).tolist() == [world, 1, 0]
    assert accelerator.reduce(flags).dtype is torch.int64
    assert accelerator.reduce(flags, "mean").tolist() == pytest.approx([1, 1 / world, 0])
    assert accelerator.reduce(flags, "max").tolist() == [True, True, False]
    numbers = torch.tensor([rank, 7], dtype=torch.int32)
    assert accelerator.reduce(numbers).dtype is torch.int32
    assert accelerator.reduce(numbers, "mean").tolist() == pytest.approx([(world - 1) / 2, 7])
    large = torch.tensor([60000.0], dtype=torch.float16)
    assert accelerator.reduce(large, "mean").item() == 60000  # whose sum float16 has not
    assert accelerator.reduce(torch.tensor([200], dtype=torch.uint8), "mean").item() == 200
    with pytest.raises(DataError, match=r"D0509.*max.*complex64"):
        accelerator.reduce(torch.tensor(1j), "max")


@ranks(2)
def test_values_of_several_dtypes_and_any_size_are_the_same_in_one_frame_and_in_many_operations():
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    for rows in (1, 10, 10_000):
        mine = {
            "a": torch.arange(rows, dtype=torch.float64) + rank,
            "b": (torch.arange(rows, dtype=torch.int16) + rank).reshape(rows, 1),
            "c": torch.full((rows,), 1.0 + rank, dtype=torch.bfloat16),
        }
        summed, gathered = accelerator.reduce(mine), accelerator.gather(mine)
        sent = accelerator.broadcast(mine, from_process=1)
        for name, x in mine.items():
            of_ranks = [x - rank, x - rank + 1]
            assert torch.equal(summed[name], of_ranks[0] + of_ranks[1])
            assert torch.equal(gathered[name], torch.cat(of_ranks))
            assert torch.equal(sent[name], of_ranks[1])
            assert summed[name].dtype is gathered[name].dtype is sent[name].dtype is x.dtype


@ranks(2)
def test_small_values_cost_one_operation_and_large_ones_one_more_per_dtype_that_travels():
    accelerator = Accelerator(cpu=True)
    small = [torch.ones(2) for _ in range(12)]
    large = [
        torch.ones(5000),
        torch.ones(5000).long(),
        torch.ones(5000).bfloat16(),
        torch.ones(5000).double(),
    ]
    many = [torch.ones(1 + accelerator.process_index) for _ in range(300)]
    assert operations(lambda: accelerator.gather(small)) == 1
    assert operations(lambda: accelerator.reduce(small)) == 1
    assert operations(lambda: accelerator.broadcast(small)) == 1
    assert operations(lambda: accelerator.gather_object({"a": 1})) == 1
    assert operations(lambda: accelerator.broadcast_object({"a": 1})) == 1
    assert operations(lambda: accelerator.gather(large)) == 2
    assert operations(lambda: accelerator.broadcast(large)) == 2
    assert operations(lambda: accelerator.reduce(large)) == 4  # bfloat16 travels with float32
    assert operations(lambda: accelerator.gather(many)) == 2
    assert operations(lambda: accelerator.gather_object("x" * 10_000)) == 2
    assert operations(lambda: accelerator.broadcast_object("x" * 10_000)) == 2


# Padding


@ranks(1, 2, 3)
def test_any_dim_is_padded_to_the_largest_of_all_ranks():
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = {"ids": torch.full((2, rank + 1), rank), "mask": [torch.ones(1 + rank, 3 * (world - rank)).bool()]}
    found = accelerator.pad_across_processes(mine, dim=1, pad_index=9)
    assert found["ids"].tolist() == [[rank] * (rank + 1) + [9] * (world - rank - 1)] * 2
    assert found["mask"][0].shape == (1 + rank, 3 * world)
    assert found["ids"].dtype is torch.int64
    first = accelerator.pad_across_processes(mine["ids"], dim=-1, pad_first=True)
    assert first.tolist() == [[0] * (world - rank - 1) + [rank] * (rank + 1)] * 2
    gathered = accelerator.gather(found["ids"])
    assert gathered.shape == (2 * world, world)


@ranks(2)
def test_a_whole_tree_is_padded_with_one_exchange_of_sizes():
    accelerator = Accelerator(cpu=True)
    for leaves in (8, 1000):
        tree = {str(i): torch.ones(1 + i + accelerator.process_index, 2) for i in range(leaves)}
        assert operations(lambda tree=tree: accelerator.pad_across_processes(tree)) == (
            1 if leaves == 8 else 2
        )
        assert len(accelerator.pad_across_processes(tree)["7"]) == 9


@ranks(1, 2)
def test_padding_copies_and_leaves_tensors_without_the_dim_alone():
    accelerator = Accelerator(cpu=True)
    scalar, row = torch.tensor(3.0), torch.ones(2, requires_grad=True)
    found = accelerator.pad_across_processes([scalar, row])
    assert [x.tolist() for x in found] == [3.0, [1, 1]]
    assert not found[1].requires_grad
    found[0].fill_(0)
    found[1].fill_(0)
    assert (scalar.item(), row.tolist()) == (3, [1, 1])


@ranks(1, 2)
def test_a_dim_that_no_tensor_has_is_an_error():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(DataError, match=r"D0512.*at most 1 dims"):
        accelerator.pad_across_processes([torch.ones(2), torch.tensor(1.0)], dim=1)


@ranks(2)
def test_ranks_that_pad_different_dims_are_told():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(CollectiveError, match=r"D0401.*dim=0.*dim=1"):
        accelerator.pad_across_processes(torch.ones(2, 2), dim=accelerator.process_index)


# Large differences in few words


@ranks(3)
def test_the_first_difference_of_large_trees_is_named_by_its_path():
    accelerator = Accelerator(cpu=True)
    tree = {f"layer_{i}": [torch.ones(2), torch.ones(2, 3)] for i in range(100)}
    if accelerator.process_index == 2:
        tree["layer_57"][1] = torch.ones(2, 4)
    with pytest.raises(CollectiveError) as refused:
        accelerator.gather(tree)
    text = refused.value.problem
    assert "rank 0 calls gather of 200 values, where layer_57.1 is float32(*, 3), at " in text
    assert "(rank 1 too)" in text
    assert "rank 2 calls gather of 200 values, where layer_57.1 is float32(*, 4), at " in text
    assert len(text) < 500


# The same model everywhere


def change_on_rank_one(model: nn.Module, name: str) -> None:
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1e-6


@ranks(2, 3)
def test_the_first_tensor_that_differs_is_named_with_the_ranks():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).bfloat16().float())
    accelerator.check_in_sync(model)
    accelerator.check_in_sync()
    change_on_rank_one(accelerator.unwrap_model(model), "1.weight")
    change_on_rank_one(accelerator.unwrap_model(model), "1.bias")
    with pytest.raises(StrategyError) as found:
        accelerator.check_in_sync(model)
    assert found.value.code == "D0816"
    others = "rank 0" if accelerator.num_processes == 2 else "ranks 0, 2"
    assert f"different values of 1.weight float32(3, 3): {others} against rank 1; 1 more differ" in str(
        found.value
    )
    with pytest.raises(StrategyError, match=r"1\.weight"):
        accelerator.check_in_sync()


@ranks(2)
def test_a_buffer_counts_and_so_does_every_bit():
    accelerator = Accelerator(cpu=True)
    model = nn.BatchNorm1d(2)
    if accelerator.process_index == 1:
        model.running_mean[1] = -0.0
    with pytest.raises(StrategyError, match=r"(?s)running_mean float32\(2\).*BatchNorm differ by design"):
        accelerator.check_in_sync(model)


@ranks(2)
def test_models_with_other_tensors_are_told_apart():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2, bias=accelerator.is_main_process)
    with torch.no_grad():
        model.weight.fill_(1)
    with pytest.raises(StrategyError, match=r"D0816.*do not have the same tensors, beginning with"):
        accelerator.check_in_sync(model)


@ranks(2)
def test_a_check_costs_one_exchange_whatever_the_number_of_tensors():
    accelerator = Accelerator(cpu=True)
    few = nn.Linear(1, 1)
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))
    with torch.no_grad():
        for x in [*few.parameters(), *many.parameters()]:
            x.fill_(0)
    assert operations(lambda: accelerator.check_in_sync(few)) == 1
    assert operations(lambda: accelerator.check_in_sync(many)) == 2


@ranks(1)
def test_a_single_process_is_in_sync_with_itself():
    accelerator = Accelerator(cpu=True)
    accelerator.check_in_sync(nn.Linear(2, 2))
    accelerator.check_in_sync()
