"""Where a loop begins: after a checkpoint, after `skip_first_batches`, and after a loop that was left at once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from distrib import Accelerator, RunConfig
from distrib.state import LoaderPosition
from distrib.testing import run_ranks


class Flow(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(40.0).view(40, 1))


def prepared(project_dir, kind="in order", **options):
    accelerator = Accelerator(cpu=True, seed=3, project_dir=project_dir, **options)
    data = Flow() if kind == "stream" else list(torch.arange(40.0).view(40, 1))
    loader = DataLoader(data, batch_size=2, shuffle=True if kind == "shuffled" else None)
    model = torch.nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), loader
    )
    return accelerator, model, optimizer, loader


def train(accelerator, model, optimizer, loader, most=None):
    """Train and return (samples, window's end, whether the optimizer stepped) of each batch."""
    seen = []
    for index, x in enumerate(loader):
        if index == most:
            break
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        seen.append((x.flatten().tolist(), loader.micro_step.window_stop, accelerator.sync_gradients))
    return seen


KINDS = ["in order", "shuffled", "stream"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_left_before_its_first_step_keeps_the_restored_position(tmp_path, kind):
    whole = train(*prepared(tmp_path, kind))
    accelerator, *parts = prepared(tmp_path, kind)
    train(accelerator, *parts, most=10)
    accelerator.save_state()

    accelerator, *parts = prepared(tmp_path, kind)
    accelerator.load_state()
    for _ in range(2):
        assert train(accelerator, *parts, most=0) == []
        assert parts[-1].position.consumed == 20
    accelerator.save_state(tmp_path / "again")

    accelerator, *parts = prepared(tmp_path, kind)
    accelerator.load_state(tmp_path / "again")
    assert train(accelerator, *parts) == whole[10:]


def test_an_evaluation_left_after_a_restored_start_begins_anew(tmp_path):
    _accelerator, _, _, loader = prepared(tmp_path)
    loader.position = LoaderPosition(0, 3, 8, 2, 40)
    for first, _ in zip(loader, range(3), strict=False):
        if loader.micro_step.start == 8:
            assert first.flatten().tolist() == [8.0, 9.0]
    assert next(iter(loader)).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_batches", [1, 3, 4, 19, 20, 21])
def test_batches_that_are_skipped_leave_the_windows_as_they_are(tmp_path, kind, num_batches):
    whole = train(*prepared(tmp_path, kind, gradient_accumulation_steps=4))
    accelerator, *parts = prepared(tmp_path, kind, gradient_accumulation_steps=4)
    accelerator.skip_first_batches(parts[-1], num_batches)
    if kind != "stream" and num_batches < 20:
        assert parts[-1].position.consumed == num_batches // 4 * 8
    assert train(accelerator, *parts) == whole[num_batches:]
    if kind != "stream" or num_batches < 20:
        assert [x for x, _, _ in train(accelerator, *parts)] == epoch_after(tmp_path, kind)


def epoch_after(tmp_path, kind):
    accelerator, *parts = prepared(tmp_path, kind, gradient_accumulation_steps=4)
    parts[-1].set_epoch(1)
    return [x for x, _, _ in train(accelerator, *parts)]


def test_a_skip_is_still_to_come_after_a_loop_that_was_left_at_once(tmp_path):
    accelerator, *parts = prepared(tmp_path, gradient_accumulation_steps=4)
    accelerator.skip_first_batches(parts[-1], 3)
    train(accelerator, *parts, most=0)
    assert train(accelerator, *parts)[0][0] == [6.0, 7.0]


def dispatched(tmp_path, kind, num_batches):
    accelerator, *parts = prepared(
        tmp_path, kind, gradient_accumulation_steps=4, config=RunConfig(data={"dispatch": True})
    )
    accelerator.skip_first_batches(parts[-1], num_batches)
    return train(accelerator, *parts)


def test_one_reader_for_all_skips_for_all(tmp_path):
    whole = run_ranks(dispatched, 2, tmp_path, "stream", 0)
    rest = run_ranks(dispatched, 2, tmp_path, "stream", 3)
    assert rest == [x[3:] for x in whole]
