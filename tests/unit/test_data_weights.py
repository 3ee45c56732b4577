"""What each batch counts for: the mean losses of all ranks, weighted, averaged and added up, are the window's mean."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader

from distrib.collectives.single import SingleCollectives
from distrib.data.indexed import Indexed
from distrib.data.options import DataOptions
from distrib.devices import choose_device


def loader_of(sizes, micro_batch):
    """A loader of batches of these sizes, or, with a micro-batch, of as many samples."""
    starts = [0, *itertools.accumulate(sizes)]
    samples = list(range(starts[-1]))
    if micro_batch:
        return DataLoader(samples, batch_size=micro_batch)
    batches = [samples[a:b] for a, b in itertools.pairwise(starts)]
    return DataLoader(samples, batch_sampler=batches)


def rounds_of(loader, rank, world_size, tail, window):
    backend, _ = choose_device("cpu", 1)
    options = DataOptions(
        rank, world_size, torch.device("cpu"), tail, 0, None, 1, SingleCollectives(), backend
    )
    return list(Indexed(loader, options, [rank]).rounds(0, 0, 0, window))


@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
@given(data=st.data())
def test_every_sample_of_a_window_counts_the_same_and_all_together_one(tail, data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=9), "sizes")
    micro_batch = data.draw(st.sampled_from([0, 1, 3]), "micro_batch")
    world_size, accumulation = data.draw(st.integers(1, 3), "ranks"), data.draw(st.integers(1, 3), "steps")
    window = world_size * accumulation * (micro_batch or 1)

    weight_of_row = defaultdict(set)
    total = defaultdict(float)
    for rank in range(world_size):
        for found in rounds_of(loader_of(sizes, micro_batch), rank, world_size, tail, window):
            of_window, weight = found.step.window_stop, found.weights[0]
            total[of_window] += weight / world_size
            if weight:
                weight_of_row[of_window].add(round(weight / len(found.batches[0]), 9))

    assert all(abs(x - 1) < 1e-9 for x in total.values()), dict(total)
    assert all(len(x) == 1 for x in weight_of_row.values()), dict(weight_of_row)
