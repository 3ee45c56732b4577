"""Data sets, samplers and loops that the tests of the data path share; runs inside the ranks."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)  # fmt: skip

from distrib import Accelerator, RunConfig


class Numbers(Dataset):
    """n samples: sample i is i."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor(i)


class Augmented(Numbers):
    """Sample i with noise from all three generators."""

    def __getitem__(self, i):
        return torch.tensor(
            [i, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64
        )


class RarelyAugmented(Numbers):
    """Only every seventh sample draws."""

    def __getitem__(self, i):
        return torch.tensor([i, random.random() if i % 7 == 6 else 0.0], dtype=torch.float64)


class Flow(IterableDataset):
    """A stream of n numbers in an order that it shuffles itself; divides itself over workers, as torch's guide says."""

    def __init__(self, n: int, *, shuffled: bool = False, sized: bool = False, noise: bool = False):
        self.n, self.shuffled, self.noise = n, shuffled, noise
        if sized:
            self.__class__ = SizedFlow

    def __iter__(self):
        numbers = list(range(self.n))
        if self.shuffled:
            random.shuffle(numbers)
        info = get_worker_info()
        for i in numbers[info.id :: info.num_workers] if info is not None else numbers:
            yield torch.tensor([i, random.random()]) if self.noise else torch.tensor(i)


class SizedFlow(Flow):
    def __len__(self):
        return self.n


class Stateful(IterableDataset):
    """A stream that can be brought back to where it stood, and counts what it reads."""

    def __init__(self, n: int):
        self.n, self.at, self.read = n, 0, 0

    def __iter__(self):
        start, self.at = self.at, self.at
        for i in range(start, self.n):
            self.at, self.read = i + 1, self.read + 1
            yield torch.tensor(i)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class PartOfRank(IterableDataset):
    """A stream that divides itself over the ranks, unevenly."""

    def __init__(self, lengths: list[int], rank: int):
        self.own = range(100 * rank, 100 * rank + lengths[rank])

    def __iter__(self):
        return (torch.tensor(i) for i in self.own)


class Reversed(Sampler):
    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))


class Endless(Sampler):
    """Draws without end, from the global generator."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        while True:
            yield int(torch.randint(self.n, ()))


class BySize(Sampler):
    """Batches of growing size."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self):
        return sum(1 for _ in self)

    def __iter__(self):
        start, size = 0, 1
        while start < self.n:
            yield list(range(start, min(start + size, self.n)))
            start, size = start + size, size % 4 + 1


def ids(batch) -> torch.Tensor:
    return batch[:, 0].long() if batch.dim() > 1 else batch


def make_loader(kind: str, n: int, batch: int, workers: int, rank: int, world_size: int) -> DataLoader:
    options = {"num_workers": workers}
    data = Numbers(n)
    match kind:
        case "in order":
            return DataLoader(data, batch_size=batch, **options)
        case "shuffled":
            return DataLoader(data, batch_size=batch, shuffle=True, **options)
        case "persistent":
            return DataLoader(data, batch_size=batch, shuffle=True, num_workers=2, persistent_workers=True)
        case "spawned":
            return DataLoader(data, batch_size=batch, num_workers=1, multiprocessing_context="spawn")
        case "own sampler":
            return DataLoader(data, batch_size=batch, sampler=Reversed(n), **options)
        case "weighted":
            return DataLoader(data, batch_size=batch, sampler=WeightedRandomSampler([1.0] * n, n), **options)
        case "batch sampler":
            return DataLoader(data, batch_sampler=BySize(n), **options)
        case "torch's batch sampler":
            return DataLoader(
                data, batch_sampler=BatchSampler(Reversed(n), batch, drop_last=False), **options
            )
        case "distributed":
            sampler = DistributedSampler(data, world_size, rank, shuffle=True, seed=3)
            return DataLoader(data, batch_size=batch, sampler=sampler, **options)
        case "single":
            return DataLoader(data, batch_size=None, shuffle=True, **options)
        case "stream":
            return DataLoader(Flow(n), batch_size=batch, **options)
        case "sized stream":
            return DataLoader(Flow(n, sized=True), batch_size=batch, **options)
        case "shuffled stream":
            return DataLoader(Flow(n, shuffled=True), batch_size=batch, **options)
        case "single stream":
            return DataLoader(Flow(n), batch_size=None, **options)
        case "stateful stream":
            return DataLoader(Stateful(n), batch_size=batch, **options)
    raise AssertionError(kind)


KINDS = (
    "in order", "shuffled", "persistent", "own sampler", "weighted", "batch sampler", "torch's batch sampler",
    "distributed", "single", "stream", "sized stream", "shuffled stream", "single stream", "stateful stream",
)  # fmt: skip
BATCHED_BY_USER = ("batch sampler", "torch's batch sampler")


def windows(
    kind, n, batch, *, workers=0, epochs=2, global_batch=None, accumulation=None, tail="exact", dispatch=False,
    seed=5, folder=None, stop_after=None, save_at=(), device_rows=False,
):  # fmt: skip
    """Return the sorted samples of each window, epoch by epoch; resume from `folder` and save there."""
    config = RunConfig(data={"tail": tail, "dispatch": dispatch}, device="cpu", seed=seed)
    accelerator = Accelerator(
        config, global_batch_size=global_batch, gradient_accumulation_steps=accumulation, project_dir=folder
    )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loader = accelerator.prepare(make_loader(kind, n, batch, workers, rank, world_size))
    if folder is not None:
        accelerator.load_state()
    found, window, seen = [], [], 0
    for _ in range(loader.epoch, epochs):
        for x in loader:
            rows = accelerator.gather_for_metrics(ids(x.reshape(-1)) if x.dim() == 0 else ids(x)).tolist()
            window += rows
            if loader.micro_step.closes:
                found.append((loader.epoch, window))
                window, seen = [], seen + 1
                if seen in save_at:
                    accelerator.save_state()
                if seen == stop_after:
                    return found
    return found
