"""Every length, batch size, world size and number of workers: each sample once, the same global batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distrib import Accelerator, RunConfig
from distrib.testing import run_ranks

LENGTHS, BATCHES = (0, 1, 2, 7, 64, 1000), (1, 2, 3, 4, 5)
GLOBAL = 60  # of every combination, so that its batches can be compared


class Numbers(IterableDataset):
    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return iter(torch.arange(self.n))


def seen(workers: int, iterable: bool) -> dict[tuple[int, int], tuple[list[int], list[list[int]]]]:
    """Return, for each length and batch size, the samples in metrics and the sorted samples of each global batch."""
    found = {}
    for n in LENGTHS:
        for batch in BATCHES:
            accelerator = Accelerator(RunConfig(device="cpu", seed=1, global_batch_size=GLOBAL))
            data = Numbers(n) if iterable else TensorDataset(torch.arange(n))
            shuffles = not iterable and n > 0  # torch's RandomSampler wants a sample
            loader = accelerator.prepare(
                DataLoader(data, batch_size=batch, shuffle=shuffles, num_workers=workers)
            )
            metrics, windows, window = [], [], []
            for x in loader:
                ids = accelerator.gather_for_metrics(x if iterable else x[0]).tolist()
                metrics += ids
                window += ids
                if accelerator.sync_gradients:
                    windows.append(sorted(window))
                    window = []
            assert not window
            found[n, batch] = metrics, windows
            accelerator.free_memory()
    return found


@pytest.fixture(scope="module")
def alone():
    return {iterable: run_ranks(seen, 1, 0, iterable, timeout_s=100)[0] for iterable in (False, True)}


def check(alone, world_size, workers, iterable):
    for found in run_ranks(seen, world_size, workers, iterable, timeout_s=250):
        for (n, batch), (metrics, windows) in found.items():
            assert sorted(metrics) == list(range(n)), (n, batch)
            assert windows == alone[iterable][n, batch][1], (n, batch)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world_size", "workers", "iterable"), [(1, 0, True), (3, 0, False), (2, 0, True)])
def test_each_sample_once_and_the_same_global_batches(alone, world_size, workers, iterable):
    check(alone, world_size, workers, iterable)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2), (4, 0), (4, 2)])
def test_each_sample_once_in_the_whole_matrix(alone, world_size, workers, iterable):
    check(alone, world_size, workers, iterable)
