"""Checkpoints over real processes: what some ranks wrote loads on any other number of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distrib.checkpoint import Contents, export_model, open_checkpoint, save
from distrib.checkpoint.plan import numel
from distrib.collectives.process_group import ProcessGroupCollectives
from distrib.collectives.single import SingleCollectives
from distrib.errors import CheckpointError
from distrib.state import Box, Interval, ShardedState, Slice
from distrib.testing import RanksFailed, run_ranks

LAYOUTS = ("replicated", "rows", "interval")


def expected(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "model/w": torch.randn(7, 5, generator=draw),
        "model/b": torch.randn(5, generator=draw).bfloat16(),
        "optimizer/exp_avg.w": torch.randn(7, 5, generator=draw),
        "optimizer/step.w": torch.tensor(3.0),
    }


def region(layout, shape, rank, world_size):
    if layout == "interval":
        step = -(-numel(shape) // world_size)
        start = min(rank * step, numel(shape))
        return Interval(start, min(start + step, numel(shape)))
    if layout == "replicated" or not shape:
        return Box((0,) * len(shape), shape)
    step = -(-shape[0] // world_size)
    start = min(rank * step, shape[0])
    return Box((start, *(0,) * (len(shape) - 1)), (min(step, shape[0] - start), *shape[1:]))


def cut(tensor, where):
    if isinstance(where, Interval):
        return tensor.reshape(-1)[where.start : where.stop].clone()
    return tensor[tuple(slice(a, a + n) for a, n in zip(where.start, where.size, strict=True))].clone()


def state_of(tensors, layout, ranks):
    """This rank's slices of `tensors`, and the live tensors by name."""
    slices, live = {}, {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        where = region(layout, shape, ranks.rank, ranks.world_size)
        live[name] = cut(tensor, where)
        slices[name] = (Slice(name, shape, tensor.dtype, where, lambda name=name: live[name]),)
    return ShardedState(slices, {"optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}}), live


def join():
    if os.environ["WORLD_SIZE"] == "1":
        return SingleCollectives()
    dist.init_process_group("gloo")
    return ProcessGroupCollectives(torch.device("cpu"), owned=True)


def save_on_ranks(directory, layout, seed):
    ranks = join()
    state, _ = state_of(expected(seed), layout, ranks)
    save(directory, Contents(state=state, rng={"rank": ranks.rank}, counters={"step": seed}), ranks)
    ranks.close()


def load_on_ranks(directory, layout, seed):
    """Return whether every slice came back bit for bit, and rank 0's stored random state."""
    ranks = join()
    blank = {name: torch.zeros_like(tensor) for name, tensor in expected(seed).items()}
    state, live = state_of(blank, layout, ranks)
    with open_checkpoint(directory, ranks) as reader:
        reader.check(state)
        reader.fill(state)
        assert reader.objects == state.objects
        rng = reader.rng(0)
    right, _ = state_of(expected(seed), layout, ranks)
    equal = all(torch.equal(live[name], part.get()) for name, (part,) in right.tensors.items())
    ranks.close()
    return equal, rng


@pytest.mark.parametrize("written", LAYOUTS)
def test_what_three_ranks_wrote_loads_on_one_and_on_two_in_any_layout(tmp_path, written):
    run_ranks(save_on_ranks, 3, tmp_path / "c", written, 5)
    assert run_ranks(load_on_ranks, 1, tmp_path / "c", "replicated", 5) == [(True, {"rank": 0})]
    read = "interval" if written == "rows" else "rows"
    assert run_ranks(load_on_ranks, 2, tmp_path / "c", read, 5) == [(True, {"rank": 0})] * 2


def test_every_rank_of_a_replicated_save_writes_a_share(tmp_path):
    run_ranks(save_on_ranks, 2, tmp_path / "c", "replicated", 5)
    assert len(list((tmp_path / "c").glob("*/rank-00001.safetensors"))) >= 1
    assert sorted(path.name for path in (tmp_path / "c" / "rng").iterdir()) == [
        "rank-00000.json",
        "rank-00001.json",
    ]


def save_while_rank_one_fails(directory):
    ranks = join()
    state, live = state_of(expected(6), "rows", ranks)
    if ranks.rank == 1:
        live.clear()  # get raises KeyError while the others write
    try:
        save(directory, Contents(state=state), ranks)
    except CheckpointError as error:
        return str(error)
    finally:
        ranks.close()


def test_a_failure_on_one_rank_is_an_error_on_all_and_leaves_the_previous_checkpoint(tmp_path):
    run_ranks(save_on_ranks, 2, tmp_path / "c", "rows", 5)
    said = run_ranks(save_while_rank_one_fails, 2, tmp_path / "c")
    assert all("rank 1" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert run_ranks(load_on_ranks, 1, tmp_path / "c", "replicated", 5)[0][0]


def save_while_rank_one_dies(directory):
    ranks = join()
    state, _ = state_of(expected(6), "rows", ranks)
    if ranks.rank == 1:
        (part,) = state.tensors["model/w"]
        dying = Slice(
            part.name, part.global_shape, part.dtype, part.where, lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
        state = ShardedState({**state.tensors, "model/w": (dying,)}, state.objects)
    save(directory, Contents(state=state), ranks)


def test_a_rank_killed_while_it_writes_leaves_the_previous_checkpoint_and_the_next_save_tidies_up(tmp_path):
    run_ranks(save_on_ranks, 2, tmp_path / "c", "rows", 5)
    with pytest.raises(RanksFailed):
        run_ranks(save_while_rank_one_dies, 2, tmp_path / "c", timeout_s=30)
    assert run_ranks(load_on_ranks, 2, tmp_path / "c", "interval", 5)[1][0]
    run_ranks(save_on_ranks, 2, tmp_path / "c", "interval", 7)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["c"]
    assert run_ranks(load_on_ranks, 1, tmp_path / "c", "rows", 7)[0][0]


def export_on_ranks(directory, layout):
    ranks = join()
    state, _ = state_of(expected(5), layout, ranks)
    export_model(directory, state, ranks, max_shard_size=100)
    ranks.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_spread_over_ranks_is_exported_whole(tmp_path, layout):
    load_file = pytest.importorskip("safetensors.torch").load_file
    run_ranks(export_on_ranks, 2, tmp_path / "hf", layout)
    found = {}
    for path in (tmp_path / "hf").glob("model-*.safetensors"):
        found |= load_file(path)
    assert found.keys() == {"w", "b"}
    assert torch.equal(found["w"], expected(5)["model/w"])
    assert torch.equal(found["b"], expected(5)["model/b"])
