"""Saves in the background over real ranks, which talk to each other meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator, CheckpointError
from distrib.checkpoint import latest, verify
from distrib.checkpoint.storage import Storage
from distrib.testing import RanksFailed, run_ranks


def prepared(folder):
    accelerator = Accelerator(cpu=True, project_dir=folder, seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    return accelerator, *accelerator.prepare(model, optimizer)


def step(accelerator, model, optimizer):
    loss = model(torch.ones(2, 64) * (accelerator.process_index + 1)).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.gather(loss.detach()).tolist()


def trains_while_it_saves(folder):
    accelerator, model, optimizer = prepared(folder)
    slow = threading.Event()
    write = Storage.write

    def slowly(storage, file, data):
        slow.wait(0.05)
        write(storage, file, data)

    Storage.write = slowly
    losses = []
    for k in range(12):
        losses.append(step(accelerator, model, optimizer))
        if k % 4 == 1:
            handle = accelerator.save_state(blocking=False)
    handle.wait()
    weights = [x.detach().clone() for x in model.parameters()]
    accelerator.load_state()
    resumed = [step(accelerator, model, optimizer) for _ in range(2)]
    return (
        losses,
        resumed,
        accelerator.is_main_process and str(latest(Path(folder) / "checkpoints")),
        len(weights),
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_checkpoint_is_of_the_step_of_the_call_whatever_the_ranks_do_meanwhile(tmp_path, ranks):
    for losses, resumed, newest, _ in run_ranks(trains_while_it_saves, ranks, str(tmp_path)):
        assert resumed == losses[10:]
        if newest:
            assert newest.endswith("step-00000010")
    for path in (tmp_path / "checkpoints").iterdir():
        verify(path)


def fails_on_one_rank(folder):
    accelerator, model, optimizer = prepared(folder)
    step(accelerator, model, optimizer)
    accelerator.save_state()
    step(accelerator, model, optimizer)
    if accelerator.process_index == 1:

        def refuse(*_):
            raise OSError(28, "No space left on device")

        Storage.write = refuse
    accelerator.save_state(blocking=False)
    with pytest.raises(CheckpointError) as caught:
        accelerator.save_state(blocking=False)
    return str(caught.value)


def test_a_failure_of_one_rank_is_raised_on_all_at_the_next_call(tmp_path):
    told = run_ranks(fails_on_one_rank, 2, str(tmp_path))

    assert all("rank 1: writing the checkpoint failed: No space left on device" in text for text in told)
    found = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step-00000001"]
    verify(found[0])


def dies_while_it_writes(folder, who):
    accelerator, model, optimizer = prepared(folder)
    step(accelerator, model, optimizer)
    accelerator.save_state()
    step(accelerator, model, optimizer)
    if accelerator.process_index == who:

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        Storage.write = die
    accelerator.save_state(blocking=False).wait()


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_in_the_background_leaves_the_older_checkpoint(tmp_path, who):
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(dies_while_it_writes, 2, str(tmp_path), who)

    found = latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "step-00000001"
    verify(found)
