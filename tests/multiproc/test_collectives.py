"""Collectives over real gloo processes: values of any nesting, and clear errors where ranks disagree or are lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distrib import Accelerator
from distrib.collectives import Collectives, connect_ranks
from distrib.devices import DEVICES
from distrib.errors import CollectiveError, DataError, TopologyError
from distrib.testing import RanksFailed, ranks, run_ranks
from distrib.topology import detect_topology
from tests.multiproc.counting import operations

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
REDUCED = tuple(dtype for dtype in DTYPES if dtype is not torch.bool and not dtype.is_complex)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0, dtype=x.dtype),
    "mean": lambda x: x.sum(0, dtype=x.dtype) / len(x),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
}


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Batch:
    x: Any
    note: str = ""


class Encoding(UserDict):
    pass


def connected() -> Collectives:
    topology = detect_topology(os.environ)
    return connect_ranks(topology, DEVICES.get("cpu")(), torch.device("cpu"), 30)


def on(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values that tell the rank and the place."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 10 + 20 * rank).reshape(shape).to(dtype)


def of_all(world_size: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([on(rank, *shape, dtype=dtype) for rank in range(world_size)])


def assert_identical(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def nested(rank: int) -> dict[str, Any]:
    return {
        "pair": Pair(on(rank, 2, 3), [on(rank, 1, dtype=torch.int64), "a word"]),
        "batch": Batch((on(rank, 4),), note="kept"),
        "ordered": OrderedDict(b=on(rank, 1, 2), a=on(rank, 1)),
        "encoding": Encoding({"ids": on(rank, 2, 2, dtype=torch.int64)}),
        "nothing": None,
    }


def assert_containers_are_kept(found: dict[str, Any]) -> None:
    assert type(found["pair"]) is Pair
    assert found["pair"].second[1] == "a word"
    assert type(found["batch"]) is Batch
    assert (type(found["batch"].x), found["batch"].note) == (tuple, "kept")
    assert list(found["ordered"]) == ["b", "a"]
    assert type(found["encoding"]) is Encoding
    assert found["nothing"] is None


# Gather


@ranks(2, 3)
def test_gather_concatenates_every_tensor_of_a_nested_structure_in_rank_order():
    ours = connected()
    mine = nested(ours.rank)
    found = ours.gather(mine)
    assert_containers_are_kept(found)
    assert_identical(found["pair"].first, of_all(ours.world_size, 2, 3))
    assert_identical(found["pair"].second[0], of_all(ours.world_size, 1, dtype=torch.int64))
    assert_identical(found["batch"].x[0], of_all(ours.world_size, 4))
    assert_identical(found["ordered"]["b"], of_all(ours.world_size, 1, 2))
    assert_identical(found["encoding"]["ids"], of_all(ours.world_size, 2, 2, dtype=torch.int64))
    assert_identical(mine["pair"].first, on(ours.rank, 2, 3))


@ranks(2, 3)
def test_gather_takes_unequal_numbers_of_rows_none_included():
    ours = connected()
    rows = [(0, 3), (4, 0), (1, 2)][: ours.world_size]
    own = rows[ours.rank]
    found = ours.gather([on(ours.rank, own[0], 2), on(ours.rank, own[1], dtype=torch.int64)])
    assert_identical(found[0], torch.cat([on(rank, n, 2) for rank, (n, _) in enumerate(rows)]))
    assert_identical(
        found[1], torch.cat([on(rank, n, dtype=torch.int64) for rank, (_, n) in enumerate(rows)])
    )


@ranks(2)
def test_gather_and_broadcast_keep_every_dtype_and_a_0_d_tensor_counts_as_one_row():
    ours = connected()
    for shape in [(), (3,), (2, 1, 3)]:
        mine = [on(ours.rank, *shape, dtype=dtype) for dtype in DTYPES]
        for dtype, found in zip(DTYPES, ours.gather(mine), strict=True):
            assert_identical(found, of_all(2, *(shape or (1,)), dtype=dtype))
        for dtype, found in zip(DTYPES, ours.broadcast(mine, 1), strict=True):
            assert_identical(found, on(1, *shape, dtype=dtype))


@ranks(2)
def test_special_values_travel_bit_by_bit():
    ours = connected()
    values = torch.tensor([float("nan"), -0.0, float("inf"), 5e-324], dtype=torch.float64)
    found = ours.gather(values[ours.rank :])
    assert_identical(found.view(torch.int64), torch.cat([values, values[1:]]).view(torch.int64))


@ranks(2)
def test_gather_of_100_leaves_of_unequal_rows_gives_each_its_own():
    ours = connected()
    found = ours.gather([on(ours.rank, (leaf + ours.rank) % 4, 2) for leaf in range(100)])
    for leaf in range(100):
        parts = [on(rank, (leaf + rank) % 4, 2) for rank in range(ours.world_size)]
        assert_identical(found[leaf], torch.cat(parts))


@ranks(2)
def test_views_are_gathered_as_they_look():
    ours = connected()
    square = on(ours.rank, 4, 4)
    found = ours.gather([square.t(), square[::2, 1:3], square[0, 0].expand(3)])
    assert_identical(found[0], torch.cat([on(rank, 4, 4).t() for rank in range(2)]))
    assert_identical(found[1], torch.cat([on(rank, 4, 4)[::2, 1:3] for rank in range(2)]))
    assert_identical(found[2], torch.tensor([0.0, 0, 0, 20, 20, 20]))


@ranks(2)
def test_empty_tensors_among_others_are_gathered():
    ours = connected()
    found = ours.gather([torch.zeros(0, 3), on(ours.rank, 2), torch.zeros(2, 0)])
    assert [tuple(x.shape) for x in found] == [(0, 3), (4,), (4, 0)]


@ranks(2)
def test_empty_containers_come_back_as_they_are():
    ours = connected()
    for tree in ({}, [], (), {"a": []}):
        assert ours.gather(tree) == tree
        assert ours.broadcast(tree) == tree
        assert ours.reduce(tree) == tree


@ranks(2)
def test_a_number_among_the_tensors_is_refused_since_it_would_not_travel():
    accelerator = Accelerator(cpu=True)
    for tree in (3.5, {"loss": torch.ones(1), "n": 3}, [np.ones(2)]):
        for call in (accelerator.gather, accelerator.reduce, accelerator.broadcast):
            with pytest.raises(DataError) as refused:
                call(tree)
            assert refused.value.code == "D0508"


@ranks(2)
def test_a_tree_whose_tensors_are_all_empty_is_gathered():
    ours = connected()
    assert tuple(ours.gather(torch.zeros(0, 3)).shape) == (0, 3)
    assert tuple(ours.gather([torch.zeros(3, 0, dtype=torch.int64)])[0].shape) == (6, 0)


@ranks(2)
def test_a_column_of_a_single_row_is_gathered_reduced_and_broadcast():
    ours = connected()
    column = on(ours.rank, 1, 4)[:, 1]  # one element whose stride is 4
    assert ours.gather(column).tolist() == [1, 21]
    assert ours.reduce(column).tolist() == [22]
    assert ours.broadcast(column, 1).tolist() == [21]


@ranks(2)
def test_lazily_conjugated_and_negated_views_are_gathered():
    ours = connected()
    conjugated = torch.tensor([1 + 2j * (ours.rank + 1)]).conj()
    assert ours.gather(conjugated).tolist() == [1 - 2j, 1 - 4j]
    assert ours.gather(conjugated.imag).tolist() == [-2, -4]


# Reduce


@ranks(3)
def test_reduce_works_elementwise_on_every_tensor_and_keeps_the_structure():
    ours = connected()
    mine = nested(ours.rank)
    found = ours.reduce(mine)
    assert_containers_are_kept(found)
    total = of_all(ours.world_size, 1, 2, 3).sum(0)
    assert_identical(found["pair"].first, total)
    assert_identical(mine["pair"].first, on(ours.rank, 2, 3))


@ranks(2, 3)
def test_sum_mean_max_and_min_are_right_in_every_dtype_for_any_shape():
    ours = connected()
    for op, expected in OPS.items():
        for shape in [(), (3,), (0,), (2, 2)]:
            mine = [on(ours.rank, *shape, dtype=dtype) for dtype in REDUCED]
            for dtype, found in zip(REDUCED, ours.reduce(mine, op), strict=True):
                stacked = torch.stack([on(rank, *shape, dtype=dtype) for rank in range(ours.world_size)])
                torch.testing.assert_close(found, expected(stacked))


@ranks(2)
def test_complex_numbers_are_added_and_averaged():
    ours = connected()
    z = torch.tensor([1 + 1j * ours.rank])
    world = ours.world_size
    assert ours.reduce(z).tolist() == [world + 1j * sum(range(world))]
    assert ours.reduce(z, "mean").tolist() == [1 + 1j * sum(range(world)) / world]


@ranks(3)
def test_booleans_are_combined_by_or_and_by_and():
    ours = connected()
    mine = torch.tensor([ours.rank == 0, True, False])
    assert ours.reduce(mine, "max").tolist() == [True, True, False]
    assert ours.reduce(mine, "min").tolist() == [ours.world_size == 1, True, False]


@ranks(2)
def test_the_sum_of_booleans_counts_them_and_their_mean_is_the_share():
    ours = connected()
    mine = torch.tensor([True, ours.rank == 0, False])
    assert_identical(ours.reduce(mine), torch.tensor([ours.world_size, 1, 0]))
    assert_identical(ours.reduce(mine, "mean"), torch.tensor([1, 1 / ours.world_size, 0]))


@ranks(2)
def test_the_maximum_of_complex_numbers_is_refused_on_every_rank():
    ours = connected()
    with pytest.raises(DataError, match="complex64"):
        ours.reduce(torch.ones(1, dtype=torch.complex64), "max")


@ranks(2)
def test_results_carry_no_graph_of_the_rank_that_asked():
    ours = connected()
    loss = (torch.ones(2, requires_grad=True) * (ours.rank + 1)).sum()
    assert not ours.gather(loss).requires_grad
    assert not ours.broadcast(loss).requires_grad
    assert not ours.reduce(loss, "mean").requires_grad


@ranks(2)
def test_all_reduce_works_in_place():
    ours = connected()
    for op, expected in OPS.items():
        tensor = on(ours.rank, 2, 2)
        assert ours.all_reduce_(tensor, op) is tensor
        torch.testing.assert_close(
            tensor, expected(torch.stack([on(rank, 2, 2) for rank in range(ours.world_size)]))
        )


# Broadcast, objects, barrier


@ranks(2, 3)
def test_broadcast_gives_the_sources_tree_to_all_and_changes_no_ones_own():
    ours = connected()
    for source in range(ours.world_size):
        mine = nested(ours.rank)
        found = ours.broadcast(mine, source)
        assert_containers_are_kept(found)
        assert_identical(found["pair"].first, on(source, 2, 3))
        assert_identical(found["encoding"]["ids"], on(source, 2, 2, dtype=torch.int64))
        assert_identical(mine["pair"].first, on(ours.rank, 2, 3))


@ranks(2)
def test_results_share_no_memory_with_what_was_given():
    ours = connected()
    mine = on(ours.rank, ours.world_size, 3)
    operations = (ours.gather, ours.reduce, ours.broadcast, ours.all_gather, ours.all_to_all)
    for operation in operations:
        operation(mine).fill_(99)
        assert_identical(mine, on(ours.rank, ours.world_size, 3))


@ranks(3)
def test_objects_of_any_kind_are_gathered_and_broadcast():
    ours = connected()
    world = range(ours.world_size)
    mine = {"rank": ours.rank, "text": "x" * 1000 * ours.rank, "none": None, "path": Path("a")}
    assert [x["rank"] for x in ours.gather_object(mine)] == list(world)
    assert [len(x["text"]) for x in ours.gather_object(mine)] == [1000 * rank for rank in world]
    for source in world:
        assert ours.broadcast_object(mine if ours.rank == source else None, source)["rank"] == source
    assert ours.gather_object(None) == [None for _ in world]


@ranks(3)
def test_nobody_leaves_a_barrier_before_everybody_has_come(tmp_path: Path):
    ours = connected()
    for turn in range(30):
        (tmp_path / f"{turn}-{ours.rank}").touch()
        ours.barrier("all files of this turn")
        assert all((tmp_path / f"{turn}-{rank}").exists() for rank in range(3))


# A world of one

PROMISES = (
    test_gather_concatenates_every_tensor_of_a_nested_structure_in_rank_order,
    test_empty_containers_come_back_as_they_are,
    test_a_number_among_the_tensors_is_refused_since_it_would_not_travel,
    test_reduce_works_elementwise_on_every_tensor_and_keeps_the_structure,
    test_sum_mean_max_and_min_are_right_in_every_dtype_for_any_shape,
    test_complex_numbers_are_added_and_averaged,
    test_booleans_are_combined_by_or_and_by_and,
    test_the_sum_of_booleans_counts_them_and_their_mean_is_the_share,
    test_the_maximum_of_complex_numbers_is_refused_on_every_rank,
    test_all_reduce_works_in_place,
    test_broadcast_gives_the_sources_tree_to_all_and_changes_no_ones_own,
    test_results_share_no_memory_with_what_was_given,
    test_objects_of_any_kind_are_gathered_and_broadcast,
    test_results_carry_no_graph_of_the_rank_that_asked,
)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda test: test.__name__)
def test_a_single_process_keeps_the_promise_too(monkeypatch: pytest.MonkeyPatch, promise: Any):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    promise.in_rank()


# How often the ranks talk


LARGE = 1000  # rows; more than what may ride in a header
MOST: dict[str, tuple[int, Callable[[Collectives], Any]]] = {  # one header, and one data operation per dtype
    "gather of 12 of unequal rows": (2, lambda c: c.gather([torch.ones(LARGE + c.rank, 2)] * 12)),
    "gather of 3 dtypes": (2, lambda c: c.gather(mixed(LARGE))),
    "gather of 100": (2, lambda c: c.gather([torch.ones(LARGE)] * 100)),
    "gather of 1000 small ones": (
        3,
        lambda c: c.gather([torch.ones(1)] * 1000),
    ),  # sizes may need a second header
    "gather of nothing": (1, lambda c: c.gather({})),
    "broadcast of 3 dtypes": (2, lambda c: c.broadcast(mixed(LARGE))),
    "reduce of 100": (2, lambda c: c.reduce([torch.ones(LARGE)] * 100)),
    "reduce of 3 dtypes": (4, lambda c: c.reduce(mixed(LARGE), "mean")),
    "gather_object": (3, lambda c: c.gather_object("x" * 10000)),
    "broadcast_object": (3, lambda c: c.broadcast_object("x" * 10000)),
    "barrier": (1, lambda c: c.barrier("nothing")),
    "all_reduce_": (1, lambda c: c.all_reduce_(torch.ones(3))),
}


def mixed(rows: int) -> list[Tensor]:
    return [
        torch.ones(rows, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.float64, torch.float32)
    ]


def operations_of_each_call() -> dict[str, int]:
    ours = connected()
    return {name: operations(lambda call=call: call(ours)) for name, (_, call) in MOST.items()}  # type: ignore[misc]


def test_a_call_has_one_header_and_at_most_one_data_operation_per_dtype():
    for found in run_ranks(operations_of_each_call, 2):
        assert {name: count for name, count in found.items() if not 1 <= count <= MOST[name][0]} == {}


# Disagreement

MISMATCHES: dict[str, tuple[Callable[[Collectives], Any], Callable[[Collectives], Any], str, str]] = {
    "operation": (
        lambda c: c.gather(torch.ones(2)),
        lambda c: c.reduce(torch.ones(2)),
        "gather of float32(*)",
        "reduce(sum) of float32(2)",
    ),
    "reduction": (
        lambda c: c.reduce(torch.ones(2), "max"),
        lambda c: c.reduce(torch.ones(2), "min"),
        "reduce(max)",
        "reduce(min)",
    ),
    "dtype": (
        lambda c: c.gather(torch.ones(2)),
        lambda c: c.gather(torch.ones(2).double()),
        "float32(*)",
        "float64(*)",
    ),
    "trailing shape": (
        lambda c: c.gather(torch.ones(2, 3)),
        lambda c: c.gather(torch.ones(2, 4)),
        "float32(*, 3)",
        "float32(*, 4)",
    ),
    "number of dims": (
        lambda c: c.gather(torch.ones(2)),
        lambda c: c.gather(torch.ones(2, 1)),
        "float32(*)",
        "float32(*, 1)",
    ),
    "rows in a reduction": (
        lambda c: c.reduce(torch.ones(2)),
        lambda c: c.reduce(torch.ones(3)),
        "float32(2)",
        "float32(3)",
    ),
    "rows in a broadcast": (
        lambda c: c.broadcast(torch.ones(2)),
        lambda c: c.broadcast(torch.ones(3)),
        "float32(2)",
        "float32(3)",
    ),
    "keys": (
        lambda c: c.gather({"loss": torch.ones(1)}),
        lambda c: c.gather({"los": torch.ones(1)}),
        "dict[loss: float32(*)]",
        "dict[los: float32(*)]",
    ),
    "number of tensors": (
        lambda c: c.gather([torch.ones(1)]),
        lambda c: c.gather([torch.ones(1)] * 2),
        "list[0: float32(*)]",
        "list[0: float32(*), 1: float32(*)]",
    ),
    "container": (
        lambda c: c.gather([torch.ones(1)]),
        lambda c: c.gather((torch.ones(1),)),
        "list[",
        "tuple[",
    ),
    "one has nothing": (
        lambda c: c.gather({"a": torch.ones(1)}),
        lambda c: c.gather({}),
        "dict[a: float32(*)]",
        "dict[]",
    ),
    "source": (
        lambda c: c.broadcast(torch.ones(1), 0),
        lambda c: c.broadcast(torch.ones(1), 1),
        "broadcast(from 0)",
        "broadcast(from 1)",
    ),
    "source of an object": (
        lambda c: c.broadcast_object(1, 0),
        lambda c: c.broadcast_object(1, 1),
        "broadcast_object(from 0)",
        "broadcast_object(from 1)",
    ),
    "objects and tensors": (
        lambda c: c.gather_object(1),
        lambda c: c.gather(torch.ones(1)),
        "gather_object",
        "gather of float32(*)",
    ),
    "barrier and reduction": (
        lambda c: c.barrier("the end"),
        lambda c: c.reduce(torch.ones(3), "mean"),
        "barrier(the end)",
        "reduce(mean) of float32(3)",
    ),
}


def errors_of_all_mismatches() -> list[tuple[str, str, str]]:
    """Let the last rank do something else than the others, one case after the other in one group."""
    ours = connected()
    found = []
    for name, (usual, odd, *_) in MISMATCHES.items():
        with pytest.raises(CollectiveError) as refused:
            (odd if ours.rank == ours.world_size - 1 else usual)(ours)
        found.append((name, refused.value.code, str(refused.value)))
    assert_identical(ours.gather(on(ours.rank, 1)), of_all(ours.world_size, 1))  # the ranks can go on
    return found


@pytest.fixture(scope="module", params=[2, 3])
def mismatches(request: pytest.FixtureRequest) -> tuple[int, list[list[tuple[str, str, str]]]]:
    return request.param, run_ranks(errors_of_all_mismatches, request.param)


@pytest.mark.parametrize("index", range(len(MISMATCHES)), ids=list(MISMATCHES))
def test_a_mismatch_is_the_same_error_on_every_rank_with_both_calls_and_source_lines(
    mismatches: tuple[int, list[list[tuple[str, str, str]]]], index: int
):
    world_size, of_ranks = mismatches
    name, code, text = of_ranks[0][index]
    usual, odd, usual_call, odd_call = MISMATCHES[name]
    assert code == "D0401"
    assert [errors[index] for errors in of_ranks] == [(name, code, text)] * world_size
    first, _, second = text.partition(f", rank {world_size - 1} calls ")
    assert "rank 0 calls " in first
    assert usual_call in first
    assert odd_call in second
    assert f"{__file__}:{usual.__code__.co_firstlineno}" in first
    assert f"{__file__}:{odd.__code__.co_firstlineno}" in second


def test_all_cases_of_mismatch_have_lines_of_their_own():
    lines = [f.__code__.co_firstlineno for usual, odd, *_ in MISMATCHES.values() for f in (usual, odd)]
    assert len(set(lines)) == len(lines)


@ranks(2)
def test_the_accelerators_calls_name_the_users_line():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(CollectiveError) as refused:
        line = sys._getframe().f_lineno + 1
        accelerator.reduce(torch.ones(1 + accelerator.process_index))
    assert str(refused.value).count(f"{__file__}:{line}") == 2


@ranks(3)
def test_the_odd_rank_is_named_although_the_others_call_from_different_lines():
    ours = connected()
    calls = [
        lambda: ours.gather(torch.ones(1)),
        lambda: ours.gather(torch.ones(1)),
        lambda: ours.reduce(torch.ones(1)),
    ]
    with pytest.raises(CollectiveError) as refused:
        calls[ours.rank]()
    assert "rank 2 calls reduce(sum)" in str(refused.value)


# Lost peers


def lose_a_peer(folder: Path, operation: str) -> None:
    ours = connected()
    ours.barrier("both are there")
    if ours.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    calls: dict[str, Callable[[], Any]] = {
        "gather": lambda: ours.gather(torch.ones(2)),
        "all_reduce_": lambda: ours.all_reduce_(torch.ones(2)),
        "gather_object": lambda: ours.gather_object(1),
    }
    started = time.monotonic()
    with pytest.raises(CollectiveError) as lost:
        calls[operation]()
    found = {"code": lost.value.code, "seconds": time.monotonic() - started, "fix": lost.value.fix}
    (folder / "lost.json").write_text(json.dumps(found))


@pytest.mark.parametrize("operation", ["gather", "all_reduce_", "gather_object"])
def test_a_peer_that_is_killed_is_an_error_at_once(tmp_path: Path, operation: str):
    with pytest.raises(RanksFailed, match="rank 1 of 2 failed:\nkilled by SIGKILL"):
        run_ranks(lose_a_peer, 2, tmp_path, operation, timeout_s=40)
    found = json.loads((tmp_path / "lost.json").read_text())
    assert found["code"] == "D0402"
    assert found["seconds"] < 10  # the group's own limit is 30 s
    assert "ended or stopped first" in found["fix"]


# Whose group it is


@ranks(2)
def test_a_group_that_the_script_has_made_is_used_and_left_alone():
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    ours = connected()
    assert dist.group.WORLD is group
    assert_identical(ours.gather(on(ours.rank, 1)), of_all(2, 1))
    ours.close()
    assert dist.is_initialized()


@ranks(2)
def test_a_group_of_our_own_is_left_once():
    ours = connected()
    assert dist.is_initialized()
    ours.close()
    assert not dist.is_initialized()
    ours.close()


@ranks(2)
def test_a_group_in_which_the_ranks_have_other_numbers_is_refused():
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=1 - rank, world_size=2)
    with pytest.raises(TopologyError) as refused:
        connected()
    assert refused.value.code == "D0291"
    assert f"rank {1 - rank} of 2" in refused.value.problem
    assert f"rank {rank} of 2" in refused.value.problem


@ranks(2)
def test_a_group_smaller_than_the_job_is_refused():
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    os.environ.update(WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    with pytest.raises(TopologyError) as refused:
        connected()
    assert refused.value.code == "D0291"
    assert "of 2" in refused.value.problem
    assert "of 3" in refused.value.problem


@ranks(2)
def test_a_group_that_the_environment_does_not_know_of_is_refused():
    dist.init_process_group("gloo")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # as in a script that spawns its own ranks
    with pytest.raises(TopologyError) as refused:
        Accelerator(cpu=True)
    assert refused.value.code == "D0291"
