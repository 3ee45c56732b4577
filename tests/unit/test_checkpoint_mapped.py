"""Optimizer state that a load makes is the checkpoint's file itself, copied page by page when it is changed."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from distrib import Accelerator
from distrib.checkpoint import files, verify

WIDTH = 256  # a moment of a weight is larger than what is read rather than mapped


def prepared(seed: int, *, steps: int) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """Return a run on one process whose optimizer has taken some steps."""
    torch.manual_seed(seed)
    accelerator, model = Accelerator(cpu=True), nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return accelerator, model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.linspace(0, 1, 4 * WIDTH).view(4, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def moments(model: nn.Linear, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[model.weight][key] for key in ("exp_avg", "exp_avg_sq")]


def is_mapped(directory: Path) -> bool:
    """Whether this process has an optimizer's file of the checkpoint mapped, even if it has been removed since."""
    return f"{directory}/optimizer/" in Path("/proc/self/maps").read_text()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A checkpoint, and the moments in it."""
    accelerator, model, optimizer = prepared(0, steps=3)
    accelerator.save_state(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", [x.clone() for x in moments(model, optimizer)]


def test_new_state_has_the_stored_values_and_is_mapped(saved: tuple[Path, list[torch.Tensor]]):
    directory, values = saved
    accelerator, model, optimizer = prepared(1, steps=0)
    accelerator.load_state(directory)
    assert is_mapped(directory)
    assert all(map(torch.equal, moments(model, optimizer), values))


def test_training_on_leaves_the_file_as_it_is(saved: tuple[Path, list[torch.Tensor]]):
    directory, values = saved
    accelerator, model, optimizer = prepared(1, steps=0)
    accelerator.load_state(directory)
    step(model, optimizer)
    assert not torch.equal(moments(model, optimizer)[0], values[0])
    verify(directory)


def test_state_outlives_the_removal_of_its_checkpoint(saved: tuple[Path, list[torch.Tensor]]):
    directory, values = saved
    accelerator, model, optimizer = prepared(1, steps=0)
    accelerator.load_state(directory)
    shutil.rmtree(directory)
    assert all(map(torch.equal, moments(model, optimizer), values))


def test_state_that_is_there_is_filled_in_place(saved: tuple[Path, list[torch.Tensor]]):
    directory, values = saved
    accelerator, model, optimizer = prepared(1, steps=1)
    before = [x.data_ptr() for x in moments(model, optimizer)]
    accelerator.load_state(directory)
    assert [x.data_ptr() for x in moments(model, optimizer)] == before
    assert all(map(torch.equal, moments(model, optimizer), values))


@pytest.mark.parametrize(("name", "value"), [("_is_local", lambda _: False), ("_ROOM", 2**60)])
def test_it_is_read_from_a_network_and_where_space_is_short(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch, name: str, value: object
):
    directory, values = saved
    monkeypatch.setattr(files, name, value)
    accelerator, model, optimizer = prepared(1, steps=0)
    accelerator.load_state(directory)
    assert not is_mapped(directory)
    assert all(map(torch.equal, moments(model, optimizer), values))


def test_a_failed_load_leaves_an_optimizer_without_state(saved: tuple[Path, list[torch.Tensor]]):
    directory, _ = saved
    accelerator, model, optimizer = prepared(1, steps=0)
    (directory / "optimizer").rename(directory / "gone")
    with pytest.raises(Exception, match="D0704"):
        accelerator.load_state(directory)
    assert not optimizer.state
    assert model.weight.isfinite().all()
