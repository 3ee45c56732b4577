"""What is refused, with its code, and leaves all as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

from distrib import Accelerator, RunConfig, set_seed
from distrib.errors import CheckpointError, ConfigError, DataError, StrategyError, TrainingError
from distrib.testing import ranks, run_ranks


def prepared(optimizer=torch.optim.SGD, samples=8, groups=1, **schedule):
    accelerator = Accelerator(cpu=True, seed=0)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    parts = [[model.weight, model.bias]] if groups == 1 else [[model.weight], [model.bias]]
    optimizer = optimizer([{"params": part} for part in parts], lr=0.1)
    kind = schedule.get("schedule", torch.optim.lr_scheduler.StepLR)
    scheduler = kind(optimizer, 3)
    loader = DataLoader(TensorDataset(torch.arange(float(samples))), batch_size=1)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)


def step(accelerator, model, optimizer, scheduler, loader) -> None:
    for (x,) in loader:
        accelerator.backward(model(x[:, None]).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        break


class AveragedLR(torch.optim.lr_scheduler.StepLR):
    pass


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ({"samples": 9}, "D0502"),
        ({"groups": 2}, "D0790"),
        ({"optimizer": torch.optim.Adagrad}, "D0793"),
        ({"schedule": AveragedLR}, "D0793"),
    ],
)
@ranks(1, 2)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed(tmp_path, other, code):
    first = prepared()
    step(*first)
    first[0].save_state(tmp_path / "saved")
    accelerator, model, optimizer, scheduler, loader = second = prepared(**other)
    step(*second)
    plain = accelerator.unwrap_model(model)
    before = copy.deepcopy(
        (plain.state_dict(), optimizer.state_dict(), scheduler.state_dict(), loader.position)
    )
    with pytest.raises(CheckpointError, match=code):
        accelerator.load_state(tmp_path / "saved")
    after = plain.state_dict(), optimizer.state_dict(), scheduler.state_dict(), loader.position
    assert repr(after) == repr(before)


@ranks(2)
def test_ranks_that_name_different_directories_are_told(tmp_path):
    run = prepared()
    with pytest.raises(CheckpointError, match=r"D0794.*rank 1 names"):
        run[0].save_state(tmp_path / str(run[0].process_index))
    assert not list(tmp_path.iterdir())


class Iterates(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


class Broken(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 5:
            raise ValueError("sample 5 is damaged")
        return torch.tensor(i)


@ranks(1, 2)
def test_loaders_that_cannot_be_prepared_are_refused():
    data = TensorDataset(torch.arange(8))
    with pytest.raises(DataError, match=r"D0516.*Iterates"):
        Accelerator(cpu=True).prepare(Iterates(data))
    own = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, drop_last=False))
    with pytest.raises(ConfigError, match="D0121"):
        Accelerator(cpu=True, global_batch_size=4).prepare(own)
    with pytest.raises(DataError, match="D0506"):
        accelerator = Accelerator(cpu=True)
        accelerator.skip_first_batches(accelerator.prepare(DataLoader(data)), -1)
    with pytest.raises(DataError, match="D0505"):
        _ = Accelerator(cpu=True).sample_mask
    with pytest.raises(StrategyError, match="D0804"):
        Accelerator(cpu=True).prepare([1, 2])


@ranks(2)
def test_what_the_one_reader_could_not_read_is_told_on_every_rank():
    accelerator = Accelerator(RunConfig(device="cpu", data={"dispatch": True}))
    loader = accelerator.prepare(DataLoader(Broken(), batch_size=1))
    kind, said = (ValueError, "sample 5") if accelerator.is_main_process else (DataError, "D0515.*sample 5")
    with pytest.raises(kind, match=said):
        for _ in loader:
            pass


class TwoWordsError(Exception):
    """One of the many that can be pickled and not be unpickled."""

    def __init__(self, kind, number):
        super().__init__(f"bad {kind} {number}")


class BadRecord(Broken):
    def __getitem__(self, i):
        if i == 5:
            raise TwoWordsError("record", i)
        return torch.tensor(i)


@ranks(2)
def test_an_error_of_the_one_reader_that_cannot_travel_is_told_as_it_was():
    accelerator = Accelerator(RunConfig(device="cpu", data={"dispatch": True}))
    loader = accelerator.prepare(DataLoader(BadRecord(), batch_size=1))
    kind = TwoWordsError if accelerator.is_main_process else DataError
    with pytest.raises(kind, match="bad record 5"):
        list(loader)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "a", None])
@ranks(1)
def test_a_seed_is_a_whole_number_of_64_bits(seed):
    with pytest.raises(ConfigError, match="D0122"):
        set_seed(seed)


LOSSES = {
    "rows": lambda y: y,
    "detached": lambda y: y.mean().detach(),
    "a float": lambda y: 1.0,
    "sum": lambda y: y.sum(),
}


@pytest.mark.parametrize(
    ("loss", "count", "code"),
    [
        ("rows", None, "D0607"),
        ("detached", None, "D0607"),
        ("a float", None, "D0607"),
        ("sum", -1, "D0608"),
        ("sum", torch.ones(2), "D0608"),
        ("sum", "8", "D0608"),
    ],
)
@ranks(1, 2)
def test_a_loss_or_count_that_is_none_is_refused(loss, count, code):
    accelerator, model, *_ = prepared()
    with pytest.raises(TrainingError, match=code):
        accelerator.backward(LOSSES[loss](model(torch.ones(4, 1))), count=count)


@ranks(1)
def test_a_loss_after_the_clip_of_a_window_of_sums_is_refused():
    accelerator, model, *_ = prepared()
    accelerator.backward(model(torch.ones(4, 1)).sum(), count=4)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(TrainingError, match="D0605"):
        accelerator.backward(model(torch.ones(4, 1)).sum(), count=4)


def losses_of_a_plain_model(is_prepared):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        accelerator = Accelerator(cpu=True)
        patch.setattr("distrib.accelerator.notice", said.append)
        model = nn.Linear(1, 1)
        if is_prepared:
            model = accelerator.prepare(model)
        for _ in range(2):
            accelerator.backward(model(torch.ones(1, 1)).mean())
    return said


def test_a_model_that_each_rank_trains_for_itself_is_told_of_once():
    first, second = run_ranks(losses_of_a_plain_model, 2, False)
    assert len(first) == 1
    assert "backward on 2 ranks, but no model has been prepared" in first[0]
    assert not second
    assert run_ranks(losses_of_a_plain_model, 1, False) == [[]]
    assert run_ranks(losses_of_a_plain_model, 2, True) == [[], []]
