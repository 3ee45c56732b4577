import pytest
import torch

from distrib.checkpoint import Contents, begin, open_checkpoint
from distrib.checkpoint.planner import Planner
from distrib.errors import CheckpointError
from distrib.state import ShardedState
from tests.unit.checkpointing import ALONE, on_ranks, rows, sample, sharded, state_of, values, zeros_like


class Counted:
    """A collectives that counts the exchanges of the main thread's calls."""

    def __init__(self, collectives):
        self._inner, self.num_exchanges = collectives, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def gather_object(self, value):
        self.num_exchanges += 1
        return self._inner.gather_object(value)


def saved(path, state, collectives, planner, **others):
    """Save and return how many exchanges it took to begin."""
    counted = Counted(collectives)
    saving = begin(path, lambda: Contents(state, **others), counted, planner=planner)
    saving.finish(collectives)
    return counted.num_exchanges


def loaded(path, like):
    state = state_of(zeros_like(like))
    with open_checkpoint(path, ALONE) as reader:
        reader.fill(state)
        return values(state), reader.objects


def assert_loads(path, expected):
    found, _ = loaded(path, expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def share(tensors, c, **kwargs):
    found = sharded(tensors, c.rank, c.world_size, rows)
    return ShardedState(found.tensors, **kwargs)


def rows_only(seed):
    return {name: x for name, x in sample(seed).items() if x.dim() > 0}


def test_a_save_laid_out_like_the_one_before_asks_and_plans_nothing_again(tmp_path, monkeypatch):
    def run(c):
        planner = Planner()
        first = saved(tmp_path / "a", share(rows_only(1), c), c, planner)
        c.gather_object(None)
        if c.rank == 0:
            monkeypatch.setattr("distrib.checkpoint.planner.plan_writes", None)  # a call would fail
        c.gather_object(None)
        return first, saved(tmp_path / "b", share(rows_only(2), c), c, planner)

    assert on_ranks(3, run) == [(3, 2)] * 3
    assert_loads(tmp_path / "a", rows_only(1))
    assert_loads(tmp_path / "b", rows_only(2))


def test_objects_of_each_rank_reach_the_checkpoint_although_the_layout_is_known(tmp_path):
    def run(c):
        planner = Planner()
        for lr in (1, 2):
            objects = {"lr": lr, "of": {f"rank {c.rank}": lr}}
            saved(tmp_path / f"{lr}", share(rows_only(1), c, objects=objects), c, planner)

    assert on_ranks(2, run) == [None] * 2
    _, objects = loaded(tmp_path / "2", rows_only(1))
    assert objects == {"lr": 2, "of": {"rank 0": 2, "rank 1": 2}}


def test_a_run_that_has_got_more_tensors_plans_anew(tmp_path):
    more = {**rows_only(2), "optimizer/exp_avg_sq.weight": torch.randn(5, 3)}

    def run(c):
        planner = Planner()
        return [
            saved(tmp_path / f"{i}", share(x, c), c, planner)
            for i, x in enumerate((rows_only(1), more, more))
        ]

    assert on_ranks(2, run) == [[3, 3, 2]] * 2
    assert_loads(tmp_path / "1", more)
    assert_loads(tmp_path / "2", more)


def test_a_change_on_one_rank_is_planned_by_all(tmp_path):
    def only(name, rank):
        return ShardedState(state_of({name: torch.full((3,), float(rank))}).tensors)

    def run(c):
        planner = Planner()
        saved(tmp_path / "a", only(f"model/{c.rank}", c.rank), c, planner)
        name = "model/other" if c.rank == 1 else "model/0"
        return saved(tmp_path / "b", only(name, c.rank), c, planner)

    assert on_ranks(2, run) == [3, 3]
    assert_loads(tmp_path / "b", {"model/0": torch.zeros(3), "model/other": torch.ones(3)})


def test_a_rank_that_knows_nothing_is_told_by_all(tmp_path):
    def run(c):
        planner = Planner()
        saved(tmp_path / "a", share(rows_only(1), c), c, planner)
        return saved(tmp_path / "b", share(rows_only(2), c), c, Planner() if c.rank == 1 else planner)

    assert on_ranks(2, run) == [3, 3]
    assert_loads(tmp_path / "b", rows_only(2))


def test_a_layout_that_was_refused_is_not_remembered(tmp_path):
    def run(c):
        planner = Planner()
        half = share(rows_only(1), c)
        if c.rank == 1:
            half = ShardedState({})
        for _ in range(2):
            with pytest.raises(CheckpointError, match="exactly once"):
                saved(tmp_path / "a", half, c, planner)
        return saved(tmp_path / "a", share(rows_only(1), c), c, planner)

    assert on_ranks(2, run) == [3, 3]
    assert_loads(tmp_path / "a", rows_only(1))


def test_a_second_name_is_stored_by_every_save(tmp_path):
    tied = state_of({"model/emb": torch.ones(3)}, aliases={"model/head": "model/emb"})
    planner = Planner()
    for name in "ab":
        saved(tmp_path / name, tied, ALONE, planner)
        with open_checkpoint(tmp_path / name, ALONE) as reader:
            reader.check(tied)
            assert dict(reader.manifest.aliases) == {"model/head": "model/emb"}
