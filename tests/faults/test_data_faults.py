"""Faults of the data path: a worker that is killed, ranks that were given different data or seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distrib import Accelerator
from distrib.errors import ConfigError, DataError
from distrib.testing import ranks
from tests.faults.launching import launch, script

LOSES_A_WORKER = """
    import os, signal
    import psutil, torch
    from torch.utils.data import DataLoader, TensorDataset
    from distrib import Accelerator

    accelerator = Accelerator(cpu=True)
    data = TensorDataset(torch.arange(100000.0))
    loader = accelerator.prepare(DataLoader(data, batch_size=2, num_workers=1))
    for number, _ in enumerate(loader):
        if number == 3 and accelerator.is_last_process:
            workers = [x for x in psutil.Process().children() if "resource_tracker" not in " ".join(x.cmdline())]
            print("killing", workers[0].pid, flush=True)
            os.kill(workers[0].pid, signal.SIGKILL)
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_data_worker_ends_the_job_with_its_process_id(tmp_path: Path, num_processes: int) -> None:
    done = launch("-n", num_processes, script(tmp_path, LOSES_A_WORKER), cwd=tmp_path)
    killed = done.out.split("killing ")[1].split()[0]
    assert done.code == 1
    assert done.seconds < 20
    told = "\n".join(done.report)
    assert (
        f"process id {killed} (SIGKILL)" in told or f"(pid {killed}) is killed by signal: Killed" in told
    ), done.err


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@ranks(2, 3)
def test_ranks_with_different_loaders_are_told_at_prepare_with_both_values():
    accelerator = Accelerator(cpu=True)
    last = accelerator.is_last_process
    same = TensorDataset(torch.arange(10))
    for mine, what in (
        (
            DataLoader(TensorDataset(torch.arange(11 if last else 10))),
            "the length of the data set is 10 .* and 11",
        ),
        (DataLoader(same, batch_size=3 if last else 2), "batch_size is 2 .* and 3"),
        (DataLoader(same, batch_size=2, drop_last=last), "drop_last is False .* and True"),
        (DataLoader(same, shuffle=last), "the sampler is SequentialSampler .* and RandomSampler"),
        (DataLoader(Endless() if last else same), "the data set's class is TensorDataset .* and Endless"),
    ):
        with pytest.raises(DataError, match=f"D0518.*{what} on rank {accelerator.num_processes - 1}"):
            accelerator.prepare(mine)


@ranks(2)
def test_ranks_with_different_seeds_are_told_at_prepare_with_both():
    accelerator = Accelerator(cpu=True, seed=5)
    other = Accelerator(cpu=True, seed=5 + accelerator.process_index)
    with pytest.raises(ConfigError, match=r"D0123.*rank 0 has seed 5, rank 1 has seed 6"):
        other.prepare(torch.nn.Linear(1, 1))
