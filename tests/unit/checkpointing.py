"""What the checkpoint tests share: ranks as threads, layouts of a tensor, and a state to save."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from distrib_launcher.cli import run

from distrib.checkpoint import Contents
from distrib.checkpoint.plan import numel, pieces
from distrib.checkpoint.storage import Storage
from distrib.collectives.single import SingleCollectives
from distrib.state import Box, Interval, ShardedState, Slice, whole

ALONE = SingleCollectives()


class ThreadCollectives(SingleCollectives):
    """Ranks that are threads of this process: real exchanges, no processes."""

    def __init__(self, rank, shared):
        self.rank, self.shared, self.world_size = rank, shared, shared["barrier"].parties

    def gather_object(self, value: Any) -> list[Any]:
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait(30)
        found = list(self.shared["values"])
        self.shared["barrier"].wait(30)
        return found

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return self.gather_object(value)[source]

    def gather(self, tree):
        return torch.cat(self.gather_object(tree))

    def broadcast(self, tree, source=0):
        return self.gather_object(tree)[source].clone()


def on_ranks(n, fn):
    """Call fn(collectives) on n threads as n ranks; returns each rank's result, or the exception it raised."""
    shared = {"barrier": threading.Barrier(n), "values": [None] * n}

    def run(rank):
        try:
            return fn(ThreadCollectives(rank, shared))
        except Exception as error:
            if isinstance(error, threading.BrokenBarrierError):
                raise
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def rows(shape, rank, world_size):
    """The box of rank's share when dim 0 is divided as torch.chunk does."""
    step = -(-shape[0] // world_size)
    start = min(rank * step, shape[0])
    return Box((start, *(0 for _ in shape[1:])), (min(step, shape[0] - start), *shape[1:]))


def interval(shape, rank, world_size):
    """The interval of rank's share when the flattened, padded tensor is divided evenly, as ZeRO does."""
    step = -(-numel(shape) // world_size)
    return Interval(min(rank * step, numel(shape)), min((rank + 1) * step, numel(shape)))


def cut(full, where):
    """A copy of a slice of `full`, in the shape that a strategy would hold it."""
    shape = tuple(full.shape)
    parts = [
        full[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))]
        for box, _ in pieces(where, shape)
    ]
    if isinstance(where, Interval):
        return torch.cat([p.reshape(-1) for p in parts]) if parts else full.new_empty(0)
    return parts[0].clone() if parts else full.new_empty(where.size)


def slice_of(name, full, where):
    """A slice with memory of its own that holds its part of `full`."""
    tensor = cut(full, where)
    return Slice(name, tuple(full.shape), full.dtype, where, lambda: tensor)


def state_of(tensors, **kwargs):
    """A state that holds all of some tensors."""
    return ShardedState({name: (whole(name, x),) for name, x in tensors.items()}, **kwargs)


def sharded(tensors, rank, world_size, layout):
    """A state with this rank's share of some tensors."""
    return ShardedState(
        {name: (slice_of(name, x, layout(tuple(x.shape), rank, world_size)),) for name, x in tensors.items()}
    )


def values(state):
    """The tensors of a state that holds them whole."""
    return {name: parts[0].get() for name, parts in state.tensors.items()}


def sample(seed=0):
    """Tensors of some shapes and dtypes, none divisible by 2 or 3 evenly."""
    generator = torch.Generator().manual_seed(seed)
    random = {
        "model/weight": torch.randn(7, 5, generator=generator),
        "model/bias": torch.randn(7, generator=generator).bfloat16(),
        "model/scale": torch.randn((), generator=generator),
        "optimizer/exp_avg.weight": torch.randn(7, 5, 3, generator=generator).double(),
    }
    return random | {"model/empty": torch.empty(0, 4), "model/mask": torch.tensor([True, False, True])}


def zeros_like(tensors):
    """The same tensors with other values."""
    return {name: torch.zeros_like(x) for name, x in tensors.items()}


def contents(tensors, **kwargs):
    """Contents of a rank that holds everything."""
    return Contents(state_of(tensors), **kwargs)


class NoExchange(Storage):
    """A file system that cannot swap two directories in one step."""

    def exchange(self, a, b):
        return False


def called(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run `distrib checkpoint` with some words; returns its exit code, and what it wrote to stdout and stderr."""
    code = run(["checkpoint", *words], {})
    out, err = capfd.readouterr()
    return code, out, err
