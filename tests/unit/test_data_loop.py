"""Without workers the batches are made by our own loop; what only torch's loop does is left to it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from distrib import Accelerator
from distrib.data.indexed import Indexed
from distrib.errors import DataError


def prepared(**options):
    data = TensorDataset(torch.arange(11))
    return Accelerator(cpu=True, seed=3).prepare(DataLoader(data, batch_size=4, shuffle=True, **options))


def batches(loader) -> list[list[int]]:
    return [x.tolist() for (x,) in loader]


def test_without_workers_torchs_loop_is_not_run(monkeypatch):
    loader = prepared()

    def refuse(self):
        raise AssertionError("torch's own loop ran")

    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    assert sorted(i for batch in batches(loader) for i in batch) == list(range(11))


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 2}])
def test_our_loop_gives_the_batches_of_torchs_with_workers(options):
    ours, torchs = prepared(), prepared(**options)
    for _ in range(2):
        assert batches(ours) == batches(torchs)


def test_our_loop_gives_the_batches_of_torchs_without_workers():
    ours, torchs = prepared(), prepared()
    source = torchs._source
    assert isinstance(source, Indexed)
    source._reads_here = False
    for _ in range(2):
        assert batches(ours) == batches(torchs)


def test_a_time_limit_without_workers_is_refused_as_torch_refuses_it():
    given = DataLoader(TensorDataset(torch.arange(4)), timeout=5)
    with pytest.raises(AssertionError) as expected:
        iter(given)
    with pytest.raises(AssertionError) as found:
        batches(prepared(timeout=5))
    assert str(found.value) == str(expected.value)


def test_an_error_in_a_sample_is_the_data_sets_own():
    class Broken(TensorDataset):
        def __getitem__(self, i):
            raise KeyError(f"sample {i} is missing")

    loader = Accelerator(cpu=True).prepare(DataLoader(Broken(torch.arange(3))))
    with pytest.raises(KeyError, match="sample 0 is missing"):
        batches(loader)


def test_a_loop_that_was_left_begins_its_epoch_anew():
    loader = prepared()
    first = next(iter(loader))
    assert batches(loader)[0] == first[0].tolist()


def trained(accelerator, loader, parameter, optimizer, num_batches) -> None:
    """Train on the first batches of an epoch, and leave it."""
    for (x,), _ in zip(loader, range(num_batches), strict=False):
        accelerator.backward((parameter * x).mean())
        optimizer.step()
        optimizer.zero_grad()


def training(**options):
    accelerator = Accelerator(cpu=True, seed=3, **options)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    loader = DataLoader(TensorDataset(torch.arange(11.0)), batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, model.weight, optimizer, loader


def test_an_epoch_that_training_left_and_begins_anew_is_told_of_once(capsys):
    accelerator, parameter, optimizer, loader = training()
    for _ in range(3):
        trained(accelerator, loader, parameter, optimizer, 2)
    assert capsys.readouterr().err.count("same epoch anew") == 1


@pytest.mark.parametrize("leave", ["whole epochs", "set_epoch", "no step"])
def test_nothing_is_told_where_no_trained_sample_comes_again(leave, capsys):
    accelerator, parameter, optimizer, loader = training()
    for epoch in range(3):
        if leave == "set_epoch":
            loader.set_epoch(epoch)
        if leave == "no step":
            next(iter(loader))
        else:
            trained(accelerator, loader, parameter, optimizer, 99 if leave == "whole epochs" else 2)
    assert "same epoch anew" not in capsys.readouterr().err


def test_an_iterator_that_outlives_its_loop_does_not_disturb_the_one_that_runs():
    accelerator, parameter, optimizer, loader = training(gradient_accumulation_steps=2)
    looked_at = iter(loader)
    next(looked_at)
    for i, (x,) in enumerate(loader):
        if i == 1:
            looked_at.close()
        with accelerator.accumulate():
            accelerator.backward((parameter * x).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.num_steps == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("draws", [False, True])
def test_a_stop_iteration_in_a_sample_is_an_error_and_not_the_end_of_the_epoch(draws: bool, workers: int):
    class Ends(TensorDataset):
        def __getitem__(self, i):
            if draws:
                torch.rand(1)
            return super().__getitem__(i) if i < 6 else next(iter(()))

    loader = DataLoader(Ends(torch.arange(11)), batch_size=2, num_workers=workers)
    loader = Accelerator(cpu=True, seed=3).prepare(loader)
    with pytest.raises((DataError, RuntimeError), match=r"D0520.*Ends raised StopIteration"):
        batches(loader)
