"""Worlds of up to 16,384 ranks in one process, with torch's fake process group: who holds what, who reads what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from distrib.checkpoint.plan import Held, Share, plan_writes
from distrib.collectives.single import SingleCollectives
from distrib.data.sharding import Layout, share_of
from distrib.devices import choose_device
from distrib.precision import PrecisionPolicy
from distrib.state import Runtime, TrainState
from distrib.strategies import STRATEGIES
from distrib.topology import DATA_AXES, Topology, resolve_mesh

ROWS, COLUMNS = 40_000, 3  # more rows than ranks, and no multiple of any number of them


class Alike(SingleCollectives):
    """One of many ranks that all have the same to say."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size


@contextmanager
def strategy_of(
    rank: int, world_size: int, mesh: Mapping[str, int], options: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield rank `rank`'s strategy in a world whose other ranks are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        backend, _ = choose_device("cpu", 1)
        resolved = resolve_mesh({**mesh, "shard": -1}, world_size)
        topology = Topology(rank=rank, world_size=world_size, local_rank=0)
        ranks = Alike(rank, world_size)
        runtime = Runtime(topology, resolved, backend.bind(0), backend, ranks, ranks, PrecisionPolicy())
        yield STRATEGIES.get("fsdp")(runtime, options)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes, which in this process belong to another rank each time


def held(rank: int, world_size: int, mesh: Mapping[str, int]) -> dict[str, Held]:
    """Return what a rank holds of one block, as a checkpoint is told."""
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS, bias=False))
    options = {"plan": ("0=colwise", "1=rowwise")} if mesh.get("tensor", 1) > 1 else {}
    with strategy_of(rank, world_size, mesh, options) as strategy:
        block = block.to_empty(device="cpu")
        state = strategy.prepare(TrainState((block,)))
        tensors = strategy.sharded_state(state).tensors
        for name, (part,) in tensors.items():
            assert tuple(part.get().shape) == part.where.size, name
        return {name: Held(name, part.global_shape, "F32", part.where) for name, (part,) in tensors.items()}


MESHES = [
    (6, {}),
    (24, {"replicate": 2}),
    (24, {"tensor": 2}),
    (24, {"replicate": 3, "tensor": 4}),
]


@pytest.mark.parametrize(("world_size", "mesh"), MESHES)
def test_every_byte_is_held_by_some_rank_and_planned_for_one(world_size, mesh):
    shares = [Share((rank,), tuple(held(rank, world_size, mesh).values())) for rank in range(world_size)]
    plan = plan_writes(shares, {"F32": 4})  # which refuses what overlaps or is missing
    written = sum(
        item.where.size[0] * item.where.size[-1] ** (len(item.shape) > 1)
        for item in itertools.chain(*plan.owned)
    )
    assert written == 2 * ROWS * COLUMNS + ROWS


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [
        (1024, {"replicate": 8}),
        (16_384, {"replicate": 128}),
        (16_384, {"replicate": 16, "tensor": 8}),
        (16_384, {"replicate": 16, "context": 4, "tensor": 2}),
    ],
)
def test_a_rank_of_a_large_world_holds_its_part(world_size, mesh):
    tensor = mesh.get("tensor", 1)
    shards = world_size // mesh["replicate"] // tensor
    for rank in (0, world_size // 2 + 1, world_size - 1):
        found = held(rank, world_size, mesh)["model/0.weight"].where
        place, part = (rank // tensor) % shards, rank % tensor
        rows = ROWS // tensor
        chunk = -(-rows // shards)
        start = min(place * chunk, rows)
        assert found.size == (max(min(chunk, rows - place * chunk), 0), COLUMNS)
        if found.size[0]:
            assert found.start == (part * rows + start, 0)


@pytest.mark.parametrize("world_size", [7, 1000, 16_384])
def test_every_sample_of_a_global_batch_is_read_by_one_rank_group(world_size):
    mesh = resolve_mesh({"shard": -1, "replicate": 1}, world_size)
    readers = mesh.data_parallel_size
    layout = Layout(3 * readers + 5, 2 * readers + 1, 1, readers, "exact")
    steps = [
        *layout.window(0, layout.global_batch_size),
        *layout.window(layout.global_batch_size, readers + 4),
    ]
    for step in steps:
        taken = [
            (share.start, share.size) for share in (share_of(step, rank, readers) for rank in range(readers))
        ]
        stops = list(itertools.accumulate(size for _, size in taken))
        assert stops[-1] == step.size
        assert all(size <= taken[0][1] for _, size in taken)


def test_groups_of_a_mesh_cut_the_world():
    mesh = resolve_mesh({"replicate": 4, "shard": 8, "tensor": 2}, 64)
    for axes in (DATA_AXES, ("tensor",), ("shard",), ("replicate", "tensor")):
        groups = mesh.groups(*axes)
        assert sorted(itertools.chain(*groups)) == list(range(64))
        assert {len(group) for group in groups} == {64 // len(groups)}
    assert mesh.groups("tensor")[0] == [0, 1]
    assert mesh.coordinates(63) == {
        "pipeline": 0,
        "replicate": 3,
        "shard": 7,
        "context": 0,
        "tensor": 1,
        "expert": 0,
    }
